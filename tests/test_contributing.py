"""CONTRIBUTING: the files, rooms and names that it sends a reader to are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "cflow").rglob("*.py"))


def exists(name: str) -> bool:
    """A path from the root, or the end of one inside the package."""
    return (ROOT / name).exists() or any(str(path).endswith(f"/{name}") for path in (ROOT / "cflow").rglob("*.py"))


def test_files_exist():
    paths = [word for quoted in QUOTED for word in re.findall(r"(?:[\w.<>-]+/)*[\w<>*-]+\.(?:py|toml|md)\b", quoted)]
    paths = [path for path in paths if "<" not in path and path != "tests/test_x.py"]  # examples of a name
    assert len(paths) > 15
    assert {path for path in paths if not (list(ROOT.glob(path)) if "*" in path else exists(path))} == set()


def test_rooms_exist():
    (order,) = re.findall(r"one direction: (.*?)\(`tests/", TEXT, flags=re.DOTALL)
    rooms = [room for room in re.findall(r"[a-z]+", order.split(";")[0])]
    assert len(rooms) > 12
    assert {
        room for room in rooms if not exists(f"cflow/{room}.py") and not exists(f"cflow/{room}/__init__.py")
    } == set()


def test_names_of_code_exist():
    names = {word for word in QUOTED if re.fullmatch(r"[A-Z]\w+", word)} - {"CHANGELOG", "CONTRIBUTING"}
    assert len(names) > 8
    assert {name for name in names if not re.search(rf"\b(class {name}\b|{name}\b.*=)", SOURCE)} == set()
