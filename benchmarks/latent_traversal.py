"""Flows for a decoder that is given: told apart without a label, and guided by a property of the image.

    python benchmarks/latent_traversal.py --checkpoint runs/mnist/version_0 --root data    # some four minutes, one core
    python benchmarks/latent_traversal.py --checkpoint … --quick                           # a tenth of the steps

The decoder of a trained model is frozen. Its latent space is measured in the spread of the codes of training images
(whitened), so that a step of one length is as unlikely in every direction. Flows start from codes of training images,
and every number is of codes of test images.

* **Told apart.** Four flows, no labels. Of each at t = 1, 2, 4, 8: how often the classifier that was trained along
  names it, from the image at 0 and at t; and how much the image has changed at t = 8 (L2), over what steps of the same
  latent length in a random direction change.
* **Guided.** Two flows, for stroke thickness and slant, both measured on the image and given in standard deviations
  over training images. Beside them, from the same codes and along paths of the same latent length each: a straight step
  in a random direction, and plain gradient ascent of the property, z ← z + h ∇/‖∇‖, in 8 and in 64 steps. Standard
  errors are those over test images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import threads
from report import command_line, machine, one_line, print_table, write_json
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, normalize

import cflow
from cflow.data.mnist import load_mnist

SCHEMA = 1
FLOWS, FRAMES = 4, 8
PROPERTIES = ("thickness", "slant")
TOLD = 0.95  # of the pairs are to be told apart


# --- the decoder and what is measured on its images -----------------------------------------------------------


class Whitened(nn.Module):
    """A decoder of states in units of the spread of codes (N, D)."""

    mean: Tensor
    factor: Tensor

    def __init__(self, decoder: nn.Module, codes: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("mean", codes.mean(0))
        self.register_buffer("factor", torch.linalg.cholesky(codes.T.cov()))

    def forward(self, z: Tensor) -> Any:
        return self.decoder(z @ self.factor.mT + self.mean)

    def states(self, codes: Tensor) -> Tensor:
        """The states (N, D) that are decoded as codes (N, D)."""
        solved: Tensor = torch.linalg.solve_triangular(self.factor, (codes - self.mean).mT, upper=False).mT
        return solved


def properties(x: Tensor) -> Tensor:
    """Thickness and slant of the strokes in images (B, C, H, W), (B, 2).

    Thickness is the share of ink that survives an erosion by 3×3 pixels; slant the angle in radians by which the
    regression of columns on rows leans to the right.
    """
    ink = x.amax(1)
    mass = ink.sum((1, 2)) + 1
    thickness = -max_pool2d(-ink[:, None], 3, 1, 1).sum((1, 2, 3)) / mass
    rows, columns = torch.arange(ink.shape[1]).to(ink), torch.arange(ink.shape[2]).to(ink)
    down = rows - ((ink.sum(2) * rows).sum(1) / mass)[:, None]
    right = columns - ((ink.sum(1) * columns).sum(1) / mass)[:, None]
    together, alone = torch.einsum("brc,br,bc->b", ink, down, right), torch.einsum("brc,br->b", ink, down.square())
    return torch.stack([thickness, -torch.atan(together / (alone + 4 * mass))], 1)


def codes_of(vae: cflow.FlowVAE, split: Any, root: Path, count: int) -> Tensor:
    images = load_mnist(split, root)[:count].float() / 255
    with torch.no_grad():
        return torch.cat([vae.encode(part) for part in images.split(500)])


# --- training ---------------------------------------------------------------------------------------------------


def train(traversal: cflow.LatentTraversal, states: Tensor, steps: int, rate: float = 3e-3) -> float:
    """Seconds of training."""
    optimizer = torch.optim.Adam(traversal.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        loss = traversal.loss(states[torch.randint(len(states), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def flow_of(dim: int, flows: int) -> cflow.PotentialFlow:
    return cflow.PotentialFlow(cflow.MLPPotential(dim, flows, hidden=128), solver=cflow.Solver("rk4", step_size=4.0))


def lengths(zs: Tensor) -> Tensor:
    """Of paths (N, B, D), (B,)."""
    return zs.diff(dim=0).norm(dim=-1).sum(0)


# --- told apart -------------------------------------------------------------------------------------------------


def told_apart(decoder: Whitened, seen: Tensor, held_out: Tensor, steps: int, energy: float) -> dict[str, Any]:
    traversal = cflow.LatentTraversal(decoder, flow_of(seen.shape[1], FLOWS), energy=energy)
    seconds, rows = train(traversal, seen, steps), []
    classifier, t = traversal.classifier, torch.arange(FRAMES + 1.0)
    assert classifier is not None
    with torch.no_grad():
        for k in range(FLOWS):
            zs = traversal.flow.trajectory(held_out, k, t)
            x = traversal.decode(zs)
            guesses = [classifier(torch.stack([x[0], later], 1))[:, :FLOWS].argmax(1) for later in x[[1, 2, 4, 8]]]
            length = lengths(zs)
            step = normalize(torch.randn_like(held_out)) * length[:, None]
            random, change = (
                (y - x[0]).flatten(1).norm(dim=1).mean().item() for y in (traversal.decode(held_out + step), x[-1])
            )
            rows.append(
                {
                    "flow": k,
                    "accuracy": [(guess == k).float().mean().item() for guess in guesses],
                    "change": change,
                    "change_of_random_step": random,
                    "length": length.mean().item(),
                }
            )
    return {"rows": rows, "seconds": seconds, "steps": steps, "energy": energy, "traversal": traversal}


# --- guided -----------------------------------------------------------------------------------------------------


def ascent(traversal: cflow.LatentTraversal, z: Tensor, k: int, length: Tensor, steps: int) -> Tensor:
    """Plain gradient ascent of a property by steps of one length each, (B, D)."""
    for _ in range(steps):
        z = z.detach().requires_grad_()
        assert traversal.objective is not None
        (gradient,) = torch.autograd.grad(traversal.objective(traversal.decode(z))[:, k].sum(), z)
        z = z + normalize(gradient) * length[:, None] / steps
    return z.detach()


def guided(decoder: Whitened, seen: Tensor, held_out: Tensor, steps: int, energy: float) -> dict[str, Any]:
    with torch.no_grad():
        spread = properties(decoder(seen[:2000]).mean).std(0)
    flow = flow_of(seen.shape[1], len(PROPERTIES))
    traversal = cflow.LatentTraversal(decoder, flow, objective=lambda x: properties(x) / spread, energy=energy)
    seconds, rows = train(traversal, seen, steps), []
    for k, name in enumerate(PROPERTIES):
        with torch.no_grad():
            zs = flow.trajectory(held_out, k, torch.linspace(0, FRAMES, 4 * FRAMES + 1))
        length = lengths(zs)
        ends = {
            "flow": zs[-1],
            "random step": held_out + normalize(torch.randn_like(held_out)) * length[:, None],
            "ascent, 8 steps": ascent(traversal, held_out, k, length, 8),
            "ascent, 64 steps": ascent(traversal, held_out, k, length, 64),
        }
        with torch.no_grad():
            before = properties(traversal.decode(held_out))[:, k] / spread[k]
            gains = {way: properties(traversal.decode(z))[:, k] / spread[k] - before for way, z in ends.items()}
        over = gains["flow"] - gains["ascent, 64 steps"]  # image by image
        rows.append(
            {
                "property": name,
                "length": length.mean().item(),
                "straightness": ((zs[-1] - zs[0]).norm(dim=1) / length).mean().item(),
                "gains": {way: gain.mean().item() for way, gain in gains.items()},
                "gains_stderr": {way: (gain.std() / len(gain) ** 0.5).item() for way, gain in gains.items()},
                "over_ascent": over.mean().item(),
                "over_ascent_stderr": (over.std() / len(over) ** 0.5).item(),
                "share_over_ascent": (over > 0).float().mean().item(),
            }
        )
    return {"rows": rows, "seconds": seconds, "steps": steps, "energy": energy, "traversal": traversal}


# --- report -----------------------------------------------------------------------------------------------------


def show(apart: dict[str, Any], by_property: dict[str, Any]) -> None:
    header = ("unguided flow", "told apart, t = 1", "2", "4", "8", "image change", "of a random step", "length")
    cells = [
        (
            str(row["flow"]),
            *(f"{share:.3f}" for share in row["accuracy"]),
            *(f"{row[key]:.2f}" for key in ("change", "change_of_random_step", "length")),
        )
        for row in apart["rows"]
    ]
    print_table(header, cells)
    least = min(row["accuracy"][-1] for row in apart["rows"])
    print(f"least told apart at t = 8: {least:.3f}, at least {TOLD} is to be reached\n")
    ways = list(by_property["rows"][0]["gains"])
    guided_cells = []
    for row in by_property["rows"]:
        gains = [f"{row['gains'][way]:.2f} ± {row['gains_stderr'][way]:.2f}" for way in ways]
        over = f"{row['over_ascent']:.2f} ± {row['over_ascent_stderr']:.2f}"
        others = (f"{row[key]:.2f}" for key in ("share_over_ascent", "length", "straightness"))
        guided_cells.append((row["property"], *gains, over, *others))
    print_table(("gain of", *ways, "flow − ascent", "share > 0", "length", "straightness"), guided_cells)


def draw(path: Path, traversals: Sequence[cflow.LatentTraversal], held_out: Tensor) -> None:
    """Three test images along every flow, t = 0, 1, …, 8."""
    from PIL import Image

    t, rows = torch.arange(FRAMES + 1.0), []
    with torch.no_grad():
        for traversal in traversals:
            for k in range(traversal.flow.num_flows):
                x = traversal.traverse(held_out[[3, 4, 7]], k, t)  # (9, 3, C, H, W)
                rows += [torch.cat(list(x[:, i]), -1) for i in range(3)]
    picture = (torch.cat(rows, -2).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(picture)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)
    print(f"wrote {path}")


def main(words: Sequence[str] | None = None) -> None:
    """Train, print, keep."""
    parser = command_line(__doc__, "latent_traversal", rounds=None)
    parser.add_argument("--checkpoint", required=True, help="a run or checkpoint of MNIST, as cflow.load takes it")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of MNIST (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--steps", type=int, default=600, help="of Adam, for each of the two (default %(default)s)")
    parser.add_argument("--energy", type=float, nargs=2, default=(1.0, 3.0), help="unguided, guided (default 1 3)")
    parser.add_argument("--plot", type=Path, help="file for a picture of all flows")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args(words)
    described = machine(args.device)
    print(one_line(described))
    steps = args.steps // 10 if args.quick else args.steps
    torch.manual_seed(args.seed)
    with threads(1):
        vae = cflow.load(args.checkpoint)
        codes = codes_of(vae, "train", args.root, 10_000)
        decoder = Whitened(vae.decoder, codes)
        seen, held_out = decoder.states(codes), decoder.states(codes_of(vae, "test", args.root, 500))
        apart = told_apart(decoder, seen, held_out, steps, args.energy[0])
        by_property = guided(decoder, seen, held_out, steps, args.energy[1])
    show(apart, by_property)
    traversals = [apart.pop("traversal"), by_property.pop("traversal")]
    if args.plot:
        draw(args.plot, traversals, held_out)
    document = {"benchmark": "latent_traversal", "schema": SCHEMA, "machine": described, "seed": args.seed}
    write_json(args.json, {**document, "unguided": apart, "guided": by_property})


if __name__ == "__main__":
    main()
