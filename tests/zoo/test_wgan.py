"""WGAN: its steps, processes and resumes against the same written by hand, its samples, files and commands."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import litzoo
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import WGAN
from litzoo.zoo.cli import CONFIGS, main
from litzoo.zoo.functional.random import fold_in, normal, uniform

QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "devices": 1,
}


def data_of(**settings: Any) -> DigitsDataModule:
    settings = {"augmentation": "none", "image_size": 8, "batch_size": 64, "train_fraction": 0.35, "seed": 0, **settings}
    return DigitsDataModule(**settings)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


def model_of(**settings: Any) -> WGAN:
    torch.manual_seed(0)
    small = {"latent_dim": 6, "image_size": 8, "in_channels": 1, "generator_width": 4, "critic_width": 4, "n_critic": 2}
    return WGAN(**{**small, "image_mean": [0.25], "image_std": [0.5], **settings})


def by_hand(model: WGAN, epochs: int, n_critic: int, processes: int, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a generator and a critic after plain gradient descent; every shard of a batch sees its own BatchNorm."""
    generator, critic = copy.deepcopy(model.generator).double(), copy.deepcopy(model.critic).double()
    mine: list[Tensor] = list(generator.parameters())
    theirs: list[Tensor] = list(critic.parameters())
    data = data_of(**settings)
    loader, step = data.train_dataloader(), 0

    def generate(key: Tensor) -> Tensor:
        return (generator(normal(key, 6).double()) - 0.25) / 0.5

    def critic_side(images: Tensor, key: Tensor) -> Tensor:
        with torch.no_grad():
            fake = generate(fold_in(key, 1))
        share = uniform(fold_in(key, 2)).double().view(-1, 1, 1, 1)
        between = (share * images + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        norm = slope.square().sum((1, 2, 3)).sqrt()
        return critic(fake).mean() - critic(images).mean() + 10 * (norm - 1).square().mean()

    def descend(weights: list[Tensor], loss: Tensor) -> None:
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.05 * gradient

    for epoch in range(epochs):
        loader._batches.set_epoch(epoch)
        for batch in loader:
            batch = data.transform(batch)
            assert batch.key is not None
            shards = [(batch.input[rank::processes].double(), batch.key[rank::processes]) for rank in range(processes)]
            descend(theirs, torch.stack([critic_side(*shard) for shard in shards]).mean())
            step += 1
            if step % n_critic == 0:
                descend(mine, torch.stack([-critic(generate(fold_in(key, 3))).mean() for _, key in shards]).mean())
    return mine, theirs


def test_steps_against_a_hand_written_loop() -> None:
    """Seven batches an epoch and two steps of the critic: the count goes on over the epochs, and both optimisers count."""
    model = model_of(generator_optimizer=sgd, critic_optimizer=sgd)
    start = copy.deepcopy(model)
    data = data_of(mean=[0.25], std=[0.5])
    trainer = Trainer(max_epochs=2, precision="64-true", num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, datamodule=data)
    batches = 2 * len(data.train_dataloader())
    assert len(data.train_dataloader()) % 2 == 1
    assert trainer.global_step == batches + batches // 2
    expected = by_hand(start, 2, 2, 1, mean=[0.25], std=[0.5])
    for network, weights in zip((model.generator, model.critic), expected, strict=True):
        for (name, found), value in zip(network.named_parameters(), weights, strict=True):
            torch.testing.assert_close(found.detach(), value.detach(), rtol=1e-9, atol=1e-11, msg=name)
            assert found.requires_grad
    logged = {"train/wasserstein", "train/critic_loss", "train/gradient_norm", "train/generator_loss", "val/wasserstein"}
    assert set(trainer.callback_metrics) == logged

    # Of the validation, over all of its images at once, each with the noise of its number.
    model.eval()
    batches_of_val = [data.transform(batch) for batch in data.val_dataloader()]
    images, index = (torch.cat([getattr(batch, name) for batch in batches_of_val]) for name in ("input", "index"))
    with torch.no_grad():
        fake = model(normal(fold_in(0, -1, index), 6).double())
        distance = model.critic(images.double()).mean() - model.critic(fake).mean()
    assert float(trainer.callback_metrics["val/wasserstein"]) == pytest.approx(float(distance), rel=1e-6)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    assert set(scores) == {"test/wasserstein"}


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer
from test_wgan import QUIET, data_of, model_of, sgd

settings = {**QUIET, "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
trainer = Trainer(max_epochs=1, precision="64-true", num_sanity_val_steps=0, **settings)
model = model_of(generator_optimizer=sgd, critic_optimizer=sgd)
trainer.fit(model, datamodule=data_of(batch_size=32, mean=[0.25], std=[0.5]))
scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
torch.save((dict(model.named_parameters()), scores), f"{sys.argv[1]}_{trainer.global_rank}.pt")
"""


def test_two_processes_equal_the_mean_of_their_shards(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
    two_processes(script, tmp_path / "result")
    mine, theirs = by_hand(model_of(), 1, 2, 2, mean=[0.25], std=[0.5])
    results = [torch.load(tmp_path / f"result_{rank}.pt", weights_only=False) for rank in range(2)]
    for found, scores in results:
        for (name, value), expected in zip(found.items(), [*mine, *theirs], strict=True):
            torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-9, atol=1e-11, msg=name)
        assert scores["val/wasserstein"] == results[0][1]["val/wasserstein"]


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(tmp_path: Path) -> None:
    """Seven steps of both optimisers end with the fifth batch of seven, between two steps of the generator."""

    def run(folder: Path, ckpt_path: Path | None = None) -> WGAN:
        seed_everything(3, verbose=False)
        model = model_of()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        trainer = Trainer(max_epochs=2, callbacks=[saving], **{**QUIET, "enable_checkpointing": True})
        torch.manual_seed(0 if ckpt_path is None else 1)  # nothing is drawn from the global stream
        trainer.fit(model, datamodule=data_of(seed=None), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return model

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=7.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_trains_in_every_precision_on_somebody_elses_loader(precision: Any) -> None:
    """Tuples of images and labels, or images alone; the gradients that the penalty holds stay finite."""
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader: Any = DataLoader([(image, 0) for image in images], batch_size=20)  # type: ignore[arg-type]  # a list is as good as a data set
    weights = []
    for _ in range(2):
        model = model_of()
        before = copy.deepcopy(model)
        trainer = Trainer(max_epochs=3, precision=precision, **QUIET)
        trainer.fit(model, loader, DataLoader(images, batch_size=20))  # type: ignore[arg-type]  # likewise
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        for (name, weight), start in zip(model.named_parameters(), before.parameters(), strict=True):
            # A bias before BatchNorm, and the critic's last one, have no gradient; small steps round away in bfloat16.
            assert name.endswith("bias") or precision == "bf16-true" or not torch.equal(weight, start), name
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
        torch.randn(3)  # moves the global stream
    assert torch.equal(*weights)
    assert trainer.predict(model, DataLoader(images, batch_size=20))[0].shape == (20,)  # type: ignore[arg-type, index, union-attr]  # likewise


def test_views_are_images_and_each_step_has_noise_of_its_own() -> None:
    model = model_of()
    data = data_of(views=2)
    batch = data.transform(next(iter(data.train_dataloader())))
    images, key = model._images_and_key(batch, 0, 0)
    assert torch.equal(images, batch.input.flatten(0, 1))
    assert len(key.unique()) == len(images) == 128
    plain = torch.zeros(4, 1, 8, 8)
    keys = torch.cat([model._images_and_key(plain, number, epoch)[1] for epoch in (-1, 0, 1) for number in (0, 1)])
    assert len(keys.unique()) == 24


@pytest.mark.parametrize(("size", "start"), [(8, 4), (12, 6), (28, 7), (32, 4), (96, 6)])
def test_networks_fit_the_image(size: int, start: int) -> None:
    model = model_of(image_size=size, in_channels=3, image_mean=None, image_std=None)
    latent = torch.randn(2, 6)
    images = model(latent)
    assert images.shape == (2, 3, size, size)
    assert model.critic(images).shape == (2,)
    assert model.generator.first(latent).shape[2:] == (start, start)
    assert torch.equal(images, model.generator(latent)), "in [0, 1], as images without normalisation are"
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.critic.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "such as 8, 28, 32, 64 or 96; got 30"),
        ({"image_size": 4}, "got 4"),
        ({"image_size": 18}, "got 18"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"critic_width": 0}, "critic_width must be at least 1"),
        ({"n_critic": 0}, "n_critic must be at least 1"),
        ({"penalty": -1.0}, "penalty at least 0"),
        ({"penalty": float("nan")}, "penalty at least 0"),
        ({"image_std": None}, "give both or neither"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**settings)


def test_images_of_another_size_are_told() -> None:
    for images in (torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"of shape \(batch, 1, 8, 8\), got torch"):
            model_of()._images_and_key(images, 0)
    with pytest.raises(ValueError, match=r"WGAN makes images of noise \(batch, 6\), got \(2, 1, 8, 8\)"):
        model_of()(torch.zeros(2, 1, 8, 8))


# Samples and files


def test_samples_are_images_of_a_seed() -> None:
    model = model_of()
    with torch.no_grad():
        model(torch.randn(64, 6))  # running statistics
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    images = model.sample(300, seed=5)
    assert images.shape == (300, 1, 8, 8)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    torch.testing.assert_close(model.sample(3, seed=5), images[:3])
    assert not torch.equal(model.sample(3, seed=6), images[:3])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # `forward` gives them in the space of the DataModule's images.
    raw = model.eval()(normal(fold_in(5, torch.arange(3)), 6)) * 0.5 + 0.25
    torch.testing.assert_close(raw.detach(), images[:3])
    assert model.bfloat16().sample(2).dtype == torch.float32
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        model.sample(0)


def test_a_weights_file_gives_the_same_samples(tmp_path: Path) -> None:
    model = model_of(latent_dim=7, n_critic=3)
    litzoo.save(model, tmp_path / "wgan.safetensors", {}, half=False)
    loaded: Any = litzoo.load(tmp_path / "wgan.safetensors")
    assert torch.equal(loaded.sample(16), model.sample(16))
    assert not {"image_mean", "image_std"} & set(loaded.state_dict())
    torch.testing.assert_close(loaded.image_std, model.image_std)
    with pytest.raises(ValueError, match="holds a WGAN, which has no encode"):
        litzoo.load_encoder(tmp_path / "wgan.safetensors")


def test_recipes_name_both_optimisers() -> None:
    for name in ("wgan_digits", "wgan_cifar10"):
        settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
        for owner in ("generator_optimizer", "critic_optimizer"):
            assert settings[owner]["class_path"] == "torch.optim.Adam", "the default of a recipe cannot be written to its config.yaml"


def test_the_command_line_trains_resumes_tests_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.callbacks", "[]"]
    small = ["--data.train_fraction", "0.3", "--model.generator_width", "4", "--model.critic_width", "4", "--model.n_critic", "2"]
    command = ["--config", "wgan_digits", *quick, *small]
    assert main(["fit", *command, "--trainer.max_epochs", "2"]) == 0
    assert "newest checkpoint: " in capsys.readouterr().out, "not the best by a number"
    run = Path("runs/wgan_digits/version_0")
    hparams = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    data = DigitsDataModule(image_size=8, train_fraction=0.3)
    assert (hparams["image_mean"], hparams["image_std"], hparams["image_size"]) == (data.image_mean, data.image_std, 8)
    assert main(["fit", *command, "--trainer.max_epochs", "3", "--ckpt_path", "last"]) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch_002.ckpt", "last.ckpt"]
    assert main(["test", *command]) == 0, "the last checkpoint is the best"
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), "--output", "wgan.safetensors"]) == 0
    model: Any = litzoo.load("wgan.safetensors")
    assert model.sample(16).shape == (16, 1, 8, 8)
    assert main(["export", "wgan.safetensors", "--output", "wgan.onnx"]) == 2
    assert "WGAN cannot be exported to ONNX" in capsys.readouterr().err


def test_learns_a_constant_image() -> None:
    """All images are alike, but for some noise: so are the generated ones, and the critic finds no distance left."""
    generator = torch.Generator().manual_seed(0)
    pattern = (torch.rand(1, 8, 8, generator=generator) > 0.5).float() * 0.6 + 0.2
    images = pattern + 0.02 * torch.randn(128, 1, 8, 8, generator=generator)

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=4e-3, betas=(0.0, 0.9))

    model = model_of(generator_optimizer=adam, critic_optimizer=adam, generator_width=8, critic_width=8, image_mean=None, image_std=None)
    before = F.l1_loss(model.sample(32).mean(dim=0), pattern)
    trainer = Trainer(max_epochs=30, **QUIET)
    trainer.fit(model, DataLoader((images), 32))  # type: ignore[arg-type]  # a tensor is as good as a data set
    after = F.l1_loss(model.sample(32).mean(dim=0), pattern)
    assert float(after) < 0.4 * float(before)
    assert 0.5 < float(trainer.callback_metrics["train/gradient_norm"]) < 1.5
