"""Relations of views: which pairs there are, their focal cross-entropy, and a relation head on all of them in little memory."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a block of hidden activations: on a CPU, where it is to stay in the cache, and elsewhere.
_CACHED, _PARALLEL = 1 << 18, 1 << 25


class Pairs(NamedTuple):
    """Pairs of rows, and what is true of them.

    Attributes:
        first: `(P,)` int64, rows.
        second: `(P,)` int64, rows.
        target: `(P,)` bool, whether both are views of one sample.
    """

    first: Tensor
    second: Tensor
    target: Tensor


def view_pairs(samples: int, views: int, device: torch.device | str = "cpu") -> Pairs:
    """All pairs of two views of a sample, and as many pairs of views of different samples.

    Row v M + n is view v of sample n. For the t-th pair of views i < j, in the order (0, 1), (0, 2), ..., there are M positive pairs
    of sample n with itself, then M negative ones of view i of sample n with view j of sample (n - s) mod M. The shift s goes
    1, 2, ..., M - 1, 1, ... with t and is never a multiple of M, so that no sample is its own negative.

    Args:
        samples: M.
        views: K of each.
        device: where the indices are wanted. They are kept for the next call.

    Returns:
        P = K (K - 1) M pairs, half of them positive.

    Raises:
        ValueError: with fewer than two samples, which leave no negative pair, or fewer than two views, which leave no positive one.

    Example:
        >>> view_pairs(samples=2, views=2).second
        tensor([2, 3, 3, 2])

    Source:
        Patacchiola & Storkey, "Self-Supervised Relational Reasoning for Representation Learning", NeurIPS 2020, and its code, whose
        order of rows this is. With a single sample, that code takes pairs of two of its views for negative.
    """
    _check(samples, views)
    return _view_pairs(samples, views, torch.device(device))


@lru_cache(maxsize=16)
def _view_pairs(samples: int, views: int, device: torch.device) -> Pairs:
    with torch.inference_mode(False):  # what is kept may be wanted for a gradient later
        first, second = torch.triu_indices(views, views, offset=1, device=device)[:, :, None] * samples
        shift = torch.arange(len(first), device=device)[:, None] % (samples - 1) + 1
        sample = torch.arange(samples, device=device)
        return Pairs(
            (first + sample)[:, None].expand(-1, 2, -1).flatten(),
            torch.stack([second + sample, second + (sample - shift) % samples], dim=1).flatten(),
            torch.tensor([[True], [False]], device=device).expand(len(first), 2, samples).flatten(),
        )


def relation_loss(logits: Tensor, target: Tensor, focal_gamma: float = 2.0) -> Tensor:
    """Focal binary cross-entropy of pairs, in which easy pairs count little.

    With p the probability that the head gives to the truth, sigmoid(x) for a positive pair and sigmoid(-x) for a negative one, the
    mean over pairs of

        -(1/2) (1 - p)^g log p,

    and for g = 0 of -log p, the plain binary cross-entropy, without the half.

    Args:
        logits: `(P,)` x; half precision is computed in float32.
        target: `(P,)` bool, which pairs are positive.
        focal_gamma: g.

    Returns:
        A scalar, float32 or float64.

    Example:
        >>> relation_loss(torch.tensor([0.0, 3.0]), torch.tensor([True, True]))
        tensor(0.0434)

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5 with alpha = 1/2. The code of Patacchiola & Storkey
        (NeurIPS 2020) has g = 2 and that half; the short version of it, which they publish beside it, has g = 0.
    """
    wrong = torch.where(target, -logits, logits).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.softplus(wrong, threshold=40.0)  # beyond its usual threshold of 20 float64 still knows better
    if not focal_gamma:
        return loss.mean()
    # By logarithms: a power below one has no derivative at zero.
    return (loss * (focal_gamma * (wrong - loss)).exp()).mean() / 2


def _relation_loss_slope(wrong: Tensor, focal_gamma: float) -> Tensor:
    """The derivative of each term of `relation_loss` by the logit for what is wrong."""
    miss = wrong.sigmoid()
    if not focal_gamma:
        return miss
    loss = F.softplus(wrong, threshold=40.0)
    return loss.mul_(focal_gamma * (1 - miss)).add_(miss).mul_(miss.pow(focal_gamma)).mul_(0.5)


class RelationStep(NamedTuple):
    """What `relation_head_loss` gives.

    Attributes:
        loss: a scalar.
        logits: `(P,)`, in the order of `view_pairs`, without a gradient.
        mean: `(H,)` mean over the pairs of the first layer's output, without a gradient.
        var: `(H,)` biased variance, likewise.
    """

    loss: Tensor
    logits: Tensor
    mean: Tensor
    var: Tensor


@torch.compiler.disable  # its blocks would be unrolled
def relation_head_loss(
    features: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    slope: float = 0.01,
    focal_gamma: float = 2.0,
) -> RelationStep:
    """`relation_loss` of a relation head on all `view_pairs`, where the head begins with a linear layer on a sum or a concatenation.

    Such a layer is h = U a + V b for features a and b, so it needs to see each view only once: 2 (K - 1) views of each sample instead
    of K (K - 1) pairs. The logit of a pair is

        w . LeakyReLU(scale (h - mean) / sqrt(var + eps) + shift) + bias,

    with BatchNorm's mean and variance over all pairs, which follow from the views: if s_i is the sum of h over the pairs where view i is
    the first, and t_j over those where j is the second, the sum of h^2 is sum_i (U a_i) s_i + sum_j (V b_j) t_j. So BatchNorm
    becomes a scale and a shift of the views, and what remains per pair is the sum, LeakyReLU and the product with w, computed in blocks
    that are not kept. The gradient is formed at once, because that of a logit depends on no other logit; there is no second derivative.

    Memory holds the views and one logit per pair; the activations of all pairs never exist at once.

    Args:
        features: `(K, M, D)` of K views of M samples.
        first_weight: `(H, D)` U; a bias would be taken away by BatchNorm.
        second_weight: `(H, D)` V.
        scale: `(H,)` of BatchNorm.
        shift: `(H,)` of BatchNorm.
        weight: `(H,)` w.
        bias: scalar.
        eps: of BatchNorm.
        slope: of LeakyReLU below zero, positive.
        focal_gamma: see `relation_loss`.

    Returns:
        Loss, logits, and the statistics for BatchNorm's running ones; float64 if the features are, else float32, where of features
        in half precision the products with U and V are taken in theirs.

    Raises:
        ValueError: if there are fewer than two samples or views.

    Example:
        >>> u, w = torch.randn(16, 4), torch.ones(16)
        >>> relation_head_loss(torch.randn(3, 8, 4), u, -u, w, w, w, torch.tensor(0.0)).logits.shape
        torch.Size([48])
    """
    _check(features.shape[1], features.shape[0])
    dtype = torch.promote_types(features.dtype, torch.float32)
    tensors = [x.to(dtype) for x in (scale, shift, weight, bias)]
    with torch.autocast(features.device.type, enabled=False):
        layer = first_weight.to(features.dtype), second_weight.to(features.dtype)
        return RelationStep(*_RelationHeadLoss.apply(features, *layer, *tensors, eps, slope, focal_gamma))


class _Block(NamedTuple):
    """Pairs of view `first` with `number` views from `second` on: the pairs of views from the `place`-th on, the first with that shift."""

    first: int
    second: int
    number: int
    place: int
    shift: int


@lru_cache(maxsize=16)
def _blocks(samples: int, views: int, pairs: int) -> tuple[_Block, ...]:
    """Blocks of at most `pairs` positive and as many negative pairs, or of one pair of views."""
    return tuple(_each_block(samples, views, max(1, pairs // samples)))


def _each_block(samples: int, views: int, most: int) -> Iterator[_Block]:
    place = 0
    for first in range(views - 1):
        second = first
        while second < views - 1:
            shift = place % (samples - 1) + 1
            # Of two samples the shift is always one; else a block ends where it starts anew.
            rest = samples - shift if samples > 2 else most
            count = min(views - 1 - second, most, rest)
            yield _Block(first, second, count, place, shift)
            second, place = second + count, place + count


def _partners(doubled: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """The second views of a block's positive and negative pairs, `(number, M, H)`, of `(K - 1, 2 M, H)`, where all samples come twice.

    There a roll of the samples is a slice. The shift grows by one from view to view, so the slices are one regular view of the memory.
    """
    _, twice, width = doubled.shape
    samples = twice // 2
    size = (block.number, samples, width)
    positive = doubled.as_strided(size, (twice * width, width, 1), block.second * twice * width)
    step = twice - 1 if samples > 2 else twice
    start = block.second * twice + samples - block.shift
    return positive, doubled.as_strided(size, (step * width, width, 1), start * width)


def _column_products(x: Tensor, y: Tensor) -> Tensor:
    """`(H,)` sums of x y over all rows."""
    return (x * y).sum(dim=(0, 1))


class _RelationHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        first_weight: Tensor,
        second_weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        slope: float,
        focal_gamma: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Of the last view no pair is the first, of the first view none the second.
        first = torch.matmul(features[:-1], first_weight.T).to(scale.dtype)
        second = torch.matmul(features[1:], second_weight.T).to(scale.dtype)
        rows, samples, width = first.shape
        pairs = rows * (rows + 1) * samples
        wants_gradient = any(ctx.needs_input_grad)
        size = _CACHED if features.device.type == "cpu" else _PARALLEL
        blocks = _blocks(samples, rows + 1, size // (2 * width))

        # In how many pairs a view is the first, and the second one.
        count = torch.arange(1, rows + 1, dtype=first.dtype, device=first.device).mul_(2)[:, None, None]
        first_count, second_count = count.flip(0), count
        first_mean, second_mean = (
            (x.sum(dim=1, keepdim=True) * n).sum(dim=0) / pairs for x, n in ((first, first_count), (second, second_count))
        )
        first, second = first - first_mean, second - second_mean

        # Sums of h over the pairs of each view: its own part, and those of its partners, of negative pairs block by block.
        later = first.new_ones(rows, rows).triu_()
        first_sum = torch.mm(later, second.flatten(1)).view_as(first).addcmul_(first, first_count)
        second_sum = torch.mm(later.T, first.flatten(1)).view_as(second).addcmul_(second, second_count)
        doubled = torch.cat([second, second], dim=1)
        doubled_sum = torch.zeros_like(doubled)
        for block in blocks:
            first_sum[block.first] += _partners(doubled, block)[1].sum(dim=0)
            _partners(doubled_sum, block)[1].add_(first[block.first])
        second_sum += doubled_sum[:, :samples]
        second_sum += doubled_sum[:, samples:]
        # The square of h is a h + b h, and each can be summed by views.
        squares = _column_products(first, first_sum) + _column_products(second, second_sum)
        var = squares.clamp_(min=0) / pairs
        inverse = (var + eps).rsqrt()
        factor = scale * inverse

        own = first * factor
        torch.addcmul(shift, doubled, factor, out=doubled)
        logits = first.new_empty(blocks[-1].place + blocks[-1].number, 2, samples)
        wrong = torch.arange(-1, 2, 2, dtype=first.dtype, device=first.device)[:, None]
        memory = first.new_empty(max(block.number for block in blocks), 2, samples, width)
        own_slope, doubled_slope = torch.zeros_like(own), doubled_sum.zero_()
        for block in blocks:
            hidden = memory[: block.number]
            for kind, partners in enumerate(_partners(doubled, block)):
                torch.add(own[block.first], partners, out=hidden[:, kind])
            F.leaky_relu_(hidden, slope)
            logit = logits[block.place : block.place + block.number]
            torch.mv(hidden.view(-1, width), weight, out=logit.view(-1))
            logit += bias
            if wants_gradient:
                gradient = _relation_loss_slope(logit * wrong, focal_gamma).mul_(wrong)
                # LeakyReLU keeps the sign, so that its result is enough.
                torch.ops.aten.leaky_relu_backward.grad_input(gradient[..., None], hidden, slope, True, grad_input=hidden)
                own_slope[block.first] += hidden.sum(dim=(0, 1))
                for kind, part in enumerate(_partners(doubled_slope, block)):
                    part += hidden[:, kind]

        loss = relation_loss(logits.flatten(), view_pairs(samples, rows + 1, logits.device).target, focal_gamma)
        if wants_gradient:
            second_slope = doubled_slope[:, :samples] + doubled_slope[:, samples:]
            total = second_slope.sum(dim=(0, 1)) / pairs
            # LeakyReLU is homogeneous: its result is its slope times its argument, which is a sum over both views.
            product = (_column_products(first, own_slope) + _column_products(second, second_slope)) / pairs
            var_gradient = -scale * weight * product * inverse.pow(3) / pairs  # by half the sum of squares
            each, mean_gradient = factor * weight / pairs, -factor * weight * total / pairs
            for x, h, count in ((own_slope, first_sum, first_count), (second_slope, second_sum, second_count)):
                x.mul_(each).addcmul_(h, var_gradient).addcmul_(count, mean_gradient)
            bias_gradient = (_relation_loss_slope(logits * wrong, focal_gamma) * wrong).mean().reshape(bias.shape)
            gradients = (weight * product * inverse, weight * total, factor * product + shift * total, bias_gradient)
            ctx.save_for_backward(features, first_weight, second_weight, own_slope, second_slope, *gradients)
        logits, mean = logits.flatten(), (first_mean + second_mean).squeeze(0)
        ctx.mark_non_differentiable(logits, mean, var)
        return loss, logits, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would let it pass, with this part as a constant, because the gradient of a mean is one.
        if torch.is_grad_enabled():
            raise RuntimeError("relation_head_loss has no second derivative: take its gradient without create_graph=True")
        features, first_weight, second_weight, *slopes, scale, shift, weight, bias = ctx.saved_tensors
        # Scaled before it is rounded, as a GradScaler means it.
        first, second = ((grad * x).to(features.dtype).flatten(0, 1) for x in slopes)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(features, memory_format=torch.contiguous_format)
            gradient[:-1].flatten(0, 1).addmm_(first, first_weight)
            gradient[1:].flatten(0, 1).addmm_(second, second_weight)
        layer = (first.T @ features[:-1].flatten(0, 1), second.T @ features[1:].flatten(0, 1))
        return gradient, *layer, *(grad * x for x in (scale, shift, weight, bias)), None, None, None


def _check(samples: int, views: int) -> None:
    if samples < 2:
        raise ValueError(
            f"a batch of {samples} image has no two images for a negative pair: let every batch hold at least two, by a larger "
            "batch_size or by dropping the last, incomplete one"
        )
    if views < 2:
        raise ValueError(f"a positive pair needs two views of an image, got {views}: set the views of the data to at least 2")
