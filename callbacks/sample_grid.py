"""Draws what a generative model generates."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ..zoo.layers.modes import evaluating
from .features import inputs_of
from .guards import refuse
from .pictures import EvenlySpread, hand_over, raw_images
from .predictions import output_folder


class SampleGrid(Callback):
    """Writes pictures of generated images, beside real ones, in the course of a training.

    The images are what `pl_module.sample(number, seed)` gives, `(B, C, H, W)` in [0, 1], as that of `WGAN`; always of the same seed, so
    the pictures show how the same noise becomes an image. `samples/epoch_009.png` in the run's folder is that of the tenth epoch,
    `samples/test.png` that of a test. Real images are spread evenly over the evaluation samples, or until there are such over the last
    training batch of the first epoch, and shown as they were before normalisation, as by `NeighbourGallery`. With `curve`,
    `samples/curve.png` shows logged numbers over the epochs. The pictures also go to every logger that takes pictures, as that of
    `ConfusionMatrixPlot`.

    Images are generated in evaluation mode, at the end of the validation or, if there is none, of the epoch, by the first process alone:
    the module's `sample` must not communicate with other processes. The sanity check draws nothing. Its state is the points of the
    curves; it leaves training and random streams alone.

    Cost: generating the images, and about 0.3 s a picture. Composes with every callback; under `EMA` and `SWA` it shows the
    average in epochs that are validated, in others the weights of the training.

    Args:
        number: of generated images; a square number fills the picture.
        every_n_epochs: in `fit`, draw the first epoch, every n-th one and the last.
        seed: of the noise.
        curve: names under which the module logs what the curves show, such as "val/wasserstein".

    Raises:
        ValueError: if a setting is out of range, or the module's samples are no images in [0, 1].
        MisconfigurationException: at the start, if the module has no `sample`.

    Example:
        >>> trainer = Trainer(callbacks=[SampleGrid(curve=["train/wasserstein", "val/wasserstein"])])
    """

    def __init__(self, number: int = 64, every_n_epochs: int = 10, seed: int = 0, curve: Sequence[str] = ()) -> None:
        if number < 1 or every_n_epochs < 1:
            raise ValueError(f"number and every_n_epochs must be at least 1, got {number} and {every_n_epochs}")
        self.number = number
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self.curve = list(curve)
        self._real: EvenlySpread[Tensor] = EvenlySpread(number)
        self._drawn: int | None = None
        # Of each name: epochs and values.
        self._points: dict[str, tuple[list[int], list[float]]] = {}
        self._seen: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict" and not callable(getattr(pl_module, "sample", None)):
            raise refuse(
                self,
                f"needs images that {type(pl_module).__name__} generates, which has no sample",
                "define sample(self, number, seed) -> images (number, channels, height, width) in [0, 1], or leave the callback out",
            )
        self._real, self._drawn = EvenlySpread(self.number), None
        if stage == "fit":
            self._points, self._seen = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"points": {name: [list(column) for column in columns] for name, columns in self._points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = {name: (list(epochs), list(values)) for name, (epochs, values) in state_dict["points"].items()}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._real = EvenlySpread(self.number)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._real = EvenlySpread(self.number)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self._keep(pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self._keep(pl_module, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch and not self._real.chosen():
            self._keep(pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._draw(trainer, pl_module, "val")
        elif self._is_due(trainer):
            self._draw(trainer, pl_module, f"epoch_{trainer.current_epoch:03d}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer) and self._drawn != trainer.current_epoch:
            self._draw(trainer, pl_module, f"epoch_{trainer.current_epoch:03d}")
        # Here, where the epoch's means are known; on every process, as reading them may be a collective.
        metrics = trainer.callback_metrics
        for name in self.curve:
            # Without a validation in this epoch, that of an earlier one still stands there.
            if name in metrics and metrics[name] is not self._seen.get(name):
                self._seen[name] = metrics[name]
                epochs, values = self._points.setdefault(name, ([], []))
                epochs.append(trainer.current_epoch)
                values.append(float(metrics[name]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = output_folder(trainer) / "samples" / "curve.png"
        points = {name: self._points[name] for name in self.curve if name in self._points}
        if not points or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        from ..zoo.plots.figures import save_figure
        from ..zoo.plots.samples import plot_curves

        figure = plot_curves(points)
        save_figure(figure, path)
        hand_over(trainer, "samples/curve", figure, path)

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        return epoch == 0 or (epoch + 1) % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs

    def _keep(self, pl_module: LightningModule, batch: Any) -> None:
        with contextlib.suppress(ValueError):  # there is nothing to show beside
            images = inputs_of(pl_module, batch)
            images = images.flatten(0, -4) if images.dim() > 4 else images
            if images.dim() == 4:
                self._real.offer(len(images), lambda row: images[row].detach().cpu())

    def _draw(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        """Every process must call it."""
        path = output_folder(trainer) / "samples" / f"{name}.png"
        self._drawn = trainer.current_epoch
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        from ..zoo.plots.figures import save_figure
        from ..zoo.plots.samples import plot_samples

        images = self._sample(trainer, pl_module)
        alike = [image for image in self._real.chosen() if image.shape[1:] == images.shape[1:3]]
        real = raw_images(trainer, pl_module, torch.stack(alike)).numpy() if alike else images[:0]
        title = f"epoch {trainer.current_epoch}" if name.startswith("epoch") else name
        figure = plot_samples(images, real, f"{title}, seed {self.seed}")
        save_figure(figure, path)
        hand_over(trainer, f"samples/{name.partition('_')[0]}", figure, path)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> np.ndarray:
        """Generated images as `plot_samples` takes them."""
        with torch.no_grad(), evaluating(pl_module), isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            with trainer.precision_plugin.forward_context():
                images = pl_module.sample(self.number, self.seed)  # type: ignore[operator]  # `setup` has seen to it
        is_images = isinstance(images, Tensor) and images.dim() == 4 and len(images) == self.number and images.is_floating_point()
        if not is_images:
            found = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"{type(pl_module).__name__}.sample must give {self.number} images (number, channels, height, width) of floats in [0, 1], "
                f"got {found}"
            )
        # A training that diverges must not end here.
        images = images.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0)
        if float(images.min()) < -0.01 or float(images.max()) > 1.01:
            low, high = images.aminmax()
            raise ValueError(
                f"{type(pl_module).__name__}.sample must give images in [0, 1], got {float(low):.3g} to {float(high):.3g}: "
                "undo the normalisation in it"
            )
        images = images.clamp(0, 1)
        return (images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)).permute(0, 2, 3, 1).numpy()
