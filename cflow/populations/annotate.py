"""What a flow says of cells, written back into their AnnData object."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import ArgumentError
from ..flow import PotentialFlow
from .files import of_anndata
from .fitting import prepared
from .simulated import gaussian
from .snapshots import Snapshots

CHUNK = 8192  # cells that are solved for at once


@torch.no_grad()
def annotate(
    adata: Any, flow: PotentialFlow, basis: str = "X_pca", time: str = "day", *, base: Distribution | None = None
) -> None:
    r"""Write velocities, the potential and the log-density of every cell, at its own time, into an AnnData object.

    With a basis X_pca: ``obsm["velocity_pca"]``, v (N, D), where scvelo looks for it; ``obs["potential"]``, u, up to a
    function of time alone; ``obs["log_density"]``, in nats a cell, from a solve back to the first snapshot.

    .. math:: \log p_t(x) = \log p_0(z(t_0)) + ∫_{t_0}^{t} −∇·v\,ds

    Arguments:
        adata: cells with coordinates ``obsm[basis]`` and times ``obs[time]``; changed in place.
        flow: the flow that was fitted to them.
        basis, time: as in `Snapshots.from_anndata`.
        base: the density p_0 at the first time; None: the Gaussian of its cells, see `gaussian`.

    Raises:
        ArgumentError, ArgumentTypeError: a flow of another D, or cells as `Snapshots` refuses them.
        IntegrationError: a solve failed.
    """
    x, times = of_anndata(adata, basis, time)
    snapshots = prepared(flow, Snapshots.grouped(x, times))
    if base is not None and base.event_shape != (snapshots.dim,):
        raise ArgumentError(f"base: expected event shape (D,) = ({snapshots.dim},), got {tuple(base.event_shape)}")
    density = gaussian(snapshots.x[0]) if base is None else base
    cells = torch.from_numpy(x.astype("float64")).to(snapshots.x[0])
    clock = torch.from_numpy(times.astype("float64")).to(cells)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(0, len(cells), CHUNK):
        z, t = cells[i : i + CHUNK], clock[i : i + CHUNK]
        back = torch.stack([t, torch.full_like(t, float(snapshots.t[0]))])
        path = flow.solve(z, t=back, log_density=True)
        log_p = density.log_prob(path.z[-1]) - cast(Tensor, path.log_density_change)[-1]
        u = torch.zeros_like(t) if flow.net is None else flow.potential(z, t)[:, 0]
        found.append((flow.velocity(z, t=t), u, log_p))
    v, *rest = (torch.cat(parts).float().cpu().numpy() for parts in zip(*found, strict=True))
    adata.obsm[f"velocity_{basis.removeprefix('X_')}"] = v
    adata.obs["potential"], adata.obs["log_density"] = rest
