"""A batch that gives no step is reported and skipped; the weights stay whole."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pl = pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from pytorch_lightning.callbacks import EMAWeightAveraging  # noqa: E402

import cflow  # noqa: E402
from cflow.training import cli, guard  # noqa: E402
from cflow.training.datamodule import SequenceDataModule  # noqa: E402
from cflow.training.module import FlowVAEModule  # noqa: E402
from cflow.training.population import PopulationModule  # noqa: E402

ROOT = Path(__file__).parents[1]
# Lightning's use of PyTorch's pytree, and its advice on workers, loggers, short epochs and skipped steps.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # models this small gain nothing from more
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*training_step. returned .None"),
]
SMALL = {"latent_dim": 4, "width": 16, "likelihood_samples": 0, "warmup_steps": 0, "schedule": "constant"}
TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--data.val_samples", "20", "--data.test_samples", "30"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.batch_size", "16"),
]


class Spoilt(FlowVAEModule):
    """Batches of some numbers, counted from 0, give no step: their loss, solve or gradient is spoilt."""

    how, when = "loss", (2, 3)
    number = -1

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.number += 1

    def losses(self, batch):
        found = super().losses(batch)
        if self.number not in self.when or not (batch.k == 1).any():
            return found
        if self.how == "solve":
            raise cflow.IntegrationError("dopri5 failed at t=1", t=1.0, max_abs_z=1.0, nfe=1)
        if self.how == "gradient":  # 0 · ∞
            weight = self.vae.encoder.net[-1].weight if hasattr(self.vae.encoder, "net") else next(self.parameters())
            return found | {"loss": found["loss"] + (weight * 0).abs().sqrt().sum()}
        return found | {"loss": found["loss"] * torch.nan, "kl": found["kl"] * torch.nan}


def fit(tmp_path, module, steps, callbacks=(), **settings):
    pl.seed_everything(3, verbose=False)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        **dict.fromkeys(silent, False), accelerator="cpu", devices=1, default_root_dir=tmp_path, max_steps=steps,
        limit_val_batches=0, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(module, SequenceDataModule(batch_size=8))
    return trainer


WORDS = {
    "loss": r"step 3: batch skipped, the loss is NaN, from the term kl \(of rotation\)",
    "solve": r"step 3: batch skipped, dopri5 failed at t=1 \(of rotation\)",
    "gradient": r"step 3: batch skipped, the gradient of vae\.\S+ is not finite",
}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("how", WORDS)
def test_a_batch_without_a_step_changes_nothing(tmp_path, capsys, how, optimizer) -> None:
    """Weights, the optimizer's state and an average of the weights are those of the fit without it."""
    seen = {}

    class Watched(Spoilt):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            weights = torch.nn.utils.parameters_to_vector(self.parameters()).detach().clone()
            counts = [int(s["step"]) for s in self.trainer.optimizers[0].state.values() if "step" in s]
            ema = next(c for c in self.trainer.callbacks if isinstance(c, EMAWeightAveraging))
            average = torch.cat([p.detach().flatten().clone() for p in ema._average_model.parameters()])
            seen[self.number] = weights, max(counts), self.global_step, average

    module = Watched(**SMALL, optimizer=optimizer)
    module.how = how
    trainer = fit(tmp_path, module, 4, [EMAWeightAveraging(decay=0.5)])
    assert [seen[n][1:3] for n in range(6)] == [(1, 1), (2, 2), (2, 2), (2, 2), (3, 3), (4, 4)]
    for number in (2, 3):
        assert torch.equal(seen[number][0], seen[1][0])
        assert torch.equal(seen[number][3], seen[1][3])
    assert not torch.equal(seen[4][0], seen[1][0])
    assert seen[5][0].isfinite().all()
    assert (trainer.global_step, module.skipped) == (4, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(re.match(WORDS[how], line) for line in lines)


def test_skips_in_a_row_are_counted_anew_after_a_step(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(guard, "MOST", 2)
    module = Spoilt(**SMALL)
    module.when = (0, 1, 3, 4, 6, 7)
    assert fit(tmp_path, module, 3).global_step == 3
    assert module.skipped == 6


def test_batches_that_are_accumulated_count_without_those_skipped(tmp_path) -> None:
    module = Spoilt(**SMALL)
    module.when = (1, 4, 5)
    trainer = fit(tmp_path, module, 3, accumulate_grad_batches=2)
    assert (module.skipped, module.number, trainer.global_step) == (3, 7, 3)


def test_too_many_in_a_row_stop_the_fit_with_a_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    losses = FlowVAEModule.losses

    def spoilt(self, batch):
        found = losses(self, batch)
        return found if self.global_step < 3 else found | {"loss": found["loss"] * torch.nan}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FlowVAEModule, "losses", spoilt)
    assert cli.main(["fit", "--config", "digits", *TINY, "--trainer.max_steps", "9"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == guard.MOST + 1
    assert lines[-1].startswith(
        "cflow: error: step 4: the loss is NaN (of every transformation). 11 batches in a row gave no step: the fit"
    )
    assert lines[-1].endswith("go on with: cflow fit --ckpt_path runs/digits/version_0/checkpoints/last.ckpt")
    stored = torch.load("runs/digits/version_0/checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 3
    assert all(x.isfinite().all() for x in stored["state_dict"].values())


def test_a_solve_that_fails_on_the_way_back_is_skipped(tmp_path, capsys, monkeypatch) -> None:
    backward = pl.LightningModule.backward

    def failing(self, loss, *args, **more):
        backward(self, loss, *args, **more)
        if self.number == 1:
            raise cflow.IntegrationError("dopri5 failed at t=1", t=1.0, max_abs_z=1.0, nfe=1)

    monkeypatch.setattr(pl.LightningModule, "backward", failing)
    module = Spoilt(**SMALL)
    module.when = ()
    assert fit(tmp_path, module, 2).global_step == 2
    assert "step 2: batch skipped, in the backward pass dopri5 failed" in capsys.readouterr().err
    assert module.number == 2


def test_steps_of_a_population_too(tmp_path, monkeypatch, capsys) -> None:
    """What a step draws follows the number of its batch: one that is skipped is not drawn again."""
    losses, drawn = PopulationModule.losses, []

    def spoilt(self, batch):
        found = losses(self, batch)
        drawn.append(found["loss"].item())
        return found if len(drawn) != 2 else found | {"loss": found["loss"] * torch.nan}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PopulationModule, "losses", spoilt)
    monkeypatch.setattr(PopulationModule, "lr", 0.0, raising=False)
    words = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "40", "--trainer.accelerator", "cpu"]
    assert cli.main(["fit", "--config", "population", "--data.batch_size", "32", *words]) == 0
    assert "step 2: batch skipped, the loss is NaN" in capsys.readouterr().err
    assert len(set(drawn)) == 4


SCRIPT = """
import os, sys
import pytorch_lightning as pl
import torch

import cflow
from cflow.training.datamodule import SequenceDataModule
from cflow.training.guard import TrainingError
from cflow.training.module import FlowVAEModule


class Module(FlowVAEModule):
    def losses(self, batch):
        found = super().losses(batch)
        bad = self.global_step == 2 and self.global_rank == 1
        return found | {"loss": found["loss"] * torch.nan} if bad else found


pl.seed_everything(0, verbose=False)
module = Module(width=16, latent_dim=4, schedule="constant", warmup_steps=0, likelihood_samples=0)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=20, limit_val_batches=0, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
)
try:
    trainer.fit(module, SequenceDataModule(batch_size=8))
except TrainingError as error:
    finite = all(p.isfinite().all() for p in module.parameters())
    open(f"{module.global_rank}.txt", "w").write(f"{trainer.global_step} {finite} {error}")
"""


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "script.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith(
        "2 True step 3: in process 1 the loss is NaN (of every transformation). The fit stops in all processes"
    )
