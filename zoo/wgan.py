"""WGAN-GP (Gulrajani et al., NeurIPS 2017): a generator of images is trained against a critic that estimates the Wasserstein distance."""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from .batch import Batch
from .epoch_mean import log_epoch_mean
from .functional.adversarial import critic_loss, generator_loss, interpolated_gradient_norms, norm_penalty
from .functional.random import fold_in, global_seed, normal
from .image_input import ImageInput
from .layers.modes import evaluating

# Numbers that keep the draws of one sample's key apart.
_LATENT, _BETWEEN, _GENERATOR = 1, 2, 3
_CHUNK = 256  # images that are generated at a time


class Generator(nn.Module):
    """Noise to images: a linear layer to a small map, then up by factors of 2, each time BatchNorm, ReLU, 3 x 3 convolution.

    Args:
        latent_dim: dimensions of the noise.
        image_size: of the images, see `WGAN`.
        channels: of the images.
        width: channels at full resolution; they double at each halving.

    Example:
        >>> Generator(64, 32, 3, 16)(torch.randn(2, 64)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, latent_dim: int, image_size: int, channels: int, width: int) -> None:
        super().__init__()
        start, halvings = _halvings(image_size)
        widths = [width * 2**level for level in range(halvings, -1, -1)]
        self.first = nn.Sequential(nn.Linear(latent_dim, widths[0] * start**2), nn.Unflatten(1, (widths[0], start, start)))
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(inplace=True), nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        """`(B, latent_dim)` -> images `(B, C, S, S)` in [0, 1]."""
        return self.layers(self.first(latent))


class Critic(nn.Module):
    """Images to scores: 3 x 3 convolutions with LeakyReLU, down by factors of 2, then a linear layer.

    There is no BatchNorm: it would make scores depend on the other samples, but the penalty is on each sample's own gradient.

    Args:
        image_size: of the images, see `WGAN`.
        channels: of the images.
        width: channels at full resolution; they double at each halving.

    Example:
        >>> Critic(32, 3, 16)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2])
    """

    def __init__(self, image_size: int, channels: int, width: int) -> None:
        super().__init__()
        start, halvings = _halvings(image_size)
        widths = [width * 2**level for level in range(halvings + 1)]
        # Not in place: the second derivative needs the values before.
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * start**2, 1))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, S, S)` -> scores `(B,)`."""
        return self.layers(images).squeeze(1)


class WGAN(LightningModule):
    """Wasserstein GAN with gradient penalty: a generator g of images, and a critic f that tells them from real ones.

    The critic minimises mean f(g(z)) - mean f(x) + penalty mean (||grad f||_2 - 1)^2, with the gradients at random points between real and
    generated images; the generator minimises -mean f(g(z)), z ~ N(0, I). Every training batch is a step of the critic, every
    n_critic-th also one of the generator. All randomness comes from the samples' keys, or without them from the seed, the epoch and the
    batch, so a resumed run repeats the uninterrupted one.

    mean f(x) - mean f(g(z)) is the critic's estimate of the Wasserstein distance, up to a factor, and too low as long as the critic is
    not optimal. It is logged for training batches and validation images; a gap between the two shows that the critic has memorised its
    training images. A falling estimate goes with better images, but it cannot rank checkpoints, since every epoch has a different
    critic: use the last checkpoint. Also logged are both losses and the mean norm of the gradients, which is near 1 if the penalty
    works.

    Batches are `Batch`, images `(B, C, S, S)`, or such images first in a tuple; views `(B, V, C, S, S)` are images of their own. Labels
    are ignored. The images are normalised by `image_mean` and `image_std`, as are those of `forward`; `sample` gives raw ones.

    Optimisation is manual: `trainer.global_step` and `max_steps` count the steps of both optimisers, on average 1 + 1 / n_critic per
    batch. Under `strategy: ddp`, gradients are averaged over the processes; BatchNorm is local.

    Args:
        latent_dim: dimensions of z.
        image_size: S: 4 to 7 times a power of two from 2 on, such as 8, 28, 32, 64 or 96.
        in_channels: channels of the images.
        generator_width: channels of the generator at full size.
        critic_width: channels of the critic at full size.
        n_critic: steps of the critic for each of the generator.
        penalty: weight of the gradient penalty.
        image_mean: channel means with which the data are normalised.
        image_std: channel standard deviations, likewise.
        generator_optimizer: parameters of the generator -> optimizer.
        critic_optimizer: parameters of the critic -> optimizer.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> WGAN(image_size=8, in_channels=1).sample(16).shape
        torch.Size([16, 1, 8, 8])

    Source:
        Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, algorithm 1; Arjovsky, Chintala & Bottou,
        "Wasserstein Generative Adversarial Networks", ICML 2017. The networks are plain convolutional ones, not those of the papers.
    """

    checkpoint_monitor = None  # nothing that is logged says which epoch is best

    def __init__(
        self,
        latent_dim: int = 128,
        image_size: int = 32,
        in_channels: int = 3,
        generator_width: int = 64,
        critic_width: int = 64,
        n_critic: int = 5,
        penalty: float = 10.0,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        generator_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-4, betas=(0.0, 0.9)),
        critic_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-4, betas=(0.0, 0.9)),
    ) -> None:
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("generator_width", generator_width), ("critic_width", critic_width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if n_critic < 1 or not penalty >= 0:
            raise ValueError(f"n_critic must be at least 1 and penalty at least 0, got {n_critic} and {penalty}")
        self.image_input = ImageInput(in_channels, image_size, image_mean, image_std)
        self.save_hyperparameters(ignore=["generator_optimizer", "critic_optimizer"])
        self.automatic_optimization = False
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer
        self.latent_dim = latent_dim
        self.n_critic = n_critic
        self.penalty = penalty

        self.generator = Generator(latent_dim, image_size, in_channels, generator_width)
        self.critic = Critic(image_size, in_channels, critic_width)
        # Not persistent: they are hyper-parameters.
        self.image_mean: Tensor
        self.image_std: Tensor
        self.register_buffer("image_mean", torch.tensor(image_mean or [0.0] * in_channels).view(-1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std or [1.0] * in_channels).view(-1, 1, 1), persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        """Noise `(B, latent_dim)` -> normalised images `(B, C, S, S)`."""
        if latent.shape[1:] != (self.latent_dim,):  # such as images, from a callback for classifiers
            raise ValueError(f"{type(self).__name__} makes images of noise (batch, {self.latent_dim}), got {tuple(latent.shape)}")
        return (self.generator(latent) - self.image_mean) / self.image_std

    @torch.no_grad()
    def sample(self, number: int, seed: int = 0) -> Tensor:
        """Generate images in evaluation mode; with one seed, the first images do not depend on their number.

        Args:
            number: B.
            seed: of the noise.

        Returns:
            `(B, C, S, S)` float32 in [0, 1], on the model's device.

        Raises:
            ValueError: if the number is not positive.

        Example:
            >>> images = litzoo.load("wgan.safetensors").sample(16)
        """
        if number < 1:
            raise ValueError(f"the number of samples must be at least 1, got {number}")
        keys = fold_in(seed, torch.arange(number, device=self.device))
        with evaluating(self):
            return torch.cat([self.generator(self._latent(part)).float() for part in keys.split(_CHUNK)])

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, key = self._images_and_key(batch, batch_idx, self.current_epoch)
        generator_optimizer, critic_optimizer = self.optimizers()  # type: ignore[attr-defined]  # there are two, so it is a list
        with torch.no_grad():
            fake = self(self._latent(fold_in(key, _LATENT)))
        with self.toggled_optimizer(critic_optimizer):
            distance = critic_loss(self.critic(images), self.critic(fake))
            norms = interpolated_gradient_norms(self.critic, images, fake, fold_in(key, _BETWEEN))
            loss = distance + self.penalty * norm_penalty(norms)
            self._step(critic_optimizer, self.critic, loss)
        logged = {"wasserstein": -distance.detach(), "critic_loss": loss.detach(), "gradient_norm": norms.detach().mean()}
        # Counted across epochs, or epochs of fewer than n_critic batches would never train the generator.
        if (self.trainer.fit_loop.total_batch_idx + 1) % self.n_critic == 0:
            with self.toggled_optimizer(generator_optimizer):
                loss = generator_loss(self.critic(self(self._latent(fold_in(key, _GENERATOR)))))
                self._step(generator_optimizer, self.generator, loss)
            logged["generator_loss"] = loss.detach()
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, on_step=False, on_epoch=True, batch_size=len(images))

    def _step(self, optimizer: Any, network: nn.Module, loss: Tensor) -> None:
        strategy, processes = self.trainer.strategy, self.trainer.world_size
        optimizer.zero_grad()
        # DDP's own averaging would wait for the gradients of the other network.
        with strategy.block_backward_sync() if processes > 1 else nullcontext():  # type: ignore[attr-defined]  # strategies of several processes have it
            self.manual_backward(loss)
        if processes > 1:
            gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
            mean = strategy.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduce_op="mean")
            for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        optimizer.step()

    def _latent(self, key: Tensor) -> Tensor:
        return normal(key, self.latent_dim).to(self.image_mean.dtype)

    def _images_and_key(self, batch: Any, batch_idx: int, epoch: int = -1) -> tuple[Tensor, Tensor]:
        """Images `(B, C, S, S)`, and a key for each: that of the sample, or one made from the seed, its place and the epoch, if any."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        if isinstance(batch, Batch):
            key = fold_in(global_seed(), epoch, batch.index) if batch.key is None else batch.key
        else:
            key = fold_in(global_seed(), epoch, batch_idx, self.global_rank, torch.arange(len(images), device=images.device))
        if images.dim() == 5:
            key = fold_in(key.unsqueeze(1), torch.arange(images.shape[1], device=images.device)).flatten()
            images = images.flatten(0, 1)
        channels, size = self.image_input.channels, self.image_input.size
        if not images.is_floating_point() or images.shape[1:] != (channels, size, size):
            raise ValueError(
                f"the model takes normalised images of shape (batch, {channels}, {size}, {size}), got {images.dtype} of shape "
                f"{tuple(images.shape)}: set image_size and in_channels to those of the data, and let the DataModule normalise"
            )
        return images, key

    # Evaluation

    def _evaluate(self, batch: Any, batch_idx: int, stage: Literal["val", "test"]) -> None:
        images, key = self._images_and_key(batch, batch_idx)
        distance = -critic_loss(self.critic(images), self.critic(self(self._latent(key))))
        log_epoch_mean(self, f"{stage}/wasserstein", distance, len(images), prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The critic's scores `(B,)`; the images of a DataModule are normalised already."""
        return self.critic(self._images_and_key(batch, batch_idx)[0])

    def configure_optimizers(self) -> Any:
        return [self.generator_optimizer(self.generator.parameters()), self.critic_optimizer(self.critic.parameters())]


def _halvings(image_size: int) -> tuple[int, int]:
    """The size of the smallest map, 4 to 7 pixels, that doublings take to the image's, and the number of doublings."""
    start, halvings = image_size, 0
    while start % 2 == 0 and start >= 8:
        start, halvings = start // 2, halvings + 1
    if not (4 <= start <= 7 and halvings):
        raise ValueError(f"image_size must be 4 to 7 times a power of two from 2 on, such as 8, 28, 32, 64 or 96; got {image_size}")
    return start, halvings
