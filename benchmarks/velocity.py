"""What a velocity costs beside the bare matrix products of the same shapes.

    python benchmarks/velocity.py

Everything is timed in one process, interleaved, on one thread (batch 128, float32); medians are reported. Only the
ratios mean anything on another machine. "mlp, written out" is the velocity in the fewest PyTorch operations that we
know, without a check of any argument: what a call of the public API could come down to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from evaluations import products
from marks import SIZES
from measuring import Call, Timing, interleave, threads
from original import frequencies
from problems import Size
from report import command_line, machine, one_line, write_json
from torch import Tensor

import cflow


def features(net: cflow.MLPPotential) -> tuple[Tensor, Tensor]:
    """Frequencies and phases of the time features sin(phase + t · frequency): sines, then cosines."""
    frequency = frequencies(net)
    return torch.cat([frequency, frequency]), torch.cat([0 * frequency, 0 * frequency + math.pi / 2])


def written_out(net: cflow.MLPPotential, frequency: Tensor, phase: Tensor, z: Tensor, w: Tensor, t: float) -> Tensor:
    """∇ Σ w_k u_k (B, D) of weights (B, K) at a time t, with tanh(a) = 2σ(2a) − 1 and what depends on t in place."""
    times, flows, half = net.time, net.num_flows, math.sqrt(0.5)
    assert times is not None
    w1, w2, times_derivative = net.w1, net.w2, torch.ops.aten.sigmoid_backward.grad_input
    w2t = w2.mT
    s = torch.addcmul(phase, torch.full((), t, device=z.device), frequency).sin_()
    y = torch.addmv(times.b1, times.w1, s, beta=half, alpha=half)
    y = torch.addcmul(y, y, torch.erf(y)).view(flows, 1, -1)
    bias = torch.baddbmm(net.b2, torch.baddbmm(times.b2, y, times.w2.mT, alpha=half).sub_(1), w2t)
    c = torch.add(net.a, net.a, alpha=15) * w.mT.unsqueeze(-1)
    s1 = torch.addmm(net.b1, z, w1.mT, beta=2, alpha=2).sigmoid_().view(-1, flows, net.hidden).transpose(0, 1)
    s2 = torch.baddbmm(bias, s1, w2t, beta=2, alpha=4).sigmoid_()
    p = torch.bmm(times_derivative(c, s2, grad_input=s2), w2)
    return torch.mm(times_derivative(p, s1, grad_input=s1).transpose(0, 1).flatten(1), w1)


def measure(size: Size, device: torch.device, rounds: int) -> dict[str, Timing]:
    """Times for one size, the bare products first."""
    z, w = torch.randn(size.batch, size.dim, device=device), torch.randn(size.batch, size.num_flows, device=device)
    k = torch.randint(size.num_flows, (size.batch,), device=device)
    net = cflow.MLPPotential(size.dim, size.num_flows).to(device)
    mlp = cflow.PotentialFlow(net)
    ridge = cflow.PotentialFlow(cflow.RidgePotential(size.dim, size.num_flows).to(device))
    bare = partial(written_out, net, *features(net), z, w, 0.5)
    calls: dict[str, Call] = {
        "products": products(size, device),
        "mlp, written out": bare,
        "mlp, weights": lambda: mlp.velocity(z, w, 0.5),
        "mlp, k per sample": lambda: mlp.velocity(z, k, 0.5),
        "ridge, weights": lambda: ridge.velocity(z, w, 0.5),
    }
    with torch.no_grad():
        torch.testing.assert_close(bare(), mlp.velocity(z, w, 0.5))
        return interleave(calls, device=device, rounds=rounds)


def main(words: Sequence[str] | None = None) -> None:
    """Run and print."""
    args = command_line(__doc__, "velocity", rounds=40).parse_args(words)
    torch.manual_seed(0)
    described = machine(args.device)
    print(f"{one_line(described)}, one thread")
    rows = []
    with threads(1):
        for size in SIZES:
            seconds = measure(size, args.device, args.rounds)
            base = seconds.pop("products")
            ratios = "   ".join(f"{name} {timing.over(base).median:5.2f}×" for name, timing in seconds.items())
            print(f"{size!s:<14s}products {base.median * 1e6:7.0f} µs   {ratios}")
            documents = {name: timing.document() for name, timing in [("products", base), *seconds.items()]}
            rows.append({"size": str(size), "seconds": documents})
    write_json(args.json, {"benchmark": "velocity", "machine": described, "rows": rows})


if __name__ == "__main__":
    main()
