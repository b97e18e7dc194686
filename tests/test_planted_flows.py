"""Flows that nobody names: the planted truth, and the posterior of weights in closed form."""

import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal

import cflow
from cflow import SpikeSlab

FOLDER = Path(cflow.__file__).parents[1] / "benchmarks"


@pytest.fixture
def planted(one_thread, monkeypatch):
    """The script, which imports others by name, as when Python runs it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("planted_flows")
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def of(planted, way, problem="direct", count=40):
    generator = torch.Generator().manual_seed(0)
    world = planted.World.make(problem, generator)
    states, w, x = world.sequences(count, generator)
    return world, states, w, x, planted.build(way, problem, x)


def test_the_truth_is_a_rotation_a_contraction_and_a_nonlinear_field(planted):
    world, states, w, x, _ = of(planted, "sparse", "mapped")
    z = torch.randn(20, 8)
    turned = world.move(z, torch.tensor([[1.5, 0.0, 0.0]]).expand(20, 3))
    torch.testing.assert_close(turned, z @ torch.linalg.matrix_exp(1.5 * world.rotation).mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned.norm(dim=1), z.norm(dim=1), rtol=1e-4, atol=1e-4)
    nearer = world.move(z, torch.tensor([[0.0, 2.0, 0.0]]).expand(20, 3)) - world.centre
    torch.testing.assert_close(nearer, (z - world.centre) * math.exp(-0.5), rtol=1e-4, atol=1e-4)
    waves = world.velocities(z)[..., 2]
    assert (world.velocities(2 * z)[..., 2] - 2 * waves).norm() > waves.norm()
    on = (w != 0).sum(-1)
    assert set(on.unique().tolist()) == {1, 2}
    assert ((w != 0).double().mean((0, 1)) - 0.5).abs().max() < 0.15
    torch.testing.assert_close((x - states @ world.seen_as.mT).std(), torch.tensor(0.05), rtol=0.05, atol=0)


def test_weights_in_closed_form_are_those_of_the_enumerated_evidence(planted, float64):
    vae = of(planted, "up to three")[-1]
    q = vae.flow_posterior
    q.logits, number = torch.tensor([-1.0, -0.5, 0.3, -2.0, -1.6, -1.6]), planted.FLOWS
    with torch.no_grad():
        vae.decoder.log_scale.fill_(math.log(0.3))
    design, change = 0.5 * torch.randn(5, 8, number), torch.randn(5, 8)
    found = q.regress(design, change)
    evidence, first, second, members = [], [], [], []
    for size in range(4):
        for s in map(list, itertools.combinations(range(number), size)):
            part = design[..., s]
            noise = 0.09 * torch.eye(8)
            member = torch.zeros(number).index_fill(0, torch.tensor(s, dtype=torch.long), 1.0)
            seen = MultivariateNormal(torch.zeros(5, 8), part @ part.mT + noise).log_prob(change)
            evidence.append(seen + member @ q.logits)
            gain = part.mT @ torch.linalg.inv(part @ part.mT + noise)  # w ~ N(0, I), by Gauss's conditioning
            loc, covariance = torch.zeros(5, number), torch.zeros(5, number)
            loc[:, s] = (gain @ change[..., None])[..., 0]
            covariance[:, s] = (torch.eye(size) - gain @ part).diagonal(dim1=-2, dim2=-1)
            first.append(loc)
            second.append(covariance + loc**2)
            members.append(member)
    chance = torch.stack(evidence, 1).softmax(1)
    probs = chance @ torch.stack(members)
    torch.testing.assert_close(found.probs, probs)
    mean, square = ((chance[..., None] * torch.stack(x, 1)).sum(1) / probs for x in (first, second))
    torch.testing.assert_close(found.loc, mean)
    torch.testing.assert_close(found.scale, (square - mean**2).sqrt(), rtol=1e-5, atol=1e-6)


def test_velocities_on_the_way_give_the_weights_of_large_steps(planted):
    # the model's flows are the true ones: weights come back but for the noise, where one velocity would miss them
    world, states, w, _, vae = of(planted, "sparse")
    q = vae.flow_posterior
    q._velocities = lambda z: torch.nn.functional.pad(world.velocities(z), (0, 3))
    with torch.no_grad():
        vae.decoder.log_scale.fill_(math.log(0.05))
    found = q(states)
    assert found.batch_shape == (40, 8, 6)
    error = (found.mean[..., :3] - w).abs()
    assert error.mean() < 0.02
    assert error.quantile(0.99) < 0.15
    assert found.probs[..., 3:].max() < 0.17  # what cannot be seen keeps its prior
    assert cflow.metrics.spike_f1((found.probs > 0.5).flatten(0, 1), (w != 0).flatten(0, 1), torch.arange(3)) > 0.97


@pytest.mark.parametrize("problem", ["direct", "mapped"])
@pytest.mark.parametrize("way", ["sparse", "dense", "one flow", "network"])
def test_every_way_has_a_bound_with_gradients_to_its_fields(planted, way, problem):
    *_, x, vae = of(planted, way, problem, count=10)
    assert isinstance(vae.flow_posterior(x), SpikeSlab)
    elbo = vae.elbo(x[:, :2])
    elbo.loss.backward()
    assert elbo.value.isfinite()
    fields = [p.grad for p in vae.flow.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in fields)
    if way == "dense":
        assert vae.flow_posterior(x).probs.min() == 1


def test_rows_go_on_and_the_tables_are_printed(planted, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "planted.json"
    line = ["--quick", "--problems", "direct", "--seeds", "0", "--json", str(kept)]
    planted.main(line)
    printed = capsys.readouterr().out
    assert [row.split()[0] for row in printed.splitlines() if row.startswith("direct, ")] == ["direct,"] * 4
    assert "direct, one flow" in printed
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    assert set(rows) == {f"planted/{way}/direct/0" for way in planted.WAYS}
    assert all(0 <= row["f1"] <= 1 and row["cosine"] <= row["cosine/0"] <= 1 for row in rows.values())
    monkeypatch.setattr(planted, "learned", lambda *_: pytest.fail("a row is computed twice"))
    planted.main(line)
    with pytest.raises(SystemExit, match="other settings"):
        planted.main(line[1:])


@pytest.mark.slow
def test_three_planted_fields_are_found_and_a_learned_posterior_collapses(planted):
    found = {way: planted.learned(way, "direct", 0, 2000, 500) for way in ("sparse", "network")}
    assert found["sparse"]["f1"] > 0.93
    assert found["sparse"]["cosine"] > 0.9
    assert found["sparse"]["off"] < 0.03
    assert found["network"]["f1"] < 0.6
