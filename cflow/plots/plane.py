"""Pictures of flows in two latent dimensions: potentials, velocities, trajectories and densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch.distributions import Distribution

from ..checks import instance
from ..errors import ArgumentError, ArgumentTypeError
from ..flow import FlowPath, PotentialFlow
from ..selection import SelectionLike, as_weights, select_at
from .style import COLOUR_MAP, VERMILION, colour, dash, new_axes, require, to_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

Extent = float | tuple[float, float, float, float]


def potential_surface(
    flow: PotentialFlow,
    k: SelectionLike = None,
    t: float = 0.0,
    *,
    extent: Extent = 3.0,
    num: int = 61,
    paths: FlowPath | Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw u = Σ_k w_k u_k(z, t) over the plane, as a surface, or as filled contours where `ax` is flat.

    Arguments:
        flow: a flow of dimension 2.
        k: the selection of flows, one for the whole plane.
        t: time in frames.
        extent: half the side of a square around the origin, or (left, right, bottom, top), in latent units.
        num: grid points a side.
        paths: trajectories to lay on the surface, at height u(z, t): a `FlowPath`, or states (N, B, 2).
        ax: the axes; by default new ones in three dimensions.

    Returns:
        The axes.

    Raises:
        ArgumentError: a flow that is not two-dimensional, an extent or paths that cannot be drawn.

    Example:
        >>> from cflow import QuadraticPotential
        >>> flow = PotentialFlow(QuadraticPotential(-torch.eye(2)[None]))
        >>> ax = potential_surface(flow, t=0.0, num=11)
        >>> ax.get_zlabel()
        'u(z, t)'
    """
    require("matplotlib")
    from mpl_toolkits.mplot3d import Axes3D

    _check_flow(flow)
    if not isinstance(t, (int, float, Tensor)):
        raise ArgumentTypeError(f"t: expected a time in frames, got {type(t).__name__} {t!r}")
    x, y, z = _grid(extent, num, like=_example(flow))
    u = rearrange(_height(flow, z, k, t), "(y x) -> y x", y=num)
    plane = to_array(x), to_array(y), to_array(u)
    ax = new_axes(ax, projection="3d")
    if not isinstance(ax, Axes3D):
        filled = ax.contourf(*plane, levels=15, cmap=COLOUR_MAP)
        _colour_bar(ax, filled, "u(z, t)")
        if paths is not None:
            trajectories(paths, groups=[1] * _states(paths).shape[1], legend=False, ax=ax)
        return _finish(ax, extent)
    ax.plot_surface(*plane, cmap=COLOUR_MAP, lw=0, antialiased=False, rcount=num, ccount=num)
    if paths is not None:
        ax.computed_zorder = False  # else a whole path may vanish behind the whole surface
        states = _states(paths)
        lift = 0.01 * float(u.max() - u.min())
        on_paths = _height(flow, rearrange(states, "n b d -> (n b) d"), k, t)
        heights = rearrange(on_paths, "(n b) -> n b", n=len(states)) + lift
        for b in range(states.shape[1]):
            line = (to_array(states[:, b, 0]), to_array(states[:, b, 1]), to_array(heights[:, b]))
            ax.plot(*line, color=VERMILION, lw=1.6, zorder=10)
            ax.plot(*(part[-1:] for part in line), "o", color=VERMILION, ms=4, zorder=11)
    ax.set_zlabel("u(z, t)")
    return _finish(ax, extent)


def velocity_field(
    flow: PotentialFlow,
    k: SelectionLike = None,
    t: float = 0.0,
    *,
    extent: Extent = 3.0,
    num: int = 21,
    ax: Axes | None = None,
) -> Axes:
    """Draw v = ∇_z Σ_k w_k u_k(z, t) as arrows, coloured by speed (latent units a frame).

    Arguments:
        flow: a flow of dimension 2.
        k: the selection of flows, one for the whole plane.
        t: time in frames.
        extent: half the side of a square around the origin, or (left, right, bottom, top), in latent units.
        num: arrows a side.
        ax: the axes; by default new ones.

    Returns:
        The axes.

    Raises:
        ArgumentError: a flow that is not two-dimensional, or an extent that cannot be drawn.

    Example:
        >>> from cflow import QuadraticPotential
        >>> flow = PotentialFlow(QuadraticPotential(-torch.eye(2)[None]))
        >>> len(velocity_field(flow, num=5).collections[0].U)
        25
    """
    _check_flow(flow)
    _, _, z = _grid(extent, num, like=_example(flow))
    with torch.no_grad():
        v = flow.velocity(z, k, t)
    ax = new_axes(ax)
    drawn = (to_array(part) for part in (z[:, 0], z[:, 1], v[:, 0], v[:, 1], v.norm(dim=1)))
    arrows = ax.quiver(*drawn, cmap=COLOUR_MAP, angles="xy", pivot="mid", width=0.005)
    _colour_bar(ax, arrows, "speed")
    return _finish(ax, extent)


def trajectories(
    paths: FlowPath | Tensor,
    *,
    groups: Sequence[int] | Tensor | None = None,
    names: Sequence[str] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw trajectories in the plane: a line a sample, an open circle where it starts and a full one where it ends.

    Arguments:
        paths: a `FlowPath`, or states (N, B, 2).
        groups: an integer for each sample, (B,), such as its flow k; it chooses the colour and, beyond the palette's
            seven, the line style.
        names: what the groups are called in the legend, by number.
        legend: whether to draw a legend (only where there are groups).
        ax: the axes; by default new ones.

    Returns:
        The axes.

    Raises:
        ArgumentError: paths or groups of another shape, or a group without a name.

    Example:
        >>> ax = trajectories(torch.randn(5, 3, 2), groups=[0, 1, 1])
        >>> [line.get_label() for line in ax.lines if line.get_label()[0] != "_"]
        ['flow 0', 'flow 1']
    """
    z = _states(paths)
    each = torch.zeros(z.shape[1], dtype=torch.long) if groups is None else torch.as_tensor(groups).cpu()
    if each.shape != z.shape[1:2] or each.is_floating_point():
        raise ArgumentError(
            f"groups: expected integers (B,) = ({z.shape[1]},), got {tuple(each.shape)} of {each.dtype}"
        )
    present = sorted({int(g) for g in each})
    if names is not None and present and not 0 <= present[0] <= present[-1] < len(names):
        raise ArgumentError(f"names: expected a name for each of the groups {present}, got {len(names)} names")
    ax = new_axes(ax)
    for group in present:
        mine = to_array(z[:, (each == group).to(z.device)])
        lines = ax.plot(mine[..., 0], mine[..., 1], dash(group), color=colour(group), lw=1.3, label="_path")
        ax.plot(mine[0, :, 0], mine[0, :, 1], "o", color=colour(group), mfc="white", ms=4, label="_start")
        ax.plot(mine[-1, :, 0], mine[-1, :, 1], "o", color=colour(group), ms=4, label="_end")
        lines[0].set_label(names[group] if names is not None else "paths" if groups is None else f"flow {group}")
    if legend and groups is not None and present:
        ax.legend(fontsize="small")
    return _finish(ax, None)


def density(distribution: Distribution, *, extent: Extent = 3.0, num: int = 121, ax: Axes | None = None) -> Axes:
    """Draw the density p(z) of a distribution over the plane, in units of 1 / area.

    Arguments:
        distribution: event shape (2,), no batch shape; a `TransformedDistribution` of `PotentialFlow.transform` is one.
        extent: half the side of a square around the origin, or (left, right, bottom, top), in latent units.
        num: grid points a side.
        ax: the axes; by default new ones.

    Returns:
        The axes.

    Raises:
        ArgumentError: a distribution of another shape, or an extent that cannot be drawn.

    Example:
        >>> normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> ax = density(normal, num=31)
        >>> round(float(ax.collections[0].get_array().max()), 3)
        0.159
    """
    instance("distribution", distribution, Distribution, "a torch.distributions.Distribution")
    if distribution.event_shape != (2,) or distribution.batch_shape != ():
        raise ArgumentError(
            f"distribution: expected event shape (2,) and batch shape (), got {tuple(distribution.event_shape)} and "
            f"{tuple(distribution.batch_shape)}"
        )
    x, y, z = _grid(extent, num, like=_example(distribution))
    with torch.no_grad():
        p = rearrange(distribution.log_prob(z).exp(), "(y x) -> y x", y=num)
    plane = to_array(x), to_array(y), to_array(p)
    ax = new_axes(ax)
    mesh = ax.pcolormesh(*plane, cmap=COLOUR_MAP, shading="gouraud", vmin=0.0, rasterized=True)
    _colour_bar(ax, mesh, "p(z)")
    return _finish(ax, extent)


def _check_flow(flow: PotentialFlow) -> None:
    instance("flow", flow, PotentialFlow, "a cflow.PotentialFlow")
    dim = flow.declared("dim")
    if dim not in (None, 2):
        raise ArgumentError(f"flow: only two latent dimensions can be drawn in a plane, got D = {dim}")


def _height(flow: PotentialFlow, z: Tensor, k: SelectionLike, t: float) -> Tensor:
    """Σ_k w_k u_k(z, t), (B,), as the flow itself would select and clock it."""
    with torch.no_grad():
        instant = torch.tensor(float(t), dtype=z.dtype, device=z.device)
        num_flows = flow.potential(z[:1], t).shape[1]
        chosen, seen = select_at(k, instant, batch=len(z), num_flows=num_flows, like=z)
        return (flow.potential(z, seen) * as_weights(chosen, num_flows, z)).sum(-1)


def _example(source: PotentialFlow | Distribution) -> Tensor:
    """A tensor of the dtype and on the device in which `source` computes."""
    if isinstance(source, PotentialFlow):
        held = (*source.parameters(), *source.buffers())
        return next((x for x in held if x.is_floating_point()), torch.empty(0))
    base: Distribution = source
    while hasattr(base, "base_dist"):
        base = base.base_dist
    try:
        return base.mean
    except (AttributeError, NotImplementedError):
        return torch.empty(0)


def _limits(extent: Extent) -> tuple[float, float, float, float]:
    sides = (-extent, extent, -extent, extent) if isinstance(extent, (int, float)) else tuple(extent)
    if len(sides) != 4 or not (sides[0] < sides[1] and sides[2] < sides[3]):
        raise ArgumentError(f"extent: expected a number > 0 or (left, right, bottom, top), got {extent!r}")
    return sides


def _grid(extent: Extent, num: int, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates x, y (num, num) of a grid, and its points (num², 2)."""
    if num < 2:
        raise ArgumentError(f"num: expected at least 2 points a side, got {num!r}")
    left, right, bottom, top = _limits(extent)
    xs, ys = (
        torch.linspace(a, b, num, dtype=like.dtype, device=like.device) for a, b in ((left, right), (bottom, top))
    )
    x, y = torch.meshgrid(xs, ys, indexing="xy")
    return x, y, rearrange([x, y], "i y x -> (y x) i")


def _states(paths: FlowPath | Tensor) -> Tensor:
    z = (paths.z if isinstance(paths, FlowPath) else torch.as_tensor(paths)).detach()
    if z.ndim != 3 or z.shape[2] != 2 or not len(z):
        raise ArgumentError(f"paths: expected a FlowPath or states (N, B, 2), got shape {tuple(z.shape)}")
    return z


def _colour_bar(ax: Axes, artist: ScalarMappable, label: str) -> None:
    ax.figure.colorbar(artist, ax=ax, label=label, shrink=0.8)


def _finish(ax: Axes, extent: Extent | None) -> Axes:
    """Label the axes, and set their limits where they are known."""
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    if extent is not None:
        left, right, bottom, top = _limits(extent)
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
    if ax.name != "3d":
        ax.set_aspect("equal")
    return ax
