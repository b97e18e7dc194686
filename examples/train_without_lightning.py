"""Train a flow-factorised VAE with a plain PyTorch loop: `python examples/train_without_lightning.py [steps]`.

Real handwritten digits (they come with scikit-learn), each image under a transformation of its own: scaling, rotation
or hue. At the end the error on held-out digits stands beside what trivial answers score. 600 steps take about half a
minute on one core; `cflow fit --config digits` does the same with Lightning, a larger model and checkpoints.
"""

from __future__ import annotations

import sys
import time

import torch

import cflow
from cflow.data import PAPER, make_sequence
from cflow.data.digits import load_digits

BATCH, LAST = 96, 8  # sequences a step; time of the last frame


def main(steps: int = 600) -> dict[str, float]:
    torch.manual_seed(0)
    train, test = (load_digits(split).float() / 255 for split in ("train", "test"))
    vae = cflow.nets.build_vae(latent_dim=32, width=256, num_flows=len(PAPER), potential="quadratic", step_size=2.0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    # The input and one frame at a random time, which counts for all the others: the objective stays unbiased.
    mask = torch.tensor([1.0, LAST]).expand(BATCH, 2)
    begin = time.perf_counter()
    for step in range(steps):
        x0, k = train[torch.randint(len(train), (BATCH,))], torch.randint(len(PAPER), (BATCH,))
        t = torch.stack([torch.zeros(BATCH), torch.randint(1, LAST + 1, (BATCH,)).float()], 1)  # (B, 2)
        elbo = vae.elbo(make_sequence(x0, k, t), k, t, mask)
        optimizer.zero_grad()
        elbo.loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - begin
            print(f"step {step:5d}  {seconds:5.1f} s  loss {elbo.loss:9.0f}  KL {elbo.kl:5.1f} nats", flush=True)
    return evaluate(vae.eval(), test)


def evaluate(vae: cflow.FlowVAE, test: torch.Tensor) -> dict[str, float]:
    """Print, for each transformation, the L1 error summed over frames 1..T beside the trivial answers."""
    result = {}
    print("equivariance error")
    for k, name in enumerate(PAPER):
        x = make_sequence(test, k, torch.arange(LAST + 1.0))
        errors = {"flow": cflow.metrics.equivariance_error(vae, x, k)} | cflow.metrics.baselines(vae, x, k)
        sums = {key: float(value.sum(0).mean()) for key, value in errors.items()}
        result |= {f"{key}/{name}": value for key, value in sums.items()}
        print(f"{name:10s}", "  ".join(f"{key} {value:6.0f}" for key, value in sums.items()))
    return result


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
