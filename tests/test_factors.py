"""Factor grids: what a sequence changes, what parts share, the files, and the renderer that makes small ones."""

import itertools
import json
import pickle
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import cflow
from cflow.data import DSprites, Falcor3D, Isaac3D, Shapes3D, make_factor_files, scenes
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
    shown = []
    for name in ("train", "val", "test"):
        part, of_part = grid.split(name), np.zeros(np.prod(list(sizes.values())), bool)
        for k in range(len(grid.names)):
            of_part[part.numbers(torch.arange(len(part)), torch.full((len(part),), k), grid.times).numpy()] = True
        shown.append(of_part)
    assert np.sum(shown, 0).max() == 1


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


SETS = {
    "shapes3d": (Shapes3D, (3, 4, 3, 4, 2, 3), (3, 64, 64)),
    "falcor3d": (Falcor3D, (2, 1, 3, 1, 3, 3, 1), (3, 128, 128)),
    "isaac3d": (Isaac3D, (2, 3, 3, 1, 1, 1, 1, 3, 1), (3, 128, 128)),
    "dsprites": (DSprites, (1, 3, 4, 4, 5, 4), (1, 64, 64)),
}
FILES = {
    "shapes3d": "3dshapes.h5",
    "falcor3d": "Falcor3D_down128",
    "isaac3d": "Isaac3D_down128",
    "dsprites": "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small file of every kind."""
    root = tmp_path_factory.mktemp("grids")
    for kind, (_, sizes, _) in SETS.items():
        make_factor_files(kind, root, sizes)
    return root


@pytest.mark.parametrize("kind", SETS)
def test_sizes_are_read_from_the_labels_or_declared(kind, small) -> None:
    make, sizes, shape = SETS[kind]
    grid = make(small, num_frames=3)
    assert tuple(grid.sizes.values()) == sizes == tuple(make(small, sizes=sizes, num_frames=3).sizes.values())
    assert grid.image_shape == shape
    assert grid.names == tuple(name for name, size in grid.sizes.items() if size >= 3)
    last = grid.names[-1]
    assert make(small, factors=[last], num_frames=2).names == (last,)
    for wrong in (sizes[::-1][1:], (*sizes[:-1], 0)):
        with pytest.raises(cflow.ArgumentError, match=r"^data\.sizes: expected how many values .* have, got"):
            make(small, sizes=wrong)
    for wrong in ((*sizes[:-1], sizes[-1] + 1), (*sizes[:-1], sizes[-1] - 1 or 5)):
        with pytest.raises(cflow.DataError, match=r"holds .* images"):
            make(small, sizes=wrong, num_frames=2)


@pytest.mark.parametrize("kind", SETS)
def test_every_factor_changes_its_images_and_parts_can_be_pickled_and_forked(kind, small) -> None:
    make, _, shape = SETS[kind]
    grid = make(small, num_frames=2)
    part = grid.split("train")
    count = len(grid.names)
    index, k = torch.arange(count) % len(part), torch.arange(count)
    x = part.sequences(index, k, grid.times)
    assert x.shape == (count, 2, *shape)
    assert ((x >= 0) & (x <= 1)).all()
    assert ((x[:, 0] - x[:, 1]).abs().amax((1, 2, 3)) > 0.05).all()
    stored = part.read(index, k, grid.times)
    assert stored.dtype == torch.uint8
    assert torch.equal(pickle.loads(pickle.dumps(part)).read(index, k, grid.times), stored)
    forked = torch.utils.data.DataLoader(Reads(part, index, k), batch_size=None, num_workers=2)
    assert all(torch.equal(found, stored) for found in forked)


class Reads(torch.utils.data.Dataset):
    """Two items, each the same sequences, read in whatever process asks."""

    def __init__(self, part, index, k):
        self.part, self.index, self.k = part, index, k

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return self.part.read(self.index, self.k, self.part.times)


def test_files_have_the_published_formats(small) -> None:
    with h5py.File(small / FILES["shapes3d"]) as file:
        sizes = SETS["shapes3d"][1]
        assert file["images"].shape == (np.prod(sizes), 64, 64, 3)
        assert file["labels"].dtype == np.float64
        labels = file["labels"][:].reshape(*sizes, 6)
    assert labels[1, 2, 0, -1, 1, 0] == pytest.approx([1 / 3, 0.5, 0, 1.25, 1, -30])
    falcor, isaac = small / FILES["falcor3d"], small / FILES["isaac3d"]
    assert np.load(falcor / "train-rec.labels").shape == (54, 7)
    labels = np.load(isaac / "labels.npy")
    sizes = np.array(SETS["isaac3d"][1])
    digits = np.stack(np.unravel_index(np.arange(len(labels)), sizes), 1)
    assert (np.rint(labels * (sizes - 1)) == digits).all()
    for folder in (falcor, isaac):
        with Image.open(folder / "images" / "000053.png") as image:
            assert (image.mode, image.size) == ("RGB", (128, 128))
    with np.load(small / FILES["dsprites"]) as file:
        assert file["imgs"].shape == (960, 64, 64)
        assert np.unique(file["imgs"]).tolist() == [0, 1]
        assert file["latents_classes"][-1].tolist() == [0, 2, 3, 3, 4, 3]


def test_sprites_are_where_and_as_large_as_they_should_be() -> None:
    for shape, area in (("square", 256), ("ellipse", 64 * np.pi * 1.35 * 0.75), ("heart", 64 * 3.66)):
        image = scenes.sprite(shape, 1.0, 0.3, np.array([[0.25, 0.75]]))[0]
        assert image.sum() == pytest.approx(area, rel=0.03)
        rows, columns = np.nonzero(image)
        if shape != "heart":  # whose middle is not that of its area
            assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((0.35 * 64, 0.65 * 64), abs=0.2)


def test_a_room_is_painted_in_the_hues_of_its_parts() -> None:
    bright = scenes.room(1.0, "sphere", 0.0)
    image = scenes.paint(bright, np.array([[0.0, 1 / 3, 2 / 3]]))[0]
    for number, (row, column) in enumerate([(60, 10), (5, 10), (40, 32)]):  # floor, wall, object
        assert image[row, column].argmax() == number
        assert bright[number, row, column] > 0.3
    turned = scenes.room(1.0, "sphere", 30.0)
    assert np.abs(turned[1] - bright[1]).max() > 0.1  # the corner of the walls has moved
    large = scenes.room(1.25, "sphere", 0.0)
    assert (large[2] > 0).sum() / (bright[2] > 0).sum() == pytest.approx(1.25**2, rel=0.1)


@pytest.mark.parametrize("kind", SETS)
def test_what_is_missing_is_named_with_where_to_get_it(kind, tmp_path) -> None:
    with pytest.raises(cflow.DataError, match=rf"there is no {FILES[kind]}; get it from https://github.com/"):
        SETS[kind][0](tmp_path)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^data\.root: expected the path of a folder, got int"):
        SETS[kind][0](3)


def test_hdf5_files_that_are_none(small, tmp_path) -> None:
    path = tmp_path / FILES["shapes3d"]
    whole = (small / FILES["shapes3d"]).read_bytes()
    for content in (b"", b"no HDF5 at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(cflow.DataError, match="is no HDF5 file, or a damaged one") as caught:
            Shapes3D(tmp_path)
        assert "\n" not in str(caught.value)
    wrong = {
        "has no set 'images', only 'labels'": {"labels": np.zeros((4, 6))},
        "has no set 'labels', only 'images'": {"images": np.zeros((4, 64, 64, 3), np.uint8)},
        r"expected 'images' of shape \(N, 64, 64, 3\) and uint8": {"images": np.zeros((4, 32, 32, 3), np.uint8)},
        "and uint8, got .* float64": {"images": np.zeros((4, 64, 64, 3))},
        r"expected labels of shape \(N, 6\)": {
            "images": np.zeros((4, 64, 64, 3), np.uint8),
            "labels": np.zeros((4, 2)),
        },
        "holds 4 images, but the labels say 1": {
            "images": np.zeros((4, 64, 64, 3), np.uint8),
            "labels": np.zeros((4, 6)),
        },
        "do not count through all combinations": {
            "images": np.zeros((4, 64, 64, 3), np.uint8),
            "labels": np.eye(6)[[0, 1, 0, 1]][:, ::-1],
        },
    }
    for error, content in wrong.items():
        with h5py.File(path, "w") as file:
            for name, values in content.items():
                file[name] = values
        with pytest.raises(cflow.DataError, match=error):
            Shapes3D(tmp_path)


@pytest.mark.parametrize("kind", ["falcor3d", "isaac3d"])
def test_folders_of_images_that_do_not_fit(kind, small, tmp_path) -> None:
    make, _, _ = SETS[kind]
    folder = tmp_path / FILES[kind]
    shutil.copytree(small / FILES[kind], folder)
    labels = next(path for path in folder.iterdir() if path.is_file())
    part = make(tmp_path, num_frames=3).split("train")
    everything = torch.arange(len(part)), torch.zeros(len(part), dtype=torch.long), part.times
    for number in range(54):
        (folder / "images" / f"{number:06d}.png").write_bytes(b"no PNG")
    with pytest.raises(cflow.DataError, match=r"images.0000\d\d\.png: is no PNG image, or a damaged one"):
        part.read(*everything)
    for number in range(54):
        Image.new("RGB", (64, 64)).save(folder / "images" / f"{number:06d}.png")
    with pytest.raises(cflow.DataError, match=r"expected an image of \(H, W, C\) = \(128, 128, 3\), got \(64, 64, 3\)"):
        part.read(*everything)
    (folder / "images" / "000053.png").unlink()
    with pytest.raises(cflow.DataError, match="holds fewer images than"):
        make(tmp_path)
    labels.write_bytes(b"no array")
    with pytest.raises(cflow.DataError, match="holds no array of NumPy's, or a damaged one") as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)
    labels.unlink()
    with pytest.raises(cflow.DataError, match="there is no such file; it says how many values factors have"):
        make(tmp_path)


def test_npz_files_that_are_none(small, tmp_path) -> None:
    path = tmp_path / FILES["dsprites"]
    whole = (small / FILES["dsprites"]).read_bytes()
    for content in (b"", b"no NPZ", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(cflow.DataError, match="is no NPZ file, or a damaged one"):
            DSprites(tmp_path)
    for error, content in {
        "has no array 'imgs'": {"latents_classes": np.zeros((4, 6))},
        "and uint8, got": {"imgs": np.zeros((4, 64, 64))},
        "has no array 'latents_classes'": {"imgs": np.zeros((4, 64, 64), np.uint8)},
    }.items():
        np.savez(path, **content)
        with pytest.raises(cflow.DataError, match=error):
            DSprites(tmp_path)


def test_a_pickled_array_is_never_opened(tmp_path) -> None:
    hostile = np.array([{"anything": 1}], dtype=object)
    np.savez(tmp_path / FILES["dsprites"], imgs=np.zeros((4, 64, 64), np.uint8), latents_classes=hostile)
    with pytest.raises(cflow.DataError, match="holds no array of NumPy's"):
        DSprites(tmp_path)


@pytest.mark.parametrize(
    ("kind", "sizes", "error"),
    [
        ("shapes", None, "kind: expected one of shapes3d, .* Did you mean 'shapes3d'"),
        ("shapes3d", (2, 2), "sizes: expected how many values floor_hue"),
        ("shapes3d", (2, 2, 2, 2, 5, 2), "shape has at most 4 values, got 5"),
        ("dsprites", (2, 1, 2, 2, 2, 2), "color has at most 1 values"),
        ("isaac3d", (1, 1, 1, 1, 1, 1, 1, 1, 1.5), "sizes: expected how many values object_shape"),
    ],
)
def test_files_that_cannot_be_made(kind, sizes, error, tmp_path) -> None:
    with pytest.raises(cflow.ArgumentError, match=error):
        make_factor_files(kind, tmp_path, sizes)


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_there_are_left_alone(kind, tmp_path) -> None:
    published = tmp_path / FILES[kind]
    published.write_bytes(b"days of downloading")
    with pytest.raises(cflow.DataError, match=r"^root=.*there is .* already"):
        make_factor_files(kind, tmp_path)
    assert published.read_bytes() == b"days of downloading"
    with pytest.raises(cflow.DataError, match=r"^root=.*cannot be written to \(.*\)$"):
        make_factor_files(kind, published)


TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.likelihood_samples", "2", "--trainer.max_steps", "2"),
    *("--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--data.num_frames", "3", "--data.batch_size", "8", "--data.num_workers", "0", "--data.test_samples", "8"),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "supervision", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("_weak", "_paper"))]
)
@pytest.mark.parametrize(
    "kind", ["shapes3d", *(pytest.param(kind, marks=pytest.mark.ci) for kind in ("falcor3d", "isaac3d"))]
)
def test_presets_train_from_their_command(kind, supervision, small, tmp_path, monkeypatch) -> None:
    cli = pytest.importorskip("cflow.training.cli")
    monkeypatch.chdir(tmp_path)
    preset = f"{kind}{supervision}"
    more = ["--model.frames_per_step", "3"] if supervision == "_paper" else []
    assert cli.main(["fit", "--config", preset, "--data.root", str(small), *TINY, *more]) == 0
    run = tmp_path / "runs" / preset / "version_0"
    numbers = json.loads((run / "metrics.json").read_text())
    names = SETS[kind][0](small, num_frames=3).names
    found = [key for key in numbers if key.startswith("black/") and not key.endswith("_stderr")]
    assert found == [f"black/{name}" for name in (*names, "mean")]
    assert cflow.load(run).flow.num_flows == len(names)
    assert (run / "traversals.png").is_file()


@pytest.mark.ci
@pytest.mark.usefixtures("one_thread")
def test_a_run_of_chosen_factors_is_tested_and_goes_on_with_them(small, tmp_path, monkeypatch, capsys) -> None:
    cli = pytest.importorskip("cflow.training.cli")
    monkeypatch.chdir(tmp_path)
    chosen = ["--data.root", str(small), "--data.factors", "[orientation,scale]"]
    assert cli.main(["fit", "--config", "shapes3d", *chosen, *TINY]) == 0
    assert cli.main(["traverse", "--ckpt_path", "last", "--trainer.accelerator", "cpu"]) == 0
    assert cli.main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "3"]) == 0
    numbers = json.loads((tmp_path / "runs/shapes3d/version_1/metrics.json").read_text())
    assert [key for key in numbers if key.startswith("black/") and not key.endswith("_stderr")] == [
        *("black/orientation", "black/scale", "black/mean")
    ]
    for command in ("test", "traverse"):
        assert cli.main([command, "--ckpt_path", "last", "--data.factors", "[scale,orientation]"]) == 2
        assert "knows orientation, scale, but the data are of scale, orientation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--data.factors", "[scale,hue]"], "data.factors: 'hue' is none of floor_hue"),
        (["--data.factors", "[shape]"], "data.factors: shape has 2 values, fewer than data.num_frames=3"),
        (["--data.sizes", "[1,2,3]"], "data.sizes: expected how many values"),
        (["--data.num_frames", "5"], "no factor has as many values as data.num_frames=5; wall_hue has 4"),
        (["--data.root", "nowhere"], "there is no 3dshapes.h5; get it from https://github.com/google-deepmind/3d-sh"),
        (["--model.num_flows", "2"], "set model.num_flows=5"),
        (["--data.dataset", "digits", "--data.sizes", "[3]"], "data.sizes: data.dataset=digits has no such setting"),
    ],
)
def test_commands_that_cannot_be(arguments, error, small, tmp_path, monkeypatch, capsys) -> None:
    cli = pytest.importorskip("cflow.training.cli")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", "shapes3d", "--data.root", str(small), *TINY, *arguments]) == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1


def test_an_error_in_a_worker_is_one_line_too(small, tmp_path, monkeypatch, capfd) -> None:
    cli = pytest.importorskip("cflow.training.cli")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / FILES["isaac3d"]
    shutil.copytree(small / FILES["isaac3d"], folder)
    for number in range(53):
        (folder / "images" / f"{number:06d}.png").write_bytes(b"no PNG")
    words = ["fit", "--config", "isaac3d", "--data.root", str(tmp_path), *TINY, "--data.num_workers", "1"]
    assert cli.main(words) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(said) == 1
    assert re.match(r"cflow: error: .*\.png: is no PNG image, or a damaged one", said[0])


def test_half_frames_are_traversed_from_the_input_alone(small) -> None:
    results, composition = pytest.importorskip("cflow.training.results"), pytest.importorskip("cflow.composition")
    part, things = Isaac3D(small, num_frames=3).split("test"), torch.zeros(1, dtype=torch.long)
    row = composition.single(1, len(part.names))
    whole = results.true_frames(part, row, things, torch.tensor([0.0, 2.0]))
    assert whole.shape[1] == 2
    assert torch.equal(results.true_frames(part, row, things, torch.tensor([0.0, 0.5, 2.0])), whole[:, :1])
