"""Draw the pictures of the guides from kept weights and results: `python docs/pictures.py [NAME …]` (extra `train`)."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from generated import newest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, TransformedDistribution

import cflow
from cflow import plots
from cflow.data.digits import load_digits
from cflow.populations import embryoid_bodies, fit, recipe

FOLDER = Path(__file__).parent / "pictures"
RK4 = cflow.Solver("rk4", step_size=0.1)
TIMES = torch.linspace(0, 3, 31)


def panels(count: int, width: float = 3.0, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


def bare(ax: Axes, title: str) -> None:
    """Only what the picture is about."""
    ax.set(title=title, xlabel="", ylabel="", xticks=[], yticks=[])
    ax.title.set_fontsize(10)


def ring(count: int, radius: float = 1.0) -> Tensor:
    """Points on a circle (B, 2)."""
    angle = torch.arange(count) * 2 * math.pi / count + 0.3
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


class Hills(nn.Module):
    """u_k = exp(−‖z − c_k‖² / 2): two hills."""

    dim, num_flows = 2, 2

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        centre = z.new_tensor([[1.3, 0.4], [-0.9, 1.1]])
        return 1.6 * torch.exp(-(z[:, None] - centre).square().sum(-1) / 3)


def potentials() -> Figure:
    figure, axes = panels(3)
    torch.manual_seed(5)
    ridge, mlp = cflow.RidgePotential(2, hidden=16), cflow.MLPPotential(2, hidden=24)
    with torch.no_grad():
        for net, gain in ((ridge, 5.0), (mlp, 3.0)):
            for parameter in net.parameters():
                parameter.mul_(gain if parameter.ndim > 1 else 1.0)
    matrix = torch.tensor([[[0.35, 0.3], [0.3, -0.5]]])
    for ax, (name, u) in zip(
        axes, {"quadratic": cflow.QuadraticPotential(matrix), "ridge": ridge, "MLP": mlp}.items(), strict=True
    ):
        flow = cflow.PotentialFlow(u, solver=RK4)
        z0 = torch.randn(9, 2)
        speed = flow.velocity(z0, t=0.0).norm(dim=1).mean().item()
        paths = flow.trajectory(z0, t=TIMES[:16] / max(speed, 0.3)).detach()
        plots.potential_surface(flow, ax=ax)
        plots.trajectories(paths, ax=ax)
        ax.set(xlim=(-3, 3), ylim=(-3, 3))
        bare(ax, name)
    for extra in [ax for ax in figure.axes if ax not in axes]:
        extra.remove()
    return figure


def selections() -> Figure:
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    grid = figure.add_gridspec(3, 3)
    flow = cflow.PotentialFlow(Hills(), solver=RK4)
    z0 = torch.tensor([[-2.2, -1.6], [-0.2, -2.0], [2.0, -1.6]])
    t = torch.linspace(0, 6, 61)
    cases = {
        "k = 0": (0, [[1, 1], [0, 0]]),
        "k = weights (0.6, 0.9)": (torch.tensor([0.6, 0.9]), [[0.6, 0.6], [0.9, 0.9]]),
        "k = Schedule([0, 3, 6], [0, 1])": (cflow.Schedule([0.0, 3.0, 6.0], [0, 1]), [[1, 0], [0, 1]]),
    }
    for i, (name, (k, weights)) in enumerate(cases.items()):
        ax = figure.add_subplot(grid[:2, i])
        plots.trajectories(flow.trajectory(z0, k, t=t), ax=ax)
        for n, (x, y) in enumerate(((1.3, 0.4), (-0.9, 1.1))):
            ax.plot(x, y, "*", ms=12, color=plots.PALETTE[n + 1])
        ax.set(xlim=(-2.6, 2.6), ylim=(-2.4, 1.9))
        bare(ax, name)
        below = figure.add_subplot(grid[2, i])
        for n, of_flow in enumerate(weights):
            below.stairs(of_flow, [0, 3, 6], color=plots.PALETTE[n + 1], lw=2.5, baseline=None)
            below.set(xlim=(0, 6), ylim=(-0.15, 1.15), yticks=[0, 1], xlabel="t, frames", ylabel="$w_k$")
    return figure


def times() -> Figure:
    figure, axes = panels(2, 4.2)
    flow = cflow.PotentialFlow(Hills(), solver=RK4)
    z0 = torch.tensor([[-2.2, 0.2], [-2.0, -1.0], [-1.0, -1.8], [0.3, -2.0], [1.6, -1.8]])
    end = torch.tensor([0.8, 1.6, 2.6, 4.0, 6.0])
    t = torch.linspace(0, 1, 31)[:, None] * end
    plots.trajectories(flow.trajectory(z0, 0, t=t), ax=axes[0])
    for x, when in zip(flow(z0, 0, t=(torch.zeros(5), end)), end, strict=True):
        axes[0].annotate(f"t = {when:g}", x.tolist(), textcoords="offset points", xytext=(6, -8), fontsize=8)
    bare(axes[0], "ends of the samples' own")
    there = flow.trajectory(z0, 0, t=torch.linspace(0, 6, 31))
    back = flow.trajectory(there[-1], 0, t=torch.linspace(6, 0, 13))
    plots.trajectories(there, ax=axes[1])
    axes[1].plot(back[..., 0], back[..., 1], "x", color=plots.PALETTE[1], ms=5)
    bare(axes[1], "there (lines), and back (crosses)")
    return figure


def solvers() -> Figure:
    _, content = newest("*-solver-cost.json")
    figure, axes = panels(2, 4.2, 3.4)
    wanted = ("euler", "midpoint", "rk4", "bosh3", "dopri5", "dopri8")
    points = [point for point in content["work_precision"] if point["method"] in wanted]
    points.sort(key=lambda point: wanted.index(point["method"]))
    for ax, x in zip(axes, ("nfe", "seconds"), strict=True):
        plots.work_precision(points, x=x, ax=ax)
    axes[1].get_legend().remove()
    return figure


def densities() -> Figure:
    figure, axes = panels(3)
    base = MultivariateNormal(torch.zeros(2), torch.eye(2))
    flow = cflow.PotentialFlow(Hills(), solver=RK4)
    weights = torch.tensor([1.0, 1.0])
    for ax, end in zip(axes, (0.0, 0.8, 1.6), strict=True):
        q = TransformedDistribution(base, [flow.transform(weights, t=(0.0, end))])
        plots.density(q, extent=3.0, num=81, ax=ax)
        bare(ax, f"t = {end:g}")
    for extra in [ax for ax in figure.axes if ax not in axes]:
        extra.remove()
    return figure


def solenoidal() -> Figure:
    figure, axes = panels(3)
    turn = cflow.SkewLinear(2)
    with torch.no_grad():
        turn.matrix.copy_(torch.tensor([[0.0, -1.2], [0.0, 0.0]]))
    climb = cflow.QuadraticPotential(torch.tensor([[[-0.35, 0.0], [0.0, -0.35]]]))
    cases = {
        "gradient": cflow.PotentialFlow(climb, solver=RK4),
        "a part that turns": cflow.PotentialFlow(None, solenoidal=turn, solver=RK4),
        "both": cflow.PotentialFlow(climb, solenoidal=turn, solver=RK4),
    }
    for ax, (name, flow) in zip(axes, cases.items(), strict=True):
        plots.velocity_field(flow, extent=2.6, num=11, ax=ax)
        plots.trajectories(flow.trajectory(ring(5, 2.1), t=TIMES), ax=ax)
        bare(ax, name)
    for extra in [ax for ax in figure.axes if ax not in axes]:
        extra.remove()
    return figure


def vae() -> Figure:
    model, x0 = cflow.load("digits"), load_digits("test")[[27]].float() / 255
    t = torch.linspace(0, 8, 33)
    paths = torch.cat([model.flow.trajectory(model.encode(x0), k, t) for k in range(3)], 1).detach()
    centre = paths.flatten(0, 1).mean(0)
    plane = torch.linalg.svd((paths.flatten(0, 1) - centre).double()).Vh[:2].float()
    flat = (paths - centre) @ plane.mT
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    grid = figure.add_gridspec(3, 9)
    ax = figure.add_subplot(grid[:, 1:5])
    plots.trajectories(flat, groups=[0, 1, 2], names=["scaling", "rotation", "hue"], ax=ax)
    bare(ax, "latent states flow (two principal directions)")
    first = figure.add_subplot(grid[1, 0])
    first.imshow(x0[0].permute(1, 2, 0))
    bare(first, "encoded")
    for k in range(3):
        for n, frame in enumerate((8, 16, 24, 32)):
            small = figure.add_subplot(grid[k, 5 + n])
            small.imshow(model.decode(paths[frame, k]).detach().clamp(0, 1).permute(1, 2, 0))
            bare(small, f"t = {t[frame]:g}" if k == 0 else "")
            for spine in small.spines.values():
                spine.set_edgecolor(plots.PALETTE[k])
                spine.set_linewidth(2)
    return figure


def inferring() -> Figure:
    model = cflow.load("digits_weak")
    k = torch.arange(9) % 3
    x = cflow.data.make_sequence(load_digits("test")[40:49].float() / 255, k, torch.arange(9.0))
    q = model.infer_flow(x).detach()
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    names = list(cflow.data.PAPER)
    for i in range(9):
        ax = figure.add_subplot(2, 9, i + 1)
        ax.imshow(torch.cat([x[i, 0], x[i, 8]], 2).permute(1, 2, 0))
        bare(ax, names[k[i]])
        ax = figure.add_subplot(2, 9, 10 + i)
        ax.bar(range(3), q[i], color=plots.PALETTE[:3])
        ax.set(ylim=(0, 1), xticks=range(3), yticks=[0, 1] if i == 0 else [], xlabel="flow" if i == 4 else "")
        if i == 0:
            ax.set_ylabel("q(k | x)")
    return figure


def pdes() -> Figure:
    figure, axes = panels(3)
    alpha = 0.25

    class Warm(nn.Module):
        """Two Gaussians that spread: an exact solution of the heat equation."""

        dim, num_flows = 2, 1

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            spread = (0.3 + 2 * alpha * t)[:, None]
            square = (z[:, None] - z.new_tensor([[1.2, 0.3], [-1.0, -0.6]])).square().sum(-1)
            return (torch.exp(-square / (2 * spread)) / spread).sum(-1)

    flow = cflow.PotentialFlow(Warm())
    for ax, t in zip(axes, (0.0, 1.0, 3.0), strict=True):
        plots.potential_surface(flow, t=t, extent=3.0, num=81, ax=ax)
        bare(ax, f"t = {t:g}")
    for extra in [ax for ax in figure.axes if ax not in axes]:
        extra.remove()
    return figure


def populations() -> Figure:
    """The recipe at fewer steps, on all five times."""
    cells = embryoid_bodies()
    torch.manual_seed(0)
    flow, settings = recipe(cells.dim)
    with torch.enable_grad():
        fit(flow, cells, **settings | {"steps": 300, "batch_size": 128})
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    ax = figure.add_subplot()
    plots.population_landscape(flow, cells, num=30, ax=ax)
    ax.set(xlim=(-4.3, 2.1), ylim=(-2.5, 2.9))
    return figure


def data() -> Figure:
    names = ("scaling", "rotation", "hue", "shear", "blur", "perspective")
    x0, t = load_digits("test")[[8]].float() / 255, torch.tensor([0.0, 2, 4, 6, 8])
    figure = Figure(figsize=(6, 6.2), layout="constrained")
    for row, name in enumerate(names):
        x = cflow.data.make_sequence(x0, 0, t, cflow.data.as_transformations(name))[0]
        for n, frame in enumerate(x):
            ax = figure.add_subplot(len(names), 5, 5 * row + n + 1)
            ax.imshow(frame.permute(1, 2, 0))
            bare(ax, f"t = {t[n]:g}" if row == 0 else "")
            if n == 0:
                ax.set_ylabel(name)
    return figure


def boxes(ax: Axes, places: dict[str, tuple[float, float]], arrows: list[tuple[str, str]]) -> None:
    """Words in boxes, and arrows between them."""
    shown = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": plots.PALETTE[0]}
    drawn = {
        text: ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=shown) for text, (x, y) in places.items()
    }
    for start, end in arrows:
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        style = {"arrowstyle": "-|>", "color": plots.PALETTE[1], "shrinkA": 0, "shrinkB": 2}
        ax.annotate("", xy=places[end], xytext=places[start], arrowprops=style | ends)
    ax.set(xlim=(0, 10), ylim=(0, 3))
    ax.axis("off")


def several_gpus() -> Figure:
    figure, (ax,) = panels(1, 8, 2.2)
    places = {f"process {i}\nits images, all weights": (1.4 + 2.4 * i, 2.3) for i in range(4)}
    places["mean of the gradients (all-reduce)"] = (5.0, 0.5)
    boxes(ax, places, [(name, "mean of the gradients (all-reduce)") for name in places if "process" in name])
    return figure


def saving() -> Figure:
    figure, (ax,) = panels(1, 8, 2.4)
    places = {
        "model": (1.2, 1.5),
        "config.json\nmodel.safetensors": (4.6, 2.6),
        "runs/…/checkpoints/best.ckpt": (4.6, 1.5),
        "a program": (4.6, 0.4),
        "from_pretrained": (8.4, 2.6),
        "cflow.load": (8.4, 1.5),
        "torch.export.load": (8.4, 0.4),
    }
    kept = list(places)[1:4]
    boxes(ax, places, [*(("model", name) for name in kept), *zip(kept, list(places)[4:], strict=True)])
    return figure


MAKERS: dict[str, Callable[[], Figure]] = {
    maker.__name__: maker
    for maker in (
        *(potentials, selections, times, solvers, densities, solenoidal),
        *(vae, inferring, pdes, populations, data, several_gpus, saving),
    )
}


@torch.no_grad()
def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or MAKERS:
        drawn = io.BytesIO()
        MAKERS[name]().savefig(drawn, format="png", dpi=150, facecolor="white")
        image = Image.open(drawn).convert("RGB")
        image.quantize(128, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
