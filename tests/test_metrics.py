"""Errors of hand-made models and images."""

import pytest
import torch
from cases import MORE_THAN_A_GRADIENT, POTENTIALS
from systems import Drift
from torch import nn
from torch.distributions import Independent, Normal

import cflow
from cflow import FlowVAE, PotentialFlow, Solver, metrics


class Shift(nn.Module):
    """The image is the latent state: encode and decode are the identity."""

    def forward(self, x):
        return Independent(Normal(x, 1e-3), 1)


def shifting():
    net = Drift(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 2))
    return FlowVAE(Shift(), Shift(), PotentialFlow(net, solver=Solver("rk4", step_size=1.0))).eval()


def test_a_perfect_model_has_no_error_and_baselines_are_exact():
    vae, x0, k = shifting(), torch.randn(3, 2), torch.tensor([0, 1, 1])
    t = torch.arange(4.0)
    x = vae.traverse(x0, k, t).transpose(0, 1)
    error = metrics.equivariance_error(vae, x, k)
    assert error.shape == (3, 3)
    torch.testing.assert_close(error, torch.zeros(3, 3), atol=1e-5, rtol=0)
    speed = torch.tensor([1.0, 2.0, 2.0])
    trivial = metrics.baselines(vae, x, k, t)
    torch.testing.assert_close(trivial["copy_input"], t[1:, None] * speed)
    torch.testing.assert_close(trivial["no_flow"], t[1:, None] * speed)
    torch.testing.assert_close(trivial["black"], x[:, 1:].abs().sum(-1).mT)
    torch.testing.assert_close(metrics.equivariance_error(vae, x, 1 - k)[0], 3 * torch.ones(3))
    per_sample = t.expand(3, -1)
    torch.testing.assert_close(metrics.equivariance_error(vae, x, k, per_sample), error)
    torch.testing.assert_close(metrics.reconstruction_l1(vae, x0), torch.zeros(3))


def test_baselines_of_hand_made_images():
    x = torch.zeros(2, 3, 1, 2, 2)
    x[0, 1, 0, 0] = torch.tensor([0.25, 0.5])
    x[0, 2], x[1] = 1.0, 0.5
    assert metrics.copy_input(x).tolist() == [[0.75, 0.0], [4.0, 0.0]]
    assert metrics.black(x).tolist() == [[0.75, 2.0], [4.0, 2.0]]


def test_times_of_each_samples_own():
    vae, x0, k = shifting(), torch.randn(2, 2), torch.tensor([0, 1])
    t = torch.tensor([[0.0, 0.5, 2.0], [1.0, 3.0, 3.5]])
    x = vae.traverse(x0, k, t.mT).transpose(0, 1)
    torch.testing.assert_close(metrics.equivariance_error(vae, x, k, t), torch.zeros(2, 2), atol=1e-5, rtol=0)
    # at the times 0, 1, 2 the model is elsewhere, by its speed
    wanted = torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    torch.testing.assert_close(metrics.equivariance_error(vae, x, k), wanted)


class Broad(nn.Module):
    """Images that would broadcast against the frames in silence."""

    def forward(self, z):
        return Independent(Normal(z[..., :1], 1.0), 1)


MISUSES = {
    "x: expected floating point images .* got torch.uint8": lambda v, x: metrics.copy_input(x.byte()),
    "x: expected floating point .* got torch.int64": lambda v, x: metrics.black(x.long()),
    r"x: expected sequences \(B, T\+1, …\), got list": lambda v, x: metrics.black([x]),
    r"x: expected sequences .* \(3, 0, 2\)": lambda v, x: metrics.copy_input(x[:, :0]),
    r"x: has frames of shape \(2,\), the model's \(1,\)": lambda v, x: metrics.equivariance_error(broad(v), x, 0),
    r"x: has frames of shape \(2,\)": lambda v, x: metrics.reconstruction_l1(broad(v), x[:, 0]),
    r"x: has frames of shape": lambda v, x: metrics.no_flow(broad(v), x),
    "decoder: its distribution has shape": lambda v, x: metrics.log_likelihood(broad(v), x, 0, num_samples=2),
    "t: expected one time a frame, 4, got 2": lambda v, x: metrics.equivariance_error(v, x, 0, [0.0, 1.0]),
    "num_samples: expected an int": lambda v, x: metrics.log_likelihood(v, x, 0, num_samples=2.5),
    "x: expected a tensor of frames": lambda v, x: metrics.log_likelihood(v, [x], 0, num_samples=2),
}


def broad(vae):
    return FlowVAE(vae.encoder, Broad(), vae.flow)


@pytest.mark.parametrize("message", MISUSES)
def test_misuse(message):
    with pytest.raises(cflow.CflowError, match=f"^{message}"):
        MISUSES[message](shifting(), torch.ones(3, 4, 2))


def test_empty_batches_and_what_is_no_sequence():
    vae = shifting()
    assert metrics.equivariance_error(vae, torch.zeros(0, 4, 2), 0).shape == (3, 0)
    assert metrics.log_likelihood(vae, torch.zeros(0, 4, 2), 0, num_samples=3).shape == (0,)
    with pytest.raises(cflow.ArgumentError, match=r"^x: expected sequences \(B, T\+1"):
        metrics.equivariance_error(vae, torch.zeros(3, 2), 0)
    with pytest.raises(cflow.ArgumentError, match=r"^num_samples: expected"):
        metrics.log_likelihood(vae, torch.zeros(3, 4, 2), 0, num_samples=0)


def test_flows_are_right_up_to_their_order():
    """Flow 0 is transformation 2 three times of four, flow 1 is 0, flow 2 is never the most probable."""
    q = torch.tensor(
        [[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.2, 0.7, 0.1]]
    )
    k = torch.tensor([2, 2, 2, 1, 0, 0])
    accuracy, permutation = metrics.flow_accuracy(q, k)
    assert accuracy == 5 / 6
    assert permutation.tolist() == [2, 0, 1]
    order = torch.tensor([2, 0, 1])
    assert metrics.flow_accuracy(q[:, order], k) == (5 / 6, pytest.approx(torch.tensor([1, 2, 0])))
    # greedily flow 0 would take transformation 0, and leave nothing to flow 1
    q = nn.functional.one_hot(torch.tensor([0] * 7 + [1] * 3), 2).float()
    accuracy, permutation = metrics.flow_accuracy(q, torch.tensor([0] * 4 + [1] * 3 + [0] * 3))
    assert accuracy == 0.6
    assert permutation.tolist() == [1, 0]


def test_calibration():
    """Confidence 0.9 where 3 of 4 are right, 0.6 where all 2 are; the flows come in another order."""
    q = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    k = torch.tensor([1, 1, 1, 0, 0, 0])
    wanted = 4 / 6 * 0.15 + 2 / 6 * 0.4
    assert metrics.expected_calibration_error(q, k) == pytest.approx(wanted, abs=1e-6)
    assert metrics.expected_calibration_error(q, k, bins=1) == pytest.approx(abs(5 / 6 - 0.8), abs=1e-6)
    certain = torch.eye(3)
    assert metrics.expected_calibration_error(certain, torch.tensor([1, 2, 0])) == 0.0


# --- what is not a gradient ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_the_antisymmetric_share_of_linear_maps():
    """A quadratic potential and a skew part are any linear map, whose share is known; a rotation turns, and no more."""
    m, z = torch.randn(4, 4), torch.randn(6, 4)
    flow = PotentialFlow(cflow.QuadraticPotential(m[None]), solenoidal=cflow.SkewLinear(4))
    with torch.no_grad():
        flow.solenoidal.matrix.copy_(m / 2)
    share = (0.5 * (m - m.mT)).square().sum() / m.square().sum()
    torch.testing.assert_close(metrics.not_gradient(flow, z), share.expand(6))
    torch.testing.assert_close(metrics.not_gradient(PotentialFlow(None, solenoidal=flow.solenoidal), z), torch.ones(6))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", POTENTIALS)
def test_nothing_of_a_gradient_turns(name):
    flow, z = PotentialFlow(POTENTIALS[name](5, 3)), torch.randn(4, 5)
    for k in (1, torch.tensor([0, 2, 2, 1]), torch.randn(4, 3)):
        assert metrics.not_gradient(flow, z, k, 0.5).max() < 1e-25


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MORE_THAN_A_GRADIENT)
def test_the_antisymmetric_share_of_any_field(name):
    """Against `torch.func.jacrev`, state by state, in every mode."""
    flow, z, k = MORE_THAN_A_GRADIENT[name](3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    t = torch.linspace(0.0, 1.0, 4)
    wanted = []
    for row, (flow_of_row, at) in zip(z, zip(k.tolist(), t.tolist(), strict=True), strict=True):
        j = torch.func.jacrev(lambda x, k=flow_of_row, at=at: flow.velocity(x[None], k, at)[0])(row)
        wanted.append((j - j.mT).square().sum() / (4 * j.square().sum()))
    found = metrics.not_gradient(flow, z, k, t)
    torch.testing.assert_close(found, torch.stack(wanted))
    assert not found.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(metrics.not_gradient(flow, z.clone(), k, t), found)
    with torch.no_grad():
        torch.testing.assert_close(metrics.not_gradient(flow, z, k, t), found)


@pytest.mark.usefixtures("float64")
def test_what_turns_is_not_what_is_called_solenoidal():
    """A ∇(z₁ z₂) = ∇ ½(z₂² − z₁²) for a quarter turn A; and a velocity that is the same everywhere is a gradient."""
    saddle = cflow.QuadraticPotential(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    turned = cflow.Solenoidal(saddle)
    with torch.no_grad():
        turned.matrix.copy_(torch.tensor([[[0.0, -1.0], [0.0, 0.0]]]))
    flow, z = PotentialFlow(None, solenoidal=turned), torch.randn(3, 2)
    assert flow.velocity(z, part="solenoidal", t=0.0).abs().min() > 0
    assert metrics.not_gradient(flow, z).max() < 1e-30
    still = PotentialFlow(Drift(torch.ones(2, 2), torch.zeros(2, 2)))
    assert not metrics.not_gradient(still, z, 1).any()


def test_parts_along_paths():
    """A rotation by a tenth of a radian a frame beside a drift: paths are known, and so are the squares."""
    vae, x0, t = shifting(), torch.randn(3, 2), torch.arange(4.0)
    turn = cflow.SkewLinear(2, 2)
    with torch.no_grad():
        turn.matrix.copy_(torch.tensor([[0.0, -0.1], [0.0, 0.0]]))
    vae.flow.solenoidal = turn
    x, k = vae.traverse(x0, 1, t).transpose(0, 1), torch.ones(3, dtype=torch.long)
    found = metrics.parts_along_paths(vae, x, k, t)
    torch.testing.assert_close(found["not_gradient"], torch.ones(4, 3))
    torch.testing.assert_close(found["mean_square/gradient"], torch.full((4, 3), 4.0))
    torch.testing.assert_close(found["mean_square/solenoidal"], 0.01 * x.square().sum(-1).mT)
    with pytest.raises(cflow.ArgumentError, match=r"^t: "):
        metrics.parts_along_paths(vae, x, k, t[:2])
    for z in (x0[0], None):
        with pytest.raises(cflow.CflowError, match=r"^z: expected"):
            metrics.not_gradient(vae.flow, z, 1)


@pytest.mark.parametrize("measure", [metrics.flow_accuracy, metrics.expected_calibration_error])
@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (torch.ones(3, 2), torch.zeros(3), r"k: expected integers \(N,\), got torch.float32"),
        (torch.ones(3, 2), [0, 1, 1], r"k: expected integers \(N,\), got list"),
        (torch.ones(3, 2).long(), torch.zeros(3).long(), r"q: expected probabilities .* got torch.int64"),
        (torch.ones(3, 2), torch.zeros(4).long(), r"q, k: expected \(N, K\) and \(N,\).* got \(3, 2\) and \(4,\)"),
        (torch.ones(0, 2), torch.zeros(0).long(), r"q, k: .* at least one sequence"),
        (torch.ones(3), torch.zeros(3).long(), r"q, k: expected"),
        (torch.ones(3, 2), torch.tensor([0, 1, 2]), r"k: expected transformations 0 to 1, got 0 to 2"),
        (torch.ones(3, 2), torch.tensor([0, 1, -1]), r"k: expected transformations 0 to 1, got -1 to 1"),
    ],
)
def test_what_is_no_inferred_flow(measure, q, k, message):
    with pytest.raises(cflow.CflowError, match=f"^{message}"):
        measure(q, k)
