"""Train and evaluate what the paper's tables compare: with k given, with k inferred, and two simpler ways.

    python benchmarks/paper_tables.py --dataset mnist --root data                   # days on a CPU
    python benchmarks/paper_tables.py --dataset mnist --root data --steps 500 --seeds 0 1 -- --model.latent_dim 32
    python benchmarks/paper_tables.py --dataset shapes3d --root data --methods supervised -- --trainer.devices 4

Every method × seed is a row: a fit of `cflow fit` with the paper's settings (Song et al., 2023, arXiv:2309.13167: its
networks, latent dimensions, objective, batch 128, Adam at 1e-4, 90,000 steps), tested as `cflow test` does. What stands
behind `--` goes to every fit. A row that is done is kept; one that was interrupted goes on from its last checkpoint,
one that fails is left out and named: call the same line again.

- `supervised`, `weak`, `weak_gumbel`: k given; inferred by the exact marginal; by the paper's Gumbel-softmax.
- `euler`: supervised, with one Euler step a frame, as the original's flows move.
- `plain_vae`: encoder and decoder trained on single frames in the first half of twice the steps; in the second half
  they stand still and the flows are fitted to them.

The table shows the equivariance error of each transformation (L1 pixel error, the frames 1 to 7 added up, or as many as
there are), mean ± standard error over the seeds, beside the best trivial answer.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from report import machine, one_line, print_table, write_json
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from cflow.training.app import run as run_command
from cflow.training.batches import Batch
from cflow.training.module import FlowVAEModule

SCHEMA = 1
FRAMES = 7  # that the paper adds up
STEPS = 90_000
TRIVIAL = ("copy_input", "black", "no_flow")
PAPER = "--model.lr 1e-4 --model.schedule constant --model.warmup_steps 0 --data.batch_size 128"
SETTINGS = {
    "mnist": f"--config mnist_paper --model.latent_dim 324 {PAPER}",
    "shapes3d": "--config shapes3d_paper",
    "falcor3d": "--config falcor3d_paper",
    "isaac3d": "--config isaac3d_paper",
}


class PlainVAE(FlowVAEModule):
    """A VAE of single frames; its flows are fitted in the second half of the steps, while all else stands still."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The negative bound of a VAE, or that of the flows."""
        late = 2 * self.global_step >= self.trainer.max_steps
        for part in (self.vae.encoder, self.vae.decoder):
            part.requires_grad_(not late)
        if late:
            return super().training_step(batch, batch_idx)
        frames = rearrange(self._frames(batch), "b t ... -> (b t) ...")
        q = self.vae.posterior(frames)
        likelihood = self.vae.decoder(q.rsample()).log_prob(frames)
        kl = kl_divergence(q, Independent(Normal(torch.zeros_like(q.mean), 1.0), 1))
        loss = (kl - likelihood).mean()
        self.log("loss", loss, prog_bar=True, batch_size=len(frames))
        return loss


@dataclass(frozen=True)
class Method:
    """What a row is trained with beside the paper's settings."""

    words: str = ""
    module: type[FlowVAEModule] = FlowVAEModule
    stages: int = 1


METHODS = {
    "supervised": Method(),
    "weak": Method("--model.supervision weak --model.responsibility_frames decoded"),
    "weak_gumbel": Method("--model.supervision weak --model.inference gumbel"),
    "euler": Method("--model.solver euler --model.step_size 1.0 --model.path_kl_weight 0"),
    "plain_vae": Method("--model.path_kl_weight 0 --model.pde_weight 0", PlainVAE, stages=2),
}


def words(dataset: str, method: str, seed: int, *, root: str, out: Path, steps: int, more: Sequence[str]) -> list[str]:
    """The command line of a row; one with a checkpoint goes on from it."""
    found = [*SETTINGS[dataset].split(), *METHODS[method].words.split(), "--data.root", root]
    found += ["--seed_everything", str(seed), "--trainer.max_steps", str(steps * METHODS[method].stages)]
    found += ["--trainer.default_root_dir", str(out), "--run_name", f"{method}_{seed}", *more]
    begun = newest(out / f"{method}_{seed}", "checkpoints/last.ckpt")
    return [*found, "--ckpt_path", str(begun)] if begun else found


def newest(run: Path, name: str) -> Path | None:
    """A file of the newest version of a run that has one."""
    files = sorted(run.glob(f"version_*/{name}"), key=lambda path: int(path.relative_to(run).parts[0].split("_")[1]))
    return files[-1] if files else None


def numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a table shows of a metrics.json: an error for each transformation, their mean, and what else is there."""
    prefix = "equivariance_error/"
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix) and not key.endswith("_stderr")]
    names.remove("mean")
    found = {}
    for name in names:
        frames = [metrics.get(f"equivariance_error_per_frame/{name}/{t}") for t in range(1, FRAMES + 1)]
        found[name] = sum(value for value in frames if value is not None)
    found["mean"] = statistics.fmean(found.values())
    others = ("reconstruction_l1", "log_likelihood", "flow_accuracy", "seconds")
    best = min(metrics[f"{name}/mean"] for name in TRIVIAL)
    return found | {"best trivial, all frames": best} | {key: metrics[key] for key in others if key in metrics}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Mean ± standard error over the seeds of each method; no error where there is one seed.

    Example:
        >>> done = [{"method": "weak", "seed": s, "numbers": {"hue": 10.0 + s, "mean": 10.0 + s}} for s in (0, 2)]
        >>> table(done)
        (['method', 'seeds', 'hue', 'mean'], [['weak', '2', '11.0 ± 1.0', '11.0 ± 1.0']])
    """
    columns = list(dict.fromkeys(key for row in rows for key in row["numbers"]))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row["numbers"] for row in rows if row["method"] == method]
        lines.append([method, str(len(own)), *(_cell([n[key] for n in own if key in n]) for key in columns)])
    return ["method", "seeds", *columns], lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{error}"


def arguments(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own arguments, and those for every fit, which stand behind `--`."""
    own, more = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=SETTINGS, default="mnist")
    parser.add_argument("--root", default="data", help="folder of the data set (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of a fit (default %(default)s, the paper's)")
    parser.add_argument("--out", type=Path, help="folder for the runs (default paper_tables/DATASET)")
    parser.add_argument("--json", type=Path, help="file for the results (default OUT/table.json)")
    args = parser.parse_args(own)
    args.out = args.out or Path("paper_tables", args.dataset)
    args.json = args.json or args.out / "table.json"
    return args, list(more)


def main(given: Sequence[str] | None = None) -> None:
    """Train what is missing, print, keep."""
    given = sys.argv[1:] if given is None else given
    if given[:1] == ["fit"]:  # a row, in a process of its own: Lightning starts the same line again for more devices
        run_command(["fit", *given[2:]], METHODS[given[1]].module)
        return
    args, more = arguments(given)
    described = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(one_line(described))
    rows, failed = list[dict[str, Any]](), list[str]()
    for method in args.methods:
        for seed in args.seeds:
            run = args.out / f"{method}_{seed}"
            asked = words(args.dataset, method, seed, root=args.root, out=args.out, steps=args.steps, more=more)
            if newest(run, "metrics.json") is None:
                print(f"\n=== {method}, seed {seed}", flush=True)
                subprocess.run([sys.executable, __file__, "fit", method, *asked], check=False)
            if (file := newest(run, "metrics.json")) is None:
                failed.append(f"{method}, seed {seed}")
                continue
            found = numbers(json.loads(file.read_text(encoding="utf-8")))
            rows.append({"method": method, "seed": seed, "numbers": found, "words": asked})
            document = {"benchmark": "paper_tables", "schema": SCHEMA, "machine": described, "dataset": args.dataset}
            write_json(args.json, document | {"steps": args.steps, "more": more, "rows": rows})
    print()
    print_table(*table(rows))
    if failed:
        print(f"not finished: {'; '.join(failed)}: call the same line again")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
