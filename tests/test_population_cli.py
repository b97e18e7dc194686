"""`cflow fit --config population`: from a file of cells to a flow in their own units."""

import json

import numpy as np
import pytest
import torch

import cflow
from cflow.populations import Snapshots, wasserstein

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.training import cli

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = [
    *("--model.hidden", "32", "--data.batch_size", "32", "--model.lr", "0.02", "--trainer.accelerator", "cpu"),
    *("--trainer.devices", "1", "--trainer.val_check_interval", "40"),
]
SHIFT = np.array([300.0, 0.0])  # in 8 days, of cells that spread by 100


def table(path, times=(2.0, 6.0, 10.0)):
    """A .csv of cells that move at a constant velocity, far from zero and at times that are no frames."""
    x = 100 * np.random.default_rng(0).normal(size=(3, 120, 2)) + np.array([5000.0, -2000.0])
    lines = ["day,a,b"]
    for t, cells in zip(times, x, strict=True):
        lines += [f"{t},{a},{b}" for a, b in cells + SHIFT * (t - 2) / 8]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of 80 steps on a file, with the last time but one held out, and its output."""
    import contextlib
    import io

    folder, out = tmp_path_factory.mktemp("population"), io.StringIO()
    table(folder / "cells.csv")
    words = ["fit", "--config", "population", "--data.root", "cells.csv", *TINY, "--trainer.max_steps", "80"]
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        assert cli.main([*words, "--data.held_out", "[6.0]"]) == 0
    return folder / "runs" / "population" / "version_0", out.getvalue()


def test_a_run_leaves_its_files_and_a_table(fitted):
    run, out = fitted
    wanted = (
        "config.yaml",
        "metrics.json",
        "landscape.png",
        "marginals.png",
        "population.gif",
        "checkpoints/best.ckpt",
    )
    for name in (*wanted, "checkpoints/last.ckpt", "flow/config.json", "flow/model.safetensors"):
        assert (run / name).stat().st_size > 0, name
    metrics = json.loads((run / "metrics.json").read_text())
    groups = ("wasserstein", "previous", "floor")
    keys = {f"{name}/{t}" for name in groups for t in ("6", "10", "mean")} | {"held_out/6", "seconds", "samples"}
    assert set(metrics) == keys
    assert metrics["wasserstein/6"] < 0.6 * metrics["previous/6"]
    assert "6 (held out)" in out
    assert "landscape.png" in out
    assert "192 members at 2 times of cells.csv: matching" in out


def test_the_flow_of_a_run_is_in_the_units_of_the_data(fitted):
    flow = cflow.PotentialFlow.from_pretrained(fitted[0] / "flow")
    snapshots = Snapshots.from_file(fitted[0].parents[2] / "cells.csv")
    start = snapshots.x[0].float()
    with torch.no_grad():
        moved = flow(start, t=(2.0, 10.0))
    assert (moved - start).mean(0) == pytest.approx(torch.from_numpy(SHIFT).float(), abs=60)
    metrics = json.loads((fitted[0] / "metrics.json").read_text())
    # all cells are nearer than the few that were held out, whose floor is higher
    assert wasserstein(moved, snapshots.x[2]) < metrics["wasserstein/10"] * 1.5


@pytest.mark.ci
def test_a_test_repeats_the_measures_and_a_fit_goes_on(fitted, monkeypatch, capsys):
    run, _ = fitted
    monkeypatch.chdir(run.parents[2])
    before = json.loads((run / "metrics.json").read_text())
    assert (
        cli.main(["test", "--ckpt_path", "runs/population", "--trainer.accelerator", "cpu", "--out_dir", "again"]) == 0
    )
    after = json.loads((run.parents[2] / "again" / "metrics.json").read_text())
    assert after == pytest.approx(before, rel=1e-4)  # also of what is held out, which the checkpoint says
    assert cli.main(["fit", "--ckpt_path", "last", *TINY, "--trainer.max_steps", "81"]) == 0
    assert "steps 80 to 81" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.root", "nowhere.h5ad"], "path: there is no file 'nowhere.h5ad'"),
        (["--data.root", "cells.csv", "--data.held_out", "[7.0]"], "data.held_out: 7 is no time of the data"),
        (["--data.root", "cells.csv", "--data.held_out", "[2.0,6.0]"], "expected two snapshots at least"),
        (["--data.root", "few.csv"], "data.root: expected 20 members in every snapshot"),
        (["--data.dims", "9"], "dims: expected at most the 5 coordinates"),
        (["--model.loss", "sinkhorm"], "--model.loss: expected "),
        (["--model.width", "3"], "unknown option --model.width"),
        (["--model.noise", "-1"], "noise: expected a number ≥ 0"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "cells.csv")
    (tmp_path / "few.csv").write_text("t,a\n0,1\n1,2\n")
    try:
        code = cli.main(["fit", "--config", "population", *words])
    except SystemExit as ending:
        code = ending.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_printed_configuration_is_still_of_a_population(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "population", "--print_config"])
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "mine.yaml", "--help"])
    text = capsys.readouterr().out
    assert "--model.hamilton_jacobi" in text
    assert "--model.latent_dim" not in text
    assert cli.main(["traverse", "--config", "population"]) == 2
    assert "`cflow test` draws a population" in capsys.readouterr().err
