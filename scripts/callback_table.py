"""Print the README's table of the callback matrix, made from `tests/callbacks/matrix.py`; `--write` puts it into the README.

python scripts/callback_table.py [--write]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "callbacks"), str(ROOT / "scripts")]

from matrix import CONDITIONS, ROWS
from model_table import TableError, write_table

BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"


def table() -> str:
    """The Markdown table: a row a condition, and the callbacks that are right under it or refuse to start, with the reason."""
    lines = ["| Condition | Right | Refused at the start of `fit` |", "| --- | --- | --- |"]
    for condition, text in CONDITIONS.items():
        refused: dict[str, list[str]] = {}
        for name, row in ROWS.items():
            if condition in row.refuses:
                refused.setdefault(row.reason[condition], []).append(f"`{name}`")
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in refused.items())
        lines.append(f"| {text} | {'all others' if refused else 'all'} | {reasons or 'none'} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table between {BEGIN} and {END} of README.md")
    if not parser.parse_args(argv).write:
        print(table())
        return 0
    try:
        write_table(table(), BEGIN, END)
    except TableError as error:
        print(f"callback_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
