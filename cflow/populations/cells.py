"""Real cells that come with cflow."""

from __future__ import annotations

from pathlib import Path

from .snapshots import Snapshots

EMBRYOID_BODIES = Path(__file__).parent / "embryoid_bodies" / "cells.npz"


def embryoid_bodies() -> Snapshots:
    """16,819 cells of embryoid bodies at five times 0..4, three weeks of differentiation, in five principal components.

    Each component is standardised over all cells. This is the set of the field's table in which one time is left out.

    References:
        Moon et al.: Visualizing structure and transitions in high-dimensional biological data, Nature Biotechnology 37,
        2019 (the cells, Mendeley Data v6n743h5ng). Tong, Huang, Wolf, van Dijk, Krishnaswamy: TrajectoryNet, ICML 2020,
        arXiv:2002.04461 (the embedding, MIT licence).

    Example:
        >>> embryoid_bodies()
        Snapshots(D=5: 2381 at t=0, 4163 at t=1, 3278 at t=2, 3665 at t=3, 3332 at t=4)
    """
    return Snapshots.from_file(EMBRYOID_BODIES)
