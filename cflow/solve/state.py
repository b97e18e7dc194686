"""What a solve integrates: z, and beside it what was asked for, one more column each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

Rate = float | Tensor  # dt/ds: the time of rows against the solver's clock, a number, () or (R, 1)
Cotangents = tuple[Tensor | float, Tensor | float, Tensor | float]


class Integral(ABC):
    """One more quantity that is integrated along the path.

    Attributes:
        needs_divergence: whether its derivative reads ∇·v.
    """

    needs_divergence = False

    @abstractmethod
    def derivative(self, v: Tensor, divergence: Tensor | None, rate: Rate) -> Tensor:
        """Its derivative (R, 1) by the solver's clock, from v (R, D) and ∇·v (R,)."""

    @abstractmethod
    def vjp(self, v: Tensor, divergence: Tensor | None, rate: Rate, cotangent: Tensor) -> Cotangents:
        """Cotangents of v (R, D), ∇·v (R,) and the rate (R, 1), from that of the derivative, (R, 1)."""


class LogDensity(Integral):
    """d log q/dt = −∇·v."""

    needs_divergence = True

    def derivative(self, v: Tensor, divergence: Tensor | None, rate: Rate) -> Tensor:
        return _column(divergence) * -rate

    def vjp(self, v: Tensor, divergence: Tensor | None, rate: Rate, cotangent: Tensor) -> Cotangents:
        return 0.0, (cotangent * -rate)[:, 0], -_column(divergence) * cotangent


class KineticEnergy(Integral):
    """½‖v‖² |dt|, which grows in either direction of time."""

    def derivative(self, v: Tensor, divergence: Tensor | None, rate: Rate) -> Tensor:
        speed = v.square().sum(-1, keepdim=True)
        return 0.5 * speed * _absolute(rate)

    def vjp(self, v: Tensor, divergence: Tensor | None, rate: Rate, cotangent: Tensor) -> Cotangents:
        sign = torch.as_tensor(rate, device=v.device).sign()
        return _absolute(rate) * cotangent * v, 0.0, 0.5 * sign * v.square().sum(-1, keepdim=True) * cotangent


def _absolute(rate: Rate) -> Tensor | float:
    return rate.abs() if isinstance(rate, Tensor) else abs(rate)


def _column(divergence: Tensor | None) -> Tensor:
    if divergence is None:
        raise RuntimeError("no divergence was evaluated; please report this as a bug of cflow")
    return divergence[:, None]


INTEGRALS: dict[str, Integral] = {"log_density": LogDensity(), "kinetic_energy": KineticEnergy()}


@dataclass(frozen=True)
class State:
    """Rows (R, D + riding + E): z, what rides with it, and a column for each of E integrals.

    Attributes:
        dim: latent dimensions D.
        names: the integrals, of `INTEGRALS`.
        riding: columns between z and the integrals that the field moves along with z, such as a logarithm of mass.
        samples: the row (B,) of each sample, where rows are sorted and filled up; None: the batch as it is.
    """

    dim: int
    names: tuple[str, ...] = ()
    samples: Tensor | None = None
    riding: int = 0

    @property
    def integrals(self) -> list[Integral]:
        """The integrals, in the order of their columns."""
        return [INTEGRALS[name] for name in self.names]

    @property
    def needs_divergence(self) -> bool:
        """Whether any of them does."""
        return any(integral.needs_divergence for integral in self.integrals)

    @property
    def moved(self) -> int:
        """Columns that the field moves: those of z, and what rides with it."""
        return self.dim + self.riding

    def start(self, z: Tensor) -> Tensor:
        """The state that starts at z (R, D), or at what the field moves, (R, D + riding)."""
        more = self.moved + len(self.names) - z.shape[1]
        return torch.cat([z, z.new_zeros(len(z), more)], 1) if more else z

    def z(self, y: Tensor) -> Tensor:
        """What the field moves, z and what rides with it, (…, D + riding), of states (…, D + riding + E)."""
        return y[..., : self.moved] if self.names else y

    def unpack(self, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """z (…, D), what rides with it (…, riding) and the integrals (…) of states (…, D + riding + E)."""
        integrals = {name: y[..., self.moved + i] for i, name in enumerate(self.names)}
        return y[..., : self.dim] if y.shape[-1] > self.dim else y, y[..., self.dim : self.moved], integrals

    def derivative(self, v: Tensor, divergence: Tensor | None, rate: Rate) -> Tensor:
        """d(state)/ds (R, D + riding + E), from what the field says, v (R, D + riding)."""
        of_z = v[:, : self.dim] if self.riding else v
        return torch.cat([v * rate, *(x.derivative(of_z, divergence, rate) for x in self.integrals)], 1)

    def vjp(
        self, v: Tensor, divergence: Tensor | None, rate: Rate, cotangent: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Cotangents of v (R, D + riding), ∇·v (R,) and the rate (R, 1), from that of the derivative."""
        grad_z, columns = cotangent[:, : self.moved], cotangent[:, self.moved :, None].unbind(1)
        grad_v, grad_rate = grad_z * rate, (v * grad_z).sum(-1, keepdim=True)
        grad_divergence: Tensor | float = 0.0
        of_z = v[:, : self.dim] if self.riding else v
        for integral, column in zip(self.integrals, columns, strict=True):
            to_v, to_divergence, to_rate = integral.vjp(of_z, divergence, rate, column)
            if self.riding and isinstance(to_v, Tensor):  # integrals read nothing of what rides
                to_v = torch.nn.functional.pad(to_v, (0, self.riding))
            grad_v, grad_rate = grad_v + to_v, grad_rate + to_rate
            grad_divergence = grad_divergence + to_divergence
        return grad_v, grad_divergence if isinstance(grad_divergence, Tensor) else None, grad_rate
