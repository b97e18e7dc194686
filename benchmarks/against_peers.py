"""cflow beside other libraries: the same potentials, weights, horizon and tolerance, answers compared before timing.

    pip install "cflow-torch[bench]"
    python benchmarks/against_peers.py                     # D=64, K=3, batch 128; dopri5 and rk4; two minutes
    python benchmarks/against_peers.py --sizes 16,3 64,8   # other sizes: D,K
    python benchmarks/against_peers.py --device cuda

One process, one thread or one GPU, float32, interleaved; a library that is not installed is skipped and says so. Other
PyTorch libraries get the stacked autograd field, the fastest one that can be written without closed forms; torchdiffeq
also gets the original code's loop over K. Each library keeps its own error norm, so that the evaluations differ.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from evaluations import euler_solves, euler_step, products
from measuring import Timing, interleave, threads
from peer import Peer
from peers import MAKERS
from precision import Reference
from problems import HORIZON, TOLERANCE, Problem, Size, solver
from report import command_line, machine, milliseconds, one_line, print_table, write_json
from torch import Tensor

import cflow

SCHEMA = 1
WORST = {"dopri5": 2e-3, "rk4": 1e-4}  # largest error, of the end state or of a gradient, that is still the same answer
BASE = "torchdiffeq odeint, the original's field"
HEADER = (
    *("library", "fwd ms", "quartiles", "fwd + bwd ms", "quartiles", "faster fwd", "faster fwd + bwd", "nfe"),
    *("error", "grad error", "cores used", "first call s"),
)


def prepare_jax(device: torch.device) -> None:
    """What JAX and XLA read when they are first imported: one thread, or a GPU of which others keep a share.

    Harmless where JAX is not installed.
    """
    if device.type == "cuda":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def collect(problem: Problem, method: str, libraries: Iterable[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be imported and have the method, and why others are skipped."""
    found: list[Peer] = []
    skipped = {}
    for library in (name for name in libraries if name in MAKERS):
        try:
            peers = list(MAKERS[library](problem, method))
        except ImportError as error:
            skipped[library] = f"cannot be imported ({error}); pip install 'cflow-torch[bench]'"
            continue
        if not peers:
            skipped[library] = f"has no {method}"
        found += peers
    return found, skipped


def answers(problem: Problem, peers: Iterable[Peer]) -> dict[str, dict[str, float]]:
    """Errors of each peer against float64: end states, gradient to z0, norm of the gradient to all parameters; and the
    seconds of its first training call, in which compilers compile.

    The parameters are cut up differently in each library, but their gradient's norm is the same.
    """
    reference = Reference.of(problem)
    double = Problem.make(problem.size, problem.device, dtype=torch.float64)
    exact = cflow.Solver("dopri5", rtol=1e-9, atol=1e-9, gradient="direct")
    norm = float(_norm(double.training(double.solve(exact))()[1:]))
    found = {}
    for peer in peers:
        begin = time.perf_counter()
        peer.timed(peer.training)()
        first = time.perf_counter() - begin
        z0_gradient, *others = (_tensor(x) for x in peer.training())
        found[peer.name] = {
            "error": reference.error(_tensor(peer.forward())),
            "gradient_error": reference.gradient_error(z0_gradient),
            "parameter_gradient_error": abs(float(_norm(others)) / norm - 1),
            "first_call_seconds": first,
        }
    return found


def _norm(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.double().square().sum() for x in parts]).sum().sqrt()


def _tensor(x: Any) -> Tensor:
    return x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(importlib.import_module("numpy").array(x))


def compare(
    problem: Problem, method: str, libraries: Iterable[str] = tuple(MAKERS), *, rounds: int = 15, budget: float = 40.0
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row for each peer whose answers are right; and what was skipped, with the reason.

    Arguments:
        problem: what is solved.
        method: "dopri5" at a tolerance of 1e-5, or "rk4" in eight steps.
        libraries: keys of `peers.MAKERS`.
        rounds, budget: see `common.interleave`.
    """
    size = problem.size
    peers, skipped = collect(problem, method, libraries)
    errors = answers(problem, peers)
    for peer in list(peers):
        worst = max(value for name, value in errors[peer.name].items() if name.endswith("error"))
        if not worst <= WORST[method]:
            skipped[peer.name] = f"gives another answer, off by {worst:.1e}"
            peers.remove(peer)
    calls = {f"{p.name} forward": p.timed(p.forward) for p in peers}
    calls |= {f"{p.name} training": p.timed(p.training) for p in peers}
    seconds = interleave(calls, device=problem.device, rounds=rounds, budget=budget)
    rows = []
    for peer in peers:
        forward, training = seconds[f"{peer.name} forward"], seconds[f"{peer.name} training"]
        row: dict[str, Any] = {"library": peer.name, "method": method, "dim": size.dim, "num_flows": size.num_flows}
        row |= {"batch": size.batch, "threads": torch.get_num_threads(), "nfe": peer.evaluations()}
        row |= errors[peer.name] | {"forward": forward.document(), "training": training.document()}
        row |= {"faster_forward": _faster(seconds, "forward", forward)}
        row |= {"faster_training": _faster(seconds, "training", training)}
        row |= {"host_reads": None if peer.name.startswith("diffrax") else peer.host_reads(problem.device)}
        rows.append(row | {"cores_used": cores_used(peer)})
    return rows, skipped


def where_time_goes(problem: Problem, method: str, *, rounds: int, budget: float) -> dict[str, Any]:
    """Seconds of cflow's forward solve: the bare matrix products of its evaluations, the rest of these, and the steps.

    An evaluation is what one more Euler step costs (see `evaluations`). The steps are the arithmetic of the method
    between evaluations, and what cflow does once a solve.
    """
    flow, settings = problem.flow(solver("euler")), solver(method)
    with torch.no_grad():
        nfe = problem.flow(settings).solve(problem.z0, problem.w, HORIZON).nfe
        calls = {"products": products(problem.size, problem.device), "solve": problem.forward(problem.solve(settings))}
        calls |= euler_solves("euler", problem, flow, problem.w)
        seconds = interleave(calls, device=problem.device, rounds=rounds, budget=budget)
    bare, evaluated = nfe * seconds["products"].median, nfe * euler_step(seconds, "euler").median
    solved = seconds["solve"].median
    parts = {"products": bare, "rest_of_evaluations": evaluated - bare, "steps": solved - evaluated}
    return {"size": str(problem.size), "method": method, "nfe": nfe, "seconds": solved, "parts": parts}


def _faster(seconds: dict[str, Timing], what: str, timing: Timing) -> float | None:
    base = seconds.get(f"{BASE} {what}")
    return None if base is None else base.over(timing).median


def cores_used(peer: Peer, least: float = 0.2) -> float:
    """CPU seconds a second while a peer trains: about 1 for a library that keeps to one thread."""
    call, wall, cpu = peer.timed(peer.training), time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < least:
        call()
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def torchflows_trace(dim: int = 16, batch: int = 128) -> dict[str, float] | None:
    """torchflows' OT-Flow: relative error of its trace as initialised, and with weights as training moves them.

    Its divergence is held against autograd's of its own velocity. Its gradient of the potential puts the weights w
    inside the derivative of the activation (`σ'(a · w)` for `w · σ'(a)`): the same for w = 1, where it starts, and no
    gradient of a potential anywhere else, so that the closed-form trace belongs to another field.

    Returns:
        errors by stage, or None where torchflows is not installed.
    """
    try:
        flows = importlib.import_module("torchflows.bijections.continuous.otflow")
    except ImportError:
        return None
    found = {}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = flows.OTFlowTimeDerivative((dim,), hidden_size=dim).eval()
    x, t = torch.randn(batch, dim, generator=generator).requires_grad_(), torch.tensor(0.5)
    for stage in ("as initialised", "w moved by half"):
        field.before_odeint()
        v, trace = field.step(t, x)
        rows = (torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(dim))
        exact = torch.stack(list(rows)).sum(0)
        found[stage] = float(((trace - exact).norm() / exact.norm()).detach())
        with torch.no_grad():
            field.time_deriv.w.add_(0.5 * torch.randn(dim, generator=generator))
    return found


def torchflows_rows(size: Size, *, rounds: int, budget: float) -> list[dict[str, Any]]:
    """torchflows' OT-Flow and a RidgePotential, with log-density, dopri5 at 1e-5 over one frame: each its own model."""
    try:
        continuous = importlib.import_module("torchflows.bijections.continuous.otflow")
    except ImportError:
        return []
    torch.manual_seed(0)
    z0 = torch.randn(size.batch, size.dim)
    width = {"hidden_size": size.dim}
    other = continuous.OTFlowBijection((size.dim,), solver="dopri5", time_derivative_kwargs=width).eval()
    ridge = cflow.PotentialFlow(cflow.RidgePotential(size.dim, hidden=size.dim), solver=solver("dopri5"))
    names = ("torchflows OT-Flow", "cflow RidgePotential")
    with torch.no_grad():
        calls = {
            names[0]: lambda: other.inverse(z0),
            names[1]: lambda: ridge.solve(z0, None, (0.0, 1.0), log_density=True),
        }
        seconds = interleave(calls, device=z0.device, rounds=rounds, budget=budget)
    return [{"model": name, "size": str(size), "forward": timing.document()} for name, timing in seconds.items()]


def show(rows: Iterable[dict[str, Any]]) -> None:
    """Print one table."""
    print_table(HEADER, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    cells = [row["library"], *milliseconds(row["forward"]), *milliseconds(row["training"])]
    faster = (row["faster_forward"], row["faster_training"])
    cells += ["" if ratio is None else f"{ratio:.2f}×" for ratio in faster]
    cells += [str(row["nfe"]), f"{row['error']:.1e}", f"{row['gradient_error']:.1e}"]
    return (*cells, f"{row['cores_used']:.2f}", f"{row['first_call_seconds']:.1f}")


def run(
    sizes: Sequence[Size],
    methods: Sequence[str],
    libraries: Sequence[str],
    *,
    device: torch.device,
    rounds: int,
    budget: float,
) -> dict[str, Any]:
    """Compare on one thread or a GPU, print, and return the document that is kept as JSON."""
    document: dict[str, Any] = {"benchmark": "against_peers", "schema": SCHEMA, "machine": machine(device)}
    document |= {"tolerance": TOLERANCE, "horizon": HORIZON, "rows": [], "where_time_goes": []}
    document |= {"skipped": {}, "torchflows": {}}
    with threads(1):
        for size in sizes:
            for method in methods:
                problem = Problem.make(size, device)
                rows, skipped = compare(problem, method, libraries, rounds=rounds, budget=budget)
                document["rows"] += rows
                document["skipped"][f"{size}, {method}"] = skipped
                parts = where_time_goes(problem, method, rounds=rounds, budget=budget / 4)
                document["where_time_goes"].append(parts)
                print(f"\n{size}, {method}")
                show(rows)
                print(_parts_line(parts))
                for name, why in skipped.items():
                    print(f"skipped {name}: {why}")
        if "torchflows" in libraries and device.type == "cpu":
            trace, models = torchflows_trace(), torchflows_rows(sizes[0], rounds=rounds, budget=budget / 4)
            document["torchflows"] = {"trace_error": trace, "rows": models}
            print("\n" + _torchflows_line(trace))
            for row in models:
                milliseconds = row["forward"]["median"] * 1e3
                print(f"{row['model']}, {row['size']}, dopri5, one frame, with log-density: {milliseconds:.2f} ms")
    return document


def _parts_line(found: dict[str, Any]) -> str:
    products, rest, steps = (f"{1e3 * seconds:.1f}" for seconds in found["parts"].values())
    return (
        f"cflow's forward solve takes {1e3 * found['seconds']:.1f} ms: {products} for the matrix products of its "
        f"{found['nfe']} evaluations, {rest} for the rest of these, {steps} for the steps and all else"
    )


def _torchflows_line(trace: dict[str, float] | None) -> str:
    if trace is None:
        return "skipped torchflows: cannot be imported; pip install 'cflow-torch[bench]'"
    errors = ", ".join(f"{stage} {error:.1e}" for stage, error in trace.items())
    return (
        f"torchflows' OT-Flow takes no other potential: it is not in the table. Relative error of its trace: {errors}"
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "against_peers", rounds=15)
    everything = [*MAKERS, "torchflows"]
    parser.add_argument(
        "--sizes", nargs="+", type=Size.parse, default=[Size(64, 3)], help="D,K or D,K,B (default 64,3)"
    )
    parser.add_argument("--methods", nargs="+", choices=("dopri5", "rk4"), default=["dopri5", "rk4"])
    parser.add_argument("--libraries", nargs="+", choices=everything, default=everything)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of timing a table (default 40)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Compare, print, keep."""
    args = arguments(words)
    prepare_jax(args.device)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, not about what is measured
    print(one_line(machine(args.device)))
    document = run(args.sizes, args.methods, args.libraries, device=args.device, rounds=args.rounds, budget=args.budget)
    write_json(args.json, document)


if __name__ == "__main__":
    main()
