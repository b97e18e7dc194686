"""The script of the paper's tables: rows that are kept and go on, the baseline of two stages, the table itself."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from pytorch_lightning import Callback

from cflow.training.datamodule import SequenceDataModule
from cflow.training.trainer import FlowTrainer

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("paper_tables")
    for name in ("paper_tables", "report"):
        sys.modules.pop(name, None)


METRICS = {
    **{f"equivariance_error_per_frame/{name}/{t}": float(t) for name in ("rotation", "hue") for t in range(9)},
    **{f"equivariance_error/{name}": 36.0 for name in ("rotation", "hue", "mean")},
    **{f"equivariance_error/{name}_stderr": 1.0 for name in ("rotation", "hue", "mean")},
    **{f"{name}/mean": 100.0 + i for i, name in enumerate(("copy_input", "black", "no_flow"))},
    "reconstruction_l1": 2.5,
    "samples": 10.0,
}


def test_numbers_are_those_of_seven_frames(tables) -> None:
    expected = {
        "rotation": 28.0,
        "hue": 28.0,
        "mean": 28.0,
        "best trivial, all frames": 100.0,
        "reconstruction_l1": 2.5,
    }
    assert tables.numbers(METRICS) == expected


def test_a_row_that_was_interrupted_goes_on_and_one_that_is_done_is_kept(tables, tmp_path, monkeypatch, capsys) -> None:
    ran = []
    monkeypatch.setattr(tables.subprocess, "run", lambda line, check: ran.append(line))
    last = tmp_path / "weak_0/version_10/checkpoints/last.ckpt"
    for file in (last, tmp_path / "weak_0/version_9/checkpoints/last.ckpt", tmp_path / "supervised_0/version_0/x"):
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "supervised_0/version_0/metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    methods = ["--methods", "supervised", "weak", "--seeds", "0", "--steps", "9"]
    with pytest.raises(SystemExit) as ending:
        tables.main([*methods, "--out", str(tmp_path), "--", "--model.latent_dim", "8"])
    assert ending.value.code == 1
    (line,) = ran
    assert line[2:4] == ["fit", "weak"]
    assert line[-4:] == ["--model.latent_dim", "8", "--ckpt_path", str(last)]
    assert line[line.index("--trainer.max_steps") + 1] == "9"
    assert "not finished: weak, seed 0" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["rows"]
    assert row["method"] == "supervised"


def test_every_method_has_a_command_line_that_is_known(tables, tmp_path) -> None:
    app = importlib.import_module("cflow.training.app")
    for method in tables.METHODS:
        words = tables.words("mnist", method, 3, root="data", out=tmp_path, steps=5, more=[])
        with pytest.raises(SystemExit) as ending:
            app.run(["fit", *words, "--print_config"], tables.METHODS[method].module)
        assert ending.value.code == 0
    assert words[words.index("--trainer.max_steps") + 1] == "10"  # the plain VAE has two stages


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_the_plain_vae_learns_images_first_and_flows_afterwards(tables) -> None:
    model = tables.PlainVAE(lr=1e-3, warmup_steps=0, latent_dim=4, width=16, potential="quadratic", step_size=4.0)
    data = SequenceDataModule("digits", batch_size=8, val_samples=8, test_samples=8)
    seen = {}

    def weights():
        return {name: p.detach().clone() for name, p in model.vae.named_parameters()}

    class Stages(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            seen[trainer.global_step] = weights()

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = FlowTrainer(
        accelerator="cpu", max_steps=4, callbacks=[Stages()], enable_model_summary=False, limit_val_batches=0, **quiet
    )
    before = weights()
    trainer.fit(model, datamodule=data)

    def moved(a, b):
        return {name.split(".")[0] for name in a if not a[name].equal(b[name])}

    assert moved(before, seen[2]) == {"encoder", "decoder"}
    assert moved(seen[2], seen[4]) == {"flow"}
