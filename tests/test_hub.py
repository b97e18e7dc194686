"""Models in folders: what was saved comes back, weights of cflow's own load by name, and foreign files are errors."""

import copy
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import cflow
from cflow import FlowVAE, PotentialFlow, hub, nets
from cflow.checkpoint import PLACES, PRETRAINED

pytest.importorskip("safetensors")

REPOSITORY = Path(cflow.__file__).parents[1]
SMALL = {"latent_dim": 4, "width": 16, "image_shape": (1, 8, 8)}
FLOWS = {
    "mlp": lambda: PotentialFlow(cflow.MLPPotential(4, 2, hidden=6, output_tanh=True)),
    "ridge": lambda: PotentialFlow(cflow.RidgePotential(4, 2, hidden=6, time_dependent=False), solver="dopri8"),
    "sum": lambda: PotentialFlow(
        cflow.QuadraticPotential(0.1 * torch.randn(2, 4, 4)) + cflow.MLPPotential(4, 2),
        solenoidal=cflow.SkewLinear(4, 2, rank=1) + cflow.Solenoidal(cflow.RidgePotential(4, 4), num_terms=2),
        solver=cflow.Solver("rk4", step_size=0.5, gradient="direct", max_steps=100),
        divergence="hutchinson",
    ),
    "no gradient": lambda: PotentialFlow(
        None, solenoidal=cflow.SkewLinear(4, 2), solver=cflow.Solver("scipy_solver", options={"solver": "DOP853"})
    ),
}
VAES = {
    "mlp": {},
    "conv": {"network": "conv", "potential": "quadratic+ridge", "solenoidal": "skew+ridge"},
    "paper": {"network": "paper", "likelihood": "bernoulli", "supervision": "weak", "inference": "gumbel"},
    "all terms": {"potential": "mlp", "pde_weight": 1.0, "path_kl_weight": 1.0, "solenoidal": "skew"},
    "wave": {"potential": "mlp", "pde": "wave", "pde_weight": 1.0},
    "weak": {"supervision": "weak", "responsibility_frames": "decoded"},
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_comes_back(name, tmp_path):
    flow, z = FLOWS[name](), torch.randn(3, 4)
    flow.save_pretrained(tmp_path / "a" / "b")
    again = PotentialFlow.from_pretrained(tmp_path / "a" / "b")
    assert again.solver == flow.solver
    assert again.divergence_estimator == flow.divergence_estimator
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(z, 1, t=(0.0, 2.0)), flow(z, 1, t=(0.0, 2.0)))


@pytest.mark.parametrize("name", VAES)
def test_a_model_comes_back(name, tmp_path):
    vae, x = nets.build_vae(**SMALL | VAES[name], num_flows=2).eval(), torch.rand(3, 9, 1, 8, 8)
    vae.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    again = FlowVAE.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.inference == vae.inference
    assert again.responsibility_frames == vae.responsibility_frames
    for weight in ("kl_weight", "path_kl_weight", "pde_weight"):
        assert getattr(again, weight) == getattr(vae, weight)
    values = []
    for model in (vae, again):
        torch.manual_seed(0)
        values.append(model.elbo(x, None if vae.inference else torch.tensor([0, 1, 1])).loss)
    assert torch.equal(*values)
    if vae.pde is not None:  # what two parts share stays shared
        assert again.pde.potential is again.flow.net


def test_a_model_put_together_by_hand(tmp_path):
    encoder, decoder = nets.MLPEncoder((1, 8, 8), 4, width=10), nets.ConvDecoder((1, 8, 8), 4, width=48)
    q = nets.ConvSequenceEncoder((1, 8, 8), num_frames=3, num_flows=2, width=6)
    prior = torch.tensor([0.25, 0.75])
    vae = FlowVAE(encoder, decoder, FLOWS["sum"](), flow_posterior=q, flow_prior=prior, kl_weight=0.5).eval()
    vae.save_pretrained(tmp_path)
    again, x = cflow.load(tmp_path), torch.rand(3, 3, 1, 8, 8)
    assert torch.equal(again.flow_prior, prior)
    assert torch.equal(again.infer_flow(x), vae.infer_flow(x))
    assert torch.equal(again.traverse(x[:, 0], 1, [0, 2]), vae.traverse(x[:, 0], 1, [0, 2]))


def test_precision(tmp_path):
    flow, z = FLOWS["sum"](), torch.randn(3, 4)
    flow.save_pretrained(tmp_path, dtype=torch.float16)
    assert all(value.dtype == torch.float16 for value in hub.read_weights(tmp_path).values())
    half = PotentialFlow.from_pretrained(tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half(z, 0, (0, 2)), flow(z, 0, (0, 2)), rtol=5e-3, atol=5e-3)
    flow.double().save_pretrained(tmp_path)
    assert torch.equal(PotentialFlow.from_pretrained(tmp_path)(z.double(), 0, (0, 2)), flow(z.double(), 0, (0, 2)))
    with pytest.raises(cflow.ArgumentError, match=r"^dtype: .*int8"):
        flow.save_pretrained(tmp_path, dtype=torch.int8)


class MyPotential(cflow.RidgePotential):
    """Of a user."""


def test_what_cannot_be_saved(tmp_path):
    for part in (torch.nn.Linear(4, 2), MyPotential(4, 2), cflow.RidgePotential(4, 2) + MyPotential(4, 2)):
        with pytest.raises(cflow.ArgumentTypeError, match=r"model\.potential.* is a .*state_dict"):
            PotentialFlow(part).save_pretrained(tmp_path)
    vae = nets.build_vae(**SMALL)
    vae.encoder.body[1] = torch.nn.Linear(64, 16, bias=False)
    with pytest.raises(cflow.ArgumentError, match=r"changed after it was made .*encoder\.body\.1\.bias"):
        vae.save_pretrained(tmp_path)
    with pytest.raises(cflow.ArgumentError, match=r"^options: expected plain values"):
        FLOWS["mlp"]().save_pretrained(tmp_path, options={"source": object()})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(cflow.DataError, match="cannot be written"):
        FLOWS["mlp"]().save_pretrained(tmp_path / "file" / "x")
    with pytest.raises(cflow.ArgumentTypeError, match=r"^folder: expected the path of a folder, got int"):
        FLOWS["mlp"]().save_pretrained(3)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^options: expected a mapping .* got int"):
        FLOWS["mlp"]().save_pretrained(tmp_path, options=3)


def test_a_disk_that_is_full_leaves_what_was_saved_before(tmp_path, monkeypatch):
    FLOWS["mlp"]().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write = Path.write_bytes

    def half(path, content):
        write(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(cflow.DataError, match="No space left on device"):
        FLOWS["mlp"]().save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- foreign folders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good folder's config and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("saved")
    nets.build_vae(**SMALL).save_pretrained(folder)
    return json.loads((folder / hub.CONFIG).read_text()), (folder / hub.WEIGHTS).read_bytes()


def change(path, value):
    def changed(config):
        *way, last = path.split(".")
        part = config
        for name in way:
            part = part[name]
        if value is None:
            del part[last]
        else:
            part[last] = value
        return json.dumps(config)

    return changed


HOSTILE = {
    "no JSON": lambda config: "{",
    "not text": lambda config: b"\xff\xfe\x00",
    "a list": lambda config: "[]",
    "very deep": lambda config: "[" * 100_000,
    "deep parts": lambda config: json.dumps(config).replace('"prior": null', '"prior": ' + "[" * 900 + "]" * 900),
    "another library": change("library", "transformers"),
    "no model": change("model", None),
    "a model of numbers": change("model", [1, 2]),
    "another model": change("model.class", "PotentialFlow"),
    "a class of Python": change("model.encoder.class", "os.system"),
    "a class without a name": change("model.encoder.class", ["x"]),
    "a class that is no part": change("model.encoder.class", "Solver"),
    "an unknown argument": change("model.encoder.code", "print()"),
    "a missing argument": change("model.decoder.latent_dim", None),
    "a width of text": change("model.encoder.width", "import os"),
    "a width of 0": change("model.encoder.width", 0),
    "more memory than there is": change("model.encoder.width", 10**9),
    "more than a number of 64 bits": change("model.decoder.width", 10**30),
    "another width": change("model.encoder.width", 17),
    "an unknown solver": change("model.flow.solver.method", "dopri55"),
    "a norm": change("model.flow.solver.options", {"mapping": {"norm": "os.system"}}),
    "a part that is not there": change("model.pde", {"same": "model.nowhere"}),
    "weights of no module": change("model.pde", 3),
    "a tensor for a network": change("model.encoder", {"tensor": [2]}),
    "a tensor of text": change("model.flow.potential", {"tensor": "big"}),
    "a tensor without sizes": change("model.flow.potential", {"tensor": []}),
    "parts that are numbers": change("model.flow.potential", {"class": "SumPotential", "terms": 3}),
    "not a number": change("model.kl_weight", float("nan")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_config(what, saved, tmp_path):
    config, weights = copy.deepcopy(saved[0]), saved[1]
    text = HOSTILE[what](config)
    (tmp_path / hub.CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / hub.WEIGHTS).write_bytes(weights)
    with pytest.raises(cflow.DataError, match=r"^folder: ") as caught:
        cflow.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def without_a_bias(good):
    size = struct.unpack("<Q", good[:8])[0]
    return good[:8] + good[8 : 8 + size].replace(b"encoder.body.1.bias", b"encoder.body.1.bios") + good[8 + size :]


FOREIGN = {
    "nothing": lambda good: b"",
    "half of it": lambda good: good[: len(good) // 2],
    "a header cut short": lambda good: good[:100],
    "a header too long": lambda good: struct.pack("<Q", 2**62) + good[8:],
    "a pickle": lambda good: b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00idtR.",
    "no tensors": lambda good: header(),
    "a tensor of bytes": lambda good: header(x={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}) + b"abcd",
    "another name": without_a_bias,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_weights(what, saved, tmp_path):
    (tmp_path / hub.CONFIG).write_text(json.dumps(saved[0]))
    (tmp_path / hub.WEIGHTS).write_bytes(FOREIGN[what](saved[1]))
    with pytest.raises(cflow.DataError, match=r"^folder: ") as caught:
        cflow.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_that_are_none(saved, tmp_path):
    for folder, error in ((tmp_path / "x", cflow.ArgumentError), (3, cflow.ArgumentTypeError)):
        with pytest.raises(error, match=r"^folder: "):
            FlowVAE.from_pretrained(folder)
    with pytest.raises(cflow.DataError, match=r"no readable config\.json"):
        FlowVAE.from_pretrained(tmp_path)
    (tmp_path / hub.CONFIG).write_text(json.dumps(saved[0]))
    with pytest.raises(cflow.DataError, match="cannot be read as safetensors"):
        FlowVAE.from_pretrained(tmp_path)
    with pytest.raises(
        cflow.DataError, match=r"PotentialFlow, and holds a FlowVAE; use cflow\.FlowVAE\.from_pretrained"
    ):
        PotentialFlow.from_pretrained(tmp_path)


def test_without_safetensors(tmp_path, monkeypatch):
    flow = FLOWS["mlp"]()
    flow.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(cflow.DependencyError, match=r"pip install 'cflow-torch\[weights\]'"):
        PotentialFlow.from_pretrained(tmp_path)


# --- cflow's own weights ---------------------------------------------------------------------------------------


def test_weights_by_name(tmp_path, monkeypatch):
    vae, x0 = cflow.load("digits"), torch.rand(2, 3, 28, 28)
    assert vae.traverse(x0, 1, [0, 4, 8]).shape == (3, 2, 3, 28, 28)
    monkeypatch.chdir(tmp_path)
    nets.build_vae(latent_dim=4, width=16).save_pretrained("digits")
    assert cflow.load("digits").flow.dim == 4  # a folder of that name comes first
    monkeypatch.setattr(cflow.checkpoint, "PLACES", PLACES[:1])  # as an installed wheel has it
    with pytest.raises(cflow.ArgumentError, match=r"'mnist' did not come .* has digits; .*weights/mnist of"):
        cflow.load("mnist")


@pytest.mark.parametrize("name", PRETRAINED)
def test_weights_score_what_their_card_says(name):
    folder = next((place / name for place in PLACES if (place / name).is_dir()), None)
    if folder is None:
        pytest.skip("these weights come with a clone")
    metrics = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"{metrics['equivariance_error/mean']:.1f}" in card
    assert "cflow fit --config " + name in card
    vae = cflow.load(folder)
    assert (vae.flow_posterior is not None) == name.endswith("_weak")


def test_all_weights_are_small():
    sizes = [file.stat().st_size for place in PLACES for file in place.rglob("*") if file.is_file()]
    assert sum(sizes) <= 25e6
    assert sum(file.stat().st_size for file in PLACES[0].rglob("*") if file.is_file()) <= 7e6


@pytest.mark.slow
def test_an_installed_wheel_loads_digits_without_a_network(tmp_path):
    """Built, unpacked into an empty folder, and imported from there, with sockets closed."""
    pytest.importorskip("hatchling")
    build = ["wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= 8e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import socket, torch\n"
        "def closed(*a, **k): raise AssertionError('a network')\n"
        "socket.socket = closed\n"
        "import cflow; assert cflow.__file__.startswith(sys.path[0]), cflow.__file__\n"
        "print(tuple(cflow.load('digits').traverse(torch.rand(2, 3, 28, 28), 1, [0, 4, 8]).shape))\n"
        "try: cflow.load('mnist')\n"
        "except cflow.ArgumentError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    shape, error = done.stdout.splitlines()
    assert shape == "(3, 2, 3, 28, 28)"
    assert "weights/mnist of the repository" in error
