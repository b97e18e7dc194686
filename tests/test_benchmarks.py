"""The benchmarks run in a small configuration, and what they keep has the shape that their readers expect."""

import ast
import graphlib
import importlib
import importlib.util
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchdiffeq

import cflow

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    """The scripts import each other by name, as they do when Python runs one of them."""
    before, names = torch.get_num_threads(), {path.stem for path in FOLDER.glob("*.py")}
    sys.path.insert(0, str(FOLDER))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)


def script(name):
    return importlib.import_module(name)


def small():
    return script("problems").Size(6, 2, 5)


def problem_of(size):
    return script("problems").Problem.make(size, CPU)


# --- what they may know of cflow, and of each other -----------------------------------------------------------

PUBLIC = (
    "cflow.plots",
    "cflow.populations",
    "cflow.data",
    "cflow.metrics",
    "cflow.nets",
    "cflow.pde",
    "cflow.training",
)


def imports(tree):
    """(module, name or None) of every import of a file, those by `importlib.import_module` with a literal included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((x.value, None) for x in node.args if isinstance(x, ast.Constant))


@pytest.fixture(scope="module")
def trees():
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py")}


def test_benchmarks_use_the_public_api_only(trees) -> None:
    seen = set()
    for name, tree in trees.items():
        if name == "check_cost":  # which takes checks out, and so knows where they are
            continue
        for module, what in imports(tree):
            if module.split(".")[0] == "cflow":
                whole = module if what is None or module != "cflow" or what in cflow.__all__ else f"{module}.{what}"
                assert whole == "cflow" or whole.startswith(PUBLIC), f"{name} imports {whole}"
                assert not (what or "").startswith("_"), f"{name} imports {what}"
                seen.add(whole)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cflow":
                assert node.attr in cflow.__all__, f"{name} uses cflow.{node.attr}"
    assert seen >= {"cflow", "cflow.data", "cflow.training.module"}


def test_benchmarks_import_each_other_in_one_direction(trees) -> None:
    needs = {name: {module for module, _ in imports(tree)} & set(trees) for name, tree in trees.items()}
    order = tuple(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError
    assert "peers_jax" in needs["peers"]  # also what is imported late
    assert order.index("measuring") < order.index("solver_cost")


# --- clocks, counters, memory --------------------------------------------------------------------------------


def test_interleaved_calls_share_their_rounds() -> None:
    measuring, runs = script("measuring"), []
    seconds = measuring.interleave(
        {"a": lambda: runs.append("a"), "b": lambda: runs.append("b")}, device=CPU, rounds=4, least=0
    )
    assert {len(timing.rounds) for timing in seconds.values()} == {4}
    assert runs[-8:] != ["a", "b"] * 4  # the order changes
    assert sorted(runs[-8:]) == ["a"] * 4 + ["b"] * 4
    slow, fast = measuring.Timing((2.0, 6.0, 4.0)), measuring.Timing((1.0, 2.0, 4.0))
    assert slow.over(fast).rounds == (2.0, 3.0, 1.0)  # round by round
    assert slow.document() == {"median": 4.0, "low": 3.0, "high": 5.0, "rounds": 3.0}


def test_a_budget_ends_the_rounds() -> None:
    seconds = script("measuring").interleave({"a": lambda: None}, device=CPU, rounds=10**6, budget=0.05)
    assert 3 <= len(seconds["a"].rounds) < 10**6


class Hoarder(torch.autograd.Function):
    """Keeps one tensor as autograd knows it, and one as an attribute."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        ctx.mine = x.sin()
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] + ctx.mine)


def test_held_bytes_counts_what_is_saved_once_and_nothing_older() -> None:
    held = script("measuring").held_bytes
    x = torch.randn(1000, requires_grad=True)
    y = torch.randn(1000)
    scalar = 4
    assert held(lambda: (x * y).sum()) == scalar  # both factors are older
    assert held(lambda: x.exp().sum()) == 4000 + scalar
    assert held(lambda: Hoarder.apply(x)) == 8000 + scalar  # also what a node keeps by itself
    assert held(lambda: (x * 2).detach().sum()) == scalar  # released before the end of the pass


def test_peak_bytes_count_what_is_alive_at_one_time() -> None:
    peak = script("measuring").peak_bytes
    x = torch.randn(1000)
    assert peak(lambda: x.exp(), CPU) == 4000
    assert peak(lambda: [x.exp(), x.sin()], CPU) == 8000
    assert peak(lambda: (x.exp().sum(), x.sin().sum()), CPU) < 5000  # one after the other
    assert peak(lambda: None, CPU) == 0


def test_host_reads_are_counted_for_solves() -> None:
    measuring, problems = script("measuring"), script("problems")
    problem = problems.Problem.make(small(), CPU)
    with measuring.HostReads() as reads:
        problem.forward(problem.solve(problems.solver("dopri5")))()
    assert reads.count > 0
    with measuring.HostReads("cuda") as reads:  # on CUDA only tensors that lie there count
        bool(torch.ones(()) > 0)
    assert reads.count == 0


def test_without_cuda_its_measurements_say_so(monkeypatch) -> None:
    measuring = script("measuring")
    assert measuring.cuda_synchronisations(lambda: None, CPU) is None
    assert measuring.capture(lambda: None, CPU) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script("solver_cost").arguments(["--device", "cuda"])


def test_synchronisations_are_those_that_cuda_warns_of(monkeypatch) -> None:
    import warnings

    measuring, modes = script("measuring"), [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert measuring.cuda_synchronisations(call, torch.device("cuda")) == 2
    assert modes == [0, "warn", 0]


class Event:
    """Stands in for a CUDA event: each is recorded a second after the one before."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.at - self.at)


def test_events_time_cuda(monkeypatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    calls = []
    assert script("measuring").stopwatch(lambda: calls.append(1), 4, torch.device("cuda")) == pytest.approx(0.25)
    assert len(calls) == 4
    assert len(waited) == 2


# --- the original's field ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [6, 16])
@pytest.mark.parametrize("kind", ["OriginalField", "StackedField"])
def test_fields_by_autograd_are_the_potentials_own(dim, kind) -> None:
    original, problems = script("original"), script("problems")
    problem = problems.Problem.make(problems.Size(dim, 3, 7), CPU, dtype=torch.float64)
    field = getattr(original, kind)(problem.net, problem.w)
    assert original.check_same_velocity(problem.net, field, problem.z0, tolerance=1e-12) < 1e-12
    per_row = torch.linspace(0, 8, 7, dtype=torch.float64)
    v = cflow.PotentialFlow(problem.net).velocity(problem.z0, problem.w, per_row)
    assert original.relative_difference(field(per_row, problem.z0), v) < 1e-12
    span = torch.tensor(problems.HORIZON, dtype=torch.float64)
    solve = lambda z0: torchdiffeq.odeint(field, z0, span, method="rk4", options={"step_size": 1.0})[-1]  # noqa: E731
    theirs = problem.training(solve, list(field.parameters()))()
    ours = problem.training(problem.solve(cflow.Solver("rk4", step_size=1.0, gradient="direct")))()
    assert original.relative_difference(theirs[0], ours[0]) < 1e-12
    norms = [torch.cat([g.flatten() for g in found[1:]]).norm() for found in (theirs, ours)]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-12)


def test_another_field_is_refused() -> None:
    original, problems = script("original"), script("problems")
    problem = problems.Problem.make(small(), CPU)
    field = original.StackedField(problem.net, problem.w)
    with torch.no_grad():
        field.a.add_(0.1)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        original.check_same_velocity(problem.net, field, problem.z0)


# --- solver_cost ---------------------------------------------------------------------------------------------

TIMING = {"median", "low", "high", "rounds"}
ROW = {
    *("method", "gradient", "compiled", "dim", "num_flows", "batch", "threads", "device", "nfe", "steps"),
    *("forward", "training", "step_seconds", "step_training_seconds", "training_step_in_euler_steps"),
    *("error", "gradient_error", "held_bytes", "peak_bytes", "host_reads_a_step", "synchronisations_a_step"),
}


@pytest.fixture(scope="module")
def document():
    cost = script("solver_cost")
    methods = ["euler", "rk4", "dopri5", "scipy_solver"]
    return cost.run([small()], device=CPU, methods=methods, thread_counts=[1], rounds=1, budget=0)


@pytest.mark.ci
def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch) -> None:
    cost = script("solver_cost")
    original, made = cost.measure_size, []

    def measure_size(*args, **options):
        if made:
            raise KeyboardInterrupt
        made.extend(original(*args, **options)[0])
        return made, {}

    monkeypatch.setattr(cost, "measure_size", measure_size)
    with pytest.raises(KeyboardInterrupt):
        cost.run(
            [small(), small()], device=CPU, methods=["euler"], thread_counts=[1], rounds=1, budget=0,
            keep=tmp_path / "kept.json",
        )  # fmt: skip
    assert [row["method"] for row in json.loads((tmp_path / "kept.json").read_text())["rows"]] == [
        row["method"] for row in made
    ]


@pytest.mark.ci
def test_solver_cost_document(document) -> None:
    assert document["benchmark"] == "solver_cost"
    assert {"cpu", "torch", "torchdiffeq", "cflow", "device", "date"} <= set(document["machine"])
    rows = document["rows"]
    assert all(set(row) == ROW for row in rows)
    assert all(set(row["forward"]) == set(row["training"]) == TIMING for row in rows)
    assert all(0 < row["training"]["low"] <= row["training"]["median"] <= row["training"]["high"] for row in rows)
    found = {(row["method"], row["gradient"]): row for row in rows}
    problems = script("problems")
    expected = {(method, mode) for method in ("euler", "rk4", "dopri5") for mode in problems.modes(method)[0]}
    assert expected <= set(found)
    assert ("scipy_solver", "adjoint") in found
    assert ("scipy_solver", "direct") not in found
    assert "scipy_solver, direct" in document["skipped"]
    assert ("euler step", "original") in found
    rk4 = found["rk4", "direct"]
    assert (rk4["nfe"], rk4["steps"]) == (32, 8)
    assert rk4["error"] < found["euler", "direct"]["error"]
    assert rk4["gradient_error"] < 1e-2 < found["euler", "adjoint"]["gradient_error"]
    assert found["rk4", "adjoint"]["held_bytes"] < rk4["held_bytes"] / 3
    assert rk4["step_seconds"] == pytest.approx(rk4["forward"]["median"] / 8)
    assert all(row["peak_bytes"] > 0 and row["synchronisations_a_step"] is None for row in rows)
    assert all(row["peak_bytes"] >= row["held_bytes"] for row in rows if row["gradient"] == "direct")
    assert {graph["call"] for graph in document["graphs"]} == {"velocity", "rk4 step"}
    assert all(graph["graph"] is None and set(graph["eager"]) == TIMING for graph in document["graphs"])


@pytest.mark.ci
def test_solver_cost_sweeps(document) -> None:
    points = document["work_precision"]
    assert all(set(p) == {"method", "setting", "nfe", "error", "seconds"} for p in points)
    rk4 = sorted((p["nfe"], p["error"]) for p in points if p["method"] == "rk4")
    assert len(rk4) == 5
    assert rk4[0][1] > 10 * rk4[2][1]  # more evaluations, less error
    gradients = document["gradient_precision"]
    assert {(p["method"], p["gradient"]) for p in gradients} >= {("rk4", "direct"), ("dopri5", "adjoint")}


@pytest.mark.ci
def test_solver_cost_table_json_and_plot(document, tmp_path, capsys) -> None:
    cost, report, precision = script("solver_cost"), script("report"), script("precision")
    cost.show(document)
    table = capsys.readouterr().out
    assert "D=6 K=2 batch=5, 1 thread(s)" in table
    for words in ("euler step, original", "rk4, direct", "skipped scipy_solver, direct", "no CUDA graph"):
        assert words in table
    report.write_json(tmp_path / "kept" / "cost.json", document | {"bad": float("nan")})
    kept = json.loads((tmp_path / "kept" / "cost.json").read_text(encoding="utf-8"))
    assert kept["bad"] is None
    assert kept["rows"] == document["rows"]
    plt = pytest.importorskip("matplotlib.pyplot")
    precision.plot(kept, tmp_path / "cost.png")
    picture = plt.imread(tmp_path / "cost.png")
    assert picture.shape[0] > 300
    assert len({tuple(c) for c in picture[::4, ::4, :3].reshape(-1, 3).round(1).tolist()}) > 10  # lines in colours
    assert not plt.get_fignums()


def test_compiled_steps_are_skipped_with_a_reason_where_there_is_none(monkeypatch, capsys) -> None:
    cost, asked = script("solver_cost"), []
    monkeypatch.setattr(cost, "can_compile", lambda: False)
    monkeypatch.setattr(cost, "measure_size", lambda *args, compiled, **more: asked.append(compiled) or ([], {}))
    for name in ("sweep", "gradient_sweep"):
        monkeypatch.setattr(cost, name, lambda *args, **more: [])
    cost.run([small()], device=CPU, methods=["euler"], thread_counts=[1], rounds=1, budget=0, compiled=True)
    assert "skipped the compiled steps" in capsys.readouterr().out
    assert asked == [False]


@pytest.mark.ci
def test_marks(capsys) -> None:
    marks = script("marks")
    found = marks.measure([marks.MAIN], rounds=1, budget=0.1)
    marks.show(found)
    table = capsys.readouterr().out
    names = {mark.name for mark in found}
    discrete = "discrete" in script("problems").modes("rk4")[0]
    assert names == {
        *(name for name in {**marks.WANTED, **marks.MAIN_MUST} if discrete or "discrete" not in name),
        *marks.SOLENOIDAL_MUST,
    }
    assert all(mark.size == "D64 K3 B128" and mark.value > 0 for mark in found)
    assert "rk4 inference: × faster" in table
    assert discrete or "skipped the marks for gradient='discrete'" in table
    faster = marks.Mark("× faster", "", 2.0, 2.0, 2.0, must=1.5)
    assert faster.reached
    assert not marks.Mark("/", "", 2.0, 2.0, 2.0, must=1.5).reached


def test_versions_are_compared_mark_by_mark(tmp_path, capsys) -> None:
    versions = script("compare_versions")
    names = ("rk4 inference: × faster", "velocity / products", "gradient, discrete − direct", "new")

    def marks(*values):
        return [{"name": n, "size": "D", "value": v, "seconds": v} for n, v in zip(names, values, strict=False)]

    this = versions.collect([marks(2.0, 3.0, 2.0, 1.0), marks(4.0, 3.0, 2.0, 1.0), marks(2.0, 9.0, 2.0, 1.0)])
    other = versions.collect([marks(4.0, 3.1, 1.0)] * 3)
    rows = versions.compare(this, other, tolerance=5.0)
    assert [(row["slower_percent"], row["verdict"]) for row in rows] == [
        (100.0, "SLOWER"),  # half as many times faster
        (pytest.approx(-3.2, abs=0.1), ""),
        (100.0, ""),  # rounding, not time
    ]
    assert rows[0]["time_ratio"] == 0.5  # its own time, whatever the other side of the mark does
    versions.show(rows)
    assert "+100.0" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"is that a checkout|No module named"):
        versions.measure(tmp_path, [])


@pytest.mark.slow
def test_a_version_is_compared_with_itself(tmp_path) -> None:
    versions = script("compare_versions")
    words = [str(FOLDER.parent), "--quick", "--rounds", "1", "--budget", "0.1", "--tolerance", "1e6"]
    with pytest.raises(SystemExit) as end:
        versions.main([*words, "--json", str(tmp_path / "versions.json")])
    assert not end.value.code
    rows = json.loads((tmp_path / "versions.json").read_text(encoding="utf-8"))["rows"]
    marks = script("marks")
    assert {row["name"] for row in rows} == {*marks.WANTED, *marks.MAIN_MUST, *marks.SOLENOIDAL_MUST}


def test_quick_mode_is_one_size() -> None:
    cost = script("solver_cost")
    args = cost.arguments(["--quick"])
    assert args.quick
    assert args.device == CPU
    assert [str(size) for size in cost.QUICK] == ["D64 K3 B128"]
    assert len(cost.FULL) == 27


# --- on a device ---------------------------------------------------------------------------------------------


def test_a_device_is_checked_against_a_cpu(tmp_path, monkeypatch, capsys) -> None:
    device = script("check_device")
    seen = list(device.cases())
    names = {(case.method, case.gradient) for case in seen}
    assert names == {
        *((method, mode) for method in ("rk4", "dopri5") for mode in ("direct", "discrete", "adjoint")),
        *(("explicit_adams", mode) for mode in ("direct", "adjoint")),
        (device.CALLS, ""),
    }
    assert len(seen) == len(set(seen)) == len(device.FIELDS) * len(device.SELECTIONS) * (2 * 8 + 1)
    few = [
        device.Case("user's", "schedule", "rk4", "discrete", True),
        device.Case("MLP", "schedule a sample", "dopri5", "direct", False),
        device.Case("ridge", "weights", device.CALLS, "", False),
        device.Case("turned MLPs and SkewLinear alone", "weights a sample", device.CALLS, "", False),
        device.Case("MLP and turned user's", "schedule", "rk4", "adjoint", True),
    ]
    monkeypatch.setattr(device, "cases", lambda: iter(few))
    words = ["--json", str(tmp_path / "check.json")]
    with pytest.raises(SystemExit) as end:
        device.main(words)
    assert not end.value.code
    rows = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 10
    assert all(row["same"] and (row["difference"] > 0) == (row["dtype"] == "float32") for row in rows)

    answers = device.Case.answers

    def broken(case, where, dtype):
        if case.method == "dopri5" and dtype == torch.float32:
            raise ValueError("no such kernel")
        return [x + (0.1 if dtype == torch.float32 else 0.0) for x in answers(case, where, dtype)]

    monkeypatch.setattr(device.Case, "answers", broken)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        device.main(words)
    assert end.value.code == 1
    told = capsys.readouterr().out
    assert told.count("DIFFERS") == 5
    assert "ValueError: no such kernel" in told


@pytest.mark.slow
def test_the_gpus_script_runs_on_a_cpu(tmp_path) -> None:
    script_of_all = FOLDER / "on_gpu.sh"
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    words = ["bash", str(script_of_all), "--device", "cpu", "--quick"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for name in ("check_device", "solver_cost", "against_peers", "user_module"):
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["benchmark"] == name
    assert (tmp_path / "solver_cost.png").stat().st_size > 10_000
    assert "all parts ran" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_the_gpus_script_goes_on_after_a_part_that_fails_and_says_so(tmp_path) -> None:
    stand_in = tmp_path / "python"  # fails for one part, and has none of the packages that others need
    stand_in.write_text('#!/bin/sh\ncase "$1" in *solver_cost.py) exit 3;; -) exit 1;; *) echo "ran $1";; esac\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": str(stand_in)}
    done = subprocess.run(["bash", str(FOLDER / "on_gpu.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED: solver_cost (exit status 3)" in done.stdout
    assert "ran benchmarks/user_module.py" in done.stdout
    assert "skipped training_iteration" in done.stdout
    wrong = subprocess.run(["bash", str(FOLDER / "on_gpu.sh"), "--fast"], capture_output=True, text=True)
    assert wrong.returncode == 2


# --- against_peers -------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_against_peers_compares_answers_before_it_times(capsys) -> None:
    against = script("against_peers")
    rows, skipped = against.compare(problem_of(small()), "rk4", ["cflow", "torchdiffeq"], rounds=3, budget=0.2)
    assert skipped == {}
    names = [row["library"] for row in rows]
    assert {"cflow, direct", against.BASE, "torchdiffeq odeint, stacked field"} <= set(names)
    for row in rows:
        assert row["nfe"] == 32
        assert max(row["error"], row["gradient_error"], row["parameter_gradient_error"]) < 1e-4
        assert set(row["forward"]) == set(row["training"]) == TIMING
        assert row["cores_used"] < 1.5
    base = next(row for row in rows if row["library"] == against.BASE)
    assert base["faster_training"] == 1
    against.show(rows)
    assert "faster fwd + bwd" in capsys.readouterr().out


def test_where_the_time_of_a_solve_goes() -> None:
    against = script("against_peers")
    document = against.run([small()], ["rk4"], ["cflow"], device=CPU, rounds=3, budget=0.2)
    (found,) = document["where_time_goes"]
    assert found["nfe"] == 32
    assert set(found["parts"]) == {"products", "rest_of_evaluations", "steps"}
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert found["parts"]["products"] > 0


@pytest.mark.ci
def test_a_peer_with_another_answer_is_not_timed(monkeypatch) -> None:
    against, peers = script("against_peers"), script("peers")

    def liar(problem, method):
        flow = cflow.PotentialFlow(problem.net)
        one_step = lambda z: z + flow.velocity(z, problem.w, 0.0)  # noqa: E731
        yield script("peer").Peer("liar", problem.forward(one_step), problem.training(one_step), lambda: 1)

    def missing(problem, method):
        raise ModuleNotFoundError("No module named 'missing'")
        yield

    monkeypatch.setitem(peers.MAKERS, "liar", liar)
    monkeypatch.setitem(peers.MAKERS, "missing", missing)
    monkeypatch.setitem(peers.MAKERS, "empty", lambda problem, method: iter([]))
    libraries = ["liar", "missing", "empty", "torchdiffeq"]
    rows, skipped = against.compare(problem_of(small()), "dopri5", libraries, rounds=1, budget=0)
    assert "liar" not in [row["library"] for row in rows]
    assert "another answer" in skipped["liar"]
    assert "cflow-torch[bench]" in skipped["missing"]
    assert skipped["empty"] == "has no dopri5"


COMPILED = pytest.param("cflow-compiled", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "library", ["torchdyn", "torchode", "zuko", pytest.param("diffrax", marks=pytest.mark.ci), COMPILED]
)
def test_other_libraries_give_the_same_answer(library) -> None:
    if importlib.util.find_spec(library.partition("-")[0]) is None:
        pytest.skip(f"{library} is not installed")
    rows, skipped = script("against_peers").compare(problem_of(small()), "dopri5", [library], rounds=1, budget=0)
    assert rows
    assert not skipped


# --- training_iteration, velocity ----------------------------------------------------------------------------


def test_training_iteration_parts_add_up(capsys) -> None:
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("sklearn")
    training = script("training_iteration")
    schemes = ("preset", "k inferred", "original")
    rows = training.measure("digits", CPU, schemes=schemes, rounds=2)
    assert tuple(row["scheme"] for row in rows) == schemes
    for row in rows:
        assert set(row["parts"]) == set(training.PARTS)
        assert all(seconds > 0 for seconds in row["parts"].values())
        assert row["whole"]["median"] == pytest.approx(sum(row["parts"].values()), rel=0.3)
    training.show(rows)
    assert "digits, original" in capsys.readouterr().out


@pytest.mark.ci
def test_users_module_is_held_against_the_same_field_by_hand(tmp_path, capsys, monkeypatch) -> None:
    users = script("user_module")
    users.main(["--quick", "--rounds", "1", "--budget", "0", "--json", str(tmp_path / "users.json")])
    assert "D4 K3, log-density" in capsys.readouterr().out
    kept = json.loads((tmp_path / "users.json").read_text(encoding="utf-8"))
    assert [(row["log_density"], row["way"]) for row in kept["rows"]] == [
        (log_density, way) for log_density in (False, True) for way in ("by hand", "direct", "discrete")
    ]
    assert all(row["difference"] < 1e-10 and set(row["training"]) == TIMING for row in kept["rows"])
    assert [mark["name"] for mark in kept["marks"]] == list(users.MUST) * 2
    memory = [mark for mark in kept["marks"] if "memory" in mark["name"]]
    assert all(mark["reached"] and mark["value"] > 0.01 for mark in memory)

    case = users.Case.make(3, 2, True, CPU, batch=4)
    by_hand = users.Case.by_hand
    monkeypatch.setattr(users.Case, "by_hand", lambda self, z0: (by_hand(self, z0)[0], z0[:, 0]))
    with pytest.raises(RuntimeError, match="written by hand"):
        users.check_same(case)


def test_velocity_runs(tmp_path, capsys) -> None:
    script("velocity").main(["--rounds", "1", "--json", str(tmp_path / "velocity.json")])
    assert "mlp, k per sample" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "velocity.json").read_text(encoding="utf-8"))["rows"]) == 4


def test_compiled_field_times_both_and_compares_them_first(tmp_path, monkeypatch, capsys) -> None:
    field, words = script("compiled_field"), ["--size", "4,2,5", "--rounds", "1", "--budget", "0"]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    field.main([*words, "--json", str(tmp_path / "compiled.json")])
    assert "user's module" in capsys.readouterr().out
    rows = json.loads((tmp_path / "compiled.json").read_text(encoding="utf-8"))["rows"]
    modes = {row["call"] for row in rows if row["potential"] == "user's module"}
    assert modes == {"inference", "training, direct", "training, discrete", "training, adjoint"}
    assert all(row["gain"]["median"] > 0 and row["first_call_seconds"] > 0 for row in rows)

    def wrong(function, **options):
        def run(*args):
            found = function(*args)
            return (found[0] + 1, *found[1:]) if isinstance(found, tuple) else found + 1

        return run

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(AssertionError):
        field.main([*words, "--json", str(tmp_path / "wrong.json")])


@pytest.mark.ci
def test_the_pendulum_swings_and_its_fields_are_compared(tmp_path, capsys) -> None:
    pendulum = script("pendulum")
    z = pendulum.swings(9, torch.Generator().manual_seed(0))
    energy = 0.5 * z[..., 1].square() - z[..., 0].cos()
    assert (energy - energy[0]).abs().max() < 1e-5
    images = pendulum.draw(torch.tensor([0.0, 0.5, -0.5]))
    torch.testing.assert_close(images[1], images[2].flip(-1))
    assert divmod(int(images[0].argmax()), pendulum.SIZE)[0] > 20  # it hangs

    pendulum.main(["--seeds", "2", "--steps", "3", "--json", str(tmp_path / "pendulum.json")])
    assert capsys.readouterr().out.count("the last / free: ") == 2
    rows = json.loads((tmp_path / "pendulum.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["problem"], row["field"]) for row in rows] == [
        (problem, field) for problem in ("plane", "images") for field in pendulum.FIELDS
    ]
    for row in rows:
        free = next(other for other in rows if other["problem"] == row["problem"])
        assert row["within_over_free"] == pytest.approx(row["within"] / free["within"])
        assert row["parameters"] == pytest.approx(free["parameters"], rel=0.1)
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert len({run["beyond"] for run in row["runs"]}) == 2


def test_traversals_of_a_given_decoder_are_compared(capsys) -> None:
    bench, dim = script("latent_traversal"), 4
    stroke = torch.zeros(3, 3, 28, 28)
    stroke[0, 0, 4:24, 14:16] = stroke[1, 0, 4:24, 12:18] = 1
    for row in range(4, 24):  # its top leans to the right
        stroke[2, 0, row, 22 - row // 2 : 24 - row // 2] = 1
    thickness, slant = bench.properties(stroke).mT
    assert thickness[0] == 0 < thickness[1]
    assert slant[:2].abs().max() < 0.05
    assert 0.3 < slant[2] < 0.5  # half a column a row

    codes = torch.randn(300, dim) @ torch.randn(dim, dim) + 3
    body = torch.nn.Sequential(torch.nn.Linear(dim, 3 * 28 * 28), torch.nn.Sigmoid())
    decoder = bench.Whitened(cflow.nets.MLPDecoder((3, 28, 28), dim, 16), codes)
    states = decoder.states(codes)
    torch.testing.assert_close(states.T.cov(), torch.eye(dim), rtol=0, atol=1e-4)
    torch.testing.assert_close(bench.Whitened(body, codes)(states), body(codes), rtol=0, atol=1e-4)
    held_out = states[:10]
    apart, guided = (make(decoder, states, held_out, 3, 1.0) for make in (bench.told_apart, bench.guided))
    bench.show(apart, guided)
    assert "told apart" in capsys.readouterr().out
    assert [row["property"] for row in guided["rows"]] == ["thickness", "slant"]
    length = torch.full((10,), 0.1)
    near = bench.ascent(guided["traversal"], held_out, 0, length, 4)
    assert (near - held_out).norm(dim=1).max() < 0.1001
    h = guided["traversal"].objective
    assert h(decoder(near).mean)[:, 0].mean() > h(decoder(held_out).mean)[:, 0].mean()


# --- populations ----------------------------------------------------------------------------------------------


def test_populations_go_on_and_print_their_tables(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("ot")
    populations, kept = script("populations"), tmp_path / "table.json"
    line = ["--quick", "--methods", "recipe", "--seeds", "0", "1", "--json", str(kept)]
    populations.main(line)
    printed = capsys.readouterr().out
    assert [row.split()[-1] for row in printed.splitlines() if row.startswith(("recipe", "floor"))] == ["2", "2"]
    assert "OT-CFM (Tong et al. 2024), as reported" in printed
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 3 * (3 + 2 + 2)  # three references once, the floor and the recipe twice
    monkeypatch.setattr(populations, "learned", lambda *_: pytest.fail("a row is computed twice"))
    populations.main(line)  # all rows are there: nothing is learned again
    with pytest.raises(SystemExit, match="other settings"):
        populations.main([*line[1:], "--root", str(tmp_path), "--json", str(kept)])


def test_choosing_sees_neither_time_that_was_left_out(monkeypatch) -> None:
    populations = script("populations")
    seen = []
    monkeypatch.setattr(populations, "fit", lambda flow, snapshots, **settings: seen.append(snapshots.t.tolist()))
    monkeypatch.setattr(populations, "wasserstein", lambda x, y: 0.0)
    for row in populations.selection(populations.made_up(), steps=1):
        row.run()
        left_out = [float(word) for word in row.case.split(", ")]
        assert sorted([*seen[-1], *left_out]) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(seen) == 6 * len(populations.CANDIDATES)


# --- populations whose motion is known ------------------------------------------------------------------------


def relaxing(truths, **given):
    """A plane in which members relax at rates 1 and 2, Gaussian for all time."""
    return truths.Plane(lambda y, t: -y * torch.tensor([1.0, 2.0]).double(), **given)


def gaussian_at(t, start, width, sigma):
    """Mean and variance (2,) of `relaxing` at time t."""
    rates = torch.tensor([1.0, 2.0]).double()
    faded = torch.exp(-rates * t)
    return torch.tensor(start).double() * faded, width**2 * faded**2 + sigma**2 / (2 * rates) * (1 - faded**2)


def test_known_populations_go_on_and_print_their_tables(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("ot")
    known, kept = script("known_populations"), tmp_path / "table.json"
    line = [
        "--quick",
        "--methods",
        "recipe",
        "carried + skew",
        "free, straight",
        "told",
        "linear",
        "still",
        "--seeds",
        "0",
    ]
    known.main([*line, "--json", str(kept)])
    printed = capsys.readouterr().out
    assert printed.count("double well, D=4, σ=0.5  ") == printed.count("turning, D=2  ") == 3
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows.values()] == [
        *("recipe", "free, straight", "linear", "still"),
        *("recipe", "carried + skew", "free, straight", "told", "still"),
    ]
    assert all(row["error"] == 1 and "cosine" not in row for row in rows.values() if row["method"] == "still")
    monkeypatch.setattr(known, "learned", lambda *_: pytest.fail("a row is computed twice"))
    known.main([*line, "--json", str(kept)])


def test_the_simulated_population_is_the_exact_one() -> None:
    truths, start, sigma = script("known_truth"), (0.5, -0.3), 0.5
    plane = relaxing(truths, start=(start,), width=0.4)
    first, last = truths.Truth(plane, 2, 0.0).draw(50, [0.0, 1.2], seed=0)
    assert (last - first * torch.exp(-1.2 * torch.tensor([1.0, 2.0]).double())).abs().max() < 1e-4
    mean, variance = gaussian_at(1.2, start, 0.4, sigma)
    seen = truths.Truth(plane, 2, sigma).draw(40_000, [1.2], seed=1)[0]
    assert ((seen.mean(0) - mean).abs() < 4 * (variance / 40_000).sqrt()).all()
    assert ((seen.var(0) / variance - 1).abs() < 4 * (2 / 40_000) ** 0.5).all()


def test_the_density_on_the_grid_is_the_exact_one() -> None:
    truths, start, sigma = script("known_truth"), (0.5, -0.3), 0.5
    mean, variance = gaussian_at(0.6, start, 0.4, sigma)
    y = mean + variance.sqrt() * torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double()
    plane, exact = relaxing(truths, start=(start,), width=0.4), (mean - y) / variance
    error = [
        float((truths.gradient(truths.Density(plane, sigma, cells).log(0.6), y) - exact).norm() / exact.norm())
        for cells in (40, 80)
    ]
    assert error[1] < 0.01
    assert 3 < error[0] / error[1] < 5  # of second order
    # what stands still stays as it is, to rounding
    resting = truths.Plane(lambda y, t: -y, width=sigma / 2**0.5)
    before, after = (truths.Density(resting, sigma, 40).log(t).exp() for t in (0.0, 1.0))
    assert (after - before).abs().max() < 1e-10


@pytest.mark.parametrize("copies", [False, True])
def test_what_moves_the_density_is_the_drift_less_the_score(copies) -> None:
    truths, sigma, t = script("known_truth"), 0.5, 0.6
    plane = relaxing(truths, width=0.4, copies=copies)
    truth = truths.Truth(plane, 4, sigma, cells=80)
    z = truth.draw(300, [t], seed=0)[0]
    _, variance = gaussian_at(t, (0.0, 0.0), 0.4, sigma)
    rates = torch.tensor([1.0, 2.0]).double()
    if copies:
        rates, variance = rates.repeat(2), variance.repeat(2)
    else:
        slow = torch.tensor([0.1, 0.3]).double()
        faded = torch.exp(-2 * slow * t)
        rates = torch.cat([rates, slow])
        variance = torch.cat([variance, 0.25 * faded + sigma**2 / (2 * slow) * (1 - faded)])
    # a Gaussian stays one where v is linear: its variance changes at the rate of 2 · the slope
    slope = -rates + 0.5 * sigma**2 / variance
    exact = (z @ truth.basis * slope) @ truth.basis.mT
    assert (truth.velocity(z, t) - exact).norm() < 0.01 * truth.drift(truth.hidden(z), t).norm()  # v is a difference
    still = truths.Truth(plane, 4, 0.0)
    assert torch.allclose(still.velocity(z, t), -(z @ truth.basis * rates) @ truth.basis.mT)


def test_gradients_of_known_populations_are_gradients_and_turning_is_not() -> None:
    truths, known = script("known_truth"), script("known_populations")
    y = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()

    def turn(name):
        step = torch.eye(2).double() * 1e-5
        drift = truths.PLANES[name].drift
        slope = [(drift(y + step[i], 0.7) - drift(y - step[i], 0.7)) / 2e-5 for i in (0, 1)]
        return (slope[0][:, 1] - slope[1][:, 0]).abs().max()

    assert all(turn(name) < 1e-8 for name in known.GRADIENTS)
    assert all(abs(turn(name) - 2) < 1e-6 for name, _ in known.TURNING)
    x = y.clone().requires_grad_()  # the published formula, in halves of its unit
    published = 0.5 * ((2 * x) ** 4 - 16 * (2 * x) ** 2 + 5 * (2 * x)).sum()
    expected = -torch.autograd.grad(published, x)[0] / 32
    assert torch.allclose(truths.PLANES["Styblinski-Tang"].drift(y, 0.0), expected)


def test_linear_maps_carry_what_moves_linearly() -> None:
    known, populations = script("known_populations"), script("populations")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    stretched = x @ (turn * torch.tensor([0.5, 1.0, 2.0])) @ turn.mT + torch.tensor([1.0, 0.0, -1.0])
    velocity = known.linear(cflow.populations.Snapshots([x, stretched], [0.0, 0.5]))
    arrived = populations.carried(velocity, x, (0.0, 0.5))
    assert (arrived - stretched).abs().max() < 2e-3  # 1e-4 is added to the variances


# --- the leaderboard of latent dynamics -----------------------------------------------------------------------


def test_the_linear_map_is_the_matrix_exponential() -> None:
    flow = script("latent_baselines").LinearMap(3, 2).double()
    flow.shift.data.normal_()
    z0, generator = torch.randn(4, 3, dtype=torch.float64), flow.generator.detach()

    def moved(z, w, t):
        exact = torch.linalg.matrix_exp(t * torch.tensordot(w, generator, 1))
        return z @ exact[:3, :3].mT + exact[:3, 3]

    w = torch.tensor([1.0, -0.5], dtype=torch.float64)
    times = torch.tensor([0.5, 1.0, 2.75, 4.5], dtype=torch.float64)
    for t in (times, times.flip(0)):
        path = flow.trajectory(z0, w, t)
        torch.testing.assert_close(path, torch.stack([moved(z0, w, s - t[0]) for s in t]))
    one = torch.eye(2, dtype=torch.float64)
    path = flow.trajectory(z0, cflow.Schedule([0.0, 1.5, 4.0], [0, 1]), torch.tensor([0.0, 1.0, 3.0, 4.0]))
    torch.testing.assert_close(path[2:], torch.stack([moved(moved(z0, one[0], 1.5), one[1], s) for s in (1.5, 2.5)]))
    k, t = torch.tensor([0, 1, 1, 0]), torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 0.0]])
    ends = flow(z0, k, t)
    expected = [moved(z[None], one[i], s) for z, i, s in zip(z0, k, t[1].double(), strict=True)]
    torch.testing.assert_close(ends, torch.cat(expected))
    rate = (flow(z0, 1, t=(0.0, 1e-6)) - z0) / 1e-6
    torch.testing.assert_close(rate, flow.velocity(z0, 1), rtol=0, atol=1e-4)


def test_a_velocity_network_is_solved_for_every_row() -> None:
    flow = script("latent_baselines").VelocityNetwork(3, 2, hidden=8, step_size=0.05).double()
    z0, k = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    t = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.5, 3.0], [4.0, 2.0, 1.0, 3.5]])
    path = flow.trajectory(z0, k, t)
    for row, (flow_of, times) in enumerate(zip(k, t.mT.double(), strict=True)):
        keep = [0, *(i for i in (1, 2) if times[i] > times[i - 1])]
        exact = torchdiffeq.odeint(
            lambda _, z, i=flow_of: flow.velocity(z[None], i)[0], z0[row], times[keep], rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(path[keep, row], exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.velocity(z0, torch.ones(2)), flow.velocity(z0, 0) + flow.velocity(z0, 1))


def test_a_map_is_inferred_from_the_first_two_frames() -> None:
    flow = script("latent_baselines").InferredMap(12, rows=3, ridge=0.0).double()
    first, step = torch.randn(5, 3, 4, dtype=torch.float64), 0.3 * torch.randn(5, 3, 3, dtype=torch.float64)
    path = [first]
    for _ in range(9):
        path.append(step @ path[-1])
    path = torch.stack(path).flatten(2)
    state = torch.cat([path[0], path[1]], 1)
    t = torch.tensor([0.0, 1.0, 4.0, 8.0])
    found = flow.trajectory(state, None, t)
    torch.testing.assert_close(found, torch.cat([path[t.long()], path[t.long() + 1]], -1))


def test_the_kl_to_a_laplace_prior_is_its_integral() -> None:
    laplace_kl = script("latent_baselines").laplace_kl
    q = torch.distributions.Normal(torch.tensor([0.3, -2.0]).double(), torch.tensor([0.5, 1.2]).double())
    before = torch.tensor([0.4, 0.0]).double()
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    p = torch.distributions.Laplace(before, 1 / 3.0)
    integral = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), dx=24 / 200_000, dim=0)
    torch.testing.assert_close(laplace_kl(q, before, 3.0), integral, rtol=1e-6, atol=0)


def test_transport_costs_what_a_half_turn_does() -> None:
    cost, turn = script("latent_columns").transport_cost, cflow.SkewLinear(dim=2)
    turn.matrix.data.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    flow = cflow.PotentialFlow(None, solenoidal=turn)
    assert cost(flow, torch.randn(9, 2), torch.pi) == pytest.approx((torch.pi / 2) ** 2, rel=1e-3)
    straight = cflow.PotentialFlow(cflow.QuadraticPotential(torch.zeros(1, 2, 2), torch.ones(1, 2)))
    assert cost(straight, torch.randn(9, 2), 3.0) == pytest.approx(1.0, rel=1e-5)


def test_every_row_of_the_leaderboard_trains_its_dynamics(monkeypatch) -> None:
    board = script("latent_dynamics")
    source = cflow.data.Digits().split("train")
    batch = board.Drawn(source, board.DECODED, 0).__getitems__([(0, thing) for thing in range(4)])
    for name, row in board.ROWS.items():
        monkeypatch.setattr(board, "WIDTH", 8)
        vae = row.make()
        loss = board.loss_of(row, vae, source, batch)
        loss.backward()
        assert loss.isfinite(), name
        moved = [p.grad for p in vae.flow.parameters() if p.grad is not None]
        assert bool(moved) == (row.kind == "k"), name  # the others' maps are inferred, or fitted afterwards
        assert all(grad.isfinite().all() for grad in moved), name


def test_the_leaderboard_goes_on_and_prints_its_table(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    board, kept = script("latent_dynamics"), tmp_path / "board.json"
    line = ["--quick", "--json", str(kept), "--weights", str(tmp_path), "--rows", "map inferred", "Euler"]
    board.main([*line, "--list"])
    assert "the trials of 2 rows" in capsys.readouterr().out
    board.main(line)
    printed = capsys.readouterr().out.splitlines()
    (inferred,) = (row.split() for row in printed if row.startswith("map inferred  "))
    assert inferred.count("–") == 8  # of eight columns, the density and the time two are there
    assert (tmp_path / "board.png").stat().st_size > 10_000
    document = json.loads(kept.read_text(encoding="utf-8"))
    row = document["rows"]["Euler/1/0"]
    assert row["seconds"] > 0
    assert set(document["trials"]["Euler"]) == {str(rate) for rate in board.RATES}
    assert row["rate"] == min(board.RATES, key=lambda rate: document["trials"]["Euler"][str(rate)]["error"])
    monkeypatch.setattr(board, "train", lambda *_, **__: pytest.fail("a row is trained twice"))
    board.main(line)
    board.main([*line, "--again"])  # the columns alone, from the weights
    again = json.loads(kept.read_text(encoding="utf-8"))["rows"]["Euler/1/0"]
    assert again["numbers"] == pytest.approx(row["numbers"])
    capsys.readouterr()
    board.main([*line, "--list"])
    assert "to do: 0.00 CPU hours" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        board.main([*line[1:], "--steps", "7"])


# --- what lasts, and what checks cost ------------------------------------------------------------------------


def test_checks_are_found_taken_out_and_put_back() -> None:
    cost, problem = script("check_cost"), problem_of(small())
    flow = cflow.PotentialFlow(problem.net, solver="dopri5")
    bad = problem.z0 * float("nan")
    with cost.unchecked(), torch.no_grad():
        assert flow.velocity(bad, problem.w, 0.0).isnan().all()
        assert flow(problem.z0, problem.w, (1.0, 1.0)).equal(problem.z0)
        for module, path, other in cost.CHECKS:
            owner = importlib.import_module(f"cflow.{module}")
            for part in path.split("."):
                owner = getattr(owner, part)
            assert owner is other
    with pytest.raises(cflow.IntegrationError, match="z0"):
        flow(bad, problem.w, (0.0, 1.0))
    with pytest.raises(cflow.ArgumentError, match="turn back"):
        flow(problem.z0, problem.w, (0.0, 1.0, 0.5))


@pytest.mark.ci
def test_the_cost_of_checks(tmp_path) -> None:
    cost = script("check_cost")
    cost.main(["--size", "3,2,4", "--rounds", "3", "--json", str(tmp_path / "x.json")])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["potential"], row["call"]) for row in rows] == [
        (net, call) for net in ("closed form", "user's module") for call in ("inference", "training")
    ]
    assert all(row["with"]["median"] > 0 < row["without"]["median"] for row in rows)


def test_the_slope_of_a_soak_has_its_confidence() -> None:
    soak, noise = script("soak"), torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        flat = torch.randn(400, generator=noise).tolist()
        low, found, high = soak.slope([0.002 * i + x for i, x in enumerate(flat)])
        assert low < found < high
        inside += low < 2.0 < high
    assert 180 <= inside < 200  # 95 % of them


def test_a_soak_sees_what_grows() -> None:
    record, kept = script("soak").Record(), []

    def leak() -> bool:  # a megabyte, not of what this process has been given back before
        kept.append(mmap.mmap(-1, 1 << 20))
        return kept[-1].write(bytes(1 << 20)) == 0

    for _ in range(60):
        record.run(None, leak)
    low, found, _ = record.row("leak")["memory_kilobytes"]
    assert low > 0.9e6
    assert found == pytest.approx(1.05e6, rel=0.05)
    assert record.row("leak")["failures"] == 0


@pytest.mark.ci
def test_a_soak_of_all_parts(tmp_path, capsys) -> None:
    counts = ["--solves", "30", "--steps", "25", "--workers", "25", "--threads", "25"]
    script("soak").main([*counts, "--json", str(tmp_path / "x.json")])
    rows = {row["part"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    assert {name: row["count"] for name, row in rows.items()} == {
        "solves": 30,
        "steps": 25,
        "workers": 25,
        "threads": 25,
    }
    assert rows["solves"]["failures"] == 5
    assert "kB a 1,000" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_grows_over_thousands_of_solves_and_steps(tmp_path) -> None:
    """In a process of its own, whose memory nobody else uses; an interval wholly above the bound would be growth."""
    command = [sys.executable, FOLDER / "soak.py", "--json", tmp_path / "x.json"]
    subprocess.run(command, check=True, capture_output=True)
    for row in json.loads((tmp_path / "x.json").read_text())["rows"]:
        assert row["memory_kilobytes"][0] < 1000, row  # a megabyte a thousand
        assert row["time_percent"][0] < 10, row
