"""What a velocity costs beside the bare matrix products of the same shapes.

    python benchmarks/velocity.py            # prints a table
    python benchmarks/velocity.py --json velocity.json

Everything is timed in one process, interleaved, on one thread (batch 128, float32); medians are reported. Only the
ratios mean anything on another machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import Call, Timing, interleave, machine, one_line, threads, write_json
from marks import SIZES, products
from problems import Size

import cflow


def measure(size: Size, rounds: int) -> dict[str, Timing]:
    """Times for one size, the bare products first."""
    z, w = torch.randn(size.batch, size.dim), torch.randn(size.batch, size.num_flows)
    k = torch.randint(size.num_flows, (size.batch,))
    mlp = cflow.PotentialFlow(cflow.MLPPotential(size.dim, size.num_flows))
    ridge = cflow.PotentialFlow(cflow.RidgePotential(size.dim, size.num_flows))
    calls: dict[str, Call] = {
        "products": products(size),
        "mlp, weights": lambda: mlp.velocity(z, w, 0.5),
        "mlp, k per sample": lambda: mlp.velocity(z, k, 0.5),
        "ridge, weights": lambda: ridge.velocity(z, w, 0.5),
    }
    with torch.no_grad():
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
