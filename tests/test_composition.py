"""Flows put together, against flows and images that are known: what is learned is an algebra."""

import math

import pytest
import torch
from cases import rk4, tight
from systems import Drift
from torch import nn
from torch.distributions import Independent, Normal

import cflow
from cflow import FlowVAE, PotentialFlow, Schedule, composition
from cflow.composition import Composition, one_after_another, single
from cflow.data import PERIODS, compose, hue, rotation, scaling

pytestmark = pytest.mark.usefixtures("float64")

# dz/dt = A_k z: growth, a turn that closes after 12 frames, and a stretch, which commutes with growth alone
PERIOD = 12.0
GENERATORS = torch.tensor(
    [[[0.1, 0.0], [0.0, 0.1]], [[0.0, -1.0], [1.0, 0.0]], [[0.2, 0.0], [0.0, -0.2]]], dtype=torch.float64
)
GENERATORS[1] *= 2 * math.pi / PERIOD


class Flat(nn.Module):
    """The posterior of a state that is the image itself, row by row."""

    def forward(self, x):
        return Independent(Normal(x.flatten(1), 0.3), 1)


class Unflat(nn.Module):
    """Images (…, 1, 1, 2) that are the state."""

    def forward(self, z):
        return Independent(Normal(z[..., None, None, :], 0.5), 3)


def exact_model(solver=None):
    net, turn = cflow.QuadraticPotential(GENERATORS.clone()), cflow.SkewLinear(2, 3)
    flow = PotentialFlow(net, solenoidal=turn, solver=solver or tight())
    flow.net.matrix.data[1] = 0
    part = flow.solenoidal
    part.center.data.zero_()
    part.matrix.data.copy_(torch.where(torch.arange(3).view(3, 1, 1) == 1, GENERATORS / 2, 0.0))
    return FlowVAE(Flat(), Unflat(), flow).eval().requires_grad_(False)


def moved(x, *moves):
    """Images (B, 1, 1, 2) after moves, each of a generator (2, 2) for times () or (B,)."""
    y = x.flatten(1)
    for generator, t in moves:
        y = (torch.linalg.matrix_exp(generator * torch.as_tensor(t)[..., None, None]) @ y[..., None])[..., 0]
    return y.view_as(x)


# --- flows of images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize(
    "t",
    [[0.0, 0.5, 1.5, 6.5], [0.0, 9.0, 16.0], [8.0, 3.5, 0.0], [1.0, 1 + PERIOD, 1 + 2 * PERIOD]],
    ids=["half", "beyond", "back", "whole"],
)
def test_one_flow_at_any_time(k, t):
    vae, x = exact_model(), torch.randn(4, 1, 1, 2)
    wanted = torch.stack([moved(x, (GENERATORS[k], s - t[0])) for s in t])
    torch.testing.assert_close(vae.traverse(x, k, t), wanted, rtol=1e-6, atol=1e-6)


def test_a_turn_closes_and_what_grows_does_not():
    vae, x = exact_model(), torch.randn(4, 1, 1, 2)
    torch.testing.assert_close(vae.traverse(x, 1, [0.0, PERIOD])[-1], x, rtol=1e-7, atol=1e-7)
    half = vae.traverse(x, 1, [0.0, PERIOD / 2])[-1]
    torch.testing.assert_close(half, -x, rtol=1e-7, atol=1e-7)
    assert (vae.traverse(x, 0, [0.0, PERIOD])[-1] - x).abs().max() > 0.1


@pytest.mark.parametrize("w", [[1.0, 1.0, 0.0], [0.5, 0.5, 0.0], [-1.0, 2.0, 0.3]])
def test_a_superposition_is_the_flow_of_the_sum(w):
    vae, x, weights = exact_model(), torch.randn(4, 1, 1, 2), torch.tensor(w)
    generator = torch.einsum("k,kij->ij", weights, GENERATORS)
    made = vae.traverse(x, weights, [0.0, 2.5, 5.0])
    torch.testing.assert_close(made[1], moved(x, (generator, 2.5)), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(made[2], moved(x, (generator, 5.0)), rtol=1e-7, atol=1e-7)
    own = torch.stack([weights, -weights, 2 * weights, 0 * weights])  # of each sample
    rows = moved(x, (generator, torch.tensor([5.0, -5.0, 10.0, 0.0])))
    torch.testing.assert_close(vae.traverse(x, own, [0.0, 5.0])[-1], rows, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("clock", ["absolute", "segment"])
def test_a_switch_at_a_time_of_each_samples_own_there_and_back(clock):
    vae, x, switch = exact_model(), torch.randn(4, 1, 1, 2), torch.tensor([1.0, 2.3, 4.0, 7.9])
    ends = torch.tensor([0.0, 8.0])[:, None].expand(2, 4)
    k = Schedule(torch.stack([ends[0], switch, ends[1]]), [1, 2], clock=clock)
    end = moved(x, (GENERATORS[1], switch), (GENERATORS[2], 8 - switch))
    torch.testing.assert_close(vae.traverse(x, k, [0.0, 8.0])[-1], end, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(vae.traverse(end, k, [8.0, 0.0])[-1], x, rtol=1e-7, atol=1e-7)
    mirrored = moved(x, (GENERATORS[2], switch), (GENERATORS[1], 8 - switch))
    assert (mirrored - end).abs().amax(-1).min() > 1e-3  # the order counts


def test_the_bound_under_a_switch_of_each_samples_own_at_irregular_times_and_with_missing_frames():
    vae, x = exact_model(), torch.randn(3, 4, 1, 1, 2)
    t = torch.tensor([[0.0, 0.7, 3.1, 4.0], [1.0, 1.2, 1.3, 3.9], [0.0, 2.0, 3.0, 3.5]])
    switch = torch.tensor([1.5, 1.25, 3.2])
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    k = Schedule(torch.stack([torch.zeros(3), switch, torch.full((3,), 4.0)]), [0, 1])
    torch.manual_seed(5)
    found = vae.elbo(x.masked_fill(~mask[..., None, None, None], math.nan), k, t, mask)

    torch.manual_seed(5)
    z0 = x[:, 0, 0, 0] + 0.3 * torch.normal(torch.zeros(3, 2), torch.ones(3, 2))
    reconstruction = 0.0
    for i in range(3):
        for f in range(4):
            if mask[i, f]:
                before = t[i, f].minimum(switch[i]) - t[i, 0]
                after = (t[i, f] - switch[i]).clamp(min=0)
                z = torch.linalg.matrix_exp(GENERATORS[1] * after) @ torch.linalg.matrix_exp(GENERATORS[0] * before)
                reconstruction += Normal(z @ z0[i], 0.5).log_prob(x[i, f, 0, 0]).sum() / 3
    kl = 0.5 * (x[:, 0].flatten(1).square() + 0.3**2 - 1 - 2 * math.log(0.3)).sum(-1).mean()
    torch.testing.assert_close(found.value, reconstruction - kl)


# --- what is said of transformations ------------------------------------------------------------------------


def test_amounts_are_the_integrals_of_the_weights():
    pieces = Composition(((1.0, 0.0), (0.5, -1.0), (0.0, 2.0)), starts=(0.0, 2.0, 3.5))
    t = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.5, 6.0])
    wanted = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.5, -1.0], [2.75, -1.5], [2.75, 3.5]]
    assert pieces.amounts(t).tolist() == wanted
    assert pieces.order == [0, 1]
    assert single(1, 3).amounts(torch.tensor([-2.0, 0.5])).tolist() == [[0.0, -2.0, 0.0], [0.0, 0.5, 0.0]]
    assert one_after_another((2, 0), 3, (0.0, 4.0)).order == [2, 0]


def test_the_truth_is_each_transformation_once_in_the_order_in_which_it_begins():
    x = torch.rand(2, 3, 12, 12)
    t = torch.tensor([3.0, 6.0])
    found = one_after_another((1, 0), 3, (0.0, 4.0)).truth(x, t)
    torch.testing.assert_close(found[:, 0], rotation(x, 3.0))
    torch.testing.assert_close(found[:, 1], scaling(rotation(x, 4.0), 2.0))
    own = torch.tensor([[[0.0, 0.0, 2.0]], [[1.0, 0.0, 0.0]]])  # of each image
    torch.testing.assert_close(compose(x, own)[:, 0], torch.cat([hue(x[:1], 2.0), scaling(x[1:], 1.0)]))
    forth_and_back = Composition(((1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)), starts=(0.0, 4.0))
    assert torch.equal(forth_and_back.truth(x, torch.tensor([8.0]))[:, 0], x)
    before = x.clone()
    single(0, 3).truth(x, torch.tensor([4.0]))
    assert torch.equal(x, before)


@pytest.mark.parametrize("flows", [None, [2, 0, 1]])
def test_the_selection_does_to_states_what_is_said_of_transformations(flows):
    vae, x, t = exact_model(), torch.randn(4, 1, 1, 2), torch.tensor([0.0, 3.0, 4.0, 7.0])
    of = [0, 1, 2] if flows is None else flows
    known = {f"flow {k}": lambda x, t, k=k: moved(x, (GENERATORS[of[k]], t)) for k in range(3)}
    for said in (single(1, 3), one_after_another((1, 2, 0), 3, (0.0, 3.0, 5.0)), Composition(((0.0, -0.5, 0.0),))):
        made = vae.traverse(x, said.selection(t, flows), t).transpose(0, 1)
        torch.testing.assert_close(made, said.truth(x, t, known), rtol=1e-7, atol=1e-7)
    back = one_after_another((1, 2), 3, (0.0, 3.0))
    end = back.truth(x, t[-1:], known)[:, 0]
    torch.testing.assert_close(vae.traverse(end, back.selection(t, flows), t.flip(0))[-1], x, rtol=1e-7, atol=1e-7)


def test_a_potential_that_depends_on_time_sees_the_time_of_its_piece():
    flow = PotentialFlow(Drift(torch.zeros(2, 2), torch.eye(2)), solver=tight())  # ½ t² to the right, then upwards
    k = one_after_another((0, 1), 2, (0.0, 3.0)).selection(torch.tensor([0.0, 7.0]))
    torch.testing.assert_close(flow(torch.zeros(1, 2), k, (0.0, 7.0)), torch.tensor([[4.5, 8.0]]))


MISUSES = {
    r"flows: expected each of 0 to 2 once, got \[0, 0, 1\]": lambda t: single(0, 3).selection(t, [0, 0, 1]),
    "t: expected times from 2 on, got 0": lambda t: one_after_another((0, 1), 2, (2.0, 3.0)).selection(t),
    r"amounts: expected \(N, K\) or .* K = 3, got \(2, 2\)": lambda t: compose(
        torch.rand(1, 3, 4, 4), torch.zeros(2, 2)
    ),
    "amounts: expected finite": lambda t: compose(torch.rand(1, 3, 4, 4), torch.full((1, 3), math.nan)),
    "vae: expected a model that encodes one frame": lambda t: composition.errors(
        FlowVAE(Flat(), Unflat(), exact_model().flow, encode_frames=2), torch.rand(1, 1, 1, 2), {}
    ),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse(message):
    with pytest.raises(cflow.ArgumentError, match=f"^{message}"):
        MISUSES[message](torch.tensor([0.0, 4.0]))


# --- measured -----------------------------------------------------------------------------------------------


def exact_transformations(*chosen):
    return {str(k): lambda x, t, k=k: moved(x, (GENERATORS[k], t)) for k in chosen}


def test_a_perfect_model_makes_no_error(monkeypatch):
    vae, x, known = exact_model(rk4()), torch.randn(5, 1, 1, 2), exact_transformations(0, 1, 2)
    monkeypatch.setitem(PERIODS, known["1"], PERIOD)
    found = composition.errors(vae, x, known)
    names = ["switch", "half_frames", "inverse", "there_and_back", "twice_horizon", "closure"]
    for name in names:
        torch.testing.assert_close(found[name], torch.zeros(5), rtol=0, atol=1e-3)
        assert set(found) >= {f"{name}/{key}" for key in ("copy_input", "black", "no_flow")}
    assert found["switch/copy_input"].min() > 0.1
    # a turn and a stretch at the same time are no turn of a stretched image, and their orders differ
    assert found["superposition"].min() > 0.1
    assert found["commutator/truth"].min() > 0.1
    torch.testing.assert_close(found["commutator"], found["commutator/truth"], rtol=1e-4, atol=1e-4)
    order = [2, 0, 1]
    shuffled = {name: known[str(of)] for name, of in zip("abc", order, strict=True)}
    again = composition.errors(vae, x, shuffled, flows=order)
    torch.testing.assert_close(again["switch"], torch.zeros(5), rtol=0, atol=1e-3)
    assert composition.errors(vae, x, shuffled)["switch"].min() > 0.1


def test_errors_of_a_model_that_is_too_fast(monkeypatch):
    """Its first flow goes 1.5 to the right a frame in place of 1, its second as it should, 2 upwards."""
    flow = PotentialFlow(Drift(torch.tensor([[1.5, 0.0], [0.0, 2.0]]), torch.zeros(2, 2)), solver=rk4(step_size=4.0))
    vae = FlowVAE(Flat(), Unflat(), flow).eval()
    right = lambda x, t: x + t[:, None, None, None] * torch.tensor([1.0, 0.0])  # noqa: E731
    up = lambda x, t: x + t[:, None, None, None] * torch.tensor([0.0, 2.0])  # noqa: E731
    monkeypatch.setitem(PERIODS, right, 10.0)
    found = composition.errors(vae, torch.rand(3, 1, 1, 2), {"right": right, "up": up})
    wanted = {
        "superposition": 0.5 * 36,
        "switch": (0.5 * 10 + 2 * 4 + 0.5 * 10) / 2,  # mean over both orders
        "half_frames": 0.5 * 32 / 2,
        "inverse": 0.5 * 36 / 2,
        "there_and_back": 0.0,
        "twice_horizon": 0.5 * 100,
        "closure": 0.5 * 10,
        "commutator": 0.0,
        "superposition/copy_input": 3 * 36,
        "superposition/no_flow": 3 * 36,
        "switch/copy_input": (10 + 16 + 20 + 20 + 32 + 10) / 2,
        "half_frames/copy_input": 3 * 32 / 2,
        "there_and_back/copy_input": 0.0,
        "there_and_back/no_flow": 0.0,
        "twice_horizon/copy_input": 100,
    }
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], torch.full((3,), float(value)), rtol=1e-6, atol=1e-6, msg=name)
    short = composition.errors(vae, torch.rand(3, 1, 1, 2), {"right": right, "up": up}, num_frames=3)
    torch.testing.assert_close(short["superposition"], torch.full((3,), 1.5))


def test_names_without_their_transformations_are_left_out():
    flow = PotentialFlow(Drift(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)), solver=tight())
    vae, x = FlowVAE(Flat(), Unflat(), flow).eval(), torch.rand(3, 1, 1, 2)
    found = composition.errors(vae, x, {"still": lambda x, t: x})
    assert {name for name in found if "/" not in name} == {"half_frames", "inverse", "there_and_back"}
    torch.testing.assert_close(found["there_and_back/black"], x.abs().sum((1, 2, 3)))


@pytest.mark.parametrize("transformation", PERIODS, ids=lambda f: f.__name__)
def test_periods_are_those_of_the_images(transformation):
    x = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(transformation(x, PERIODS[transformation]), x, rtol=0, atol=1e-6)
    assert (transformation(x, PERIODS[transformation] / 2) - x).abs().max() > 0.1


def test_amounts_stay_on_the_device_of_the_times():
    both = Composition(((1.0, 0.0), (0.0, 1.0)), starts=(0.0, 4.0))
    assert both.amounts(torch.arange(3.0, device="meta")).device.type == "meta"
