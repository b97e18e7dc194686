"""`PotentialFlow`: latent evolution dz/dt = Σ_k w_k (∇u_k + r_k)(z, t) as one module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .checks import positive_int
from .errors import ArgumentError, ArgumentTypeError
from .fields import Divergence, Dynamics, Part, Rows, VelocityField, in_dtype_of, rademacher_like
from .hub import Pretrained
from .modes import concrete, full_precision, ordinary
from .potentials.autograd import Compiled
from .potentials.base import is_closed, takes_context, value
from .potentials.checks import check_module
from .selection import SelectionLike, parse_selection, select_at
from .solenoidal import SolenoidalPart, solenoidal_part
from .solve import Solve, Solver, State, as_solver
from .solve.programs import Programs
from .solve.tableau import tableau
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
        log_mass_change: log m_t − log m_0 = ∫ g dt, (N, B); None without a growth.
    """

    t: Tensor
    z: Tensor
    log_density_change: Tensor | None
    kinetic_energy: Tensor | None
    nfe: int
    steps: int
    log_mass_change: Tensor | None = None


class PotentialFlow(Pretrained):
    r"""Flows along gradients of K potentials, and fields without divergence beside them, integrated by torchdiffeq.

    .. math:: dz/dt = Σ_k w_k (∇u_k + r_k)(z, t), \quad d \log q(z(t), t)/dt = −Δ Σ_k w_k u_k(z, t)

    As ∇·r_k = 0, densities change with the potentials alone, along paths of the whole velocity.

    Every call takes a selection `k`, times `t` in frames, and optionally a `context`:

    * `k`: None (one flow), an int, an integer tensor (B,), float weights (K,) or (B, K) (a superposition: any
      sign, not normalised), or a `Schedule`.
    * `t`: a pair of numbers or of (B,) tensors, a list or 1-D tensor of times, or (N, B) per-sample times; each
      row monotone, decreasing times run backwards.
    * `context`: a tensor (B, …) handed to a user's potential as net(z, t, context).

    Gradients flow to z, k, t, the switch times of a Schedule, the context and all parameters. The solve runs in the
    parts' dtype (float32 or float64) with autocast off. Under an adaptive solver the rows of a batch share their
    steps; under a fixed-step one they are independent (but for the implicit Adams methods, whose corrector stops by a
    tolerance of the whole batch).

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167.
        Chen, Rubanova, Bettencourt, Duvenaud: Neural Ordinary Differential Equations, 2018, arXiv:1806.07366.

    Arguments:
        potential: a cflow potential, or any module net(z (B, D), t (B,)) -> (B, K), or (B,) for one flow. K is its
            attribute `num_flows`, or read from its first output. None: there is no gradient part.
        solenoidal: r, a `SkewLinear`, a `Solenoidal` or a sum of them, of the same D and K. None: there is no such
            part.
        solver: a `Solver`, or the name of a method.
        divergence: "exact": the Laplacian (in closed form for cflow's potentials, else D second derivatives).
            "hutchinson": one Rademacher probe, drawn from the global generator and held fixed for a solve. It estimates
            only what is expensive: of an MLPPotential one term, of other cflow potentials nothing.
        compile: run the derivatives of a user's module through `torch.compile`; closed forms stay as they are. The
            first solves then take seconds; where no compiler works they warn and run uncompiled. Not differentiable
            twice. "step": whole steps of an explicit Runge-Kutta method as one program each, and their gradients under
            the mode "discrete", of modules and closed forms. It is for many solves of the same batch size: a program
            takes up to 20 seconds to compile; then a module of the user's is four times as fast at D=16 and twice at
            D=64, a closed form 1.4 to 1.7 and 1.1 to 1.3 times. Integrals, times that want a gradient, a norm of your
            own, and transformations of PyTorch run uncompiled. Eight kinds of step, of other shapes say, are
            compiled; then a warning says that the rest is not. What a module reads beside arguments, tensors of its
            own and attributes (globals, contents of arrays, attributes of objects that are neither modules nor
            dataclasses) stays as it was when it was compiled.

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
        potential: nn.Module | None,
        *,
        solenoidal: SolenoidalPart | None = None,
        solver: Solver | str = "dopri5",
        divergence: Divergence = "exact",
        compile: bool | Literal["step"] = False,
    ) -> None:
        super().__init__()
        if potential is not None:
            check_module(potential)
        elif solenoidal is None:
            raise ArgumentError(
                "potential: None leaves nothing that moves; give a potential, or solenoidal=cflow.SkewLinear(…) too"
            )
        if divergence not in ("exact", "hutchinson"):
            raise ArgumentError(f"divergence: expected 'exact' or 'hutchinson', got {divergence!r}")
        self.net = potential
        self.solenoidal = None if solenoidal is None else solenoidal_part(solenoidal)
        self.solver = as_solver(solver)
        self.divergence_estimator: Divergence = divergence
        if compile not in (False, True, "step"):
            raise ArgumentError(f"compile: expected False, True or 'step', got {compile!r}")
        self.compiled = Compiled() if compile is True else None
        self.programs = _programs(self.solver) if compile == "step" else None
        for name in ("dim", "num_flows"):
            sizes = [getattr(part, name, None) for part in (self.net, self.solenoidal)]
            if None not in sizes and sizes[0] != sizes[1]:
                raise ArgumentError(
                    f"solenoidal: has {name}={sizes[1]}, but the potential {name}={sizes[0]}; make them agree"
                )
        num_flows = self.declared("num_flows")
        self._num_flows = None if num_flows is None else positive_int("num_flows", num_flows)
        # closed forms do what they declare; to ask them would leave an empty region in an exported program
        closed = (self.net is None or is_closed(self.net)) and (self.solenoidal is None or self.solenoidal.is_closed)
        self._called = closed and self._num_flows is not None

    def declared(self, name: Literal["dim", "num_flows"]) -> int | None:
        """D or K, from an attribute of that name of the potential or the solenoidal part; None where neither has it."""
        size: int | None = getattr(self.net, name, None)
        return size if size is not None or self.solenoidal is None else getattr(self.solenoidal, name)

    @property
    def dim(self) -> int:
        """Latent dimensions D, where `declared`."""
        dim = self.declared("dim")
        if dim is None:
            raise ArgumentError(
                f"potential: {type(self.net).__name__} does not say its dimension; set its attribute dim"
            )
        return int(dim)

    @property
    def num_flows(self) -> int:
        """Number of flows K, where `declared`, or from a first output."""
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
        growth: nn.Module | None = None,
        context: Tensor | None = None,
    ) -> FlowPath:
        """Integrate from z0 (B, D) through the times t; see `FlowPath` for what comes back.

        Arguments:
            z0: states at the first time, (B, D).
            k, t, context: see the class.
            log_density: also integrate −∇·v.
            kinetic_energy: also integrate ½‖v‖² |dt|.
            growth: a module g(z (B, D), t (B,)) -> (B,), the rate at which members multiply: also integrate
                d log m/dt = g. Its parameters get gradients.
        """
        if growth is not None and not isinstance(growth, nn.Module):
            raise ArgumentTypeError(
                f"growth: expected an nn.Module g(z (B, D), t (B,)) -> (B,), got {type(growth).__name__}"
            )
        asked = {"log_density": log_density, "kinetic_energy": kinetic_energy}
        integrals = tuple(name for name, wanted in asked.items() if wanted)
        return self._solve(z0, k, t, context, integrals=integrals, growth=growth)

    def _solve(
        self,
        z0: Tensor,
        k: SelectionLike,
        t: TimesLike | None,
        context: Tensor | None,
        *,
        integrals: tuple[str, ...] = (),
        growth: nn.Module | None = None,
        through: Literal["all", "ends", "ends backwards"] = "all",
    ) -> FlowPath:
        """`solve` through all times, of which the ends must be two where only they are wanted, or in reverse."""
        backwards = through == "ends backwards"
        with full_precision(_device(z0)):
            z0, context = self._state(z0, context, "z1" if backwards else "z0")
            batch = z0.shape[0]  # not len(z0), which an exported program would keep
            with concrete():
                times = parse_times(_given(t), batch=batch, least=1 if through == "all" else 2)
                times = times.reversed() if backwards else times
            num_flows = self.num_flows_at(z0, times.values[0], context)
            selection = parse_selection(k, batch=batch, num_flows=num_flows, like=z0)
            state = State(z0.shape[1], integrals, riding=0 if growth is None else 1)
            if batch == 0:  # no adaptive solver would accept that
                y, solve = state.start(z0).expand(len(times), 0, -1), None
            else:
                probe = rademacher_like(z0) if self._wants_probe and state.needs_divergence else None
                programs = self.programs if growth is None else None
                dynamics = Dynamics(
                    self.net, self.solenoidal, num_flows, self.compiled, growth, few_sizes=programs is not None
                )
                solve = Solve(dynamics, self.solver, state, selection, context, probe, programs)
                y = solve.run(z0, times)
        z, riding, found = state.unpack(y)
        return FlowPath(
            t=times.values.detach().double().to(z0.device, z0.dtype),
            z=z,
            log_density_change=found.get("log_density"),
            kinetic_energy=found.get("kinetic_energy"),
            nfe=solve.costs.nfe if solve else 0,
            steps=solve.costs.steps if solve else 0,
            log_mass_change=None if growth is None else riding[..., 0],
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
        self,
        z: Tensor,
        k: SelectionLike = None,
        t: TimesLike | None = None,
        context: Tensor | None = None,
        *,
        part: Part | None = None,
    ) -> Tensor:
        """v (B, D) = Σ_k w_k (∇u_k + r_k)(z, t) at z (B, D) and a time t, a number or (B,).

        Arguments:
            part: "gradient" for Σ_k w_k ∇u_k alone, "solenoidal" for Σ_k w_k r_k; zero where the flow has none. They
                are the two terms, no Helmholtz decomposition of v: r may happen to be a gradient.
        """
        with full_precision(_device(z)):
            if part is not None and not self._has(part):
                return torch.zeros_like(self._point(z, k, t, context)[0])
            z, t, rows, field = self._point(z, k, t, context, part)
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
        """u (B, K) of all flows at z (B, D) and a time t, a number or (B,).

        Raises:
            ArgumentError: the flow has no potential.
        """
        if self.net is None:
            raise ArgumentError("potential: this flow has none, it is PotentialFlow(None, …); give it one to ask for u")
        with full_precision(_device(z)):
            z, context = self._state(z, context, "z")
            u = value(self.net, z, parse_instant(_given(t), batch=len(z), like=z), context)
            self._num_flows = u.shape[1]
            return u

    # --- arguments ----------------------------------------------------------------------------------------

    def _has(self, part: Part) -> bool:
        if part not in ("gradient", "solenoidal"):
            raise ArgumentError(f"part: expected 'gradient', 'solenoidal' or None for the whole, got {part!r}")
        return (self.net if part == "gradient" else self.solenoidal) is not None

    @property
    def _wants_probe(self) -> bool:
        return self.divergence_estimator == "hutchinson"

    def num_flows_at(self, z: Tensor, t: Tensor, context: Tensor | None) -> int:
        """K. A user's module is called once, at z (B, D), t () or (B,) and the context, to learn or to check it."""
        if self._num_flows is None or not (self._called or z.shape[0] == 0):
            counts = []
            with torch.no_grad():
                if self.net is not None and (self._num_flows is None or not is_closed(self.net)):
                    counts.append(value(self.net, z, t.to(z.device, z.dtype), context).shape[1])
                if self.solenoidal is not None:
                    counts.append(self.solenoidal.flows_at(z, t, context))
            if len(set(counts)) > 1:
                raise ArgumentError(
                    f"solenoidal: has {counts[1]} flows, but the potential {counts[0]}; give both the same number"
                )
            self._num_flows = counts[0] if counts else self._num_flows
            self._called = True
        return self._num_flows  # type: ignore[return-value]

    def _point(
        self, z: Tensor, k: SelectionLike, t: TimesLike | None, context: Tensor | None, part: Part | None = None
    ) -> tuple[Tensor, Tensor, Rows, VelocityField]:
        """State, time, rows and field of an evaluation at one time."""
        z, context = self._state(z, context, "z")
        batch = len(z)
        instant = parse_instant(_given(t), batch=batch, like=z)
        num_flows = self.num_flows_at(z, instant, context)
        chosen, seen = select_at(k, instant, batch=batch, num_flows=num_flows, like=z)
        dynamics = Dynamics(self.net, self.solenoidal, num_flows)
        if part is not None:
            dynamics = dynamics.only(part)
        rows = dynamics.rows(chosen, z, seen.ndim > 0)
        return z, seen, rows, dynamics.field(rows, context)

    def _state(self, z: Tensor, context: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
        """Check z and the context against the parts of the flow; cast a half-precision z to their dtype."""
        if not isinstance(z, Tensor):
            raise ArgumentTypeError(f"{name}: expected a tensor (B, D), got {type(z).__name__}")
        if z.ndim != 2:
            hint = "; add a batch dimension with z[None]" if z.ndim == 1 else "; flatten the leading dimensions"
            raise ArgumentError(f"{name}: expected shape (B, D), got {tuple(z.shape)}{hint}")
        dim = self.declared("dim")
        if dim is not None and z.shape[1] != dim:
            raise ArgumentError(f"{name}: expected shape (B, D) with D = {dim}, got {tuple(z.shape)}")
        z = in_dtype_of(z, self.net, self.solenoidal, name)
        if context is not None:
            self._check_takes_context()
            if not isinstance(context, Tensor) or context.ndim == 0 or len(context) != len(z):
                got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
                raise ArgumentError(f"context: expected a tensor (B, …) with B = {len(z)}, got {got}")
            context = ordinary(context.to(z.device))
        return ordinary(z), context

    def _check_takes_context(self) -> None:
        parts = [part for part in (self.net, self.solenoidal) if part is not None]
        if not any(part.takes_context if isinstance(part, SolenoidalPart) else takes_context(part) for part in parts):
            names = " and ".join(type(part).__name__ for part in parts)
            raise ArgumentError(f"context: {names} takes none; write a module net(z, t, context)")


def _programs(solver: Solver) -> Programs:
    table = tableau(solver.method)
    if table is None or table.reuses_last or solver.gradient_mode(log_density=False) != "discrete":
        raise ArgumentError(
            "compile: 'step' is for explicit Runge-Kutta methods whose steps each begin anew, such as 'dopri5' and "
            f"'rk4', under gradient='discrete' or 'auto', got {solver}; take one of these, or leave compile out"
        )
    return Programs()


def _device(z: object) -> str:
    return z.device.type if isinstance(z, Tensor) and not z.is_meta else "cpu"


def _given(t: TimesLike | None) -> TimesLike:
    if t is None:
        raise ArgumentTypeError(
            "t: expected times in frames, such as t=(0.0, 8.0), got none; the argument before it selects flows, so "
            "name the times where k is left out"
        )
    return t
