"""README: its Python runs, its commands exist, its links lead somewhere, and it stays short."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a model is saved
    names: dict[str, object] = {}
    code = blocks("python")
    assert len(code) >= 2
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert names["switch"].grad is not None


def test_commands_name_what_the_project_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands == [
        'pip install ".[train]" && cflow fit --config digits',
        'pip install ".[train,test]" && pytest -n auto',
    ]
    assert {"train", "test"} <= set(project["optional-dependencies"])
    assert "cflow" in project["scripts"]


def test_links_and_length():
    assert TEXT.count("\n") <= 150
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target.split("#")[0]).exists(), target
