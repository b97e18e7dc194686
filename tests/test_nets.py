"""Encoders, decoders and potentials by name: what goes in, what comes out, gradients to every parameter."""

import pytest
import torch
from torch.distributions import Normal

import cflow
from cflow import PotentialFlow, nets


@pytest.mark.parametrize("network", nets.NETWORKS)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_networks(network, likelihood):
    vae = nets.build_vae(network=network, likelihood=likelihood, latent_dim=6, width=48, potential="quadratic+ridge")
    x = torch.rand(2, 3, 3, 28, 28)
    elbo = vae.elbo(x, torch.tensor([0, 2]))
    elbo.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vae.parameters())
    images = vae.sample(2, 1, [0.0, 1.0])
    assert images.shape == (2, 2, 3, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(vae.elbo(x, 0).loss)


@pytest.mark.parametrize("potential", nets.POTENTIALS)
def test_potentials_by_name(potential):
    for time_dependent in (False, True):
        u = nets.build_potential(potential, 4, 2, time_dependent=time_dependent)
        assert PotentialFlow(u, solver="dopri5")(torch.randn(3, 4), 1, (0.0, 1.0)).shape == (3, 4)


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
    ],
)
def test_build_errors(arguments, word):
    with pytest.raises(cflow.ArgumentError, match=f"^{word}: "):
        nets.build_vae(**arguments)


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
