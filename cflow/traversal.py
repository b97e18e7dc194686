"""`LatentTraversal`: flows in the latent space of a generator that is given and stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import cross_entropy

from .checks import not_negative, positive_number
from .errors import ArgumentError, ArgumentTypeError
from .flow import PotentialFlow
from .modes import ordinary, recorded
from .objectives import check_pde
from .pde import PDE
from .selection import SelectionLike
from .times import TimesLike, parse_times

Objective = Callable[[Tensor], Tensor]
NOISE_STEP = 0.125  # frames
CUT_OFF = "no_grad, detach, NumPy or integers cut it off"


class LatentTraversal(nn.Module):
    r"""Learns flows dz/dt = v_k(z, t) of a frozen decoder g, without data: only start states z_0 are needed.

    Guided, by a property h of what is decoded:

    .. math:: loss = −(h_k(g(z_T)) − h_k(g(z_0))) + λ ∫_0^T ½‖v‖² dt

    Unguided, by being told apart: a classifier sees the pair (g(z_0), g(z_t)) for k and t drawn at random, and

    .. math:: loss = −\log q(k|g(z_0), g(z_t)) + 12\, (\hat t − t)²/T² − \frac1K \log \det G + λ ∫_0^T ½‖v‖² dt,
        \quad G_{kl} = ⟨J_g v_k, J_g v_l⟩ \text{ at } (z_t, t)

    The second term is the share of the variance of t that the classifier leaves unexplained. The third is for one flow
    −log ‖J_g v‖²: Jacobian-vector products of the decoder, what is seen of the flows, keep from vanishing; for more it
    keeps them from being alike too, of which a sharp classifier would not complain. It asks for directions alone; how
    far a path goes is up to the energy: at a steady speed these two end √(2T/λ) away. With both an objective and a
    classifier the terms add up.

    The decoder, and an objective that is a module, are frozen: put into eval mode, `requires_grad_(False)`. They are
    no submodules, so that they are neither in `parameters()` nor in `state_dict()`, and `train()` leaves them; `to()`
    moves them along. Gradients pass through them to z.

    References:
        Song, Keller, Sebe, Welling: Latent Traversals in Generative Models as Potential Flows, 2023, arXiv:2304.12944
        (unguided). Wei et al.: Navigating Chemical Space with Latent Flows, 2024, arXiv:2405.03987 (guided).

    Arguments:
        decoder: g, any module z (B, D) -> x (B, …), or a distribution over x, which is taken at its mean.
        flow: the `PotentialFlow` to train.
        objective: h, a function or module x (B, …) -> (B,), or (B, K), a property for each flow. None: unguided.
        pde: an equation of the flow's potential such as `cflow.pde.Wave`, whose loss is added.
        classifier: a module: pairs (B, 2, …) -> (B, K + 1), logits of k, and t/T. None: without an objective a small
            one is made, of two layers.
        energy: λ ≥ 0.
        horizon: T > 0, in frames; paths start at t = 0.
        pde_weight: weight of the equation's loss.

    Raises:
        ArgumentError: negative weights, no positive horizon, an equation of another flow, or a decoder, objective or
            classifier that returns another shape.
        ArgumentTypeError: what is no module.

    Example:
        >>> from cflow import MLPPotential
        >>> decoder = nn.Sequential(nn.Linear(4, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        >>> flow = PotentialFlow(MLPPotential(dim=4, num_flows=3))
        >>> traversal = LatentTraversal(decoder, flow)
        >>> optimizer = torch.optim.Adam(traversal.parameters(), lr=1e-3)
        >>> traversal.loss(torch.randn(16, 4)).backward()
        >>> optimizer.step()
        >>> traversal.traverse(torch.randn(2, 4), 1, t=[0, 4, 8]).shape
        torch.Size([3, 2, 1, 8, 8])
        >>> brighter = LatentTraversal(decoder, flow, objective=lambda x: x.mean((1, 2, 3)), energy=0.1)
        >>> brighter.loss(torch.randn(16, 4)).shape
        torch.Size([])
    """

    decoder: nn.Module
    objective: Objective | None

    def __init__(
        self,
        decoder: nn.Module,
        flow: PotentialFlow,
        *,
        objective: Objective | None = None,
        pde: nn.Module | None = None,
        classifier: nn.Module | None = None,
        energy: float = 1.0,
        horizon: float = 8.0,
        pde_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _check_modules(decoder, flow, objective, classifier)
        for name, weight in (("energy", energy), ("pde_weight", pde_weight)):
            not_negative(name, weight)
        if pde is not None:
            check_pde(pde, flow)
        # set past nn.Module, which would register them: they are not this module's to train, store or switch
        object.__setattr__(self, "decoder", decoder.requires_grad_(False).eval())
        frozen = objective.requires_grad_(False).eval() if isinstance(objective, nn.Module) else objective
        object.__setattr__(self, "objective", frozen)
        self.flow, self.pde = flow, pde
        self.energy, self.pde_weight, self.horizon = energy, pde_weight, positive_number("horizon", horizon)
        self.classifier = classifier if classifier is not None or objective is not None else self._small_classifier()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in (self.decoder, self.objective):
            if isinstance(module, nn.Module):
                module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def loss(self, z0: Tensor, k: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """What to minimise for start states z0 (B, D): a scalar.

        Flows, and the times at which pairs are seen, come from the global generator.

        Arguments:
            z0: start states such as draws of the decoder's prior.
            k: the flows, integers (B,) or an int; None draws one for each sample.

        Raises:
            ArgumentError: no states, other flows, or a decoder or an objective that gives no gradient.
        """
        if not isinstance(z0, Tensor) or z0.ndim != 2 or not len(z0):
            got = tuple(z0.shape) if isinstance(z0, Tensor) else type(z0).__name__
            raise ArgumentError(f"z0: expected start states (B, D), at least one, got {got}")
        batch, flows = len(z0), self.flow.num_flows_at(z0, z0.new_zeros(()), None)
        chosen = torch.randint(flows, (batch,)) if k is None else _flows(k, batch)
        chosen, t = chosen.to(z0.device), self.horizon * torch.rand(batch).to(z0)
        times = torch.stack([torch.zeros_like(t), t, torch.full_like(t, self.horizon)])
        path = self.flow.solve(z0, chosen, times, kinetic_energy=True)
        loss = self.energy * cast(Tensor, path.kinetic_energy)[-1].mean()
        first = self.decode(z0)
        if self.objective is not None:
            loss = loss - (self._property(self.decode(path.z[-1]), chosen) - self._property(first, chosen)).mean()
        if self.classifier is not None:
            guess = self._guess(first, self.decode(path.z[1]))
            loss = loss + cross_entropy(guess[:, :-1], chosen)
            loss = loss + 12 * (guess[:, -1] - t / self.horizon).square().mean() - self._log_volume(path.z[1], t)
        if self.pde is not None:
            loss = loss + self.pde_weight * cast(PDE, self.pde).loss(path.z, chosen, path.t)
        return loss

    def traverse(
        self,
        z0: Tensor,
        k: SelectionLike = None,
        t: TimesLike | None = None,
        noise: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Images (N, B, …) at times t, (N,) or (N, B), along flows from z0 (B, D).

        Arguments:
            k, t: as in `PotentialFlow`.
            noise: σ ≥ 0, in latent units a root of a frame: paths of dz = v dt + σ dW, as of Langevin dynamics, in
                Euler-Maruyama steps of at most an eighth of a frame, each with one draw (B, D). 0: the flow's solver.
            generator: what noise is drawn from; the global generator by default.
        """
        not_negative("noise", noise)
        z = self._noisy(z0, k, t, noise, generator) if noise else self.flow.trajectory(z0, k, t)
        return self.decode(z)

    def decode(self, z: Tensor) -> Tensor:
        """What the decoder makes of states z (…, D): (…, *image), the mean of a distribution."""
        if self.decoder.training:  # somebody else's train()
            self.decoder.eval()
        out = self.decoder(z.reshape(-1, z.shape[-1]))
        x = out.mean if isinstance(out, Distribution) else out
        wanted = z.shape[:-1].numel()
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) != wanted:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"decoder: must return (B, …) with B = {wanted} for z (B, D), got {got}")
        if torch.is_grad_enabled() and z.requires_grad and not x.requires_grad:  # nothing would be learned, in silence
            raise ArgumentError(f"decoder: {type(self.decoder).__name__} gives no gradient by z; {CUT_OFF}")
        return x.view(*z.shape[:-1], *x.shape[1:])

    def _noisy(
        self, z: Tensor, k: SelectionLike, t: TimesLike | None, noise: float, generator: torch.Generator | None
    ) -> Tensor:
        times = parse_times(cast(TimesLike, t), batch=len(z), least=1).values.to(z)
        states = [z]
        for start, step in zip(times[:-1], times.diff(dim=0), strict=True):
            n = math.ceil(step.abs().max().item() / NOISE_STEP)
            for i in range(n):
                dt = (step / n)[..., None]
                draw = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
                z = z + self.flow.velocity(z, k, start + i * step / n) * dt + noise * dt.abs().sqrt() * draw
            states.append(z)
        return torch.stack(states)

    def _log_volume(self, z: Tensor, t: Tensor) -> Tensor:
        """(log det G)/K at states z (B, D) and times t (B,); to cost no more than one flow, at every K-th of them."""
        flows = self.flow.num_flows
        z, t = z[::flows].repeat(flows, 1), t[::flows].repeat(flows)
        k = torch.arange(flows, device=z.device).repeat_interleave(len(z) // flows)
        rows = (
            self._jvp(z, self.flow.velocity(z, k, t)).reshape(flows, len(z) // flows, -1).transpose(0, 1)
        )  # (B / K, K, values)
        gram = rows @ rows.mT
        size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
        gram = gram / size[:, None, None] + 1e-6 * torch.eye(flows).to(gram)  # flows may begin as equal ones
        volume: Tensor = size.log().mean() + torch.linalg.slogdet(gram).logabsdet.mean() / flows
        return volume

    def _jvp(self, z: Tensor, v: Tensor) -> Tensor:
        """J_g v (B, …) at states z (B, D): the derivative by w of wᵀ J_g, along v. Backwards alone, for any decoder."""
        recording = torch.is_grad_enabled()
        with recorded():
            z, v = ordinary(z), ordinary(v)
            z = z if z.requires_grad else z.detach().requires_grad_()
            x = self.decode(z)
            w = torch.zeros_like(x, requires_grad=True)
            (pulled,) = torch.autograd.grad(x, z, w, create_graph=True)
            (change,) = torch.autograd.grad(pulled, w, v, create_graph=recording)
        return change

    def _property(self, x: Tensor, k: Tensor) -> Tensor:
        """h_k(x) (B,)."""
        h: Any = cast(Objective, self.objective)(x)
        if isinstance(h, Tensor) and torch.is_grad_enabled() and x.requires_grad and not h.requires_grad:
            raise ArgumentError(f"objective: gives no gradient by x; {CUT_OFF}")
        if isinstance(h, Tensor) and h.shape == (len(x), self.flow.num_flows):
            return h.gather(1, k[:, None])[:, 0]
        if not isinstance(h, Tensor) or h.shape != (len(x),):
            got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            wanted = f"(B,) = ({len(x)},) or (B, K) = ({len(x)}, {self.flow.num_flows})"
            raise ArgumentError(f"objective: must return {wanted}, got {got}")
        return h

    def _guess(self, first: Tensor, x: Tensor) -> Tensor:
        """What the classifier says of pairs, (B, K + 1)."""
        guess: Any = cast(nn.Module, self.classifier)(torch.stack([first, x], 1))
        shape = (len(x), self.flow.num_flows + 1)
        if not isinstance(guess, Tensor) or guess.shape != shape:
            got = tuple(guess.shape) if isinstance(guess, Tensor) else type(guess).__name__
            raise ArgumentError(f"classifier: must return logits of k and a time, (B, K + 1) = {shape}, got {got}")
        return guess

    def _small_classifier(self) -> nn.Module:
        like = next((p for m in (self.decoder, self.flow) for p in m.parameters()), torch.empty(()))
        with torch.no_grad():
            values = self.decode(like.new_zeros(1, self.flow.dim)).numel()
        return _OfChange(values, self.flow.num_flows + 1).to(like)


class _OfChange(nn.Module):
    """Two layers on the first image of a pair and what has changed."""

    def __init__(self, values: int, outputs: int, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * values, width), nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, pair: Tensor) -> Tensor:
        first, later = pair.reshape(len(pair), 2, -1).unbind(1)
        out: Tensor = self.layers(torch.cat([first, later - first], 1))
        return out


def _flows(k: int | Sequence[int] | Tensor, batch: int) -> Tensor:
    """One flow for each sample, (B,)."""
    try:
        chosen = torch.as_tensor(k)
    except (TypeError, ValueError, RuntimeError):
        chosen = None
    if chosen is None or chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.shape not in ((), (batch,)):
        got = type(k).__name__ if chosen is None else f"{chosen.dtype} of shape {tuple(chosen.shape)}"
        raise ArgumentError(f"k: expected an int or integers (B,) = ({batch},), one flow a sample, got {got}")
    return chosen.expand(batch)


def _check_modules(decoder: object, flow: object, objective: object, classifier: object) -> None:
    if not isinstance(decoder, nn.Module):
        raise ArgumentTypeError(f"decoder: expected an nn.Module z (B, D) -> x (B, …), got {type(decoder).__name__}")
    if not isinstance(flow, PotentialFlow):
        raise ArgumentTypeError(f"flow: expected a cflow.PotentialFlow, got {type(flow).__name__}")
    if objective is not None and not callable(objective):
        raise ArgumentTypeError(
            f"objective: expected a function or module x (B, …) -> (B,) or (B, K), got {type(objective).__name__}"
        )
    if classifier is not None and not isinstance(classifier, nn.Module):
        raise ArgumentTypeError(
            f"classifier: expected an nn.Module (B, 2, …) -> (B, K + 1), got {type(classifier).__name__}"
        )
