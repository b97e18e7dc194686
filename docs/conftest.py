"""The code of the pages runs as doctests, in a folder of its own, from one random state.

A page may begin with `needs: [zuko]`, between lines of three dashes: it is skipped where that is not installed, and
what that package warns about is no error.
"""

import re
from pathlib import Path

import pytest
import torch

# what is no page: of Sphinx, which the tests do not need; copies of examples/, which are run there; tables
collect_ignore = ["conf.py", "conftest.py", "notebooks", "generated"]


def needs(page: Path) -> list[str]:
    head = re.match(r"---\nneeds: \[([^\]]*)\]\n---\n", page.read_text(encoding="utf-8"))
    return re.findall(r"\w+", head[1]) if head else []


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.suffix == ".md" and needs(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def _of_a_page(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for package in needs(request.path) if request.path.suffix == ".md" else ():
        pytest.importorskip(package, reason=f"the page is about {package}, which is not installed")
