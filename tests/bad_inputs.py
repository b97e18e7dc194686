"""Calls with bad input of every public name: what `test_bad_inputs.py` makes, and looks for new names in.

A new public name needs a line in `BAD`: the calls that have to fail, each with the class of its error and words that
the message has to hold, the argument's name first. What takes nothing from users stands in `NOTHING`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributions import Normal

import cflow
from cflow import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    IntegrationError,
    composition,
    data,
    interop,
    metrics,
    nets,
    pde,
    plots,
    populations,
)
from cflow.data.stored import Images


class Bad(NamedTuple):
    """A call that has to fail.

    Attributes:
        call: what is called, with a folder that is empty where it takes one.
        error: the class of its error.
        words: what the message holds.
    """

    call: Callable[[], Any] | Callable[[Path], Any]
    error: type[Exception]
    words: str


VALUE, TYPE = ArgumentError, ArgumentTypeError
NAN = float("nan")
SHAPE = (1, 8, 8)
Z, X = torch.zeros(3, 2), torch.rand(3, 4, *SHAPE)
IMAGES = torch.rand(2, 3, 8, 8)
SAMPLE = torch.linspace(0, 1, 10).view(5, 2)
Q, K = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), torch.tensor([0, 1, 0])
MLP = cflow.MLPPotential(2, 2)
FLOW = cflow.PotentialFlow(MLP)
PLANE = cflow.PotentialFlow(cflow.RidgePotential(2))  # of one flow
SNAPSHOTS = populations.Snapshots([SAMPLE, SAMPLE + 1], [0.0, 1.0])
VAE = cflow.FlowVAE(
    nets.MLPEncoder(SHAPE, 4, 16), nets.MLPDecoder(SHAPE, 4, 16), cflow.PotentialFlow(cflow.MLPPotential(4, 2))
)
GIF = torch.rand(2, 4, 1, 8, 8)


class Numbered(Images):
    """Twelve images of one pixel, of a grid of 3 × 4 values."""

    shape = (1, 1, 1)

    def read(self, numbers):
        return numbers.reshape(-1, 1, 1, 1).astype("uint8")


def grid(**settings: Any) -> data.FactorGrid:
    return data.FactorGrid(Numbered(), {"a": 3, "b": 4}, **({"num_frames": 3} | settings))


def vae(**settings: Any) -> cflow.FlowVAE:
    return cflow.FlowVAE(VAE.encoder, VAE.decoder, VAE.flow, **settings)


def fit(flow: Any = PLANE, snapshots: Any = SNAPSHOTS, **settings: Any) -> Any:
    return populations.fit(flow, snapshots, **({"steps": 1, "batch_size": 4} | settings))


def traversal(**settings: Any) -> cflow.LatentTraversal:
    return cflow.LatentTraversal(nn.Linear(2, 4), FLOW, **({"objective": lambda x: x.sum(-1)} | settings))


def index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def sequences(source: data.Sequences) -> list[Bad]:
    """Things and transformations that there are not."""
    times = torch.arange(2.0)
    return [
        Bad(lambda: source.sequences(index(10**6), index(0), times), VALUE, "index: expected numbers from 0 to"),
        Bad(lambda: source.sequences(index(-1), index(0), times), VALUE, "index: expected numbers from 0 to"),
        Bad(lambda: source.sequences(index(0), index(9), times), VALUE, "k: expected numbers from 0 to"),
        Bad(lambda: source.sequences(index(0), torch.tensor([0.5]), times), TYPE, "k: expected a tensor of integers"),
    ]


def factor_set(make: Callable[..., Any]) -> list[Bad]:
    """Of a data set whose factors change."""
    return [
        Bad(lambda folder: make(folder / "none"), DataError, "there is no "),
        Bad(lambda: make(5), TYPE, "data.root: expected the path of a folder, got int"),
    ]


def transformation(function: Callable[..., Any]) -> list[Bad]:
    """Of a function of images and times."""
    return [
        Bad(lambda: function(IMAGES.mul(255).byte(), torch.zeros(2)), TYPE, "expected floating point"),
        Bad(lambda: function(IMAGES[0], torch.zeros(2)), VALUE, "(B, C, H, W)"),
        Bad(lambda: function([1], torch.zeros(2)), TYPE, "got list"),
        Bad(lambda: function(IMAGES, torch.zeros(3)), VALUE, "t: expected one time an image"),
        Bad(lambda: function(IMAGES, torch.full((2,), NAN)), VALUE, "t"),
    ]


def network(make: Callable[..., Any], *rest: Any) -> list[Bad]:
    """Of a network of a shape, a number and perhaps more."""
    return [
        Bad(lambda: make((8, 8), *rest), VALUE, "image_shape: expected"),
        Bad(lambda: make((1, 0, 8), *rest), VALUE, "image_shape: expected"),
        Bad(lambda: make(SHAPE, 0, *rest[1:]), VALUE, "expected an int ≥ 1, got 0"),
    ]


def decoder(make: Callable[..., Any]) -> list[Bad]:
    """Of a network that decodes."""
    return [
        *network(make, 4),
        Bad(
            lambda: make((3, 64, 64), 4, likelihood="gausian"), VALUE, "likelihood: expected 'gaussian' or 'bernoulli'"
        ),
    ]


def sequence_encoder(make: Callable[..., Any]) -> list[Bad]:
    """Of a network that infers flows from sequences."""
    return [
        *network(make, 4, 2),
        Bad(lambda: make(SHAPE, 4, 0), VALUE, "num_flows: expected an int ≥ 1, got 0"),
        Bad(lambda: make((1, 16, 16), 4, 2)(torch.rand(2, 3, 1, 16, 16)), VALUE, "x: expected"),
    ]


def linear_equation(make: Callable[..., Any], name: str) -> list[Bad]:
    """Of an equation with a coefficient."""
    return [
        Bad(lambda: make(5, 1.0), TYPE, "potential: expected"),
        Bad(lambda: make(MLP, -1.0), VALUE, f"{name}: expected a number > 0"),
        Bad(lambda: make(MLP, NAN), VALUE, f"{name}: expected a number > 0"),
        Bad(lambda: make(MLP, 1.0, initial_weight=-1.0), VALUE, "initial_weight: expected a number ≥ 0"),
        Bad(lambda: make(MLP, 1.0).residual(Z, 9, 1.0), VALUE, "k: expected a flow 0 to 1"),
    ]


def plane(draw: Callable[..., Any]) -> list[Bad]:
    """Of a picture of a flow in a plane."""
    deep = cflow.PotentialFlow(cflow.MLPPotential(3))
    return [
        Bad(lambda: draw(5), TYPE, "flow: expected a cflow.PotentialFlow, got int"),
        Bad(lambda: draw(deep), VALUE, "flow: only two latent dimensions"),
        Bad(lambda: draw(FLOW, 9), VALUE, "k: expected a flow 0 to 1"),
        Bad(lambda: draw(PLANE, t="a"), TYPE, "t: expected"),
        Bad(lambda: draw(PLANE, num=0), VALUE, "num"),
        Bad(lambda: draw(PLANE, extent=NAN), VALUE, "extent"),
        Bad(lambda: draw(PLANE, ax=5), TYPE, "ax: expected axes of matplotlib, got int"),
    ]


def of_population(draw: Callable[..., Any]) -> list[Bad]:
    """Of a picture of a flow and snapshots."""
    return [
        Bad(lambda folder: draw(folder, 5, SNAPSHOTS), TYPE, "flow: expected a cflow.PotentialFlow, got int"),
        Bad(lambda folder: draw(folder, PLANE, 5), TYPE, "snapshots: expected cflow.populations.Snapshots, got int"),
        Bad(lambda folder: draw(folder, PLANE, SNAPSHOTS, dims=(0, 7)), VALUE, "dims: expected two coordinates"),
    ]


def traversals(draw: Callable[..., Any]) -> list[Bad]:
    """Of a picture of true and generated frames."""
    return [
        Bad(lambda folder: draw(folder, GIF, GIF[:, :2], ["a", "b"]), VALUE, "shape"),
        Bad(lambda folder: draw(folder, GIF, GIF, ["a"]), VALUE, "names"),
        Bad(lambda folder: draw(folder, GIF, GIF, ["a", "b"], times=[0.0]), VALUE, "times"),
        Bad(lambda folder: draw(folder, GIF[0], GIF[0], ["a", "b"]), VALUE, "true has shape"),
    ]


def damaged(read: Callable[[Path], Any], *errors: Any) -> list[Bad]:
    """Of what reads a file of PyTorch."""

    def foreign(folder: Path) -> Any:
        torch.save({"a": 1}, folder / "x.pt")
        return read(folder / "x.pt")

    def junk(folder: Path) -> Any:
        (folder / "y.pt").write_bytes(b"junk")
        return read(folder / "y.pt")

    return [Bad(foreign, DataError, "x.pt"), Bad(junk, DataError, "y.pt")]


# what takes nothing from users, and so nothing bad
NOTHING = {
    **dict.fromkeys(("ArgumentError", "ArgumentTypeError", "CflowError", "DataError", "DependencyError"), "an error"),
    "IntegrationError": "an error",
    **dict.fromkeys(("ELBO", "FlowPath", "interop.LatentFlow", "populations.Found"), "a result"),
    "__version__": "a constant",
    **dict.fromkeys(("data.PAPER", "data.PERIODS", "data.TRANSFORMATIONS"), "a dict"),
    **dict.fromkeys(("nets.NETWORKS", "nets.POTENTIALS"), "names"),
    **dict.fromkeys(("nets.ImageShape", "nets.Likelihood", "populations.History"), "a type"),
    **dict.fromkeys(("data.Sequences", "nets.SequenceEncoder", "pde.Equation", "populations.Loss"), "abstract"),
    "pde.PDE": "a protocol",
    "populations.embryoid_bodies": "takes no argument",
}

BAD: dict[str, list[Bad]] = {
    # --- potentials and fields --------------------------------------------------------------------------------
    "Potential": [Bad(lambda: cflow.Potential(0, 1), VALUE, "dim: expected an int ≥ 1, got 0")],
    "MLPPotential": [
        Bad(lambda: cflow.MLPPotential(2.5), VALUE, "dim: expected an int ≥ 1, got 2.5"),
        Bad(lambda: cflow.MLPPotential(2, 0), VALUE, "num_flows: expected an int ≥ 1, got 0"),
        Bad(lambda: cflow.MLPPotential(2, hidden=0), VALUE, "hidden: expected an int ≥ 1, got 0"),
    ],
    "RidgePotential": [
        Bad(lambda: cflow.RidgePotential(0), VALUE, "dim: expected an int ≥ 1, got 0"),
        Bad(lambda: cflow.RidgePotential(2, hidden="a"), VALUE, "hidden: expected an int ≥ 1, got 'a'"),
    ],
    "QuadraticPotential": [
        Bad(lambda: cflow.QuadraticPotential(torch.zeros(2, 3)), VALUE, "matrix: expected shape (K, D, D), got (2, 3)"),
        Bad(lambda: cflow.QuadraticPotential(torch.zeros(1, 2, 2).long()), TYPE, "matrix: expected floating point"),
        Bad(lambda: cflow.QuadraticPotential(torch.full((1, 2, 2), NAN)), VALUE, "matrix: expected finite numbers"),
        Bad(
            lambda: cflow.QuadraticPotential(torch.eye(2)[None], torch.zeros(3)), VALUE, "shift: expected shape (K, D)"
        ),
        Bad(lambda: cflow.QuadraticPotential(torch.eye(2)[None], torch.full((1, 2), NAN)), VALUE, "shift: expected"),
    ],
    "RescaledPotential": [
        Bad(lambda: cflow.RescaledPotential(5, torch.zeros(2)), TYPE, "potential: expected a potential"),
        Bad(
            lambda: cflow.RescaledPotential(MLP, torch.zeros(3)),
            VALUE,
            "shift: expected a tensor (D,) = (2,), got (3,)",
        ),
        Bad(lambda: cflow.RescaledPotential(MLP, torch.full((2,), NAN)), VALUE, "shift: expected finite numbers"),
        Bad(lambda: cflow.RescaledPotential(MLP, torch.zeros(2), 0.0), VALUE, "scale: expected a number > 0, got 0.0"),
        Bad(lambda: cflow.RescaledPotential(MLP, torch.zeros(2), unit=NAN), VALUE, "unit: expected a number > 0"),
        Bad(lambda: cflow.RescaledPotential(MLP, torch.zeros(2), start=NAN), VALUE, "start: expected a finite number"),
    ],
    "SumPotential": [
        Bad(lambda: cflow.SumPotential(), VALUE, "terms: expected one (dim, num_flows)"),
        Bad(lambda: cflow.SumPotential(MLP, cflow.MLPPotential(3, 2)), VALUE, "terms: expected one (dim, num_flows)"),
        Bad(lambda: cflow.SumPotential("a"), TYPE, "terms: expected potentials"),
    ],
    "SkewLinear": [
        Bad(lambda: cflow.SkewLinear(0), VALUE, "dim: expected an int ≥ 1, got 0"),
        Bad(lambda: cflow.SkewLinear(2, rank=0), VALUE, "rank: expected an int ≥ 1, got 0"),
        Bad(lambda: cflow.SkewLinear(2) + 5, TYPE, "solenoidal: expected a SkewLinear"),
    ],
    "Solenoidal": [
        Bad(lambda: cflow.Solenoidal(5), TYPE, "psi: expected an nn.Module"),
        Bad(lambda: cflow.Solenoidal(cflow.MLPPotential(2, 3), num_terms=2), VALUE, "psi: expected K·M columns"),
        Bad(lambda: cflow.Solenoidal(MLP, num_terms=0), VALUE, "num_terms: expected an int ≥ 1, got 0"),
    ],
    # --- flows: more of them in test_errors.py ----------------------------------------------------------------
    "PotentialFlow": [
        Bad(lambda: cflow.PotentialFlow(None), VALUE, "potential: None leaves nothing that moves"),
        Bad(lambda: cflow.PotentialFlow(MLP, solenoidal=nn.Identity()), TYPE, "solenoidal: expected a SkewLinear"),
        Bad(lambda: cflow.PotentialFlow(MLP, solenoidal=cflow.SkewLinear(3, 2)), VALUE, "solenoidal: has dim=3"),
        Bad(lambda: cflow.PotentialFlow(MLP, compile="stp"), VALUE, "compile: expected False, True or 'step'"),
        Bad(lambda: cflow.PotentialFlow(nn.Linear(2, 1))(Z, None, (0.0, 1.0)), VALUE, "potential: Linear failed"),
        Bad(lambda: FLOW(Z, 7, (0.0, 1.0)), VALUE, "k: expected a flow 0 to 1"),
        Bad(lambda: FLOW(Z * NAN, 0, (0.0, 1.0)), IntegrationError, "z0: expected finite states"),
        Bad(lambda: FLOW.velocity(Z, 0, 0.0, part="grad"), VALUE, "part: expected 'gradient'"),
        Bad(lambda: FLOW.solve(Z, 0, (0.0, 1.0), growth=5), TYPE, "growth: expected an nn.Module"),
        Bad(lambda: FLOW.solve(Z, 0, (0.0, 1.0), growth=nn.Linear(2, 1)), VALUE, "growth: Linear failed"),
        Bad(lambda folder: cflow.PotentialFlow.from_pretrained(folder / "none"), VALUE, "folder: there is no folder"),
    ],
    "FlowTransform": [
        Bad(lambda: cflow.FlowTransform(nn.Identity(), 0, (0.0, 1.0)), TYPE, "flow: expected a cflow.PotentialFlow"),
        Bad(lambda: cflow.FlowTransform(FLOW, 0, 1.0), VALUE, "t: expected at least two times"),
        Bad(lambda: cflow.FlowTransform(FLOW, 5, (0.0, 1.0))(Z), VALUE, "k: expected a flow 0 to 1, got 5"),
        Bad(lambda: cflow.FlowTransform(FLOW, 0, (0.0, 1.0))(torch.zeros(3, 5)), VALUE, "z0: expected shape (B, D)"),
    ],
    "Schedule": [
        Bad(lambda: cflow.Schedule([0.0], []), VALUE, "times: expected S + 1 ≥ 2 boundaries"),
        Bad(lambda: cflow.Schedule([0.0, NAN], [0]), VALUE, "times[1]: expected finite times, got nan"),
        Bad(lambda: cflow.Schedule("ab", [0]), TYPE, "times: expected times in frames"),
        Bad(lambda: cflow.Schedule([0.0, 1.0], 5), TYPE, "selections: expected a sequence"),
        Bad(lambda: FLOW(Z, cflow.Schedule([0.0, 1.0], ["a"]), (0.0, 1.0)), TYPE, "k: selections[0]: expected None"),
    ],
    "Solver": [
        Bad(lambda: cflow.Solver("dopri55"), VALUE, "method: unknown solver 'dopri55'. Did you mean 'dopri5'"),
        Bad(lambda: cflow.Solver(5), TYPE, "method: expected the name of a solver, got int"),
        Bad(lambda: cflow.Solver("rk4"), VALUE, "step_size: the fixed-step method 'rk4' needs one"),
    ],
    "DiffusionPrior": [
        Bad(lambda: cflow.DiffusionPrior("2"), VALUE, "dim: expected an int ≥ 1, got '2'"),
        Bad(lambda: cflow.DiffusionPrior(2, initial=NAN), VALUE, "initial: expected a number > 0, got nan"),
        Bad(lambda: cflow.DiffusionPrior(2, 2)(5, 1.0), VALUE, "k: expected a flow 0 to 1, got 5"),
        Bad(lambda: cflow.DiffusionPrior(2, 2)(0, NAN), VALUE, "t: expected finite times, got nan"),
    ],
    "SpikeSlab": [
        Bad(lambda: cflow.SpikeSlab(0.0, 0.0, 0.0), VALUE, "scale: expected finite ones > 0"),
        Bad(lambda: cflow.SpikeSlab(NAN, 0.0, 1.0), VALUE, "logits: expected log-odds"),
        Bad(lambda: cflow.SpikeSlab("a", 0.0, 1.0), TYPE, "logits: expected a number or a floating-point tensor"),
        Bad(lambda: cflow.SpikeSlab(torch.zeros(2), torch.zeros(3), 1.0), VALUE, "logits, loc, scale: expected shapes"),
    ],
    # --- models -----------------------------------------------------------------------------------------------
    "FlowVAE": [
        Bad(lambda: cflow.FlowVAE("e", VAE.decoder, VAE.flow), TYPE, "encoder: expected an nn.Module, got str"),
        Bad(
            lambda: cflow.FlowVAE(VAE.encoder, VAE.decoder, nn.Identity()), TYPE, "flow: expected a cflow.PotentialFlow"
        ),
        Bad(lambda: vae(kl_weight=NAN), VALUE, "kl_weight: expected a finite number ≥ 0, got nan"),
        Bad(lambda: vae(encode_frames=0), VALUE, "encode_frames: expected an int ≥ 1, got 0"),
        Bad(lambda: vae(inference="marginl", flow_posterior=nn.Identity()), VALUE, "inference: expected 'marginal'"),
        Bad(lambda: VAE.elbo(X, 7), VALUE, "k: expected a flow 0 to 1, got 7"),
        Bad(lambda: VAE.elbo(X.mul(255).byte(), 0), TYPE, "x: expected floating point"),
        Bad(lambda: VAE.elbo(X * NAN, 0), VALUE, "x: NaN or infinity"),
        Bad(lambda: VAE.elbo(X, 0, t=[0.0, 1.0]), VALUE, "t: expected one time a frame, 4, got 2"),
        Bad(lambda: VAE.infer_flow(X), VALUE, "exact: the model has no flow_posterior"),
        Bad(lambda: VAE.sample(-1, 0, [0.0, 1.0]), VALUE, "n: expected a number of samples ≥ 0, got -1"),
        Bad(
            lambda: vae(inference="marginal", flow_posterior=nn.Identity(), flow_prior=torch.ones(3)),
            VALUE,
            "flow_prior: expected probabilities (K,) = (2,), got shape (3,)",
        ),
    ],
    "LatentTraversal": [
        Bad(lambda: cflow.LatentTraversal("d", FLOW), TYPE, "decoder: expected an nn.Module"),
        Bad(lambda: traversal(objective=5), TYPE, "objective: expected a function or module"),
        Bad(lambda: traversal(energy=-1.0), VALUE, "energy: expected a number ≥ 0, got -1.0"),
        Bad(lambda: traversal(horizon=0.0), VALUE, "horizon: expected a number > 0, got 0.0"),
        Bad(lambda: traversal(objective=lambda x: x.sum()).loss(Z), VALUE, "objective: must return (B,) = (3,)"),
        Bad(lambda: traversal().loss(Z * NAN), IntegrationError, "z0: expected finite states"),
        Bad(lambda: traversal().traverse(Z, 0, [0.0, 1.0], noise=-1), VALUE, "noise: expected a number ≥ 0, got -1"),
    ],
    "load": [
        Bad(lambda: cflow.load("digitz"), VALUE, "path: there is no file or folder 'digitz'"),
        Bad(lambda: cflow.load(5), TYPE, "path: expected the path of a run or a checkpoint, got int"),
        *damaged(cflow.load),
    ],
    "interop.load_latent_flow": [
        Bad(lambda folder: interop.load_latent_flow(folder / "none"), VALUE, "path: there is no file"),
        *damaged(interop.load_latent_flow),
    ],
    # --- equations --------------------------------------------------------------------------------------------
    "pde.HamiltonJacobi": [
        Bad(lambda: pde.HamiltonJacobi(5, MLP), TYPE, "potential: expected"),
        Bad(lambda: pde.HamiltonJacobi(MLP, 5), TYPE, "force: expected an nn.Module"),
        Bad(
            lambda: pde.HamiltonJacobi(MLP, cflow.MLPPotential(2, 3)),
            VALUE,
            "force: has num_flows=3, but the potential",
        ),
        Bad(lambda: pde.HamiltonJacobi(MLP, MLP, drift=5), TYPE, "drift: expected a part"),
        Bad(
            lambda: pde.HamiltonJacobi(MLP, MLP, drift=nn.Identity()).residual(Z, 0, 1.0),
            VALUE,
            "drift: Identity failed",
        ),
        Bad(lambda: pde.HamiltonJacobi(MLP, MLP, initial_weight=NAN), VALUE, "initial_weight: expected a number ≥ 0"),
        Bad(lambda: pde.HamiltonJacobi(MLP, MLP).residual(Z, 9, 1.0), VALUE, "k: expected a flow 0 to 1"),
        Bad(
            lambda: pde.HamiltonJacobi(cflow.MLPPotential(2, time_dependent=False), cflow.MLPPotential(2)),
            VALUE,
            "potential: MLPPotential does not depend on t",
        ),
    ],
    "pde.FokkerPlanck": [
        *linear_equation(lambda u, c, **more: pde.FokkerPlanck(u, MLP, c, **more), "diffusion")[:-1],
        Bad(lambda: pde.FokkerPlanck(MLP, 5, 1.0), TYPE, "log_density: expected a module or function"),
        Bad(
            lambda: pde.FokkerPlanck(MLP, lambda z: z, 1.0).residual(Z, 0, 1.0),
            VALUE,
            "log_density: the function failed",
        ),
        Bad(lambda: pde.FokkerPlanck(MLP, lambda z, t: z, 1.0).residual(Z, 0, 1.0), VALUE, "log_density: must return"),
    ],
    "pde.Heat": linear_equation(pde.Heat, "diffusion"),
    "pde.Wave": linear_equation(pde.Wave, "speed"),
    # --- networks ---------------------------------------------------------------------------------------------
    "nets.MLPEncoder": [
        *network(nets.MLPEncoder, 4),
        Bad(lambda: nets.MLPEncoder(SHAPE, 4, -1), VALUE, "width: expected an int ≥ 1, got -1"),
        Bad(lambda: VAE.encoder(torch.rand(2, 3, 8, 8)), VALUE, "x: expected frames of shape (1, 8, 8)"),
        Bad(lambda: VAE.encoder(torch.zeros(2, *SHAPE).byte()), TYPE, "x: expected floating point"),
    ],
    "nets.MLPDecoder": [*decoder(nets.MLPDecoder), Bad(lambda: nets.MLPDecoder(SHAPE, 4, 0), VALUE, "width: expected")],
    "nets.ConvDecoder": [
        *decoder(nets.ConvDecoder),
        Bad(lambda: nets.ConvDecoder(SHAPE, 4, 0), VALUE, "width: expected"),
    ],
    "nets.PaperEncoder": network(nets.PaperEncoder, 4),
    "nets.PaperDecoder": decoder(nets.PaperDecoder),
    "nets.MLPSequenceEncoder": sequence_encoder(nets.MLPSequenceEncoder),
    "nets.ConvSequenceEncoder": sequence_encoder(nets.ConvSequenceEncoder),
    "nets.PairEncoder": [
        Bad(lambda: nets.PairEncoder((8, 8), 2), VALUE, "image_shape: expected"),
        Bad(lambda: nets.PairEncoder(SHAPE, 0), VALUE, "num_flows: expected an int ≥ 1, got 0"),
        Bad(lambda: nets.PairEncoder(SHAPE, 2, 0), VALUE, "width: expected an int ≥ 1, got 0"),
        Bad(lambda: nets.PairEncoder(SHAPE, 2)(X[:, :1]), VALUE, "x: expected sequences of two frames or more"),
    ],
    "nets.Encoder": [
        Bad(lambda: nets.Encoder(5, SHAPE), TYPE, "body: expected an nn.Module"),
        Bad(lambda: nets.Encoder(nn.Flatten(), (8, 8)), VALUE, "image_shape: expected"),
        Bad(lambda: nets.Encoder(nn.Identity(), SHAPE)(X[:, 0]), VALUE, "body: must return means and log-variances"),
    ],
    "nets.Decoder": [
        Bad(lambda: nets.Decoder(5, SHAPE), TYPE, "body: expected an nn.Module"),
        Bad(lambda: nets.Decoder(nn.Identity(), SHAPE, "x"), VALUE, "likelihood: expected 'gaussian'"),
        Bad(lambda: nets.Decoder(nn.Linear(2, 60), SHAPE)(Z), VALUE, "body: must return images (M, C, H, W)"),
    ],
    "nets.NormalEncoder": [
        Bad(lambda: nets.NormalEncoder(5), TYPE, "net: expected an nn.Module, got int"),
        Bad(lambda: nets.NormalEncoder(nn.Identity(), read=5), TYPE, "read: expected a function"),
        Bad(lambda: nets.NormalEncoder(nn.Identity())(Z), TYPE, "net: Identity must return a mean and a log-variance"),
    ],
    "nets.NormalDecoder": [
        Bad(lambda: nets.NormalDecoder(5), TYPE, "net: expected an nn.Module, got int"),
        Bad(lambda: nets.NormalDecoder(nn.Identity(), scale=NAN), VALUE, "scale: expected a number > 0, got nan"),
        Bad(lambda: nets.NormalDecoder(nn.Identity(), read=lambda out: 5)(Z), TYPE, "net: Identity must return means"),
    ],
    "nets.GlobalScaleNormal": [
        Bad(lambda: nets.GlobalScaleNormal([0.0], torch.zeros(())), TYPE, "loc, log_scale: expected tensors"),
        Bad(lambda: nets.GlobalScaleNormal(Z, torch.zeros(5)), TYPE, "loc, log_scale: expected tensors"),
    ],
    "nets.ModelConfig": [
        Bad(lambda: nets.ModelConfig(latent_dim=0).build(), VALUE, "latent_dim"),
        Bad(lambda: nets.ModelConfig(network="mpl").build(), VALUE, "mpl"),
        Bad(lambda: nets.ModelConfig(potential="rigde").build(), VALUE, "potential: expected mlp, ridge"),
        Bad(lambda: nets.ModelConfig(image_shape=[3, 0, 2]).build(), VALUE, "image_shape"),
    ],
    "nets.build_potential": [
        Bad(lambda: nets.build_potential("rigde", 2, 1), VALUE, "potential: expected mlp, ridge"),
        Bad(lambda: nets.build_potential("ridge", 0, 1), VALUE, "dim: expected an int ≥ 1, got 0"),
    ],
    "nets.build_solenoidal": [
        Bad(lambda: nets.build_solenoidal("skw", 2, 1), VALUE, "skw"),
        Bad(lambda: nets.build_solenoidal("skew", 0, 1), VALUE, "dim: expected an int ≥ 1, got 0"),
    ],
    "nets.build_vae": [
        Bad(lambda: nets.build_vae(latentdim=3), TYPE, "latentdim: build_vae has no such option. Did you mean")
    ],
    # --- measures and compositions ----------------------------------------------------------------------------
    "metrics.equivariance_error": [
        Bad(lambda: metrics.equivariance_error(FLOW, X, 0), TYPE, "vae: expected a cflow.FlowVAE, got PotentialFlow"),
        Bad(lambda: metrics.equivariance_error(VAE, X, 9), VALUE, "k: expected a flow 0 to 1"),
        Bad(lambda: metrics.equivariance_error(VAE, X[0], 0), VALUE, "x: expected"),
        Bad(lambda: metrics.equivariance_error(VAE, X * NAN, 0), VALUE, "x: NaN or infinity"),
        Bad(lambda: metrics.equivariance_error(VAE, X, 0, [0.0, 1.0]), VALUE, "t: expected one time a frame"),
    ],
    "metrics.copy_input": [
        Bad(lambda: metrics.copy_input([1]), VALUE, "x: expected sequences (B, T+1, …), got list"),
        Bad(lambda: metrics.copy_input(X, encode_frames=9), VALUE, "encode"),
        Bad(lambda: metrics.copy_input(X, encode_frames=0), VALUE, "encode_frames: expected an int ≥ 1, got 0"),
    ],
    "metrics.black": [
        Bad(lambda: metrics.black(torch.rand(3)), VALUE, "x"),
        Bad(lambda: metrics.black(X.mul(255).byte()), TYPE, "x: expected floating point"),
        Bad(lambda: metrics.black(X, encode_frames=0), VALUE, "encode_frames: expected an int ≥ 1, got 0"),
    ],
    "metrics.no_flow": [
        Bad(lambda: metrics.no_flow(5, X), TYPE, "vae: expected a cflow.FlowVAE, got int"),
        Bad(lambda: metrics.no_flow(VAE, X[0]), VALUE, "x: expected"),
    ],
    "metrics.baselines": [Bad(lambda: metrics.baselines(5, X), TYPE, "vae: expected a cflow.FlowVAE, got int")],
    "metrics.log_likelihood": [
        Bad(lambda: metrics.log_likelihood(5, X, 0, num_samples=2), TYPE, "vae: expected a cflow.FlowVAE, got int"),
        Bad(lambda: metrics.log_likelihood(VAE, X, 0, num_samples=0), VALUE, "num_samples: expected an int ≥ 1, got 0"),
        Bad(lambda: metrics.log_likelihood(VAE, X, 9, num_samples=2), VALUE, "k: expected a flow 0 to 1"),
    ],
    "metrics.log_likelihood_bound": [
        Bad(lambda: metrics.log_likelihood_bound(5), TYPE, "vae: expected a cflow.FlowVAE, got int"),
        Bad(lambda: metrics.log_likelihood_bound(VAE, 0), VALUE, "num_frames: expected an int ≥ 1, got 0"),
    ],
    "metrics.reconstruction_l1": [
        Bad(lambda: metrics.reconstruction_l1(5, X[:, 0]), TYPE, "vae: expected a cflow.FlowVAE, got int"),
        Bad(lambda: metrics.reconstruction_l1(VAE, X), VALUE, "x: expected frames of shape"),
    ],
    "metrics.not_gradient": [
        Bad(lambda: metrics.not_gradient(5, Z, 0), TYPE, "flow: expected a cflow.PotentialFlow, got int"),
        Bad(lambda: metrics.not_gradient(FLOW, torch.zeros(3, 5), 0), VALUE, "z: expected shape (B, D)"),
        Bad(lambda: metrics.not_gradient(FLOW, Z, 0, t=[0.0, 1.0]), VALUE, "t: expected one time"),
    ],
    "metrics.parts_along_paths": [
        Bad(lambda: metrics.parts_along_paths(5, X, 0), TYPE, "vae: expected a cflow.FlowVAE, got int"),
        Bad(lambda: metrics.parts_along_paths(VAE, X[0], 0), VALUE, "x: expected"),
    ],
    "metrics.flow_accuracy": [
        Bad(lambda: metrics.flow_accuracy([1], [1]), TYPE, "q: expected probabilities (N, K)"),
        Bad(lambda: metrics.flow_accuracy(Q, K[:2]), VALUE, "q, k: expected (N, K) and (N,)"),
        Bad(lambda: metrics.flow_accuracy(Q, K + 5), VALUE, "k: expected transformations 0 to 1, got 5 to 6"),
        Bad(lambda: metrics.flow_accuracy(Q * NAN, K), VALUE, "q: expected probabilities"),
    ],
    "metrics.expected_calibration_error": [
        Bad(lambda: metrics.expected_calibration_error(Q, K, bins=0), VALUE, "bins: expected an int ≥ 1, got 0"),
        Bad(lambda: metrics.expected_calibration_error(3 * Q, K), VALUE, "q: expected probabilities"),
        Bad(lambda: metrics.expected_calibration_error(Q[:0], K[:0]), VALUE, "q, k: expected (N, K) and (N,)"),
    ],
    "metrics.matching_accuracy": [
        Bad(lambda: metrics.matching_accuracy(Q, Q > 0.5), TYPE, "on: expected booleans, such as q.probs > 0.5"),
        Bad(lambda: metrics.matching_accuracy(Q[:, :1] > 0.5, Q > 0.5), VALUE, "on, true: expected (…, K) and (…, M)"),
    ],
    "metrics.match_flows": [
        Bad(
            lambda: metrics.match_flows([1.0], Q), TYPE, "found: expected floating-point columns, one a flow, got list"
        ),
        Bad(lambda: metrics.match_flows(Q, Q[:2]), VALUE, "found, truth: expected (N, K) and (N, K*)"),
        Bad(lambda: metrics.match_flows(Q * NAN, Q), VALUE, "found: expected finite values"),
    ],
    "metrics.spike_f1": [
        Bad(lambda: metrics.spike_f1(Q, Q > 0.5, K[:2]), TYPE, "on: expected booleans"),
        Bad(
            lambda: metrics.spike_f1(Q > 0.5, Q > 0.5, K), VALUE, "on, truth, flows: expected (N, K), (N, K*) and (K*,)"
        ),
        Bad(lambda: metrics.spike_f1(Q > 0.5, Q > 0.5, [0, 1]), TYPE, "flows: expected integers (K*,), got list"),
        Bad(lambda: metrics.spike_f1(Q > 0.5, Q > 0.5, K[:2] + 5), VALUE, "flows: expected flows 0 to 1, or −1"),
    ],
    "metrics.psnr": [
        Bad(lambda: metrics.psnr([1.0], IMAGES), TYPE, "made"),
        Bad(lambda: metrics.psnr(IMAGES, IMAGES[:1]), VALUE, "made, x: expected images (…, C, H, W) of one shape"),
    ],
    "metrics.ssim": [
        Bad(lambda: metrics.ssim(IMAGES, IMAGES), VALUE, "x: SSIM needs images of at least 11 × 11 pixels, got (8, 8)"),
        Bad(lambda: metrics.ssim(IMAGES, 5), TYPE, "x"),
    ],
    "metrics.vp_score": [
        Bad(lambda: metrics.vp_score(5, IMAGES), TYPE, "vae: expected a cflow.FlowVAE, got int"),
        Bad(lambda: metrics.vp_score(VAE, [1]), TYPE, "x0"),
        Bad(lambda: metrics.vp_score(VAE, IMAGES, horizon=NAN), VALUE, "horizon"),
        Bad(lambda: metrics.vp_score(VAE, IMAGES, few=2.0), VALUE, "few: 2.0 of 600 pairs leaves none"),
    ],
    "composition.Composition": [
        Bad(lambda: composition.Composition(()), VALUE, "weights: expected pieces of K numbers"),
        Bad(lambda: composition.Composition(((1.0, 0.0), (1.0,)), (0.0, 1.0)), VALUE, "weights: expected pieces"),
        Bad(lambda: composition.Composition(((NAN, 0.0),)), VALUE, "weights: expected a finite number, got nan"),
        Bad(lambda: composition.Composition(((1.0, 0.0),), (0.0, 1.0)), VALUE, "starts: expected 1 times"),
        Bad(lambda: composition.Composition(((1.0,), (2.0,)), (1.0, 0.0)), VALUE, "starts: expected 2 times that incr"),
    ],
    "composition.single": [
        Bad(lambda: composition.single(5, 3), VALUE, "k, chosen: expected some of 0 to 2"),
        Bad(lambda: composition.single(-1, 3), VALUE, "k, chosen: expected some of 0 to 2"),
    ],
    "composition.together": [
        Bad(lambda: composition.together([0, 5], 3), VALUE, "k, chosen: expected some of 0 to 2"),
        Bad(lambda: composition.together([], 3), VALUE, "k, chosen: expected some of 0 to 2"),
        Bad(lambda: composition.together([0, 0], 3), VALUE, "each once, got [0, 0]"),
    ],
    "composition.one_after_another": [
        Bad(lambda: composition.one_after_another([0, 9], 3, [0.0, 1.0]), VALUE, "k, chosen: expected some of 0 to 2"),
        Bad(lambda: composition.one_after_another([0, 1], 3, [0.0]), VALUE, "starts: expected 2 times"),
    ],
    "composition.errors": [
        Bad(lambda: composition.errors(FLOW, X[:, 0], data.PAPER), TYPE, "vae: expected a cflow.FlowVAE"),
        Bad(
            lambda: composition.errors(VAE, X[:, 0], data.PAPER, num_frames=1), VALUE, "num_frames=1 must be at least 2"
        ),
        Bad(
            lambda: composition.errors(VAE, X[:, 0], {"a": data.scaling, "b": data.rotation}, flows=[0]),
            VALUE,
            "flows: expected each of 0 to 1 once",
        ),
    ],
    "composition.flow_weights": [
        Bad(lambda: composition.flow_weights([1.0], [0]), TYPE, "given: expected a tensor (…, K), got list"),
        Bad(lambda: composition.flow_weights(torch.ones(2), [0, 0]), VALUE, "flows: expected each of 0 to 1 once"),
        Bad(lambda: composition.flow_weights(torch.ones(2), torch.zeros(3, 2)), VALUE, "flows: expected weights (2,"),
        Bad(lambda: composition.flow_weights(torch.ones(2), torch.full((2, 3), NAN)), VALUE, "flows: expected finite"),
    ],
    # --- data -------------------------------------------------------------------------------------------------
    "data.Digits": [
        Bad(lambda: data.Digits().split("trian"), VALUE, "split: expected one of train, val, test, got 'trian'"),
        Bad(lambda: data.Digits(num_frames=0), VALUE, "num_frames: expected an int ≥ 1, got 0"),
        Bad(lambda: data.Digits(transformations={"a": 5}), TYPE, "transformations: expected a dict name → function"),
        *sequences(data.Digits().split("test")),
    ],
    "data.MNIST": [
        Bad(lambda: data.MNIST(transformations={}), TYPE, "transformations: expected a dict name → function"),
        Bad(lambda: data.MNIST(num_frames="9"), VALUE, "num_frames: expected an int ≥ 1, got '9'"),
    ],
    "data.Stills": [
        Bad(lambda: data.Stills(5), TYPE, "images: expected a tensor or a function, got int"),
        Bad(lambda: data.Stills(torch.rand(4, 8, 8)), VALUE, "images: expected (N, C, H, W), got (4, 8, 8)"),
        Bad(lambda: data.Stills(torch.rand(0, *SHAPE)), TYPE, "images: expected some"),
        Bad(lambda: data.Stills(torch.zeros(4, *SHAPE).long()), TYPE, "images: expected some, uint8 or floating point"),
        Bad(lambda: data.Stills(torch.full((4, *SHAPE), NAN)), VALUE, "images: expected finite numbers in [0, 1]"),
        *sequences(data.Stills(IMAGES)),
    ],
    "data.FactorGrid": [
        Bad(lambda: data.FactorGrid(np.zeros((12, 8, 8)), {"a": 3}), TYPE, "images: expected cflow.data.stored.Images"),
        Bad(lambda: data.FactorGrid(Numbered(), {}), TYPE, "sizes: expected a dict"),
        Bad(lambda: grid(factors=["c"]), VALUE, "data.factors: 'c' is none of a, b"),
        Bad(lambda: grid(factors=["a", "a"]), VALUE, "data.factors: expected some factors, each once"),
        Bad(lambda: grid(num_frames=0), VALUE, "num_frames: expected an int ≥ 1, got 0"),
        Bad(lambda: grid(num_frames=9), DataError, "no factor has as many values as data.num_frames=9"),
        *sequences(data.FactorGrid(Numbered(), {"a": 4, "b": 5, "c": 6}, num_frames=4).split("test")),
    ],
    **{
        f"data.{name}": factor_set(getattr(data, name))
        for name in ("DSprites", "Falcor3D", "Isaac3D", "Shapes3D", "ImageFolder", "SequenceFolder")
    },
    "data.make_factor_files": [
        Bad(lambda folder: data.make_factor_files("shapes", folder), VALUE, "kind: expected one of"),
        Bad(lambda folder: data.make_factor_files("shapes3d", folder, [1]), VALUE, "sizes: expected how many values"),
        Bad(lambda: data.make_factor_files("shapes3d", 5), TYPE, "root: expected the path of a folder, got int"),
    ],
    "data.as_transformations": [
        Bad(lambda: data.as_transformations("scalng"), VALUE, "Did you mean 'scaling'"),
        Bad(lambda: data.as_transformations({"a": 5}), TYPE, "expected a dict name → function"),
        Bad(lambda: data.as_transformations("hue,hue"), VALUE, "expected each name once"),
    ],
    **{
        f"data.{name}": transformation(getattr(data, name))
        for name in ("blur", "contrast", "hue", "perspective", "rotation", "scaling", "shear", "translation")
    },
    "data.compose": [
        Bad(lambda: data.compose([1], torch.zeros(2, 3)), TYPE, "got list"),
        Bad(lambda: data.compose(IMAGES, torch.zeros(2, 9)), VALUE, "amounts: expected (N, K) or (B, N, K)"),
        Bad(lambda: data.compose(IMAGES, torch.full((2, 3), NAN)), VALUE, "amounts"),
        Bad(lambda: data.compose(IMAGES, torch.zeros(2, 3), order=[0, 1, 9]), VALUE, "order: expected some of 0 to 2"),
        Bad(lambda: data.compose(IMAGES, torch.zeros(2, 3), order=[0, 0]), VALUE, "order: expected some of 0 to 2"),
    ],
    "data.make_sequence": [
        Bad(lambda: data.make_sequence(IMAGES, 7, [0.0, 1.0]), VALUE, "k"),
        Bad(lambda: data.make_sequence(IMAGES.mul(255).byte(), 0, [0.0]), TYPE, "expected floating point"),
        Bad(lambda: data.make_sequence(IMAGES, 0, [0.0, NAN]), VALUE, "t"),
        Bad(lambda: data.make_sequence(IMAGES, torch.tensor([0.5, 0.5]), [0.0]), TYPE, "k"),
        Bad(lambda: data.make_sequence(IMAGES, 0, [0.0], {"a": 5}), TYPE, "transformations"),
    ],
    "data.constant_speeds": [
        Bad(lambda: data.constant_speeds(index(5), 1, 3), VALUE, "k: expected numbers from 0 to 2, got 5 to 5"),
        Bad(lambda: data.constant_speeds(torch.tensor([0.5]), 1, 3), TYPE, "k: expected a tensor of integers"),
        Bad(lambda: data.constant_speeds(index(0), 0, 3), VALUE, "intervals: expected an int ≥ 1, got 0"),
    ],
    "data.draw_speeds": [
        Bad(lambda: data.draw_speeds(3, 2, 1), VALUE, "count: expected two transformations or more"),
        Bad(lambda: data.draw_speeds(-1, 2, 3), VALUE, "batch: expected an int ≥ 1, got -1"),
        Bad(lambda: data.draw_speeds(2, 0, 3), VALUE, "intervals: expected an int ≥ 1, got 0"),
    ],
    "data.mixed_sequence": [
        Bad(lambda: data.mixed_sequence(IMAGES, [1], torch.arange(3.0)), TYPE, "speeds: expected a tensor (B, S, K)"),
        Bad(
            lambda: data.mixed_sequence(IMAGES, torch.zeros(3, 4, 3), torch.arange(3.0)),
            VALUE,
            "speeds: expected (B, S",
        ),
        Bad(
            lambda: data.mixed_sequence(IMAGES, torch.zeros(2, 4, 3), [0.0, 9.0]),
            VALUE,
            "t: expected times within [0, 4]",
        ),
        Bad(lambda: data.mixed_sequence(IMAGES, torch.zeros(2, 4, 3), [NAN]), VALUE, "t"),
    ],
    # --- pictures ---------------------------------------------------------------------------------------------
    "plots.density": [
        Bad(lambda: plots.density(5), TYPE, "distribution: expected a torch.distributions.Distribution, got int"),
        Bad(lambda: plots.density(Normal(torch.zeros(2), 1.0)), VALUE, "distribution: expected event shape (2,)"),
    ],
    "plots.potential_surface": [
        *plane(plots.potential_surface),
        Bad(lambda: plots.potential_surface(PLANE, paths=5), VALUE, "paths: expected a FlowPath"),
    ],
    "plots.velocity_field": plane(plots.velocity_field),
    "plots.trajectories": [
        Bad(lambda: plots.trajectories(5), VALUE, "paths: expected a FlowPath"),
        Bad(lambda: plots.trajectories(torch.zeros(3, 4)), VALUE, "paths"),
        Bad(lambda: plots.trajectories(torch.zeros(3, 4, 2), groups=[0]), VALUE, "groups"),
        Bad(lambda: plots.trajectories(torch.zeros(3, 4, 2), ax=5), TYPE, "ax: expected axes of matplotlib, got int"),
    ],
    "plots.training_curves": [
        Bad(lambda: plots.training_curves(5), TYPE, "curves: expected a dict name → values"),
        Bad(lambda: plots.training_curves({}), VALUE, "curves: there are none to draw"),
        Bad(lambda: plots.training_curves({"a": "xyz"}), TYPE, "curves: expected numbers, got 'xyz'"),
        Bad(lambda: plots.training_curves({"loss": [1.0]}, names=["los"]), VALUE, "Did you mean 'loss'"),
        Bad(lambda: plots.training_curves({"a": [1.0]}, smooth=0), VALUE, "smooth: expected a number of values >= 1"),
        Bad(lambda folder: plots.training_curves(folder), VALUE, "curves: no TensorBoard files"),
    ],
    "plots.work_precision": [
        Bad(lambda: plots.work_precision(5), TYPE, "points: expected dicts, one a point, got int"),
        Bad(lambda: plots.work_precision([]), VALUE, "points: there are none to draw"),
        Bad(lambda: plots.work_precision([{"nfe": 1}]), VALUE, "points: one has no 'method'"),
        Bad(
            lambda: plots.work_precision([{"method": "rk4", "nfe": "x", "error": 1.0}]),
            TYPE,
            "points: expected a number for 'nfe', got 'x'",
        ),
    ],
    "plots.traversal_grid": traversals(lambda folder, *args, **more: plots.traversal_grid(*args, **more)),
    "plots.traversal_animation": [
        *traversals(lambda folder, *args, **more: plots.traversal_animation(folder / "a.gif", *args, **more)),
        Bad(lambda folder: plots.traversal_animation(folder / "a.xyz", GIF, GIF, ["a", "b"]), VALUE, "path: expected"),
        Bad(
            lambda: plots.traversal_animation("a.gif", GIF, GIF, ["a", "b"], duration=-5), VALUE, "duration=-5 must be"
        ),
    ],
    "plots.population_landscape": [
        *of_population(lambda folder, *args, **more: plots.population_landscape(*args, **more)),
        Bad(lambda: plots.population_landscape(PLANE, SNAPSHOTS, num=0), VALUE, "num"),
    ],
    "plots.population_marginals": of_population(
        lambda folder, *args, **more: plots.population_marginals(*args, **more)
    ),
    "plots.population_animation": [
        *of_population(lambda folder, *args, **more: plots.population_animation(folder / "p.gif", *args, **more)),
        Bad(lambda: plots.population_animation("p.gif", PLANE, SNAPSHOTS, frames=0), VALUE, "frames"),
    ],
    # --- populations ------------------------------------------------------------------------------------------
    "populations.Snapshots": [
        Bad(lambda: populations.Snapshots([], []), VALUE, "x: expected at least one snapshot"),
        Bad(lambda: populations.Snapshots("ab", [0.0, 1.0]), TYPE, "x: expected a list of snapshots"),
        Bad(lambda: populations.Snapshots([SAMPLE, SAMPLE], [0.0]), VALUE, "t"),
        Bad(lambda: populations.Snapshots([SAMPLE, SAMPLE], [1.0, 0.0]), VALUE, "t"),
        Bad(lambda: populations.Snapshots([SAMPLE, SAMPLE[:, :1]], [0.0, 1.0]), VALUE, "x[1]"),
        Bad(lambda: populations.Snapshots([SAMPLE, SAMPLE * NAN], [0.0, 1.0]), VALUE, "x[1]"),
        Bad(lambda: SNAPSHOTS.without(9), VALUE, "9"),
        Bad(lambda folder: populations.Snapshots.from_file(folder / "x.csv"), VALUE, "path: there is no file"),
        Bad(lambda: populations.Snapshots.from_anndata(5, "X_pca", "day"), TYPE, "adata"),
    ],
    "populations.fit": [
        Bad(lambda: fit(5), TYPE, "flow: expected"),
        Bad(lambda: fit(snapshots=5), TYPE, "snapshots: expected"),
        Bad(lambda: fit(cflow.PotentialFlow(cflow.RidgePotential(3))), VALUE, "D = "),
        Bad(lambda: fit(loss="machting"), VALUE, "Did you mean 'matching'"),
        Bad(lambda: fit(steps=0), VALUE, "steps: expected an int ≥ 1, got 0"),
        Bad(lambda: fit(batch_size=0), VALUE, "batch_size: expected an int ≥ 1, got 0"),
        Bad(lambda: fit(lr=NAN), VALUE, "lr: expected a number > 0, got nan"),
        Bad(lambda: fit(seed="a"), TYPE, "seed: expected an int, got str"),
        Bad(lambda: fit(on_step=5), TYPE, "on_step: expected a function"),
        Bad(lambda: fit(regulariser=lambda flow, z, t: z), VALUE, "regulariser: must return a tensor of shape ()"),
        Bad(lambda: fit(regulariser=lambda flow, z, t: z.sum() * NAN), VALUE, "loss: became nan at step 1 of 1"),
        Bad(lambda: fit(growth=5), TYPE, "growth: expected an nn.Module"),
    ],
    "populations.Matching": [
        Bad(lambda: populations.Matching(NAN), VALUE, "noise: expected a number ≥ 0, got nan"),
        Bad(lambda: populations.Matching(coupling="exac"), VALUE, "Did you mean 'exact'"),
        Bad(lambda: populations.Matching(interpolant=5), TYPE, "interpolant: expected a name or a function, got int"),
    ],
    "populations.ActionMatching": [
        Bad(lambda: populations.ActionMatching("a"), VALUE, "noise: expected a number ≥ 0, got 'a'"),
        Bad(lambda: populations.ActionMatching(coupling=5), TYPE, "coupling: expected a name or a function, got int"),
    ],
    "populations.Arcs": [
        Bad(lambda: populations.Arcs(NAN), VALUE, "bend: expected"),
        Bad(lambda: populations.Arcs(neighbours=0), VALUE, "neighbours: expected an int ≥ 1, got 0"),
    ],
    "populations.Transport": [Bad(lambda: populations.Transport(p=NAN), VALUE, "p: expected")],
    "populations.Sinkhorn": [
        Bad(lambda: populations.Sinkhorn(blur=0.0), VALUE, "blur: expected a number > 0, got 0.0")
    ],
    "populations.Likelihood": [
        Bad(lambda: populations.Likelihood(base=5), TYPE, "base: expected"),
        Bad(lambda: fit(loss=populations.Likelihood(snapshot=9)), VALUE, "snapshot: expected the number of one of 2"),
    ],
    "populations.Objective": [
        Bad(lambda: populations.Objective("matching"), TYPE, "loss: expected a cflow.populations.Loss"),
        Bad(
            lambda: populations.Objective(populations.Matching(), -1.0),
            VALUE,
            "energy: expected a number ≥ 0, got -1.0",
        ),
        Bad(
            lambda: populations.Objective(populations.Matching(), regulariser=5),
            TYPE,
            "regulariser: expected a function",
        ),
    ],
    "populations.Task": [
        Bad(lambda: populations.Task(5, 3), TYPE, "snapshots: expected cflow.populations.Snapshots, got int"),
        Bad(lambda: populations.Task(SNAPSHOTS, 0), VALUE, "batch_size: expected an int ≥ 1, got 0"),
    ],
    "populations.annotate": [Bad(lambda: populations.annotate(5, PLANE), TYPE, "adata")],
    "populations.gaussian": [
        Bad(lambda: populations.gaussian(torch.zeros(1, 2)), VALUE, "base: one member alone has no covariance"),
        Bad(lambda: populations.gaussian(torch.zeros(3)), VALUE, "base: expected a sample (N, D)"),
        Bad(lambda: populations.gaussian(SAMPLE * NAN), VALUE, "base: holds NaN or infinity"),
    ],
    "populations.recipe": [Bad(lambda: populations.recipe(0), VALUE, "dim: expected an int ≥ 1, got 0")],
    "populations.wasserstein": [
        Bad(lambda: populations.wasserstein(SAMPLE, SAMPLE[:, :1]), VALUE, "y: expected samples (M, D) with D = 2"),
        Bad(lambda: populations.wasserstein(SAMPLE, SAMPLE, p=NAN), VALUE, "p: expected a number ≥ 1, got nan"),
        Bad(lambda: populations.wasserstein(SAMPLE * NAN, SAMPLE), VALUE, "x: holds NaN or infinity"),
        Bad(lambda: populations.wasserstein(SAMPLE[:0], SAMPLE), VALUE, "x: expected a sample (N, D)"),
    ],
    "populations.sinkhorn_divergence": [
        Bad(lambda: populations.sinkhorn_divergence(5, SAMPLE), TYPE, "x: expected a tensor (N, D), got int"),
        Bad(lambda: populations.sinkhorn_divergence(SAMPLE, SAMPLE[:, :1]), VALUE, "y: expected samples (M, D)"),
        Bad(lambda: populations.sinkhorn_divergence(SAMPLE * NAN, SAMPLE), VALUE, "x: holds NaN or infinity"),
        Bad(lambda: populations.sinkhorn_divergence(SAMPLE[:0], SAMPLE), VALUE, "x: expected a sample (N, D)"),
        Bad(lambda: populations.sinkhorn_divergence(SAMPLE, SAMPLE, blur=0.0), VALUE, "blur: expected a number > 0"),
        Bad(lambda: populations.sinkhorn_divergence(SAMPLE, SAMPLE, a=torch.ones(3)), VALUE, "a: expected weights ≥ 0"),
        Bad(
            lambda: populations.sinkhorn_divergence(SAMPLE, SAMPLE, b=-torch.ones(5)), VALUE, "b: expected weights ≥ 0"
        ),
    ],
    "populations.transport_plan": [
        Bad(lambda: populations.transport_plan(5), VALUE, "cost: expected a tensor (N, M)"),
        Bad(lambda: populations.transport_plan(torch.zeros(0, 2)), VALUE, "cost: expected a tensor (N, M)"),
        Bad(lambda: populations.transport_plan(SAMPLE * NAN), VALUE, "cost: expected finite numbers"),
        Bad(
            lambda: populations.transport_plan(SAMPLE, a=torch.ones(2)), VALUE, "a: expected weights ≥ 0 of shape (5,)"
        ),
    ],
}
