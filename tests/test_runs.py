"""Runs: what checkpoints may say, how they are written, resuming and several processes, from the command line."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cflow

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.training import cli, files, runs

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(cflow.__file__).parents[1]
TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.likelihood_samples", "2"),
    *("--data.val_samples", "20", "--data.test_samples", "30", "--data.batch_size", "32"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
]
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}
ABORT = {"class_path": "pytorch_lightning.callbacks.LambdaCallback", "init_args": {"setup": "os.abort"}}
PROFILER = {"class_path": "pytorch_lightning.profilers.SimpleProfiler", "init_args": {"dirpath": "made"}}
LOGGER = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "made"}}


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    words = ["fit", "--config", "digits", *TINY, "--trainer.max_steps", "2"]
    assert cli.main([*words, "--trainer.default_root_dir", str(folder)]) == 0
    return folder / "digits" / "version_0"


# what a hostile file says, section by section of its configuration
HOSTILE = {
    "a trainer": {
        "trainer": {
            "callbacks": [ABORT],
            "plugins": [POPEN],
            "strategy": POPEN,
            "profiler": PROFILER,
            "logger": LOGGER,
            "accelerator": POPEN,
            "precision": POPEN,
            "max_time": POPEN,
            "default_root_dir": "made",
        }
    },
    "a model's class": {"model": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}},
    "unknown options": {"model": {"os": "abort", "__init__": POPEN}, "seed_everything": POPEN},
    "data": {"data": {"source": POPEN, "transformations": POPEN, "root": "made"}, "config": ["made.yaml"]},
    "a name that leads elsewhere": {"run_name": "../../made"},
}


@pytest.mark.ci
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_configuration_does_nothing(run, what, tmp_path, monkeypatch) -> None:
    content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    stored = content[runs.CONFIG_KEY]
    for section, evil in HOSTILE[what].items():
        stored[section] = stored[section] | evil if isinstance(stored.get(section), dict) else evil
    content["hyper_parameters"] |= {"_class_path": "subprocess.Popen", "_instantiator": "os.abort"}
    hostile = tmp_path / "hostile" / "x.ckpt"
    hostile.parent.mkdir()
    torch.save(content, hostile)
    monkeypatch.chdir(tmp_path)
    for words in (["test"], ["traverse"], ["fit", "--trainer.max_steps", "3", *TINY]):
        before = sorted(tmp_path.iterdir())
        assert cli.main([words[0], "--ckpt_path", str(hostile), *words[1:], "--trainer.accelerator", "cpu"]) == 0
        assert sorted(tmp_path.iterdir()) in (before, sorted([*before, tmp_path / "runs"]))
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [
        "run" if what == "a name that leads elsewhere" else "digits"
    ]


def test_what_a_checkpoint_may_say() -> None:
    config = {
        "seed_everything": 3,
        "run_name": "digits",
        "trainer": {"max_steps": 5, "callbacks": None, "precision": POPEN, "default_root_dir": "runs"},
        "model": {"width": 16, "potential": "mlp", "lr": [POPEN], "solver": "rk4", "image_shape": [1, 2, 3]},
        "data": {"dataset": "mnist", "source": None, "root": "data", "factors": ["scale", "shape"], "sizes": [POPEN]},
    }
    assert runs.storable(config) == {
        "seed_everything": 3,
        "run_name": "digits",
        "trainer": {"max_steps": 5},
        "model": {"width": 16, "potential": "mlp", "solver": "rk4", "image_shape": [1, 2, 3]},
        "data": {"dataset": "mnist", "root": "data", "factors": ["scale", "shape"]},
    }


class NoSpace:
    """A disk that is full from some write on."""

    def __init__(self, after):
        self.after = after

    def __call__(self, descriptor):
        self.after -= 1
        if self.after < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_leaves_what_was_there(after, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.os, "fsync", NoSpace(1 + after))  # the first file is config.yaml
    words = ["fit", *TINY, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert ".ckpt: cannot be written" in error
    assert error.count("\n") == 1
    left = sorted(Path("runs/digits/version_0/checkpoints").iterdir())
    assert [path.name for path in left] == ["best.ckpt", "last.ckpt"][: min(after, 2)]
    assert all(cflow.load(path).flow.num_flows == 3 for path in left)


def test_a_disk_that_became_read_only_is_named_by_the_file(tmp_path, monkeypatch) -> None:
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(files.os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(cflow.DataError, match=r"/best\.ckpt: cannot be written \(Read-only file system\)"):
        files.write(tmp_path / "best.ckpt", b"weights")


@pytest.mark.ci
def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path) -> None:
    words = [sys.executable, "-m", "cflow.training.cli", "fit", *TINY, "--trainer.max_steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(words, cwd=tmp_path, env=environment, preexec_fn=small_files, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "best.ckpt: cannot be written (File too large)" in done.stderr
    assert not list((tmp_path / "runs/digits/version_0/checkpoints").iterdir())


@pytest.mark.ci
@pytest.mark.parametrize("config", ["digits", "mnist"])
def test_a_run_that_goes_on_is_the_one_that_never_stopped(config, tmp_path, monkeypatch) -> None:
    """40 steps are 20 and 20 more, bit for bit."""
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", config, *TINY, "--model.schedule", "constant", "--trainer.precision", "32-true"]
    if config == "mnist":
        words += ["--data.root", str(tiny_mnist(tmp_path))]
    assert cli.main([*words, "--trainer.max_steps", "40", "--run_name", "whole"]) == 0
    assert cli.main([*words, "--trainer.max_steps", "20", "--run_name", "half"]) == 0
    more = [
        "fit",
        "--ckpt_path",
        "runs/half",
        "--trainer.max_steps",
        "40",
        "--run_name",
        "rest",
        "--seed_everything",
        "9",
    ]
    assert cli.main([*more, *TINY]) == 0
    whole, half, rest = (Path(f"runs/{name}/version_0") for name in ("whole", "half", "rest"))
    assert not equal(weights(whole / "checkpoints/last.ckpt"), weights(half / "checkpoints/last.ckpt"))
    assert equal(weights(whole / "checkpoints/last.ckpt"), weights(rest / "checkpoints/last.ckpt"))
    numbers = [json.loads((path / "metrics.json").read_text()) for path in (whole, rest)]
    assert {k for k in numbers[0] if numbers[0][k] != numbers[1][k]} <= {"seconds"}


def tiny_mnist(folder):
    """Files in MNIST's format with a few random images: 5,040 for training and validation, 40 for the test."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    make = torch.Generator().manual_seed(0)
    for name, count in (("train", 5040), ("t10k", 40)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=make)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + bytes(count))
    return folder


@pytest.mark.slow
def test_the_objective_of_the_paper_trains(tmp_path, monkeypatch) -> None:
    """Path KL and Hamilton-Jacobi are in the loss, every potential sees the time, and the loss falls."""
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", "mnist_paper", "--data.root", str(tiny_mnist(tmp_path)), "--trainer.accelerator", "cpu"]
    words += ["--data.val_samples", "8", "--data.test_samples", "8", "--data.batch_size", "16", "--model.lr", "2e-3"]
    words += ["--model.likelihood_samples", "2", "--trainer.log_every_n_steps", "1", "--trainer.max_steps", "25"]
    assert cli.main(words) == 0
    vae = cflow.load("runs/mnist_paper")
    assert (vae.path_kl_weight, vae.pde_weight, vae.kl_weight) == (1.0, 1.0, 1.0)
    assert isinstance(vae.flow.net, cflow.MLPPotential)
    assert vae.flow.net.time_dependent
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs/mnist_paper/version_0")).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert len(losses) == 25
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mnist_weak", "mnist_best"])
def test_presets_of_mnist_train(preset, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", preset, "--data.root", str(tiny_mnist(tmp_path)), "--trainer.accelerator", "cpu"]
    words += ["--data.val_samples", "8", "--data.test_samples", "8", "--data.batch_size", "8", "--model.width", "64"]
    assert cli.main([*words, "--trainer.max_steps", "3"]) == 0
    assert json.loads(Path(f"runs/{preset}/version_0/metrics.json").read_text())["samples"] == 8


SCRIPT = """
import sys
import pytorch_lightning as pl
import torch
from cflow.data import hue
from cflow.training.datamodule import SequenceDataModule
from cflow.training.module import FlowVAEModule

processes, exact = int(sys.argv[1]), sys.argv[2] == "exact"


class Module(FlowVAEModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-7) if exact else super().configure_optimizers()

    def on_train_end(self):
        torch.save(self.state_dict(), f"{processes}_{self.global_rank}.pt")


if exact:  # no noise, and the same transformation and all frames for everything
    torch.distributions.Normal.rsample = lambda self, shape=(): self.mean
pl.seed_everything(0, verbose=False)
settings = {"num_flows": 1, "frames_per_step": 5, "lr": 1e-6} if exact else {}
module = Module(width=16, latent_dim=4, schedule="constant", warmup_steps=0, likelihood_samples=0, **settings)
data = SequenceDataModule(batch_size=32 // processes, num_frames=5, transformations={"hue": hue} if exact else None)
trainer = pl.Trainer(
    accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_steps=20,
    limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False, precision="64-true" if exact else "32-true",
)
trainer.fit(module, data)
"""


def train(tmp_path, processes, how):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "script.py", str(processes), how]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(tmp_path / f"{processes}_{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_keep_equal_weights(tmp_path) -> None:
    first, second = train(tmp_path, 2, "as it is")
    assert equal(first, second)


@pytest.mark.slow
def test_two_processes_compute_what_one_does_with_the_same_batch(tmp_path) -> None:
    (one,) = train(tmp_path, 1, "exact")
    two, _ = train(tmp_path, 2, "exact")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_the_launch_on_several_gpus_runs_on_a_cpu(tmp_path) -> None:
    words = ["bash", str(ROOT / "examples/train_on_several_gpus.sh"), "2", "--trainer.accelerator", "cpu"]
    words += [*TINY[:-4], "--trainer.max_steps", "20"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "20 steps on 2 × cpu" in done.stdout
    assert done.stdout.count("equivariance error") == 1
    assert sorted(p.name for p in (tmp_path / "runs/digits").iterdir()) == ["version_0"]
    assert cflow.load(tmp_path / "runs/digits").flow.num_flows == 3
