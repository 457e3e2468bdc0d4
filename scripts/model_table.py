"""Print the README's table of trained models, made from `zoo/weights/index.json`; `--write` puts it into the README.

python scripts/model_table.py [--write]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "zoo" / "weights" / "index.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- models -->", "<!-- /models -->"
HEADER = (
    "Load with",
    "Task and data",
    "Test metrics",
    "Parameters",
    "File",
    "Recipe",
    "Seed",
    "Epochs",
    "Training",
)


class TableError(ValueError):
    """The table cannot be made or put into the README; the message says why and what to do."""


def _size(count: float, units: tuple[str, ...]) -> str:
    """`1234567` -> `1.23 M`, with three digits."""
    for unit in units[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:.3g} {units[-1]}"


def _row(name: str, entry: dict[str, Any], weights: Path) -> tuple[str, ...]:
    file = weights / entry["file"]
    if not file.is_file():
        raise TableError(f"{file} of the model {name} is missing: make it with scripts/train_weights.py, or take {name} out of {INDEX}")
    try:
        card = entry["card"]
        metrics = ", ".join(f"{metric} {value:.3f}" for metric, value in card["metrics"].items())
        return (
            f'`litzoo.load("{name}")`',
            f"{card['task']}: {card['data']}",
            f"{metrics} ({card['test_samples']:,} test samples)",
            _size(card["params"], ("", "k", "M", "G")),
            _size(file.stat().st_size, ("B", "kB", "MB", "GB")),
            f"[{card['recipe']}](zoo/configs/{card['recipe']}.yaml)" + (f" `{card['options']}`" if card.get("options") else ""),
            str(card["seed"]),
            f"{card['epochs']}, chosen by {card['selected_by']}",
            f"{card['minutes']:.1f} min, {card['machine']}",
        )
    except KeyError as error:
        raise TableError(f"the card of {name} in {INDEX} has no {error}: make it again with scripts/train_weights.py") from error


def table(index: dict[str, Any], weights: Path) -> str:
    """The Markdown table, one row a model, by name.

    Args:
        index: name -> {"file", "sha256", "card"}.
        weights: folder of the files.

    Returns:
        The lines of the table, without a line break at the end.

    Raises:
        TableError: if a file is missing or a card lacks a field.
    """
    rows = [HEADER, ("---",) * len(HEADER), *(_row(name, entry, weights) for name, entry in sorted(index.items()))]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def split_readme(text: str, begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    """The README up to and with the first marker, the table between, and the rest from the second marker on.

    Raises:
        TableError: if there is not exactly one pair of markers.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise TableError(f"{README} needs one line {begin} and, below it, one line {end}: the table goes between them")
    start, stop = text.index(begin) + len(begin), text.index(end)
    return text[:start], text[start:stop].strip("\n"), text[stop:]


def write_table(generated: str, begin: str = BEGIN, end: str = END) -> None:
    """Put a table between its markers, in one go.

    Raises:
        TableError: if there is no README with these markers.
    """
    if not README.is_file():
        raise TableError(f"there is no {README}: write it, with the lines {begin} and {end} where the table goes")
    before, _, after = split_readme(README.read_text(encoding="utf-8"), begin, end)
    temporary = README.with_suffix(".md.tmp")
    temporary.write_text(f"{before}\n{generated}\n{after}", encoding="utf-8")
    temporary.replace(README)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table between {BEGIN} and {END} of README.md")
    arguments = parser.parse_args(argv)
    try:
        generated = table(json.loads(INDEX.read_text(encoding="utf-8")), INDEX.parent)
        if arguments.write:
            write_table(generated)
        else:
            print(generated)
    except TableError as error:
        print(f"model_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
