"""What the pictures of numbers show: the data in their lines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cflow
from cflow.plots import training_curves, work_precision

Figure = pytest.importorskip("matplotlib.figure").Figure


def flat_axes():
    return Figure().add_subplot()


def data(line) -> list[list[float]]:
    return [[float(v) for v in part] for part in line.get_data()]


# --- training curves -------------------------------------------------------------------------------------------


def test_each_curve_is_drawn_at_its_steps():
    curves = {
        "list": [3.0, 2.0, 1.0],
        "pair": ([0, 10], [5.0, 4.0]),
        "tensors": [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)],
        "array": np.array([[5.0, 6.0, 7.0], [1.0, 1.0, 2.0]]),
    }
    ax = training_curves(curves, ylabel="nats")
    assert {line.get_label(): data(line) for line in ax.lines} == {
        "list": [[0, 1, 2], [3, 2, 1]],
        "pair": [[0, 10], [5, 4]],
        "tensors": [[0, 1], [1, 2]],
        "array": [[5, 6, 7], [1, 1, 2]],
    }
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(curves)
    assert len({line.get_color() for line in ax.lines}) == 4
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("step", "nats", "linear")


def test_names_choose_and_order():
    ax = training_curves({"a": [1, 2], "b": [3, 4], "c": [5, 6]}, names=["c", "a"], log=True, xlabel="epoch")
    assert [line.get_label() for line in ax.lines] == ["c", "a"]
    assert (ax.get_xlabel(), ax.get_yscale()) == ("epoch", "log")


def test_smoothing_is_the_mean_of_the_last_values_and_keeps_a_gap_local():
    ax = training_curves({"loss": [1.0, 3.0, 5.0, math.nan, 1.0, 1.0]}, smooth=2)
    faint, smooth = ax.lines
    assert faint.get_alpha() < 0.5
    np.testing.assert_array_equal(faint.get_ydata(), [1.0, 3.0, 5.0, math.nan, 1.0, 1.0])
    np.testing.assert_array_equal(smooth.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(smooth.get_ydata(), [2.0, 4.0, math.nan, math.nan, 1.0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["loss"]


def test_more_values_to_smooth_over_than_there_are_and_a_single_one():
    ax = training_curves({"short": [1.0, 3.0], "one": [7.0]}, smooth=10)
    drawn = {line.get_label(): line for line in ax.lines}
    assert data(drawn["short"]) == [[1], [2]]
    assert data(drawn["one"]) == [[0], [7]]
    assert drawn["one"].get_marker() == "o"


@pytest.fixture
def run(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for part in ("fit", "test"):  # Lightning opens a second file for the test that follows
        with tensorboard.SummaryWriter(tmp_path / "run" / part) as writer:
            for step in range(3) if part == "fit" else range(3, 4):
                writer.add_scalar("loss", 10.0 - step, 50 * step)
                writer.add_scalar("epoch", step, 50 * step)
            writer.add_scalar("hp_metric", -1.0, 0)  # Lightning's, in either file
            writer.add_scalar(f"{part}/error", 2.0, 150)
    return tmp_path / "run"


def test_a_folder_is_read(run):
    (line,) = training_curves(run).lines
    assert line.get_label() == "loss"
    assert data(line) == [[0, 50, 100, 150], [10, 9, 8, 7]]
    (line,) = training_curves(str(run), names=["test/error"]).lines
    assert data(line) == [[150], [2]]


def test_wrong_curves_are_named(run, tmp_path):
    for call, message in (
        (lambda: training_curves({"loss": [1, 2]}, names=["los"]), r"names: no 'los'.* Did you mean 'loss'\?"),
        (lambda: training_curves(run, names=["val"]), "names: no 'val'"),
        (lambda: training_curves({"loss": [1, 2]}, smooth=0), "smooth: "),
        (lambda: training_curves({"loss": []}), "curves: .*'loss'"),
        (lambda: training_curves({"loss": torch.zeros(3, 4)}), r"curves: .*\(3, 4\)"),
        (lambda: training_curves({"loss": ([0, 1], [1.0, 2.0, 3.0])}), "curves: .*'loss'"),
        (lambda: training_curves(tmp_path / "none"), "curves: no TensorBoard files"),
    ):
        with pytest.raises(cflow.ArgumentError, match=f"^{message}"):
            call()


# --- work and precision ----------------------------------------------------------------------------------------

POINTS = [
    {"method": "rk4", "gradient": "direct", "nfe": 32, "error": 1e-4, "seconds": 0.2},
    {"method": "euler", "gradient": "direct", "nfe": 8, "error": 0.1, "seconds": 0.1},
    {"method": "rk4", "gradient": "direct", "nfe": 8, "error": 1e-2, "seconds": 0.1},
    {"method": "rk4", "gradient": "adjoint", "nfe": 16, "error": 1e-3, "seconds": 0.4},
]


def test_a_line_for_each_method_sorted_by_cost():
    ax = work_precision(POINTS)
    assert {line.get_label(): data(line) for line in ax.lines} == {
        "rk4": [[8, 16, 32], [1e-2, 1e-3, 1e-4]],
        "euler": [[8], [0.1]],
    }
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("velocity evaluations", "error")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rk4", "euler"]


def test_keys_tell_lines_apart_and_labels_can_be_given():
    ax = work_precision(POINTS, x="seconds", by=("method", "gradient"), ylabel="largest error of z")
    assert [line.get_label() for line in ax.lines] == ["rk4, direct", "euler, direct", "rk4, adjoint"]
    assert data(ax.lines[0]) == [[0.1, 0.2], [1e-2, 1e-4]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time, seconds", "largest error of z")


def test_points_without_a_place_are_counted():
    bad = [{"method": "rk4", "nfe": 64, "error": e} for e in (0.0, math.nan, None, math.inf)]
    (line, _) = work_precision([*POINTS, *bad]).lines
    assert line.get_label() == "rk4 (4 not shown)"
    assert data(line)[0] == [8, 16, 32]


def test_many_lines_can_be_told_apart():
    ax = work_precision({"method": str(i), "nfe": n, "error": 1 / n} for i in range(20) for n in (1, 2))
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 20


def test_wrong_points_are_named():
    for points, message in (([], "points: there are none"), ([{"method": "a", "nfe": 1}], "points: .* no 'error'")):
        with pytest.raises(cflow.ArgumentError, match=f"^{message}"):
            work_precision(points)


def test_the_axes_given_are_drawn_into():
    for draw in (lambda ax: training_curves({"a": [1, 2]}, ax=ax), lambda ax: work_precision(POINTS, ax=ax)):
        ax = flat_axes()
        assert draw(ax) is ax
        assert ax.has_data()
