"""What the callbacks that draw share; normalisation is undone in `test_neighbour_gallery.py`."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matrix import Loader, Net, batches, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litzoo.callbacks import NeighbourGallery
from litzoo.callbacks.pictures import EvenlySpread, raw_images


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 9, 100, 1000])
def test_items_are_spread_evenly_over_a_stream(length: int, batch: int) -> None:
    spread: EvenlySpread[int] = EvenlySpread(4)
    made: list[int] = []
    for part in torch.arange(length).split(batch):

        def make(row: int, part: torch.Tensor = part) -> int:
            made.append(int(part[row]))
            return made[-1]

        spread.offer(len(part), make)
    chosen = spread.chosen()
    assert len(chosen) == min(4, length)
    assert len(made) <= 4 * (1 + max(length, 1).bit_length()), "few are made"
    if length >= 4:
        steps = [after - before for before, after in pairwise(chosen)]
        assert max(steps) <= 2 * min(steps)
        assert length - chosen[-1] <= 2 * max(steps)


@pytest.mark.parametrize(("channels", "drawn"), [(1, 1), (3, 3), (5, 1)])
def test_each_image_is_stretched_where_nobody_knows_its_range(channels: int, drawn: int, tmp_path: Path) -> None:
    images = torch.randn(4, channels, 6, 8, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 0.0])[:, None, None, None]
    found = raw_images(make_trainer(tmp_path), Net(), images)
    assert found.shape == (4, 6, 8, drawn)
    assert found.dtype == torch.float32
    for image, given in zip(found, images, strict=True):
        stretched = (given - given.min()) / (given.max() - given.min()).clamp_min(1e-12)
        expected = stretched if drawn == channels else stretched.mean(0, keepdim=True)
        assert torch.allclose(image.double(), expected.permute(1, 2, 0), atol=1e-5)


def test_loggers_get_the_gallery(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    gallery = NeighbourGallery(1, 1, reference_loader=batches(3))
    make_trainer(tmp_path, gallery, logger=board).validate(Net(), Loader(batches(9, 1)), verbose=False)
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["neighbours/val"]
