"""`PotentialFlow`: latent evolution dz/dt = ∇_z Σ_k w_k u_k(z, t) as one module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .checks import positive_int
from .errors import ArgumentError, ArgumentTypeError
from .fields import Divergence, Dynamics, Rows, VelocityField, rademacher_like
from .modes import concrete, full_precision, ordinary
from .potentials.autograd import Compiled
from .potentials.base import is_closed, takes_context, value
from .potentials.checks import check_module
from .selection import SelectionLike, parse_selection, select_at
from .solve import Solve, Solver, State, as_solver
from .times import TimesLike, parse_instant, parse_times
from .transform import FlowTransform


@dataclass(frozen=True)
class FlowPath:
    """A solve: states and integrals at the requested times.

    Attributes:
        t: the times, (N,) or (N, B), in frames.
        z: states, (N, B, D); z[0] is the start.
        log_density_change: log q_t(z_t) − log q_0(z_0) = −∫ ∇·v dt, (N, B) in nats; None if not asked for.
        kinetic_energy: ∫ ½‖v‖² |dt| ≥ 0, (N, B); None if not asked for.
        nfe: velocity evaluations of the forward solve.
        steps: accepted steps of the forward solve.
    """

    t: Tensor
    z: Tensor
    log_density_change: Tensor | None
    kinetic_energy: Tensor | None
    nfe: int
    steps: int


class PotentialFlow(nn.Module):
    r"""Flows along the gradients of K potentials, integrated by torchdiffeq.

    .. math:: dz/dt = ∇_z Σ_k w_k u_k(z, t), \quad d \log q(z(t), t)/dt = −Δ Σ_k w_k u_k(z, t)

    Every call takes a selection `k`, times `t` in frames, and optionally a `context`:

    * `k`: None (one flow), an int, an integer tensor (B,), float weights (K,) or (B, K) (a superposition: any
      sign, not normalised), or a `Schedule`.
    * `t`: a pair of numbers or of (B,) tensors, a list or 1-D tensor of times, or (N, B) per-sample times; each
      row monotone, decreasing times run backwards.
    * `context`: a tensor (B, …) handed to a user's potential as net(z, t, context).

    Gradients flow to z, k, t, the switch times of a Schedule, the context and all parameters. The solve runs in the
    potential's dtype (float32 or float64) with autocast off. Under an adaptive solver the rows of a batch share their
    steps; under a fixed-step one they are independent (but for the implicit Adams methods, whose corrector stops by a
    tolerance of the whole batch).

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167.
        Chen, Rubanova, Bettencourt, Duvenaud: Neural Ordinary Differential Equations, 2018, arXiv:1806.07366.

    Arguments:
        potential: a cflow potential, or any module net(z (B, D), t (B,)) -> (B, K), or (B,) for one flow. K is its
            attribute `num_flows`, or read from its first output.
        solver: a `Solver`, or the name of a method.
        divergence: "exact": the Laplacian (in closed form for cflow's potentials, else D second derivatives).
            "hutchinson": one Rademacher probe, drawn from the global generator and held fixed for a solve. It estimates
            only what is expensive: of an MLPPotential one term, of other cflow potentials nothing.
        compile: run the derivatives of a user's module through `torch.compile`; closed forms stay as they are. The
            first solves then take seconds; where no compiler works they warn and run uncompiled. Not differentiable
            twice.

    Raises:
        ArgumentError, ArgumentTypeError: bad arguments, here or in a call; they name the argument and the fix.
        IntegrationError: a solve that blows up, stalls or needs too many steps.

    Example:
        >>> from cflow import MLPPotential
        >>> flow = PotentialFlow(MLPPotential(dim=8, num_flows=3), solver="dopri5")
        >>> z0 = torch.randn(5, 8)
        >>> z1 = flow(z0, 2, t=(0.0, 8.0))
        >>> bool((flow.inverse(z1, 2, t=(0.0, 8.0)) - z0).abs().max() < 1e-3)
        True
        >>> flow.trajectory(z0, torch.tensor([0, 1, 2, 0, 1]), t=[0, 1, 2.5, 8]).shape
        torch.Size([4, 5, 8])
    """

    def __init__(
        self,
        potential: nn.Module,
        *,
        solver: Solver | str = "dopri5",
        divergence: Divergence = "exact",
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_module(potential)
        if divergence not in ("exact", "hutchinson"):
            raise ArgumentError(f"divergence: expected 'exact' or 'hutchinson', got {divergence!r}")
        self.net = potential
        self.solver = as_solver(solver)
        self.divergence_estimator: Divergence = divergence
        self.compiled = Compiled() if compile else None
        num_flows = getattr(potential, "num_flows", None)
        self._called = False
        self._num_flows = None if num_flows is None else positive_int("num_flows", num_flows)

    @property
    def dim(self) -> int:
        """Latent dimensions D, from the potential's attribute `dim`."""
        dim = getattr(self.net, "dim", None)
        if dim is None:
            raise ArgumentError(
                f"potential: {type(self.net).__name__} does not say its dimension; set its attribute dim"
            )
        return int(dim)

    @property
    def num_flows(self) -> int:
        """Number of flows K, from the potential's attribute `num_flows` or its first output."""
        if self._num_flows is None:
            raise ArgumentError(
                f"potential: {type(self.net).__name__} does not say its number of flows and has not been called yet; "
                "set its attribute num_flows"
            )
        return self._num_flows

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"solver={self.solver}, divergence={self.divergence_estimator!r}"

    # --- solves -------------------------------------------------------------------------------------------

    def forward(
        self, z0: Tensor, k: SelectionLike = None, t: TimesLike | None = None, context: Tensor | None = None
    ) -> Tensor:
        """End state (B, D) of the flow from z0 (B, D) at t[0] to t[-1]; k may be left out where there is one flow."""
        return self._solve(z0, k, t, context, through="ends").z[-1]

    def inverse(
        self, z1: Tensor, k: SelectionLike = None, t: TimesLike | None = None, context: Tensor | None = None
    ) -> Tensor:
        """The state (B, D) at t[0] from which the flow reaches z1 (B, D) at t[-1]."""
        return self._solve(z1, k, t, context, through="ends backwards").z[-1]

    def trajectory(
        self, z0: Tensor, k: SelectionLike = None, t: TimesLike | None = None, context: Tensor | None = None
    ) -> Tensor:
        """States (N, B, D) at all requested times; the first is z0."""
        return self._solve(z0, k, t, context).z

    def solve(
        self,
        z0: Tensor,
        k: SelectionLike = None,
        t: TimesLike | None = None,
        *,
        log_density: bool = False,
        kinetic_energy: bool = False,
        context: Tensor | None = None,
    ) -> FlowPath:
        """Integrate from z0 (B, D) through the times t; see `FlowPath` for what comes back.

        Arguments:
            z0: states at the first time, (B, D).
            k, t, context: see the class.
            log_density: also integrate −∇·v.
            kinetic_energy: also integrate ½‖v‖² |dt|.
        """
        asked = {"log_density": log_density, "kinetic_energy": kinetic_energy}
        return self._solve(z0, k, t, context, integrals=tuple(name for name, wanted in asked.items() if wanted))

    def _solve(
        self,
        z0: Tensor,
        k: SelectionLike,
        t: TimesLike | None,
        context: Tensor | None,
        *,
        integrals: tuple[str, ...] = (),
        through: Literal["all", "ends", "ends backwards"] = "all",
    ) -> FlowPath:
        """`solve` through all times, of which the ends must be two where only they are wanted, or in reverse."""
        backwards = through == "ends backwards"
        with full_precision(_device(z0)):
            z0, context = self._state(z0, context, "z1" if backwards else "z0")
            batch = len(z0)
            with concrete():
                times = parse_times(_given(t), batch=batch, least=1 if through == "all" else 2)
                times = times.reversed() if backwards else times
            num_flows = self.num_flows_at(z0, times.values[0], context)
            selection = parse_selection(k, batch=batch, num_flows=num_flows, like=z0)
            state = State(z0.shape[1], integrals)
            if batch == 0:  # no adaptive solver would accept that
                y, solve = state.start(z0).expand(len(times), 0, -1), None
            else:
                probe = rademacher_like(z0) if self._wants_probe and state.needs_divergence else None
                solve = Solve(self._dynamics(num_flows, self.compiled), self.solver, state, selection, context, probe)
                y = solve.run(z0, times)
        z, found = state.unpack(y)
        return FlowPath(
            t=times.values.detach().double().to(z0.device, z0.dtype),
            z=z,
            log_density_change=found.get("log_density"),
            kinetic_energy=found.get("kinetic_energy"),
            nfe=solve.costs.nfe if solve else 0,
            steps=solve.costs.steps if solve else 0,
        )

    def transform(
        self,
        k: SelectionLike = None,
        t: TimesLike | None = None,
        context: Tensor | None = None,
        cache_size: int = 0,
    ) -> FlowTransform:
        """The flow from t[0] to t[-1] as a `torch.distributions.Transform` over vectors (…, D)."""
        return FlowTransform(self, k, _given(t), context=context, cache_size=cache_size)

    # --- at one time --------------------------------------------------------------------------------------

    def velocity(
        self, z: Tensor, k: SelectionLike = None, t: TimesLike | None = None, context: Tensor | None = None
    ) -> Tensor:
        """v (B, D) = ∇_z Σ_k w_k u_k(z, t) at z (B, D) and a time t, a number or (B,)."""
        with full_precision(_device(z)):
            z, t, rows, field = self._point(z, k, t, context)
            return rows.unsort(field.velocity(rows.sort(z), field.at(rows.sort(t))))

    def divergence(
        self, z: Tensor, k: SelectionLike = None, t: TimesLike | None = None, context: Tensor | None = None
    ) -> Tensor:
        """∇·v (B,) at z (B, D) and a time t, a number or (B,); an estimate under divergence="hutchinson"."""
        with full_precision(_device(z)):
            z, t, rows, field = self._point(z, k, t, context)
            probe = rademacher_like(z) if self._wants_probe else None
            field = field.with_divergence(rows.sort(probe))
            return rows.unsort(field.divergence(rows.sort(z), field.at(rows.sort(t)))[:, None])[:, 0]

    def potential(self, z: Tensor, t: TimesLike | None = None, context: Tensor | None = None) -> Tensor:
        """u (B, K) of all flows at z (B, D) and a time t, a number or (B,)."""
        with full_precision(_device(z)):
            z, context = self._state(z, context, "z")
            u = value(self.net, z, parse_instant(_given(t), batch=len(z), like=z), context)
            self._num_flows = u.shape[1]
            return u

    # --- arguments ----------------------------------------------------------------------------------------

    def _dynamics(self, num_flows: int, compiled: Compiled | None = None) -> Dynamics:
        return Dynamics(self.net, num_flows, compiled)

    @property
    def _wants_probe(self) -> bool:
        return self.divergence_estimator == "hutchinson"

    def num_flows_at(self, z: Tensor, t: Tensor, context: Tensor | None) -> int:
        """K. A user's module is called once, at z (B, D), t () or (B,) and the context, to learn or to check it."""
        if self._num_flows is None or not (self._called or len(z) == 0):
            if self._num_flows is None or not is_closed(self.net):
                with torch.no_grad():
                    self._num_flows = value(self.net, z, t.to(z.device, z.dtype), context).shape[1]
            self._called = True
        return self._num_flows

    def _point(
        self, z: Tensor, k: SelectionLike, t: TimesLike | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Rows, VelocityField]:
        """State, time, rows and field of an evaluation at one time."""
        z, context = self._state(z, context, "z")
        batch = len(z)
        instant = parse_instant(_given(t), batch=batch, like=z)
        num_flows = self.num_flows_at(z, instant, context)
        chosen, seen = select_at(k, instant, batch=batch, num_flows=num_flows, like=z)
        dynamics = self._dynamics(num_flows)
        rows = dynamics.rows(chosen, z, seen.ndim > 0)
        return z, seen, rows, dynamics.field(rows, context)

    def _state(self, z: Tensor, context: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
        """Check z and the context against the potential; cast a half-precision z to the potential's dtype."""
        if not isinstance(z, Tensor):
            raise ArgumentTypeError(f"{name}: expected a tensor (B, D), got {type(z).__name__}")
        if z.ndim != 2:
            hint = "; add a batch dimension with z[None]" if z.ndim == 1 else "; flatten the leading dimensions"
            raise ArgumentError(f"{name}: expected shape (B, D), got {tuple(z.shape)}{hint}")
        net = self.net
        dim = getattr(net, "dim", None)
        if dim is not None and z.shape[1] != dim:
            raise ArgumentError(f"{name}: expected shape (B, D) with D = {dim}, got {tuple(z.shape)}")
        z = _to_potential(z, net, name)
        if context is not None:
            if not takes_context(net):
                raise ArgumentError(f"context: {type(net).__name__} takes none; write a module net(z, t, context)")
            if not isinstance(context, Tensor) or context.ndim == 0 or len(context) != len(z):
                got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
                raise ArgumentError(f"context: expected a tensor (B, …) with B = {len(z)}, got {got}")
            context = ordinary(context.to(z.device))
        return ordinary(z), context


def _device(z: object) -> str:
    return z.device.type if isinstance(z, Tensor) and not z.is_meta else "cpu"


def _given(t: TimesLike | None) -> TimesLike:
    if t is None:
        raise ArgumentTypeError(
            "t: expected times in frames, such as t=(0.0, 8.0), got none; the argument before it selects flows, so "
            "name the times where k is left out"
        )
    return t


_HALF = (torch.float16, torch.bfloat16)


def _a_tensor(net: nn.Module) -> Tensor | None:
    """The first floating-point parameter of a module, or else buffer; `parameters()` takes as long as an evaluation."""
    for store in (net._parameters, net._buffers):
        for x in store.values():
            if x is not None and x.is_floating_point():
                return x
    found = (_a_tensor(module) for module in net._modules.values() if module is not None)
    return next((x for x in found if x is not None), None)


def _to_potential(z: Tensor, net: nn.Module, name: str) -> Tensor:
    """z in the potential's dtype, in which the solve runs; only half precision is cast.

    Raises:
        ArgumentTypeError: another dtype than the potential's, or a potential in half precision.
        ArgumentError: another device than the potential's, or no values at all.
    """
    model = _a_tensor(net)
    if model is not None and model.device != z.device:
        raise ArgumentError(
            f"{name}: lies on {z.device}, but the potential on {model.device}; move one of them with .to(device)"
        )
    if z.is_meta:
        raise ArgumentError(f"{name}: lies on the meta device, where tensors have no values; make it with device='cpu'")
    dtype = model.dtype if model is not None else torch.float32 if z.dtype in _HALF else z.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentTypeError(
            f"{name if model is None else 'potential'}: expected float32 or float64, got {dtype}; a solve needs the "
            "precision, so call .float() on it (autocast around the rest of the model is fine)"
        )
    if z.dtype == dtype:
        return z
    if z.dtype not in _HALF:
        fix = f"{name}.to({dtype})" + (f" or flow.to({z.dtype})" if z.is_floating_point() else "")
        raise ArgumentTypeError(f"{name}: has dtype {z.dtype}, but the potential {dtype}; use {fix}")
    return z.to(dtype)
