"""`FlowVAE`: a generic variational autoencoder whose latent state moves along potential flows."""

from __future__ import annotations

import math
import numbers
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Distribution

from .checks import positive_int
from .errors import ArgumentError, ArgumentTypeError
from .flow import PotentialFlow
from .frames import Frames, check_encoded, parse_frames
from .objectives import ELBO as ELBO
from .objectives import KL, Draw, FlowKL, PathKL, PDELoss, Term, check_pde, check_prior, lower_bound, sum_rest
from .priors import DiffusionPrior
from .selection import SelectionLike
from .times import TimesLike


class FlowVAE(nn.Module):
    r"""A VAE over sequences: encode the first frame, flow its latent state, decode every frame.

    .. math:: \log p(x_{0..T}|k) ≥ Σ_t E_q[\log p(x_t|z_t)] − KL(q(z_0|x_0) ‖ p(z_0)), \quad z_t = flow_k(z_0)

    Any modules that return `torch.distributions` objects will do. log-probabilities and KLs are summed over everything
    but frames and batch, with or without `Independent`.

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167, §3.

    Arguments:
        encoder: x (B, …) -> distribution over z (B, D), with `rsample`; x (B, m, …) with `encode_frames`.
        decoder: z (…, D) -> distribution over x (…, *image).
        flow: the `PotentialFlow`.
        prior: a `DiffusionPrior` for the path KL; None makes one where `path_kl_weight` is not 0. At the first time
            it is N(0, I) either way.
        pde: for `pde_weight`: a `HamiltonJacobi`, or any module with residual(z, k, t) and loss(z, k, t).
        kl_weight, path_kl_weight, pde_weight: weights in `ELBO.loss`. Terms of weight 0 are not computed.
        flow_posterior: x (B, T+1, …) -> logits (B, K) of q(k|x): k becomes latent where `elbo` is called with k=None.
            Frames that a boolean mask drops are zero.
        encode_frames: m, where the encoder is to see the first m frames, (B, m, …), of which z is the state at the
            first; `encode` and `traverse` take them likewise. None: it sees the first frame, (B, …).

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
        pde: nn.Module | None = None,
        kl_weight: float = 1.0,
        path_kl_weight: float = 0.0,
        pde_weight: float = 0.0,
        flow_posterior: nn.Module | None = None,
        encode_frames: int | None = None,
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
        self.encoder, self.decoder, self.flow = encoder, decoder, flow
        self.prior, self.pde, self.flow_posterior = prior, pde, flow_posterior
        self.kl_weight, self.path_kl_weight, self.pde_weight = kl_weight, path_kl_weight, pde_weight
        self.encode_frames = None if encode_frames is None else positive_int("encode_frames", encode_frames)
        self.temperature = 1.0  # of the straight-through Gumbel-softmax; anneal it while training
        for term in FlowVAE.terms(self):  # a subclass has not set its own weights yet
            term.check()
        if prior is not None:
            check_prior(prior, flow)
        if pde is not None:
            check_pde(pde, flow)

    def terms(self, flow_logits: Tensor | None = None) -> list[Term]:
        """What the loss has beside the reconstruction, with the weights of now; a subclass may list more.

        Arguments:
            flow_logits: of q(k|x), (B, K), where k is latent.
        """
        return [
            KL(self.kl_weight),
            FlowKL(1.0, flow_logits),
            PathKL(self.path_kl_weight, self.prior),
            PDELoss(self.pde_weight, self.pde),
        ]

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
            x: sequences (B, T+1, …); the first frame, or the first `encode_frames`, are encoded, and all are decoded.
            k: a selection of flows, as in `PotentialFlow`; None with a `flow_posterior` makes it latent.
            t: times of the frames, (T+1,) or (B, T+1), in frames; 0..T by default.
            mask: (B, T+1). Boolean: False drops a frame, which may then be missing (NaN), but none that is encoded.
                Numbers ≥ 0: multiply the frame's log-probability and path KL, so that a random subset of m frames
                weighted by (T+1)/m stays unbiased. Only frames of non-zero weight are decoded. The PDE is asked for
                at all times.
            context: (B, …), handed to a user's potential.

        A latent k is drawn from q(k|x) by a straight-through Gumbel-softmax in training, and is the most probable one
        in evaluation.

        Raises:
            ArgumentError: shapes of x, t, mask or of a module's distribution that do not go together, values that are
                not finite in a frame that counts, or a mask that drops what is encoded.
            ArgumentTypeError: uint8 frames.
        """
        if isinstance(x, Tensor) and x.ndim > 2 and 0 in x.shape[:2]:
            raise ArgumentError(f"x: expected at least one sequence of one frame (B, T+1, …), got {tuple(x.shape)}")
        latent = k is None and self.flow_posterior is not None
        frames = parse_frames(x, t, mask, encoded=self.encode_frames or 1, all_count=latent)
        logits = self._flow_logits(frames.observed) if latent else None
        terms = [term for term in self.terms(logits) if term.counts]
        for term in terms:
            term.check()
        k = k if logits is None else self._draw_flow(logits)
        posterior = self._encode(self.encoder_input(x))
        integrals = {name for term in terms for name in term.integrals}
        path = self.flow.solve(
            posterior.rsample(),
            k,
            frames.times,
            log_density="log_density" in integrals,
            kinetic_energy="kinetic_energy" in integrals,
            context=context,
        )
        reconstruction = self._reconstruction(frames, path.z).sum(0).mean()
        return lower_bound(reconstruction, terms, Draw(posterior, path, k, context, frames.weight))

    def encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder gets of sequences x (B, T+1, …): the first frame (B, …), or the first m (B, m, …)."""
        return x[:, 0] if self.encode_frames is None else x[:, : self.encode_frames]

    def encode(self, x: Tensor, *, sample: bool = False) -> Tensor:
        """Latent states (B, D) of frames x (B, …), or of the first of m (B, m, …): the posterior mean, or a draw."""
        posterior = self.posterior(x)
        return posterior.rsample() if sample else posterior.mean

    def decode(self, z: Tensor) -> Tensor:
        """Images (…, *image), the decoder's mean, of latent states z (…, D)."""
        dim = self.flow.declared("dim")
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
        """Images (N, B, *image) at times t (N,) or (N, B): encode frames x0, as `encode` does, flow, decode."""
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
        """q(z_0|x_0) over latent states (B, D) of frames x0 (B, …), or of the first of m (B, m, …), checked."""
        check_encoded(x0, self.encode_frames)
        return self._encode(x0)

    def _encode(self, x0: Tensor) -> Distribution:
        q = self.encoder(x0)
        if not isinstance(q, Distribution) or not q.has_rsample:
            raise ArgumentTypeError(
                f"encoder: expected it to return a Distribution over z (B, D) with rsample, got {type(q).__name__}"
            )
        shape, dim = q.batch_shape + q.event_shape, self.flow.declared("dim")
        if len(shape) != 2 or shape[0] != len(x0) or (dim is not None and shape[1] != dim):
            wanted = f"(B, D) with B = {len(x0)}" + ("" if dim is None else f" and D = {dim}")
            raise ArgumentError(f"encoder: its distribution has shape {tuple(shape)}; expected {wanted}")
        return q

    def _likelihood(self, z: Tensor) -> Distribution:
        p = self.decoder(z)
        if not isinstance(p, Distribution):
            raise ArgumentTypeError(f"decoder: expected it to return a Distribution over x, got {type(p).__name__}")
        return p

    def _reconstruction(self, frames: Frames, z: Tensor) -> Tensor:
        """Weighted log p(x_t | z_t), (T+1, B), with all frames that count decoded in one call."""
        x, weight = rearrange(frames.x, "b t ... -> t b ..."), frames.weight
        if weight is None:
            return self.log_prob_frames(x, z)
        keep = weight != 0
        out = z.new_zeros(keep.shape)
        out[keep] = self.log_prob_frames(x[keep], z[keep]) * weight[keep].to(z.dtype)
        return out

    def _flow_logits(self, x: Tensor) -> Tensor:
        """Logits (B, K) of q(k|x) for sequences x (B, T+1, …), checked."""
        logits, wanted = cast(nn.Module, self.flow_posterior)(x), (len(x), self.flow.num_flows)
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ArgumentError(f"flow_posterior: expected logits (B, K) = {wanted}, got {got}")
        return logits

    def _draw_flow(self, logits: Tensor) -> Tensor:
        """One-hot weights (B, K): a draw in training, the most probable flow in evaluation."""
        if self.training:
            return nn.functional.gumbel_softmax(logits, tau=self.temperature, hard=True)
        return nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).to(logits.dtype)


def zero_states(vae: FlowVAE, n: int) -> Tensor:
    """n latent states (n, D) at the prior's mean, in the dtype and on the device of the flow."""
    found = (p for module in (vae.flow, vae) for p in module.parameters() if p.is_floating_point())
    return next(found, torch.empty(())).new_zeros(n, vae.flow.dim)
