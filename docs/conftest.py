"""The code of the pages runs as doctests, in a folder of its own, from one random state.

A page may begin with `needs: [zuko]`, between lines of three dashes: it is skipped where that is not installed.
"""

import re

import pytest
import torch

collect_ignore = ["conf.py", "conftest.py"]  # what is no page: the first is of Sphinx, which the tests do not need


@pytest.fixture(autouse=True)
def _of_a_page(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    head = re.match(r"---\nneeds: \[([^\]]*)\]\n---\n", request.path.read_text(encoding="utf-8"))
    for package in re.findall(r"\w+", head[1]) if head else ():
        pytest.importorskip(package, reason=f"the page is about {package}, which is not installed")
