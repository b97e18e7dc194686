"""What the leaderboard holds cflow's flows against: other ways to move a latent state, in the place of a flow.

Each stands where a `FlowVAE` has its flow, so that encoder, decoder, loss and metrics are the same. None of them sees
the time, so that a state depends on how long each selection has held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Never, cast

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

import cflow


class _NoPotential(nn.Module):
    """Stands for the potential of what has none."""

    def __init__(self, dim: int, num_flows: int) -> None:
        super().__init__()
        self.dim, self.num_flows = dim, num_flows

    def forward(self, z: Tensor, t: Tensor) -> Never:
        raise NotImplementedError("these dynamics have no potential")


class Dynamics(cflow.PotentialFlow):
    """Moves states without a potential; what a `FlowVAE` and its metrics ask of a flow, and densities of nothing."""

    def __init__(self, dim: int, num_flows: int) -> None:
        super().__init__(_NoPotential(dim, num_flows))

    def states(self, z0: Tensor, w: Tensor, since: Tensor) -> Tensor:
        """States (N, B, D) at times `since` (N, B) after z0 (B, D), which w (B, K) moves."""
        raise NotImplementedError

    def velocity(self, z: Tensor, k: Any = None, t: Any = None, context: Any = None, *, part: Any = None) -> Tensor:
        """v (B, D) at z (B, D); the time makes no difference."""
        raise NotImplementedError

    def weights(self, k: Any, like: Tensor) -> Tensor:
        """A selection, but no Schedule, as weights (B, K)."""
        flows, batch = self.num_flows, len(like)
        k = torch.as_tensor(0 if k is None else k, device=like.device)
        if not k.is_floating_point():
            k = nn.functional.one_hot(k.long(), flows)
        return k.to(like.dtype).expand(batch, flows)

    def trajectory(self, z0: Tensor, k: Any = None, t: Any = None, context: Any = None) -> Tensor:
        """States (N, B, D) at times t, (N,) or (N, B); within a Schedule, shared ones that increase."""
        times = times_of(t, z0)
        if not isinstance(k, cflow.Schedule):
            times = times if times.ndim == 2 else times[:, None].expand(-1, len(z0))
            return self.states(z0, self.weights(k, z0), times - times[0])
        found, z = z0.new_empty(len(times), *z0.shape), z0
        for piece, (begin, end) in enumerate(itertools.pairwise(k.times.to(times))):
            begin = torch.maximum(begin, times[0])
            inside = (times >= begin) & (times <= end)
            since = torch.cat([times[inside], end[None]]) - begin
            w = self.weights(k.selections[piece], z0)
            path = self.states(z, w, since[:, None].expand(-1, len(z0)))
            found[inside], z = path[:-1], path[-1]
        return found

    def forward(self, z0: Tensor, k: Any = None, t: Any = None, context: Any = None) -> Tensor:
        """The last of the states (B, D)."""
        return self.trajectory(z0, k, t)[-1]

    def solve(self, z0: Tensor, k: Any = None, t: Any = None, **asked: Any) -> cflow.FlowPath:
        """The states alone, as a path.

        Raises:
            ArgumentError: an integral is asked for.
        """
        if any(asked.get(name) for name in ("log_density", "kinetic_energy")):
            raise cflow.ArgumentError("log_density, kinetic_energy: these dynamics integrate neither; leave them out")
        return cflow.FlowPath(times_of(t, z0), self.trajectory(z0, k, t), None, None, nfe=0, steps=0)


def times_of(t: Any, like: Tensor) -> Tensor:
    """Times as a tensor; a `FlowVAE` hands them over as an object that holds them."""
    values = t if isinstance(t, (Tensor, Sequence)) else t.values
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


class LinearMap(Dynamics):
    r"""z_t = exp(t G_k) z_0 with an affine generator, by the matrix exponential; weights add generators up.

    .. math:: dz/dt = Σ_k w_k (M_k z + b_k), \quad G_k = \begin{pmatrix} M_k & b_k \\ 0 & 0 \end{pmatrix}

    A training asks for whole frames: one exponential a flow, applied again and again.

    Attributes:
        matrix: M (K, D, D).
        shift: b (K, D).
    """

    def __init__(self, dim: int, num_flows: int) -> None:
        super().__init__(dim, num_flows)
        self.matrix = nn.Parameter(0.1 / math.sqrt(dim) * torch.randn(num_flows, dim, dim))
        self.shift = nn.Parameter(torch.zeros(num_flows, dim))

    @property
    def generator(self) -> Tensor:
        """G (K, D+1, D+1)."""
        top = torch.cat([self.matrix, self.shift[..., None]], 2)
        return nn.functional.pad(top, (0, 0, 0, 1))

    def states(self, z0: Tensor, w: Tensor, since: Tensor) -> Tensor:
        """States (N, B, D), see `Dynamics`; times of one row have one sign."""
        sign = since[-1].sign()
        whole = since.abs().floor()
        rest = since.abs() - whole
        step = self._maps(w * sign[:, None])
        z = nn.functional.pad(z0, (0, 1), value=1.0)
        steps = [z]
        for _ in range(int(whole.max())):
            steps.append(torch.einsum("bij,bj->bi", step, steps[-1]))
        found = torch.stack(steps)[whole.long(), torch.arange(len(z0))]
        if bool((rest > 0).any()):
            maps = self._maps((w * sign[:, None] * rest[..., None]).flatten(0, 1)).view(*since.shape, *step.shape[1:])
            found = torch.einsum("nbij,nbj->nbi", maps, found)
        return found[..., :-1]

    def _maps(self, w: Tensor) -> Tensor:
        """exp(Σ w_k G_k) (B, D+1, D+1) of weights (B, K), each different one computed once."""
        different, of_row = w.detach().unique(dim=0, return_inverse=True)
        return torch.linalg.matrix_exp(torch.einsum("uk,kij->uij", different, self.generator))[of_row]

    def velocity(self, z: Tensor, k: Any = None, t: Any = None, context: Any = None, *, part: Any = None) -> Tensor:
        """Σ_k w_k (M_k z + b_k)."""
        w = self.weights(k, z)
        return torch.einsum("bk,kij,bj->bi", w, self.matrix, z) + w @ self.shift


class VelocityNetwork(Dynamics):
    """dz/dt = Σ_k w_k v_k(z), each v_k any network of two hidden layers of tanh; by rk4.

    Arguments:
        dim, num_flows: D and K.
        hidden: units of a hidden layer.
        step_size: of the solver, in frames.
    """

    def __init__(self, dim: int, num_flows: int, *, hidden: int = 64, step_size: float = 2.0) -> None:
        super().__init__(dim, num_flows)
        self.step_size = step_size
        sizes = (dim, hidden, hidden, dim)
        layers = [nn.Linear(a, num_flows * b) for a, b in itertools.pairwise(sizes)]
        self.matrices = nn.ParameterList(
            layer.weight.detach().view(num_flows, -1, a) for layer, a in zip(layers, sizes, strict=False)
        )
        self.biases = nn.ParameterList(layer.bias.detach().view(num_flows, 1, -1) for layer in layers)

    def velocity(self, z: Tensor, k: Any = None, t: Any = None, context: Any = None, *, part: Any = None) -> Tensor:
        """Σ_k w_k v_k(z)."""
        return self._velocity(z, self.weights(k, z))

    def _velocity(self, z: Tensor, w: Tensor) -> Tensor:
        h = z.expand(self.num_flows, *z.shape)
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            h = torch.baddbmm(bias, h.tanh() if i else h, matrix.mT)
        return torch.einsum("bk,kbd->bd", w, h)

    def states(self, z0: Tensor, w: Tensor, since: Tensor) -> Tensor:
        """States (N, B, D), see `Dynamics`; every row has steps of its own length."""
        found = [z0]
        for length in since.diff(dim=0):
            steps = max(math.ceil(float(length.detach().abs().max()) / self.step_size - 1e-9), 1)
            z = torchdiffeq.odeint(
                lambda _, z, length=length: length[:, None] * self._velocity(z, w),
                found[-1],
                since.new_tensor([0.0, 1.0]),
                method="rk4",
                options={"step_size": 1 / steps},
            )
            found.append(z[-1])
        return torch.stack(found)


# --- a map inferred from each sequence ----------------------------------------------------------------------------


class InferredMap(Dynamics):
    r"""A linear map that the first two latents of a sequence determine, by least squares; nobody names k.

    .. math:: M = \arg\min_M ‖M Z_0 − Z_1‖² + ε ‖M − I‖², \quad Z_t = M^t Z_0, \quad Z ∈ R^{a×m}, \; a m = D

    The state is (Z_t, Z_{t+1}), (B, 2D), of which `FirstHalf` decodes the first. Maps are of whole frames.

    References:
        Miyato, Koyama, Fukumizu: Unsupervised learning of equivariant structure from sequences, 2022, arXiv:2210.05972.

    Arguments:
        dim: D of one latent.
        rows: a, the size of the map.
    """

    def __init__(self, dim: int, rows: int, *, ridge: float = 1e-2) -> None:
        super().__init__(2 * dim, 1)
        self.rows, self.ridge = rows, ridge

    def states(self, z0: Tensor, w: Tensor, since: Tensor) -> Tensor:
        """States (N, B, 2D) at whole frames from the first on."""
        first, second = (half.unflatten(1, (self.rows, -1)) for half in z0.chunk(2, 1))  # type: ignore[no-untyped-call]
        eye = torch.eye(self.rows, dtype=z0.dtype, device=z0.device)
        gram = first @ first.mT + self.ridge * first.shape[-1] * eye
        step = eye + torch.linalg.solve(gram, first @ (second - first).mT).mT
        steps = [first]
        for _ in range(int(since.max()) + 1):
            steps.append(step @ steps[-1])
        path, rows = torch.stack(steps).flatten(2), torch.arange(len(z0))
        at = since.round().long()
        return torch.cat([path[at, rows], path[at + 1, rows]], -1)


class PairEncoder(nn.Module):
    """q(z_0|x_0) q(z_1|x_1) of frames (B, 2, …), over (B, 2D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Distribution:
        each = self.encoder(x.flatten(0, 1))
        mean, scale = (part.reshape(len(x), -1) for part in (each.mean, each.stddev))
        return Independent(Normal(mean, scale, validate_args=False), 1)


class FirstHalf(nn.Module):
    """A decoder of states (…, 2D) that sees their first half."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> Distribution:
        found: Distribution = self.decoder(z.chunk(2, -1)[0])
        return found


# --- a plain VAE whose latents change slowly ----------------------------------------------------------------------


def laplace_kl(q: Normal, before: Tensor, rate: float) -> Tensor:
    r"""KL(N(μ, σ²) ‖ Laplace(before, 1/rate)), elementwise.

    .. math:: E|z − m| = σ \sqrt{2/π}\, e^{−d²/2σ²} + d\, \mathrm{erf}(d / σ\sqrt2), \quad d = μ − m

    Example:
        >>> q, p = Normal(torch.tensor(0.3), torch.tensor(0.5)), torch.distributions.Laplace(0.0, 0.25)
        >>> z = q.sample((200_000,))
        >>> bool((laplace_kl(q, torch.zeros(()), 4.0) - (q.log_prob(z) - p.log_prob(z)).mean()).abs() < 0.02)
        True
    """
    d, s = q.mean - before, q.stddev
    away = s * math.sqrt(2 / math.pi) * (-0.5 * (d / s).square()).exp() + d * (d / (math.sqrt(2) * s)).erf()
    return rate * away - math.log(rate / 2) - q.entropy()


def slow_loss(vae: cflow.FlowVAE, x: Tensor, *, rate: float = 6.0) -> Tensor:
    r"""Minus the bound of a VAE of two frames x (B, 2, …) that follow each other, whose latents change slowly.

    .. math:: p(z_0) = N(0, I), \quad p(z_1|z_0) = \mathrm{Laplace}(z_0, 1/λ)

    References:
        Klindt, Schott, Sharma, Ustyuzhaninov, Brendel, Bethge, Paiton: Towards nonlinear disentanglement in natural
        data with temporal sparse coding (SlowVAE), 2020, arXiv:2007.10930; λ = 6 is theirs.
    """
    first, second = (cast(Independent, vae.posterior(x[:, i])) for i in range(2))
    z = [q.rsample() for q in (first, second)]
    log_likelihood = vae.log_prob_frames(x.transpose(0, 1), torch.stack(z)).sum(0)
    start = Independent(Normal(torch.zeros_like(z[0]), 1.0), 1)
    kl = kl_divergence(first, start) + laplace_kl(cast(Normal, second.base_dist), z[0], rate).sum(-1)
    return (kl - log_likelihood).mean()


def fit_afterwards(vae: cflow.FlowVAE, z: Tensor, k: Tensor, *, steps: int, lr: float = 3e-3) -> None:
    """Fit the flow of a model, and nothing else, to latents z (T+1, B, D) at whole frames, of transformations k (B,).

    The least squares of all frames, from the encoding of the first.
    """
    parameters = list(vae.flow.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    t = torch.arange(float(len(z)))
    for _ in range(steps):
        rows = torch.randint(z.shape[1], (256,))
        loss = (vae.flow.trajectory(z[0, rows], k[rows], t) - z[:, rows]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
