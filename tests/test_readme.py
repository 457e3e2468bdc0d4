"""Every Python snippet of the README runs as it is written, and its tables are up to date."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_commands_name_what_exists() -> None:
    from litzoo.zoo.cli import COMMANDS as KNOWN
    from litzoo.zoo.cli import recipe_names

    text = "\n".join(COMMANDS)
    assert set(re.findall(r"(?:^|/)litzoo (\w+)", text, re.MULTILINE)) <= set(KNOWN)
    assert set(re.findall(r"--config (\w+)(?!\S)", text)) <= set(recipe_names())
