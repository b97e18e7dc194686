"""Weak supervision in training: what a step sees, how inference cools down, what a test says, and the command line."""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import cflow
from cflow import metrics, nets
from cflow.data import Digits, make_sequence
from cflow.data.digits import load_digits

pl = pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.training import cli, presets, results  # noqa: E402
from cflow.training.batches import Drawn, draw_frames  # noqa: E402
from cflow.training.datamodule import SequenceDataModule  # noqa: E402
from cflow.training.module import FlowVAEModule  # noqa: E402
from cflow.training.schedules import temperature_at  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
]

NAMES = ["scaling", "rotation", "hue"]
SMALL = {"latent_dim": 4, "width": 16, "likelihood_samples": 0, "supervision": "weak", "frames_per_step": 2}
TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.likelihood_samples", "2"),
    *("--data.val_samples", "20", "--data.test_samples", "30", "--data.batch_size", "32"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
]


def trainer(tmp_path, **settings):
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    defaults = dict.fromkeys(silent, False) | {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path}
    return pl.Trainer(**(defaults | settings))


def turned(x, mask=None):
    """A q(k|x) that finds flow 1 in scaling, 2 in rotation and 0 in hue, but for the last sequence of every batch."""
    k = torch.arange(3).repeat_interleave(len(x) // 3)
    flows = (k + 1) % 3
    flows[-1] = 1
    return torch.nn.functional.one_hot(flows, 3).float()


# --- what a step sees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_whole_sequences_have_the_weights_of_their_random_frames(count) -> None:
    times = torch.arange(9.0)
    t, mask = draw_frames(times, 500, count, torch.Generator().manual_seed(1))
    whole, weights = draw_frames(times, 500, count, torch.Generator().manual_seed(1), whole=True)
    assert torch.equal(whole, times)
    if count == 9:
        assert mask is None
        assert weights is None
        return
    assert weights.shape == (500, 9)
    wanted = ((t[:, 1:, None] == times) * mask[:, 1:, None]).sum(1)  # the same frames, each in its place
    torch.testing.assert_close(weights, wanted)


def test_labels_belong_to_things_and_follow_from_the_seed() -> None:
    source = Digits().split("train")

    def labelled(seed, rank=0):
        drawn, found = Drawn(source, 2, seed, rank, whole=True, labelled=0.1), {}
        for number in range(3):
            batch = drawn.__getitems__([(number, thing) for thing in range(len(source))])
            known = batch.labels >= 0
            assert torch.equal(batch.labels[known], batch.k[known])
            assert set(batch.labels[~known].tolist()) == {-1}
            assert batch.labels[known].unique().numel() == 3
            found[number] = known.nonzero()[:, 0].tolist()
        assert found[0] == found[1] == found[2]
        return found[0]

    first = labelled(5)
    assert len(first) == round(0.1 * len(source))
    assert first == labelled(5, rank=1)
    assert first != labelled(6)
    assert first != list(range(len(first)))
    assert Drawn(source, 2, 5, whole=True).__getitems__([(0, 0)]).labels is None
    assert Drawn(source, 2, 5, labelled=1e-6).has_label.sum() == 1


@pytest.mark.parametrize("labelled", [0.0, 0.5])
def test_a_step_infers_k_from_whole_sequences(tmp_path, monkeypatch, labelled) -> None:
    module, data, seen = FlowVAEModule(**SMALL, num_frames=5), SequenceDataModule(num_frames=5, labelled=labelled), []
    elbo = module.vae.elbo

    def recorded(x, k=None, t=None, mask=None, *, labels=None):
        seen.append((x, k, t, mask, labels))
        return elbo(x, k, t, mask, labels=labels)

    monkeypatch.setattr(module.vae, "elbo", recorded)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    x, k, t, mask, labels = seen[0]
    assert x.shape[:2] == (96, 5)
    assert k is None
    assert torch.equal(t, data.source.times)
    assert torch.equal(mask[:, :3].sum(1), torch.full((96,), 3.0))  # one frame of either stretch, for all of it
    assert torch.equal(mask.sum(1), torch.full((96,), 5.0))
    assert torch.equal(mask.count_nonzero(1), torch.full((96,), 2))
    if not labelled:
        assert labels is None
    else:
        known = labels >= 0
        assert 0 < known.sum() < 96
        same = make_sequence(x[known, 0], labels[known], t)
        torch.testing.assert_close(x[known], same, atol=1e-4, rtol=0)


@pytest.mark.parametrize("inference", ["marginal", "gumbel"])
def test_inference_cools_down_by_the_number_of_the_step(tmp_path, monkeypatch, inference) -> None:
    start, end = {"marginal": (1000.0, 1.0), "gumbel": (1.0, 0.3)}[inference]
    seen, step = [], FlowVAEModule.training_step

    def recorded(self, *args):
        seen.append(self.vae.temperature)
        return step(self, *args)

    monkeypatch.setattr(FlowVAEModule, "training_step", recorded)
    for given, first in ((None, start), (4.0, 4.0)):
        module = FlowVAEModule(**SMALL, inference=inference, temperature=given)
        trainer(tmp_path, max_steps=8, limit_val_batches=0).fit(module, SequenceDataModule(batch_size=8))
        falls = [first * (end / first) ** (done / 4) for done in range(4)]
        assert seen == pytest.approx([*falls, *[end] * 4])
        seen.clear()
    assert temperature_at(3, 10, 0.1, 0.1) == 0.1


@pytest.mark.parametrize("network", nets.NETWORKS)
@pytest.mark.parametrize("inference", [None, "gumbel"])
def test_gradients_reach_every_parameter(network, inference) -> None:
    size = {"image_shape": (2, 8, 12), "latent_dim": 6, "width": 48, "num_frames": 4}
    vae = nets.build_vae(network=network, potential="quadratic", supervision="weak", inference=inference, **size)
    kind = nets.ConvSequenceEncoder if network == "paper" else nets.MLPSequenceEncoder
    assert isinstance(vae.flow_posterior, kind)
    assert vae.inference == (inference or "marginal")
    x, weights = torch.rand(6, 4, 2, 8, 12), torch.tensor([0.0, 2.0, 2.0, 0.0]).expand(6, -1)
    elbo = vae.elbo(x, mask=weights, labels=torch.tensor([0, -1, -1, 1, -1, -1]))
    elbo.loss.backward()
    for name, p in vae.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(vae.elbo(x, mask=weights).loss)


# --- what a test says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "test"])
def test_errors_are_along_the_inferred_flow(split, tmp_path, monkeypatch) -> None:
    module = FlowVAEModule(**SMALL | {"likelihood_samples": 2}, num_frames=3, potential="quadratic")
    for p in module.vae.flow.parameters():
        p.data *= 20  # flows that can be told apart
    data = SequenceDataModule(val_samples=20, test_samples=20, batch_size=8, num_frames=3)  # batches of 8, 8 and 4
    likelihood, chosen = metrics.log_likelihood, []

    def recorded(vae, x, k, t, **more):
        chosen.append(k)
        return likelihood(vae, x, k, t, **more)

    monkeypatch.setattr(metrics, "log_likelihood", recorded)
    monkeypatch.setattr(module.vae, "infer_flow", turned)
    measure = trainer(tmp_path).validate if split == "val" else trainer(tmp_path).test
    for _ in range(2):  # a test forgets the one before
        found = measure(module, data, verbose=False)[0]
    x0, model, wanted, other = load_digits(split)[:20] / 255, module.vae.eval(), {}, {}
    for k, name in enumerate(NAMES):
        flows = torch.full((20,), (k + 1) % 3)
        if name == "hue":
            flows[[7, 15, 19]] = 1
        x = make_sequence(x0, k, data.source.times)
        wanted[f"equivariance_error/{name}"] = metrics.equivariance_error(model, x, flows).sum(0).mean().item()
        other[f"equivariance_error/{name}"] = metrics.equivariance_error(model, x, k).sum(0).mean().item()
    assert sum(wanted.values()) != pytest.approx(sum(other.values()), rel=1e-4)
    if split == "val":
        assert found["val/equivariance_error"] == pytest.approx(sum(wanted.values()) / 3, rel=1e-5)
        return
    wanted |= {"flow_accuracy": 57 / 60, "flow_calibration_error": 3 / 60}
    wanted |= {"flow/scaling": 1.0, "flow/rotation": 2.0, "flow/hue": 0.0}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)
    assert set(chosen) == {None}
    sorted_ = module.sort_metrics(found)
    assert {key: sorted_[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)


def test_a_picture_follows_the_flow_that_was_found_and_says_which(tmp_path, monkeypatch) -> None:
    module, data, drawn = FlowVAEModule(**SMALL, num_frames=4), SequenceDataModule(num_frames=4), []
    monkeypatch.setattr(
        results, "traversal_animation", lambda path, **given: drawn.append([*given.values()][:3]) or path.touch()
    )
    monkeypatch.setattr(module.vae, "infer_flow", turned)
    results.draw(module, data, tmp_path, torch.device("cpu"), num_samples=3)
    true, made, names = drawn[0]
    assert names == ["scaling (flow 1)", "rotation (flow 2)", "hue (flow 0)"]
    for row, flow in enumerate((1, 2, 0)):
        wanted = module.vae.traverse(true[row, :, 0], flow, data.source.times).transpose(0, 1)
        torch.testing.assert_close(made[row], wanted, atol=1e-4, rtol=0)


def test_the_table_says_which_flow_became_what() -> None:
    numbers = {"equivariance_error/hue": 80.0, "copy_input/hue": 160.0, "flow/hue": 2.0}
    lines = results.table(numbers | {"flow_accuracy": 0.9876, "flow_calibration_error": 0.0123}).splitlines()
    assert lines[1].split() == ["hue", "(flow", "2)", "80.0", "160.0", "2.00"]
    assert lines[-1] == "accuracy of q(k|x) 0.988 · its calibration error 0.012"


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of 6 steps with some labels, and its output."""
    folder, out = tmp_path_factory.mktemp("weak"), io.StringIO()
    words = ["fit", "--config", "digits_weak", *TINY, "--trainer.max_steps", "6", "--data.labelled", "0.01"]
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        assert cli.main(words) == 0
    return folder / "runs/digits_weak/version_0", out.getvalue()


@pytest.mark.ci
def test_a_run_says_how_flows_are_inferred(fitted) -> None:
    run, said = fitted
    assert "0.1 M weights, marginal inference of k, 1.00% of things with a label; 6 steps" in said.splitlines()[0]
    numbers = json.loads((run / "metrics.json").read_text())
    keys = {"flow_accuracy", "flow_calibration_error", *(f"flow/{name}" for name in NAMES)}
    assert keys <= set(numbers)
    assert sorted(numbers[f"flow/{name}"] for name in NAMES) == [0.0, 1.0, 2.0]
    assert 1 / 3 <= numbers["flow_accuracy"] <= 1
    for name in NAMES:
        assert f"{name} (flow {numbers[f'flow/{name}']:.0f}) " in said
    assert f"accuracy of q(k|x) {numbers['flow_accuracy']:.3f}" in said
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["labelled"] == 0.01


def test_a_loaded_model_infers(fitted) -> None:
    vae, test = cflow.load(fitted[0]), Digits().split("test")
    x = test.sequences(torch.arange(4), torch.zeros(4).long(), test.times)
    assert isinstance(vae.flow_posterior, nets.MLPSequenceEncoder)
    assert (vae.inference, vae.responsibility_frames) == ("marginal", "decoded")
    torch.testing.assert_close(vae.infer_flow(x).sum(-1), torch.ones(4))


@pytest.mark.ci
def test_test_and_traverse_repeat_the_fit(fitted, tmp_path, capsys) -> None:
    run, _ = fitted
    assert cli.main(["test", "--ckpt_path", str(run), "--out_dir", str(tmp_path)]) == 0
    again, before = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run))
    assert again == before
    assert cli.main(["traverse", "--ckpt_path", str(run), "--out_dir", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures/traversals.png").read_bytes() == (run / "traversals.png").read_bytes()


@pytest.mark.ci
def test_a_run_that_goes_on_is_the_one_that_never_stopped(tmp_path, monkeypatch) -> None:
    """12 steps are 6 and 6 more, bit for bit, where the temperature does not follow the number of steps."""
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", "digits_weak", *TINY, "--data.labelled", "0.1", "--model.temperature", "1"]
    words += ["--model.schedule", "constant"]
    assert cli.main([*words, "--trainer.max_steps", "12", "--run_name", "whole"]) == 0
    assert cli.main([*words, "--trainer.max_steps", "6", "--run_name", "half"]) == 0
    more = ["fit", "--ckpt_path", "runs/half", "--trainer.max_steps", "12", "--run_name", "rest"]
    assert cli.main([*more, *TINY, "--seed_everything", "9"]) == 0
    whole, half, rest = (Path(f"runs/{name}/version_0") for name in ("whole", "half", "rest"))
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, half, rest)]
    weights = [torch.cat([p.flatten() for p in state.values()]) for state in states]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    numbers = [json.loads((run / "metrics.json").read_text()) for run in (whole, rest)]
    assert {k for k in numbers[0] if numbers[0][k] != numbers[1][k]} <= {"seconds"}


class Stopped(pl.Callback):
    """Interrupts a fit before some step and saves it."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("inference", ["marginal", "gumbel"])
def test_an_interrupted_fit_goes_on_at_its_temperature(inference, tmp_path) -> None:
    def fit(seed, ckpt_path=None, **more):
        pl.seed_everything(seed, verbose=False)
        module, data = FlowVAEModule(**SMALL, inference=inference), SequenceDataModule(batch_size=16, labelled=0.1)
        with contextlib.suppress(SystemExit):
            trainer(tmp_path, max_steps=16, limit_val_batches=0, **more).fit(module, data, ckpt_path=ckpt_path)
        return torch.nn.utils.parameters_to_vector(module.parameters())

    whole = fit(7)
    fit(7, callbacks=[Stopped(5, tmp_path / "stopped.ckpt")])
    assert torch.equal(whole, fit(99, ckpt_path=tmp_path / "stopped.ckpt"))


def test_weak_presets_are_the_others_but_for_the_supervision(capsys) -> None:
    def whole(name):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["fit", "--config", name, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    for base in ("digits", "mnist"):
        assert presets.BASES[f"{base}_weak"] == base
        strong, weak = whole(base), whole(f"{base}_weak")
        assert weak["model"].pop("supervision") == "weak"
        assert weak["model"].pop("responsibility_frames") == "decoded"
        del strong["model"]["supervision"], strong["model"]["responsibility_frames"]
        assert weak == strong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.inference", "gumbel"], "inference: 'gumbel' infers flows, but supervision='full' has them given"),
        (["--model.temperature", "3"], "model.temperature=3.0 is for model.supervision=weak"),
        (["--data.labelled", "0.1"], "data.labelled=0.1 is for model.supervision=weak"),
        (["--model.supervision", "weak", "--data.labelled", "2"], "data.labelled=2.0: expected a part from 0 to 1"),
        (["--model.supervision", "weak", "--model.temperature", "0"], "model.temperature=0.0 must be positive"),
        (["--model.supervision", "none"], "--model.supervision: expected 'full' or 'weak', got none"),
        (["--model.num_frames", "5"], '"model.num_frames" must be given via "data.num_frames"'),
    ],
)
def test_options_that_contradict_each_other_are_one_line(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["fit", *TINY, *words, "--trainer.max_steps", "1"])
    except SystemExit as ending:
        code = ending.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_model_of_other_sequences_is_refused(fitted, tmp_path, capsys) -> None:
    with pytest.raises(cflow.ArgumentError, match=r"model\.num_frames=9, but .* 5 frames.* set model\.num_frames=5"):
        trainer(tmp_path, max_steps=1).fit(FlowVAEModule(**SMALL), SequenceDataModule(num_frames=5))
    assert cli.main(["test", "--ckpt_path", str(fitted[0]), "--data.num_frames", "5"]) == 2
    assert "leave out the --model and --data options that differ" in capsys.readouterr().err
    with pytest.raises(cflow.ArgumentError, match="supervision: expected 'full' or 'weak', got 'none'"):
        nets.ModelConfig(supervision="none")


def test_a_temperature_needs_the_number_of_steps(tmp_path) -> None:
    limits = {"max_time": {"seconds": 1}, "max_epochs": -1, "limit_val_batches": 0}
    with pytest.raises(cflow.ArgumentError, match=r"the temperature follows: give trainer\.max_steps"):
        trainer(tmp_path, **limits).fit(FlowVAEModule(**SMALL, schedule="constant"), SequenceDataModule())


# --- learned ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_seed_collapses(seed, tmp_path) -> None:
    """Each flow becomes one transformation, on digits, without a label: fifteen seconds a seed on a free core."""
    pl.seed_everything(seed, verbose=False)
    config = yaml.safe_load(presets.config_file("digits").read_text())["model"]
    weak = yaml.safe_load(presets.config_file("digits_weak").read_text())["model"]
    module = FlowVAEModule(**config | weak | {"width": 128, "warmup_steps": 25, "likelihood_samples": 0})
    data = SequenceDataModule(batch_size=64, test_samples=120)
    fit = trainer(tmp_path, max_steps=200, limit_val_batches=0)
    fit.fit(module, data)
    numbers = fit.test(module, data, verbose=False)[0]
    assert numbers["flow_accuracy"] >= 0.95
    assert numbers["flow_calibration_error"] <= 0.05
    for name in NAMES:
        assert numbers[f"equivariance_error/{name}"] < 0.9 * numbers[f"no_flow/{name}"]
        assert math.isfinite(numbers["elbo"])
