"""Transformations against independent implementations; the data sets against their files."""

import colorsys
import os
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

import cflow
from cflow.data import PAPER, digits, hue, make_sequence, mnist, rotation, scaling

ROOT = os.environ.get("CFLOW_DATA")


def test_rotation_is_torchvisions():
    x = torch.rand(2, 3, 20, 28)
    for t in (0.0, 1.0, 4.5, 9.0, -3.0):
        got = rotation(x, torch.full((2,), t))
        wanted = tv.rotate(x, 10 * t, interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(got[..., 2:-2, 2:-2], wanted[..., 2:-2, 2:-2], atol=2e-3, rtol=0)
    square = torch.rand(1, 1, 9, 9)
    torch.testing.assert_close(rotation(square, torch.tensor([9.0])), square.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_scaling_magnifies_about_the_centre():
    x = torch.zeros(1, 1, 40, 60)
    x[..., 16:24, 24:36] = 1
    for t in (0.0, 2.0, 5.0, 10.0):
        got = scaling(x, torch.tensor([t]))[0, 0]
        assert got.sum().item() == pytest.approx(96 * (1 + 0.1 * t) ** 2, rel=0.02)
        rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
        assert (rows * got).sum() / got.sum() == pytest.approx(19.5, abs=1e-3)
        assert (columns * got).sum() / got.sum() == pytest.approx(29.5, abs=1e-3)


def test_hue_is_colorsys():
    x = torch.rand(200, 3, 1, 1, dtype=torch.float64)
    x[0], x[1], x[2, :2] = 0.5, 0.0, 0.9  # grey, black, two largest channels
    t = torch.linspace(-20, 25, 200, dtype=torch.float64)
    got = hue(x, t)[:, :, 0, 0]
    for pixel, turn, answer in zip(x[:, :, 0, 0].tolist(), t.tolist(), got.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        assert answer == pytest.approx(colorsys.hsv_to_rgb((h + 20 * turn / 360) % 1, s, v), abs=1e-9)
    with pytest.raises(cflow.ArgumentError, match=r"^x0: hue needs RGB"):
        hue(torch.rand(1, 1, 2, 2), torch.zeros(1))


@pytest.mark.parametrize("name", PAPER)
def test_times_and_precision(name):
    x, transformation = torch.rand(3, 3, 10, 14), PAPER[name]
    torch.testing.assert_close(transformation(x, torch.zeros(3)), x, atol=2e-6, rtol=0)
    two = transformation(x, torch.full((3,), 2.0))
    for t in (2, 2.0, torch.tensor(2), torch.full((3,), 2.0, dtype=torch.float64)):
        assert torch.equal(transformation(x, t), two)
    assert transformation(x[:0], torch.zeros(0)).shape == (0, 3, 10, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # positions of pixels must not be rounded
        assert torch.equal(transformation(x, 2.0), two)
        assert torch.equal(make_sequence(x, list(PAPER).index(name), [2.0])[:, 0], two)
        product = make_sequence(x, 0, [1.0], {"product": lambda x, t: x @ x.mT @ x})[:, 0]
    assert torch.equal(product, x @ x.mT @ x)
    half = transformation(x.bfloat16(), 2.0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), transformation(x.bfloat16().float(), 2.0), atol=0.05, rtol=0)
    with pytest.raises(cflow.ArgumentError, match=r"^t: expected one time an image, \(B,\) with B = 3, got \(2,\)"):
        transformation(x, torch.zeros(2))


@pytest.mark.parametrize("per_sample", [False, True])
def test_sequences_match_a_loop(per_sample):
    x0, k = torch.rand(7, 3, 12, 12), torch.tensor([0, 1, 2, 2, 1, 0, 2])
    t = 8 * torch.rand(7, 4) if per_sample else torch.arange(4.0)
    xs = make_sequence(x0, k, t)
    functions = list(PAPER.values())
    for i in range(7):
        for f in range(4):
            time = t[i, f] if per_sample else t[f]
            torch.testing.assert_close(xs[i, f], functions[k[i]](x0[i : i + 1], time[None])[0])
    still = make_sequence(x0, k, torch.zeros(1))
    torch.testing.assert_close(still[:, 0], x0, atol=1e-5, rtol=0)
    assert make_sequence(x0.double(), k, t).dtype == torch.float64
    assert make_sequence(x0[:0], k[:0], torch.arange(3.0)).shape == (0, 3, 3, 12, 12)


def test_users_transformations_and_errors():
    darker = {"darker": lambda x, t: x * 0.9 ** t[:, None, None, None]}
    x0 = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(make_sequence(x0, 0, torch.arange(3.0), darker)[:, 2], 0.81 * x0)
    rgb = torch.rand(2, 3, 4, 4)
    both = make_sequence(rgb, torch.tensor([3, 0]), [0.0, 1.0], PAPER | darker)
    torch.testing.assert_close(both[0, 1], 0.9 * rgb[0])
    torch.testing.assert_close(both[1, 1], scaling(rgb[1:], 1.0)[0])
    for wrong, got in ((lambda x, t: x[:, :, :1], r"\(4, 1, 1, 4\)"), (lambda x, t: None, "NoneType")):
        with pytest.raises(cflow.ArgumentError, match=rf"^transformations\['wrong'\]: expected images .* got {got}"):
            make_sequence(x0, 0, [0.0, 1.0], {"wrong": wrong})
    for none in ({}, [scaling, rotation]):
        with pytest.raises(cflow.ArgumentTypeError, match=r"^transformations: expected a dict"):
            make_sequence(x0, 0, [0.0], none)
    for t, error in (([], "an empty list"), (torch.zeros(0), r"\(0,\)"), ([float("nan")], "nan"), ("now", "str")):
        with pytest.raises(cflow.CflowError, match=rf"^t.*: expected .*{error}"):
            make_sequence(x0, 0, t, darker)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^k: expected the integer index .* got 'darker'"):
        make_sequence(x0, "darker", [0.0], darker)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^x0: .* got ndarray"):
        make_sequence(x0.numpy(), 0, [0.0], darker)
    with pytest.raises(cflow.ArgumentError, match=r"^k: expected indices 0 to 0, got 1 to 1"):
        make_sequence(x0, torch.tensor([1, 1]), torch.arange(3.0), darker)
    for t in (torch.zeros(3, 2), torch.zeros(3, 5)):  # x0 has two images
        with pytest.raises(cflow.ArgumentError, match=r"^t: expected one time a frame.* batch-first since 0\.2\.0"):
            make_sequence(x0, 0, t, darker)
    with pytest.raises(cflow.ArgumentError, match=r"^k: expected an int or \(B,\)"):
        make_sequence(x0, torch.tensor([0, 0, 0]), [0.0], darker)
    with pytest.raises(cflow.ArgumentError, match=r"^x0: expected images"):
        make_sequence(x0[0], 0, [0.0], darker)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^k: expected the integer index"):
        make_sequence(x0, torch.tensor([0.0, 0.5]), [0.0], darker)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^x0: expected floating point"):
        make_sequence(x0.byte(), 0, [0.0], darker)


def test_digits():
    splits = {name: digits.load_digits(name) for name in ("train", "val", "test")}
    assert {name: len(x) for name, x in splits.items()} == {"train": 1257, "val": 180, "test": 360}
    for x in splits.values():
        assert x.dtype == torch.uint8
        assert x.shape[1:] == (3, 28, 28)
        assert x[:, 1:].max() == 0
        assert x[:, 0].max() == 255
        assert x[:, 0, :4].max() == 0
    original = sklearn.datasets.load_digits()
    grown = nn.functional.interpolate(torch.tensor(original.images).float()[:, None], size=20, mode="bilinear")
    inside = {name: x[:, 0, 4:24, 4:24].flatten(1) * (16 / 255) for name, x in splits.items()}
    distances = {name: torch.cdist(x, grown.flatten(1)) for name, x in inside.items()}
    assert max(d.amin(1).max() for d in distances.values()) < 0.7  # 20·√(1/12) · 16/255 from rounding to bytes
    source = {name: d.argmin(1) for name, d in distances.items()}
    assert torch.cat(list(source.values())).unique().numel() == 1797  # each digit is in one split
    share = np.bincount(original.target) / 1797
    for indices in source.values():
        counts = np.bincount(original.target[indices.numpy()])
        assert np.abs(counts - len(indices) * share).max() <= 1.5
    assert torch.equal(splits["test"], digits.load_digits("test"))
    with pytest.raises(cflow.ArgumentError, match=r"^split: "):
        digits.load_digits("validation")


@pytest.mark.skipif(ROOT is None, reason="CFLOW_DATA does not name a folder with MNIST")
def test_mnist():
    sizes = {name: mnist.load_mnist(name, ROOT) for name in ("train", "val", "test")}
    assert [len(x) for x in sizes.values()] == [55000, 5000, 10000]
    raw = np.fromfile(os.path.join(ROOT, "MNIST", "raw", "train-images-idx3-ubyte"), dtype=np.uint8)[16:]
    raw = torch.from_numpy(raw).view(60000, 28, 28)
    assert torch.equal(sizes["val"][:, 0], raw[55000:])
    assert torch.equal(sizes["train"][7, 0], raw[7])
    assert sizes["test"][:, 1:].max() == 0


def unreachable(*args, **kwargs):
    raise urllib.error.URLError("no network")


def test_mnist_errors(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"not an idx file")
    with pytest.raises(cflow.DataError, match=r"^data\.root=.*cannot be read") as caught:
        mnist.load_mnist("train", tmp_path)
    assert "\n" not in str(caught.value)
    (raw / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 10, 3]) + bytes(12))  # a type IDX does not have
    with pytest.raises(cflow.DataError, match=r"^data\.root=.*cannot be read"):
        mnist.load_mnist("train", tmp_path)
    # one file of four is missing, and no network
    (raw / "t10k-images-idx3-ubyte").unlink()
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(cflow.DataError, match="MNIST/raw/t10k-images-idx3-ubyte could not be downloaded"):
        mnist.load_mnist("train", tmp_path)


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(cflow.DataError, match=r"MNIST/raw/\*-ubyte could not be downloaded") as caught:
        mnist.load_mnist("test", tmp_path / "deep" / "er")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(cflow.DataError):
        mnist.load_mnist("test", tmp_path / "mine")
    assert [f.name for f in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(cflow.ArgumentTypeError, match=r"^data\.root: expected the path of a folder, got NoneType"):
        mnist.load_mnist("test", None)
    with pytest.raises(cflow.ArgumentError, match=r"^split: "):
        mnist.load_mnist("validation", tmp_path)


def write_idx(raw, name, values):
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    (raw / f"{name}-ubyte").write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())


def test_mnist_files_of_another_size(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 300), ("t10k", 7)):
        write_idx(raw, f"{name}-images-idx3", np.full((count, 28, 28), count % 256, np.uint8))
        write_idx(raw, f"{name}-labels-idx1", np.zeros(count, np.uint8))
    assert mnist.load_mnist("test", tmp_path)[:, 0].unique().tolist() == [7]
    with pytest.raises(cflow.DataError, match="expected 60,000 training images, got 300"):  # none would be left
        mnist.load_mnist("train", tmp_path)
    images = raw / "t10k-images-idx3-ubyte"
    whole = images.read_bytes()
    for damaged in (whole[:-1], whole[:10], b"", whole + b"x"):
        images.write_bytes(damaged)
        with pytest.raises(cflow.DataError, match="cannot be read"):
            mnist.load_mnist("test", tmp_path)


def test_mnist_keeps_the_last_training_images_for_validation(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    numbers = np.arange(mnist.VAL + 3)
    for name, count in (("train", len(numbers)), ("t10k", 2)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = numbers[:count] // 256, numbers[:count] % 256
        write_idx(raw, f"{name}-images-idx3", images)
        write_idx(raw, f"{name}-labels-idx1", np.zeros(count, np.uint8))

    def loaded(split):
        corner = mnist.load_mnist(split, tmp_path)[:, 0, 0].int()
        return (256 * corner[:, 0] + corner[:, 1]).tolist()

    assert loaded("train") == [0, 1, 2]
    assert loaded("val") == numbers[3:].tolist()
    assert loaded("test") == [0, 1]


def test_importing_the_data_package_loads_neither_torchvision_nor_sklearn():
    code = "import sys, cflow.data; print({'torchvision', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
