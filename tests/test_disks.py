"""What becomes of a run when its disk fills, its folder is shared or read-only, or its data vanish."""

import multiprocessing
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("resource")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

import resource

from test_interruptions import TINY, contents, run

from cflow.training import cli
from cflow.training.module import FlowVAEModule

pytestmark = pytest.mark.usefixtures("one_thread")


def before_step(number, monkeypatch, act):
    """Have something done when a training comes to a step."""
    step = FlowVAEModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == number:
            act()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FlowVAEModule, "training_step", training_step)


@pytest.fixture
def no_large_files():
    """A function after whose call the system writes no file of over ten kilobytes, as if the disk were full by then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full=True: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]) if full else before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_and_is_freed_again(no_large_files, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        before_step(2, patch, no_large_files)
        assert cli.main(["fit", *TINY, "--trainer.max_steps", "4"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be written (File too large); what was written before is whole" in error
    assert "--ckpt_path" in error
    left = contents(tmp_path)
    assert {path.name: step for path, step in left.items()} == {"best.ckpt": 2, "last.ckpt": 2}
    again = ["fit", *TINY, "--trainer.max_steps", "4", "--ckpt_path", "last"]
    assert cli.main(again) == 2  # still full
    assert contents(tmp_path) == left
    no_large_files(False)
    assert cli.main(again) == 0
    assert max(contents(tmp_path).values()) == 4
    assert list(tmp_path.glob("runs/digits/*/metrics.json"))


def test_a_folder_that_vanishes_in_mid_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        before_step(2, patch, lambda: shutil.rmtree(tmp_path / "runs"))
        assert cli.main(["fit", *TINY, "--trainer.max_steps", "4"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert re.fullmatch(r"cflow: error: runs/digits/version_0/\S+: No such file or directory", line)
    assert cli.main(["fit", *TINY, "--trainer.max_steps", "1"]) == 0


READ_ONLY = ["/proc", "/sys", "{file}/below"]


@pytest.mark.parametrize("root", READ_ONLY)
def test_a_folder_that_cannot_be_written_to(root, tmp_path, monkeypatch, capsys) -> None:
    """Said before anything is trained; /proc and /sys refuse even the superuser."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    before_step(0, monkeypatch, lambda: pytest.fail("it has been trained"))
    root = root.format(file=tmp_path / "file")
    assert cli.main(["fit", *TINY, "--trainer.max_steps", "1", "--trainer.default_root_dir", root]) == 2
    error = capsys.readouterr().err
    assert root in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.ci
def test_runs_at_once_in_one_folder(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cflow.training.app", "sklearn.datasets", "sklearn.model_selection"])
    words = ["fit", *TINY, "--trainer.max_steps", "3"]
    processes = [context.Process(target=run, args=(tmp_path, words)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    said = (tmp_path / "said.txt").read_text()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0], said
    assert "Error" not in said
    runs = sorted(tmp_path.glob("runs/digits/*"))
    assert [folder.name for folder in runs] == [f"version_{number}" for number in range(4)]
    assert sorted(contents(tmp_path).values())[4:] == [3, 3, 3, 3]
    found = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "events" not in path.name} for folder in runs
    ]
    assert found == [found[0]] * 4
    assert {"config.yaml", "metrics.json", "checkpoints/last.ckpt"} <= found[0]


def test_data_that_vanish_in_mid_run(tmp_path, monkeypatch, capsys) -> None:
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for number in range(60):
        (root / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        np.savez(root / f"{number % 3}/{number:02d}.npz", rng.integers(0, 255, (4, 8, 8), "uint8"))
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", "folder", "--data.root", str(root), "--trainer.max_steps", "4", *TINY]
    words += ["--data.val_samples", "8", "--data.test_samples", "8"]
    with monkeypatch.context() as patch:
        before_step(2, patch, lambda: shutil.rmtree(root))
        code = cli.main(words)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert code == 2
    assert re.fullmatch(r"cflow: error: .*\.npz.*", line)
    assert contents(tmp_path)
