"""Transformations against independent implementations; the data sets against their files."""

import colorsys
import os
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("per_sample", [False, True])
def test_sequences_match_a_loop(per_sample):
    x0, k = torch.rand(7, 3, 12, 12), torch.tensor([0, 1, 2, 2, 1, 0, 2])
    t = 8 * torch.rand(4, 7) if per_sample else torch.arange(4.0)
    xs = make_sequence(x0, k, t)
    functions = list(PAPER.values())
    for i in range(7):
        for f in range(4):
            time = t[f, i] if per_sample else t[f]
            torch.testing.assert_close(xs[i, f], functions[k[i]](x0[i : i + 1], time[None])[0])
    still = make_sequence(x0, k, torch.zeros(1))
    torch.testing.assert_close(still[:, 0], x0, atol=1e-5, rtol=0)
    assert make_sequence(x0.double(), k, t).dtype == torch.float64
    assert make_sequence(x0[:0], k[:0], torch.arange(3.0)).shape == (0, 3, 3, 12, 12)


def test_users_transformations_and_errors():
    darker = {"darker": lambda x, t: x * 0.9 ** t[:, None, None, None]}
    x0 = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(make_sequence(x0, 0, torch.arange(3.0), darker)[:, 2], 0.81 * x0)
    with pytest.raises(cflow.ArgumentError, match=r"^k: expected indices 0 to 0, got 1 to 1"):
        make_sequence(x0, torch.tensor([1, 1]), torch.arange(3.0), darker)
    with pytest.raises(cflow.ArgumentError, match=r"^t: expected"):
        make_sequence(x0, 0, torch.zeros(3, 5), darker)
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
    rows = [{tuple(i.flatten().tolist()) for i in x} for x in splits.values()]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
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


def test_importing_the_data_package_loads_neither_torchvision_nor_sklearn():
    code = "import sys, cflow.data; print({'torchvision', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
