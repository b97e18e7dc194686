"""What a solve that failed says: the cause, the time, the rows, and what helps.

A solve that goes well reads nothing of this. One that has failed is looked at once more where it stopped: its last step
is taken again stage by stage, and the Jacobian of its field is asked how fast states contract there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import IntegrationError
from .costs import Costs
from .rhs import RightHandSide, right_hand_side
from .segments import Segment
from .solver import Solver
from .tableau import Tableau

LARGE = 1e6  # |z| from which a velocity that is not finite is put down to the state, and below it to the potential
ROUNDS = 8  # of the power iteration; stiff is a matter of orders of magnitude
SHOWN = 5  # rows that are named


@dataclass(frozen=True)
class Diagnosis:
    """Of one segment of a solve.

    Attributes:
        solver, costs, rhs, segment: what is solved, and what it has cost.
    """

    solver: Solver
    costs: Costs
    rhs: RightHandSide
    segment: Segment

    def error(self, s: float, y: Tensor, why: str, remedy: str = "", row: int | None = None) -> IntegrationError:
        """The error of a solve that stopped at s on the solver's clock, in state y (…, C), at the time of a row."""
        z = self.rhs.state.z(y.detach())
        largest = float(z.abs().amax())
        t = self.time(s, int(z.abs().amax(-1).nan_to_num(torch.inf).argmax()) if row is None else row)
        return IntegrationError(
            f"{self.solver.method} failed at t={t:.6g} with max |z| = {largest:.3g} after {self.costs.nfe} "
            f"evaluations: {why}. {remedy or self.remedy(z)}",
            t=t,
            max_abs_z=largest,
            nfe=self.costs.nfe,
        )

    def remedy(self, z: Tensor) -> str:
        """What helps where no other cause is known than that steps were too few or too small."""
        solver, largest, eps = self.solver, float(z.abs().amax()), torch.finfo(z.dtype).eps
        if not solver.is_fixed and solver.atol + solver.rtol * largest < 2 * eps * largest:
            wider = "; solve in float64 (.double())" if z.dtype == torch.float32 else ""
            return (
                f"The tolerances are finer than {str(z.dtype).removeprefix('torch.')} resolves{wider}, or loosen them"
            )
        means = "a smaller step_size" if solver.is_fixed else "looser rtol and atol, a larger max_steps"
        return (
            f"The flow may blow up in finite time or be too stiff; try {means}, a shorter horizon, or a potential that "
            "grows at most quadratically (output_tanh, weight decay)"
        )

    def time(self, s: float, row: int) -> float:
        """A row's time, in frames, at a point of the solver's clock."""
        offset = (self.segment.origin - self.segment.start.detach()).flatten()[0]  # of clock="segment"
        return self.rhs.clock.at(s, row) + float(offset)

    def rows(self, bad: Tensor) -> str:
        """Which samples (B,) are meant by rows (R,), in words."""
        samples = self.rhs.state.samples
        bad = bad if samples is None else bad.index_select(0, samples)
        found = bad.nonzero()[:, 0].tolist()
        if len(found) == len(bad):
            return f"all {len(bad)} rows" if len(bad) > 1 else "the only row"
        if len(found) == 1:
            return f"row {found[0]} of {len(bad)}"
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f"rows {', '.join(map(str, found[:SHOWN]))}{more} of {len(bad)}"

    def growth(self, y: Tensor) -> str:
        """Which rows have grown out of bounds, in words; "" where none has."""
        size = self.rhs.state.z(y.detach()).abs().amax(-1)
        return f", while z grew beyond {LARGE:g} in {self.rows(size > LARGE)}" if bool((size > LARGE).any()) else ""

    def velocity(self, s: float, y: Tensor) -> Tensor:
        """d(state)/ds (R, C) at a point of the clock, past whatever has been planned."""
        rhs = right_hand_side(self.rhs.field, self.rhs.clock, self.rhs.state)
        with torch.no_grad(), rhs.field.mode():
            return rhs(torch.tensor(s, dtype=torch.float64, device=y.device), y)

    def not_finite(self, s: float, size: float, y: Tensor, table: Tableau | None) -> IntegrationError | None:
        """The error of the first stage of a step from y whose velocity is not finite; None where all are.

        Arguments:
            s, size: where the step starts and how long it is.
            y: the state at its start.
            table: the method; None for one without a tableau, of which the start and an Euler step are looked at.
        """
        y, finite, slopes = y.detach(), s, list[Tensor]()
        stages = ((0.0, ()), (1.0, (1.0,))) if table is None else tuple(zip(table.c, table.a, strict=True))
        for c, row in stages:
            point = _advanced(y, slopes, row, size)
            slopes.append(self.velocity(s + c * size, point))
            good = (point.isfinite() & slopes[-1].isfinite()).all(-1)
            if not bool(good.all()):
                return self._not_finite(finite, s + c * size, ~good, point, slopes[-1])
            finite = s + c * size
        return None

    def _not_finite(self, finite: float, s: float, bad: Tensor, point: Tensor, slope: Tensor) -> IntegrationError:
        first = int(bad.nonzero()[0, 0])
        z = self.rhs.state.z(point)[bad]
        largest = float(z.nan_to_num(torch.inf).abs().amax())
        kind = "NaN" if bool(slope[bad].isnan().any()) else "infinite"
        since = f", and finite until t={self.time(finite, first):.6g}" if finite < s else ""
        if largest >= LARGE:
            kind, remedy = "not finite", ""
        elif not all(bool(x.isfinite().all()) for x in self.rhs.field.tensors):
            remedy = "Parameters, weights or times that the flow reads are NaN or infinite themselves"
        elif kind == "NaN":
            remedy = (
                "Look in the potential for 0/0, inf − inf, or the square root or logarithm of a number ≤ 0; "
                "PotentialFlow.velocity(z, k, t) at that time shows it"
            )
        else:
            remedy = "The potential overflows there: let it grow more slowly (output_tanh, weight decay)"
        why = f"the velocity is {kind} there in {self.rows(bad)}{since}"
        return self.error(s, point[bad], why, remedy, row=first)

    def contraction(self, s: float, y: Tensor) -> Tensor:
        """The rate (R,) by which each row's fastest direction decays, by the solver's clock; negative where it grows.

        The power method on differences of the velocity, with Rayleigh's quotient: of the symmetric ∇²u the eigenvalue
        that is largest in magnitude.
        """
        state, y = self.rhs.state, y.detach()
        z, v = state.z(y), state.z(self.velocity(s, y))
        w = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
        size = (1 + z.norm(dim=-1, keepdim=True)) * torch.finfo(z.dtype).eps ** 0.5
        quotient = w.new_zeros(len(w))
        for _ in range(ROUNDS):
            w = w / w.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
            moved = torch.cat([z + size * w, y[:, z.shape[1] :]], 1)
            pushed = (state.z(self.velocity(s, moved)) - v) / size
            quotient, w = (w * pushed).sum(-1), pushed
        self.costs.nfe += ROUNDS + 1
        return -quotient


def _advanced(y: Tensor, slopes: Sequence[Tensor], coefficients: Sequence[float], size: float) -> Tensor:
    """y + h Σ_j c_j k_j."""
    return y + sum(slope * (size * c) for slope, c in zip(slopes, coefficients, strict=False) if c)
