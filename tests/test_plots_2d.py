"""What the two-dimensional pictures show: the data in their artists, against closed forms."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import tight
from torch.distributions import MultivariateNormal, TransformedDistribution

import cflow
from cflow.plots import density, potential_surface, trajectories, velocity_field

Figure = pytest.importorskip("matplotlib.figure").Figure

MATRICES = torch.tensor([[[1.0, 0.5], [0.5, -1.0]], [[-0.4, 0.0], [0.0, -0.4]]], dtype=torch.float64)


@pytest.fixture
def flow() -> cflow.PotentialFlow:
    return cflow.PotentialFlow(cflow.QuadraticPotential(MATRICES), solver=tight())


def flat_axes():
    return Figure().add_subplot()


@pytest.fixture
def surface(monkeypatch):
    """The last (x, y, u) handed to `plot_surface`; the collection it makes keeps them private."""
    from mpl_toolkits.mplot3d import Axes3D

    drawn, draw = [], Axes3D.plot_surface

    def plot_surface(self, *data, **settings):
        drawn[:] = data
        return draw(self, *data, **settings)

    monkeypatch.setattr(Axes3D, "plot_surface", plot_surface)
    return drawn


def test_surface_is_the_selected_potential(flow, surface):
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for k, matrix in ((0, MATRICES[0]), (1, MATRICES[1]), (w, MATRICES[0] + 2 * MATRICES[1])):
        ax = potential_surface(flow, k, extent=2.0, num=9)
        x, y, u = surface
        z = np.stack([x, y], -1)
        np.testing.assert_allclose(u, 0.5 * np.einsum("xyi,ij,xyj->xy", z, matrix.numpy(), z), atol=1e-12)
        np.testing.assert_allclose(ax.get_xlim() + ax.get_ylim(), (-2, 2, -2, 2))


def test_paths_lie_on_the_surface(flow):
    path = flow.solve(torch.tensor([[0.3, 1.0], [-1.0, 0.2]], dtype=torch.float64), 0, torch.linspace(0, 1, 7))
    ax = potential_surface(flow, 0, num=9, extent=2.0, paths=path)
    lines = [line for line in ax.lines if len(line.get_data_3d()[0]) == 7]
    assert len(lines) == 2
    assert not ax.computed_zorder  # by depth, a path on the far side would vanish
    assert min(line.get_zorder() for line in lines) > ax.collections[0].get_zorder()
    for b, line in enumerate(lines):
        x, y, height = line.get_data_3d()
        z = path.z[:, b].detach().numpy()
        np.testing.assert_allclose(np.stack([x, y], -1), z)
        u = 0.5 * np.einsum("ni,ij,nj->n", z, MATRICES[0].numpy(), z)
        spread = height - u  # drawn a constant hair above the surface, to be seen
        np.testing.assert_allclose(spread, spread[0], atol=1e-12)
        assert 0 < spread[0] < 0.1


def test_flat_axes_get_contours_of_the_potential(flow):
    ax = potential_surface(flow, 1, extent=1.0, num=21, ax=flat_axes())
    contours = ax.collections[0]
    assert (contours.zmin, contours.zmax) == pytest.approx((-0.4, 0.0), abs=1e-12)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_1$", "$z_2$")


def test_surface_sees_the_clock_of_a_schedule(surface):
    class Clock(torch.nn.Module):
        dim, num_flows = 2, 1

        def forward(self, z, t):
            return (t * z[:, 0])[:, None]

    flow = cflow.PotentialFlow(Clock())
    schedule = cflow.Schedule([0.0, 2.0, 4.0], [0, 0], clock="segment")
    potential_surface(flow, schedule, 2.5, num=3)
    x, _, u = surface
    np.testing.assert_allclose(u, 0.5 * x, atol=1e-6)


def test_a_potential_that_holds_only_buffers_is_drawn_in_its_precision(surface):
    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("depth", torch.tensor(0.5))

        def forward(self, z, t):
            return self.depth * z.square().sum(-1)

    potential_surface(cflow.PotentialFlow(Bowl().double()), extent=1.0, num=3)
    assert surface[2].max() == pytest.approx(1.0, abs=1e-15)


def test_arrows_are_the_gradient(flow):
    ax = velocity_field(flow, 0, extent=(-1.0, 2.0, 0.0, 1.0), num=4)
    arrows = ax.collections[0]
    v = arrows.XY @ MATRICES[0].numpy()
    np.testing.assert_allclose(np.stack([arrows.U, arrows.V], -1), v, atol=1e-12)
    np.testing.assert_allclose(arrows.get_array(), np.linalg.norm(v, axis=1), atol=1e-12)
    np.testing.assert_allclose(ax.get_xlim() + ax.get_ylim(), (-1, 2, 0, 1))


def test_trajectories_with_their_ends_and_groups(flow):
    z0 = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([0, 1, 1, 0, 1])
    path = flow.solve(z0, k, torch.linspace(0, 1, 6))
    ax = trajectories(path, groups=k, names=["saddle", "sink"])
    paths = [line for line in ax.lines if len(line.get_xdata()) == 6 and line.get_linestyle() == "-"]
    order = [0, 3, 1, 2, 4]
    for line, b in zip(paths, order, strict=True):
        np.testing.assert_allclose(line.get_xydata(), path.z[:, b].detach().numpy())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["saddle", "sink"]
    assert len({line.get_color() for line in paths}) == 2
    starts = [line for line in ax.lines if line.get_markerfacecolor() == "white" and line.get_marker() == "o"]
    np.testing.assert_allclose(np.concatenate([s.get_xydata() for s in starts]), z0[order].numpy())
    alone = trajectories(path.z)
    assert alone.get_legend() is None
    assert alone.get_legend_handles_labels()[1] == ["paths"]  # in a legend that the caller draws


def test_groups_beyond_the_palette_are_told_apart():
    ax = trajectories(torch.zeros(3, 16, 2), groups=range(16))
    paths = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert len({(line.get_color(), line.get_linestyle()) for line in paths}) == 16


def test_density_integrates_to_one_and_matches_the_gaussian(flow):
    base = MultivariateNormal(torch.zeros(2, dtype=torch.float64), 0.5 * torch.eye(2, dtype=torch.float64))
    pushed = TransformedDistribution(base, [flow.transform(1, t=(0.0, 1.0), cache_size=1)])
    ax = density(pushed, extent=5.0, num=101)
    p = np.asarray(ax.collections[0].get_array())
    assert p.sum() * (10 / 100) ** 2 == pytest.approx(1.0, abs=1e-6)
    assert p.max() == pytest.approx(math.exp(0.8) / (2 * math.pi * 0.5), rel=1e-6)  # the sink contracts areas by e^-0.8


def test_the_axes_given_are_drawn_into(flow):
    path = torch.zeros(3, 2, 2)
    normal = MultivariateNormal(torch.zeros(2), torch.eye(2))
    for draw in (
        lambda ax: potential_surface(flow, 0, num=5, ax=ax),
        lambda ax: velocity_field(flow, 0, num=5, ax=ax),
        lambda ax: trajectories(path, ax=ax),
        lambda ax: density(normal, num=5, ax=ax),
    ):
        ax = flat_axes()
        assert draw(ax) is ax
        assert ax.has_data()


def test_wrong_arguments_are_named(flow):
    wide = cflow.PotentialFlow(cflow.MLPPotential(3))
    for call, name in (
        (lambda: velocity_field(wide), "flow"),
        (lambda: potential_surface(wide), "flow"),
        (lambda: velocity_field(flow, 0, extent=-1.0), "extent"),
        (lambda: velocity_field(flow, 0, num=1), "num"),
        (lambda: trajectories(torch.zeros(3, 2)), "paths"),
        (lambda: trajectories(torch.zeros(3, 2, 2), groups=[0]), "groups"),
        (lambda: trajectories(torch.zeros(3, 2, 2), groups=[0, 1], names=["one"]), "names"),
        (lambda: density(torch.distributions.Normal(0.0, 1.0)), "distribution"),
    ):
        with pytest.raises(cflow.ArgumentError, match=f"^{name}:"):
            call()


@pytest.mark.ci
def test_matplotlib_and_pyplot_stay_out_until_needed():
    code = (
        "import sys, torch, cflow, cflow.plots as p\n"
        "print('matplotlib' in sys.modules)\n"
        "p.velocity_field(cflow.PotentialFlow(cflow.MLPPotential(2)), num=3)\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
