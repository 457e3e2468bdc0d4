"""Model-fusion data iteration: an ensemble over views finds the samples that the model in production does not know yet."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from .functional.data_selection import Rank, Selection, rank_queue, select
from .functional.label_cleaning import fuse
from .functional.views import View, ViewPreset, resolve_views
from .layers.modes import evaluating
from .raw_inputs import prepare_raw


@torch.no_grad()
def select_samples(
    production: Any,
    models: Sequence[Any],
    data: Any,
    views: ViewPreset | Sequence[View] = (),
    weights: Sequence[float] | None = None,
    threshold: float = 0.95,
    rank: Rank = "disagreement",
    names: Sequence[str] = (),
    progress: bool = False,
) -> Selection:
    """Leave out the samples that the production model knows, and rank the others by how useful a label would be.

    Each of M models gives logits for the sample and for V - 1 views of it; their weighted mean, before the softmax, is the ensemble's
    prediction, see `fuse`. The production model predicts the sample as it is, as it does in production. `select` compares the two and
    ranks; the members of its committee are the models, each fused over its views, and the production model.

    Without `models`, the production model over its own views takes their place; without views either, nothing can disagree, and
    only "entropy" and "margin" rank.

    Args:
        production: a classifier whose `forward` gives logits `(B, C)`.
        models: M others. Where all have `class_names`, they must be the same names, in any order.
        data: a DataModule, whose training samples are taken, labelled or not; or an iterable of batches, raw images or clouds as
            `predict` takes them. Raw samples and stored images are prepared by each model as its own training wants it.
        views: a preset, or functions inputs -> inputs, see `TestTimeViews`; the sample itself always comes besides.
        weights: of the models, M numbers; None weighs all alike.
        threshold: the probability that both must reach for a sample to be left out, in [0, 1].
        rank: "disagreement", "entropy" or "margin", see `select`.
        names: of the production model and the models, for messages.
        progress: show a bar on standard error.

    Returns:
        The selection; its rows are in the order of the data, of a DataModule that of `train_index`.

    Raises:
        ValueError: if the models do not know the same classes, give other than finite logits `(B, C)`, a setting is out of range, or
            there are no samples.

    Example:
        >>> data = DigitsDataModule()
        >>> found = select_samples(production, [first, second], data, views="shifts")
        >>> data.train_index[found.order[:100]]  # label these next

    Source:
        Settles, "Active Learning Literature Survey", 2009, section 3.2 (query by committee).
    """
    from tqdm import tqdm

    members = list(models) or [production]
    called = list(names) or ["the production model", *(f"model {number + 1}" for number in range(len(models)))]
    others = resolve_views(views)
    orders = [_class_order(production, model, called[0], name) for model, name in zip(models, called[1:], strict=True)] or [None]
    if not models and not others and rank == "disagreement":
        raise ValueError("one model alone cannot disagree with itself: give models, or views, or rank by entropy")
    shares = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    if shares is not None and shares.shape != (len(members),):
        raise ValueError(f"there must be one weight for each of {len(members)} models, got {len(shares)}")
    nothing = torch.ones(0, 2)
    select(nothing, nothing, nothing.expand(len(members), -1, -1), shares, threshold, rank)  # refuses settings before any work

    found: list[Selection] = []
    with ExitStack() as stack:
        for model in {id(model): model for model in (production, *members)}.values():
            stack.enter_context(evaluating(model))
        watched = None if progress else True  # None: not where nobody watches
        for inputs_of in tqdm(_inputs(data), total=_length(data), leave=False, disable=watched):
            predicted = _logits(production, inputs_of(production), (), called[0])[0]
            scores = torch.stack(
                [
                    _logits(model, inputs_of(model), others, name, predicted.shape[1], order)
                    for model, name, order in zip(members, called[-len(members) :], orders, strict=True)
                ]
            )
            each = None if shares is None else shares[:, None].expand(scores.shape[:2])
            single = torch.stack([fuse(score[None]) for score in scores])
            found.append(select(predicted.softmax(dim=1), fuse(scores, each), single, shares, threshold, rank))
    if not found:
        raise ValueError("there are no samples to select from")
    whole = Selection(*(torch.cat(column) for column in zip(*found, strict=True)))
    return whole._replace(order=rank_queue(whole.left_out, whole.usefulness))


def _class_order(production: Any, model: Any, called: str, name: str) -> Tensor | None:
    """Where each class of the production model is among those of another one; None if in the same place."""
    wanted, given = getattr(production, "class_names", None), getattr(model, "class_names", None)
    if wanted is None or given is None or list(wanted) == list(given):
        return None
    if sorted(wanted) == sorted(given) and len(set(given)) == len(given):
        place = {cls: number for number, cls in enumerate(given)}
        return torch.tensor([place[cls] for cls in wanted])
    lacking, foreign = ([cls for cls in first if cls not in second] for first, second in ((wanted, given), (given, wanted)))
    only = " and ".join(
        f"{', '.join(map(str, classes[:5]))}{' ...' if len(classes) > 5 else ''} only by {who}"
        for classes, who in ((lacking, called), (foreign, name))
        if classes
    )
    raise ValueError(
        f"{name} does not know the same {len(wanted)} classes as {called} ({only or 'a name comes twice'}): give models of the same classes"
    )


def _inputs(data: Any) -> Iterator[Callable[[Any], list[Tensor]]]:
    """Of each batch, what gives a model its inputs, in one or several tensors."""
    if hasattr(data, "eval_train_dataloader"):
        for batch in data.eval_train_dataloader():
            yield partial(_take, data=data, batch=batch)
    else:
        for batch in data:
            yield partial(_prepare, inputs=batch)


def _take(model: Any, data: Any, batch: Any) -> list[Tensor]:
    """Stored images as the model prepares raw ones, since its mean and deviation may differ from the data's; else what the data make."""
    if getattr(model, "image_input", None) is not None and batch.input.dtype == torch.uint8:
        return _prepare(model, batch.input)
    return [data.transform(move_data_to_device(batch, _device(model))).input]


def _prepare(model: Any, inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Raw inputs as the model's `predict` prepares them, or as they are if it prepares none."""
    return prepare_raw(inputs, getattr(model, "image_input", None), getattr(model, "normalization", None), _device(model))


def _logits(
    model: Any, groups: list[Tensor], views: Sequence[View], name: str, classes: int | None = None, order: Tensor | None = None
) -> Tensor:
    """Logits `(V, B, C)` of the inputs and of views of them, with the classes in this order."""
    parameter = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(0))
    groups = [group.to(parameter.device, parameter.dtype if group.is_floating_point() else None) for group in groups]
    number = sum(map(len, groups))
    rows = []
    for view in (None, *views):
        for group in groups:
            output = model(group if view is None else _view(view, group, name))
            shape = tuple(output.shape) if isinstance(output, Tensor) else None
            if shape is None or len(shape) != 2 or shape[0] != len(group) or shape[1] < 2 or shape[1] != (classes or shape[1]):
                raise ValueError(
                    f"{name} is a {type(model).__name__}, whose forward must give logits ({len(group)}, {classes or 'classes'}) of {len(group)} "
                    f"samples, got {shape or type(output).__name__}: give a classifier of the same classes"
                )
            rows.append(output.float().cpu())
    logits = torch.cat(rows).view(1 + len(views), number, -1)
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{name} gives outputs that are not finite: its training diverged, or an input is not finite")
    return logits if order is None else logits[:, :, order]


def _view(view: View, inputs: Tensor, name: str) -> Tensor:
    try:
        return view(inputs)
    except ValueError as error:
        raise ValueError(f"these views do not fit what {name} takes: {error}") from error


def _device(model: Any) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _length(data: Any) -> int | None:
    """How many batches there are, where that can be told."""
    loader = data.eval_train_dataloader() if hasattr(data, "eval_train_dataloader") else data
    return len(loader) if hasattr(loader, "__len__") else None
