"""Populations out of files and AnnData objects, and back."""

import sys

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import cflow
from cflow import ArgumentError, ArgumentTypeError, CflowError, DataError, DependencyError
from cflow.populations import Snapshots, annotate

anndata = pytest.importorskip("anndata")
pandas = pytest.importorskip("pandas")

X = np.random.default_rng(0).normal(size=(40, 3))
DAY = np.repeat([0.0, 2.0, 3.5, 9.0], 10)


def cells(day=DAY, x=X):
    made = anndata.AnnData(obs=pandas.DataFrame({"day": day}, index=[f"c{i}" for i in range(len(x))]))
    made.obsm["X_pca"] = x
    return made


@pytest.mark.parametrize("day", [DAY, DAY.astype(np.float32), pandas.Categorical(DAY), DAY.astype(str)])
def test_snapshots_of_anndata(day):
    order = np.random.default_rng(1).permutation(40)
    snapshots = Snapshots.from_anndata(cells(pandas.Series(day).iloc[order].to_numpy(), X[order]), dims=2)
    assert snapshots.t.tolist() == [0.0, 2.0, 3.5, 9.0]
    assert snapshots.dim == 2
    assert np.array_equal(np.sort(snapshots.x[2], axis=0), np.sort(X[20:30, :2], axis=0))


@pytest.mark.parametrize("ending", ["h5ad", "npz", "csv"])
def test_snapshots_of_files(tmp_path, ending):
    path = tmp_path / f"cells.{ending}"
    if ending == "h5ad":
        cells().write_h5ad(path)
    elif ending == "npz":
        np.savez(path, x=X, time=DAY)
    else:
        pandas.DataFrame({"a": X[:, 0], "day": DAY, "b": X[:, 1], "c": X[:, 2]}).to_csv(path, index=False)
    snapshots = Snapshots.from_file(path)
    assert snapshots.counts == [10, 10, 10, 10]
    assert np.allclose(torch.cat(snapshots.x), X)
    assert Snapshots.from_file(str(path), dims=1).dim == 1


def test_annotations_are_those_of_a_known_flow(float64):
    # v = A z + b carries the Gaussian of the first cells; u = ½ zᵀAz + b·z
    matrix, shift = torch.diag(torch.tensor([0.1, -0.2, 0.0])), torch.tensor([0.0, 1.0, 0.5])
    flow = cflow.PotentialFlow(cflow.QuadraticPotential(matrix[None], shift[None]), solver=cflow.Solver("dopri8"))
    adata = cells()
    annotate(adata, flow)
    z = torch.from_numpy(X)
    assert np.allclose(adata.obsm["velocity_pca"], z @ matrix + shift, atol=1e-6)
    assert np.allclose(adata.obs["potential"], 0.5 * (z @ matrix * z).sum(1) + z @ shift, atol=1e-6)
    first = torch.from_numpy(X[:10])
    scale = (matrix.diagonal() * 9.0).exp()
    there = torch.where(matrix.diagonal() == 0, 9.0, (scale - 1) / matrix.diagonal()) * shift
    wanted = MultivariateNormal(scale * first.mean(0) + there, scale[:, None] * first.mT.cov() * scale)
    assert np.allclose(adata.obs["log_density"].iloc[30:], wanted.log_prob(z[30:]), atol=1e-4)
    assert np.allclose(adata.obs["log_density"].iloc[:10], cflow.populations.gaussian(first).log_prob(first), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Snapshots.from_anndata(X), "adata: expected an anndata.AnnData, got ndarray"),
        (lambda: Snapshots.from_anndata(cells(), "X_pcs"), "basis: obsm has no 'X_pcs', only X_pca. Did you mean"),
        (
            lambda: Snapshots.from_anndata(cells(), time="days"),
            "time: obs has no 'days', only day. Did you mean",
        ),
        (
            lambda: Snapshots.from_anndata(cells(["Day 1"] * 40)),
            r"time: obs\['day'\] holds 'Day 1', which is no",
        ),
        (lambda: Snapshots.from_anndata(cells(DAY > 1)), r"time: obs\['day'\] holds booleans"),
        (lambda: Snapshots.from_anndata(cells([np.nan] * 3 + [0.0] * 37)), "time: 3 of 40 members have no finite time"),
        (lambda: Snapshots.from_anndata(cells(), dims=4), "dims: expected at most the 3 coordinates"),
        (lambda: Snapshots.from_anndata(cells(), dims=0), "dims: expected an int ≥ 1"),
        (lambda: Snapshots.from_file(3), "path: expected the path of a file, got int"),
        (lambda: Snapshots.from_file("cells.txt"), "path: expected a file that ends in .h5ad, .npz, .csv"),
        (lambda: Snapshots.from_file("nowhere.npz"), "path: there is no file 'nowhere.npz'"),
        (
            lambda: annotate(cells(), cflow.PotentialFlow(cflow.RidgePotential(2))),
            "flow: has D = 2, but the",
        ),
        (
            lambda: annotate(
                cells(),
                cflow.PotentialFlow(cflow.RidgePotential(3)),
                base=cflow.populations.gaussian(torch.randn(9, 2)),
            ),
            r"base: expected event shape \(D,\) = \(3,\)",
        ),
    ],
)
def test_bad_cells(call, message):
    with pytest.raises((ArgumentError, ArgumentTypeError, DataError), match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n", "has no column 't' or 'time' or 'day' of times, only a, b"),
        ("a.csv", b"a,t\n1,2,3\n", "line 2 of .* has 3 values, but the header 2"),
        ("a.csv", b"a,t\n1,2\nx,3\n", "column 'a' of .* holds 'x', which is no number"),
        ("a.csv", b"a,a,t\n1,2,3\n", "two columns of one name"),
        ("a.csv", b"a,t\n,3\n", r"x\[0\]: 1 of 1 members hold NaN"),
        ("a.csv", b"a,t\n1,\n", "time: 1 of 1 members have no finite time"),
        ("a.csv", b"t\n1\n", r"x\[0\]: expected members"),
        ("a.csv", b"", "cannot be read as a table"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read as a table"),
        ("a.npz", b"PK no", "cannot be read as arrays"),
        ("a.h5ad", b"\x89HDF no", "cannot be read as AnnData"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CflowError, match=message):
        Snapshots.from_file(path)


def test_bad_archives(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, cells=X, t=DAY)
    with pytest.raises(DataError, match=r"has no array 'x' \(N, D\), only cells, t"):
        Snapshots.from_file(path)
    np.savez(path, x=X, t=np.array([object()] * 40))
    with pytest.raises(DataError, match="cannot be read as arrays"):
        Snapshots.from_file(path)
    np.savez(path, x=X, labels=DAY)
    with pytest.raises(DataError, match="has no array 'when' of times, only x, labels"):
        Snapshots.from_file(path, time="when")
    assert len(Snapshots.from_file(path, time="labels")) == 4


def test_anndata_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.h5ad"
    path.touch()
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(DependencyError, match=r"pip install 'cflow-torch\[cells\]'"):
        Snapshots.from_file(path)
