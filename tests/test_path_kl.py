"""Why the flows are continuous: trained on a path KL, one Euler step a frame learns to cheat, rk4 does not.

The path KL Σ_t E[log q_t(z_t) − log p_t(z_t)] is an expected log-ratio of densities and so at least 0, as long as
log q_t is the density of z_t. With z ← z + ∇u and log q ← log q − Δu it is not: log |det (I + H)| ≤ tr H for the
Hessian H of u, and the optimiser finds the gap.
"""

import pytest
import torch
from cases import tight
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import cflow
from cflow import PotentialFlow, Solver

DIM, FLOWS, FRAMES = 8, 2, 5
TIMES = torch.arange(FRAMES).float()


class Toy(nn.Module):
    """A sequence model around a flow: 8 numbers a frame, seen through a tanh of a hidden point that drifts or grows."""

    def __init__(self, solver: Solver) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2 * DIM))
        self.decoder = nn.Sequential(nn.Linear(DIM, 32), nn.Tanh(), nn.Linear(32, 8))
        self.flow = PotentialFlow(cflow.MLPPotential(DIM, FLOWS, hidden=64), solver=solver)
        self.prior = cflow.DiffusionPrior(DIM, FLOWS)

    def posterior(self, x0: Tensor) -> Independent:
        mean, raw = self.encoder(x0).chunk(2, -1)
        return Independent(Normal(mean, nn.functional.softplus(raw) + 1e-3), 1)

    def path_kl(self, x0: Tensor, k: Tensor, flow: PotentialFlow | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """States (T+1, B, D), log q_t (T+1, B), and log q_t − log p_t (T, B) of the frames 1..T."""
        posterior = self.posterior(x0)
        z0 = posterior.rsample()
        path = (flow or self.flow).solve(z0, k, TIMES, log_density=True)
        log_q = posterior.log_prob(z0) + path.log_density_change
        log_p = self.prior(k, TIMES[:, None]).log_prob(path.z)
        return path.z, log_q, (log_q - log_p)[1:]

    def loss(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What to minimise, and the path KL a frame of each sequence (B,)."""
        z, log_q, path_kl = self.path_kl(x[0], k)
        kl = log_q[0] - Normal(0.0, 1.0).log_prob(z[0]).sum(-1)
        reconstruction = Normal(self.decoder(z), 0.5).log_prob(x).sum((0, -1))
        return (kl + path_kl.sum(0) - reconstruction).mean(), path_kl.detach().mean(0)


def sequences(batch: int, mixing: Tensor) -> tuple[Tensor, Tensor]:
    k, hidden = torch.randint(FLOWS, (batch,)), torch.randn(batch, 3)
    t = TIMES[:, None, None] / FRAMES
    moved = torch.where((k == 0)[:, None], hidden + t, hidden * (1 + t))
    return torch.tanh(moved @ mixing), k


def trained(solver: Solver, steps: int) -> tuple[Toy, Tensor, Tensor]:
    """A model after some steps of Adam, the data's mixing matrix, and the path KL a frame in the last steps."""
    mixing, model, late = torch.randn(3, 8), Toy(solver), []
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimiser.zero_grad()
        loss, path_kl = model.loss(*sequences(64, mixing))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
        if step >= steps - 50:
            late.append(path_kl)
    return model, mixing, torch.cat(late)


def upper_bound(path_kl: Tensor) -> float:
    """Mean plus three standard errors."""
    return float(path_kl.mean() + 3 * path_kl.std() / len(path_kl) ** 0.5)


@pytest.mark.slow
def test_rk4_keeps_the_path_kl_honest():
    model, mixing, late = trained(Solver("rk4", step_size=1.0), steps=350)
    assert upper_bound(late) >= 0
    precise = PotentialFlow(model.flow.net.double(), solver=tight())
    model.double()
    x, k = sequences(200, mixing)
    with torch.no_grad():
        log_q = []
        for flow in (model.flow, precise):
            torch.manual_seed(1)  # the same draws of the posterior
            log_q.append(model.path_kl(x[0].double(), k, flow)[1])
            assert upper_bound(model.path_kl(x[0].double(), k, flow)[2].mean(0)) >= 0
    assert (log_q[0] - log_q[1]).abs().mean() < 0.01 * log_q[1].abs().mean()


@pytest.mark.slow
def test_euler_finds_the_gap():
    _, _, late = trained(Solver("euler", step_size=1.0), steps=350)
    assert upper_bound(late) < -10
