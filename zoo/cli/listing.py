"""`litzoo list`, answered from the sources and the index alone: nothing heavy is imported."""

import argparse
import ast
import json
from pathlib import Path

from ... import callbacks, datamodules, zoo
from . import CONFIGS, recipe_names

_ROOT = Path(__file__).parent.parent.parent


def _first_sentence(folder: str, file: str, name: str) -> str:
    """First line of the docstring of a class, read without importing it."""
    path = _ROOT / folder / f"{file}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _recipe_sentence(name: str) -> str:
    with (CONFIGS / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def sections() -> dict[str, dict[str, str]]:
    """Everything that can be named on the command line, with one line each."""
    index = _ROOT / "zoo" / "weights" / "index.json"
    weights = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    return {
        "Trained weights (litzoo.load)": {name: entry["card"]["summary"] for name, entry in sorted(weights.items())},
        "Recipes (--config)": {name: _recipe_sentence(name) for name in recipe_names()},
        "Models (--model)": {name: _first_sentence("zoo", file, name) for name, file in sorted(zoo.MODELS.items())},
        "Data (--data)": {name: _first_sentence("datamodules", file, name) for name, file in sorted(datamodules.DATAMODULES.items())},
        "Callbacks (--trainer.callbacks+=)": {
            name: _first_sentence("callbacks", file, name) for name, file in sorted(callbacks.CALLBACKS.items())
        },
    }


def show_list(argv: list[str]) -> int:
    """Print models, trained weights, recipes, data sets and callbacks."""
    argparse.ArgumentParser(prog="litzoo list", description=show_list.__doc__).parse_args(argv)
    for title, rows in sections().items():
        print(title)
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            print(f"  {name:<{width}}  {text}")
        print()
    return 0
