"""MixUp and CutMix: what they draw, and what they leave alone; their formulas are tested with the image classifier."""

import pytest
import torch

from litzoo.zoo.functional.mixing import mix_images


def test_of_mixup_and_cutmix_one_is_drawn_per_batch() -> None:
    images, label = torch.rand(4, 3, 16, 16), torch.arange(4)
    kinds = []
    for _ in range(20):
        mixed, target = mix_images(images, label, 5, mixup=1.0, cutmix=1.0)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        kinds.append(bool(((mixed == images) | (mixed == images.roll(1, 0))).all()))
    assert 0 < sum(kinds) < 20
    assert mixed.shape == images.shape
    torch.manual_seed(5)
    first = mix_images(images, label, 5, 1.0, 1.0)
    torch.manual_seed(5)
    assert all(map(torch.equal, first, mix_images(images, label, 5, 1.0, 1.0))), "nothing but torch's global seed decides"


def test_neutral_settings_mix_nothing() -> None:
    images, label = torch.rand(4, 3, 16, 16), torch.arange(4)
    state = torch.random.get_rng_state()
    mixed, target = mix_images(images, label, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert mixed is images
    assert target is label


def test_mixing_follows_the_keys_of_the_batch_and_leaves_the_global_stream_alone() -> None:
    """A second pass over the same batch, as SAM makes it, mixes as the first did."""
    images, label = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    keys = torch.arange(8) + 2**60
    torch.manual_seed(0)
    first, state = mix_images(images, label, 5, 0.8, 1.0, keys), torch.get_rng_state()
    torch.manual_seed(1)
    torch.rand(3)
    assert all(map(torch.equal, first, mix_images(images, label, 5, 0.8, 1.0, keys)))
    assert not torch.equal(first[0], mix_images(images, label, 5, 0.8, 1.0, keys + 1)[0])
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mixing_under_other_default_dtypes(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        mixed, target = mix_images(torch.randn(4, 3, 16, 16), torch.arange(4), 5, 0.8, 1.0)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert mixed.dtype == dtype
    torch.testing.assert_close(target.sum(1).float(), torch.ones(4))
