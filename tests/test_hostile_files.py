"""Files that are damaged, or made to do harm: one line, nothing run, nothing written, and bounded memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import cflow
from cflow import nets

pytest.importorskip("safetensors")
pytest.importorskip("h5py")
pytest.importorskip("PIL")

ROOT = Path(cflow.__file__).parents[1]
CONFIG = {"network": "mlp", "image_shape": [1, 4, 4], "latent_dim": 2, "width": 4, "potential": "ridge"}
CONFIG |= {"potential_hidden": 2, "num_flows": 2}


def content():
    """What a small checkpoint holds."""
    state = {f"vae.{name}": value for name, value in nets.build_vae(**CONFIG).state_dict().items()}
    stored = {"model": {**CONFIG}, "data": {"dataset": "digits"}, "trainer": {"max_steps": 3}}
    return {"state_dict": state, "hyper_parameters": {"model_config": dict(CONFIG)}, "cflow_config": stored}


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch ran",))


class Memory:
    """What takes ten gigabytes when it is unpickled."""

    def __reduce__(self):
        return (bytearray, (10 * 2**30,))


def repacked(file, change):
    """A checkpoint's zip anew, as `change` says: name, bytes → name, bytes, compression."""
    with zipfile.ZipFile(file) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in parts:
            new, text, how = change(name, text)
            archive.writestr(new, text, how)


def overlapping(file):
    """A thousand names for one part of a megabyte."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data/0", bytes(2**20))
        first = archive.infolist()[0]
        for number in range(1, 1000):
            other = zipfile.ZipInfo(f"x/data/{number}")
            other.file_size, other.compress_size, other.CRC = first.file_size, first.compress_size, first.CRC
            other.header_offset = first.header_offset
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other


def in_section(*path):
    """A file whose content has a bomb in a section."""

    def write(file):
        made = part = content()
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = Bomb()
        torch.save(made, file)

    return write


def with_config(**values):
    """A file that says something else of its model than its weights."""

    def write(file):
        made = content()
        made["hyper_parameters"]["model_config"] |= values
        made["cflow_config"]["model"] |= values
        torch.save(made, file)

    return write


def with_options(section, **values):
    def write(file):
        made = content()
        made["cflow_config"][section] |= values
        torch.save(made, file)

    return write


def with_huge_weights(file):
    made = content()
    for each in (made["hyper_parameters"]["model_config"], made["cflow_config"]["model"]):
        each |= {"latent_dim": 50_000, "width": 50_000}
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in nets.build_vae(**made["hyper_parameters"]["model_config"]).state_dict().items()
        }
    made["state_dict"] = {f"vae.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    torch.save(made, file)


def legacy_tar(file):
    with tarfile.open(file, "w") as archive:
        text = pickle.dumps(Bomb(), 2)
        part = tarfile.TarInfo("pickle")
        part.size = len(text)
        archive.addfile(part, io.BytesIO(text))


def torchscript(file):
    """An archive of TorchScript, which holds code."""
    with zipfile.ZipFile(file, "w") as archive:
        parts = {
            "data.pkl": pickle.dumps({}, 2),
            "constants.pkl": pickle.dumps((), 2),
            "code/__torch__.py": b"import os",
        }
        for name, text in parts.items():
            archive.writestr(f"x/{name}", text)
        archive.writestr("x/version", "3\n")


def class_paths(file):
    """A module that nobody needs, in the place of every value."""
    made, evil = content(), {"class_path": "wave.Wave_read", "init_args": {"f": "x"}}
    for section in ("model", "data", "trainer"):
        made["cflow_config"][section] |= {"class_path": "wave.Wave_read", "callbacks": [evil], "root": evil, "lr": evil}
    torch.save(made | {"_class_path": "wave.Wave_read"}, file)


def zip_bomb(file):
    torch.save(content(), file)
    repacked(file, lambda name, text: (name, bytes(2**28) if name.endswith("data/0") else text, zipfile.ZIP_DEFLATED))


def outside(file):
    torch.save(content(), file)
    repacked(file, lambda name, text: (f"../../{name}", text, zipfile.ZIP_STORED))


CHECKPOINTS = {
    "a raw pickle": lambda file: file.write_bytes(pickle.dumps(Bomb(), 2)),
    "a pickle of PyTorch before 1.6": lambda file: torch.save(Bomb(), file, _use_new_zipfile_serialization=False),
    "plain values of PyTorch before 1.6": lambda file: torch.save({"a": 1}, file, _use_new_zipfile_serialization=False),
    "a tar of PyTorch 0.1": legacy_tar,
    "a program": torchscript,
    "a pickle instead of everything": lambda file: torch.save(Bomb(), file),
    "a pickle for a weight": in_section("state_dict", "vae.flow.net.w1"),
    "a pickle in the model's configuration": in_section("hyper_parameters", "model_config"),
    "a pickle in a value of it": in_section("hyper_parameters", "model_config", "width"),
    "a pickle in the options": in_section("cflow_config", "model", "lr"),
    "a pickle in the trainer's options": in_section("cflow_config", "trainer", "callbacks"),
    "a pickle in the data's options": in_section("cflow_config", "data", "transformations"),
    "a pickle in the optimizer's state": in_section("optimizer_states"),
    "a pickle in the callbacks": in_section("callbacks", "x"),
    "ten gigabytes of bytes": lambda file: torch.save(content() | {"a": Memory()}, file),
    "a zip bomb": zip_bomb,
    "parts that overlap": overlapping,
    "a network of gigabytes": with_config(width=20_000),
    "a network of terabytes": with_config(width=10**9),
    "a network of terabytes in the options alone": with_options("model", width=10**9),
    "images of terapixels": with_options("data", resize=10**6),
    "weights of gigabytes out of one number": with_huge_weights,
    "paths that lead outside": outside,
    "class paths in every section": class_paths,
}

# in a process of its own, whose memory is measured: what it says, and by how much it has grown
MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
import cflow
from cflow.training import app, cli  # all that is imported in any case

def grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

cflow.load("good.ckpt")
done = {}
for name in sorted(p.name for p in Path("files").iterdir()):
    before = grown(), set(sys.modules)
    try:
        cflow.load(f"files/{name}")
        said = ""
    except cflow.CflowError as error:
        said = str(error)
    codes = [cli.main([*words, "--ckpt_path", f"files/{name}"]) for words in (["test"], ["fit"], ["report"])]
    imported = sorted(set(sys.modules) - before[1])
    done[name] = {"said": said, "codes": codes, "grown": grown() - before[0], "imported": imported}
print(json.dumps(done))
"""


def measured(code, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.ci
def test_hostile_checkpoints_do_nothing(tmp_path) -> None:
    (tmp_path / "files").mkdir()
    torch.save(content(), tmp_path / "good.ckpt")
    for number, write in enumerate(CHECKPOINTS.values()):
        write(tmp_path / f"files/{number:02}.ckpt")
    found, said = measured(MEASURED, tmp_path)
    assert len(found) == len(CHECKPOINTS) >= 20
    harmless = {
        "class paths in every section",
        "images of terapixels",
        "a network of terabytes in the options alone",
        "paths that lead outside",
    }
    assert sum(bool(each["said"]) for each in found.values()) >= 18
    for name, each in zip(CHECKPOINTS, found.values(), strict=True):
        if name not in harmless:  # to `cflow.load`, which looks at the model alone
            assert each["said"], name
        assert "\n" not in each["said"], name
        assert each["codes"] == [2, 2, 2], name
        assert each["grown"] < 200, name  # megabytes
        assert "wave" not in each["imported"], name
    lines = said.splitlines()
    assert not [line for line in lines if not line.startswith("cflow: error: ")]
    assert len(lines) == 3 * len(CHECKPOINTS)
    left = {path.name for path in tmp_path.rglob("*") if path.parent.name != "files"}
    assert left <= {"files", "good.ckpt", "runs"}  # no `ran`, and of a fit that is refused no run


def png(path, width, height, frames=None):
    """A PNG of a few bytes that says it is large, or long."""

    def part(kind, text):
        return len(text).to_bytes(4, "big") + kind + text + zlib.crc32(kind + text).to_bytes(4, "big")

    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    moving = b"" if frames is None else part(b"acTL", struct.pack(">II", frames, 0))
    moving += b"" if frames is None else part(b"fcTL", struct.pack(">IIIIIHHBB", 0, width, height, 0, 0, 1, 1, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + moving + part(b"IDAT", zlib.compress(bytes(10))) + part(b"IEND", b"")
    )


def header(shape, dtype="|u1"):
    """The beginning of an array in NumPy's format."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def commas(path, start, megabytes=256):
    with path.open("wb") as file:
        file.write(start)
        for _ in range(megabytes):
            file.write(b"," * 2**20)


def sequences(root):
    """Three sequences of two frames in a folder."""
    for name in "abc":
        np.savez(root / f"{name}.npz", np.zeros((2, 4, 4), "uint8"))


def shapes3d(root, count, labels, link=False):
    import h5py

    with h5py.File(root / "3dshapes.h5", "w") as file:
        if link:
            file["images"] = h5py.ExternalLink("other.h5", "images")
        else:
            file.create_dataset("images", (count, 64, 64, 3), "uint8", chunks=(1, 64, 64, 3))
        file.create_dataset("labels", (labels, 6), "float64", chunks=(min(labels, 1000), 6))


def falcor3d(root):
    folder = root / "Falcor3D_down128"
    folder.mkdir()
    (folder / "train-rec.labels").write_bytes(header((10**10, 7), "<f8"))


def npz_of(path, **parts):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (head, count) in parts.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(head)
                for _ in range(count):
                    file.write(bytes(2**24))


def h5ad(path):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("X", (10**6, 10**5), "float32", chunks=(1000, 1000))


def folder_of_weights(root, **config):
    cflow.PotentialFlow(cflow.RidgePotential(4, hidden=8)).save_pretrained(root)
    content = json.loads((root / "config.json").read_text())
    content["model"]["potential"] |= config
    (root / "config.json").write_text(json.dumps(content))


def endless(root):
    folder_of_weights(root)
    (root / "config.json").unlink()
    (root / "config.json").symlink_to("/dev/zero")


# what it is → how it is made in a folder, and the expression that reads it
DATA = {
    "HDF5 of terabytes": (lambda root: shapes3d(root, 10**9, 10**9), "data.Shapes3D(root)"),
    "HDF5 with labels of gigabytes": (lambda root: shapes3d(root, 480, 10**9), "data.Shapes3D(root)"),
    "HDF5 that leads to another file": (lambda root: shapes3d(root, 0, 480, link=True), "data.Shapes3D(root)"),
    "labels of terabytes": (falcor3d, "data.Falcor3D(root)"),
    "a PNG bomb": (
        lambda root: [png(root / f"{i}.png", 9000, 9000) for i in range(3)],
        "data.ImageFolder(root, 'rotation').split('train').read(*FIRST)",
    ),
    "a larger PNG bomb": (
        lambda root: [png(root / f"{i}.png", 60_000, 60_000) for i in range(3)],
        "data.ImageFolder(root)",
    ),
    "an animation of billions": (lambda root: png(root / "a.png", 8, 8, 2**31), "data.SequenceFolder(root)"),
    "a zip bomb of frames": (
        lambda root: [npz_of(root / f"{name}.npz", frames=(header((100, 2**12, 2**12)), 2)) for name in "abc"],
        "data.SequenceFolder(root, 100).split('test').read(*FIRST)",
    ),
    "frames of terabytes": (
        lambda root: [npz_of(root / f"{name}.npz", frames=(header((10**5, 10**3, 10**3)), 0)) for name in "abc"],
        "data.SequenceFolder(root).split('test').read(*FIRST)",
    ),
    "times of commas": (
        lambda root: [sequences(root), commas(root / "times.csv", b"sequence,frame,time\n", 1024)],
        "data.SequenceFolder(root)",
    ),
    "a head of commas": (
        lambda root: [sequences(root), commas(root / "times.csv", b"sequence")],
        "data.SequenceFolder(root)",
    ),
    "a population of commas": (lambda root: commas(root / "x.csv", b"t"), "Snapshots.from_file(root / 'x.csv')"),
    "a population that unpacks": (
        lambda root: npz_of(root / "x.npz", x=(header((24, 2**24)), 24), t=(header((24,)), 1)),
        "Snapshots.from_file(root / 'x.npz')",
    ),
    "cells of terabytes": (lambda root: h5ad(root / "x.h5ad"), "Snapshots.from_file(root / 'x.h5ad')"),
    "a flow of terabytes": (
        lambda root: folder_of_weights(root, hidden=10**9),
        "cflow.PotentialFlow.from_pretrained(root)",
    ),
    "settings without an end": (endless, "cflow.PotentialFlow.from_pretrained(root)"),
    "numbers in numbers": (
        lambda root: (root / "metrics.json").write_text("[" * 10**6),
        "read_metrics(root / 'metrics.json')",
    ),
}

READ = """
import json, resource, sys
from pathlib import Path
import torch
import cflow
from cflow import data
from cflow.populations import Snapshots
from cflow.training.report.chapter import read_metrics
import anndata, h5py, PIL.Image  # all that is imported in any case

FIRST = torch.tensor([0]), torch.tensor([0]), torch.zeros(1)

def grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

done = {}
for root in sorted(Path("files").iterdir()):
    before = grown()
    try:
        eval((root / "expression").read_text())
        said = ""
    except cflow.CflowError as error:
        said = str(error)
    done[root.name] = {"said": said, "grown": grown() - before}
print(json.dumps(done))
"""


@pytest.mark.ci
def test_hostile_data_are_refused(tmp_path) -> None:
    pytest.importorskip("anndata")
    for number, (make, expression) in enumerate(DATA.values()):
        root = tmp_path / f"files/{number:02}"
        root.mkdir(parents=True)
        make(root)
        (root / "expression").write_text(expression)
    found, said = measured(READ, tmp_path)
    for name, each in zip(DATA, found.values(), strict=True):
        assert each["said"], name
        assert "\n" not in each["said"], name
        assert each["grown"] < 300, name  # megabytes
    assert "Warning" not in said


def damaged(good, step):
    """Every so manieth byte with a bit flipped, and what comes before it alone."""
    for place in range(0, len(good), step):
        flipped = bytearray(good)
        flipped[place] ^= 1 << (place % 8)
        yield bytes(flipped)
        yield good[:place]


@pytest.mark.parametrize("step", [190, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "x.ckpt"])
def test_damaged_weights_are_refused_or_what_they_were(name, step, tmp_path) -> None:
    vae = nets.build_vae(**CONFIG).eval()
    vae.save_pretrained(tmp_path)
    made = content()
    made["state_dict"] = {f"vae.{key}": value for key, value in vae.state_dict().items()}
    torch.save(made, tmp_path / "x.ckpt")
    path, refused = tmp_path / name, 0
    good = path.read_bytes()
    for bad in damaged(good, step):
        path.write_bytes(bad)
        try:
            loaded = cflow.load(path if name == "x.ckpt" else tmp_path).state_dict()
        except cflow.CflowError:
            refused += 1
        else:
            assert all(torch.equal(loaded[key], value) for key, value in vae.state_dict().items())
    assert refused > len(good) / step  # every cut, and some flips


def test_no_part_of_a_checkpoint_is_taken_for_a_folder(tmp_path) -> None:
    """PyTorch's reader leaves the memory of a tensor as it was where one bit of the directory says so."""
    file = tmp_path / "x.ckpt"
    torch.save(content(), file)
    repacked(file, lambda name, text: (name, text, zipfile.ZIP_STORED))
    cflow.load(file)  # what the next lines change alone is refused
    with zipfile.ZipFile(file, "a") as archive:
        archive.getinfo("x/data/0").external_attr |= 0x10
        archive.comment = b" "  # the directory is written anew
    with pytest.raises(cflow.DataError, match=r"damaged \(a part is marked as a folder"):
        cflow.load(file)


def test_links_in_a_run_are_replaced_and_not_followed(tmp_path) -> None:
    from cflow.training import files, runs

    victim = tmp_path / "victim"
    (victim / "checkpoints").mkdir(parents=True)
    (victim / "profile").write_text("mine")
    (victim / "checkpoints/best.ckpt").write_bytes(b"")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(victim / "checkpoints")
    for name in ("metrics.json", "traversals.png"):
        (run / name).symlink_to(victim / "profile")
    assert runs.run_folder(run / "checkpoints/best.ckpt") == run
    files.write(run / "metrics.json", b"{}")
    files.drawn(run / "traversals.png", lambda path: path.write_bytes(b"png"))
    assert (victim / "profile").read_text() == "mine"
    assert (run / "traversals.png").read_bytes() == b"png"
    assert not (run / "metrics.json").is_symlink()
    assert {path.name for path in run.iterdir()} == {"checkpoints", "metrics.json", "traversals.png"}
