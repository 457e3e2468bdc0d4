"""`SampleGrid` draws what the module generates, and leaves the training alone; also the script of its two processes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Loader, Manual, Net, batches, make_trainer, precision_settings
from PIL import Image
from torch import Tensor

from litzoo.callbacks import EMA, SampleGrid, StepSeed
from litzoo.zoo.plots import samples as plots

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
Drawn = list[tuple[np.ndarray, np.ndarray, str]]
CURVE = ["train/loss", "val/loss"]


class Generating(Net):
    """Somebody's network that also generates images, with torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))

    def sample(self, number: int, seed: int) -> Tensor:
        assert not self.training
        torch.manual_seed(seed)
        noise = torch.rand(number, 2, 4, 4)
        return (noise * self.last.bias.sum().sigmoid()).clamp(0, 1)


def images(seed: int, number: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Pictures of one pixel and two channels."""
    return [(x[:, :, None, None], y) for x, y in batches(seed, number)]


def large(seed: int, number: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Pictures of the size of those that are generated, whose upper left pixel is what the network sees."""
    return [(torch.nn.functional.pad(x, (0, 3, 0, 3)), y) for x, y in images(seed, number)]


class Large(Generating):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :1, :1])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What was drawn, without the time that a picture takes."""
    from matplotlib.figure import Figure

    calls: Drawn = []

    def plot(*arguments: Any) -> Figure:
        calls.append(arguments)
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(plots, "plot_samples", plot)
    return calls


def test_epochs_seeds_and_real_images(tmp_path: Path, drawn: Drawn) -> None:
    model = Large()
    callback = SampleGrid(9, every_n_epochs=2, seed=5)
    trainer = make_trainer(tmp_path, callback, max_epochs=5)
    trainer.fit(model, Loader(large(0)), Loader(large(9, 2)))
    assert [title for *_, title in drawn] == [f"epoch {epoch}, seed 5" for epoch in (0, 1, 3, 4)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"epoch_{epoch:03d}.png" for epoch in (0, 1, 3, 4)]
    made, real, _ = drawn[-1]
    with torch.no_grad():
        expected = model.eval().sample(9, 5)
    np.testing.assert_allclose(made[..., 0], expected.mean(dim=1), atol=1e-6)
    # Of all validation batches, from its darkest to its brightest value; of two channels the mean.
    assert real.shape == (8, 4, 4, 1)
    first = torch.cat([batch[0] for batch in large(9, 2)])
    low, high = first.amin((1, 2, 3), keepdim=True), first.amax((1, 2, 3), keepdim=True)
    np.testing.assert_allclose(real[..., 0], ((first - low) / (high - low)).mean(dim=1), atol=1e-6)

    trainer.validate(model, Loader(large(8, 2)), verbose=False)
    trainer.test(model, Loader(images(8, 2)), verbose=False)
    assert [title for *_, title in drawn[-2:]] == ["val, seed 5", "test, seed 5"]
    assert len(drawn[-1][1]) == 0, "real images of another size are no comparison"


def test_without_validation_the_last_training_batch(tmp_path: Path, drawn: Drawn) -> None:
    make_trainer(tmp_path, SampleGrid(4)).fit(Large(), Loader(large(0)))
    assert [title for *_, title in drawn] == ["epoch 0, seed 0", "epoch 2, seed 0"]
    assert len(drawn[-1][1]) == 4
    # In epochs that are not validated as well; batches that hold no images are no error.
    drawn.clear()
    trainer = make_trainer(tmp_path, SampleGrid(4, every_n_epochs=1), check_val_every_n_epoch=2)
    trainer.fit(Large(), Loader(large(0)), Loader(large(9, 2)))
    assert [title for *_, title in drawn] == [f"epoch {epoch}, seed 0" for epoch in (0, 1, 2)]
    assert [len(real) for _, real, _ in drawn] == [4, 4, 4]
    SampleGrid()._keep(Generating(), {"image": 1})


def test_curves_have_a_point_for_each_epoch_and_survive_a_resume(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, ckpt_path: Path | None = None) -> SampleGrid:
        callback = SampleGrid(4, every_n_epochs=99, curve=[*CURVE, "nobody/logs_this"])
        saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = make_trainer(folder, callback, saving, enable_checkpointing=True, max_epochs=epochs, check_val_every_n_epoch=2)
        trainer.fit(
            Generating(), Loader(images(0)), Loader(images(9, 2)), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True
        )
        return callback

    whole = run(tmp_path / "whole", 5)
    epochs = {name: points[0] for name, points in whole._points.items()}
    assert epochs == {"train/loss": [0, 1, 2, 3, 4], "val/loss": [1, 3]}
    resumed = run(tmp_path / "resumed", 5, tmp_path / "whole" / "epoch=2.ckpt")
    assert resumed._points == whole._points
    with Image.open(tmp_path / "resumed" / "samples" / "curve.png") as image:
        assert min(image.size) > 300


def trained(folder: Path, precision: str, *callbacks: Any, model: Any = None, **settings: Any) -> dict[str, Tensor]:
    model = model or Generating(norm=True)
    trainer = make_trainer(folder, StepSeed(1), *callbacks, **precision_settings(precision), **settings)
    trainer.fit(model, Loader(images(0)), Loader(images(9, 2)))
    assert model.training
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed, GradScaler"])
def test_training_is_left_alone(precision: str, tmp_path: Path) -> None:
    callback = pickle.loads(pickle.dumps(SampleGrid(4, curve=CURVE)))
    with_it, without = trained(tmp_path, precision, callback, EMA(0.9)), trained(tmp_path, precision, EMA(0.9))
    for name, value in without.items():
        assert torch.equal(with_it[name], value), name
    with Image.open(tmp_path / "samples" / "epoch_002.png") as image:
        assert min(image.size) > 100
    assert torch.equal(trained(tmp_path, precision, copy.deepcopy(callback), EMA(0.9))["first.weight"], without["first.weight"]), "again"


class ManualGenerating(Manual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))

    sample = Generating.sample


def test_manual_optimisation_of_two_optimisers(tmp_path: Path, drawn: Drawn) -> None:
    found = trained(tmp_path, "32-true", SampleGrid(4), model=ManualGenerating(2))
    expected = trained(tmp_path, "32-true", model=ManualGenerating(2))
    assert len(drawn) == 2
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_under_ema_the_average_is_drawn(tmp_path: Path, drawn: Drawn) -> None:
    model = Generating()
    make_trainer(tmp_path, EMA(0.9), SampleGrid(4)).fit(model, Loader(images(0)), Loader(images(9, 2)))
    with torch.no_grad():  # which EMA leaves in the module
        np.testing.assert_allclose(drawn[-1][0][..., 0], model.eval().sample(4, 0).mean(dim=1), atol=1e-6)


def test_dev_run_and_sanity_check_draw_nothing(tmp_path: Path, drawn: Drawn) -> None:
    make_trainer(tmp_path, SampleGrid(curve=CURVE), fast_dev_run=True).fit(Generating(), Loader(images(0)), Loader(images(9, 2)))
    assert drawn == []
    assert not (tmp_path / "samples").exists()


def test_a_training_that_diverged_is_drawn(tmp_path: Path, drawn: Drawn) -> None:
    model = Generating()
    model.sample = lambda number, seed: torch.full((number, 1, 4, 4), torch.nan)  # type: ignore[method-assign]  # diverged
    make_trainer(tmp_path, SampleGrid(4)).validate(model, Loader(images(9, 2)), verbose=False)
    assert not drawn[0][0].any()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (lambda number, seed: torch.rand(number, 4), r"got torch.float32 of shape \(4, 4\)"),
        (lambda number, seed: torch.rand(2, 1, 4, 4), r"must give 4 images .* got torch.float32 of shape \(2, 1, 4, 4\)"),
        (lambda number, seed: torch.zeros(number, 1, 4, 4, dtype=torch.uint8), "got torch.uint8"),
        (lambda number, seed: None, "got NoneType"),
        (lambda number, seed: torch.full((number, 1, 4, 4), -1.5), r"got -1.5 to -1.5: undo the normalisation"),
    ],
)
def test_samples_that_are_no_images_are_refused(samples: Any, message: str, tmp_path: Path) -> None:
    model = Generating()
    model.sample = samples  # type: ignore[method-assign]  # on purpose
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, SampleGrid(4)).validate(model, Loader(images(9, 2)), verbose=False)


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Net generates, which has no sample"):
        make_trainer(tmp_path, SampleGrid()).fit(Net(), Loader(batches(0)))
    for numbers in ((0, 10), (64, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            SampleGrid(*numbers)


def run_rank(folder: Path) -> None:
    """In each of two processes."""
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "max_epochs": 1}
    make_trainer(folder, SampleGrid(4, curve=CURVE), **settings).fit(Generating(), Loader(images(0)), Loader(images(9, 2)))


def test_two_processes_draw_once(rank_folder: Path) -> None:
    assert sorted(path.name for path in (rank_folder / "samples").iterdir()) == ["curve.png", "epoch_000.png"]
