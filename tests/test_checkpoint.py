"""`cflow.load`: what `fit` wrote comes back; anything else is one clear error."""

import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch

import cflow
from cflow import nets

CONFIG = {"network": "mlp", "latent_dim": 4, "width": 16, "potential": "quadratic+ridge", "step_size": 2.0}


@pytest.fixture
def checkpoint(tmp_path):
    vae = nets.build_vae(**CONFIG).eval()
    file = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    state = {f"vae.{name}": value for name, value in vae.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"model_config": CONFIG}, "global_step": 3}, file)
    return vae, file


def test_load(checkpoint):
    vae, file = checkpoint
    x0 = torch.rand(2, 3, 28, 28)
    for path in (file, file.parent, file.parents[1]):
        loaded = cflow.load(path)
        assert not loaded.training
        torch.testing.assert_close(loaded.traverse(x0, 1, [0, 4]), vae.traverse(x0, 1, [0, 4]))


def test_load_keeps_double_precision(checkpoint, tmp_path):
    vae, _ = checkpoint
    state = {f"vae.{name}": value for name, value in vae.double().state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"model_config": CONFIG}}, tmp_path / "x.ckpt")
    x0 = torch.rand(2, 3, 28, 28, dtype=torch.float64)
    assert torch.equal(cflow.load(tmp_path / "x.ckpt").traverse(x0, 1, [0, 4]), vae.traverse(x0, 1, [0, 4]))


def test_loading_imports_no_trainer(checkpoint):
    _, file = checkpoint
    code = (
        f"import sys, cflow; cflow.load({str(file)!r}); "
        "print({'lightning', 'pytorch_lightning', 'jsonargparse', 'torchvision', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_loading_runs_no_code(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"model_config": Bomb(tmp_path / "ran")}}, tmp_path / "x.ckpt")
    with pytest.raises(cflow.DataError, match="more than tensors and plain values") as caught:
        cflow.load(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    for path in (None, 3, b"x.ckpt"):
        with pytest.raises(cflow.ArgumentTypeError, match=f"^path: .* got {type(path).__name__}"):
            cflow.load(path)


def test_load_errors(checkpoint, tmp_path):
    _, file = checkpoint
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + largest.file_size // 2 + 200] ^= 1
    flipped, cut, text, foreign, pickled = (tmp_path / n for n in ("flipped", "cut", "text", "foreign", "pickled"))
    flipped.write_bytes(data)
    cut.write_bytes(data[: len(data) // 2])
    text.write_text("hello")
    torch.save({"state_dict": {}}, foreign)
    pickled.write_bytes(pickle.dumps({"a": 1}))
    words = {flipped: "damaged", foreign: "no checkpoint", **dict.fromkeys((cut, text, pickled), "cannot be read")}
    for path, word in words.items():
        with pytest.raises(cflow.DataError, match=word):
            cflow.load(path)
    torch.save(nets.build_vae(**CONFIG), tmp_path / "module")
    with pytest.raises(cflow.DataError, match="more than tensors"):
        cflow.load(tmp_path / "module")
    with pytest.raises(cflow.ArgumentError, match="no file or folder"):
        cflow.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(cflow.ArgumentError, match="holds no checkpoints"):
        cflow.load(tmp_path / "empty")


def test_the_newest_run_is_found(checkpoint, tmp_path, monkeypatch):
    vae, file = checkpoint
    content = torch.load(file, weights_only=True)
    content["state_dict"]["vae.decoder.log_scale"] += 1
    runs = tmp_path / "runs" / "mine"
    for number in (2, 10):
        (runs / f"version_{number}" / "checkpoints").mkdir(parents=True)
    torch.save(content, runs / "version_2/checkpoints/last.ckpt")
    (runs / "version_10/checkpoints/best.ckpt").write_bytes(file.read_bytes())
    (runs / "version_11").mkdir()  # a run that has not come to a checkpoint
    monkeypatch.chdir(tmp_path)
    for path in ("last", runs, "runs/mine"):
        torch.testing.assert_close(cflow.load(path).decoder.log_scale, vae.decoder.log_scale)
    monkeypatch.chdir(runs)
    torch.testing.assert_close(cflow.load(".").decoder.log_scale, vae.decoder.log_scale)
    with pytest.raises(cflow.ArgumentError, match="no run with a checkpoint under 'runs'"):
        cflow.load("last")


def test_the_best_checkpoint_is_preferred(checkpoint):
    vae, last = checkpoint
    content = torch.load(last, weights_only=True)
    content["state_dict"] = {name: value + 1 for name, value in content["state_dict"].items()}
    torch.save(content, last.with_name("best.ckpt"))
    for path, plus in ((last.parents[1], 1), (last.parent, 1), (last, 0)):
        torch.testing.assert_close(cflow.load(path).decoder.log_scale, vae.decoder.log_scale + plus)


FOREIGN = {
    "a list of weights": {"state_dict": [1], "hyper_parameters": {"model_config": CONFIG}},
    "keys that are no names": {"state_dict": {1: torch.zeros(1)}, "hyper_parameters": {"model_config": CONFIG}},
    "a config that is none": {"state_dict": {}, "hyper_parameters": {"model_config": "digits"}},
    "an unknown argument": {"state_dict": {}, "hyper_parameters": {"model_config": CONFIG | {"depth": 3}}},
    "a width of 0": {"state_dict": {}, "hyper_parameters": {"model_config": CONFIG | {"width": 0}}},
    "no weights": {"state_dict": {}, "hyper_parameters": {"model_config": CONFIG}},
    "a tensor": torch.zeros(3),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_content(what, tmp_path):
    torch.save(FOREIGN[what], tmp_path / "x.ckpt")
    with pytest.raises(
        cflow.DataError, match=r"^path: .*(is no checkpoint of cflow|does not fit this version)"
    ) as caught:
        cflow.load(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)


def test_another_programs_zip(tmp_path):
    file = tmp_path / "letter.docx"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", "<a>" * 1000)
    with pytest.raises(cflow.DataError, match="is no checkpoint of PyTorch"):
        cflow.load(file)
    data = bytearray(file.read_bytes())
    data[60] ^= 255
    file.write_bytes(data)
    with pytest.raises(cflow.DataError, match="is no checkpoint of PyTorch"):
        cflow.load(file)


def test_a_flipped_bit_anywhere_is_an_error_or_harmless(tmp_path):
    config = CONFIG | {"image_shape": [1, 4, 4], "width": 4, "latent_dim": 2}
    vae, file = nets.build_vae(**config).eval(), tmp_path / "x.ckpt"
    state = {f"vae.{name}": value for name, value in vae.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"model_config": config}}, file)
    good, found = file.read_bytes(), {True: 0, False: 0}
    choose = random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        file.write_bytes(data)
        try:
            loaded = cflow.load(file).state_dict()
        except cflow.DataError:
            found[False] += 1
        else:
            found[True] += 1
            assert all(torch.equal(loaded[name], value) for name, value in vae.state_dict().items())
    assert found[False] > 50  # most bytes of the file matter
