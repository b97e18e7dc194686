"""The potentials over a plane of the latent space, and the paths that states take above it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from .subject import Subject

STATES, DRAWN = 64, 12  # things whose paths span the plane, and those that are drawn
SIDE = 33  # grid points
INSTANTS = 5  # at which a potential that depends on time is shown
MARGIN = 0.12  # of the width of the states, around them


@torch.no_grad()
def landscapes(subject: Subject) -> dict[str, Any]:
    """Every u_k over the two principal components of the states along its own paths.

    Returns:
        names, labels: of the transformations; flows: for each a dict with shares: parts of the variance that the two
        components have; extent: half the sides of the plane, in latent units; surfaces: for each of `times` the values
        of u over the plane (SIDE, SIDE), row by row, the second component first; paths: of things, each a list of the
        coordinates (x, y) at the frames; turned: whether something beside the gradient moves states.

    Raises:
        ArgumentError: there are no potentials, or latent states of one dimension.
    """
    flow = subject.vae.flow
    if flow.net is None:
        raise ArgumentError("the flows have no potential, only a part that is divergence-free")
    if flow.dim < 2:
        raise ArgumentError("latent states of one dimension span no plane")
    found = []
    for k, number in enumerate(subject.numbers):
        z = flow.trajectory(subject.starts(k, STATES), number, subject.times)  # (T+1, B, D)
        middle, axes, shares = principal(z.flatten(0, 1))
        plane = (z - middle) @ axes.mT
        extent = (1 + MARGIN) * plane.abs().amax((0, 1)).clamp(min=1e-6)
        side = torch.linspace(-1, 1, SIDE).to(z)
        y, x = torch.meshgrid(side * extent[1], side * extent[0], indexing="ij")
        points = middle + torch.stack([x, y], -1).flatten(0, 1) @ axes
        heights = [flow.potential(points, float(t))[:, number] for t in _instants(subject, points, number)]
        found.append(
            {
                "shares": shares.tolist(),
                "extent": extent.tolist(),
                "surfaces": [_rounded(u) for u in heights],
                "paths": [[[round(float(c), 3) for c in p] for p in path] for path in plane[:, :DRAWN].transpose(0, 1)],
            }
        )
    return {
        "names": subject.names,
        "labels": subject.labels,
        "times": _times(subject, max(len(each["surfaces"]) for each in found)),
        "side": SIDE,
        "flows": found,
        "turned": flow.solenoidal is not None,
    }


def principal(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), first two principal axes (2, D) and their parts of the variance (2,) of states (N, D).

    Example:
        >>> line = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 4.0, 0.0]])
        >>> principal(line)[2].tolist()
        [1.0, 0.0]
    """
    middle = states.mean(0)
    _, singular, axes = torch.linalg.svd((states - middle).double(), full_matrices=False)
    variance = singular.square()
    return middle, axes[:2].to(states), variance[:2] / variance.sum().clamp(min=1e-30)


def _instants(subject: Subject, points: Tensor, k: int) -> list[float]:
    """The times at which u_k is shown: the first frame's, and more where it depends on time."""
    first, last = (float(t) for t in subject.times[[0, -1]])
    u, later = (subject.vae.flow.potential(points, t)[:, k] for t in (first, last))
    still = torch.allclose(u - u.mean(), later - later.mean(), rtol=1e-4, atol=1e-4 * float(u.std()))
    return _times(subject, 1 if still else INSTANTS)


def _times(subject: Subject, count: int) -> list[float]:
    """So many times from the first frame to the last."""
    times: list[float] = torch.linspace(float(subject.times[0]), float(subject.times[-1]), count).tolist()
    return times


def _rounded(u: Tensor) -> list[float]:
    """Heights above their mean, with as many digits as can be seen."""
    u = (u - u.mean()).nan_to_num()
    scale = float(u.abs().max()) or 1.0
    return [float(f"{value:.4g}") for value in torch.where(u.abs() < 1e-4 * scale, 0, u).tolist()]
