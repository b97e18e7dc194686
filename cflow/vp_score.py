"""The VP score: whether a small network that saw few examples tells from two images what happened between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import float_images, instance, positive_int, positive_number
from .errors import ArgumentError
from .modes import ordinary, recorded
from .vae import FlowVAE

WIDTH, STEPS = 16, 100
LEAST = 4  # pixels of an image's sides: two convolutions halve them


def vp_score(
    vae: FlowVAE,
    x0: Tensor,
    *,
    horizon: float = 8.0,
    num_pairs: int = 600,
    few: float = 0.05,
    seed: int = 0,
) -> tuple[float, float]:
    """Few-shot accuracy of naming the flow between an image and one that the model makes of it, and its standard error.

    Pairs are the reconstruction of an image and where a flow k, drawn evenly, takes it within a time drawn from the
    last half of the horizon. A network of two convolutions learns k from the *difference* of a few of them; the score
    is its accuracy on the others. Chance is 1/K. It says how predictable, and so how distinct, the flows are; not
    whether they are what the data show: three flows of an untrained model can be told apart too.

    Arguments:
        vae: the model; put it into eval mode first.
        x0: frames (B, C, H, W) that are encoded; several pairs begin at each.
        horizon: the longest time, in frames, from 0.
        num_pairs: pairs N.
        few: the part of them that is learned from.
        seed: of all that is drawn; the global generator is left alone.

    Raises:
        ArgumentError, ArgumentTypeError: a part that leaves nothing to learn from or to test on, no frames, ones below
            4 × 4 pixels, no such model, or a horizon that is not positive.

    References:
        Zhu, Xu, Tao: Learning disentangled representations with latent variation predictability, 2020,
        arXiv:2007.12885, §4.

    Example:
        >>> from cflow import nets
        >>> vae = nets.build_vae(latent_dim=4, width=16).eval()
        >>> score, error = vp_score(vae, torch.rand(5, 3, 28, 28), num_pairs=100, few=0.2)
        >>> 0 <= score <= 1 and 0 <= error < 0.1
        True
    """
    instance("vae", vae, FlowVAE, "a cflow.FlowVAE")
    x0, horizon = float_images("x0", x0), positive_number("horizon", horizon)
    num_pairs, few = positive_int("num_pairs", num_pairs), positive_number("few", few)
    seen = round(few * num_pairs)
    if not 0 < seen < num_pairs:
        raise ArgumentError(f"few: {few!r} of {num_pairs} pairs leaves none to learn from, or none to test on")
    if vae.encode_frames is not None or x0.ndim != 4 or not len(x0):
        raise ArgumentError(f"x0: expected frames (B, C, H, W) of a model that encodes one, got {tuple(x0.shape)}")
    if min(x0.shape[-2:]) < LEAST:
        raise ArgumentError(f"x0: expected images of at least {LEAST} × {LEAST} pixels, got {tuple(x0.shape[-2:])}")
    generator = torch.Generator().manual_seed(seed)
    k = torch.arange(num_pairs) % vae.flow.num_flows
    part = 1 - torch.rand(num_pairs, generator=generator) / 2
    k, part = k[torch.randperm(num_pairs, generator=generator)].to(x0.device), part.to(x0)
    with torch.no_grad():
        z = vae.encode(x0)[torch.arange(num_pairs, device=x0.device) % len(x0)]
        end = horizon * part.to(z)
        moved = vae.flow(z, k, (torch.zeros_like(end), end))
        difference = vae.decode(moved) - vae.decode(z)
    with recorded(), torch.autocast(x0.device.type, enabled=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, k = ordinary(difference).float(), ordinary(k)
        net = _learned(x[:seen], k[:seen], vae.flow.num_flows)
        with torch.no_grad():
            right = (net(x[seen:]).argmax(-1) == k[seen:]).double()
    score = float(right.mean())
    return score, (score * (1 - score) / len(right)) ** 0.5


def _learned(x: Tensor, k: Tensor, num_flows: int) -> nn.Module:
    """A network that tells k (N,) from images x (N, C, H, W)."""
    net = nn.Sequential(
        *(nn.Conv2d(x.shape[1], WIDTH, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * (x.shape[2] // 4) * (x.shape[3] // 4), num_flows),
    ).to(x.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), k).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net
