"""Supervised contrastive loss in linear memory."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Anchors = Literal["all", "one"]

# Rows and columns of a block of products: on a CPU, where it is to stay in the cache, and elsewhere.
_CACHED, _PRODUCTS = 384, 4096
# The first pass keeps its numbers for the second one if they are not more: up to some 2,700 rows, and elsewhere one block.
_KEPT, _KEPT_PRODUCTS = 1 << 22, 1 << 24


@torch.compiler.disable  # its blocks would be unrolled, and their writing in place is refused
def supcon_loss(
    z: Tensor,
    labels: Tensor | None = None,
    temperature: float = 0.1,
    mode: Anchors = "all",
    queue: tuple[Tensor, Tensor] | None = None,
    gather: bool = True,
) -> Tensor:
    """Supervised contrastive loss: an anchor must tell its positives, the other rows of its class, from all other rows.

    With rows u = z / |z| and s_ij = u_i . u_j / t, the mean over anchors i that have positives P(i) = {p != i: y_p = y_i} of

        l_i = log sum_{j != i} exp(s_ij) - mean_{p in P(i)} s_ip.

    Soft labels (mixup, CutMix, a teacher) make it w_ij = y_i . y_j, the probability that labels drawn from both agree:

        l_i = log sum_{j != i} exp(s_ij) - sum_{p != i} w_ip s_ip / W_i,  W_i = sum_{p != i} w_ip,

    and the loss is the sum of min(1, W_i) l_i over the sum of min(1, W_i), or over 1 if that is smaller: an anchor fades out as its last
    positive does, and for one-hot labels this is the formula above. Without labels the positives of a row are the other views of its
    sample: with two views, SimCLR's NT-Xent. Collapsed rows have loss log(R - 1).

    Memory is linear in the rows. Exponentials are computed in blocks, twice if there is a gradient, and once for both s_ij and s_ji;
    the sums over positives follow from class sums. The gradient is formed in the forward pass; there is no second derivative.
    Half precision, also by autocast, is computed in float32, and temperatures below 1/64 in float64.

    Args:
        z: `(R, D)` rows, or `(B, V, D)` views of samples; of any length, a row of zeros counts but has no gradient.
        labels: int64, `(R,)` or for views `(B,)`, where -1 leaves a row out altogether; or soft, `(R, C)` or `(B, C)` float of sum one
            without a gradient, where a row of zeros is left out. None: the number of the sample, for views only.
        temperature: t, at least 1/640.
        mode: "all" views are anchors, or "one", the first of each sample. All are positives and negatives.
        queue: `(Q, D)` features and their `(Q,)` or `(Q, C)` labels: further positives and negatives, without a gradient; the same on
            all processes. A queue that is not full yet has -1 as label of its empty rows.
        gather: whether the processes, if there are several, share their rows. Each then returns its part: the mean over processes
            is the loss of the global batch, and the mean of gradients that DDP takes is its gradient. They may have different numbers of rows.

    Returns:
        A scalar, float32 or float64 like `z`; 0 if no anchor has a positive.

    Raises:
        ValueError: if shapes disagree, labels are neither of the two kinds, the mode is unknown or needs views, or the temperature is
            too small.

    Example:
        >>> supcon_loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)

    Source:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (L_out), divided by the number of anchors. The
        published code multiplies by t / 0.07, and counts anchors without positives in the mean.
    """
    _check(z, labels, temperature, mode, queue)
    dtype = torch.float64 if z.dtype == torch.float64 or temperature < 1 / 64 else torch.float32
    views = z.shape[1] if z.dim() == 3 else 1
    step = views if mode == "one" else 1
    world = torch.distributed.get_world_size() if gather and _is_distributed() else 1
    with torch.autocast(z.device.type, enabled=False):
        if labels is not None:
            labels = _as_labels(labels, dtype).repeat_interleave(views, dim=0)
        rows = every = _unit(z.flatten(0, -2).to(dtype), labels)
        before = 0
        if world > 1:
            every, before, labels = _gathered(rows, labels)
        if labels is None:
            labels = torch.arange(len(every), device=z.device) // views
        keys, key_labels = every[:0], labels[:0]
        if queue is not None:
            key_labels = _as_labels(queue[1], dtype)
            keys = _unit(queue[0].detach().to(dtype), key_labels)
        counted, key_counted = _is_counted(labels).to(dtype), _is_counted(key_labels).to(dtype)

        after = before + len(rows)
        mine = slice(before, after, step)
        anchors = rows[::step]
        targets, positives = _positives(anchors, mine, every, labels, keys, key_labels)
        pull = (anchors * targets).sum(dim=1) / (positives[mine].clamp(min=1) * temperature)

        others = [every[:before], counted[:before], every[after:], counted[after:], keys, key_counted]
        if step > 1:
            others += (x.unflatten(0, (-1, step))[:, 1:].flatten(0, 1) for x in (rows, counted[before:after]))
        weights = positives.clamp(max=1)
        push: Tensor = _LogSumExp.apply(temperature, weights[mine], anchors, counted[mine], *others)
        loss = (push - pull.sum()) * world / weights[::step].sum().clamp(min=1)
    return loss.to(torch.promote_types(z.dtype, torch.float32))


class _LogSumExp(torch.autograd.Function):
    """sum_i a_i log sum_j c_j exp(x_i . x_j / t) over anchors i and all rows j but i itself: anchors, then the other rows.

    Rows have length one or zero; one with c = 0 is zero, and no anchor of any weight. So no logit exceeds 1/t, and without a shift by the
    maximum exp(x_i . x_j / t) is the same number for i and for j: among anchors, only blocks on and above the diagonal are computed.
    """

    @staticmethod
    def forward(ctx: Any, temperature: float, weight: Tensor, anchors: Tensor, counted: Tensor, *others: Tensor) -> Tensor:
        columns = [(anchors, counted), *zip(others[::2], others[1::2], strict=True)]
        size, most = (_CACHED, _KEPT) if anchors.device.type == "cpu" else (_PRODUCTS, _KEPT_PRODUCTS)
        heights = _blocks(len(anchors), size)
        blocks = [
            (k, i, j) for k, (x, _) in enumerate(columns) for i in heights for j in _blocks(len(x), size) if k > 0 or j.start >= i.start
        ]
        largest = max((_length(i) * _length(j) for _, i, j in blocks), default=1)
        kept = len(blocks) * largest <= most
        memory = anchors.new_empty(len(blocks) if kept else 1, largest)
        scaled = anchors * (math.log2(math.e) / temperature)  # 2^x is several times faster than e^x on a CPU

        def place(number: int) -> Tensor:
            _, i, j = blocks[number]
            return memory[number if kept else 0, : _length(i) * _length(j)].view(_length(i), _length(j))

        def exponentials(number: int) -> Tensor:
            k, i, j = blocks[number]
            block = torch.mm(scaled[i], columns[k][0][j].T, out=place(number)).exp2_()
            return block.fill_diagonal_(0) if k == 0 and i == j else block

        total = torch.zeros_like(weight)
        for number, (k, i, j) in enumerate(blocks):
            block = exponentials(number)
            total[i].addmv_(block, columns[k][1][j])
            if k == 0 and i != j:
                total[j].addmv_(block.T, counted[i])
        total.clamp_(min=torch.finfo(total.dtype).tiny)  # that of a row without another is zero, and so is its weight

        if ctx.needs_input_grad[2]:
            own = torch.zeros_like(anchors)
            wanted = ctx.needs_input_grad[4::2]
            gradients = [own, *(torch.zeros_like(x) if wants else None for x, wants in zip(others[::2], wanted, strict=True))]
            share = weight / (total * temperature)
            for number, (k, i, j) in enumerate(blocks):
                block = place(number) if kept else exponentials(number)
                # Among the anchors a number stands for two: j in the sum of i, and i in the sum of j.
                block.mul_(share[i, None] + share[j] if k == 0 else share[i, None])
                own[i].addmm_(block, columns[k][0][j])
                if (gradient := gradients[k]) is not None and (k > 0 or i != j):
                    gradient[j].addmm_(block.T, anchors[i])
            ctx.save_for_backward(*gradients)
        return (weight * total.log()).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would let it pass, with this part as a constant, because the gradient of a mean is one.
        if torch.is_grad_enabled():
            raise RuntimeError("supcon_loss has no second derivative: take its gradient without create_graph=True")
        each = [(None if gradient is None else grad * gradient, None) for gradient in ctx.saved_tensors]
        return None, None, *(x for pair in each for x in pair)


def _blocks(number: int, size: int) -> list[slice]:
    """Even parts of so many rows, each of at most `size`."""
    part = math.ceil(number / max(1, math.ceil(number / size)))
    return [slice(start, min(start + part, number)) for start in range(0, number, max(1, part))]


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _positives(anchors: Tensor, mine: slice, every: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor]:
    """sum_{p != i} w_ip u_p of each anchor i, the rows `mine` of all, and W of every row: from sums over classes."""
    if labels.dim() == 2:
        sums = labels.T @ every + key_labels.T @ keys
        # Class by class: so it is zero, without rounding, where no other row has any of the classes.
        positives = (labels * (labels.sum(dim=0) + key_labels.sum(dim=0) - labels)).sum(dim=1)
        return labels[mine] @ sums - labels[mine].square().sum(dim=1, keepdim=True) * anchors, positives
    # A class is the place of its label among the sorted ones; labels that only the queue has share a place of their own.
    ordered = labels.sort().values
    places, key_places = (torch.searchsorted(ordered, x) for x in (labels, key_labels))
    key_places = key_places.where(ordered[key_places.clamp(max=len(ordered) - 1)] == key_labels, len(ordered))
    sums = every.new_zeros(len(ordered) + 1, every.shape[1]).index_add_(0, places, every).index_add_(0, key_places, keys)
    sizes = every.new_zeros(len(ordered) + 1)
    for place, label in ((places, labels), (key_places, key_labels)):
        sizes.index_add_(0, place, _is_counted(label).to(sizes.dtype))
    return sums.index_select(0, places[mine]) - anchors, (sizes[places] - 1).clamp(min=0)


def _as_labels(labels: Tensor, dtype: torch.dtype) -> Tensor:
    return labels.long() if labels.dim() == 1 else labels.detach().to(dtype)


def _is_counted(labels: Tensor) -> Tensor:
    return labels >= 0 if labels.dim() == 1 else (labels != 0).any(dim=1)


def _unit(rows: Tensor, labels: Tensor | None) -> Tensor:
    """Rows of length one; zero, without a gradient, are those left out and those that have no direction."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    zero = length == 0 if labels is None else (length == 0) | ~_is_counted(labels)[:, None]
    return rows / length.masked_fill(zero, math.inf)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gathered(rows: Tensor, labels: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """The rows of all processes in the order of ranks, where those of this one start, and all labels."""
    from torchmetrics.utilities.distributed import gather_all_tensors

    every, before = _Gather.apply(rows)
    return every, before, None if labels is None else torch.cat(gather_all_tensors(labels.contiguous()))


class _Gather(torch.autograd.Function):
    """Rows of all processes, and where those of this one start; a row gets the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, int]:
        from torchmetrics.utilities.distributed import gather_all_tensors

        parts = gather_all_tensors(rows.contiguous())
        before = sum(len(part) for part in parts[: torch.distributed.get_rank()])
        ctx.own = slice(before, before + len(rows))
        return torch.cat(parts), before

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad[ctx.own]


def _check(z: Tensor, labels: Tensor | None, temperature: float, mode: str, queue: tuple[Tensor, Tensor] | None) -> None:
    if z.dim() not in (2, 3):
        raise ValueError(f"z must hold rows (R, D) or views (B, V, D), got shape {tuple(z.shape)}")
    if mode not in get_args(Anchors):
        raise ValueError(f"mode must be one of {', '.join(get_args(Anchors))}; got {mode!r}")
    if z.dim() == 2 and mode == "one":
        raise ValueError("mode 'one' takes the first view of each sample as anchor: pass z as views (B, V, D)")
    if not temperature >= 1 / 640:
        raise ValueError(f"temperature must be at least 1/640, where exp(1 / temperature) still is a float64 number; got {temperature}")
    if labels is None:
        if z.dim() == 2:
            raise ValueError("rows (R, D) without labels have no positives: pass labels, or z as views (B, V, D)")
        if queue is not None:
            raise ValueError("a queue needs labels to compare its own with: pass the samples' index in the data set, for example")
    else:
        _check_labels("labels", labels, len(z), "z")
    if queue is not None and labels is not None:
        features, key_labels = queue
        if features.dim() != 2 or features.shape[1] != z.shape[-1]:
            raise ValueError(f"features of the queue must have shape (Q, {z.shape[-1]}), got {tuple(features.shape)}")
        _check_labels("labels of the queue", key_labels, len(features), "the queue")
        if key_labels.shape[1:] != labels.shape[1:]:
            raise ValueError(
                f"labels and those of the queue must be of one kind, with the same classes if soft; "
                f"got shapes {tuple(labels.shape)} and {tuple(key_labels.shape)}"
            )


def _check_labels(name: str, labels: Tensor, number: int, what: str) -> None:
    if labels.dim() not in (1, 2) or len(labels) != number:
        raise ValueError(
            f"{name} must have shape ({number},), or ({number}, C) if soft, as {what} has length {number}; got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() != (labels.dim() == 2):
        raise ValueError(f"{name} must be integers of shape ({number},) or probabilities of shape ({number}, C); got {labels.dtype}")
