"""The site: every public name has its place in it, its pages are found, and their code runs (as doctests of docs/)."""

import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest
import torch

import cflow

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "generated" not in path.parts]
MODULES = ("composition", "data", "interop", "metrics", "nets", "pde", "plots")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))


def public_names():
    """All that users are to know: what `cflow` exports, and what its public modules do."""
    for name in cflow.__all__:
        if name not in MODULES and name != "__version__":
            yield f"cflow.{name}"
    for name in MODULES:
        module = importlib.import_module(f"cflow.{name}")
        own = [key for key, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)]
        of_module = [key for key in own if getattr(vars(module)[key], "__module__", "") == module.__name__]
        for key in getattr(module, "__all__", [key for key in of_module if not key.startswith("_")]):
            yield f"cflow.{name}.{key}"


def test_every_public_name_is_on_one_page():
    api = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.rst"))
    described = re.findall(r"^\.\. (?:auto|py:)\w+:: (cflow\.[\w.]+)|``(cflow\.nets\.\w+)``", api, flags=re.MULTILINE)
    names = ["".join(pair) for pair in described]
    assert len(set(public_names())) > 80
    assert set(public_names()) - set(names) == set()
    assert len(names) == len(set(names))


@every_page
def test_its_code_is_run_and_its_links_lead_somewhere(page):
    """A block of Python without a prompt would be shown and never run."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        assert block.startswith(">>> "), block
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not target.startswith(("https://", "mailto:")):
            path = (page.parent / target).resolve()
            stored = DOCS.parent / "examples" / path.name if path.parent.name == "notebooks" else path
            assert stored.exists() or path.parent.name == "generated", target


def test_every_page_is_in_the_contents():
    listed = set()
    for page in [*PAGES, *DOCS.rglob("*.rst")]:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            listed |= {(page.parent / line).resolve() for line in block.splitlines() if line and line[0] != ":"}
    pages = {path.resolve().with_suffix("") for path in [*PAGES, *DOCS.rglob("*.rst")]} - {DOCS.resolve() / "index"}
    assert pages - listed == set()
    assert {path.name for path in listed if path.parent.name == "notebooks"} == {
        path.stem for path in (DOCS.parent / "examples").glob("*.ipynb")
    }


def test_pictures_are_small_and_each_is_shown_once():
    """Where one is missing or drawn anew: python docs/pictures.py"""
    pictures = {path.name: path.stat().st_size for path in (DOCS / "pictures").glob("*.png")}
    shown = [name for page in PAGES for name in re.findall(r"pictures/(\w+\.png)", page.read_text(encoding="utf-8"))]
    makers = re.findall(
        r"^def (\w+)\(\) -> Figure", (DOCS / "pictures.py").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert sorted(shown) == sorted(pictures) == sorted(f"{name}.png" for name in makers)
    assert max(pictures.values()) < 80_000
    assert sum(pictures.values()) < 400_000


def test_tables_are_made_of_what_is_kept():
    made = {name: make() for name, make in runpy.run_path(str(DOCS / "generated.py"))["MAKERS"].items()}
    for name, text in made.items():
        assert re.search(rf"generated/{name}\.md", "".join(page.read_text(encoding="utf-8") for page in PAGES)), name
        assert text.count("\n") > 8
    assert "`test_site.py`" in made["tests"]
    measured = [float(cell) for cell in re.findall(r"(?<=\| )[\d.]+(?= \|)", made["gradients"])]
    assert len(measured) > 60
    assert min(measured) > 0
    assert "rk4, `discrete` | 8 |" in made["gradients"]


def test_the_tests_of_the_pages_need_no_sphinx_and_run_no_notebook():
    """README's command installs none, pytest imports the scripts in docs/ for their doctests, and a build of the site
    leaves copies of the notebooks there."""
    ignored = re.findall(r'"([\w.]+)"', (DOCS / "conftest.py").read_text(encoding="utf-8").split("collect_ignore")[1])
    ours = [
        path
        for path in DOCS.glob("*.py")
        if re.search(r"^(from|import) sphinx", path.read_text(encoding="utf-8"), re.M)
    ]
    assert [path.name for path in ours] == ["conf.py"]
    assert {"conf.py", "notebooks"} <= set(ignored)


@pytest.mark.parametrize("page", sorted((DOCS / "coming_from").glob("*.md")), ids=lambda page: page.stem)
def test_the_lines_beside_those_of_neighbours_run(page):
    """Each table's right column is code that runs, line by line, after the page's own block."""
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for example in doctest.DocTestParser().get_examples(text):
        exec(compile(example.source, page.name, "exec"), names)
    rows = re.findall(r"^\|.*\| (.*) \|$", text, flags=re.MULTILINE)
    lines = [line for row in rows for line in re.findall(r"(?<!`)`([^`]+)`(?!`)", row) if "(" in line]
    assert len(lines) >= 7
    for line in lines:
        exec(compile(line, page.name, "exec"), names)
    for command in re.findall(r"```cflow \w+ --config (\w+)```", text):
        assert (DOCS.parent / "cflow" / "training" / "presets" / f"{command}.yaml").exists(), command
