"""What a velocity costs beside the bare matrix products of the same shapes.

    python benchmarks/velocity.py            # prints a table
    python benchmarks/velocity.py --json velocity.json

Everything is timed in one process, interleaved, on one thread (batch 128, float32); medians are reported. Only the
ratios mean anything on another machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

import cflow

BATCH = 128
SIZES = [(16, 3), (64, 3), (64, 8), (324, 3)]


def measure(calls: dict[str, Callable[[], object]], rounds: int, inner: int) -> dict[str, float]:
    """Median seconds of each call, with the calls interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner):
                call()
            times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def products(dim: int, num_flows: int) -> Callable[[], object]:
    """The four matrix products of an MLPPotential's gradient: two layers forwards, two backwards."""
    z, w1 = torch.randn(BATCH, dim), torch.randn(num_flows * dim, dim)
    h, w2, p = torch.randn(num_flows, BATCH, dim), torch.randn(num_flows, dim, dim), torch.randn(BATCH, num_flows * dim)
    return lambda: (z @ w1.mT, torch.bmm(h, w2.mT), torch.bmm(h, w2), p @ w1)


def run(dim: int, num_flows: int, rounds: int) -> dict[str, float]:
    """Medians in seconds for one size."""
    z, w = torch.randn(BATCH, dim), torch.randn(BATCH, num_flows)
    k = torch.randint(num_flows, (BATCH,))
    mlp = cflow.PotentialFlow(cflow.MLPPotential(dim, num_flows))
    ridge = cflow.PotentialFlow(cflow.RidgePotential(dim, num_flows))
    calls: dict[str, Callable[[], object]] = {
        "products": products(dim, num_flows),
        "mlp, weights": lambda: mlp.velocity(z, w, 0.5),
        "mlp, k per sample": lambda: mlp.velocity(z, k, 0.5),
        "ridge, weights": lambda: ridge.velocity(z, w, 0.5),
    }
    with torch.no_grad():
        return measure(calls, rounds, inner=4 if dim > 100 else 20)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds (default 40)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = (
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread, batch {BATCH}, float32"
    )
    print(machine)
    results = {}
    for dim, num_flows in SIZES:
        seconds = run(dim, num_flows, args.rounds)
        base = seconds["products"]
        results[f"D{dim} K{num_flows}"] = seconds
        ratios = "   ".join(f"{name} {s / base:5.2f}×" for name, s in seconds.items() if name != "products")
        print(f"D={dim:<4d}K={num_flows:<3d}products {base * 1e6:7.0f} µs   {ratios}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "seconds": results}, file, indent=2)


if __name__ == "__main__":
    main()
