"""Encoders, decoders and potentials by name: what goes in, what comes out, gradients to every parameter."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import cflow
from cflow import PotentialFlow, nets
from cflow.pde import HamiltonJacobi, Heat, Wave


@pytest.mark.parametrize("network", nets.NETWORKS)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("potential", nets.POTENTIALS)
def test_gradients_reach_every_parameter(network, likelihood, potential):
    weights = {"path_kl_weight": 1.0, "pde_weight": 0.0 if potential == "quadratic" else 0.1}
    size = {"image_shape": (2, 8, 12), "latent_dim": 6, "width": 48, "potential_hidden": 8}
    vae = nets.build_vae(network=network, likelihood=likelihood, potential=potential, **size, **weights)
    elbo = vae.elbo(torch.rand(6, 3, 2, 8, 12), torch.tensor([0, 1, 2, 0, 1, 2]))
    elbo.loss.backward()
    assert torch.isfinite(elbo.loss)
    for name, p in vae.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("network", nets.NETWORKS)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_networks(network, likelihood):
    vae = nets.build_vae(network=network, likelihood=likelihood, latent_dim=6, width=48, potential="quadratic+ridge")
    x = torch.rand(2, 3, 3, 28, 28)
    images = vae.sample(2, 1, [0.0, 1.0])
    assert images.shape == (2, 2, 3, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(vae.elbo(x, 0).loss)


def test_settings_reach_what_they_set():
    weights = {"kl_weight": 0.5, "path_kl_weight": 0.25, "pde_weight": 0.125}
    solver = {"solver": "dopri5", "step_size": None, "rtol": 1e-3, "atol": 1e-4, "gradient": "direct"}
    vae = nets.build_vae(latent_dim=2, width=4, divergence="hutchinson", **weights, **solver)
    assert {name: getattr(vae, name) for name in weights} == weights
    assert vae.flow.solver == cflow.Solver("dopri5", rtol=1e-3, atol=1e-4, gradient="direct")
    assert vae.flow.divergence_estimator == "hutchinson"
    assert nets.build_vae(latent_dim=2, width=4).flow.solver == cflow.Solver("rk4", step_size=1.0)


@pytest.mark.parametrize(("name", "kind"), [("hj", HamiltonJacobi), ("wave", Wave), ("heat", Heat)])
def test_equations_by_name(name, kind):
    vae = nets.build_vae(image_shape=(1, 4, 4), latent_dim=4, width=8, potential="ridge", pde=name, pde_weight=0.1)
    assert type(vae.pde) is kind
    assert vae.pde.potential is vae.flow.net
    elbo = vae.elbo(torch.rand(6, 3, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.testing.assert_close(elbo.loss, -elbo.value + 0.1 * elbo.hj)
    elbo.hj.backward()
    assert all(p.grad.abs().max() > 0 for p in vae.flow.parameters())
    assert nets.build_vae(latent_dim=4, width=8).pde is None


@pytest.mark.parametrize("potential", nets.POTENTIALS)
def test_potentials_by_name(potential):
    for time_dependent in (False, True):
        u = nets.build_potential(potential, 4, 2, time_dependent=time_dependent)
        assert PotentialFlow(u, solver="dopri5")(torch.randn(3, 4), 1, (0.0, 1.0)).shape == (3, 4)


@pytest.mark.parametrize("name", ["skew", "ridge", "mlp", "skew+ridge"])
def test_solenoidal_parts_by_name(name):
    weights = {"path_kl_weight": 1.0, "pde_weight": 0.1}
    vae = nets.build_vae(
        image_shape=(1, 4, 4), latent_dim=4, width=8, num_flows=2, potential="quadratic", solenoidal=name, **weights
    )
    z = torch.randn(6, 4)
    J = torch.func.vmap(torch.func.jacrev(lambda z: vae.flow.velocity(z[None], 1, 0.5, part="solenoidal")[0]))(z)
    assert J.diagonal(dim1=1, dim2=2).sum(1).abs().max() < 1e-6
    vae.elbo(torch.rand(6, 3, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1, 0])).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in vae.flow.solenoidal.parameters())
    assert nets.build_solenoidal("none", 4, 2) is None
    with pytest.raises(cflow.ArgumentError, match=r"solenoidal: expected none, skew, ridge, mlp or a sum .* 'curl'"):
        nets.build_solenoidal("curl", 4, 2)


def test_the_learned_scale_is_calibrated():
    decoder = nets.MLPDecoder((1, 4, 4), 2, width=8)
    z, x = torch.zeros(64, 2), 0.5 + 0.2 * torch.randn(64, 1, 4, 4)
    with torch.no_grad():
        rmse = (decoder(z).mean - x).square().mean().sqrt()
        decoder.log_scale.copy_(rmse.log())
    decoder(z).log_prob(x).sum().backward()
    assert decoder.log_scale.grad.abs() < 0.05
    got = nets.GlobalScaleNormal(x, torch.tensor(-1.0)).log_prob(z[0, 0])
    torch.testing.assert_close(got, Normal(x, torch.tensor(-1.0).exp()).log_prob(z[0, 0]))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"network": "resnet"}, "network"),
        ({"potential": "cubic"}, "potential"),
        ({"likelihood": "laplace"}, "likelihood"),
        ({"network": "conv", "image_shape": (3, 30, 30)}, "image_shape"),
        ({"solver": "rk4", "step_size": None}, "step_size"),
        ({"image_shape": (28, 28)}, "image_shape"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"width": 0.5}, "width"),
        ({"width": True}, "width"),
        ({"image_shape": 28}, "image_shape"),
        ({"image_shape": (3, 28.0, 28)}, "image_shape"),
        ({"network": "paper", "image_shape": (3, 28, 30)}, "image_shape"),
        ({"kl_weight": "a"}, "kl_weight"),
        ({"solver": "rk5"}, "method"),
        ({"solver": "dopri5"}, "step_size"),
        ({"pde_weight": 1.0, "time_dependent": False}, "potential"),
        ({"pde": "waves", "pde_weight": 1.0}, "pde"),
        ({"pde": "wave"}, "pde"),
        ({"latent_din": 4}, "latent_din"),
    ],
)
def test_build_errors(arguments, word):
    with pytest.raises(cflow.CflowError, match=f"^{word}: "):
        nets.build_vae(**arguments)


@pytest.mark.parametrize(
    "make", [nets.MLPEncoder, nets.MLPDecoder, nets.ConvDecoder, nets.PaperEncoder, nets.PaperDecoder]
)
def test_sizes_are_checked_by_each_class(make):
    for shape in ((28, 28), (1, 0, 4), 28, "328"):
        with pytest.raises(cflow.ArgumentError, match=r"^image_shape: expected \(channels, height, width\)"):
            make(shape, 4)
    with pytest.raises(cflow.ArgumentError, match=r"^latent_dim: expected an int ≥ 1, got 0"):
        make((1, 8, 8), 0)
    if make in (nets.MLPEncoder, nets.MLPDecoder):
        make((1, 7, 9), 4, width=1)
    else:
        with pytest.raises(cflow.ArgumentError, match=r"^image_shape: .* divisible by 4, got \(1, 7, 9\)"):
            make((1, 7, 9), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (255 * x).byte(), r"x: expected floating point .* got torch.uint8; use x.float\(\) / 255"),
        (lambda x: x.numpy(), "x: expected floating point .* got ndarray"),
        (lambda x: x.double(), "x: is torch.float64, but the encoder torch.float32"),
        (lambda x: x[0], r"x: expected frames of shape \(1, 4, 8\), got \(4, 8\)"),
        (lambda x: x[:, None], r"x: expected frames of shape \(1, 4, 8\), got \(1, 1, 4, 8\) .* sequences \(B, T\+1"),
        (lambda x: x.mT, r"x: expected frames of shape \(1, 4, 8\), got \(1, 8, 4\)"),
    ],
)
def test_images_are_checked(change, message):
    encoder = nets.MLPEncoder((1, 4, 8), 2, width=8)
    with pytest.raises(cflow.CflowError, match=f"^{message}"):
        encoder(change(torch.rand(3, 1, 4, 8)))


def test_encoders_read_mean_and_log_variance():
    encoder = nets.Encoder(torch.nn.Flatten(), (1, 1, 4))
    q = encoder(torch.tensor([[[[0.5, -1.0, 0.0, 2.0]]]]))
    torch.testing.assert_close(q.mean, torch.tensor([[0.5, -1.0]]))
    torch.testing.assert_close(q.variance.log(), torch.tensor([[0.0, 2.0]]))


def test_unknown_sizes_of_potentials():
    for name in nets.POTENTIALS:
        for dim, num_flows, word in ((-1, 2, "dim"), (2, 0, "num_flows"), (2.0, 1, "dim")):
            with pytest.raises(cflow.ArgumentError, match=f"^{word}: expected an int ≥ 1"):
                nets.build_potential(name, dim, num_flows)


@pytest.mark.parametrize("network", nets.NETWORKS)
def test_encoders_and_decoders_return_events(network):
    vae = nets.build_vae(network=network, latent_dim=5, width=48, image_shape=(1, 16, 8))
    q, p = vae.encoder(torch.rand(4, 1, 16, 8)), vae.decoder(torch.randn(3, 4, 5))
    assert (q.batch_shape, q.event_shape) == ((4,), (5,))
    assert (p.batch_shape, p.event_shape) == ((3, 4), (1, 16, 8))
    assert p.log_prob(torch.rand(3, 4, 1, 16, 8)).shape == (3, 4)


def test_grey_targets_of_a_bernoulli_give_a_cross_entropy():
    decoder, z, x = (
        nets.MLPDecoder((1, 4, 4), 2, width=8, likelihood="bernoulli"),
        torch.randn(6, 2),
        torch.rand(6, 1, 4, 4),
    )
    mean = decoder(z).mean
    cross_entropy = torch.nn.functional.binary_cross_entropy(mean, x, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(decoder(z).log_prob(x), -cross_entropy)


def test_the_papers_layers():
    vae = nets.build_vae(network="paper", latent_dim=6)
    kinds = [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in vae.encoder.body if hasattr(m, "in_channels")]
    assert kinds == [(3, 6, 4), (6, 12, 4), (12, 18, 7), (18, 12, 1), (12, 12, 1)]
    kinds = [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in vae.decoder.body if hasattr(m, "in_channels")]
    assert kinds == [(12, 12, 1), (12, 18, 1), (18, 12, 7), (12, 6, 4), (6, 3, 4)]


@pytest.mark.parametrize("width", [48, 512])
@pytest.mark.parametrize(("decoder", "least"), [(nets.MLPDecoder, 0.2), (nets.ConvDecoder, 0.1)])
def test_a_new_decoder_listens_to_z(decoder, width, least):
    body = decoder((3, 28, 28), 32, width).body
    with torch.no_grad():
        assert body(torch.randn(200, 32)).std(0).mean() > least  # PyTorch's own weights: 0.05 and 0.013


def test_a_users_weights_stay_as_they_are():
    body = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Unflatten(1, (1, 4, 4)))
    before = body[0].weight.clone()
    torch.testing.assert_close(nets.Decoder(body, (1, 4, 4)).body[0].weight, before)


# --- networks that exist already --------------------------------------------------------------------------------


class Named(nn.Module):
    """What returns a mapping of names, as many libraries' networks do."""

    def __init__(self, body, *names):
        super().__init__()
        self.body, self.names = body, names

    def forward(self, x):
        return dict(zip(self.names, self.body(x).chunk(len(self.names), -1), strict=True))


def test_a_model_of_networks_that_return_tensors(float64):
    torch.manual_seed(1)
    encoder = Named(nn.Linear(6, 8), "mean", "log_variance")
    decoder = Named(nn.Linear(4, 6), "made")
    q = nets.NormalEncoder(encoder, read=lambda out: (out["mean"], out["log_variance"]))
    p = nets.NormalDecoder(decoder, read=lambda out: out["made"], scale=0.5)
    x, z = torch.randn(5, 6), torch.randn(3, 5, 4)
    mean, log_variance = encoder.body(x).chunk(2, -1)
    by_hand = torch.distributions.Normal(mean, log_variance.exp().sqrt())
    torch.testing.assert_close(q(x).log_prob(z[0]), by_hand.log_prob(z[0]).sum(-1))
    frames = torch.randn(3, 5, 6)
    by_hand = torch.distributions.Normal(decoder.body(z), 0.5)
    torch.testing.assert_close(p(z).log_prob(frames), by_hand.log_prob(frames).sum(-1))
    vae = cflow.FlowVAE(
        q, p, cflow.PotentialFlow(cflow.RidgePotential(4, 2), solver=cflow.Solver("rk4", step_size=1.0))
    )
    vae.elbo(torch.randn(5, 3, 6), torch.tensor([0, 1, 0, 1, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_networks_that_return_something_else_say_what_was_wanted():
    with pytest.raises(cflow.CflowError, match=r"pair of tensors \(B, D\).*got dict.*read=lambda"):
        nets.NormalEncoder(Named(nn.Linear(6, 8), "mean", "log_variance"))(torch.randn(5, 6))
    with pytest.raises(cflow.CflowError, match=r"pair.*\(5, 4\), \(5, 3\)"):
        nets.NormalEncoder(nn.Linear(6, 7), read=lambda y: (y[:, :4], y[:, 4:]))(torch.randn(5, 6))
    with pytest.raises(cflow.CflowError, match=r"one for each of the M = 15 states, got dict"):
        nets.NormalDecoder(Named(nn.Linear(4, 6), "made"))(torch.randn(3, 5, 4))
    with pytest.raises(cflow.CflowError, match="scale"):
        nets.NormalDecoder(nn.Linear(4, 6), scale=0.0)
