"""`PotentialFlow`: latent evolution dz/dt = ∇_z Σ_k w_k u_k(z, t) as one module."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import base
from .errors import ArgumentError, ArgumentTypeError
from .fields import CompiledField, Divergence, Quantities, check_module, divergence_at, rademacher_like, velocity_at
from .kernels import lasting
from .problem import Problem
from .segments import Plan
from .selection import Selecting, parse_selection, select_at
from .solvers import Solver, as_solver
from .times import Times, parse_instant, parse_times

if TYPE_CHECKING:
    from .distributions import FlowTransform


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
        compile: run the velocity of solves through `torch.compile`. The first solves then take seconds; where no
            compiler works they warn and run uncompiled. Not differentiable twice.

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
        self.compiled = CompiledField() if compile else None
        num_flows = getattr(potential, "num_flows", None)
        self._num_flows = None if num_flows is None else base.positive_int("num_flows", num_flows)

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

    def forward(self, z0: Tensor, k: Selecting, t: Times, context: Tensor | None = None) -> Tensor:
        """End state (B, D) of the flow from z0 (B, D) at t[0] to t[-1]."""
        return self._solve(z0, k, t, context, least=2).z[-1]

    def inverse(self, z1: Tensor, k: Selecting, t: Times, context: Tensor | None = None) -> Tensor:
        """The state (B, D) at t[0] from which the flow reaches z1 (B, D) at t[-1]."""
        return self._solve(z1, k, t, context, least=2, backwards=True, name="z1").z[-1]

    def trajectory(self, z0: Tensor, k: Selecting, t: Times, context: Tensor | None = None) -> Tensor:
        """States (N, B, D) at all requested times; the first is z0."""
        return self._solve(z0, k, t, context).z

    def solve(
        self,
        z0: Tensor,
        k: Selecting,
        t: Times,
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
        return self._solve(z0, k, t, context, log_density=log_density, kinetic_energy=kinetic_energy)

    def _solve(
        self,
        z0: Tensor,
        k: Selecting,
        t: Times,
        context: Tensor | None,
        *,
        log_density: bool = False,
        kinetic_energy: bool = False,
        least: int = 1,
        backwards: bool = False,
        name: str = "z0",
    ) -> FlowPath:
        """`solve` through at least so many times, or through them in reverse, from a state of that name."""
        with _plain_mode(z0):
            z0, context = self._state(z0, context, name)
            batch = len(z0)
            times = parse_times(t, batch=batch, least=least)
            times = times.flip(0) if backwards else times
            self._learn_num_flows(z0, times[0], context)
            selection = parse_selection(k, batch=batch, num_flows=self.num_flows, like=z0)
            if batch == 0:
                return _empty_path(z0, times, log_density, kinetic_energy)
            probe = rademacher_like(z0) if log_density and self.divergence_estimator == "hutchinson" else None
            problem = Problem(
                self.net,
                self.num_flows,
                self.solver,
                Quantities(log_density, kinetic_energy, probe),
                Plan.make(times, selection),
                selection,
                self.compiled,
            )
            times = times.to(z0.device).double()
            z, *integrals = problem.solve(z0, times, context)
        ints = iter(integrals)
        return FlowPath(
            t=times.detach().to(z0.dtype),
            z=z,
            log_density_change=next(ints) if log_density else None,
            kinetic_energy=next(ints) if kinetic_energy else None,
            nfe=problem.integrator.nfe,
            steps=problem.integrator.steps,
        )

    def transform(self, k: Selecting, t: Times, context: Tensor | None = None, cache_size: int = 0) -> FlowTransform:
        """The flow from t[0] to t[-1] as a `torch.distributions.Transform` over vectors (…, D)."""
        from .distributions import FlowTransform

        return FlowTransform(self, k, t, context=context, cache_size=cache_size)

    # --- at one time --------------------------------------------------------------------------------------

    def velocity(self, z: Tensor, k: Selecting, t: Times, context: Tensor | None = None) -> Tensor:
        """v (B, D) = ∇_z Σ_k w_k u_k(z, t) at z (B, D) and a time t, a number or (B,)."""
        with _plain_mode(z):
            z, chosen, t, context = self._point(z, k, t, context)
            return velocity_at(self.net, self.num_flows, z, chosen, t, context)

    def divergence(self, z: Tensor, k: Selecting, t: Times, context: Tensor | None = None) -> Tensor:
        """∇·v (B,) at z (B, D) and a time t, a number or (B,); an estimate under divergence="hutchinson"."""
        with _plain_mode(z):
            z, chosen, t, context = self._point(z, k, t, context)
            probe = rademacher_like(z) if self.divergence_estimator == "hutchinson" else None
            return divergence_at(self.net, self.num_flows, z, chosen, t, context, probe)

    def potential(self, z: Tensor, t: Times, context: Tensor | None = None) -> Tensor:
        """u (B, K) of all flows at z (B, D) and a time t, a number or (B,)."""
        with _plain_mode(z):
            z, context = self._state(z, context, "z")
            u = base.value(self.net, z, self._instant(t, z), context)
            self._num_flows = u.shape[1]
            return u

    # --- arguments ----------------------------------------------------------------------------------------

    def _point(
        self, z: Tensor, k: Selecting, t: Times, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        z, context = self._state(z, context, "z")
        instant = self._instant(t, z)
        self._learn_num_flows(z, instant, context)
        chosen, seen = select_at(k, instant, batch=z.shape[0], num_flows=self.num_flows, like=z)
        return z, lasting(chosen), seen, context

    def _state(self, z: Tensor, context: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
        """Check z and the context against the potential; cast a half-precision z to the potential's dtype."""
        _batch(z, name)
        net = self.net
        dim = getattr(net, "dim", None)
        if dim is not None and z.shape[1] != dim:
            raise ArgumentError(f"{name}: expected shape (B, D) with D = {dim}, got {tuple(z.shape)}")
        z = _to_potential(z, net, name)
        if context is not None:
            if not base.is_users(net):
                raise ArgumentError(f"context: {type(net).__name__} takes none; write a module net(z, t, context)")
            if not isinstance(context, Tensor) or context.ndim == 0 or len(context) != len(z):
                got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
                raise ArgumentError(f"context: expected a tensor (B, …) with B = {len(z)}, got {got}")
            context = lasting(context.to(z.device))
        return lasting(z), context

    def _instant(self, t: Times, z: Tensor) -> Tensor:
        return lasting(parse_instant(t, batch=z.shape[0], like=z))

    def _learn_num_flows(self, z: Tensor, t: Tensor, context: Tensor | None) -> None:
        if self._num_flows is None:
            with torch.no_grad():
                self._num_flows = base.value(self.net, z, t.to(z.device, z.dtype), context).shape[1]


def _plain_mode(z: object) -> contextlib.AbstractContextManager[Any]:
    """Autocast off; and out of inference mode, where a gradient would silently be zero."""
    device = z.device.type if isinstance(z, Tensor) else "cpu"
    if not torch.is_inference_mode_enabled():
        if not torch.is_autocast_enabled(device):
            return contextlib.nullcontext()
        return torch.autocast(device, enabled=False)
    stack = contextlib.ExitStack()
    for mode in (torch.autocast(device, enabled=False), torch.inference_mode(False), torch.no_grad()):
        stack.enter_context(mode)
    return stack


def _batch(z: object, name: str = "z0") -> int:
    """B of a latent tensor (B, D)."""
    if not isinstance(z, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor (B, D), got {type(z).__name__}")
    if z.ndim != 2:
        hint = "; add a batch dimension with z[None]" if z.ndim == 1 else "; flatten the leading dimensions"
        raise ArgumentError(f"{name}: expected shape (B, D), got {tuple(z.shape)}{hint}")
    return z.shape[0]


_HALF = (torch.float16, torch.bfloat16)


def _to_potential(z: Tensor, net: nn.Module, name: str) -> Tensor:
    """z in the potential's dtype, in which the solve runs; only half precision is cast.

    Raises:
        ArgumentTypeError: another dtype than the potential's, or a potential in half precision.
        ArgumentError: another device than the potential's.
    """
    model = next((x for group in (net.parameters(), net.buffers()) for x in group if x.is_floating_point()), None)
    if model is not None and model.device != z.device:
        raise ArgumentError(
            f"{name}: lies on {z.device}, but the potential on {model.device}; move one of them with .to(device)"
        )
    dtype = model.dtype if model is not None else torch.float32 if z.dtype in _HALF else z.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentTypeError(
            f"{name if model is None else 'potential'}: expected float32 or float64, got {dtype}; a solve needs the "
            "precision, so call .float() on it (autocast around the rest of the model is fine)"
        )
    if z.dtype == dtype:
        return z
    if z.dtype not in _HALF:
        raise ArgumentTypeError(
            f"{name}: has dtype {z.dtype}, but the potential {dtype}; use {name}.to({dtype}) or flow.to({z.dtype})"
        )
    return z.to(dtype)


def _empty_path(z0: Tensor, times: Tensor, log_density: bool, kinetic_energy: bool) -> FlowPath:
    """The path of a batch of no samples, which no adaptive solver would accept."""
    n, zeros = len(times), z0.new_zeros(len(times), 0)
    t = times.detach().to(z0.device, z0.dtype)
    return FlowPath(
        t, z0.expand(n, *z0.shape), zeros if log_density else None, zeros if kinetic_energy else None, nfe=0, steps=0
    )
