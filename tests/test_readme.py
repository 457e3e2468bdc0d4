"""Every Python snippet of the README runs as it is written, commands of the documents name what exists, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "RESULTS.md", ROOT / "PERFORMANCE.md", ROOT / "CONTRIBUTING.md"]
TEXTS = {document.name: document.read_text(encoding="utf-8") for document in DOCUMENTS}
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXTS[README.name], re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", TEXTS[README.name], re.DOTALL)


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


@pytest.mark.parametrize("name", TEXTS)
def test_documents_name_recipes_scripts_and_benchmarks_that_exist(name: str) -> None:
    from litzoo.zoo.cli import recipe_names

    text = TEXTS[name]
    assert set(re.findall(r"--config ([a-z]\w+)(?![\w./])", text)) <= set(recipe_names())
    for script in set(re.findall(r"scripts/\w+\.py", text)):
        assert (ROOT / script).is_file(), script
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts" / "benchmark_cases").glob("*.py"))
    for case in set(re.findall(r"benchmark\.py ([a-z][\w-]*)", text)):
        assert f'"{case}"' in benchmarks, case


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        assert not path or (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", TEXTS[path or name], re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, link
