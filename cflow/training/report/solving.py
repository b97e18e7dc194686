"""What the solver does to follow the flows, and how far it is from the exact path."""

from __future__ import annotations

import copy

import torch

from ...errors import CflowError
from ...solve import Solver
from .subject import Subject

STATES = 64
EXACT = Solver("dopri5", rtol=1e-8, atol=1e-8)  # in float64

HEAD = ["flow", "evaluations, all frames", "straight to the end", "accepted steps", "distance from exact"]
HEAD += ["speed", "path energy"]


@torch.no_grad()
def solver_rows(subject: Subject) -> list[list[str]]:
    """The solves of held-out things by every flow, as the cells of a table with its head.

    Evaluations of the velocity and accepted steps are those of one batch, through all frames, and in one interval from
    the first frame to the last. The distance is that of the last state from the one that dopri5 finds in float64 with
    tolerances of 1e-8, as a part of how far states have moved. Speed is the mean ‖v‖ at the frames, in latent units a
    frame, and the path's energy ∫ ½‖v‖² dt, both averaged over things.
    """
    flow, t = subject.vae.flow, subject.times
    ends = torch.stack([t[0], t[-1]])
    exact = copy.deepcopy(flow).cpu().double()
    exact.solver = EXACT
    rows = [HEAD]
    for k, number in enumerate(subject.numbers):
        z0 = subject.starts(k, STATES)
        path, straight = flow.solve(z0, number, t, kinetic_energy=True), flow.solve(z0, number, ends)
        speeds = [flow.velocity(z, number, float(at)).norm(dim=-1).mean() for at, z in zip(t, path.z, strict=True)]
        energy = 0.0 if path.kinetic_energy is None else float(path.kinetic_energy[-1].mean())
        try:
            end = exact(z0.cpu().double(), number, ends.cpu().double())
            moved = (end - z0.cpu()).norm(dim=-1).mean()
            apart = f"{float((path.z[-1].cpu() - end).norm(dim=-1).mean() / moved):.1e}"
        except CflowError:  # a field that no adaptive solver follows at such tolerances
            apart = "–"
        evaluations = [path.nfe, straight.nfe, path.steps]
        numbers = [f"{float(torch.stack(speeds).mean()):.3g}", f"{energy:.3g}"]
        rows.append([subject.labels[k], *(f"{n:,}" for n in evaluations), apart, *numbers])
    return rows


def described(solver: Solver) -> str:
    """A solver with its settings, in words.

    Example:
        >>> described(Solver("rk4", step_size=2.0)), described(Solver("dopri5"))
        ('rk4, steps of at most 2 frames', 'dopri5, rtol 1e-05, atol 1e-05')
    """
    if solver.step_size is not None:
        return f"{solver.method}, steps of at most {solver.step_size:g} frame{'' if solver.step_size == 1 else 's'}"
    return f"{solver.method}, rtol {solver.rtol:g}, atol {solver.atol:g}"
