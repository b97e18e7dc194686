"""Draw the picture at the top of the README: `python examples/picture.py [file.png]`.

Left, a potential u(z) over a two-dimensional latent space, with trajectories that climb it. Right, the same
trajectories seen from above, among the arrows of the velocity ∇u that carries them.
"""

from __future__ import annotations

import math
import sys

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import cflow
from cflow import plots


class Hills(nn.Module):
    """u(z) = Σ_j height_j exp(−‖z − centre_j‖² / 2s²): three hills around a hollow."""

    dim, num_flows = 2, 1

    def __init__(self) -> None:
        super().__init__()
        angles = torch.tensor([0.5, 2.6, 4.7])
        ring = 1.7 * torch.stack([angles.cos(), angles.sin()], -1)
        self.register_buffer("centres", torch.cat([ring, torch.zeros(1, 2)]))
        self.register_buffer("heights", torch.tensor([1.2, 0.8, 1.0, -0.6]))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        squares = (z[:, None] - self.centres).square().sum(-1)  # (B, 4)
        return (self.heights * torch.exp(-squares / 1.4)).sum(-1)


def main(path: str = "docs/potential_flow.png") -> None:
    flow = cflow.PotentialFlow(Hills())
    angles = torch.arange(16) * (2 * math.pi / 16)
    starts = torch.cat([r * torch.stack([angles.cos(), angles.sin()], -1) for r in (0.35, 2.7)])
    with torch.no_grad():
        climb = flow.solve(starts, t=torch.linspace(0, 8, 161))
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    surface = figure.add_subplot(1, 2, 1, projection="3d")
    plots.potential_surface(flow, extent=3.0, num=70, paths=climb, ax=surface)
    surface.view_init(elev=48, azim=-62)
    surface.set_title("a potential $u_k(z, t)$")
    plane = figure.add_subplot(1, 2, 2)
    plots.velocity_field(flow, extent=3.0, num=21, ax=plane)
    plots.trajectories(climb, ax=plane)
    plane.set_title(r"its flow $\dot z = \nabla u_k(z, t)$")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
