"""One whole training iteration of a preset, part by part, beside the scheme of the original code.

    python benchmarks/training_iteration.py                  # both presets, about a minute
    python benchmarks/training_iteration.py --presets mnist --data-root data

The iteration is what `cflow fit` runs: a batch of images, their sequences, the ELBO, its gradients, the optimiser. Its
parts are timed by hooks where the graph passes from one to the next, forwards and backwards, so that they add up to the
whole. Where k is inferred, whole sequences are made for q(k|x), every flow is solved, and frames are decoded under each
flow to tell which one it was: those that count, or all of them. While inference is hot all flows stay possible, and are
decoded with their gradient; later one is left of most sequences. The original's scheme has the same encoder, decoder
and data, but MLP potentials in a Python loop over K with the gradient by autograd, one Euler step a frame, every frame
decoded, and Adam. The preset's precision holds, but for float32 on a CPU without bfloat16, as in `cflow fit`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from measuring import quartiles, threads
from original import OriginalField
from report import command_line, machine, milliseconds, one_line, print_table, write_json
from torch import Tensor, nn

import cflow
from cflow.data import Sequences, Stills
from cflow.training.batches import Drawn
from cflow.training.datamodule import SequenceDataModule
from cflow.training.module import FlowVAEModule
from cflow.training.optimizer import bfloat16_in_software, make_optimizer

SCHEMA = 1
PARTS = ("data", "encoder", "flow", "decoder", "losses", "optimiser")
# what a scheme changes in the model of the preset
CHANGES: dict[str, dict[str, Any]] = {
    "preset": {},
    "k inferred": {"supervision": "weak", "responsibility_frames": "decoded"},
    "k inferred, hot": {"supervision": "weak", "responsibility_frames": "decoded", "temperature": 1000.0},
    "k inferred, by all frames": {"supervision": "weak", "responsibility_frames": "all"},
    "preset, MLP potentials": {"potential": "mlp", "time_dependent": True},
    "original": {"potential": "mlp", "time_dependent": True},
}
SCHEMES = tuple(CHANGES)


class Laps:
    """Seconds between marks, added up by part. On CUDA the marks are events, read after the iteration."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """What ran since the last mark belongs to `part`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Seconds by part, and forget them; the first mark only starts the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += before.elapsed_time(after) * 1e-3 if self.device.type == "cuda" else after - before
        self.marks.clear()
        return found


def lap_at(laps: Laps, module: nn.Module, inside: str, before: str, behind: str) -> None:
    """Mark where a module's part of the iteration begins and ends, forwards and backwards.

    Arguments:
        laps: the clock.
        module: one that maps a tensor to a distribution, with its network in `module.body`.
        inside: name of its part.
        before, behind: the parts before and behind it in the forward pass.
    """

    def entered(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        laps.mark(before)
        if inputs[0].requires_grad:  # its gradient is ready when the module's backward pass is done
            inputs[0].register_hook(lambda grad: laps.mark(inside))  # type: ignore[no-untyped-call]

    def left(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        laps.mark(inside)
        if output.requires_grad:
            output.register_hook(lambda grad: laps.mark(behind))  # type: ignore[no-untyped-call]

    body = cast(nn.Module, module.body)
    body.register_forward_pre_hook(entered)
    body.register_forward_hook(left)


class Iteration:
    """A preset's training iteration under one scheme.

    Arguments:
        config: the preset, as its YAML says.
        scheme: one of `SCHEMES`.
        train: what the preset trains on.
        device: where everything runs.
    """

    def __init__(self, config: dict[str, Any], scheme: str, train: Sequences, device: torch.device) -> None:
        torch.manual_seed(0)
        self.module = FlowVAEModule(**config["model"] | CHANGES[scheme]).to(device)
        self.batch, self.device, self.original = config["data"]["batch_size"], device, scheme == "original"
        count = train.num_frames if self.original else self.module.frames_per_step
        self.weak = "inferred" in scheme
        self.module.vae.temperature = self.module.temperature or 1.0
        self.drawn, self.done = Drawn(train, count, seed=0, whole=self.weak), 0
        precision = str(config["trainer"].get("precision", "32-true"))
        halves = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        self.half = None if device.type == "cpu" and bfloat16_in_software("cpu") else halves.get(precision)
        self.optimiser = make_optimizer(self.module.optimizer, self.module.vae, 1e-3, self.half)
        self.laps = Laps(device)
        vae = self.module.vae
        lap_at(self.laps, vae.encoder, "encoder", before="losses", behind="flow")
        lap_at(self.laps, vae.decoder, "decoder", before="flow", behind="losses")
        if self.original:
            w = torch.zeros(self.batch, self.module.config.num_flows)
            self.field = OriginalField(cast(cflow.MLPPotential, vae.flow.net), w).to(device)
            parameters = [p for name, p in self.module.named_parameters() if ".flow." not in name]
            self.optimiser = torch.optim.Adam([*parameters, *self.field.parameters()], lr=1e-3, fused=True)

    def __call__(self) -> dict[str, float]:
        """Run once; seconds by part."""
        laps = self.laps
        laps.mark("data")
        chosen = torch.randint(len(self.drawn), (self.batch,)).tolist()
        self.done += 1
        batch = self.drawn.__getitems__([(self.done, thing) for thing in chosen])
        stored, k, t = (part.to(self.device) for part in (batch.stored, batch.k, batch.t))
        mask = None if batch.mask is None else batch.mask.to(self.device)
        x = self.drawn.source.frames(stored, k, t)
        laps.mark("data")
        half = contextlib.nullcontext() if self.half is None else torch.autocast(self.device.type, dtype=self.half)
        with half:
            loss = self.original_loss(x, k) if self.original else self.elbo_loss(x, k, t, mask)
        laps.mark("losses")
        loss.backward()  # type: ignore[no-untyped-call]
        laps.mark("encoder")
        self.optimiser.step()
        self.optimiser.zero_grad()
        laps.mark("optimiser")
        return laps.read()

    def elbo_loss(self, x: Tensor, k: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        """The loss of the preset, or of its weakly supervised model."""
        return self.module.vae.elbo(x, None if self.weak else k, t, mask).loss

    def original_loss(self, x: Tensor, k: Tensor) -> Tensor:
        """Minus the ELBO of sequences x (B, T+1, …) with z ← z + ∇u_k(z, t), t = 1 .. T, all frames decoded."""
        vae = self.module.vae
        posterior: Any = vae.encoder(x[:, 0])
        self.field.w = nn.functional.one_hot(k, self.field.w.shape[1]).to(self.field.w)
        z = [posterior.rsample()]
        with torch.autocast(self.device.type, enabled=False):
            for step in range(1, x.shape[1]):
                z.append(z[-1] + self.field(z[-1].new_tensor(float(step)), z[-1]))
        reconstruction = vae.log_prob_frames(x.transpose(0, 1), torch.stack(z)).sum(0).mean()
        standard = torch.distributions.Normal(torch.zeros_like(z[0]), torch.ones_like(z[0]))
        kl = torch.distributions.kl_divergence(posterior.base_dist, standard).sum(-1).mean()
        return kl - reconstruction


def preset(name: str) -> dict[str, Any]:
    """A preset as its YAML says."""
    yaml: Any = importlib.import_module("yaml")
    text = (importlib.resources.files("cflow.training") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return cast(dict[str, Any], yaml.safe_load(text))


def trained_on(config: dict[str, Any], root: str | None) -> Sequences:
    """The preset's training set; for MNIST without `root` random images of its size: times depend on no pixel."""
    if config["data"]["dataset"] == "mnist" and root is None:
        print("mnist: random images stand in for the real ones; --data-root DIR reads them")
        return Stills(
            torch.randint(256, (55_000, 3, 28, 28), dtype=torch.uint8), num_frames=config["data"]["num_frames"]
        )
    return SequenceDataModule(**config["data"] | {"root": root or "data"}).source.split("train")


def measure(
    name: str, device: torch.device, *, schemes: Sequence[str] = SCHEMES, root: str | None = None, rounds: int = 20
) -> list[dict[str, Any]]:
    """One row a scheme: median seconds of each part, of the whole, and its quartiles; interleaved, warmed up."""
    config = preset(name)
    train = trained_on(config, root)
    iterations: dict[str, Callable[[], dict[str, float]]] = {
        scheme: Iteration(config, scheme, train, device) for scheme in schemes
    }
    samples: dict[str, list[dict[str, float]]] = {scheme: [] for scheme in schemes}
    for done in range(rounds + 2):
        for scheme, iteration in iterations.items():
            laps = iteration()
            if done >= 2:
                samples[scheme].append(laps)
    rows = []
    for scheme, laps_of in samples.items():
        whole = [sum(laps.values()) for laps in laps_of]
        low, high = quartiles(whole)
        parts = {part: statistics.median(laps[part] for laps in laps_of) for part in PARTS}
        row = {"preset": name, "scheme": scheme, "batch": config["data"]["batch_size"], "parts": parts}
        row |= {"threads": torch.get_num_threads(), "device": device.type}
        rows.append(row | {"whole": {"median": statistics.median(whole), "low": low, "high": high}})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print milliseconds, and each scheme's time over that of the preset."""
    base = {row["preset"]: row["whole"]["median"] for row in reversed(rows)}
    print_table(("preset, scheme", *PARTS, "whole ms", "quartiles", "/ preset"), _cells(rows, base))


def _cells(rows: Sequence[dict[str, Any]], base: dict[str, float]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        whole = row["whole"]
        yield (
            f"{row['preset']}, {row['scheme']}",
            *(f"{row['parts'][part] * 1e3:.2f}" for part in PARTS),
            *milliseconds(whole),
            f"{whole['median'] / base[row['preset']]:.2f}",
        )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "training_iteration", rounds=20)
    parser.add_argument("--presets", nargs="+", default=["digits", "mnist"], choices=("digits", "mnist"))
    parser.add_argument("--data-root", help="folder of MNIST; random images stand in for it by default")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (default 1)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    args = arguments(words)
    print(one_line(machine(args.device)))
    rows: list[dict[str, Any]] = []
    with threads(args.threads):
        for name in args.presets:
            rows += measure(name, args.device, root=args.data_root, rounds=args.rounds)
    show(rows)
    write_json(
        args.json,
        {"benchmark": "training_iteration", "schema": SCHEMA, "machine": machine(args.device), "rows": rows},
    )


if __name__ == "__main__":
    main()
