"""What label cleaning found: tables, a page to review it, and the cleaned labels."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .cleaning import CleaningResult
from .files import write_file
from .functional.confusion import confusion_matrix

_UNJUDGED = "unjudged"
_DECISIONS = ("accept", "keep")


def write_tables(folder: str | os.PathLike[str], result: CleaningResult, files: Sequence[str] = ()) -> dict[str, Any]:
    """Write `labels.csv`, `labels.json` and `summary.json`.

    The first two have a row for each sample: index, file, given, proposed, given_probability, proposed_probability, flags, votes and
    verdict, which is `review`, `clean` or `unjudged`. The summary counts them for each class; its `noise_matrix` `(C, C)` says how many
    labels of class i become class j if all proposals for samples to review are accepted.

    Args:
        folder: where to; it is made.
        result: of `clean_labels`.
        files: name of each sample of the data set, or none.

    Returns:
        The summary.

    Example:
        >>> write_tables("cleaning", result)["review"]
        26
    """
    target, names = Path(folder), result.class_names
    table = result.table
    columns = zip(
        result.index.tolist(),
        result.label.tolist(),
        table.proposed.tolist(),
        table.given_probability.tolist(),
        table.proposed_probability.tolist(),
        table.flags.tolist(),
        table.votes.tolist(),
        result.review.tolist(),
        strict=True,
    )
    rows = []
    for index, given, proposed, of_given, of_proposed, flags, votes, review in columns:
        unjudged = votes == 0  # JSON has no NaN
        row: dict[str, Any] = {"index": index, "file": files[index]} if files else {"index": index}
        row |= {"given": names[given], "proposed": names[proposed]}
        row |= {"given_probability": None if unjudged else round(of_given, 6)}
        row |= {"proposed_probability": None if unjudged else round(of_proposed, 6)}
        rows.append({**row, "flags": flags, "votes": votes, "verdict": "review" if review else _UNJUDGED if unjudged else "clean"})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    new = torch.where(result.review, table.proposed, result.label)
    count = [
        torch.bincount(result.label[chosen], minlength=len(names)).tolist()
        for chosen in (torch.ones_like(result.review), result.review, table.votes == 0)
    ]
    summary = {
        "samples": len(rows),
        "review": int(result.review.sum()),
        _UNJUDGED: int((table.votes == 0).sum()),
        "classes": [
            {"name": name, "samples": every, "review": review, _UNJUDGED: none}
            for name, every, review, none in zip(names, *count, strict=True)
        ],
        "noise_matrix": confusion_matrix(new, result.label, len(names)).tolist(),
    }
    contents = {"labels.csv": text.getvalue(), "labels.json": _json(rows), "summary.json": _json(summary)}
    for name, content in contents.items():
        write_file(target / name, content.encode("utf-8", "backslashreplace"))  # file names need not be text
    return summary


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_review(
    path: str | os.PathLike[str], result: CleaningResult, datamodule: Any, files: Sequence[str] = (), show: int = 300, title: str = ""
) -> int:
    """Write the page of samples to review, the most certain ones first: by the share of votes, then by how far the proposal leads.

    Args:
        path: a `.html` file; its folder is made.
        result: of `clean_labels`.
        datamodule: the data that were cleaned, whose images, clouds or numbers are shown.
        files: name of each sample of the data set, or none.
        show: samples on the page, at most.
        title: of the page; empty takes a plain one.

    Returns:
        How many samples are on it.

    Raises:
        ValueError: if `show` is below 1.

    Example:
        >>> write_review("cleaning/review.html", result, data)
        26
    """
    from .plots.review import ReviewItem, sample_picture, write_review_html

    if show < 1:
        raise ValueError(f"show must be at least 1, got {show}")
    table = result.table
    places = result.review.nonzero().squeeze(1)
    share = table.flags[places] / table.votes[places].clamp_min(1)
    lead = (table.proposed_probability - table.given_probability)[places]
    order = lead.argsort(descending=True, stable=True)
    order = order[share[order].argsort(descending=True, stable=True)]
    chosen = places[order[:show]]
    items = []
    for place in chosen.tolist():
        index = int(result.index[place])
        png, text = sample_picture(datamodule.arrays, index)
        items.append(
            ReviewItem(
                index,
                files[index] if files else "",
                int(result.label[place]),
                int(table.proposed[place]),
                float(table.given_probability[place]),
                float(table.proposed_probability[place]),
                int(table.flags[place]),
                int(table.votes[place]),
                png,
                text,
            )
        )
    left = len(places) - len(items)
    note = f"{len(places):,} of {len(result.label):,} labels are to be reviewed; given label → proposed label, most certain first."
    if left:
        note += f" The first {len(items):,} are shown, {left:,} more are in labels.csv."
    write_review_html(path, items, result.class_names, title or "Labels to review", note)
    return len(items)


def read_decisions(path: str | os.PathLike[str], class_names: Sequence[str]) -> dict[int, int | None]:
    """Decisions of a person, as the review page downloads them, or as a spreadsheet saves them.

    Args:
        path: a CSV file with the columns index, proposed and decision; the proposed class may have been corrected by hand. Rows
            without a decision are left out.
        class_names: C names.

    Returns:
        Sample number -> the class that was accepted, or None where the given label is kept.

    Raises:
        ValueError: if the file is missing, is no such table, or a row holds something else.

    Example:
        >>> read_decisions("decisions.csv", ["cat", "dog"])
        {7: 1, 12: None}
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"there is no file {source}: the review page downloads one")
    numbers = {str(name): cls for cls, name in enumerate(class_names)}
    decisions: dict[int, int | None] = {}
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("index", "proposed", "decision") if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{source} has no column {' and '.join(missing)}: it needs index, proposed and decision")
            for row in reader:
                index, proposed, decision = (str(row[name] or "") for name in ("index", "proposed", "decision"))
                index, decision = index.strip(), decision.strip()
                proposed = proposed if proposed in numbers else proposed.strip()  # a class may be called so
                where = f"{source}, line {reader.line_num}"
                if not decision:
                    continue
                if decision not in _DECISIONS:
                    raise ValueError(f"{where}: a decision is accept or keep, not {decision}")
                if not index.isdecimal():
                    raise ValueError(f"{where}: the index is the number of a sample, not {index!r}")
                if decision == "accept" and proposed not in numbers:
                    raise ValueError(f"{where}: there is no class {proposed!r}; there are: {', '.join(list(numbers)[:20])}")
                decisions[int(index)] = numbers[proposed] if decision == "accept" else None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source} is not a CSV file in UTF-8 ({error})") from error
    return decisions


def apply_verdicts(
    label: Tensor, result: CleaningResult, by: Literal["relabel", "drop"], decisions: Mapping[int, int | None] | None = None
) -> tuple[Tensor, Tensor]:
    """The labels of a whole data set after cleaning, and which samples stay.

    Args:
        label: `(M,)` int64, the labels of the data set.
        result: of `clean_labels` on it.
        by: "relabel" gives samples to review their proposed label, "drop" leaves them out.
        decisions: sample number -> the label that a person accepted, or None to keep the given one; samples that are not in it are kept.
            None goes by `result.review`.

    Returns:
        New labels `(M,)` int64, and `(M,)` bool, which samples stay.

    Raises:
        ValueError: if a decision names no sample that was judged.

    Example:
        >>> label, kept = apply_verdicts(data.arrays.label, result, "relabel")
    """
    if decisions is None:
        index, proposed = result.index[result.review], result.table.proposed[result.review]
    else:
        foreign = sorted(set(decisions) - set(result.index.tolist()))
        if foreign:
            raise ValueError(f"there is a decision on sample {foreign[0]}, which was not judged: give decisions on these data")
        accepted = {number: cls for number, cls in decisions.items() if cls is not None}
        index = torch.tensor(list(accepted), dtype=torch.long)
        proposed = torch.tensor(list(accepted.values()), dtype=torch.long)
    new, kept = label.clone(), torch.ones(len(label), dtype=torch.bool)
    if by == "drop":
        kept[index] = False
    else:
        new[index] = proposed
    return new, kept
