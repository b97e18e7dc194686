"""Runs that are killed or interrupted, at any moment: what they leave loads, and goes on."""

import functools
import multiprocessing
import os
import random
import signal
import sys
import time
from itertools import count, pairwise

import pytest
import torch

import cflow

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.data import Digits
from cflow.training import app, cli, files, results, trainer
from cflow.training.module import FlowVAEModule

TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.likelihood_samples", "0"),
    *("--data.val_samples", "4", "--data.test_samples", "4", "--data.batch_size", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.val_check_interval", "1"),
]
pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder, words):
    """A process of its own: the command line in a folder, whose output goes to a file there."""
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open("said.txt", "a", buffering=1)  # noqa: SIM115 (until the process ends)
    os._exit(cli.main(words))


def contents(folder):
    """Every file under a folder's checkpoints, hidden ones too, → its step; each must load, on its own."""
    found = [path for path in folder.rglob("checkpoints/*") if path.is_file()]
    assert all(cflow.load(path).flow.num_flows == 3 for path in found)
    return {path: torch.load(path, weights_only=True)["global_step"] for path in found}


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.ci), pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_goes_on(kills, tmp_path) -> None:
    """A checkpoint is written at every step, so that about every second kill comes in the middle of one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cflow.training.app", "sklearn.datasets", "sklearn.model_selection"])
    choose, steps = random.Random(kills), [0]
    for number in range(kills):
        before = contents(tmp_path)
        words = ["fit", *TINY, "--trainer.max_steps", "1000000", "--model.schedule", "constant"]
        process = context.Process(target=run, args=(tmp_path, [*words, *(["--ckpt_path", "last"] if before else [])]))
        process.start()
        deadline = time.monotonic() + 60
        last = tmp_path / f"runs/digits/version_{number}/checkpoints/last.ckpt"
        while process.is_alive() and not last.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(choose.uniform(0, 0.5))
        process.kill()
        process.join()
        said = (tmp_path / "said.txt").read_text()
        assert process.exitcode == -signal.SIGKILL, said
        assert "Error" not in said
        steps.append(max(at for path, at in contents(tmp_path).items() if path not in before))
    assert all(a < b for a, b in pairwise(steps))  # each goes on where the one before was


def test_a_file_has_no_name_before_it_is_whole(tmp_path, monkeypatch) -> None:
    if files.ANONYMOUS is None:
        pytest.skip("files without a name are Linux's")
    seen, fsync = [], os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: seen.append(list(tmp_path.iterdir())) or fsync(descriptor)
    )
    files.write(tmp_path / "best.ckpt", b"weights")
    assert seen == [[]]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("best.ckpt", b"weights")]


@pytest.mark.parametrize("anonymous", [files.ANONYMOUS, None])
def test_two_processes_may_write_one_file_at_once(anonymous, tmp_path, monkeypatch) -> None:
    path, fsync = tmp_path / "metrics.json", os.fsync

    def other(descriptor):
        monkeypatch.setattr(files.os, "fsync", fsync)
        files.write(path, b"the other's")
        assert path.read_bytes() == b"the other's"

    monkeypatch.setattr(files, "ANONYMOUS", anonymous)
    monkeypatch.setattr(files.os, "fsync", other)
    files.write(path, b"its own")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("metrics.json", b"its own")]


def interrupting(original, at):
    """Ctrl-C in the middle of a function, the `at`-th time that it is called."""
    calls = count(1)

    @functools.wraps(original)
    def function(*args, **options):
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    return function


# phase → whose, what of it, the how manieth call of it, whether a run is left
PHASES = {
    "the command line is read": (app.CflowCLI, "parse_arguments", 1, False),
    "the data are read": (Digits, "split", 1, False),
    "the folder is made": (trainer.FlowTrainer, "fit", 1, False),
    "the model is held against the data": (FlowVAEModule, "setup", 1, False),
    "the first step": (FlowVAEModule, "training_step", 1, True),
    "a later step": (FlowVAEModule, "training_step", 2, True),
    "a validation": (FlowVAEModule, "validation_step", 1, True),
    "a later validation": (FlowVAEModule, "validation_step", 2, True),
    "the best checkpoint is written": (files.os, "fsync", 2, True),
    "the last checkpoint is written": (files.os, "fsync", 3, True),
    "the last checkpoint is put in place": (files.os, "link", 3, True),
    "the end of the training": (FlowVAEModule, "on_train_end", 1, True),
    "the test": (FlowVAEModule, "test_step", 1, True),
    "the end of the test": (FlowVAEModule, "on_test_epoch_end", 1, True),
    "the pictures": (results, "draw", 1, True),
}


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, which a shell takes from what it starts with "&"."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_is_code_130_in_every_phase(phase, tmp_path, monkeypatch, capsys, ctrl_c) -> None:
    owner, name, at, has_run = PHASES[phase]
    monkeypatch.chdir(tmp_path)
    if name == "link" and files.ANONYMOUS is None:
        pytest.skip("files without a name are Linux's")
    monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), at))
    assert cli.main(["fit", *TINY, "--trainer.max_steps", "3"]) == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("cflow: interrupted")
    assert error.count("\n") == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    left = contents(tmp_path)
    if not has_run:
        assert not list(tmp_path.glob("runs/*"))
    else:
        assert "last.ckpt" in {path.name for path in left}
        assert {path.name for path in left} <= {"best.ckpt", "last.ckpt"}


def test_a_disk_that_is_full_at_an_interrupt_is_said_with_it(tmp_path, monkeypatch, capsys, ctrl_c) -> None:
    def full(path, content):
        raise cflow.DataError(f"{path.name}: cannot be written")

    def step(self, batch, batch_idx):
        monkeypatch.setattr(files, "write", full)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FlowVAEModule, "training_step", step)
    assert cli.main(["fit", *TINY, "--trainer.max_steps", "3"]) == 130
    assert capsys.readouterr().err == "\ncflow: interrupted: last.ckpt: cannot be written\n"


REFUSED = {
    "an unknown accelerator": ["--trainer.accelerator", "abacus"],
    "no number of steps": ["--trainer.max_steps", "-1"],
    "another optimizer": ["--ckpt_path", "{run}", "--trainer.max_steps", "9", "--model.optimizer", "adam"],
    "another rate of the flow": ["--ckpt_path", "{run}", "--trainer.max_steps", "9", "--model.flow_lr", "0.5"],
    "another width": ["--ckpt_path", "{run}", "--trainer.max_steps", "9", "--model.width", "20"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_fit_that_is_refused_leaves_no_run(what, tmp_path, monkeypatch, capsys) -> None:
    old = tmp_path / "old/digits/version_0"
    monkeypatch.chdir(tmp_path)
    if "--ckpt_path" in REFUSED[what]:
        words = ["fit", *TINY, "--trainer.max_steps", "1", "--model.optimizer", "muon"]
        monkeypatch.setattr(trainer.FlowTrainer, "test", lambda *args, **options: [])
        assert cli.main([*words, "--trainer.default_root_dir", "old"]) == 0
    words = [word.format(run=old) for word in REFUSED[what]]
    capsys.readouterr()
    assert cli.main(["fit", *TINY, *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))
    assert not old.exists() or (old / "checkpoints/last.ckpt").is_file()
