"""Work and precision: the error of a solve, and of its gradient, against what it costs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Call, interleave
from problems import HORIZON, Problem, modes, solver
from torch import Tensor

import cflow
from cflow import plots

ROWS = 32  # rows whose error is taken: the reference in float64 would take minutes for the largest batch
STEPS = (4.0, 2.0, 1.0, 0.5, 0.25)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class Reference:
    """The first rows of a problem solved in float64 by dopri8 at 1e-10.

    Attributes:
        z: end states (R, D); gradient: of the loss to z0 (R, D). R = `ROWS`, or B where that is less.
    """

    z: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Reference:
        """Solve a problem's first rows."""
        z0, w, cotangent = (x[:ROWS].double() for x in (problem.z0, problem.w, problem.cotangent))
        settings = cflow.Solver("dopri8", rtol=1e-10, atol=1e-10, gradient="direct")
        flow = cflow.PotentialFlow(copy.deepcopy(problem.net).double(), solver=settings)
        z0.requires_grad_()
        z = flow(z0, w, HORIZON)
        (gradient,) = torch.autograd.grad((z * cotangent).sum(), z0)
        return cls(z.detach(), gradient)

    def error(self, z: Tensor) -> float:
        """Largest absolute error of end states (B, D) in the first rows."""
        return float((z.detach()[:ROWS].to(self.z) - self.z).abs().amax())

    def gradient_error(self, gradient: Tensor) -> float:
        """Relative error of a gradient to z0 (B, D), in the Euclidean norm of the first rows."""
        return float((gradient[:ROWS].to(self.gradient) - self.gradient).norm() / self.gradient.norm())


def sweep(problem: Problem, methods: Iterable[str], *, rounds: int, budget: float) -> list[dict[str, Any]]:
    """Error, evaluations and time of inference solves, one point for each method and step size or tolerance."""
    reference, points, calls = Reference.of(problem), [], dict[str, Call]()
    for method in methods:
        for setting in _settings(method):
            flow = problem.flow(solver(method, step_size=setting, tolerance=setting))
            with torch.no_grad():
                path = flow.solve(problem.z0, problem.w, HORIZON)
            point = {"method": method, "setting": setting, "nfe": path.nfe, "error": reference.error(path.z[-1])}
            calls[f"{method} {setting}"] = problem.forward(partial(flow, k=problem.w, t=HORIZON))
            points.append(point)
    seconds = interleave(calls, device=problem.device, rounds=rounds, warmup=1, budget=budget)
    return [p | {"seconds": seconds[f"{p['method']} {p['setting']}"].median} for p in points]


def gradient_sweep(
    problem: Problem, methods: Iterable[str], settings: int, *, rounds: int, budget: float
) -> list[dict[str, Any]]:
    """Error of the gradient to z0 and time of forward + backward, for each method, gradient mode and setting."""
    reference, points, calls = Reference.of(problem), [], dict[str, Call]()
    for method in methods:
        for mode in modes(method)[0]:
            for setting in _settings(method)[-settings:]:
                call = problem.training(problem.solve(solver(method, mode, step_size=setting, tolerance=setting)))
                error = reference.gradient_error(call()[0])
                calls[f"{method} {mode} {setting}"] = call
                points.append({"method": method, "gradient": mode, "setting": setting, "gradient_error": error})
    seconds = interleave(calls, device=problem.device, rounds=rounds, warmup=0, budget=budget)
    return [p | {"seconds": seconds[f"{p['method']} {p['gradient']} {p['setting']}"].median} for p in points]


def _settings(method: str) -> Sequence[float]:
    return STEPS if solver(method).is_fixed else TOLERANCES


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw the points of a `solver_cost` document: error against evaluations and time, gradients against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots(1, 3)
    points, gradients = document["work_precision"], document["gradient_precision"]
    for x, label, ax in (("nfe", "velocity evaluations", axes[0]), ("seconds", "inference, seconds", axes[1])):
        plots.work_precision(points, x=x, xlabel=label, ylabel="largest error of z(8)", ax=ax)
    plots.work_precision(
        gradients,
        x="seconds",
        y="gradient_error",
        by=("method", "gradient"),
        xlabel="forward + backward, seconds",
        ylabel="relative error of ∂loss/∂z(0)",
        ax=axes[2],
    )
    for ax in axes:
        ax.get_legend().remove()
    for ax, title, side, columns in ((axes[0], "inference", "left", 6), (axes[2], "training", "right", 3)):
        figure.legend(  # type: ignore[call-overload]
            *ax.get_legend_handles_labels(), loc=f"outside lower {side}", ncols=columns, title=title, fontsize="small"
        )
    where = document["machine"]
    figure.suptitle(
        f"{document['work_precision_size']}, float32, t = 0 .. 8, {document['work_precision_threads']} thread(s), "
        f"{where['cpu'] if where['device'] == 'cpu' else where['device']}, torch {where['torch']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")
