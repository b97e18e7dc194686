"""The house: which rooms know which, and how far it is from torchdiffeq's call of a field to its formula."""

import ast
import inspect
import sys
import textwrap
from pathlib import Path

import cases
import pytest
import torch
from cases import FLOWS, GRADIENTS, ONE_FLOW_OF_EACH, any_solver

import cflow
from cflow.solve import explicit

ROOT = Path(cflow.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]
# what comes later may import what comes before; rooms of one row may import each other, but not in a circle
ROWS = [
    "errors modes checks reading hub",
    "times selection frames",
    "potentials",
    "divergence_free solenoidal growth",
    "fields",
    "solve",
    "transform priors spike_slab",
    "flow",
    "pde inference",
    "objectives sparse",
    "vae traversal populations",
    "nets",
    "checkpoint",
    "interop",
    "image_quality vp_score matching",
    "metrics plots",
    "composition",
    "training",
]
DATA = {"errors", "modes", "checks", "reading", "times", "data"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below the root → file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], package: str) -> set[str]:
    """The modules of the same package that a file imports, also inside functions and under TYPE_CHECKING."""
    here = name.split(".") if name else []
    if path.name != "__init__.py":
        here = here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = here[: len(here) - node.level + 1]
            elif node.module and node.module.split(".")[0] == package:
                base = []
            else:
                continue
            tail = (node.module or "").removeprefix(package).strip(".") if not node.level else node.module or ""
            target = ".".join([*base, *([tail] if tail else [])])
            names = [f"{target}.{alias.name}".strip(".") for alias in node.names]
            found |= {n if n in known else target for n in names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == package]
            found |= {name.removeprefix(package).strip(".") for name in names}
    return {x for x in found if x in known and x != name}


def graph(root: Path, package: str) -> dict[str, set[str]]:
    known = modules(root)
    return {name: imports(name, path, known, package) for name, path in known.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, or nothing."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(edges[name]):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    for name in edges:
        if found := visit(name):
            return found
    return []


def test_no_circle_of_imports():
    edges = graph(ROOT, "cflow")
    assert not circle(
        {name: others - {""} for name, others in edges.items()}
    )  # what a file takes of the package itself
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_imports_go_one_way():
    rank = {room: i for i, row in enumerate(ROWS) for room in row.split()}
    for name, others in graph(ROOT, "cflow").items():
        room = name.split(".")[0]
        for other in (o.split(".")[0] for o in others if name and o):
            if room == "data":
                assert other in DATA, f"{name} imports {other}"
            elif other == "data":
                assert rank[room] > rank["vae"], f"{name} imports data"
            elif other != room:
                assert rank[other] <= rank[room], f"{name} imports {other}"


# --- the way of an evaluation -------------------------------------------------------------------------------


FORMULAS = {"evaluate", "activations"}  # of closed forms
SOLVERS = [any_solver(method, gradient, step_size=0.5) for method in ("rk4", "dopri5") for gradient in GRADIENTS]


def is_ours(frame) -> bool:
    return str(ROOT) in frame.f_code.co_filename


def is_formula(frame) -> bool:
    own = frame.f_code
    if own.co_name == "forward" and own.co_filename == cases.__file__:
        return True
    return own.co_name in FORMULAS and Path(own.co_filename).parent.name == "potentials"


def ways(call):
    """The stacks of our frames between a solver's call of the field and a formula, while `call` runs."""
    found = []

    def is_solver(frame) -> bool:
        return "torchdiffeq" in frame.f_code.co_filename or frame.f_code.co_filename == explicit.__file__

    def watch(frame, event, arg):
        if event != "call" or not is_formula(frame):
            return
        way, frame = [], frame.f_back
        while frame is not None and not is_solver(frame):
            if is_formula(frame):
                return
            if is_ours(frame):
                way.append(frame.f_code)
            frame = frame.f_back
        if frame is not None:
            found.append(way)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.filterwarnings("ignore:gradient. the continuous adjoint's way back")
@pytest.mark.parametrize("name", ONE_FLOW_OF_EACH)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{s.method}-{s.gradient}")
def test_the_way_of_an_evaluation_is_short_and_asks_nothing(name, solver):
    flow, z = FLOWS[name](3, 2, solver=solver), torch.randn(4, 3, requires_grad=True)
    beside = flow.solenoidal is not None
    limit = 5 + ("sum" in name or beside) + ("turned" in name)  # a sum is one more, and so is a turn
    seen = set()
    for k in (torch.tensor([0, 1, 1, 0]), torch.randn(2)):
        for asked in ({}, {"log_density": True, "kinetic_energy": True}):

            def solve(k=k, asked=asked):
                with torch.no_grad():
                    flow.solve(z, k, [0.0, 1.0, 2.0], **asked)
                flow.solve(z, k, [0.0, 1.0, 2.0], **asked).z[-1].sum().backward()

            found = ways(solve)
            assert found
            for way in found:
                assert len(way) <= limit + (beside and bool(asked)), [code.co_qualname for code in way]
                seen.update(way)
    for code in seen:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code)))):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in ("isinstance", "hasattr", "getattr"), code.co_qualname
            if isinstance(node, ast.Compare):
                assert not any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops), code.co_qualname
