"""Train the same classifier with litzoo's views and with torchvision's, and say whether the accuracies differ by more than seeds do.

python scripts/compare_pipelines.py FILE.h5 [--backbone conv4] [--preset supcon] [--epochs 10] [--seeds 3] [--threads 1]

FILE.h5 is what `HDF5ImagesDataModule` reads, such as CIFAR-10. Both pipelines get the same initial weights, order of images,
optimiser and splits; torchvision's transforms one PIL image after the other, as most projects do it. The checkpoint is the last
epoch's; the test split is scored once a run and chooses nothing.
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from litzoo.callbacks import StepSeed
from litzoo.datamodules import HDF5ImagesDataModule, ImageAugmentation
from litzoo.datamodules.augment.images import PRESETS
from litzoo.zoo import Batch, ImageClassifier
from litzoo.zoo.cli.training import keep_freed_memory


def torchvision_recipe(augment: ImageAugmentation, size: int) -> Any:
    """The transforms of torchvision for a PIL image that have the parameters of an augmentation without blur, solarisation or RandAugment."""
    import torchvision.transforms.v2 as T

    if augment.blur or augment.solarize or augment.rotation or augment.randaugment_ops:
        raise ValueError("only crop, flip, colour jitter and grey are compared")
    steps: list[Any] = []
    if augment.crop_scale is not None:
        steps.append(T.RandomResizedCrop(size, scale=augment.crop_scale, ratio=augment.crop_ratio))
    if augment.padding:
        steps.append(T.RandomCrop(size, padding=augment.padding))
    steps.append(T.RandomHorizontalFlip(augment.flip))
    jitter = T.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
    return T.Compose([*steps, T.RandomApply([jitter], augment.jitter_probability), T.RandomGrayscale(augment.grayscale)])


class PerImageViews(HDF5ImagesDataModule):
    """The same data, augmented by torchvision one PIL image at a time."""

    def augment(self, batch: Batch) -> Batch:
        import torchvision.transforms.v2.functional as TF

        recipe = torchvision_recipe(self.augmentation, self.image_size)
        views = torch.stack([TF.to_image(recipe(TF.to_pil_image(image))) for image in batch.input])
        return batch._replace(input=TF.normalize(views.float() / 255, self.image_mean, self.image_std))


def run(data: HDF5ImagesDataModule, backbone: str, epochs: int, seed: int) -> tuple[float, float]:
    """Train one classifier; its test accuracy and the minutes its training took."""
    seed_everything(seed, verbose=False)
    model = ImageClassifier(
        data.num_classes,
        backbone=backbone,
        in_channels=data.in_channels,
        image_size=data.image_size,
        image_mean=data.image_mean,
        image_std=data.image_std,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = Trainer(max_epochs=epochs, callbacks=[StepSeed(seed=seed)], accelerator="cpu", num_sanity_val_steps=0, **quiet)
    start = time.monotonic()
    trainer.fit(model, datamodule=data)
    minutes = (time.monotonic() - start) / 60
    return trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"], minutes


def verdict(ours: list[float], theirs: list[float]) -> str:
    """Difference of the means, its standard error, and whether it is within two of them."""
    difference = statistics.mean(ours) - statistics.mean(theirs)
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    within = "within" if abs(difference) <= 2 * error else "MORE THAN"
    return f"difference {difference:+.4f}, standard error {error:.4f}: {within} two standard errors"


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--preset", default="supcon", choices=[name for name in PRESETS if name != "randaugment"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2, or there is no noise to compare with")
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    accuracy: dict[str, list[float]] = {"litzoo, by the batch": [], "torchvision, by the image": []}
    print(f"{'pipeline':<28} {'seed':>4} {'test accuracy':>14} {'minutes':>8}")
    for seed in range(arguments.seeds):
        for name, kind in zip(accuracy, (HDF5ImagesDataModule, PerImageViews), strict=True):
            data = kind(arguments.file, augmentation=arguments.preset, seed=seed)
            score, minutes = run(data, arguments.backbone, arguments.epochs, seed)
            accuracy[name].append(score)
            print(f"{name:<28} {seed:>4} {score:>14.4f} {minutes:>8.1f}", flush=True)
    for name, scores in accuracy.items():
        print(f"{name}: mean {statistics.mean(scores):.4f}, standard deviation {statistics.stdev(scores):.4f}")
    print(verdict(*accuracy.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
