"""What a trick adds to a training step."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmark_cases import Benchmark, Run


def resnet18_steps(callback: str, folder: Path, steps: int = 4, batch_size: int = 16, side: int = 32, **settings: Any) -> Run:
    """A fit of a few steps of ResNet-18 (torchvision's, with the 3 x 3 stem for small pictures) with one callback, or none."""
    import logging

    import torch
    import torch.nn.functional as F
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.data import DataLoader

    import litzoo.callbacks

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    batches = DataLoader([(torch.randn(batch_size, 3, side, side), torch.arange(batch_size) % 10)] * steps, batch_size=None)

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_resnet18()

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    model: nn.Module = Classifier()
    peers: Any = {"EMAWeightAveraging": lightning_ema}

    def fit() -> None:
        made = [peers.get(callback) or getattr(litzoo.callbacks, callback)] if callback else []
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(callbacks=[make(**settings) for make in made], accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet)
        trainer.fit(model, batches)

    return fit


def small_resnet18() -> Any:
    """torchvision's ResNet-18 with a 3 x 3 stem and no pooling after it, 11.2 million weights."""
    from torch import nn
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def lightning_ema(**settings: Any) -> Any:
    """Lightning's own callback for the same purpose."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return EMAWeightAveraging(**settings)


def ema_update(make: Callable[..., Any], folder: Path) -> Run:
    """One update of the average of ResNet-18, by the hook that Lightning calls after a step."""
    from types import SimpleNamespace

    from lightning.pytorch import LightningModule

    model, callback = LightningModule(), make()
    model.net = small_resnet18()
    trainer: Any = SimpleNamespace(global_step=0, current_epoch=0, strategy=None, checkpoint_callbacks=[], callbacks=[], world_size=1)
    trainer.strategy = SimpleNamespace(root_device=model.device)
    for hook in (callback.setup, callback.on_fit_start):
        hook(trainer, model, *(["fit"] if hook.__name__ == "setup" else []))

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, model, None, None, trainer.global_step - 1)

    return update


def ema_litzoo(folder: Path) -> Run:
    from litzoo.callbacks import EMA

    return ema_update(partial(EMA, decay=0.999, warmup=False), folder)


def ema_lightning(folder: Path) -> Run:
    return ema_update(partial(lightning_ema, decay=0.999), folder)


def ema_timm(folder: Path) -> Run:
    """timm's `ModelEmaV3`, which is no callback."""
    from timm.utils import ModelEmaV3

    net = small_resnet18()
    average = ModelEmaV3(net, decay=0.999, foreach=True)
    return lambda: average.update(net)


STEP_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bare step": ("", {}),
    "EMA": ("EMA", {}),
    "EMAWeightAveraging (Lightning)": ("EMAWeightAveraging", {}),
    "SWA, averages 1 epoch of 4 steps": ("SWA", {"start": 0}),
    "Flooding": ("Flooding", {"level": 0.1}),
    "FGM, first convolution": ("FGM", {"epsilon": 0.5, "target": "net.conv1"}),
    "SAM": ("SAM", {}),
    "SAM, every 4th step": ("SAM", {"every_n_steps": 4}),
    "DiscriminativeLR": ("DiscriminativeLR", {}),
    "GradualUnfreeze, last layer": ("GradualUnfreeze", {}),
    "StepSeed": ("StepSeed", {}),
}

BENCHMARKS: dict[str, Benchmark] = {
    "callbacks": Benchmark(
        summary="a training of 4 steps of ResNet-18 on 16 pictures of 32 x 32, forward, backward and SGD, alone and with a callback",
        cases={name: partial(resnet18_steps, callback, **settings) for name, (callback, settings) in STEP_CASES.items()},
        items=4,
        unit="steps",
        rounds=5,
        allocators=("keep",),
    ),
    "ema": Benchmark(
        summary="one update of an exponential moving average of ResNet-18, 11.2 million weights",
        cases={"litzoo": ema_litzoo, "Lightning, EMAWeightAveraging": ema_lightning, "timm, ModelEmaV3": ema_timm},
        items=1,
        unit="updates",
        rounds=15,
        calls=5,
    ),
}
