r"""Populations whose motion is known: members climb a potential u(y, t), with or without noise.

.. math:: dy = b(y, t)\,dt + σ\,dW, \quad b = ∇u \quad ⟹ \quad ∂_t p = −∇·(p\,b) + ½σ²Δp = −∇·(p\,v),
    \quad v = b − ½σ²∇\log p

since p ∇log p = ∇p. Snapshots know only p, so that v, not b, is the truth that a flow is compared with; it is a
gradient where b is one.

Things happen in planes, two coordinates each, for which log p is found on a grid. Further coordinates are copies of the
plane, or relax linearly, Gaussian for all time; and all are hidden behind a rotation. That keeps v known in any D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Drift = Callable[[Tensor, float], Tensor]  # y (N, 2), t -> b (N, 2)
STEP = 0.01  # of the simulator
REACH = 3.0  # of the grid, on either side of the origin
SPREAD = 0.5  # at time 0, of coordinates that relax


@dataclass(frozen=True)
class Plane:
    """What happens in two coordinates.

    Attributes:
        drift: b(y, t).
        start: means (M, 2) of the Gaussians, of equal weight, that the population is at time 0.
        width: their standard deviation.
        copies: whether all coordinates come in such planes; else those after the first two relax.
        steady: whether b does not depend on t.
    """

    drift: Drift
    start: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    width: float = 0.4
    copies: bool = False
    steady: bool = True


def climbing(u: Callable[[Tensor, Tensor, float], Tensor]) -> Drift:
    """∇u of a potential u(y_1, y_2, t) (N,)."""

    def drift(y: Tensor, t: float) -> Tensor:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            return torch.autograd.grad(u(y[:, 0], y[:, 1], t).sum(), y)[0]

    return drift


def double_well(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Summits at x = ±1."""
    return x.square() - 0.5 * x**4 - 0.25 * y.square()


def moving_trap(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Linear far from a summit on its way along a circle: who is behind has a speed of at most 1.5."""
    away = (x - 1.5 * math.sin(1.5 * t)).square() + (y - 1.5 * (1 - math.cos(1.5 * t))).square()
    return -1.5 * (1 + away).sqrt()


def splitting(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Waddington's landscape: on the way along y one ridge becomes two, at x = ±√(1.5 tanh y)."""
    return y + 0.75 * y.tanh() * x.square() - 0.25 * x**4


def styblinski_tang(x: Tensor, y: Tensor, t: float) -> Tensor:
    """The function of Styblinski and Tang (1990), turned over, in halves of its unit: two summits a coordinate."""
    return -sum((0.5 * ((2 * v) ** 4 - 16 * (2 * v) ** 2 + 5 * (2 * v)) for v in (x, y)), torch.zeros_like(x)) / 32


def double_exponential(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Two pits at ±(1, 1): JKOnet*'s sum of two exponentials, in thirds of its unit."""
    return -2 * sum((torch.exp(-9 * ((x - m).square() + (y - m).square()) / 20) for m in (1, -1)), torch.zeros_like(x))


def turning(y: Tensor, t: float) -> Tensor:
    """One radian a unit of time about the origin, and a drift: no gradient, as its Jacobian is skew."""
    return torch.stack([-y[:, 1] + 0.5, y[:, 0]], 1)


PLANES = {
    "double well": Plane(climbing(double_well), start=((0.15, 0.8),)),
    "moving trap": Plane(climbing(moving_trap), start=((-0.5, 0.0),), width=0.5, steady=False),
    "splitting": Plane(climbing(splitting), start=((0.05, -0.8),), width=0.3),
    "Styblinski-Tang": Plane(climbing(styblinski_tang), start=((0.1, 0.1),), copies=True),
    "double exponential": Plane(climbing(double_exponential), start=((0.2, -0.1),)),
    "turning": Plane(turning, start=((1.0, 0.0), (1.6, 0.4), (0.8, -1.0)), width=0.25),
    "turning, round": Plane(turning, start=((0.8, 0.0),), width=0.5),
}


class Truth:
    """A population in D coordinates, float64.

    Arguments:
        plane: what happens in the first two.
        dim: D, even.
        sigma: σ of the noise.
        cells: of the grid on which log p is found, each way.
    """

    def __init__(self, plane: Plane, dim: int, sigma: float, cells: int = 150) -> None:
        self.plane, self.dim, self.sigma, self.cells = plane, dim, sigma, cells
        self.rates = torch.linspace(0.1, 0.3, dim - 2, dtype=torch.float64)
        normal = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
        self.basis = torch.linalg.qr(normal)[0] if dim > 2 else torch.eye(2, dtype=torch.float64)

    def hidden(self, z: Tensor) -> Tensor:
        """Coordinates y (N, D) of members z (N, D)."""
        return z.double() @ self.basis

    def draw(self, n: int, times: Sequence[float], seed: int) -> list[Tensor]:
        """The same n members (n, D) at increasing times ≥ 0, by Heun's method, which is of weak order 2 here."""
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(n, self.dim, generator=generator, dtype=torch.float64)

        middle = torch.tensor(self.plane.start, dtype=torch.float64)
        planes = self.dim // 2 if self.plane.copies else 1
        chosen = torch.randint(len(middle), (n, planes), generator=generator)
        y, moving = SPREAD * normal(), 2 * planes
        y[:, :moving] = self.plane.width * y[:, :moving] / SPREAD + middle[chosen].flatten(1)
        now, seen = 0.0, []
        for time in times:
            steps = max(1, math.ceil((time - now) / STEP - 1e-9))
            dt = (time - now) / steps
            for _ in range(steps):
                noise = self.sigma * math.sqrt(dt) * normal()
                before = self.drift(y, now)
                after = self.drift(y + dt * before + noise, now + dt)
                y, now = y + 0.5 * dt * (before + after) + noise, now + dt
            now = time
            seen.append(y @ self.basis.mT)
        return seen

    def drift(self, y: Tensor, t: float) -> Tensor:
        """b(y, t) (N, D)."""
        if self.plane.copies:
            return self.plane.drift(y.reshape(-1, 2), t).view_as(y)
        return torch.cat([self.plane.drift(y[:, :2], t), -self.rates * y[:, 2:]], 1)

    def velocity(self, z: Tensor, t: float) -> Tensor:
        """v(z, t) (N, D), what moves the density: b without noise."""
        y = self.hidden(z)
        v = self.drift(y, t)
        if self.sigma:
            v = v - 0.5 * self.sigma**2 * self.score(y, t)
        return v @ self.basis.mT

    def score(self, y: Tensor, t: float) -> Tensor:
        """∇log p (N, D) in hidden coordinates."""
        grid = density(self.plane, self.sigma, self.cells).log(t)
        if self.plane.copies:
            return gradient(grid, y.reshape(-1, 2)).view_as(y)
        faded = torch.exp(-2 * self.rates * t)
        variance = SPREAD**2 * faded + self.sigma**2 / (2 * self.rates) * (1 - faded)
        return torch.cat([gradient(grid, y[:, :2]), -y[:, 2:] / variance], 1)


# --- the density of a plane, on a grid ------------------------------------------------------------------------------


class Density:
    r"""log p(y, t) at the middles of cells × cells squares, by finite volumes; no member crosses the border.

    Between two cells at distance h the flux is that of a drift that is constant between them, D/h (B(−w) p_left −
    B(w) p_right) with D = ½σ², w = b h/D, B(w) = w/(e^w − 1): positive under any drift, and exact for stationary ones.

    References:
        Scharfetter and Gummel: Large-signal analysis of a silicon Read diode oscillator, 1969.
    """

    def __init__(self, plane: Plane, sigma: float, cells: int) -> None:
        self.plane, self.cells, self.diffusion = plane, cells, 0.5 * sigma**2
        away = (_points(cells, 0.0, 0.0)[:, None] - torch.tensor(plane.start, dtype=torch.float64)).square().sum(-1)
        p = (-0.5 * away / plane.width**2).exp().sum(1).view(cells, cells)
        self.kept = {0.0: p / (p.sum() * (2 * REACH / cells) ** 2)}

    def log(self, t: float) -> Tensor:
        """log p (cells, cells) at a time ≥ 0, found from the nearest one before it that was asked for."""
        if t not in self.kept:
            early = max(time for time in self.kept if time < t)
            self.kept[t] = self._later(self.kept[early], early, t)
        return self.kept[t].clamp_min(1e-300).log()

    def _later(self, p: Tensor, early: float, t: float) -> Tensor:
        rates = _rates(self.plane, early, self.cells, self.diffusion)
        # a cell must not lose more in one step than it holds; rates of a drift that changes may grow by a fifth
        steps = math.ceil(1.2 * 4 * max(float(rate.max()) for rate in rates) * (t - early))
        dt = (t - early) / steps
        for i in range(steps):
            if not self.plane.steady:
                rates = _rates(self.plane, early + (i + 0.5) * dt, self.cells, self.diffusion)
            once = p + dt * _change(p, rates)
            p = 0.5 * (p + once + dt * _change(once, rates))
        return p


@functools.cache
def density(plane: Plane, sigma: float, cells: int) -> Density:
    """The one density of a plane, for all who ask."""
    return Density(plane, sigma, cells)


def _points(cells: int, x: float, y: float) -> Tensor:
    """The middles of all squares (cells², 2), shifted by parts x and y of one."""
    middle = (torch.arange(cells, dtype=torch.float64) + 0.5) * 2 * REACH / cells - REACH
    return torch.cartesian_prod(middle + x * 2 * REACH / cells, middle + y * 2 * REACH / cells)


def _rates(plane: Plane, t: float, cells: int, diffusion: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rates (cells, cells) at which a cell gives: up and down along the first coordinate, then along the second."""
    h, found = 2 * REACH / cells, []
    for axis in (0, 1):
        shift = (0.5, 0.0) if axis == 0 else (0.0, 0.5)
        w = plane.drift(_points(cells, *shift), t)[:, axis].view(cells, cells) * h / diffusion
        small = w.abs() < 1e-6
        safe = torch.where(small, 1.0, w)
        back = torch.where(small, 1 - w / 2, safe / torch.expm1(safe))  # B(w); B(−w) = B(w) + w
        found += [diffusion / h**2 * (back + w), diffusion / h**2 * back]
    return found[0], found[1], found[2], found[3]


def _change(p: Tensor, rates: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    change = torch.zeros_like(p)
    first = (rates[0] * p)[:-1] - rates[1][:-1] * p[1:]
    change[:-1] -= first
    change[1:] += first
    second = (rates[2] * p)[:, :-1] - rates[3][:, :-1] * p[:, 1:]
    change[:, :-1] -= second
    change[:, 1:] += second
    return change


def gradient(grid: Tensor, y: Tensor) -> Tensor:
    """∇ of a function on the grid at points y (N, 2): central differences, interpolated linearly."""
    h = 2 * REACH / len(grid)
    slopes = torch.stack(torch.gradient(grid, spacing=h), -1)
    place = ((y + REACH) / h - 0.5).clamp(1, len(grid) - 2 - 1e-9)
    low = place.floor().long()
    part = place - low
    total = torch.zeros_like(y)
    for i in (0, 1):
        for j in (0, 1):
            weight = (part[:, 0] if i else 1 - part[:, 0]) * (part[:, 1] if j else 1 - part[:, 1])
            total += weight[:, None] * slopes[low[:, 0] + i, low[:, 1] + j]
    return total
