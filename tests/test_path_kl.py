"""Why the flows are continuous: trained on a path KL, one Euler step a frame learns to cheat, rk4 does not.

The path KL Σ_t E[log q_t(z_t) − log p_t(z_t)] is an expected log-ratio of densities and so at least 0, as long as
log q_t is the density of z_t. With z ← z + ∇u and log q ← log q − Δu it is not: log |det (I + H)| ≤ tr H for the
Hessian H of u, and the optimiser finds the gap.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import cflow
from cflow import PotentialFlow, Solver

DIM, FLOWS, FRAMES = 4, 2, 5
TIMES = torch.arange(FRAMES).float()


class Toy(nn.Module):
    """A sequence model around a flow: 8 numbers a frame, seen through a tanh of a hidden point that drifts or grows."""

    def __init__(self, solver: Solver) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2 * DIM))
        self.decoder = nn.Sequential(nn.Linear(DIM, 32), nn.Tanh(), nn.Linear(32, 8))
        self.flow = PotentialFlow(cflow.MLPPotential(DIM, FLOWS, hidden=16), solver=solver)
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

    def loss(self, x: Tensor, k: Tensor) -> Tensor:
        z, log_q, path_kl = self.path_kl(x[0], k)
        kl = log_q[0] - Normal(0.0, 1.0).log_prob(z[0]).sum(-1)
        reconstruction = Normal(self.decoder(z), 0.3).log_prob(x).sum((0, -1))
        return (kl + path_kl.sum(0) - reconstruction).mean()


def sequences(batch: int, mixing: Tensor) -> tuple[Tensor, Tensor]:
    k, hidden = torch.randint(FLOWS, (batch,)), torch.randn(batch, 3)
    t = TIMES[:, None, None] / FRAMES
    moved = torch.where((k == 0)[:, None], hidden + t, hidden * (1 + t))
    return torch.tanh(moved @ mixing), k


def trained(solver: Solver, steps: int) -> tuple[Toy, Tensor]:
    torch.manual_seed(0)
    mixing, model = torch.randn(3, 8), Toy(solver)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        model.loss(*sequences(64, mixing)).backward()
        optimiser.step()
    return model, mixing


@pytest.mark.slow
def test_rk4_keeps_the_path_kl_honest_and_euler_does_not():
    found = {}
    for method in ("rk4", "euler"):
        model, mixing = trained(Solver(method, step_size=1.0), steps=600)
        x, k = sequences(4000, mixing)
        with torch.no_grad():
            _, log_q, path_kl = model.path_kl(x[0], k)
            per_sequence = path_kl.mean(0)
            error = per_sequence.std() / len(per_sequence) ** 0.5
            found[method] = float(per_sequence.mean() + 3 * error)
            torch.manual_seed(1)
            _, log_q, _ = model.path_kl(x[0], k)
            torch.manual_seed(1)
            precise = PotentialFlow(model.flow.net, solver=Solver("dopri8", rtol=1e-6, atol=1e-6))
            _, exact, _ = model.path_kl(x[0], k, precise)
            found[method + " log q"] = float((log_q - exact).abs().mean() / exact.abs().mean())
    print(found)
    assert found["rk4"] >= 0
    assert found["rk4 log q"] < 0.01
    assert found["euler"] < 0
