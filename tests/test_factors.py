"""Factor grids: what a sequence changes, what parts share, the files, and the renderer that makes small ones."""

import itertools
import pickle

import numpy as np
import pytest
import torch

import cflow
from cflow.data.factors import FactorGrid, kept
from cflow.data.stored import Images

GRIDS = [
    ({"floor_hue": 10, "wall_hue": 10, "object_hue": 10, "scale": 8, "shape": 4, "orientation": 15}, None, 8),
    ({"floor_hue": 8, "wall_hue": 8, "object_hue": 8, "scale": 8, "shape": 1, "orientation": 8}, None, 8),
    ({"a": 4, "b": 3, "c": 5, "d": 3}, None, 3),
    ({"a": 3, "b": 3, "c": 3}, None, 3),
    ({"a": 3, "b": 8, "c": 5, "d": 4, "e": 4, "f": 4, "g": 6, "h": 4, "i": 4}, None, 4),
    ({"a": 1, "b": 8, "c": 8}, ["b"], 5),
    ({"a": 3, "b": 8, "c": 5}, ["c", "b"], 5),
    ({"a": 3, "b": 3, "c": 3, "d": 2}, ["a", "d"], 2),
]
IDS = [" ".join(map(str, sizes.values())) for sizes, *_ in GRIDS]


class Numbered(Images):
    """Image n holds the bytes of n."""

    shape = (1, 1, 4)

    def read(self, numbers):
        return numbers.astype("<u4").view(np.uint8).reshape(-1, *self.shape)


def read_numbers(part, index, k, t):
    """The numbers of the images that `read` gives, (B, T+1)."""
    return part.read(index, k, t).numpy().view("<u4")[:, :, 0, 0, 0].astype(np.int64)


@pytest.mark.parametrize(("sizes", "factors", "frames"), GRIDS, ids=IDS)
@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_sequence_counts_through_one_factor_and_changes_no_other(sizes, factors, frames, name) -> None:
    grid = FactorGrid(Numbered(), sizes, factors, frames)
    part = grid.split(name)
    index = torch.randint(len(part), (200,))
    for k, factor in enumerate(grid.names):
        numbers = read_numbers(part, index, torch.full((200,), k), grid.times)
        digits = dict(zip(sizes, np.unravel_index(numbers, list(sizes.values())), strict=True))
        changing = digits.pop(factor)
        assert (np.diff(changing) == 1).all()
        assert all((digit == digit[:, :1]).all() for digit in digits.values())
        starts = sizes[factor] - frames + 1 if name == "train" else 1
        if starts == 1:
            assert (changing[:, 0] == 0).all()
        else:
            assert changing[:, 0].max() < starts
            assert len(np.unique(changing[:, 0])) > 1


def test_training_starts_are_as_often_as_others() -> None:
    part = FactorGrid(Numbered(), dict.fromkeys("abcde", 8), None, 5).split("train")
    index, first = torch.arange(len(part)), torch.zeros(1)
    for k in range(5):
        start = part.numbers(index, torch.full((len(part),), k), first) // 8 ** (4 - k) % 8
        assert np.bincount(start[:, 0]) / len(part) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(("sizes", "factors", "frames"), GRIDS, ids=IDS)
def test_parts_share_no_image_of_any_sequence(sizes, factors, frames) -> None:
    grid = FactorGrid(Numbered(), sizes, factors, frames)
    shown = {}
    for name in ("train", "val", "test"):
        part = grid.split(name)
        images = [
            part.numbers(torch.arange(len(part)), torch.full((len(part),), k), grid.times).unique()
            for k in range(len(grid.names))
        ]
        shown[name] = torch.cat(images).unique().numpy()
    for one, other in itertools.combinations(shown.values(), 2):
        assert not len(np.intersect1d(one, other))


@pytest.mark.parametrize("sizes", [(8, 1, 8), (3, 3, 1), (2, 2, 2, 2, 2), (2, 2, 2, 2)])
def test_parts_of_a_small_grid_share_no_sequence(sizes) -> None:
    grid = FactorGrid(Numbered(), dict(zip("abcde", sizes, strict=False)), None, 2)
    for k in range(len(grid.names)):
        seen = {}
        for name in ("train", "val", "test"):
            part = grid.split(name)
            numbers = part.numbers(torch.arange(len(part)), torch.full((len(part),), k), grid.times)
            seen[name] = {tuple(row) for row in numbers.tolist()}
        assert not any(one & other for one, other in itertools.combinations(seen.values(), 2))


def test_parts_are_always_the_same_and_half_of_a_grid_is_trained_on() -> None:
    sizes = {"floor_hue": 10, "wall_hue": 10, "object_hue": 10, "scale": 8, "shape": 4, "orientation": 15}
    grid = FactorGrid(Numbered(), sizes)
    assert grid.names == ("floor_hue", "wall_hue", "object_hue", "scale", "orientation")
    parts = {name: grid.split(name) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 263880, "val": 864, "test": 4608}
    index, k = torch.arange(50), torch.zeros(50, dtype=torch.long)
    again = FactorGrid(Numbered(), sizes).split("train").numbers(index, k, grid.times)
    assert torch.equal(again, parts["train"].numbers(index, k, grid.times))


@pytest.mark.parametrize("size", range(2, 20))
def test_kept_values_differ_and_leave_some_for_training(size) -> None:
    for turn in range(5):
        val, test = kept(size, turn)
        assert len(val)
        assert len(test)
        assert len({*val, *test}) == len(val) + len(test) <= max(size - 1, 2)
        assert {*val, *test} <= set(range(size))


def test_the_order_of_frames_is_that_of_their_times() -> None:
    part = FactorGrid(Numbered(), {"a": 9, "b": 4, "c": 4}, None, 4).split("test")
    index, k = torch.tensor([3, 3, 5]), torch.tensor([0, 1, 2])
    t = torch.tensor([[0.0, 3.0, 1.0, 1.0], [2.0, 0.0, 0.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    strides = torch.tensor([16, 4, 1])
    numbers = read_numbers(part, index, k, t)
    assert np.array_equal(
        numbers - numbers.min(1, keepdims=True), ((t - t.amin(1)[:, None]) * strides[k][:, None]).numpy()
    )
    for wrong in (torch.tensor([0.0, 0.5]), torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 9.0])):
        with pytest.raises(cflow.ArgumentError, match=r"^t: frames are stored at 0, 1, …, 3, got"):
            part.read(index, k, wrong)
    x = part.frames(part.read(index, k, t), k, t)
    assert x.shape == (3, 4, 4, 1, 1)
    assert torch.equal(pickle.loads(pickle.dumps(part)).sequences(index, k, t), x)


@pytest.mark.parametrize(
    ("sizes", "factors", "frames", "error"),
    [
        ({"a": 8, "b": 4}, ["c"], 3, "'c' is none of a, b"),
        ({"a": 8, "b": 4}, ["a", "b"], 5, "b has 4 values, fewer than data.num_frames=5"),
        ({"a": 8, "b": 4}, ["a", "a"], 3, "each once"),
        ({"a": 8, "b": 4}, [], 3, "expected some factors"),
        ({"a": 3, "b": 4}, None, 8, "as many values as data.num_frames=8; b has 4"),
    ],
)
def test_factors_that_cannot_be(sizes, factors, frames, error) -> None:
    with pytest.raises(cflow.CflowError, match=error):
        FactorGrid(Numbered(), sizes, factors, frames)


@pytest.mark.parametrize("sizes", [{"a": 8, "b": 1}, {"a": 2, "b": 2}, {"a": 2, "b": 1}])
def test_a_grid_too_small_for_three_parts(sizes) -> None:
    with pytest.raises(cflow.DataError, match=r"too few values \(a \d, b \d\)"):
        FactorGrid(Numbered(), sizes, None, 2).split("train")
