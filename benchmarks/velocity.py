"""What a velocity costs beside the bare matrix products of the same shapes.

    python benchmarks/velocity.py            # prints a table
    python benchmarks/velocity.py --json velocity.json

Everything is timed in one process, interleaved, on one thread (batch 128, float32); medians are reported. Only the
ratios mean anything on another machine. "mlp, written out" is the velocity in the fewest PyTorch operations that we
know, without a check of any argument: what a call of the public API could come down to.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from common import Call, Timing, interleave, machine, one_line, threads, write_json
from marks import SIZES, products
from problems import Size

import cflow


def written_out(net: cflow.MLPPotential, z: torch.Tensor, w: torch.Tensor, t: float) -> torch.Tensor:
    """∇ Σ w_k u_k (B, D) of weights (B, K) at a time t, with tanh(a) = 2σ(2a) − 1 and what depends on t in place."""
    times, flows, half = net.time, net.num_flows, math.sqrt(0.5)
    assert times is not None
    w1, w2, times_derivative = net.w1, net.w2, torch.ops.aten.sigmoid_backward.grad_input
    w2t = w2.mT
    s = torch.addcmul(times.phase, torch.full((), t), times.frequency).sin_()
    y = torch.addmv(times.b1, times.w1, s, beta=half, alpha=half)
    y = torch.addcmul(y, y, torch.erf(y)).view(flows, 1, -1)
    bias = torch.baddbmm(net.b2, torch.baddbmm(times.b2, y, times.w2.mT, alpha=half).sub_(1), w2t)
    c = torch.add(net.a, net.a, alpha=15) * w.mT.unsqueeze(-1)
    s1 = torch.addmm(net.b1, z, w1.mT, beta=2, alpha=2).sigmoid_().view(-1, flows, net.hidden).transpose(0, 1)
    s2 = torch.baddbmm(bias, s1, w2t, beta=2, alpha=4).sigmoid_()
    p = torch.bmm(times_derivative(c, s2, grad_input=s2), w2)
    return torch.mm(times_derivative(p, s1, grad_input=s1).transpose(0, 1).flatten(1), w1)


def measure(size: Size, rounds: int) -> dict[str, Timing]:
    """Times for one size, the bare products first."""
    z, w = torch.randn(size.batch, size.dim), torch.randn(size.batch, size.num_flows)
    k = torch.randint(size.num_flows, (size.batch,))
    net = cflow.MLPPotential(size.dim, size.num_flows)
    mlp = cflow.PotentialFlow(net)
    ridge = cflow.PotentialFlow(cflow.RidgePotential(size.dim, size.num_flows))
    calls: dict[str, Call] = {
        "products": products(size),
        "mlp, written out": lambda: written_out(net, z, w, 0.5),
        "mlp, weights": lambda: mlp.velocity(z, w, 0.5),
        "mlp, k per sample": lambda: mlp.velocity(z, k, 0.5),
        "ridge, weights": lambda: ridge.velocity(z, w, 0.5),
    }
    with torch.no_grad():
        torch.testing.assert_close(written_out(net, z, w, 0.5), mlp.velocity(z, w, 0.5))
        return interleave(calls, device=torch.device("cpu"), rounds=rounds)


def main(words: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds (default 40)")
    args = parser.parse_args(words)
    torch.manual_seed(0)
    described = machine(torch.device("cpu"))
    print(f"{one_line(described)}, one thread")
    rows = []
    with threads(1):
        for size in SIZES:
            seconds = measure(size, args.rounds)
            base = seconds.pop("products")
            ratios = "   ".join(f"{name} {timing.over(base).median:5.2f}×" for name, timing in seconds.items())
            print(f"{size!s:<14s}products {base.median * 1e6:7.0f} µs   {ratios}")
            documents = {name: timing.document() for name, timing in [("products", base), *seconds.items()]}
            rows.append({"size": str(size), "seconds": documents})
    if args.json:
        write_json(args.json, {"benchmark": "velocity", "machine": described, "rows": rows})


if __name__ == "__main__":
    main()
