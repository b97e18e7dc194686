"""Checkpoints of the original code: files in its layout, held against its formulas written out."""

import math

import pytest
import torch
from torch.nn import functional as F

import cflow
from cflow.interop import load_latent_flow

S, FLOWS, FRAMES = 8, 3, 4
# height and width → channels, and the kernels of encoder and decoder: (size, stride, padding, in, out)
SIZES = {28: 3, 64: 3, 128: 1}


def convolutions(size, channels, last=2 * S):
    """Of the original encoder: (in, out, kernel, stride, padding)."""
    if size < 128:
        strided = [(channels, S, 4, 2, 1), (S, 2 * S, 4, 2, 1)]
        return [*strided, (2 * S, 3 * S, size // 4, 1, 0), (3 * S, 2 * S, 1, 1, 0), (2 * S, last, 1, 1, 0)]
    strided = [(channels, S, 4, 2, 1), (S, S, 3, 1, 1)] + 3 * [(S, S, 4, 2, 1), (S, S, 3, 1, 1)]
    return [*strided, (S, S, size // 16, 1, 0), (S, S, 1, 1, 0), (S, S, 1, 1, 0)]


def linear(state, name, fan_in, fan_out):
    state[f"{name}.weight"] = torch.randn(fan_out, fan_in) / math.sqrt(fan_in)
    state[f"{name}.bias"] = 0.3 * torch.randn(fan_out)


def networks(group):
    state = {}
    for k in range(FLOWS):
        for layer in ("layer_x", "layer_time", "layer_time2", "layer_fusion"):
            linear(state, f"{group}.{k}.{layer}", S, S)
        linear(state, f"{group}.{k}.layer_out", S, 1)
    return state


def convolve(state, name, fan_in, fan_out, kernel, transposed=False):
    shape = (fan_in, fan_out) if transposed else (fan_out, fan_in)
    state[f"{name}.weight"] = torch.randn(*shape, kernel, kernel) / math.sqrt(fan_in * min(kernel, 4) ** 2)
    state[f"{name}.bias"] = 0.3 * torch.randn(fan_out)


def checkpoint(size, weak=False, seed=0):
    """What the original code stores."""
    torch.manual_seed(seed)
    channels = SIZES[size]
    layers, vae = convolutions(size, channels), {}
    for i, (a, b, kernel, _, _) in enumerate(layers):
        convolve(vae, f"encoder.encoder.{2 * i}", a, b, kernel)
        convolve(vae, f"decoder.decoder.{3 + 2 * (len(layers) - 1 - i)}", b, a, kernel, transposed=True)
    wide = layers[-1][1]
    linear(vae, "encoder.linear_means", wide, S)
    linear(vae, "encoder.linear_log_var", wide, S)
    linear(vae, "decoder.decoder.0", S, wide)
    sets = networks("MLP_SET") | networks("FORCE_SET")
    prior = {f"MLP_SET.{k}.{name}": torch.ones(FRAMES, 1) for k in range(FLOWS) for name in ("mu", "sigma")}
    content = {"iter": 4200, "support_sets": sets, "prior": prior, "vae": vae}
    if weak:
        q = content["reconstructor"] = {}
        for i, (a, b, kernel, _, _) in enumerate(convolutions(size, channels * FRAMES, last=S)):
            convolve(q, f"encoder.{2 * i}", a, b, kernel)
        linear(q, "linear1", S, FLOWS)
    return content


def potential(state, z, t, group="MLP_SET"):
    """u_k(z, t) of the original code, (B, K)."""
    half = S // 2
    angle = t * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=z.dtype))
    s = torch.cat([angle.sin(), angle.cos()])
    found = []
    for k in range(FLOWS):

        def layer(name, x, k=k):
            w, b = (state[f"{group}.{k}.{name}.{what}"].to(z.dtype) for what in ("weight", "bias"))
            return F.linear(x, w, b)

        time = layer("layer_time2", F.gelu(layer("layer_time", s)))
        hidden = torch.tanh(layer("layer_fusion", torch.tanh(layer("layer_x", z)) + time))
        found.append(torch.tanh(layer("layer_out", hidden))[:, 0])
    return torch.stack(found, 1)


def velocity(state, z, k, t):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(potential(state, z, t)[:, k].sum(), z)[0]


def encode(state, prefix, layers, x):
    for i, (_, _, _, stride, padding) in enumerate(layers):
        x = F.conv2d(x, state[f"{prefix}{2 * i}.weight"], state[f"{prefix}{2 * i}.bias"], stride, padding)
        x = x.relu() if i + 1 < len(layers) else x
    return x.flatten(1)


def decode(state, layers, z):
    x = F.linear(z, state["decoder.decoder.0.weight"], state["decoder.decoder.0.bias"])[..., None, None]
    for i, (_, _, _, stride, padding) in enumerate(reversed(layers)):
        name = f"decoder.decoder.{3 + 2 * i}"
        x = F.conv_transpose2d(x.relu(), state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)
    return x.sigmoid()


@pytest.fixture(
    scope="module", params=[(size, weak) for size in SIZES for weak in (False, True) if size < 128 or not weak]
)
def loaded(request, tmp_path_factory):
    size, weak = request.param
    content, file = checkpoint(size, weak), tmp_path_factory.mktemp("original") / "checkpoint.pt"
    torch.save(content, file)
    return content, load_latent_flow(file), size


def test_potentials_and_velocities(loaded):
    content, model, _ = loaded
    sets, z = content["support_sets"], torch.randn(5, S)
    assert model.iteration == 4200
    for t in (1.0, 2.0, 7.0):
        torch.testing.assert_close(model.flow.potential(z, t), potential(sets, z, t), rtol=1e-5, atol=1e-5)
        force = potential(sets, z, t, "FORCE_SET")
        torch.testing.assert_close(model.vae.pde.force(z, torch.tensor(t)), force, rtol=1e-5, atol=1e-5)
        for k in range(FLOWS):
            torch.testing.assert_close(model.flow.velocity(z, k, t), velocity(sets, z, k, t), rtol=1e-5, atol=1e-5)


def test_trajectories(loaded):
    content, model, _ = loaded
    z = z0 = torch.randn(5, S)
    steps = [z0]
    for t in range(1, FRAMES):
        steps.append(z := z + velocity(content["support_sets"], z, 1, float(t)))
    made = model.flow.trajectory(z0, 1, [1.0 + t for t in range(FRAMES)])
    torch.testing.assert_close(made, torch.stack(steps), rtol=1e-5, atol=1e-5)


def test_encoder_and_decoder(loaded):
    content, model, size = loaded
    vae, channels = content["vae"], SIZES[size]
    layers, x, z = convolutions(size, channels), torch.rand(2, channels, size, size), torch.randn(2, S)
    hidden = encode(vae, "encoder.encoder.", layers, x)
    mean, log_var = (
        F.linear(hidden, vae[f"encoder.linear_{n}.weight"], vae[f"encoder.linear_{n}.bias"])
        for n in ("means", "log_var")
    )
    q = model.vae.encoder(x)
    torch.testing.assert_close(q.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.stddev, (0.5 * log_var).exp(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.vae.decode(z), decode(vae, layers, z), rtol=1e-5, atol=1e-5)
    logits = model.vae.decoder(z).base_dist.logits
    entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(-model.vae.log_prob_frames(x, z), entropy)


def test_inferred_flows(loaded):
    content, model, size = loaded
    if "reconstructor" not in content:
        assert model.vae.flow_posterior is None
        return
    q, x = content["reconstructor"], torch.rand(2, FRAMES, SIZES[size], size, size)
    hidden = encode(q, "encoder.", convolutions(size, SIZES[size] * FRAMES, last=S), x.flatten(1, 2))
    logits = F.linear(hidden, q["linear1.weight"], q["linear1.bias"])
    torch.testing.assert_close(model.vae.infer_flow(x), logits.softmax(-1), rtol=1e-5, atol=1e-5)
    with pytest.raises(cflow.ArgumentError, match=r"^x: expected sequences of 4 frames"):
        model.vae.infer_flow(x[:, :3])


def test_parallel_training_leaves_a_prefix(tmp_path):
    content = checkpoint(28)
    content["vae"] = {f"module.{key}": value for key, value in content["vae"].items()}
    torch.save(content, tmp_path / "x.pt")
    model, z = load_latent_flow(tmp_path / "x.pt"), torch.randn(2, S)
    assert model.vae.decode(z).shape == (2, 3, 28, 28)


def without(part, key):
    def spoil(content):
        del content[part][key]

    return spoil


def with_value(part, key, value):
    def spoil(content):
        content[part][key] = value

    return spoil


FOREIGN = {
    "no vae": lambda content: content.pop("vae"),
    "a list": lambda content: content.update(vae=[1, 2]),
    "numbers for names": lambda content: content.update(vae={1: torch.zeros(1)}),
    "no potentials": lambda content: content.update(support_sets={}),
    "a missing network": lambda content: [
        content["support_sets"].pop(k) for k in list(content["support_sets"]) if k.startswith("MLP_SET.1.")
    ],
    "a missing layer": without("support_sets", "MLP_SET.2.layer_fusion.weight"),
    "a missing convolution": without("vae", "encoder.encoder.4.weight"),
    "a missing head": without("vae", "encoder.linear_means.bias"),
    "an unknown layer": with_value("vae", "attention.weight", torch.zeros(3)),
    "a layer of another shape": with_value("vae", "decoder.decoder.5.weight", torch.zeros(3, 3, 1, 1)),
    "weights that are integers": with_value("vae", "encoder.linear_means.bias", torch.zeros(S, dtype=torch.long)),
    "seven dimensions": with_value("support_sets", "MLP_SET.0.layer_x.weight", torch.zeros(7, 7)),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_checkpoints(what, tmp_path):
    content = checkpoint(28)
    FOREIGN[what](content)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(cflow.DataError, match=r"^path: .* is no checkpoint of the original code: ") as caught:
        load_latent_flow(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    for path, error in (
        ("nowhere", cflow.ArgumentError),
        (3, cflow.ArgumentTypeError),
        (tmp_path, cflow.ArgumentError),
    ):
        with pytest.raises(error, match=r"^path: "):
            load_latent_flow(path)
    (tmp_path / "x.pt").write_text("hello")
    with pytest.raises(cflow.DataError, match="cannot be read"):
        load_latent_flow(tmp_path / "x.pt")
