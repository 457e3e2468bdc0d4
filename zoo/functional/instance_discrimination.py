"""Losses of instance discrimination against a memory bank: every training image is a class of its own."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .nearest_neighbours import Scores

# Numbers worked on at a time: what is gone over several times stays in a CPU's cache; products need many rows to be fast.
_CACHED, _GATHERED, _PRODUCTS = 1 << 17, 1 << 19, 1 << 23
# With more rows in the bank for each requested one, gathering those is faster than computing all products and picking.
_ROWS_PER_CHOICE = 22

_LOG2_E = 1 / math.log(2)


def instance_softmax_loss(features: Tensor, bank: Tensor, index: Tensor, temperature: float = 0.07, scores: Scores = "fp32") -> Tensor:
    """Non-parametric softmax: -log P(i | f), with P(i | f) = exp(v_i . f / t) / sum_j exp(v_j . f / t) over the rows v_j of a bank.

    The bank is a constant. Its rows are visited once, in blocks, with a running maximum: the `(B, N)` logits
    never exist whole, and the gradient, (sum_j P(j | f) v_j - v_i) / t, is formed on the way.

    Args:
        features: `(B, D)`, f, of length one; half precision is computed in float32.
        bank: `(N, D)`, v, float32 or float64.
        index: `(B,)` int64, row of each sample.
        temperature: t, positive.
        scores: "bf16" multiplies in bfloat16 and sums in float32: a logit s is off by at most |s| / 256.

    Returns:
        `(B,)` losses.

    Raises:
        ValueError: if shapes disagree or the temperature is not positive.

    Example:
        >>> instance_softmax_loss(torch.eye(2), torch.eye(2), torch.arange(2), temperature=1.0)
        tensor([0.3133, 0.3133])

    Source:
        Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, equation 2.
    """
    _check(features, bank, temperature)
    if index.shape != (len(features),):
        raise ValueError(f"index must hold one row for each of the {len(features)} samples, got shape {tuple(index.shape)}")
    loss: Tensor = _InstanceSoftmax.apply(features.to(bank.dtype), bank, index, temperature, scores)
    return loss


class _InstanceSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, bank: Tensor, index: Tensor, temperature: float, scores: Scores) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            # Powers of two are computed several times faster on a CPU than those of e.
            scaled = features * (_LOG2_E / temperature)
            own = bank.index_select(0, index)
            maximum = features.new_full((len(features), 1), -math.inf)
            total = torch.zeros_like(maximum)
            mean = torch.zeros_like(features) if ctx.needs_input_grad[0] else None
            left = scaled.bfloat16() if scores == "bf16" else scaled
            for rows in bank.split(max(1, (_CACHED if features.device.type == "cpu" else _PRODUCTS) // max(1, len(features)))):
                rows = rows.bfloat16() if scores == "bf16" else rows
                logits = (left @ rows.T).to(bank.dtype)
                highest = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
                shrink = (maximum - highest).exp2_()
                exponentials = logits.sub_(highest).exp2_()
                total.mul_(shrink).add_(exponentials.sum(dim=1, keepdim=True))
                if mean is not None and scores == "bf16":
                    mean.mul_(shrink).add_(exponentials.bfloat16() @ rows)
                elif mean is not None:
                    mean.mul_(shrink).addmm_(exponentials, rows)
                maximum = highest
            if mean is not None:
                ctx.save_for_backward(mean.div_(total).sub_(own).div_(temperature))
            return ((maximum + total.log2()).squeeze(1) - (scaled * own).sum(dim=1)) / _LOG2_E

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None, None, None, None


def bank_similarities(features: Tensor, bank: Tensor, rows: Tensor, scores: Scores = "fp32") -> Tensor:
    """Inner products of features with chosen rows of a constant bank.

    If each sample has rows of its own, gathering them would take B x K x D numbers; instead, all products with the bank are computed
    and the wanted ones picked. If the bank has more than 22 K rows, rows are gathered after all, a few samples at a time.

    Args:
        features: `(B, D)`; half precision is computed in float32.
        bank: `(N, D)`, float32 or float64.
        rows: `(B, K)` int64, or `(K,)` if all samples share them.
        scores: "bf16" multiplies in bfloat16: a product s is off by at most |s| / 256.

    Returns:
        `(B, K)`, differentiable in `features`.

    Raises:
        ValueError: if shapes disagree.

    Example:
        >>> bank_similarities(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]))
        tensor([[3.],
                [4.]])
    """
    _check(features, bank)
    features = features.to(bank.dtype)
    if rows.dim() == 1:
        chosen = bank.index_select(0, rows)
        with torch.autocast(features.device.type, enabled=False):
            return (features.bfloat16() @ chosen.bfloat16().T).to(bank.dtype) if scores == "bf16" else features @ chosen.T
    if rows.dim() != 2 or len(rows) != len(features):
        raise ValueError(f"rows must have shape ({len(features)}, K) or (K,), got {tuple(rows.shape)}")
    similarities: Tensor = _ChosenSimilarities.apply(features, bank, rows, scores)
    return similarities


class _ChosenSimilarities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, bank: Tensor, rows: Tensor, scores: Scores) -> Tensor:
        ctx.save_for_backward(bank, rows)
        ctx.scores = scores
        chosen = features.new_empty(rows.shape)
        with torch.autocast(features.device.type, enabled=False):
            if _gathers(bank, rows):
                block = _block(len(rows), rows.shape[1] * bank.shape[1], _GATHERED if bank.device.type == "cpu" else _PRODUCTS)
                for part, these, out in zip(features.split(block), rows.split(block), chosen.split(block), strict=True):
                    torch.bmm(_gather(bank, these), part[:, :, None], out=out[:, :, None])
                return chosen
            right = bank.bfloat16() if scores == "bf16" else bank
            block = _block(len(rows), len(bank), _PRODUCTS)
            # One piece of memory for all blocks: fresh memory of this size is dear.
            buffer = right.new_empty(min(block, len(features)), len(bank))
            for part, these, out in zip(features.split(block), rows.split(block), chosen.split(block), strict=True):
                out.copy_(torch.mm(part.to(right.dtype), right.T, out=buffer[: len(part)]).gather(1, these))
        return chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bank, rows = ctx.saved_tensors
        gradient = grad.new_empty(len(rows), bank.shape[1])
        with torch.autocast(grad.device.type, enabled=False):
            if _gathers(bank, rows):
                block = _block(len(rows), rows.shape[1] * bank.shape[1], _GATHERED if bank.device.type == "cpu" else _PRODUCTS)
                for part, these, out in zip(grad.split(block), rows.split(block), gradient.split(block), strict=True):
                    torch.bmm(part[:, None, :], _gather(bank, these), out=out[:, None, :])
                return gradient, None, None, None
            right = bank.bfloat16() if ctx.scores == "bf16" else bank
            block = _block(len(rows), len(bank), _PRODUCTS)
            buffer = right.new_empty(min(block, len(rows)), len(bank))
            for part, these, out in zip(grad.split(block), rows.split(block), gradient.split(block), strict=True):
                # A row may be drawn twice, so its weights add up.
                weights = buffer[: len(part)].zero_().scatter_add_(1, these, part.to(right.dtype))
                out.copy_(weights @ right)
        return gradient, None, None, None


def without_own(negative: Tensor, noise: Tensor, row: Tensor) -> Tensor:
    """Leave each sample's own row out of noise that all samples share: its inner product becomes -inf.

    Args:
        negative: `(B, m)`, inner products with the noise.
        noise: `(m,)` int64, rows of the bank.
        row: `(B,)` int64, each sample's own row.

    Returns:
        `(B, m)`.

    Example:
        >>> without_own(torch.zeros(2, 3), torch.tensor([5, 6, 7]), torch.tensor([7, 1]))
        tensor([[0., 0., -inf],
                [0., 0., 0.]])
    """
    if negative.device.type != "cpu":  # the few below would have to be counted, for which the processor waits for the device
        return negative.masked_fill(noise == row[:, None], -math.inf)
    some = torch.isin(noise, row).nonzero().squeeze(1)  # a few of thousands
    sample, place = (noise[some] == row[:, None]).nonzero(as_tuple=True)
    return negative.index_put((sample, some[place]), negative.new_tensor(-math.inf))


def nce_loss(positive: Tensor, negative: Tensor, temperature: float, log_partition: Tensor | float) -> Tensor:
    """Noise-contrastive estimation: tells a sample's own row from rows drawn uniformly from the bank.

    With noise P_n = 1 / N and m draws, h(i, v) = P(i | v) / (P(i | v) + m / N), where P = exp(s / t) / Z for the inner
    product s. So h = sigmoid(s / t - b) with b = log(m Z / N), and the loss, -log h(i, v) - sum_k log(1 - h(i, v_k)), is
    softplus(b - s / t) + sum_k softplus(s_k / t - b): a binary cross entropy with logits, in which N appears only within Z / N.

    Args:
        positive: `(B,)`, inner product of each sample with its own row.
        negative: `(B, m)`, with the rows drawn; -inf leaves one out.
        temperature: t, positive.
        log_partition: log(Z / N), the logarithm of the mean of exp(s / t) over the bank; see `log_partition_of`.

    Returns:
        `(B,)` losses.

    Example:
        >>> nce_loss(torch.tensor([1.0]), torch.tensor([[0.0, 0.0]]), temperature=1.0, log_partition=0.0)
        tensor([1.3369])

    Source:
        Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, equations 4 to 8.
    """
    bias = math.log(negative.shape[1]) + log_partition
    noise: Tensor = _SoftplusSum.apply(negative, 1 / temperature, bias)
    return F.softplus(bias - positive / temperature) + noise


class _SoftplusSum(torch.autograd.Function):
    """sum_k softplus(a x_k - b), several times faster on a CPU than `F.softplus`, whose log1p is computed one by one there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, bias: Tensor | float) -> Tensor:
        logits = (x * scale).sub_(bias)
        # softplus(y) = max(y, 0) + log(1 + e), e = exp(-|y|). To log u of the rounded u = 1 + e belongs (e - (u - 1)) / u.
        lost = logits.abs().neg_().exp_()
        above = lost + 1
        lost.sub_(above - 1).div_(above)
        total = above.log_().add_(lost).add_(logits.clamp(min=0)).sum(dim=1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits.sigmoid_().mul_(scale))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None


def log_partition_of(negative: Tensor, temperature: float) -> Tensor:
    """Estimate log(Z / N), the logarithm of the mean of exp(s / t), from inner products with rows drawn uniformly.

    Args:
        negative: `(B, m)`; -inf leaves one out.
        temperature: t, positive.

    Returns:
        A scalar without gradient.

    Example:
        >>> log_partition_of(torch.zeros(4, 8), temperature=0.07)
        tensor(0.)

    Source:
        Wu, Xiong, Yu & Lin, CVPR 2018, equation 8. Against random rows of D dimensions it is 1 / (2 D t^2).
    """
    values = negative.detach().flatten() / temperature
    return values.logsumexp(dim=0) - (values > -math.inf).sum().log()


def _check(features: Tensor, bank: Tensor, temperature: float = 1.0) -> None:
    if features.dim() != 2 or bank.dim() != 2 or features.shape[1] != bank.shape[1]:
        raise ValueError(
            f"features (batch, dimensions) and bank (rows, dimensions) must have the same dimensions, "
            f"got {tuple(features.shape)} and {tuple(bank.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _block(rows: int, width: int, numbers: int) -> int:
    """How many rows of that width to work on at a time, so that a block has at most so many numbers and all are about equal."""
    blocks = max(1, math.ceil(rows * width / numbers))
    return max(1, math.ceil(rows / blocks))


def _gather(bank: Tensor, rows: Tensor) -> Tensor:
    """`bank[rows]`, several times faster on a CPU."""
    return bank.index_select(0, rows.flatten()).view(*rows.shape, bank.shape[1])


def _gathers(bank: Tensor, rows: Tensor) -> bool:
    return len(bank) > _ROWS_PER_CHOICE * rows.shape[1]
