"""Images: augmentation, the training step with everything that feeds it, its precision, and opening a data set."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmark_cases import Benchmark, Run

# Of CIFAR-10; what matters is that all cases normalise alike.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def smooth_images(images: int, side: int) -> Any:
    """Random images as smooth as photographs, the same for every case: `(N, 3, side, side)` uint8."""
    import torch
    import torch.nn.functional as F

    coarse = torch.rand(images, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def pack_images(path: Path, images: int, side: int, classes: int = 10) -> None:
    """Write random images as litzoo packs a data set."""
    import h5py
    import numpy as np

    from litzoo.datamodules.packing import block_dataset

    rng, block = np.random.default_rng(0), 4096
    with h5py.File(path, "w") as file:
        stored = block_dataset(file, "image", (images, side, side, 3))
        for start in range(0, images, block):
            stop = min(start + block, images)
            stored[start:stop] = rng.integers(0, 256, (stop - start, side, side, 3), dtype=np.uint8)
        file["label"] = np.arange(images) % classes


# augment, augment-stl10: two normalised views of a batch. Every case returns the first views and the second, `(N, 3, size, size)` each.


def augment_litzoo(folder: Path, images: int = 256, side: int = 32, size: int = 32, preset: str = "supcon", compiled: bool = False) -> Run:
    """The whole batch at once, each view with parameters of its own; `compiled` compiles in the round that does not count."""
    import torch

    from litzoo.datamodules.augment.images import PRESETS

    batch, key, augment = smooth_images(images, side), torch.arange(images), PRESETS[preset]

    def views() -> Any:
        key.add_(images)
        return augment(batch, key, size, 2, MEAN, STD, compiled=compiled).unbind(1)

    return views


def _stacked(pairs: Any) -> Any:
    """What the default collation makes of the two views of each sample."""
    import torch

    return tuple(torch.stack(views) for views in zip(*pairs, strict=True))


def pil_transform(size: int, preset: str) -> Callable[[Any], Any]:
    """The transform of a PIL image by torchvision, with the parameters of a preset."""
    from torchvision import transforms as T

    from litzoo.datamodules.augment.images import PRESETS

    like = PRESETS[preset]
    jitter = T.ColorJitter(like.brightness, like.contrast, like.saturation, like.hue)
    operations = [
        T.RandomResizedCrop(size, like.crop_scale, like.crop_ratio),
        T.RandomHorizontalFlip(like.flip),
        T.RandomApply([jitter], like.jitter_probability),
        T.RandomGrayscale(like.grayscale),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ]
    transform: Callable[[Any], Any] = T.Compose(operations)
    return transform


def augment_pil(folder: Path, images: int = 256, side: int = 32, size: int = 32, preset: str = "supcon") -> Run:
    """torchvision on PIL images in a data set's `__getitem__`, as the authors of SupCon and most tutorials do it."""
    from PIL import Image

    pixels, transform = smooth_images(images, side).permute(0, 2, 3, 1).numpy(), pil_transform(size, preset)

    def pair(array: Any) -> Any:
        image = Image.fromarray(array)
        return transform(image), transform(image)

    return lambda: _stacked(pair(array) for array in pixels)


def augment_v2(folder: Path, images: int = 256, side: int = 32, size: int = 32, preset: str = "supcon") -> Run:
    """torchvision's second version on uint8 tensors, one at a time."""
    import torch
    from torchvision.transforms import v2 as T

    from litzoo.datamodules.augment.images import PRESETS

    pixels, like = smooth_images(images, side), PRESETS[preset]
    jitter = T.ColorJitter(like.brightness, like.contrast, like.saturation, like.hue)
    operations = [
        T.RandomResizedCrop(size, like.crop_scale, like.crop_ratio, antialias=True),
        T.RandomHorizontalFlip(like.flip),
        T.RandomApply([jitter], like.jitter_probability),
        T.RandomGrayscale(like.grayscale),
        T.ToDtype(torch.float32, scale=True),
        T.Normalize(MEAN, STD),
    ]
    transform = T.Compose(operations)
    return lambda: _stacked((transform(image), transform(image)) for image in pixels)


def augment_lightly(folder: Path, images: int = 256, side: int = 32, size: int = 32) -> Run:
    """lightly's SimCLR transform on PIL images, with the parameters of "supcon"."""
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    pixels = smooth_images(images, side).permute(0, 2, 3, 1).numpy()
    normalization = {"mean": list(MEAN), "std": list(STD)}
    transform = SimCLRTransform(input_size=size, cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0, normalize=normalization)
    return lambda: _stacked(transform(Image.fromarray(array)) for array in pixels)


def augment_albumentations(folder: Path, images: int = 256, side: int = 32, size: int = 32, preset: str = "supcon") -> Run:
    """albumentations on numpy arrays, one at a time."""
    import os

    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network for a newer one
    import albumentations as A
    import cv2
    import torch
    from albumentations.pytorch import ToTensorV2

    from litzoo.datamodules.augment.images import PRESETS

    cv2.setNumThreads(torch.get_num_threads())
    pixels, like = smooth_images(images, side).permute(0, 2, 3, 1).contiguous().numpy(), PRESETS[preset]
    factors = {name: (max(0.0, 1 - value), 1 + value) for name, value in _strengths(like).items()}
    transform = A.Compose(
        [
            A.RandomResizedCrop(size=(size, size), scale=like.crop_scale, ratio=like.crop_ratio),
            A.HorizontalFlip(p=like.flip),
            A.ColorJitter(**factors, hue=(-like.hue, like.hue), p=like.jitter_probability),
            A.ToGray(p=like.grayscale),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
    )
    return lambda: _stacked((transform(image=array)["image"], transform(image=array)["image"]) for array in pixels)


def augment_kornia(folder: Path, images: int = 256, side: int = 32, size: int = 32, preset: str = "supcon") -> Run:
    """kornia on the whole batch: parameters for each sample, but one order of the colour operations, and no antialiasing."""
    import kornia.augmentation as K
    import torch
    from torch import nn

    from litzoo.datamodules.augment.images import PRESETS

    batch, like = smooth_images(images, side), PRESETS[preset]
    augment = nn.Sequential(
        K.RandomResizedCrop((size, size), scale=like.crop_scale, ratio=like.crop_ratio),
        K.RandomHorizontalFlip(p=like.flip),
        K.ColorJitter(**_strengths(like), hue=like.hue, p=like.jitter_probability),
        K.RandomGrayscale(p=like.grayscale),
        K.Normalize(mean=MEAN, std=STD),
    )

    @torch.no_grad()
    def views() -> Any:
        pixels = batch.float() / 255
        return augment(pixels), augment(pixels)

    return views


def _strengths(like: Any) -> dict[str, float]:
    return {"brightness": like.brightness, "contrast": like.contrast, "saturation": like.saturation}


# train-resnet18, train-conv4, precision: one step of training


def _classifier(backbone: str, side: int, bf16: bool | None = None) -> tuple[Any, Callable[[Callable[[Any], Any], Any], None]]:
    """A classifier, and the step `(loss, batch)`, where `loss(batch)` is computed in the precision of `litzoo fit`, or as said."""
    import torch

    from litzoo.zoo import ImageClassifier
    from litzoo.zoo.cli.precision import native_precision

    model = ImageClassifier(10, backbone=backbone, image_size=side)
    optimizer = model.optimizer(model.parameters())
    bf16 = native_precision("cpu") == "bf16-mixed" if bf16 is None else bf16

    def step(loss: Callable[[Any], Any], batch: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(batch)
        value.backward()
        optimizer.step()

    return model, step


def _cross_entropy(network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    import torch.nn.functional as F

    return lambda batch: F.cross_entropy(network(batch[0]), batch[1])


def train_bare(backbone: str, folder: Path, batch_size: int = 128, side: int = 32) -> Run:
    """Forward, cross entropy, backward and SGD on views that are ready: what a step costs if data cost nothing."""
    import torch

    model, step = _classifier(backbone, side)
    batch = torch.randn(2 * batch_size, 3, side, side), torch.arange(2 * batch_size) % 10
    return lambda: step(_cross_entropy(model), batch)


def train_litzoo(backbone: str, folder: Path, images: int = 10_240, batch_size: int = 128, side: int = 32) -> Run:
    """The whole step: sampler, reading by index from a packed file, two views, `training_step` with its metrics, backward, SGD."""
    from litzoo.datamodules import HDF5ImagesDataModule

    path = folder / "images.h5"
    pack_images(path, images, side)
    data = HDF5ImagesDataModule(
        path, augmentation="supcon", views=2, val_fraction=0, test_fraction=0, mean=MEAN, std=STD, batch_size=batch_size, seed=0
    )
    loader: Any = data.train_dataloader()
    model, step = _classifier(backbone, side)

    def batches() -> Iterator[Any]:
        epoch = 0
        while True:
            loader.sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    endless = batches()
    return lambda: step(lambda batch: model.training_step(batch, 0), data.transform(next(endless)))


def train_pil(backbone: str, folder: Path, images: int = 10_240, batch_size: int = 128, side: int = 32) -> Run:
    """The same step fed by a data set of arrays in memory, whose `__getitem__` makes two views with torchvision and PIL."""
    import h5py
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    path = folder / "images.h5"
    pack_images(path, images, side)
    with h5py.File(path, "r") as file:
        pixels, labels = file["image"][...], file["label"][...].tolist()
    transform = pil_transform(side, "supcon")

    class TwoViews(Dataset[Any]):
        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, index: int) -> Any:
            image = Image.fromarray(pixels[index])
            return [transform(image), transform(image)], labels[index]

    loader = DataLoader(TwoViews(), batch_size, shuffle=True, drop_last=True)
    model, step = _classifier(backbone, side)

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    endless = batches()

    def run() -> None:
        views, label = next(endless)
        step(lambda batch: model.training_step(batch, 0), (torch.stack(views, dim=1), label))

    return run


def precision_step(bf16: bool, channels_last: bool, folder: Path, batch_size: int = 128, side: int = 32, backbone: str = "resnet18") -> Run:
    """The bare step of `ImageClassifier`, or of the same network on images that are left as they are."""
    import torch

    model, step = _classifier(backbone, side, bf16)
    batch = torch.randn(batch_size, 3, side, side), torch.arange(batch_size) % 10
    loss = _cross_entropy(model if channels_last else lambda images: model.head(model.backbone(images)))
    return lambda: step(loss, batch)


# startup: from the file to the first batch, once in a fresh process, where memory is touched for the first time. Both return the
# classes, the images of each, and the batch. The peak counts what is mapped of the page cache, which is no memory of the process.


def startup_litzoo(folder: Path, images: int = 100_000, side: int = 32, batch_size: int = 128) -> Run:
    """Open a packed file, which is memory-mapped; splits it besides, what the reference does not."""
    from litzoo.datamodules import HDF5ImagesDataModule

    path = folder / "images.h5"
    pack_images(path, images, side)

    def start() -> tuple[int, Sequence[int], Any]:
        data = HDF5ImagesDataModule(path, mean=MEAN, std=STD, batch_size=batch_size, seed=0)
        return data.num_classes, data.class_counts, data.transform(next(iter(data.train_dataloader()))).input

    return start


def startup_whole(folder: Path, images: int = 100_000, side: int = 32, batch_size: int = 128) -> Run:
    """Read the same file whole; the first batch is augmented as litzoo does it."""
    import h5py
    import torch

    from litzoo.datamodules.images import PRESETS  # from here, so that both cases have imported Lightning

    path = folder / "images.h5"
    pack_images(path, images, side)

    def start() -> tuple[int, Sequence[int], Any]:
        with h5py.File(path, "r") as file:
            pixels, label = torch.from_numpy(file["image"][...]), torch.from_numpy(file["label"][...])
        counts = torch.bincount(label).tolist()
        chosen = torch.randperm(len(label))[:batch_size]
        return len(counts), counts, PRESETS["standard"](pixels[chosen].permute(0, 3, 1, 2), chosen, mean=MEAN, std=STD)

    return start


_STL10: dict[str, Any] = {"side": 96, "size": 64, "preset": "relational"}

BENCHMARKS: dict[str, Benchmark] = {
    "augment": Benchmark(
        summary="two normalised views of 256 images of 32 x 32: random resized crop, flip, colour jitter, grey",
        cases={
            "litzoo": augment_litzoo,
            "litzoo, compiled": partial(augment_litzoo, compiled=True),
            "lightly, SimCLRTransform": augment_lightly,
            "albumentations": augment_albumentations,
            "kornia, batched": augment_kornia,
            "torchvision, PIL per sample": augment_pil,
            "torchvision v2, uint8 per sample": augment_v2,
        },
        items=256,
        unit="images",
        rounds=9,
        calls=3,
        packages={"lightly, SimCLRTransform": "lightly", "albumentations": "albumentations", "kornia, batched": "kornia"},
    ),
    "augment-stl10": Benchmark(
        summary='two normalised views of 256 images of 96 x 96 at 64 x 64, parameters "relational"',
        cases={
            "litzoo": partial(augment_litzoo, **_STL10),
            "torchvision, PIL per sample": partial(augment_pil, **_STL10),
            "kornia, batched": partial(augment_kornia, **_STL10),
        },
        items=256,
        unit="images",
        rounds=9,
        packages={"kornia, batched": "kornia"},
    ),
    "train-resnet18": Benchmark(
        summary="training step of ResNet-18 on two views of 128 images of 32 x 32, alone and with the data that feed it",
        cases={"ResNet-18, bare step": partial(train_bare, "resnet18"), "ResNet-18, whole step": partial(train_litzoo, "resnet18")},
        items=128,
        unit="images",
        rounds=5,
    ),
    "train-conv4": Benchmark(
        summary="training step of Conv-4 on two views of 128 images of 32 x 32, alone and with the data that feed it",
        cases={
            "Conv-4, bare step": partial(train_bare, "conv4"),
            "Conv-4, whole step": partial(train_litzoo, "conv4"),
            "Conv-4, PIL per sample": partial(train_pil, "conv4"),
        },
        items=128,
        unit="images",
        rounds=5,
    ),
    "precision": Benchmark(
        summary="training step of ResNet-18 on 128 images of 32 x 32: forward, backward, SGD",
        cases={
            f"{'bf16' if bf16 else 'fp32'} + {'channels_last' if channels_last else 'contiguous'}": partial(
                precision_step, bf16, channels_last
            )
            for channels_last in (True, False)
            for bf16 in (True, False)
        },
        items=128,
        unit="images",
        rounds=5,
    ),
    "startup": Benchmark(
        summary="from a packed file of 100,000 images of 32 x 32 to the first augmented batch, page cache warm",
        cases={"litzoo, memory-mapped": startup_litzoo, "h5py, read whole": startup_whole},
        items=1,
        unit="starts",
        rounds=5,
        allocators=("keep",),
        apart=True,
        cold=True,
    ),
}
