"""The `litzoo` command: finds the command, answers the light ones, and imports torch for the others only."""

import difflib
import os
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
COMMANDS = {
    "fit": "train a model: litzoo fit --config pointnet_furniture",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split, once",
    "predict": "classify pictures, meshes or point clouds, or find parts: litzoo predict chair.obj --model pointnet_furniture",
    "embed": "features of a data set in an HDF5 file: litzoo embed --model best.ckpt --config instdisc_digits --output features.h5",
    "show": "pictures of data, augmented views, critical points, parts and embeddings: litzoo show data --config pointnet_furniture",
    "clean": "find wrong labels: litzoo clean --config classifier_digits --output cleaning",
    "select": "which samples to label next: litzoo select photos --production now.safetensors --models a.ckpt b.ckpt --output next",
    "report": "one page about a run: litzoo report runs/classifier_digits",
    "export": "turn a Lightning checkpoint into a weights file that litzoo.load reads",
    "import": "turn a checkpoint of another repository into one: litzoo import last.pth --layout supcontrast",
    "list": "models, trained weights, recipes, data sets and callbacks",
}
_TRAINING = ("fit", "validate", "test")


class CommandError(Exception):
    """A mistake on the command line, told in one sentence."""


def did_you_mean(word: str, words: list[str]) -> str:
    """The end of an error sentence: the closest of `words`, compared without case, else all of them."""
    known = {each.casefold(): each for each in words}
    close = difflib.get_close_matches(word.casefold(), list(known), n=1, cutoff=0.5)
    return f"did you mean {known[close[0]]}?" if close else f"there are: {', '.join(words)}"


def check_folder(output: Path, folder: Path) -> None:
    """Refuse a folder of pictures that cannot be made or written to, before they are computed.

    Args:
        output: what was given as --output.
        folder: where the files will be; it is made when they are written.

    Raises:
        CommandError: if it is a file or lies in one, or may not be written to.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CommandError(f"--output {output}: {there} is a file, give another folder")
    if not os.access(there, os.W_OK):
        raise CommandError(f"--output {output}: you may not write to {there}, give another folder")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with litzoo."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def recipe_path(name: str) -> str:
    """The file of a recipe given by name, or `name` itself if it is a file.

    Raises:
        CommandError: if it is neither.
    """
    if Path(name).is_file():
        return name
    path = CONFIGS / f"{name}.yaml"
    if path.is_file():
        return str(path)
    raise CommandError(f"no recipe {name!r}: it is neither a file nor a shipped recipe; {did_you_mean(name, recipe_names())}")


def is_config(argument: str) -> bool:
    """Whether an argument is `--config` or `-c`, with or without its value."""
    return argument.partition("=")[0] in ("--config", "-c")


def resolve_recipes(arguments: list[str]) -> list[str]:
    """Replace the name behind each `--config` or `-c` by the file of that recipe."""
    resolved = list(arguments)
    for position, argument in enumerate(arguments):
        if not is_config(argument):
            continue
        option, _, value = argument.partition("=")
        if value:
            resolved[position] = f"{option}={recipe_path(value)}"
        elif position + 1 < len(arguments):
            resolved[position + 1] = recipe_path(arguments[position + 1])
        else:
            raise CommandError(f"{option} needs the name of a recipe or a file; there are: {', '.join(recipe_names())}")
    return resolved


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: litzoo COMMAND ...",
            "",
            "A PyTorch Lightning model zoo.",
            "",
            *lines,
            "",
            "litzoo COMMAND --help tells the options of a command; --debug shows the traceback of an error;",
            "litzoo --print_completion=shtab-bash prints completions for the shell (needs shtab);",
            "what neither a recipe nor the command line sets can be set by environment variables, such as LITZOO_FIT__NAME=mine.",
        ]
    )


def _dispatch(command: str, arguments: list[str]) -> int:
    if command in _TRAINING:
        if {"-h", "--help"} & set(arguments):
            from .quick_help import skip_optional_imports

            skip_optional_imports()
        arguments = resolve_recipes(arguments)
        variable = f"LITZOO_{command.upper()}__CONFIG"
        if variable in os.environ:
            os.environ[variable] = recipe_path(os.environ[variable])
        from .training import train

        return train([command, *arguments])
    if command.startswith("--print_completion"):
        from .training import train

        return train([command, *arguments])
    if command == "list":
        from .listing import show_list

        return show_list(arguments)
    if command == "predict":
        from .predict import predict

        return predict(arguments)
    if command == "embed":
        from .embed import embed

        return embed(arguments)
    if command == "show":
        from .show import show

        return show(arguments)
    if command == "clean":
        if {"-h", "--help"} & set(arguments):
            from .quick_help import skip_optional_imports

            skip_optional_imports()
        from .clean import clean

        return clean(resolve_recipes(arguments))
    if command == "select":
        from .select import select

        return select(arguments)
    if command == "report":
        from .report import report

        return report(arguments)
    if command == "export":
        from .export import export

        return export(arguments)
    if command == "import":
        from .import_published import import_published

        return import_published(arguments)
    raise CommandError(f"no command {command!r}; {did_you_mean(command, list(COMMANDS))}")


def main(argv: list[str] | None = None) -> int:
    """Run a command; a mistake is told in one line on standard error, with exit status 2.

    Args:
        argv: the arguments behind `litzoo`; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("--version", "-V"):
        from ... import __version__

        print(f"litzoo {__version__}")
        return 0
    try:
        return _dispatch(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("litzoo: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        from .mistakes import sentence

        message = sentence(error)
        if debug or message is None:
            raise
        print(f"litzoo: {message}", file=sys.stderr)
        return 2
