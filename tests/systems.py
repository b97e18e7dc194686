"""Systems with exact flows, most of them under any weights, and a plain loop that chains them through schedules.

`chain` is what a solve must return: it knows nothing of cflow, walks sample by sample from time to time, stops at
each boundary of a schedule, and is differentiable in everything.
"""

import itertools
import math

import cases
import numpy as np
import torch
from torch import Tensor, nn

import cflow


class System:
    """A potential `net` and maybe a `solenoidal` part, starts on which the flow is known, and that for one sample.

    `flow(z (N, D), w (K,), t0, t1 (N,), context (D,))` returns the states at t1 and ∫ ∇·v dt;
    `velocity(z (N, D), w (K,), t (N,), context)` is written by hand, for the kinetic energy.
    """

    net: nn.Module | None = None
    solenoidal: nn.Module | None = None
    takes_context = False

    def model(self, **settings) -> cflow.PotentialFlow:
        return cflow.PotentialFlow(self.net, solenoidal=self.solenoidal, **settings)

    @property
    def num_flows(self) -> int:
        return self.model().num_flows

    def start(self, batch: int) -> Tensor:
        return torch.randn(batch, self.model().dim)

    def frozen(self) -> "System":
        """The same, with parameters that ask for no gradient."""
        self.net.requires_grad_(False)
        return self

    def solution(self, z: Tensor, t0, t1) -> tuple[Tensor, Tensor]:
        """States and log-density changes at t1 of a system with one flow; t0, t1 are numbers or (B,)."""
        t0, t1 = (torch.as_tensor(t, dtype=z.dtype).expand(len(z)) for t in (t0, t1))
        z1, growth = self.flow(z, z.new_ones(1), t0, t1)
        return z1, -growth


def affine(z: Tensor, matrix: Tensor, shift: Tensor, t) -> Tensor:
    """exp of dz/dt = A z + b over a time t, for one sample (D,) or a batch (B, D); a batch may have times (B,)."""
    corner = torch.cat([torch.cat([matrix, shift[:, None]], 1), matrix.new_zeros(1, len(shift) + 1)])
    e = torch.linalg.matrix_exp(corner * torch.as_tensor(t)[..., None, None])
    return (e[..., :-1, :-1] @ z[..., None])[..., 0] + e[..., :-1, -1]


def symmetric(num_flows: int, dim: int, scale: float = 0.3) -> Tensor:
    a = torch.randn(num_flows, dim, dim)
    return scale * (a + a.mT) / math.sqrt(dim)


class Affine(System):
    """u_k = ½ zᵀA_k z + b_k·z."""

    def __init__(self):
        self.net = cflow.QuadraticPotential(0.4 * torch.randn(3, 3, 3), torch.randn(3, 3))

    def generator(self, w):
        matrix = torch.einsum("k,kij->ij", w, 0.5 * (self.net.matrix + self.net.matrix.mT))
        return matrix, w @ self.net.shift

    def clock(self, t):
        """The time that the affine flow sees, and its rate."""
        return t, torch.ones_like(t)

    def flow(self, z, w, t0, t1, context=None):
        matrix, shift = self.generator(w)
        span = self.clock(t1)[0] - self.clock(t0)[0]
        return affine(z, matrix, shift, span), matrix.trace() * span

    def velocity(self, z, w, t, context=None):
        matrix, shift = self.generator(w)
        return (z @ matrix.mT + shift) * self.clock(t)[1][:, None]


class FadingAffineNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim, self.num_flows = 2, 3
        self.matrix, self.shift = nn.Parameter(0.8 * torch.randn(3, 2, 2)), nn.Parameter(torch.randn(3, 2))
        self.c = nn.Parameter(torch.tensor(1.5))

    def forward(self, z, t):
        u = 0.5 * torch.einsum("bi,kij,bj->bk", z, self.matrix, z) + z @ self.shift.mT
        return u / (self.c + t)[:, None]


class FadingAffine(Affine):
    """u_k = (½ zᵀA_k z + b_k·z) / (c + t), a user's module: time runs like log(c + t), so does the Laplacian."""

    def __init__(self):
        self.net = FadingAffineNet()

    def clock(self, t):
        return (self.net.c + t).log(), 1 / (self.net.c + t)


class BreathingNet(nn.Module):
    def __init__(self, a, omega):
        super().__init__()
        self.num_flows, self.dim = a.shape
        self.a, self.omega = nn.Parameter(a), nn.Parameter(omega)

    def forward(self, z, t):
        return 0.5 * torch.cos(t[:, None] * self.omega) * (z.square() @ self.a.mT)


class Breathing(System):
    """u_k = ½ cos(ω_k t) Σ_i a_ki z_i²: each flow has a Laplacian with a rhythm of its own."""

    def __init__(self, a: Tensor | None = None, omega: Tensor | None = None):
        self.net = BreathingNet(
            torch.randn(2, 3) if a is None else a, torch.tensor([1.3, -0.7]) if omega is None else omega
        )

    def flow(self, z, w, t0, t1, context=None):
        net = self.net
        phase = (torch.sin(t1[:, None] * net.omega) - torch.sin(t0[:, None] * net.omega)) / net.omega
        growth = (w * phase) @ net.a
        return z * growth.exp(), growth.sum(-1)

    def velocity(self, z, w, t, context=None):
        return ((w * torch.cos(t[:, None] * self.net.omega)) @ self.net.a) * z


def pulsing(dim: int) -> Breathing:
    """u = ½ cos(t) ‖z‖²: z(t) = z0 exp(sin t − sin t0)."""
    return Breathing(torch.ones(1, dim), torch.ones(1))


class RadialNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim, self.num_flows = 3, 2
        self.rate, self.c = nn.Parameter(torch.tensor([0.6, -0.4])), nn.Parameter(torch.tensor(2.0))

    def forward(self, z, t, context):
        s = (z - context).square().sum(-1)
        return (0.5 * s - 0.25 * s**2)[:, None] * self.rate * (self.c * t).cos()[:, None]


class Radial(System):
    """dz/dt = r(t) y (1 − ‖y‖²) with y = z − context and r(t) = Σ w_k r_k cos(c t): not separable, not linear.

    ‖y‖² follows a logistic curve, so y(t) = y0 e^τ/√q with q = 1 − s + s e^{2τ}, s = ‖y0‖² and τ = ∫ r dt. A step
    across is e^τ/√q long and one outwards e^τ/q^{3/2}, so log det = D τ − (D + 2)/2 log q.
    """

    takes_context = True

    def __init__(self):
        self.net = RadialNet()

    def start(self, batch):
        return 0.5 * torch.rand(batch, 3) - 0.25  # ‖z − context‖ < 1, where no direction of time blows up

    def flow(self, z, w, t0, t1, context):
        net, y = self.net, z - context
        tau = (w @ net.rate) * (torch.sin(net.c * t1) - torch.sin(net.c * t0)) / net.c
        s = y.square().sum(-1)
        q = 1 - s + s * (2 * tau).exp()
        return context + y * (tau.exp() / q.sqrt())[:, None], 3 * tau - 2.5 * q.log()

    def velocity(self, z, w, t, context):
        y, rate = z - context, (w @ self.net.rate) * torch.cos(self.net.c * t)
        return rate[:, None] * y * (1 - y.square().sum(-1, keepdim=True))


class Ridges(System):
    """A `RidgePotential` on orthonormal directions Q shared by its flows: with y = Q z + b, dy/dt = a tanh y.

    sinh y grows like exp(a t), and log det = Σ log (cosh y0 / cosh y1) + a t.
    """

    def __init__(self):
        self.net = cflow.RidgePotential(3, 2, hidden=3, time_dependent=False)
        self.q, self.b = torch.linalg.qr(torch.randn(3, 3))[0], torch.randn(3)
        with torch.no_grad():
            self.net.w.copy_(self.q.repeat(2, 1))
            self.net.b.copy_(self.b.repeat(2))
        self.net.w.requires_grad_(False)  # free to move they would leave the orthonormal ones that we can solve
        self.net.b.requires_grad_(False)

    def flow(self, z, w, t0, t1, context=None):
        y, growth = z @ self.q.mT + self.b, (w @ self.net.a) * (t1 - t0)[:, None]
        y1 = torch.asinh(torch.sinh(y) * growth.exp())
        return (y1 - self.b) @ self.q, (growth + torch.cosh(y).log() - torch.cosh(y1).log()).sum(-1)

    def velocity(self, z, w, t, context=None):
        return ((w @ self.net.a) * torch.tanh(z @ self.q.mT + self.b)) @ self.q


class LogisticNet(nn.Module):
    num_flows = 1

    def __init__(self, rate):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, z, t):
        return self.rate * (z - z**3 / 3).sum(-1)  # (B,): one flow


class Logistic(System):
    """One flow, dz/dt = r (1 − z²) in each coordinate: artanh z = y0 + r t, and ∂z/∂z0 = cosh² y0 / cosh² y."""

    def __init__(self, rate: float = 0.4):
        self.net = LogisticNet(rate)

    def start(self, batch):
        return 1.6 * torch.rand(batch, 2) - 0.8

    def flow(self, z, w, t0, t1, context=None):
        y0 = torch.atanh(z)
        y = y0 + w * self.net.rate * (t1 - t0)[:, None]
        return torch.tanh(y), 2 * (y0.cosh().log() - y.cosh().log()).sum(-1)

    def velocity(self, z, w, t, context=None):
        return w * self.net.rate * (1 - z.square())


class ScaleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim, self.num_flows = 3, 3
        self.beta = nn.Parameter(torch.randn(3))

    def forward(self, z, t):
        return 0.5 * z.square().sum(-1, keepdim=True) * self.beta * t[:, None]


class Sum(Affine):
    """A `QuadraticPotential` without shift plus a user's ½ β_k t ‖z‖², which commutes with it."""

    def __init__(self):
        self.net = cflow.QuadraticPotential(0.4 * torch.randn(3, 3, 3)) + ScaleNet()

    def generator(self, w):
        matrix = self.net.terms[0].matrix
        return torch.einsum("k,kij->ij", w, 0.5 * (matrix + matrix.mT)), torch.zeros(3)

    def flow(self, z, w, t0, t1, context=None):
        z1, change = super().flow(z, w, t0, t1)
        growth = (w @ self.net.terms[1].beta) * (t1**2 - t0**2) / 2
        return z1 * growth.exp()[:, None], change + 3 * growth

    def velocity(self, z, w, t, context=None):
        return super().velocity(z, w, t) + (w @ self.net.terms[1].beta) * t[:, None] * z


class AnyLinear(Affine):
    """u_k = ½ zᵀS_k z + b_k·z beside A_k (z − c_k): every linear map is the sum of a symmetric and a skew one."""

    def __init__(self):
        super().__init__()
        self.solenoidal = cases.skew(3, 3)

    def generator(self, w):
        (matrix, shift), (turn, turned_shift) = super().generator(w), turning(self.solenoidal, w)
        return matrix + turn, shift + turned_shift


class Rotation(Affine):
    """A_k (z − c_k) of low rank alone: one flow turns about c_k."""

    def __init__(self):
        self.solenoidal = cases.skew(5, 2, rank=1)

    def generator(self, w):
        return turning(self.solenoidal, w)


def turning(part: cflow.SkewLinear, w: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and the shift of Σ w_k A_k (z − c_k), written by hand."""
    if part.rank is None:
        a = part.matrix - part.matrix.mT
    else:
        a = torch.einsum("kir,kjr->kij", part.p, part.q) - torch.einsum("kir,kjr->kij", part.q, part.p)
    return torch.einsum("k,kij->ij", w, a), -torch.einsum("k,kij,kj->i", w, a, part.center)


class RingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim, self.num_flows = 3, 4
        self.rho = nn.Parameter(torch.randn(4))  # of ψ_{k,m}, column 2 k + m

    def forward(self, z, t, context):
        return 0.5 * (z - context).square().sum(-1, keepdim=True) * self.rho * t[:, None]


class Spiral(Radial):
    """A `Radial` flow that turns about its context too: r = Σ_m A_m ∇ψ_{k,m} with ψ_{k,m} = ½ ρ_{k,m} t ‖y‖².

    The turns commute with it and leave ‖y‖ alone.
    """

    def __init__(self):
        super().__init__()
        self.solenoidal = cflow.Solenoidal(RingNet(), num_terms=2)

    def turn(self, w):
        b = self.solenoidal.matrix
        return torch.einsum("m,mij->ij", w @ self.solenoidal.psi.rho.view(2, 2), b - b.mT)

    def flow(self, z, w, t0, t1, context):
        z1, growth = super().flow(z, w, t0, t1, context)
        turned = torch.linalg.matrix_exp(self.turn(w) * ((t1**2 - t0**2) / 2)[:, None, None])
        return context + (turned @ (z1 - context)[..., None])[..., 0], growth

    def velocity(self, z, w, t, context):
        return super().velocity(z, w, t, context) + t[:, None] * (z - context) @ self.turn(w).mT


class Cubic(nn.Module):
    """dz/dt = z³ blows up at t = 1/(2 z0²)."""

    num_flows = 1

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return (z**4 / 4).sum(-1)


class Drift(nn.Module):
    """u_k = (c_k + d_k t)·z + context·z: translation by c (t1 − t0) + ½ d (t1² − t0²) + context (t1 − t0)."""

    def __init__(self, c: Tensor, d: Tensor) -> None:
        super().__init__()
        self.c, self.d = nn.Parameter(c), nn.Parameter(d)
        self.num_flows, self.dim = c.shape

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        u = z @ self.c.mT + t[:, None] * (z @ self.d.mT)
        return u if context is None else u + (context * z).sum(-1, keepdim=True)


SYSTEMS = [Affine, FadingAffine, Breathing, Radial, Ridges, Logistic, Sum, AnyLinear, Rotation, Spiral]

_NODES, _WEIGHTS = map(torch.tensor, np.polynomial.legendre.leggauss(48))


def chain(system: System, z0: Tensor, pieces, boundaries, clock, times, context=None):
    """States (N, B, D), log-density changes (N, B) and kinetic energies (N, B), by plain loops.

    Arguments:
        pieces: weights (S, B, K).
        boundaries: (S+1, B), or None for one piece that holds always.
        times: (N, B).
    """
    rows = []
    for b in range(len(z0)):
        z, change, energy = z0[b : b + 1], torch.zeros(1), torch.zeros(1)
        found = [(z, change, energy)]
        edges = None if boundaries is None else boundaries[:, b]
        c = None if context is None else context[b]
        for ta, tb in itertools.pairwise(times[:, b]):
            for piece, start, end in _stretches(edges, ta, tb):
                offset = edges[piece] if clock == "segment" else 0.0
                z, d_change, d_energy = _advance(system, z, pieces[piece, b], start - offset, end - offset, c)
                change, energy = change + d_change, energy + d_energy
            found.append((z, change, energy))
        rows.append([torch.cat(parts) for parts in zip(*found, strict=True)])
    return [torch.stack(parts, 1) for parts in zip(*rows, strict=True)]


def _stretches(edges, ta, tb):
    """(piece, start, end) of the ways from ta to tb that cross no boundary."""
    if edges is None:
        return [(0, ta, tb)]
    low, high = min(ta, tb), max(ta, tb)
    inside = [e for e in edges[1:-1] if low < e < high]
    knots = [ta, *(inside if tb >= ta else reversed(inside)), tb]
    last = len(edges) - 2
    return [(min(int((edges[1:-1] <= (a + b) / 2).sum()), last), a, b) for a, b in itertools.pairwise(knots)]


def _advance(system, z, w, ta, tb, context):
    z1, divergence = system.flow(z, w, ta[None], tb[None], context)
    t = ta + (tb - ta) * (_NODES + 1) / 2
    n = len(t)
    on_the_way = system.flow(z.expand(n, -1), w, ta.expand(n), t, context)[0]
    speed = system.velocity(on_the_way, w, t, context).square().sum(-1)
    energy = 0.5 * (_WEIGHTS / 2 * speed).sum() * (tb - ta).abs()
    return z1, -divergence, energy[None]


# --- every form of k and t, beside what it means ------------------------------------------------------------


def selections(batch: int, num_flows: int, lo=-1.0, hi=4.0) -> dict:
    """name → (k, pieces (S, B, K), boundaries (S+1, B) or None, clock). Schedules reach from lo to hi."""

    def one_hot(index):
        return torch.nn.functional.one_hot(torch.as_tensor(index), num_flows).double().expand(batch, num_flows)

    last, index = num_flows - 1, torch.arange(batch) % num_flows
    w, rows = torch.randn(num_flows), torch.randn(batch, num_flows)
    many, some = torch.randn(3, batch, num_flows), torch.randn(2, num_flows)
    shared = torch.tensor([lo, 0.6, 1.9, hi])
    own = torch.cat(
        [torch.full((1, batch), lo), torch.tensor([[0.3], [1.7]]) + torch.rand(2, batch), torch.full((1, batch), hi)]
    )
    mixed = torch.stack([one_hot(last), one_hot(index), w.expand(batch, -1)])
    found = {
        "int": (last, one_hot(last)[None], None, "absolute"),
        "numpy int": (np.int64(last), one_hot(last)[None], None, "absolute"),
        "scalar tensor": (torch.tensor(last), one_hot(last)[None], None, "absolute"),
        "index": (index, one_hot(index)[None], None, "absolute"),
        "numpy index": (index.to(torch.int32).numpy(), one_hot(index)[None], None, "absolute"),
        "weights": (w, w.expand(1, batch, -1), None, "absolute"),
        "weights of rows": (rows, rows[None], None, "absolute"),
        "schedule": (cflow.Schedule(shared.tolist(), [last, index, w]), mixed, shared, "absolute"),
        "schedule of tensors": (
            cflow.Schedule(shared[[0, 1, 3]], some), some[:, None].expand(2, batch, -1), shared[[0, 1, 3]], "absolute"
        ),
        "schedule, segment clock": (cflow.Schedule(shared, many, clock="segment"), many, shared, "segment"),
        "schedule of rows": (cflow.Schedule(own, many), many, own, "absolute"),
        "schedule of rows, segment clock": (
            cflow.Schedule(own, [last, index, w], clock="segment"), mixed, own, "segment"
        ),
    }  # fmt: skip
    if num_flows == 1:
        found["none"] = None, torch.ones(1, batch, 1), None, "absolute"
    return {
        name: (k, pieces, None if edges is None else edges.view(len(edges), -1).expand(-1, batch), clock)
        for name, (k, pieces, edges, clock) in found.items()
    }


def times(batch: int) -> dict:
    """name → (t, rows (N, B)), all within [0, 2.5]."""
    a, b = torch.linspace(0.2, 2.0, batch), torch.linspace(2.4, 0.1, batch)  # rows of both directions
    middle = torch.lerp(a, b, 0.3)
    found = {
        "pair": (0.2, 2.3),
        "backward": (2.1, 0.4),
        "pair of rows": (a, b),
        "number and rows": (0.1, b),
        "list": [0, 0.7, 0.7, 2],
        "numpy": np.array([2.5, 1.0, 0.0]),
        "tensor": torch.tensor([0.0, 1.5, 2.5]),
        "rows": torch.stack([a, middle, middle, b]),
    }
    return {
        name: (t, torch.stack([torch.as_tensor(x, dtype=torch.float64).expand(batch) for x in t]))
        for name, t in found.items()
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).abs() / (1 + exact.abs())).max().item() if found.numel() else math.nan
