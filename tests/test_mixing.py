"""Transformations that act at once and change: the data, what is found in them, and the command line."""

import contextlib
import io
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import cflow
from cflow import ArgumentError, ArgumentTypeError, Schedule, SpikeSlab, composition, metrics, nets
from cflow.data import PAPER, Digits, compose, constant_speeds, draw_speeds, make_sequence, mixed_sequence

TRUE = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]]).bool()


def test_two_transformations_in_a_sequence_one_or_both_at_a_time() -> None:
    speeds = draw_speeds(2000, 8, 3, torch.Generator().manual_seed(0))
    assert torch.equal(speeds, draw_speeds(2000, 8, 3, torch.Generator().manual_seed(0)))
    on = speeds > 0
    assert set(on.sum(-1).unique().tolist()) == {1, 2}
    assert int(on.any(1).sum(-1).max()) == 2
    torch.testing.assert_close(on.float().mean((0, 1)), torch.full((3,), 4 / 9), atol=0.02, rtol=0)
    torch.testing.assert_close((on.sum(-1) == 2).float().mean(), torch.tensor(1 / 3), atol=0.02, rtol=0)
    assert 0.5 <= speeds[on].min() < 0.51
    assert 1.49 < speeds[on].max() <= 1.5
    assert abs(float(speeds[on].mean()) - 1) < 0.02
    with pytest.raises(ArgumentError, match="two transformations or more"):
        draw_speeds(1, 8, 1)


def test_frames_are_those_of_what_speeds_add_up_to() -> None:
    x0 = torch.rand(2, 3, 12, 12)
    speeds = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 2.0, 0.5]], [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    x = mixed_sequence(x0, speeds, torch.tensor([0.0, 0.5, 2.0]))
    amounts = torch.tensor([[[0, 0, 0], [0.5, 0, 0.25], [1, 2, 1]], [[0, 0, 0], [0, 0, 0], [1, 1, 1]]])
    assert torch.equal(x, compose(x0, amounts))
    k = torch.tensor([2, 1])
    own = torch.tensor([[0.0, 1.0, 1.5], [0.0, 0.3, 2.0]])
    torch.testing.assert_close(mixed_sequence(x0, constant_speeds(k, 2, 3), own), make_sequence(x0, k, own))
    with pytest.raises(ArgumentError, match=r"speeds: expected \(B, S, K\) with B = 2"):
        mixed_sequence(x0, speeds[:1], own)


def test_flows_are_matched_by_when_they_are_on() -> None:
    """Two flows of four do it, in the other order, and one of them is wrong once."""
    on = torch.zeros(4, 4, dtype=torch.bool)
    on[:, 3], on[:, 1] = TRUE[:, 0], TRUE[:, 1]
    on[:, 0] = True
    on[3, 3] = True
    accuracy, flows = metrics.matching_accuracy(on.view(2, 2, 4), TRUE.view(2, 2, 2))
    assert (accuracy, flows.tolist()) == (7 / 8, [3, 1])


@pytest.mark.parametrize(
    ("on", "true", "error", "message"),
    [
        (TRUE.float(), TRUE, ArgumentTypeError, "on: expected booleans, such as q.probs > 0.5, got torch.float32"),
        (TRUE[:, :1], TRUE, ArgumentError, "with M ≤ K"),
        (TRUE[:2], TRUE, ArgumentError, "of at least one interval, got"),
    ],
)
def test_what_cannot_be_matched_is_said(on, true, error, message) -> None:
    with pytest.raises(error, match=message):
        metrics.matching_accuracy(on, true)


def test_compositions_follow_flows_at_their_own_speeds() -> None:
    flows = torch.tensor([[0.0, -0.5, 0.0], [2.0, 0.0, 0.0]])  # the first transformation is flow 1, backwards
    both = composition.together((0, 1), 2)
    assert both.selection(torch.tensor([0.0, 4.0]), flows).tolist() == [2.0, -0.5, 0.0]
    after = composition.one_after_another((0, 1), 2, (0.0, 3.0)).selection(torch.tensor([0.0, 4.0]), flows)
    assert isinstance(after, Schedule)
    assert after.selections.tolist() == [[0.0, -0.5, 0.0], [2.0, 0.0, 0.0]]
    with pytest.raises(ArgumentError, match=r"flows: expected weights \(2, flows\)"):
        both.selection(torch.tensor([0.0, 4.0]), flows.mT)


# --- what keeps flows from collapsing -----------------------------------------------------------------------


class Exact(nn.Module):
    def forward(self, x):
        return Independent(Normal(x, torch.full_like(x, 0.01)), 1)


class Plain(nn.Module):
    def forward(self, z):
        return Independent(Normal(z, torch.full_like(z, 0.05)), 1)


class Steps(nn.Module):
    """q(w|x) of what changes from frame to frame."""

    def __init__(self, dim, num_flows):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim, 32), nn.SiLU(), nn.Linear(32, 3 * num_flows))

    def forward(self, x):
        logits, loc, scale = self.body(4 * x.diff(dim=1)).chunk(3, -1)
        return SpikeSlab(1.5 + logits, loc, 0.4 * nn.functional.softplus(scale) + 1e-3)


def discover(temperature, steps=500):
    """Train five flows on three planted shifts; how well they are told apart, and the part of intervals each is on."""
    torch.manual_seed(0)
    shifts = torch.linalg.qr(torch.randn(4, 4)).Q[:3]

    def draw(n):
        speeds = draw_speeds(n, 4, 3)
        x0 = torch.randn(n, 1, 4)
        return torch.cat([x0, x0 + (speeds @ shifts).cumsum(1)], 1), speeds

    potential = cflow.QuadraticPotential(torch.zeros(5, 4, 4), 0.3 * torch.randn(5, 4))
    potential.matrix.requires_grad_(False)
    flow = cflow.PotentialFlow(potential, solver=cflow.Solver("euler", step_size=1.0))
    vae = cflow.FlowVAE(Exact(), Plain(), flow, flow_posterior=Steps(4, 5), inference="sparse")
    adam = torch.optim.Adam(vae.parameters(), 1e-2)
    for step in range(steps):
        vae.temperature = temperature(step, steps)
        adam.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / steps))
        adam.zero_grad()
        vae.elbo(draw(64)[0]).loss.backward()
        adam.step()
    x, speeds = draw(500)
    on = vae.flow_posterior(x).probs > 0.5
    accuracy, flows = metrics.matching_accuracy(on, speeds > 0)
    cosines = nn.functional.cosine_similarity(potential.shift[flows], shifts, dim=-1)
    return accuracy, on.float().mean((0, 1)), flows, cosines.abs().detach()


@pytest.mark.ci
@pytest.mark.usefixtures("one_thread")
def test_flows_are_told_apart_under_the_temperature_and_not_without_it() -> None:
    """At 1 from the start any mixture of flows that tells speeds apart stays; annealed, three of five are right."""
    schedules = pytest.importorskip("cflow.training.schedules")
    accuracy, activity, flows, cosines = discover(lambda step, n: schedules.sparse_temperature_at(step, n, 30.0))
    assert accuracy > 0.97
    assert cosines.min() > 0.97
    others = [k for k in range(5) if k not in flows]
    assert activity[others].max() < 0.02
    accuracy, activity, _, cosines = discover(lambda step, n: 1.0)
    assert accuracy < 0.8
    assert cosines.min() < 0.9


# --- training -----------------------------------------------------------------------------------------------

pl = pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.training import cli, measures, presets, results  # noqa: E402
from cflow.training.batches import Drawn, Whole  # noqa: E402
from cflow.training.datamodule import SequenceDataModule  # noqa: E402
from cflow.training.schedules import sparse_temperature_at  # noqa: E402

TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.likelihood_samples", "2"),
    *("--data.val_samples", "10", "--data.test_samples", "12", "--data.batch_size", "8", "--data.num_frames", "5"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
]
SPARSE = ["--model.supervision", "weak", "--model.inference", "sparse"]
quiet = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
]


def marked(test):
    for mark in quiet:
        test = mark(test)
    return test


def test_a_batch_is_mixed_in_training_and_in_a_test_also_each_transformation_alone() -> None:
    source = Digits(num_frames=5).split("test")
    drawn = Drawn(source, 2, seed=0, whole=True, mixed=True)
    first, second = (drawn.__getitems__([(number, thing) for thing in range(6)]) for number in (0, 1))
    assert first.k.shape == (6, 4, 3)
    assert not torch.equal(first.k, second.k)
    whole = Whole(source, 10, mixed=True)
    batch, again = whole.__getitems__([3, 5]), whole.__getitems__([5])
    assert batch.k.shape == (8, 4, 3)
    assert torch.equal(batch.k[:6], constant_speeds(torch.tensor([0, 0, 1, 1, 2, 2]), 4, 3))
    assert torch.equal(batch.k[7], again.k[3])  # whatever else is in the batch
    assert torch.equal(batch.stored[6:], source.read(torch.tensor([3, 5]), batch.k[6:], batch.t))
    assert not torch.equal(batch.k[6], batch.k[7])


def test_discovered_flows_have_signs_and_speeds() -> None:
    speeds = draw_speeds(200, 4, 3, torch.Generator().manual_seed(0))
    mixing = torch.tensor([[0.0, 0.0, -0.5, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    weights = speeds @ mixing
    found, matrix = measures.discovered_flows(weights != 0, weights, speeds, list(PAPER))
    torch.testing.assert_close(matrix, mixing)
    assert found["matching_accuracy"] == 1
    assert found["superfluous"] == 0
    assert (found["flow/scaling"], found["flow_speed/scaling"]) == (2.0, pytest.approx(-0.5))
    assert results.flow_numbers(matrix) == [2, 0, 1]
    assert results.labels_of(list(PAPER), matrix) == ["scaling (flow 2)", "rotation (flow 0)", "hue (flow 1)"]


def test_the_temperature_of_sparse_weights_is_low_then_high_then_one() -> None:
    found = [sparse_temperature_at(step, 1000, 30.0) for step in range(1001)]
    assert found[0] < 0.1
    assert max(found) == found[400] == pytest.approx(30)
    assert found[850:] == [1.0] * 151
    assert all(a >= b for a, b in itertools.pairwise(found[600:]))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of 4 steps, and its output."""
    folder, out = tmp_path_factory.mktemp("sparse"), io.StringIO()
    words = ["fit", "--config", "digits_sparse", *TINY, "--trainer.max_steps", "4", "--model.num_flows", "4"]
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        assert cli.main(words) == 0
    return folder / "runs/digits_sparse/version_0", out.getvalue()


@marked
def test_a_run_says_what_was_found(fitted) -> None:
    run, said = fitted
    assert "sparse inference of k" in said.splitlines()[0]
    numbers = json.loads((run / "metrics.json").read_text())
    assert 0 <= numbers["superfluous"] <= 1
    assert {f"flow_activity/{k}" for k in range(4)} <= set(numbers)
    assert len({numbers[f"flow/{name}"] for name in PAPER}) == 3
    assert numbers["elbo"] < numbers["log_likelihood"] + 3 * numbers["log_likelihood_stderr"]
    assert numbers["log_likelihood"] < numbers["log_likelihood_bound"]
    assert f"hue (flow {numbers['flow/hue']:.0f}) " in said
    assert "\nmixed " in said
    assert f"flows on where they should be {numbers['matching_accuracy']:.3f}" in said
    for name in ("flows.png", "traversals.png", "report.html"):
        assert (run / name).stat().st_size > 5000


@marked
def test_a_test_replaces_links_where_its_files_go(fitted, tmp_path) -> None:
    names = [path.name for path in fitted[0].iterdir() if path.suffix in (".png", ".gif", ".webp", ".html", ".json")]
    assert {"flows.png", "traversals.gif", "report.html", "metrics.json"} <= set(names)
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in names:
        (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    assert cli.main(["test", "--ckpt_path", str(fitted[0]), "--out_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "mine").read_text() == "mine"
    assert not any((tmp_path / "out" / name).is_symlink() for name in names)


@marked
def test_a_loaded_model_infers_weights_and_goes_through_a_folder(fitted, tmp_path) -> None:
    vae, test = cflow.load(fitted[0]), Digits(num_frames=5).split("test")
    x = test.sequences(torch.arange(4), torch.zeros(4).long(), test.times)
    assert isinstance(vae.flow_posterior, nets.PairEncoder)
    assert vae.infer_flow(x).shape == (4, 4, 4)
    vae.save_pretrained(tmp_path)
    assert torch.equal(cflow.FlowVAE.from_pretrained(tmp_path).infer_flow(x), vae.infer_flow(x))


def test_a_prior_of_spikes_and_slabs_goes_through_a_folder(tmp_path) -> None:
    prior = SpikeSlab(torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    base = nets.build_vae(image_shape=(1, 8, 8), latent_dim=4, width=16, num_flows=2)
    q = nets.PairEncoder((1, 8, 8), num_flows=2, width=8)
    vae = cflow.FlowVAE(base.encoder, base.decoder, base.flow, flow_posterior=q, inference="sparse", flow_prior=prior)
    vae.save_pretrained(tmp_path)
    again = cflow.FlowVAE.from_pretrained(tmp_path).weight_prior(torch.zeros(()))
    for name in ("logits", "loc", "scale"):
        assert torch.equal(getattr(again, name), getattr(prior, name))


@marked
def test_known_schedules_are_supervised(tmp_path, monkeypatch) -> None:
    """The same data with weights given: what the bound of inferred ones stands beside."""
    monkeypatch.chdir(tmp_path)
    words = ["--data.mixed", "true", "--trainer.max_steps", "2", "--model.likelihood_samples", "0"]
    assert cli.main(["fit", "--config", "digits", *TINY, *words]) == 0
    numbers = json.loads((tmp_path / "runs/digits/version_0/metrics.json").read_text())
    assert math.isfinite(numbers["equivariance_error/mixed"])
    assert "flow/hue" not in numbers


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_sparse_presets_mix_and_have_flows_to_spare(name) -> None:
    assert [path.stem for path in presets.layers(f"{name}_sparse")] == [name, f"{name}_sparse"]


def test_data_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"data\.mixed"):
        SequenceDataModule(mixed=True, labelled=0.5)
    with pytest.raises(ArgumentError, match=r"data\.mixed"):
        SequenceDataModule(mixed=True, transformations="rotation")


@marked
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.mixed", "true", "--model.supervision", "weak"], "data.mixed: 'marginal' infers one flow a sequence"),
        (SPARSE, "model.inference='sparse': needs data.mixed"),
        (
            [*SPARSE, "--data.mixed", "true", "--model.num_flows", "2"],
            "at least one flow a transformation (3), got model.num_flows=2",
        ),
    ],
)
def test_options_that_contradict_each_other_are_one_line(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", *TINY, *words, "--trainer.max_steps", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
