"""Errors of hand-made models and images, networks, and checkpoints."""

import pickle
import zipfile

import pytest
import torch
from exact import Drift
from torch import nn
from torch.distributions import Independent, Normal

import cflow
from cflow import FlowVAE, PotentialFlow, Solver, metrics, nets


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
    per_sample = t[:, None].expand(-1, 3)
    torch.testing.assert_close(metrics.equivariance_error(vae, x, k, per_sample), error)
    torch.testing.assert_close(metrics.reconstruction_l1(vae, x0), torch.zeros(3))


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
    ],
)
def test_build_errors(arguments, word):
    with pytest.raises(cflow.ArgumentError, match=f"^{word}: "):
        nets.build_vae(**arguments)


CONFIG = {"network": "mlp", "latent_dim": 4, "width": 16, "potential": "quadratic+ridge", "step_size": 2.0}


@pytest.fixture
def checkpoint(tmp_path):
    vae = nets.build_vae(**CONFIG).eval()
    file = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    state = {f"vae.{name}": value for name, value in vae.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"model_config": CONFIG}, "global_step": 3}, file)
    return vae, file


def test_load(checkpoint):
    vae, file = checkpoint
    x0 = torch.rand(2, 3, 28, 28)
    for path in (file, file.parent, file.parents[1]):
        loaded = cflow.load(path)
        assert not loaded.training
        torch.testing.assert_close(loaded.traverse(x0, 1, [0, 4]), vae.traverse(x0, 1, [0, 4]))


def test_load_errors(checkpoint, tmp_path):
    _, file = checkpoint
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + largest.file_size // 2 + 200] ^= 1
    flipped, cut, text, foreign, pickled = (tmp_path / n for n in ("flipped", "cut", "text", "foreign", "pickled"))
    flipped.write_bytes(data)
    cut.write_bytes(data[: len(data) // 2])
    text.write_text("hello")
    torch.save({"state_dict": {}}, foreign)
    pickled.write_bytes(pickle.dumps({"a": 1}))
    words = {flipped: "damaged", foreign: "no checkpoint", **dict.fromkeys((cut, text, pickled), "cannot be read")}
    for path, word in words.items():
        with pytest.raises(cflow.DataError, match=word):
            cflow.load(path)
    torch.save(nets.build_vae(**CONFIG), tmp_path / "module")
    with pytest.raises(cflow.DataError, match="more than tensors"):
        cflow.load(tmp_path / "module")
    with pytest.raises(cflow.ArgumentError, match="no file or folder"):
        cflow.load(tmp_path / "absent")
    with pytest.raises(cflow.ArgumentError, match="holds no checkpoints"):
        cflow.load(tmp_path)
