"""The README's table of trained models is the one that scripts/model_table.py makes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script, on an index of one model and a README of its own."""
    module = load_script("model_table")
    (tmp_path / "one.safetensors").write_bytes(bytes(2_345_678))
    card: dict[str, Any] = {
        "summary": "PointNet on furniture",
        "task": "classification",
        "data": "furniture, 11 classes",
        "metrics": {"accuracy": 0.87179, "mcc": 0.85},
        "test_samples": 39,
        "params": 1_612_345,
        "recipe": "pointnet_furniture",
        "seed": 0,
        "epochs": 100,
        "selected_by": "val/loss",
        "minutes": 7.25,
        "machine": "a|b, 2 threads",
        "licence": "Apache-2.0",
        "commit": "0" * 40,
        "litzoo": "0.1.0",
    }
    index = {"one": {"file": "one.safetensors", "sha256": "", "card": card}}
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "README.md").write_text(f"top\n{module.BEGIN}\nstale\n{module.END}\nbottom\n", encoding="utf-8")
    monkeypatch.setattr(module, "INDEX", tmp_path / "index.json")
    monkeypatch.setattr(module, "README", tmp_path / "README.md")
    return module


def test_readme_holds_the_generated_table(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("model_table")
    readme = ROOT / "README.md"
    assert readme.is_file(), f"README.md is missing; it needs the lines {script.BEGIN} and {script.END}"
    _, found, _ = script.split_readme(readme.read_text(encoding="utf-8"))
    expected = script.table(json.loads(script.INDEX.read_text(encoding="utf-8")), script.INDEX.parent)
    assert found == expected, "run: python scripts/model_table.py --write"


def test_row_says_everything_and_escapes_bars(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 0
    assert capsys.readouterr().out.splitlines()[2] == (
        '| `litzoo.load("one")` | classification: furniture, 11 classes | accuracy 0.872, mcc 0.850 (39 test samples) | 1.61 M | 2.35 MB '
        "| [pointnet_furniture](zoo/configs/pointnet_furniture.yaml) | 0 | 100, chosen by val/loss | 7.2 min, a\\|b, 2 threads |"
    )


def test_write_replaces_only_the_table_and_can_be_repeated(script: ModuleType) -> None:
    assert script.main(["--write"]) == 0
    once = script.README.read_text(encoding="utf-8")
    assert "stale" not in once
    assert once.startswith("top\n<!-- models -->\n| Load with |")
    assert once.endswith("|\n<!-- /models -->\nbottom\n")
    assert script.main(["--write"]) == 0
    assert script.README.read_text(encoding="utf-8") == once
    assert sorted(path.name for path in script.README.parent.iterdir()) == ["README.md", "index.json", "one.safetensors"]


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- /models -->\n<!-- models -->", "<!-- models -->\n", "<!-- models --><!-- models --><!-- /models -->"]
)
def test_readme_without_a_pair_of_markers_is_left_alone(text: str, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.README.write_text(text, encoding="utf-8")
    assert script.main(["--write"]) == 2
    assert "needs one line <!-- models -->" in capsys.readouterr().err
    assert script.README.read_text(encoding="utf-8") == text


def test_missing_readme_file_and_field_are_named(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.README.unlink()
    assert script.main(["--write"]) == 2
    assert "there is no" in capsys.readouterr().err
    index = json.loads(script.INDEX.read_text(encoding="utf-8"))
    del index["one"]["card"]["seed"]
    script.INDEX.write_text(json.dumps(index), encoding="utf-8")
    assert script.main([]) == 2
    assert "the card of one" in (message := capsys.readouterr().err)
    assert "has no 'seed'" in message
    (script.INDEX.parent / "one.safetensors").unlink()
    assert script.main([]) == 2
    assert "one.safetensors of the model one is missing" in capsys.readouterr().err
