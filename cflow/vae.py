"""`FlowVAE`: a generic variational autoencoder whose latent state moves along potential flows."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from .errors import ArgumentError, ArgumentTypeError
from .flow import FlowPath, PotentialFlow
from .pde import HamiltonJacobi
from .priors import DiffusionPrior
from .selection import SelectionLike
from .times import TimesLike, as_time_tensor, parse_times


@dataclass(frozen=True)
class ELBO:
    """The terms of an evidence lower bound, unweighted, in nats a sequence, averaged over the batch.

    Attributes:
        reconstruction: E Σ_t log p(x_t | z_t).
        kl: KL(q(z_0|x_0) ‖ p(z_0)).
        path_kl: Σ_{t≥1} E[log q_t(z_t) − log p_t(z_t)]; None where its weight is 0.
        hj: the Hamilton-Jacobi loss; None where its weight is 0.
        flow_kl: KL(q(k|x) ‖ uniform); None where k is given.
        value: the bound: reconstruction − kl (− flow_kl).
        loss: −reconstruction + Σ weight · term, what to minimise.
    """

    reconstruction: Tensor
    kl: Tensor
    path_kl: Tensor | None
    hj: Tensor | None
    flow_kl: Tensor | None
    value: Tensor
    loss: Tensor


class FlowVAE(nn.Module):
    r"""A VAE over sequences: encode the first frame, flow its latent state, decode every frame.

    .. math:: \log p(x_{0..T}|k) ≥ Σ_t E_q[\log p(x_t|z_t)] − KL(q(z_0|x_0) ‖ p(z_0)), \quad z_t = flow_k(z_0)

    Any modules that return `torch.distributions` objects will do. log-probabilities and KLs are summed over everything
    but frames and batch, with or without `Independent`.

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167, §3.

    Arguments:
        encoder: x (B, …) -> distribution over z (B, D), with `rsample`.
        decoder: z (…, D) -> distribution over x (…, *image).
        flow: the `PotentialFlow`.
        prior: a `DiffusionPrior` for the path KL; None makes one where `path_kl_weight` is not 0. At the first time
            it is N(0, I) either way.
        pde: a `HamiltonJacobi` for `pde_weight`.
        kl_weight, path_kl_weight, pde_weight: weights in `ELBO.loss`. Terms of weight 0 are not computed.
        flow_posterior: x (B, T+1, …) -> logits (B, K) of q(k|x): k becomes latent where `elbo` is called with k=None.

    Raises:
        ArgumentError: a weight without its module, negative weights, or a prior or pde of another flow.
        ArgumentTypeError: what is no module; its parameters would not be trained.

    Example:
        >>> from cflow import MLPPotential, nets
        >>> flow = PotentialFlow(MLPPotential(dim=8, num_flows=3), solver="dopri5")
        >>> vae = FlowVAE(nets.MLPEncoder((1, 8, 8), 8), nets.MLPDecoder((1, 8, 8), 8), flow)
        >>> x = torch.rand(4, 3, 1, 8, 8)  # four sequences of three frames
        >>> vae.elbo(x, torch.tensor([0, 1, 2, 0])).loss.shape
        torch.Size([])
        >>> vae.traverse(x[:, 0], 1, t=[0, 1, 2]).shape
        torch.Size([3, 4, 1, 8, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        flow: PotentialFlow,
        *,
        prior: DiffusionPrior | None = None,
        pde: HamiltonJacobi | None = None,
        kl_weight: float = 1.0,
        path_kl_weight: float = 0.0,
        pde_weight: float = 0.0,
        flow_posterior: nn.Module | None = None,
    ) -> None:
        super().__init__()
        weights = {"kl_weight": kl_weight, "path_kl_weight": path_kl_weight, "pde_weight": pde_weight}
        for name, weight in weights.items():
            if not isinstance(weight, numbers.Real):
                raise ArgumentTypeError(f"{name}: expected a finite number ≥ 0, got {type(weight).__name__} {weight!r}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ArgumentError(f"{name}: expected a finite number ≥ 0, got {weight!r}")
        if not isinstance(flow, PotentialFlow):
            raise ArgumentTypeError(f"flow: expected a cflow.PotentialFlow, got {type(flow).__name__}")
        modules = {"encoder": encoder, "decoder": decoder}
        optional = {"prior": prior, "pde": pde, "flow_posterior": flow_posterior}
        for name, module in (modules | {name: m for name, m in optional.items() if m is not None}).items():
            if not isinstance(module, nn.Module):
                got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
                raise ArgumentTypeError(f"{name}: expected an nn.Module, got {got}; its parameters need one to be seen")
        if path_kl_weight and prior is None:
            prior = DiffusionPrior(flow.dim, flow.num_flows)
        _check_weights(path_kl_weight, prior, pde_weight, pde)
        _check_same_flow(flow, prior, pde)
        self.encoder, self.decoder, self.flow = encoder, decoder, flow
        self.prior, self.pde, self.flow_posterior = prior, pde, flow_posterior
        self.kl_weight, self.path_kl_weight, self.pde_weight = kl_weight, path_kl_weight, pde_weight
        self.temperature = 1.0  # of the straight-through Gumbel-softmax; anneal it while training

    def elbo(
        self,
        x: Tensor,
        k: SelectionLike = None,
        t: TimesLike | None = None,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> ELBO:
        """The evidence lower bound of sequences, and what to minimise.

        Arguments:
            x: sequences (B, T+1, …); the first frame is encoded.
            k: a selection of flows, as in `PotentialFlow`; None with a `flow_posterior` makes it latent.
            t: times of the frames, (T+1,) or (T+1, B), in frames; 0..T by default.
            mask: (B, T+1). Boolean: False drops a frame from the reconstruction. Numbers ≥ 0: multiply the frame's
                log-probability, so that a random subset of m frames weighted by (T+1)/m stays unbiased.
                Only frames of non-zero weight are decoded.
            context: (B, …), handed to a user's potential.

        A latent k is drawn from q(k|x) by a straight-through Gumbel-softmax in training, and is the most probable one
        in evaluation.

        Raises:
            ArgumentError: shapes of x, t, mask or of a module's distribution that do not go together.
        """
        if not isinstance(x, Tensor) or x.ndim < 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"x: expected sequences (B, T+1, …), got {got}; add a frame dimension with x[:, None]")
        if not len(x) or not x.shape[1]:
            raise ArgumentError(f"x: expected at least one sequence of one frame (B, T+1, …), got {tuple(x.shape)}")
        _check_weights(self.path_kl_weight, self.prior, self.pde_weight, self.pde)
        batch, frames = x.shape[:2]
        times = parse_times(range_of(frames) if t is None else t, batch=batch, least=1)
        if len(times) != frames:
            raise ArgumentError(f"t: expected one time a frame, {frames}, got {len(times)}")
        k, flow_kl = self._infer_flow(x, k)
        posterior = self.posterior(x[:, 0])
        z0 = posterior.rsample()
        path = self.flow.solve(z0, k, times, log_density=self.path_kl_weight > 0, context=context)
        reconstruction = self._reconstruction(x, path.z, mask).sum(0).mean()
        kl = _kl_to_standard_normal(posterior, z0).mean()
        value = reconstruction - kl
        loss = -reconstruction + self.kl_weight * kl
        path_kl = hj = None
        if flow_kl is not None:
            value, loss = value - flow_kl, loss + flow_kl
        if self.path_kl_weight:
            path_kl = self._path_kl(posterior, path, k).mean()
            loss = loss + self.path_kl_weight * path_kl
        if self.pde_weight:
            hj = cast(HamiltonJacobi, self.pde).loss(path.z, k, path.t, context)
            loss = loss + self.pde_weight * hj
        return ELBO(reconstruction, kl, path_kl, hj, flow_kl, value, loss)

    def encode(self, x: Tensor, *, sample: bool = False) -> Tensor:
        """Latent states (B, D) of frames x (B, …): the posterior mean, or a draw."""
        posterior = self.posterior(x)
        return posterior.rsample() if sample else posterior.mean

    def decode(self, z: Tensor) -> Tensor:
        """Images (…, *image), the decoder's mean, of latent states z (…, D)."""
        dim = getattr(self.flow.net, "dim", None)
        if not isinstance(z, Tensor) or z.ndim == 0 or (dim is not None and z.shape[-1] != dim):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ArgumentError(
                f"z: expected latent states (…, D){'' if dim is None else f' with D = {dim}'}, got {got}"
            )
        return self._likelihood(z).mean

    def traverse(
        self,
        x0: Tensor,
        k: SelectionLike = None,
        t: TimesLike | None = None,
        *,
        sample: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        """Images (N, B, *image) at times t: encode frames x0 (B, …), flow, decode."""
        return self.decode(self.flow.trajectory(self.encode(x0, sample=sample), k, t, context))

    def sample(
        self, n: int, k: SelectionLike = None, t: TimesLike | None = None, *, context: Tensor | None = None
    ) -> Tensor:
        """Images (N, n, *image) at times t, along flows that start from n draws of the prior N(0, I)."""
        if not isinstance(n, numbers.Integral) or n < 0:
            raise ArgumentError(f"n: expected a number of samples ≥ 0, got {n!r}")
        z0 = torch.randn_like(zero_states(self, int(n)))
        return self.decode(self.flow.trajectory(z0, k, t, context))

    def log_prob_frames(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x_t | z_t) for frames x (*lead, …) and states z (*lead, D): shape `lead`, in nats."""
        lead = z.shape[:-1]
        if not lead.numel():  # where a mask keeps nothing; `Independent` cannot sum over events of an empty batch
            return z.new_zeros(lead)
        p = self._likelihood(z)
        shape = p.batch_shape + p.event_shape
        if shape != x.shape:
            raise ArgumentError(
                f"decoder: its distribution has shape {tuple(shape)} for z of shape {tuple(z.shape)}, but the frames "
                f"have {tuple(x.shape)}"
            )
        return sum_rest(p.log_prob(x), len(lead))

    def posterior(self, x0: Tensor) -> Distribution:
        """q(z_0|x_0) over latent states (B, D) of frames x0 (B, …), checked."""
        q = self.encoder(x0)
        if not isinstance(q, Distribution) or not q.has_rsample:
            raise ArgumentTypeError(
                f"encoder: expected it to return a Distribution over z (B, D) with rsample, got {type(q).__name__}"
            )
        shape, dim = q.batch_shape + q.event_shape, getattr(self.flow.net, "dim", None)
        if len(shape) != 2 or shape[0] != len(x0) or (dim is not None and shape[1] != dim):
            wanted = f"(B, D) with B = {len(x0)}" + ("" if dim is None else f" and D = {dim}")
            raise ArgumentError(f"encoder: its distribution has shape {tuple(shape)}; expected {wanted}")
        return q

    def _likelihood(self, z: Tensor) -> Distribution:
        p = self.decoder(z)
        if not isinstance(p, Distribution):
            raise ArgumentTypeError(f"decoder: expected it to return a Distribution over x, got {type(p).__name__}")
        return p

    def _reconstruction(self, x: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        """Weighted log p(x_t | z_t), (T+1, B), with all frames decoded in one call."""
        frames = rearrange(x, "b t ... -> t b ...")
        if mask is None:
            return self.log_prob_frames(frames, z)
        if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(f"mask: expected a tensor (B, T+1) = {tuple(x.shape[:2])}, got {got}")
        weight = mask.mT.to(z.device)
        if not bool(((weight >= 0) & (weight < math.inf)).all()):
            raise ArgumentError("mask: expected booleans or finite weights ≥ 0, got a negative, infinite or NaN one")
        keep = weight != 0
        out = z.new_zeros(keep.shape)
        out[keep] = self.log_prob_frames(frames[keep], z[keep]) * weight[keep].to(z.dtype)
        return out

    def _path_kl(self, posterior: Distribution, path: FlowPath, k: SelectionLike) -> Tensor:
        """Σ_{t≥1} log q_t(z_t) − log p_t(z_t), (B,): one sample of its expectation."""
        t = path.t if path.t.ndim == 2 else path.t[:, None]
        log_q = sum_rest(posterior.log_prob(path.z[0]), 1) + cast(Tensor, path.log_density_change)
        p: Distribution = cast(DiffusionPrior, self.prior)(k, t, t0=t[0])
        log_ratio: Tensor = log_q - p.log_prob(path.z)
        return log_ratio[1:].sum(0)

    def _infer_flow(self, x: Tensor, k: SelectionLike) -> tuple[SelectionLike, Tensor | None]:
        """One-hot weights drawn from q(k|x) where k is latent, and KL(q(k|x) ‖ uniform)."""
        if k is not None or self.flow_posterior is None:
            return k, None
        logits, wanted = self.flow_posterior(x), (len(x), self.flow.num_flows)
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ArgumentError(f"flow_posterior: expected logits (B, K) = {wanted}, got {got}")
        if self.training:
            weights = nn.functional.gumbel_softmax(logits, tau=self.temperature, hard=True)
        else:
            weights = nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).to(logits.dtype)
        log_q = logits.log_softmax(-1)
        return weights, (log_q.exp() * log_q).sum(-1).mean() + math.log(logits.shape[1])


def _check_weights(path_kl_weight: float, prior: nn.Module | None, pde_weight: float, pde: nn.Module | None) -> None:
    """A term that counts needs its module; checked again in `elbo`, as weights may be annealed from 0."""
    if path_kl_weight and prior is None:
        raise ArgumentError(
            "prior: path_kl_weight is not 0, so a prior is needed; pass prior=cflow.DiffusionPrior(D, K)"
        )
    if pde_weight and pde is None:
        raise ArgumentError("pde: pde_weight is not 0, so a HamiltonJacobi is needed; pass pde=…")


def _check_same_flow(flow: PotentialFlow, prior: nn.Module | None, pde: nn.Module | None) -> None:
    sizes = {"dim": getattr(flow.net, "dim", None), "num_flows": getattr(flow.net, "num_flows", None)}
    for name, size in sizes.items():
        if isinstance(prior, DiffusionPrior) and size is not None and getattr(prior, name) != size:
            raise ArgumentError(f"prior: has {name} = {getattr(prior, name)}, but the flow's potential {size}")
    if isinstance(pde, HamiltonJacobi):
        learned = set(flow.net.parameters())
        if learned and learned.isdisjoint(pde.potential.parameters()):
            raise ArgumentError("pde: its potential shares no parameters with the flow's; pass the same module to both")
    elif pde is not None and not hasattr(pde, "loss"):
        raise ArgumentTypeError(f"pde: expected a cflow.pde.HamiltonJacobi, got {type(pde).__name__}")


def range_of(frames: int) -> Tensor:
    """The default times 0, 1, …, T of T+1 frames."""
    return as_time_tensor([float(i) for i in range(frames)])


def zero_states(vae: FlowVAE, n: int) -> Tensor:
    """n latent states (n, D) at the prior's mean, in the dtype and on the device of the flow."""
    found = (p for module in (vae.flow, vae) for p in module.parameters() if p.is_floating_point())
    return next(found, torch.empty(())).new_zeros(n, vae.flow.dim)


def sum_rest(log_prob: Tensor, lead: int) -> Tensor:
    """Sum over everything behind the first `lead` dimensions."""
    return log_prob.sum(tuple(range(lead, log_prob.ndim))) if log_prob.ndim > lead else log_prob


def _kl_to_standard_normal(q: Distribution, z: Tensor) -> Tensor:
    """KL(q ‖ N(0, I)) per sample, (B,); where PyTorch knows no formula for q, from the one draw z (B, D)."""
    p: Distribution = Normal(torch.zeros_like(z), torch.ones_like(z), validate_args=False)
    if len(q.event_shape):
        p = Independent(p, 1)
    try:
        return sum_rest(kl_divergence(q, p), 1)
    except NotImplementedError:
        return sum_rest(q.log_prob(z), 1) - sum_rest(p.log_prob(z), 1)
