"""Files that are damaged, or made to do harm: one line, nothing run, nothing written, and bounded memory."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

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
    # no runs: of a fit that is refused the folder is taken back
    assert {path.name for path in tmp_path.rglob("*") if path.parent.name != "files"} <= {
        "files",
        "good.ckpt",
        "runs",
    }  # no `ran`, no runs
