"""Checkpoints of the original research code of Flow Factorized Representation Learning (KingJamesSong/latent-flow)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from .checkpoint import read_checkpoint
from .errors import ArgumentError, ArgumentTypeError, DataError
from .flow import PotentialFlow
from .nets import PaperDecoder, PaperEncoder
from .pde import HamiltonJacobi
from .potentials import MLPPotential
from .priors import DiffusionPrior
from .solve import Solver
from .vae import FlowVAE

State = dict[str, Tensor]
# the layers that are not numbered behind the convolutions
HEADS = ("encoder.linear_means", "encoder.linear_log_var")


@dataclass(frozen=True)
class LatentFlow:
    """A model of the original code.

    Attributes:
        flow: its flows, stepped as there: one Euler step a frame.
        vae: all of it. Weakly supervised, it has a `flow_posterior`.
        iteration: of its training.
    """

    flow: PotentialFlow
    vae: FlowVAE
    iteration: int


def load_latent_flow(path: str | os.PathLike[str]) -> LatentFlow:
    """Read a checkpoint of the original code, supervised or weakly supervised, in float32 and in eval mode.

    There frame 0 is encoded and the steps are z ← z + ∇u_k(z, t), t = 1 .. T, so that **frame t is the state at time
    t + 1**: ask for `vae.traverse(x0, k, t=[1, 2, …, T + 1])`. Any other solver or step can be had by
    `PotentialFlow(loaded.flow.net, solver=…)`. The stored prior is of no use; diffusion coefficients are 1.

    Arguments:
        path: the file; only tensors and plain values are read.

    Raises:
        ArgumentError, ArgumentTypeError: there is no such file.
        DataError: it is damaged, or no checkpoint of the original code for square images.

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167.

    Example:
        >>> load_latent_flow("nowhere.pth")
        Traceback (most recent call last):
        ...
        cflow.errors.ArgumentError: path: there is no file 'nowhere.pth'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"path: expected the path of a checkpoint, got {type(path).__name__}")
    if not Path(path).is_file():
        raise ArgumentError(f"path: there is no file {str(path)!r}")
    content = read_checkpoint(Path(path))
    try:
        with torch.random.fork_rng(devices=[]):
            return _made(content)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise DataError(f"path: {str(path)!r} is no checkpoint of the original code: {what}") from None


def _made(content: Mapping[str, object]) -> LatentFlow:
    sets, vae_state = _state(content, "support_sets"), _state(content, "vae")
    potential = _potential(sets, "MLP_SET")
    dim, flows = potential.dim, potential.num_flows
    pde = None
    if any(key.startswith("FORCE_SET.") for key in sets):
        pde = HamiltonJacobi(potential, _potential(sets, "FORCE_SET"))
    encoder, decoder = _autoencoder(vae_state, dim)
    flow = PotentialFlow(potential, solver=Solver("euler", step_size=1.0))
    posterior = None
    if "reconstructor" in content:
        posterior = _SequencePosterior(_state(content, "reconstructor"), encoder.image_shape[0], flows)
    prior = DiffusionPrior(dim, flows, initial=1.0)
    vae = FlowVAE(encoder, decoder, flow, prior=prior, pde=pde, flow_posterior=posterior)
    iteration = content.get("iter", 0)
    return LatentFlow(flow, vae.eval(), iteration if isinstance(iteration, int) else 0)


def _state(content: Mapping[str, object], part: str) -> State:
    """The tensors of a part, in float32, without the prefix that `DataParallel` gives them."""
    state = content[part]
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise TypeError(f"{part} holds no named tensors")
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in state.values()):
        raise TypeError(f"{part} holds what is no tensor of floating point")
    return {key.removeprefix("module."): value.float() for key, value in state.items()}


def _potential(state: State, group: str) -> MLPPotential:
    """The networks of a group, `<group>.<k>.<layer>.weight`, in one stack."""
    found = {int(m[1]) for key in state if (m := re.fullmatch(rf"{group}\.(\d+)\..+", key))}
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"{group}: expected networks 0, 1, …, got {sorted(found)}")

    def stacked(layer: str, what: str) -> Tensor:
        return torch.stack([state[f"{group}.{k}.{layer}.{what}"] for k in sorted(found)])

    dim = state[f"{group}.0.layer_x.weight"].shape[1]
    if dim < 8 or dim % 2:
        raise ValueError(f"{group}: D = {dim}; expected an even number of at least 8 latent dimensions")
    net = MLPPotential(dim, len(found), output_tanh=True)
    time = "time."
    _load(
        net,
        {
            "w1": stacked("layer_x", "weight").flatten(0, 1),
            "b1": stacked("layer_x", "bias").flatten(),
            f"{time}w1": stacked("layer_time", "weight").flatten(0, 1),
            f"{time}b1": stacked("layer_time", "bias").flatten(),
            f"{time}w2": stacked("layer_time2", "weight"),
            f"{time}b2": stacked("layer_time2", "bias")[:, None],
            "w2": stacked("layer_fusion", "weight"),
            "b2": stacked("layer_fusion", "bias")[:, None],
            "a": stacked("layer_out", "weight"),
            "b": stacked("layer_out", "bias").flatten(),
        },
    )
    return net


def _autoencoder(state: State, dim: int) -> tuple[PaperEncoder, PaperDecoder]:
    """Encoder and decoder, for images of the size that the convolution over all that is left has."""
    convolutions, transposed = _numbered(state, "encoder.encoder."), _numbered(state, "decoder.decoder.")
    kernels = [state[f"encoder.encoder.{i}.weight"].shape for i in convolutions]
    halved = 2 ** sum(shape[-1] == 4 for shape in kernels[:-3])  # by the strided ones, before the last three
    shape = (kernels[0][1], halved * kernels[-3][2], halved * kernels[-3][3])
    encoder, decoder = PaperEncoder(shape, dim), PaperDecoder(shape, dim, "bernoulli")
    names = [f"encoder.encoder.{i}" for i in convolutions]
    bodies = (encoder.body, names), (decoder.body, [f"decoder.decoder.{i}" for i in transposed])
    unknown = {key.rpartition(".")[0] for key in state} - {*HEADS, *bodies[0][1], *bodies[1][1]}
    if unknown:
        raise ValueError(f"vae has an unknown layer {min(unknown)!r}")
    joined = {what: torch.cat([state[f"{head}.{what}"] for head in HEADS]) for what in ("weight", "bias")}
    layers = {f"head.{what}": value for what, value in joined.items()} | state
    for body, names in bodies:
        _load_in_order(body, [*names, *(["head"] if body is encoder.body else [])], layers)
    return encoder, decoder


class _SequencePosterior(nn.Module):
    """q(k|x) of the original code: convolutions over all frames stacked as channels, then a linear layer.

    Arguments:
        state: its tensors.
        channels: C of a frame.
        num_flows: K.
    """

    def __init__(self, state: State, channels: int, num_flows: int) -> None:
        super().__init__()
        shapes = [state[f"encoder.{i}.weight"].shape for i in _numbered(state, "encoder.")]
        if shapes[0][1] % channels or state["linear1.weight"].shape[0] != num_flows:
            raise ValueError(f"reconstructor: expected {num_flows} flows, and frames of {channels} channels")
        layers: list[nn.Module] = []
        for i, (out, fan_in, *kernel) in enumerate(shapes):
            # those before the last three see neighbours; these all that is left, and one place
            stride, padding = {3: (1, 1), 4: (2, 1)}[kernel[0]] if i < len(shapes) - 3 else (1, 0)
            layers += [nn.Conv2d(fan_in, out, (kernel[0], kernel[1]), stride, padding), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1], nn.Flatten(), nn.Linear(shapes[-1][0], num_flows))
        self.num_frames = shapes[0][1] // channels
        _load_in_order(self.body, [*(f"encoder.{i}" for i in _numbered(state, "encoder.")), "linear1"], state)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of sequences x (B, T+1, C, H, W)."""
        if x.shape[1] != self.num_frames:
            raise ArgumentError(f"x: expected sequences of {self.num_frames} frames, got {x.shape[1]}")
        logits: Tensor = self.body(rearrange(x, "b t c h w -> b (t c) h w"))
        return logits


def _numbered(state: State, prefix: str) -> list[int]:
    """The numbers of the layers below a prefix, rising."""
    found = {int(m[1]) for key in state if (m := re.fullmatch(rf"{re.escape(prefix)}(\d+)\.weight", key))}
    if len(found) < 4:
        raise ValueError(f"expected the layers {prefix}0, …, got {len(found)} of them")
    return sorted(found)


def _load_in_order(body: nn.Module, names: list[str], state: State) -> None:
    """Load layers of these names into those of a body that have weights, in their order."""
    own = [name for name, module in body.named_modules() if isinstance(getattr(module, "weight", None), Tensor)]
    if len(own) != len(names):
        raise ValueError(f"expected {len(own)} layers, got {len(names)}: {names[0]} … {names[-1]}")
    pairs = list(zip(own, names, strict=True))
    _load(body, {f"{name}.{what}": state[f"{stored}.{what}"] for name, stored in pairs for what in ("weight", "bias")})


def _load(module: nn.Module, state: State) -> None:
    for name, value in module.state_dict().items():
        if name in state and value.shape != state[name].shape:
            got, wanted = tuple(state[name].shape), tuple(value.shape)
            raise ValueError(f"a layer has shape {got}, where {type(module).__name__} {name} has {wanted}")
    module.load_state_dict(state)
