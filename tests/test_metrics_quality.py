"""PSNR, SSIM, the bound of log-likelihoods, the VP score, and standard errors."""

import math

import pytest
import torch
from torch import nn

import cflow
from cflow import metrics, nets


def test_psnr_is_its_formula():
    made, x = torch.rand(2, 4, 3, 9, 7), torch.rand(2, 4, 3, 9, 7)
    wanted = -10 * (made - x).square().mean((-3, -2, -1)).log10()
    torch.testing.assert_close(metrics.psnr(made, x), wanted)


def test_ssim_is_its_formula():
    """The mean over all places of an image that is mirrored at its edges."""
    made, x = torch.rand(2, 1, 13, 12, dtype=torch.float64), torch.rand(2, 1, 13, 12, dtype=torch.float64)
    g = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    w = torch.outer(g, g) / g.sum() ** 2
    windows_a, windows_b = (
        nn.functional.pad(images, (5, 5, 5, 5), mode="reflect").unfold(2, 11, 1).unfold(3, 11, 1)
        for images in (made, x)
    )

    def mean(windows):
        return (windows * w).sum((-2, -1))

    a, b, ab = mean(windows_a), mean(windows_b), mean(windows_a * windows_b)
    va, vb, ab = mean(windows_a**2) - a**2, mean(windows_b**2) - b**2, ab - a * b
    wanted = (2 * a * b + 1e-4) * (2 * ab + 9e-4) / ((a**2 + b**2 + 1e-4) * (va + vb + 9e-4))
    torch.testing.assert_close(metrics.ssim(made, x), wanted.mean((1, 2, 3)))


def test_pairs_that_are_none():
    x = torch.rand(2, 3, 28, 28)
    for measure in (metrics.psnr, metrics.ssim):
        with pytest.raises(cflow.ArgumentError, match="of one shape"):
            measure(x, x[:1])
        with pytest.raises(cflow.ArgumentTypeError, match=r"^x: expected floating point"):
            measure(x, x.byte())
    with pytest.raises(cflow.ArgumentError, match="at least 11 × 11"):
        metrics.ssim(x[..., :10], x[..., :10])


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_no_log_likelihood_passes_its_bound(scale):
    """Also of the very images that the model makes, where the decoder is at its best."""
    vae = nets.build_vae(latent_dim=2, width=8).eval()
    with torch.no_grad():
        vae.decoder.log_scale.fill_(math.log(scale))
        x = vae.traverse(torch.rand(5, 3, 28, 28), 1, [0, 1, 2]).transpose(0, 1)
    bound = metrics.log_likelihood_bound(vae, 3)
    assert bound == pytest.approx(3 * (-2352 * math.log(scale) - 2161.3), abs=0.2)
    found = metrics.log_likelihood(vae, x, 1, num_samples=64)
    assert float(found.max()) < bound
    assert float(found.mean()) > bound - 200  # it is near, so that a wrong sign or sum would show
    assert metrics.log_likelihood_bound(nets.build_vae(likelihood="bernoulli", width=8)) == math.inf


class Stripes(nn.Module):
    """Images whose rows follow the latent state, so that a flow along one dimension brightens one row."""

    def forward(self, z):
        image = z[..., None, :, None].expand(*z.shape[:-1], 1, z.shape[-1], 8)
        return torch.distributions.Normal(image, 1.0)


class FirstColumn(nn.Module):
    def forward(self, x):
        return torch.distributions.Normal(x[:, 0, :, 0], 1.0)


@pytest.mark.parametrize(("same", "low", "high"), [(False, 0.99, 1.0), (True, 0.4, 0.6)])
def test_the_vp_score_tells_flows_apart_where_they_differ(same, low, high):
    shift = torch.zeros(2, 8)
    shift[0, 0] = shift[1, 0 if same else 4] = 1.0
    flow = cflow.PotentialFlow(
        cflow.QuadraticPotential(torch.zeros(2, 8, 8), shift), solver=cflow.Solver("rk4", step_size=8.0)
    )
    vae, x0 = cflow.FlowVAE(FirstColumn(), Stripes(), flow), torch.randn(20, 1, 8, 8)
    score, error = metrics.vp_score(vae, x0)
    assert low <= score <= high
    assert error == pytest.approx(math.sqrt(score * (1 - score) / 570))
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert metrics.vp_score(vae, x0) == (score, error)
    assert torch.equal(torch.get_rng_state(), state)
    for few in (0, 1):
        with pytest.raises(cflow.ArgumentError, match=r"^few: "):
            metrics.vp_score(vae, x0, few=few)
    with pytest.raises(cflow.ArgumentError, match=r"^x0: expected images of at least 4 × 4 pixels, got \(3, 8\)"):
        metrics.vp_score(vae, x0[..., :3, :])


def test_standard_errors():
    pytest.importorskip("pytorch_lightning")
    from cflow.training.measures import Samples, over_transformations

    samples, x = Samples(), torch.randn(2, 30, dtype=torch.float64)
    for part in x.split(8, dim=1):
        samples.add(over_transformations({"a": {"error": part[0]}, "b": {"error": part[1]}}))
    found = samples.numbers()
    for key, values in {"error/a": x[0], "error/b": x[1], "error/mean": x.mean(0)}.items():
        assert found[key] == pytest.approx(float(values.mean()))
        assert found[f"{key}_stderr"] == pytest.approx(float(values.std()) / math.sqrt(30))
