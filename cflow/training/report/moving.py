"""Pictures that move: held-out things under every transformation, and under mixtures of them."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from ...data import compose
from ...errors import ArgumentError
from .sprites import sprite
from .subject import Subject

EXAMPLES, MIXED = 4, 2  # things side by side
PIXELS = 3e6  # of a sprite, about; more would make a page that loads slowly
SUBSTEPS = (4, 2)  # pictures a frame
SEEN = 0.02  # a difference of intensities that nobody sees, out of 1
MIXTURES = 400  # at most
AMOUNTS = ((-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0), (-0.5, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0), (0.0, 1.0))


@torch.no_grad()
def traversals(subject: Subject) -> dict[str, Any]:
    """Things under every transformation: the true frames, and those generated, at times between frames too.

    Returns:
        names, labels: of the transformations; examples: things of each; times: of the generated frames; true_times: of
        the true ones; whole: why there are no times between frames, or nothing; made, true: sprites, in the order
        (transformation, thing, time).
    """
    frames, count = subject.times, EXAMPLES
    height, width = subject.data.source.image_shape[1:]
    each = len(subject.names) * height * width
    while count > 1 and each * len(frames) * count > PIXELS:
        count -= 1
    things = subject.things(count, frames)
    t, whole = frames, ""
    for steps in SUBSTEPS:
        between = torch.linspace(float(frames[0]), float(frames[-1]), steps * (len(frames) - 1) + 1)
        if each * len(between) * things.shape[1] > PIXELS:
            whole = "there would be too many images to keep in a page"
        elif not _sees_between(subject, things, steps):
            whole = "the solver is so coarse that the frames themselves would change with them"
        else:
            t, whole = between.to(frames), ""
            break
    composed = subject.test.transformations is not None
    real, made = [], []
    for k in range(len(subject.names)):
        x = subject.true_frames(k, things[k], t if composed else frames)
        real.append(x)
        made.append(_follow(subject, x, k, t))
    shortest = min(x.shape[1] for x in real)
    true_times = (t if composed else frames)[:shortest]
    true = torch.stack([x[:, :shortest] for x in real])
    return {
        "names": subject.names,
        "labels": subject.labels,
        "examples": things.shape[1],
        "times": t.tolist(),
        "true_times": true_times.tolist(),
        "whole": whole,
        "made": sprite(rearrange(made, "k s t ... -> (k s t) ...")),
        "true": sprite(rearrange(true, "k s t ... -> (k s t) ...")),
    }


def _follow(subject: Subject, x: Tensor, k: int, t: Tensor) -> Tensor:
    """Generated frames (S, N, C, H, W) at times t (N,) of things whose true frames are x (S, …, C, H, W)."""
    flow = subject.rows[k].selection(t, subject.flows)
    made = subject.vae.traverse(subject.vae.encoder_input(x), flow, t)
    return rearrange(made, "t s ... -> s t ...")


def _sees_between(subject: Subject, things: Tensor, steps: int) -> bool:
    """Whether times between frames leave the frames as they are: a coarse solver would take other, smaller steps."""
    frames = subject.times
    between = torch.linspace(float(frames[0]), float(frames[-1]), steps * (len(frames) - 1) + 1).to(frames)
    x = subject.true_frames(0, things[0], frames[:1])
    apart = _follow(subject, x, 0, frames) - _follow(subject, x, 0, between)[:, ::steps]
    return float(apart.abs().max()) < SEEN


@torch.no_grad()
def mixtures(subject: Subject) -> dict[str, Any]:
    """Things under several transformations at once, on a grid of weights.

    Weights between 0 and 1, and below 0, say something only where nothing depends on time: else the weights are 0 and
    1, and the time runs.

    Returns:
        names, labels: of the transformations; levels: the weights that each can have; times: of the frames;
        examples: things; made, true: sprites, in the order (thing, weights of the first transformation, …, of the
        last, time), `true` None where the data cannot be composed.

    Raises:
        ArgumentError: one flow, or too many.
    """
    count, horizon = len(subject.names), subject.times[-1:]
    if count == 1:
        raise ArgumentError("there is one flow, which mixes with no other")
    static = not time_dependent(subject)
    options = AMOUNTS if static else AMOUNTS[-1:]
    height, width = subject.data.source.image_shape[1:]
    most = min(MIXTURES, int(PIXELS / (height * width)))
    levels = next((levels for levels in options if len(levels) ** count <= most), None)
    if levels is None:
        raise ArgumentError(f"{len(options[-1])}^{count} mixtures of {count} flows are too many to keep in a page")
    grid = torch.cartesian_prod(*[torch.tensor(levels)] * count).to(subject.device)
    t = subject.times if not static and len(grid) * len(subject.times) <= most else horizon
    examples = max(min(MIXED, int(PIXELS / (height * width * len(grid) * len(t)))), 1)
    things = subject.things(examples, subject.times[:1])[0]
    x = subject.true_frames(0, things, subject.times[:1])
    z0 = subject.vae.encode(subject.vae.encoder_input(x))
    states, weights = repeat(z0, "s d -> (s w) d", w=len(grid)), repeat(grid, "w k -> (s w) k", s=len(z0))
    solved = t if float(t[0]) == 0 else torch.cat([subject.times[:1], t])
    z = subject.vae.flow.trajectory(states, subject.weights(weights).to(z0), solved)[-len(t) :]
    made = rearrange(subject.vae.decode(z), "t b ... -> (b t) ...")
    true = None
    if subject.test.transformations is not None:
        amounts = rearrange(grid[:, None] * t[:, None], "w t k -> (w t) k")
        true = sprite(compose(x[:, 0], amounts, subject.test.transformations).flatten(0, 1))
    return {
        "names": subject.names,
        "labels": subject.labels,
        "levels": list(levels),
        "times": t.tolist(),
        "examples": len(z0),
        "made": sprite(made),
        "true": true,
    }


@torch.no_grad()
def time_dependent(subject: Subject) -> bool:
    """Whether velocities change with time, at the first frames of a few things."""
    first, last = float(subject.times[0]), float(subject.times[-1])
    for k in range(len(subject.names)):
        z = subject.starts(k, EXAMPLES)
        v, *others = (subject.vae.flow.velocity(z, k, t) for t in (first, first + 0.37 * (last - first), last))
        if not all(torch.allclose(v, other, rtol=1e-4, atol=1e-5 * float(v.abs().max())) for other in others):
            return True
    return False
