"""The command line: what it writes, what wins over what, and how it fails."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import cflow

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.checkpoint import PRETRAINED, pretrained_folder
from cflow.data import PAPER
from cflow.data.digits import load_digits
from cflow.training import app, cli, compositions, presets, runs

# The smallest model that goes through every part of a fit.
TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.frames_per_step", "2"),
    *("--model.likelihood_samples", "2", "--data.val_samples", "20", "--data.test_samples", "30"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.batch_size", "32"),
]
STEP = [*TINY, "--trainer.max_steps", "1"]
pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from more

NAMES = ["scaling", "rotation", "hue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def fitted(folder):
    """A run of 6 steps, its output, and its folder."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        code = cli.main(["fit", "--config", "digits", *TINY, "--trainer.max_steps", "6", "--model.lr", "1e-4"])
    assert code == 0
    return folder / "runs" / "digits" / "version_0", out.getvalue()


@pytest.fixture
def there(folder, fitted, monkeypatch):
    """The working folder of the fit, with its run."""
    monkeypatch.chdir(folder)
    return fitted[0]


def stored_step(path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_fit_writes_the_files_of_a_run(fitted) -> None:
    run, _ = fitted
    for name in ("config.yaml", "metrics.json", "traversals.png", "traversals.gif", "traversals.webp", "report.html"):
        assert (run / name).stat().st_size > 0
    assert list(run.glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert stored_step(run / "checkpoints/last.ckpt") == 6
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["lr"] == 1e-4
    assert config["data"]["num_frames"] == 9


def test_metrics_have_the_agreed_keys(fitted) -> None:
    metrics = json.loads((fitted[0] / "metrics.json").read_text())
    groups = ("equivariance_error", "copy_input", "black", "no_flow", "not_gradient")
    groups += ("mean_square/gradient", "mean_square/solenoidal")
    wanted = {f"{group}/{name}" for group in groups for name in [*NAMES, "mean"]}
    wanted |= {f"equivariance_error_per_frame/{name}/{t}" for name in NAMES for t in range(1, 9)}
    composed = ["superposition", "switch", "half_frames", "inverse", "there_and_back", "twice_horizon", "closure"]
    wanted |= {f"composition/{name}{key}" for name in composed for key in ("", "/copy_input", "/black", "/no_flow")}
    wanted |= {"composition/commutator", "composition/commutator/truth"}
    wanted |= {"equivariance_error_7/mean", "reconstruction_l1", "elbo", "log_likelihood", "seconds", "samples"}
    wanted |= {f"{group}/{name}" for group in ("psnr", "ssim") for name in [*NAMES, "mean"]}
    wanted |= {"log_likelihood_bound", "vp_score"}
    once = ("composition", "not_gradient", "mean_square", "elbo", "log_likelihood_bound", "seconds", "samples")
    wanted |= {f"{key}_stderr" for key in wanted if not key.startswith(once)}
    assert set(metrics) == wanted
    assert metrics["log_likelihood"] < metrics["log_likelihood_bound"]
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["samples"] == 30
    seven = [sum(metrics[f"equivariance_error_per_frame/{name}/{t}"] for t in range(1, 8)) for name in NAMES]
    assert metrics["equivariance_error_7/mean"] == pytest.approx(sum(seven) / 3)
    for name in NAMES:
        assert 0 < metrics[f"not_gradient/{name}"] < 1
        assert metrics[f"mean_square/gradient/{name}"] > 0 < metrics[f"mean_square/solenoidal/{name}"]
    for name in NAMES:
        frames = [metrics[f"equivariance_error_per_frame/{name}/{t}"] for t in range(1, 9)]
        assert sum(frames) == pytest.approx(metrics[f"equivariance_error/{name}"], rel=1e-4)


def test_fit_ends_with_the_table_and_where_the_files_are(fitted) -> None:
    lines = fitted[1].rstrip().splitlines()
    assert lines[0].startswith(
        "training scaling, rotation, hue of 1,257 Digits: quadratic potentials and skew parts, D=4, 0.1 M weights"
    )
    assert lines[0].endswith("; 6 steps on cpu (1 thread); writes runs/digits/version_0")
    assert lines[1].startswith("step 6 of 6, ")
    assert lines[-2].startswith("runs/digits/version_0/: ")
    assert re.fullmatch(r"6 steps in \d+ s of training, [\d.]+ steps a second", lines[-1])
    assert any(line.startswith("equivariance error") for line in lines)
    assert any(re.match(r"superposition( +[\d.]+){4}$", line) for line in lines)
    assert "GPU available" not in fitted[1]
    assert "Tip" not in fitted[1]


@pytest.mark.ci
@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_only_where_the_processor_has_it(supported, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", "digits", *TINY, "--trainer.max_steps", "1", "--trainer.precision", "bf16-mixed"]
    assert cli.main(words) == 0
    config = yaml.safe_load(Path("runs/digits/version_0/config.yaml").read_text())
    assert config["trainer"]["precision"] == ("bf16-mixed" if supported else "32-true")
    assert ("this processor has no bfloat16" in capsys.readouterr().out) is not supported


def test_load_needs_no_lightning(fitted) -> None:
    code = (
        "import sys, cflow; vae = cflow.load(sys.argv[1]); print(vae.flow.dim); "
        "assert not [m for m in sys.modules if m.startswith(('pytorch_lightning', 'lightning'))]"
    )
    done = subprocess.run([sys.executable, "-c", code, fitted[0]], capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"


@pytest.mark.ci
def test_weights_are_tested_and_drawn_by_name(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data.test_samples", "30", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert cli.main(["test", "--pretrained", "digits", *words]) == 0
    metrics = json.loads(Path("runs/pretrained/digits/metrics.json").read_text())
    assert metrics["equivariance_error/mean"] < 0.15 * metrics["copy_input/mean"]
    assert metrics["seconds"] > 0
    assert metrics["psnr/mean"] > 30
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 105
    assert cli.main(["traverse", "--pretrained", "digits", "--weights", "0.5,0.5,0", *words, "--out_dir", "x"]) == 0
    assert Path("x/composition.png").stat().st_size > 0


BAD_WEIGHTS = {
    "an unknown name": (["--pretrained", "digitz"], "--pretrained digitz: expected digits, "),
    "two models": (["--pretrained", "digits", "--ckpt_path", "last"], "give one of them"),
    "another order": (
        ["--pretrained", "digits", "--data.transformations", "hue,rotation,scaling"],
        "the weights know scaling, rotation, hue, but the data are of hue, rotation, scaling",
    ),
    "another width": (["--pretrained", "digits", "--model.width", "16"], "--pretrained: its weights do not fit"),
    "no options": (["--pretrained", "flow"], "without options of `cflow fit`"),
}


@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_weights_that_do_not_fit(what, there, capsys) -> None:
    cflow.PotentialFlow(cflow.RidgePotential(4)).save_pretrained("flow")
    words, text = BAD_WEIGHTS[what]
    assert cli.main(["test", *words, "--trainer.accelerator", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_weights_score_what_is_stored(name, tmp_path, monkeypatch) -> None:
    folder, words = pretrained_folder(name), ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    if name.startswith("mnist"):
        if "CFLOW_DATA" not in os.environ:
            pytest.skip("set CFLOW_DATA to the folder of MNIST")
        words += ["--data.root", os.environ["CFLOW_DATA"]]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["test", "--pretrained", name, "--out_dir", "x", *words]) == 0
    stored = json.loads((folder / "metrics.json").read_text())
    assert json.loads(Path("x/metrics.json").read_text()) == pytest.approx(stored, rel=1e-3, abs=1e-3)


@pytest.mark.ci
def test_test_repeats_the_measures_of_the_fit(there, tmp_path, capsys) -> None:
    assert cli.main(["test", "--config", "digits", "--ckpt_path", "last", "--out_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((there / "metrics.json").read_text())
    assert "equivariance error" in capsys.readouterr().out


def test_an_explicit_argument_wins_over_the_checkpoint(there, tmp_path) -> None:
    arguments = ["--ckpt_path", str(there), "--out_dir", str(tmp_path), "--data.test_samples", "7"]
    assert cli.main(["test", *arguments, "--data.num_frames", "3"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["samples"] == 7
    assert "equivariance_error_per_frame/hue/2" in metrics
    assert "equivariance_error_per_frame/hue/3" not in metrics


@pytest.mark.parametrize("path", ["last", "runs/digits", "runs/digits/version_0", "runs/digits/version_0/checkpoints"])
def test_a_checkpoints_configuration_is_the_default(there, capsys, path) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["test", "--ckpt_path", path, "--model.lr", "0.5", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["width"] == 16
    assert config["model"]["lr"] == 0.5


def test_a_preset_names_the_runs_but_does_not_undo_the_checkpoint(there, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["test", "--config", "digits", "--ckpt_path", "last", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["width"] == 16


def test_a_configuration_file_wins_over_the_checkpoint(there, tmp_path, capsys) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {lr: 0.25}\n")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fit", "--config", str(mine), "--ckpt_path", str(there), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["model"]["lr"], config["model"]["width"]) == (0.25, 16)


def test_traverse_draws(there, tmp_path) -> None:
    from PIL import Image

    assert cli.main(["traverse", "--ckpt_path", "last", "--num_samples", "2", "--out_dir", str(tmp_path)]) == 0
    with Image.open(tmp_path / "traversals.gif") as gif:
        assert gif.n_frames == 9
    assert (tmp_path / "traversals.png").is_file()


@pytest.mark.parametrize(
    ("words", "title", "t", "amounts"),
    [
        (["--weights", "0.5,-1,0"], "0.5 scaling − rotation", range(9), lambda t: [t / 2, -t, 0]),
        (["--weights", "-1,0,0", "--times", "-2,-1.5"], "−scaling", [-2, -1.5], lambda t: [-t, 0, 0]),
        (
            ["--schedule", "0:scaling,4:1,6:0/0/0.5", "--times", "0,3,5,7.5"],
            "scaling, from t = 4 on rotation, from t = 6 on 0.5 hue",
            [0, 3, 5, 7.5],
            lambda t: [min(t, 4), min(max(t - 4, 0), 2), max(t - 6, 0) / 2],
        ),
        (
            ["--schedule=0:hue,4:scaling", "--times=8,4,0"],
            "hue, from t = 4 on scaling",
            [8, 4, 0],
            lambda t: [max(t - 4, 0), 0, min(t, 4)],
        ),
    ],
    ids=["weights", "inverse", "schedule", "back"],
)
def test_traverse_composes(there, tmp_path, monkeypatch, words, title, t, amounts) -> None:
    from cflow.training import results

    shown = {}

    def recorded(true, made, names, *, times):
        shown.update(true=true[0], made=made[0], names=names, times=times)
        return draw(true, made, names, times=times)

    draw = results.traversal_grid
    monkeypatch.setattr(results, "traversal_grid", recorded)
    out = tmp_path / "pictures"
    assert cli.main(["traverse", "--ckpt_path", "last", "--out_dir", str(out), "--num_samples", "1", *words]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"composition.{kind}" for kind in ("gif", "png", "webp")]
    assert shown["names"] == [title]
    assert shown["times"] == list(t)
    still = load_digits("test")[:1] / 255
    order = {"hue": 2, "scaling": 0} if title.startswith("hue") else {"scaling": 0, "rotation": 1, "hue": 2}
    for now, frame in zip(t, shown["true"], strict=True):
        wanted = still
        for name, k in order.items():
            wanted = PAPER[name](wanted, torch.tensor(float(amounts(now)[k])))
        torch.testing.assert_close(frame, wanted[0], rtol=0, atol=1e-5)
    assert shown["made"].shape == shown["true"].shape


def test_traverse_at_other_times_draws_every_transformation(there, tmp_path) -> None:
    from PIL import Image

    words = ["--ckpt_path", "last", "--out_dir", str(tmp_path), "--times", "0,0.5,12.5"]
    assert cli.main(["traverse", *words]) == 0
    with Image.open(tmp_path / "traversals.gif") as gif:
        assert gif.n_frames == 3


ASKED = [
    ({"weights": "1,2"}, r"--weights 1,2: expected 3 numbers, separated by ',', for scaling, rotation, hue; got 2"),
    ({"weights": "1,x,0"}, "--weights 1,x,0: expected numbers, got 'x'"),
    ({"weights": "1,nan,0"}, "--weights 1,nan,0: expected finite numbers, got 'nan'"),
    ({"weights": "1,0,0", "schedule": "0:hue"}, "--weights, --schedule: give one of the two"),
    ({"schedule": "0:scalling"}, "'scalling' is no transformation; expected scaling, .* Did you mean 'scaling'?"),
    ({"schedule": "0:3"}, "'3' is no transformation; expected scaling, rotation, hue, or 0 to 2"),
    ({"schedule": "0:1/0"}, "--schedule 0:1/0: 1/0: expected 3 numbers, separated by '/'"),
    ({"schedule": "0:inf/0/0"}, "expected finite numbers, got 'inf'"),
    ({"schedule": "scaling"}, "expected pieces start:transformation, such as 0:scaling, got 'scaling'"),
    ({"schedule": "0:"}, "expected pieces start:transformation, such as 0:scaling, got '0:'"),
    ({"schedule": "now:hue"}, "--schedule now:hue: expected numbers, got 'now'"),
    ({"schedule": "0:hue,0:scaling"}, "expected starts that increase, got 0, 0"),
    ({"schedule": "2:scaling"}, "--schedule 2:scaling: begins at 2, but the times asked for are 0 to 8; change it"),
    ({"schedule": "0:scaling,8:hue"}, "its last piece begins at 8, but the times asked for are 0 to 8"),
    ({"times": "0,1,0.5"}, "--times 0,1,0.5: expected times that increase, or that decrease"),
    ({"times": "0,0,1"}, "expected times that increase, or that decrease"),
    ({"times": "1"}, "expected 2 to 100 times, separated by ',', got 1"),
    ({"times": ",".join(map(str, range(101)))}, "expected 2 to 100 times, separated by ',', got 101"),
    ({"times": "0,inf"}, "--times 0,inf: expected finite numbers, got 'inf'"),
    ({"times": "0;1"}, "--times 0;1: expected numbers, got '0;1'"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "message"), ASKED, ids=[message[:40] for _, message in ASKED])
def test_what_cannot_be_composed_says_so(asked, message) -> None:
    with pytest.raises(cflow.ArgumentError, match=re.sub(r"\?$", r"\\?", message)):
        compositions.asked(NAMES, torch.arange(9.0), **asked)


def test_a_wrong_composition_is_one_line_and_code_2(there, tmp_path, capsys) -> None:
    assert cli.main(["traverse", "--ckpt_path", "last", "--schedule", "0:scalling", "--out_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'scaling'?" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.ci
def test_resume_goes_on_with_the_new_learning_rate(there, monkeypatch) -> None:
    from cflow.training.module import FlowVAEModule

    rates = []
    original = FlowVAEModule.training_step

    def training_step(self, batch, batch_idx):
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FlowVAEModule, "training_step", training_step)
    arguments = [
        "--ckpt_path",
        str(there),
        "--trainer.max_steps",
        "9",
        "--model.lr",
        "0.01",
        "--model.warmup_steps",
        "0",
    ]
    assert cli.main(["fit", *arguments, "--model.schedule", "constant"]) == 0
    newest = runs.versions(Path("runs"), "digits")[-1]
    assert newest.name != "version_0"
    assert stored_step(newest / "checkpoints/last.ckpt") == 9
    assert rates == pytest.approx([0.01] * 3)
    resumed = json.loads((newest / "metrics.json").read_text())["seconds"]
    assert resumed > json.loads((there / "metrics.json").read_text())["seconds"]


@pytest.mark.parametrize(
    ("command", "wanted"), [("fit", "last.ckpt"), ("test", "best.ckpt"), ("traverse", "best.ckpt")]
)
def test_a_fit_goes_on_from_the_last_checkpoint_and_results_are_of_the_best(
    command, wanted, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/digits/version_0/checkpoints"
    folder.mkdir(parents=True)
    for name in ("best.ckpt", "last.ckpt"):
        torch.save({runs.CONFIG_KEY: {}}, folder / name)
    taken = []
    monkeypatch.setattr(
        app.CflowCLI, "before_instantiate_classes", lambda self: taken.append(self.config) or sys.exit(0)
    )
    for meant in ("last", str(folder.parent), "best"):
        with pytest.raises(SystemExit):
            cli.main([command, "--ckpt_path", meant])
    files = [Path(config[command]["ckpt_path"]).resolve() for config in taken]
    assert files == [folder / wanted, folder / wanted, folder / "best.ckpt"]


def test_a_fit_ends_with_the_test_of_its_best_checkpoint(tmp_path, monkeypatch) -> None:
    from cflow.training.trainer import FlowTrainer

    tested = []

    @functools.wraps(FlowTrainer.test)  # the command line reads its signature
    def test(self, *args, ckpt_path, **settings):
        tested.append(Path(ckpt_path))

    monkeypatch.setattr(FlowTrainer, "test", test)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", *TINY, "--trainer.max_steps", "1"]) == 0
    checkpoints = tmp_path / "runs/digits/version_0/checkpoints"
    assert (checkpoints / "last.ckpt").is_file()
    assert [path.resolve() for path in tested] == [checkpoints / "best.ckpt"]


@pytest.mark.ci
def test_another_optimizer_cannot_go_on(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["fit", *TINY, "--trainer.max_steps", "1", "--model.optimizer", "adam", "--run_name", "adam"]) == 0
    words = ["fit", "--ckpt_path", "runs/adam", "--trainer.max_steps", "2", "--model.optimizer"]
    assert cli.main([*words, "muon"]) == 2
    assert "model.optimizer='muon', but the checkpoint holds the state of 'adam'" in capsys.readouterr().err
    assert cli.main([*words, "adam"]) == 0


def test_the_newest_run_has_the_largest_number(tmp_path) -> None:
    for number in (10, 2, 9):
        (tmp_path / f"digits/version_{number}").mkdir(parents=True)
    assert [p.name for p in runs.versions(tmp_path, "digits")] == ["version_2", "version_9", "version_10"]
    assert runs.claim_run(tmp_path, "digits").name == "version_11"


@pytest.mark.ci
def test_a_fit_that_time_ends_says_what_is_missing(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["fit", *TINY, "--trainer.max_time", "00:00:00:01", "--run_name", "timed"]) == 0
    checkpoints = folder / "runs/timed/version_0/checkpoints"
    steps = stored_step(checkpoints / "last.ckpt")
    assert stored_step(checkpoints / "best.ckpt") == steps > 0
    said = capsys.readouterr().out
    assert f"trainer.max_time ended the training after {steps} of 2,500 steps" in said
    assert re.match(rf"{steps} of 2,500 steps in \d+ s of training", said.splitlines()[-1])


def test_print_config_help_and_version(capsys) -> None:
    for command in ("fit", "test", "traverse"):
        for flag in ("--help", "--print_config"):
            with pytest.raises(SystemExit, match="0"):
                cli.main([command, flag])
            assert "model" in capsys.readouterr().out
        assert cli.main([command, "--version"]) == 0
        assert capsys.readouterr().out == f"cflow {cflow.__version__}\n"
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        assert ", ".join(presets.preset_names()) in said
        assert all(f"\n  {command} " in said for command in cli.COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--print_config"])


@pytest.mark.ci
def test_a_printed_configuration_makes_a_run_of_its_own_name(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fit", "--config", "digits", *TINY, "--trainer.max_steps", "1", "--print_config"])
    Path("mine.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["fit", "--config", "mine.yaml"]) == 0
    assert cli.main(["fit", "--ckpt_path", "runs/mine", "--trainer.max_steps", "2"]) == 0
    assert cli.main(["fit", "--config", "runs/mine/version_1/config.yaml"]) == 0
    assert sorted(path.name for path in Path("runs/mine").iterdir()) == ["version_0", "version_1", "version_2"]


def test_help_begins_with_the_model_and_hides_what_is_rare(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fit", "--help"])
    short = capsys.readouterr().out
    model, data, trainer = (short.index(f"--{name}") for name in ("model.lr", "data.dataset", "trainer.max_steps"))
    assert model < data < trainer
    assert "--trainer.sync_batchnorm" not in short
    assert short.count("\n") < 300
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fit", "--help_all"])
    assert "--trainer.sync_batchnorm" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["fit", "--version"]])
def test_what_needs_no_pytorch_imports_none(words) -> None:
    code = f"import sys; from cflow.training.cli import main; sys.exit(main({words!r}) or 3 * ('torch' in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "unknown command 'train'"),
        (["tets"], "Did you mean 'test'?"),
        (["--config", "digits", "fit"], "the command comes first"),
        (["fit", "--config", "digit"], "Did you mean 'digits'?"),
        (["fit", "--config", "nowhere/a.yaml"], "no such file"),
        (["fit", "--model.lrr", "1"], "Did you mean '--model.lr'?"),
        (["fit", "--trainer.max_step", "1"], "Did you mean '--trainer.max_steps'?"),
        (["fit", "--lr", "1"], "Did you mean '--model.lr'?"),
        (["fit", "--model.lr", "fast"], "--model.lr: expected a float, got fast"),
        (["fit", "--model.lr", "-1"], "model.lr=-1.0 must be positive"),
        (["fit", "--model.flow_lr", "0"], "model.flow_lr=0.0 must be positive; 1 is the learning rate of the networks"),
        (["fit", "--model.solver", "rk5"], "Did you mean 'rk4'?"),
        (["fit", "--model.num_flows", "2", "--trainer.max_steps", "1"], "set model.num_flows=3"),
        (["fit", "--model.frames_per_step", "10"], "more than data.num_frames=9"),
        (["fit", "--trainer.accelerator", "abacus"], "abacus"),
        (["fit", "--trainer.accelerator", "tpu"], "--trainer: "),
        (["fit", "--trainer.max_time", "soon"], "DD:HH:MM:SS"),
        (["fit", "--seed_everything", "-5"], "--seed_everything=-5: expected 0 to 4294967295"),
        (["fit", *STEP, "--run_name", "../elsewhere"], "--run_name='../elsewhere': expected the name of a folder"),
        (["fit", *STEP, "--run_name", "\ud800"], "expected the name of a folder"),
        (["fit", "--model.width", str(10**15)], "nothing can be made of these options: "),
        (["fit", "--data.dataset", "cifar10"], "data.dataset='cifar10': expected one of digits, mnist"),
        (["fit", "--model.schedule", "linear"], "--model.schedule: expected 'cosine' or 'constant', got linear"),
        (["fit", "--model.network", "resnet"], "--model.network: expected 'mlp', 'conv' or 'paper', got resnet"),
        (["test"], "needs --ckpt_path"),
        (["test", "--ckpt_path", "nowhere.ckpt"], "no such file"),
        (["traverse", "--ckpt_path", "last", "--config", "mnist"], "no run with a checkpoint"),
        (["fit", "--trainer.max_steps", "0"], "give at least one step"),
        (["fit", "--model.image_shape", "[1,2,3]"], "--model.image_shape: cannot be given, it is the data's"),
        (["fit", "--data.source", "os"], "data.source: expected a cflow.data.Sequences, got str"),
        (["fit", "stray"], "unexpected argument 'stray'"),
        (["report", "--data.root", "x", "runs/a"], "runs come first, options behind them: cflow report runs/a --data"),
    ],
)
def test_wrong_arguments_give_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(arguments)
    except SystemExit as ending:
        code = ending.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {learning_rate: 1}\n", "unknown option model.learning_rate. Did you mean 'model.lr'?"),
        ("modle:\n  lr: 0.1\n", "unknown option modle.lr. Did you mean 'model.lr'?"),
        ("data:\n  batchsize: 3\n", "unknown option data.batchsize. Did you mean 'data.batch_size'?"),
        ("model:\n  lr: 1\n width: 2\n", "line 3: no valid YAML"),
        ("- model\n", "expected options such as"),
        ("model: 3\n", "unknown option model."),
        ("model: &a {b: *a}\n", "Does an alias (*name) repeat itself?"),
        ("model: {lr: &a [1, *a]}\n", "Does an alias (*name) repeat itself?"),
        (f"model: {{lr: {'[' * 3000}{']' * 3000}}}\n", "nested too deeply"),
        (
            "a: &a [0,0,0,0,0,0]\n"
            + "".join(f"{y}: &{y} [*{x},*{x},*{x},*{x},*{x},*{x}]\n" for x, y in pairwise("abcdefg")),
            "more than 10,000 values",
        ),
    ],
)
def test_a_wrong_configuration_file_is_named(tmp_path, monkeypatch, capsys, text, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text(text)
    try:
        code = cli.main(["fit", "--config", "typo.yaml"])
    except SystemExit as ending:
        code = ending.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "typo.yaml" in error
    assert error.count("\n") == 1


def test_a_root_without_data_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", "mnist", "--data.root", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "data.root" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "foreign"])
def test_damaged_checkpoints_are_one_line(there, tmp_path, capsys, damage) -> None:
    good = (there / "checkpoints/best.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    if damage == "cut":
        bad.write_bytes(good[: len(good) // 2])
    elif damage == "flipped":
        middle = len(good) // 2
        bad.write_bytes(good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :])
    elif damage == "text":
        bad.write_text("no checkpoint")
    else:
        torch.save({"weights": torch.zeros(2)}, bad)
    assert cli.main(["test", "--ckpt_path", str(bad)]) == 2
    error = capsys.readouterr().err
    assert "bad.ckpt" in error
    assert error.count("\n") == 1


def test_weights_that_do_not_fit_are_one_line(there, capsys) -> None:
    assert cli.main(["test", "--ckpt_path", str(there), "--model.width", "20"]) == 2
    error = capsys.readouterr().err
    assert "do not fit the model" in error
    assert error.count("\n") == 1


def test_resuming_what_is_finished_is_refused(there, capsys) -> None:
    assert cli.main(["fit", "--ckpt_path", str(there), "--trainer.max_steps", "6"]) == 2
    assert "at step 6 already" in capsys.readouterr().err


def test_interrupt_leaves_a_checkpoint_and_code_130(tmp_path) -> None:
    arguments = [sys.executable, "-m", "cflow.training.cli", "fit", *TINY, "--trainer.val_check_interval", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(cflow.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    last = tmp_path / "runs/digits/version_0/checkpoints/last.ckpt"
    # a shell lets what it starts with "&" ignore the signal, and that would be inherited: a handler is not
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pipe = subprocess.PIPE
        process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, own)
    with process:
        try:
            deadline = time.monotonic() + 60
            while not last.exists() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            before = last.stat().st_mtime_ns
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert last.stat().st_mtime_ns > before
    assert cflow.load(last).flow.num_flows == 3
    assert stored_step(last) > 0


def test_presets_have_the_papers_frames_and_the_fixed_names() -> None:
    frames = {"digits": 9, "mnist": 9, "shapes3d": 8, "falcor3d": 5, "isaac3d": 4}
    names = {f"{name}{more}" for name in frames for more in ("", "_weak", "_paper")} - {"digits_paper"}
    assert presets.preset_names() == sorted(
        [*names, "digits_sparse", "mnist_sparse", "folder", "mnist_best", "population"]
    )
    for name in sorted([*names, "folder", "mnist_best"]):
        preset: dict[str, dict[str, object]] = {}
        for path in presets.layers(name):
            for section, values in yaml.safe_load(path.read_text()).items():
                preset[section] = preset.get(section, {}) | values if isinstance(values, dict) else values
        assert preset["trainer"]["max_steps"] > 0
        assert preset["data"]["num_frames"] == frames.get(name.split("_")[0])  # of a folder as many as there are
        assert {"lr"} <= set(preset["model"])
        assert {"batch_size", "dataset"} <= set(preset["data"])
        assert "seed_everything" in preset
