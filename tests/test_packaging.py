"""The house: the repository root is the package, imports point down, and the face is lazy."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import litzoo
import litzoo.callbacks
import litzoo.datamodules
import litzoo.zoo

ROOT = Path(litzoo.__file__).parent
INSTALLED = not (ROOT / "pyproject.toml").exists()
FLOORS = ("zoo", "callbacks", "datamodules")
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
pytestmark = pytest.mark.skipif(INSTALLED, reason="needs the repository")


def name_of(path: Path) -> str:
    """`datamodules/augment/points.py` -> `datamodules.augment.points`; a package keeps `.__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, absolute name below litzoo) of each import in a file; level 0 is an absolute import."""
    found = []
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module]))) if node.level else node.module or ""
            found.append((node.level, base))
            if node.level:
                found += [(node.level, f"{base}.{alias.name}".lstrip(".")) for alias in node.names]
    return found


def test_every_folder_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"litzoo", *("litzoo." + ".".join(path.relative_to(ROOT).parent.parts) for path in FILES)}
    assert sorted(settings["packages"]) == sorted(folders)
    assert settings["package-dir"] == {"litzoo": "."}
    for folder in folders - {"litzoo"}:
        assert (ROOT / Path(*folder.split(".")[1:]) / "__init__.py").exists(), f"{folder} has no __init__.py"


def test_every_data_file_is_packaged() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc") and tracked(path):
                package = "litzoo." + ".".join(path.relative_to(ROOT).parent.parts)
                assert any(path.match(pattern) for pattern in data.get(package, [])), f"{path} is not in package-data"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], check=False, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs the git repository")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def tracked(path: Path) -> bool:
    return path in tracked_files()


def test_one_copy_of_each_module() -> None:
    for path in FILES:
        if path.name != "__main__.py":
            importlib.import_module("litzoo." + name_of(path).removesuffix(".__init__"))
    copies: dict[str, list[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and any(Path(file).is_relative_to(ROOT / floor) for floor in FLOORS):
            copies.setdefault(file, []).append(name)
    assert len(copies) >= len(FILES)
    assert {file: names for file, names in copies.items() if len(names) > 1} == {}


@pytest.mark.parametrize("floor", FLOORS)
def test_bare_import_is_refused(floor: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {floor}"], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: import it as litzoo.{floor}: a bare `{floor}` would be a second copy of the package" in done.stderr


@pytest.mark.parametrize("name", ["litzoo", "litzoo.zoo", "litzoo.callbacks", "litzoo.datamodules"])
def test_every_name_of_the_face_resolves(name: str) -> None:
    module = importlib.import_module(name)
    for exported in module.__all__:
        assert getattr(module, exported) is not None
        assert exported in dir(module)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = module.nothing
    # type checkers see the same names
    tree = ast.parse(Path(module.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    declared = {alias.asname for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == set(module.__all__) - {"__version__"}


def test_every_model_is_exported_from_the_file_that_defines_it() -> None:
    for table, package in (
        (litzoo.zoo.MODELS, "zoo"),
        (litzoo.callbacks.CALLBACKS, "callbacks"),
        (litzoo.datamodules.DATAMODULES, "datamodules"),
    ):
        for name, file in table.items():
            assert getattr(importlib.import_module(f"litzoo.{package}"), name).__module__ == f"litzoo.{package}.{file}"


def test_import_is_light() -> None:
    code = (
        "import sys, litzoo, litzoo.zoo, litzoo.callbacks, litzoo.datamodules; litzoo.__version__; dir(litzoo.zoo); "
        "print([name for name in ('torch', 'lightning', 'numpy', 'h5py', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_inside_are_relative(path: Path) -> None:
    absolute = [name for level, name in imports(path) if level == 0 and name.split(".")[0] in ("litzoo", *FLOORS)]
    assert absolute == [], "inside the package: relative imports only"


@pytest.mark.parametrize("path", [p for f in ("tests", "scripts") for p in sorted((ROOT / f).rglob("*.py"))], ids=name_of)
def test_imports_outside_are_absolute(path: Path) -> None:
    relative = [name for level, name in imports(path) if level or name.split(".")[0] in FLOORS]
    assert relative == [], "in tests and scripts: litzoo.... only"


def floor_of(name: str) -> int:
    """0 is the ground; an import may point to the same floor or down."""
    if name.startswith("zoo.cli"):
        return 4
    if name.startswith(("callbacks", "datamodules")):
        return 3
    if name.startswith(
        ("zoo.functional", "zoo.layers", "zoo.batch", "zoo.files", "zoo.safe_reading", "zoo.optimization", "zoo.weights", "zoo.configs")
    ):
        return 0
    if name.startswith(("zoo.pretrained", "zoo.backbones")):
        return 1
    if name in ("zoo", "zoo.__init__"):
        return 1  # the face imports nothing until it is asked
    return 2 if name.startswith("zoo.") else -1


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    name = name_of(path)
    if name in ("zoo.__init__", "callbacks.__init__", "datamodules.__init__"):
        return  # lazy tables
    for level, target in imports(path):
        if level == 0 or target == "":
            continue
        assert floor_of(target) <= floor_of(name), f"{name} imports {target}, which lies above it"
        pair = {name.split(".")[0], target.split(".")[0]}
        assert pair != {"callbacks", "datamodules"}, f"{name} imports {target}: callbacks and datamodules do not know each other"
        if name.startswith("callbacks."):
            module = target.removeprefix("zoo.").split(".")[0]
            assert module not in {*litzoo.zoo.MODELS, *litzoo.zoo.MODELS.values()}, (
                f"{name} imports the model {target}: a callback knows no model by name"
            )


def test_no_path_of_a_machine() -> None:
    pattern = re.compile(rb"(?<![\w.$}])/(?:" + rb"|".join([b"work", b"root", b"tmp/" + b"bash", b"home/" + rb"\w+"]) + rb")/")
    found = []
    for path in tracked_files():
        if path.suffix not in (".h5", ".safetensors", ".png", ".svg"):
            found += [f"{path.relative_to(ROOT)}: {match.group().decode()}" for match in pattern.finditer(path.read_bytes())]
    assert found == []
