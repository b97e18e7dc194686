"""A potential in other units than those in which it was learned."""

from __future__ import annotations

from torch import Tensor, nn

from ..checks import finite, finite_number, positive_number
from ..errors import ArgumentError, ArgumentTypeError
from .autograd import Derivatives
from .base import Potential, field_of, value
from .field import Mixture


class RescaledPotential(Potential):
    r"""A potential that sees z and t in units of its own, and moves z in those of the data.

    .. math:: u(z, t) = \frac{s²}{c} u_0(y, τ), \quad y = \frac{z − m}{s}, \quad τ = \frac{t − t_0}{c}

    so that dz/dt = ∇u is dy/dτ = ∇u_0. Networks learn best where states have about unit variance and times are a few
    units apart; data rarely do.

    Arguments:
        potential: u_0, with attributes `dim` and `num_flows`.
        shift: m (D,), such as the mean of the data.
        scale: s > 0, such as their root mean square deviation.
        start: t_0.
        unit: c > 0.

    Raises:
        ArgumentTypeError: the potential is no module that says its D and K.
        ArgumentError: a shift of another shape, or a scale or unit that is not positive.

    Example:
        >>> import torch
        >>> from cflow import QuadraticPotential
        >>> inner = QuadraticPotential(torch.eye(2)[None])
        >>> u = RescaledPotential(inner, torch.tensor([100.0, 0.0]), scale=10.0, unit=2.0)
        >>> u.gradient(torch.tensor([[110.0, 0.0]]), torch.ones(1), torch.tensor(0.0))[0]
        tensor([[5., 0.]], grad_fn=<MulBackward0>)
    """

    shift: Tensor

    def __init__(
        self, potential: nn.Module, shift: Tensor, scale: float = 1.0, start: float = 0.0, unit: float = 1.0
    ) -> None:
        dim, num_flows = getattr(potential, "dim", None), getattr(potential, "num_flows", None)
        if not isinstance(potential, nn.Module) or dim is None or num_flows is None:
            raise ArgumentTypeError(
                "potential: expected a potential with attributes dim and num_flows, got "
                f"{type(potential).__name__}; set both attributes on your module"
            )
        super().__init__(dim, num_flows, getattr(potential, "time_dependent", True))
        if not isinstance(shift, Tensor) or shift.shape != (self.dim,):
            got = tuple(shift.shape) if isinstance(shift, Tensor) else type(shift).__name__
            raise ArgumentError(f"shift: expected a tensor (D,) = ({self.dim},), got {got}")
        finite("shift", shift)
        self.potential = potential
        self.register_buffer("shift", shift.detach().clone())
        self.scale, self.unit = positive_number("scale", scale), positive_number("unit", unit)
        self.start = finite_number("start", start)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z, t) of shape (B, K), for z (B, D) and t a scalar or (B,)."""
        return value(self.potential, *self._inside(z, t)) * (self.scale**2 / self.unit)

    def gradient(self, z: Tensor, w: Tensor, t: Tensor, *, laplacian: bool = False) -> Derivatives:
        """Return ∇_z Σ_k w_k u_k(z, t) and, if asked, the Laplacian of the same sum."""
        y, tau = self._inside(z, t)
        field = field_of(self.potential, Mixture(w, row_times=tau.ndim > 0))
        if not laplacian:
            return field.velocity(y, field.at(tau)) * (self.scale / self.unit), None
        v, divergence = field.with_divergence(None).velocity_and_divergence(y, field.at(tau))
        return v * (self.scale / self.unit), divergence / self.unit

    def _inside(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """y and τ."""
        return (z - self.shift) / self.scale, (t - self.start) / self.unit


def rescaled_to(potential: nn.Module, x: Tensor, t: Tensor) -> RescaledPotential:
    """A potential in the units of data x (N, D), seen at increasing times t (S,), S ≥ 2.

    Inside, all coordinates together have mean 0 and variance 1, and S times are S − 1 units apart.
    """
    mean = x.mean(0)
    scale = float((x - mean).square().mean().sqrt())
    unit = float(t[-1] - t[0]) / (len(t) - 1)
    return RescaledPotential(potential, mean, scale if scale > 0 else 1.0, float(t[0]), unit)
