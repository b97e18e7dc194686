"""`FlowVAE`: a generic variational autoencoder whose latent state moves along potential flows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.distributions import Distribution

from .checks import positive_int
from .errors import ArgumentError, ArgumentTypeError
from .flow import FlowPath, PotentialFlow
from .frames import Frames, check_encoded, parse_frames
from .hub import Pretrained
from .inference import (
    FlowBelief,
    Inference,
    Inferred,
    ResponsibilityFrames,
    as_flow_prior,
    as_inference,
    split_path,
)
from .objectives import ELBO as ELBO
from .objectives import (
    KL,
    Draw,
    PathKL,
    PDELoss,
    Term,
    check_pde,
    check_prior,
    flow_terms,
    lower_bound,
    sum_rest,
)
from .priors import DiffusionPrior
from .selection import SelectionLike
from .sparse import FlowWeights, FlowWeightsKL, as_weight_prior, draw_from_prior, weight_prior
from .spike_slab import SpikeSlab
from .times import TimesLike


class FlowVAE(Pretrained):
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
        pde: for `pde_weight`: a `HamiltonJacobi`, `Wave` or `Heat` of `cflow.pde`, or any module with residual(z, k, t)
            and loss(z, k, t).
        kl_weight, path_kl_weight, pde_weight: weights in `ELBO.loss`. Terms of weight 0 are not computed.
        flow_posterior: x (B, T+1, …) -> logits (B, K) of q(k|x): k becomes latent where `elbo` is called with k=None.
            Frames that a boolean mask drops are zero; a module with the attribute `missing_channel = True` always gets
            (B, T+1, C+1, …), where the last channel is 1 in those; with "optional", such as `nets.MLPSequenceEncoder`,
            it gets them where there is a boolean mask.
        inference: how a latent k is inferred. "gumbel" (the default): one flow a sequence, drawn by a straight-through
            Gumbel-softmax in training; in evaluation the exact mean over q(k|x). "marginal": the bound is
            E log Σ_k p(k) Π_t p(x_t|z_t, k) − KL(q(z_0|x_0) ‖ p(z_0)), towards whose responsibilities q(k|x) is
            trained, see `elbo`. It takes K solves and decoders; `temperature` keeps all flows in use.
            "sparse": several flows at once, which change from frame to frame. The flow_posterior returns a `SpikeSlab`
            q(w|x) of batch shape (B, S, K) for the weights in the S = T intervals between frames, or (B, K) for weights
            that do not change; the bound is E log p(x|z_0, w) − KL(q(w|x) ‖ p(w)) − KL(q(z_0|x_0) ‖ p(z_0)), from one
            draw of w, which takes one solve. `temperature` keeps flows from
            sharing what is one transformation's.
        flow_prior: p(k), (K,), uniform by default. For "sparse" p(w), a `SpikeSlab` of batch shape (K,); by default
            spikes of probability 1/K, and a standard normal slab.
        responsibility_frames: the frames that responsibilities are made of where a mask of numbers weights them.
            "all": the expected gradient is that of the marginal. "decoded": those of non-zero weight, each once, which
            costs less, and is softer: the gradient is then that of another bound, equal where the flows are told apart.
        encode_frames: m, where the encoder is to see the first m frames, (B, m, …), of which z is the state at the
            first; `encode` and `traverse` take them likewise. None: it sees the first frame, (B, …).

    Attributes:
        temperature: in training, of the straight-through draw of "gumbel", where 1 falls to some 0.3; of the
            responsibilities of "marginal", p(k) p(x|z_0, k)^(1/temperature), where some 1000 falls to 1 in the first
            half of the training; and of "sparse", whose loss weights KL(q(w|x) ‖ p(w)) by it, where some 30 falls to 1.
            Log-likelihoods of images are sharp enough for the first flow that is a little better to take everything,
            and for any mixture of flows to do that tells speeds apart (deterministic annealing: Ueda, Nakano, 1998). 1
            to begin with; the bound holds at any.

    Raises:
        ArgumentError: a weight without its module, negative weights, a prior or pde of another flow, an inference
            without a flow_posterior, or a flow_prior that holds no K probabilities.
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
        >>> q = nets.MLPSequenceEncoder((1, 8, 8), num_frames=3, num_flows=3)
        >>> weak = FlowVAE(vae.encoder, vae.decoder, flow, flow_posterior=q, inference="marginal")
        >>> weak.elbo(x, labels=torch.tensor([0, -1, -1, 2])).responsibilities.shape
        torch.Size([4, 3])
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
        inference: Inference | None = None,
        flow_prior: Tensor | Sequence[float] | SpikeSlab | None = None,
        responsibility_frames: ResponsibilityFrames = "all",
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
        self.inference = as_inference(inference, flow_posterior)
        if responsibility_frames not in ("all", "decoded"):
            raise ArgumentError(f"responsibility_frames: expected 'all' or 'decoded', got {responsibility_frames!r}")
        self.responsibility_frames = responsibility_frames
        num_flows = flow.declared("num_flows")
        self.flow_prior: Tensor | None
        as_prior = as_weight_prior if self.inference == "sparse" else as_flow_prior
        self.register_buffer("flow_prior", None if flow_prior is None else as_prior(flow_prior, num_flows))
        self.kl_weight, self.path_kl_weight, self.pde_weight = kl_weight, path_kl_weight, pde_weight
        self.encode_frames = None if encode_frames is None else positive_int("encode_frames", encode_frames)
        self.temperature = 1.0  # of a latent k, see the class; anneal it while training
        for term in FlowVAE.terms(self):  # a subclass has not set its own weights yet
            term.check()
        if prior is not None:
            check_prior(prior, flow)
        if pde is not None:
            check_pde(pde, flow)

    def terms(self) -> list[Term]:
        """What the loss has beside the reconstruction, with the weights of now; a subclass may list more.

        Those of a latent k, which have no weights to choose, are not among them.
        """
        return [
            KL(self.kl_weight),
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
        *,
        labels: Tensor | None = None,
    ) -> ELBO:
        r"""The evidence lower bound of sequences, and what to minimise.

        Arguments:
            x: sequences (B, T+1, …); the first frame, or the first `encode_frames`, are encoded, and all are decoded.
            k: a selection of flows, as in `PotentialFlow`; None with a `flow_posterior` makes it latent.
            t: times of the frames, (T+1,) or (B, T+1), in frames; 0..T by default.
            mask: (B, T+1). Boolean: False drops a frame, which may then be missing (NaN), but none that is encoded.
                Numbers ≥ 0: multiply the frame's log-probability and path KL, so that a random subset of m frames
                weighted by (T+1)/m stays unbiased. Only frames of non-zero weight are decoded. The PDE is asked for
                at all times.
            context: (B, …), handed to a user's potential.
            labels: flows (B,) where some are known and k is latent, −1 where not. A sequence with a label is
                supervised: its bound is that of k = label and log p(k), and it trains q(k|x) by −log q(label|x).

        A latent k is inferred from all frames that are there, whatever their weights. Under "gumbel" it is drawn in
        training, and averaged over q(k|x) in evaluation. Under "marginal" one z_0 is shared by all flows, and

        .. math:: value = E_{z_0} \log Σ_k p(k) Π_t p(x_t|z_t, k) − KL(q(z_0|x_0) ‖ p(z_0)), \quad
            r_k = p(k|x, z_0), \quad loss = −value − Σ_k r_k \log q(k|x)

        Weights of frames would bias that upwards inside the logarithm, and sharpen r, so that they stay outside:

        .. math:: loss = −Σ_k r_k Σ_t weight_t \log p(x_t|z_t, k) + KL(q(z_0|x_0) ‖ p(z_0)) − Σ_k r_k \log q(k|x)

        where r is still that of all frames, each once, without gradient. Over random subsets of frames the mean of its
        gradient is that of the marginal, and the mean of `value` the marginal itself (`responsibility_frames` has a
        cheaper way that is not exact). Other terms of the loss are Σ_k r_k term_k.

        Raises:
            ArgumentError: shapes of x, t, mask, labels or of a module's distribution that do not go together, values
                that are not finite in a frame that counts, a mask that drops what is encoded, or labels of flows that
                do not exist or where k is not latent.
            ArgumentTypeError: uint8 frames, or labels that are no integers.
        """
        if isinstance(x, Tensor) and x.ndim > 2 and 0 in x.shape[:2]:
            raise ArgumentError(f"x: expected at least one sequence of one frame (B, T+1, …), got {tuple(x.shape)}")
        latent = k is None and self.flow_posterior is not None
        frames = parse_frames(x, t, mask, encoded=self.encode_frames or 1, all_count=latent)
        if labels is not None and not latent:
            raise ArgumentError(
                "labels: are for a latent k, which needs a flow_posterior and k=None; where all flows are known pass k"
            )
        terms = [term for term in self.terms() if term.counts]
        for term in terms:
            term.check()
        if latent and self.inference == "sparse":
            if labels is not None:
                raise ArgumentError(
                    "labels: are of sequences that one flow moves, for inference='marginal' or 'gumbel'; where weights "
                    "are known pass k, such as a Schedule"
                )
            weights = self.flow_weights(frames)
            k, latent = weights.draw(), False
            terms.append(FlowWeightsKL(self._cooled, weights))
        belief = self._believe(frames, labels) if latent else None
        if belief is not None and (self.inference == "marginal" or not self.training):
            return self._average(frames, belief, terms, context)
        inferred = None
        if belief is not None:
            k = belief.draw(self.temperature)
            inferred = Inferred(belief.given_labels(belief.log_q), belief.log_prior, belief.log_q, belief.known)
            terms = [*terms, *flow_terms(responsible=False, labelled=labels is not None)]
        posterior = self._encode(self.encoder_input(x))
        path = self._solve(posterior.rsample(), k, frames, terms, context)
        reconstruction = self._reconstruction(frames, path.z).sum(0).mean()
        return lower_bound(reconstruction, terms, Draw(posterior, path, k, context, frames.weight, inferred))

    def infer_flow(
        self,
        x: Tensor,
        t: TimesLike | None = None,
        exact: bool = False,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Probabilities (B, K) of the flows of sequences x (B, T+1, …): q(k|x), or what the model itself says.

        For `inference="sparse"` the expected weights (B, S, K) in the S = T intervals between frames, under q(w|x).

        Arguments:
            x, t, mask, context: as in `elbo`; q(k|x) does not see times. Only a boolean mask makes a difference.
            exact: the responsibilities p(k) Π_t p(x_t|z_t, k) / Σ_j …, with z_0 at the mean of q(z_0|x_0), of K solves;
                a model without a `flow_posterior` has them too.

        Raises:
            ArgumentError: as `elbo`, there is no q(k|x) and `exact` is not asked for, or it is, for "sparse".

        Example:
            >>> from cflow import nets
            >>> vae = nets.build_vae(latent_dim=4, width=16)
            >>> vae.infer_flow(torch.rand(5, 9, 3, 28, 28), exact=True).shape
            torch.Size([5, 3])
        """
        frames = parse_frames(x, t, mask, encoded=self.encode_frames or 1, all_count=True)
        if self.inference == "sparse":
            if exact:
                raise ArgumentError(
                    "exact: sums over K flows, which inference='sparse' mixes in any amounts; leave it out"
                )
            return self.flow_weights(frames).mean
        if not exact:
            if self.flow_posterior is None:
                raise ArgumentError(
                    "exact: the model has no flow_posterior to infer k with; pass exact=True for the responsibilities"
                )
            return self._flow_logits(frames).softmax(-1)
        z = self._flow_all(self.encode(self.encoder_input(x)), frames, [], context)[1]
        log_likelihood = self._reconstruction(frames.once, z).sum(0).mT
        return (self.log_flow_prior(log_likelihood) + log_likelihood).softmax(-1)

    def flow_weights(self, frames: Frames) -> FlowWeights:
        """q(w|x) and p(w) of frames, for `inference="sparse"`."""
        q = self._flow_posterior(frames)
        prior = self.weight_prior(q.loc if isinstance(q, SpikeSlab) else frames.x)
        return FlowWeights.of(q, prior, frames.times, batch=len(frames.x))

    def weight_prior(self, like: Tensor) -> SpikeSlab:
        """p(w) of `inference="sparse"`, of batch shape (K,), in the dtype and on the device of another tensor."""
        return weight_prior(self.flow_prior, self.flow.num_flows, like)

    def log_flow_prior(self, like: Tensor) -> Tensor:
        """log p(k), (K,), in the dtype and on the device of another tensor."""
        flows = self.flow.num_flows
        if self.flow_prior is None:
            return like.new_full((flows,), -math.log(flows))
        if self.flow_prior.shape != (flows,):  # a user's potential has only now said how many there are
            raise ArgumentError(
                f"flow_prior: expected probabilities (K,) = ({flows},), got shape {tuple(self.flow_prior.shape)}"
            )
        return self.flow_prior.to(like).log()

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
        """Images (N, n, *image) at times t, along flows that start from n draws of the prior N(0, I).

        With k=None those of `inference="sparse"` have weights of p(w), drawn anew in each interval between times.
        """
        if not isinstance(n, numbers.Integral) or n < 0:
            raise ArgumentError(f"n: expected a number of samples ≥ 0, got {n!r}")
        z0 = torch.randn_like(zero_states(self, int(n)))
        if k is None and self.inference == "sparse":
            k = draw_from_prior(self.weight_prior(z0), int(n), t)
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

    def _reconstruction(self, frames: Frames, z: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Weighted log p(x_t | z_t), (T+1, B) or (T+1, K, B), with all frames that count decoded in one call.

        Arguments:
            z: states (T+1, B, D), or (T+1, K, B, D) under every flow.
            wanted: flows (K, B) that count; the others are 0.
        """
        lead = z.shape[:-1]
        x, weight = rearrange(frames.x, "b t ... -> t b ..."), frames.weight
        if z.ndim == 4:
            x = x[:, None].expand(*lead, *x.shape[2:])
            weight = None if weight is None else weight[:, None].expand(lead)
        if weight is None:
            return self.log_prob_frames(x, z)
        keep = weight != 0
        if wanted is not None:
            keep = keep & wanted
        out = z.new_zeros(lead)
        out[keep] = self.log_prob_frames(x[keep], z[keep]) * weight[keep].to(z.dtype)
        return out

    def _solve(
        self, z0: Tensor, k: SelectionLike, frames: Frames, terms: Sequence[Term], context: Tensor | None
    ) -> FlowPath:
        """The path through the frames, with the integrals that terms need."""
        integrals = {name for term in terms for name in term.integrals}
        return self.flow.solve(
            z0,
            k,
            frames.times,
            log_density="log_density" in integrals,
            kinetic_energy="kinetic_energy" in integrals,
            context=context,
        )

    def _flow_all(
        self, z0: Tensor, frames: Frames, terms: Sequence[Term], context: Tensor | None
    ) -> tuple[list[FlowPath], Tensor]:
        """The paths from z0 (B, D) under every flow, solved in one batch, and their states (T+1, K, B, D)."""
        flows = self.flow.num_flows
        tiled = None if context is None else repeat(context, "b ... -> (k b) ...", k=flows)
        k = repeat(torch.arange(flows, device=z0.device), "k -> (k b)", b=len(z0))
        every = replace(frames, times=frames.times.tile(flows))
        path = self._solve(z0.repeat(flows, 1), k, every, terms, tiled)
        return split_path(path, len(z0)), rearrange(path.z, "t (k b) d -> t k b d", k=flows)

    def _average(self, frames: Frames, belief: FlowBelief, terms: list[Term], context: Tensor | None) -> ELBO:
        """The bound with every flow solved and decoded, averaged over q(k|x) or the responsibilities."""
        posterior = self._encode(self.encoder_input(frames.x))
        paths, z = self._flow_all(posterior.rsample(), frames, terms, context)
        marginal = self.inference == "marginal"
        constant = marginal and frames.weighted
        if constant:
            log_probs = self._responsibilities(frames, belief, z)
            wanted = (log_probs.exp() > torch.finfo(log_probs.dtype).eps).mT  # the others are below a rounding
            log_likelihood = self._reconstruction(frames, z, wanted).sum(0).mT
        else:
            log_likelihood = self._reconstruction(frames, z).sum(0).mT
            log_probs = (
                belief.posterior(log_likelihood.detach(), self._cooled)
                if marginal
                else belief.given_labels(belief.log_q)
            )
        share = log_probs.exp()
        inferred = Inferred(log_probs, belief.log_prior, belief.log_q, share if marginal else belief.known)
        draws = [
            Draw(posterior, path, k, context, frames.weight, inferred, share[:, k]) for k, path in enumerate(paths)
        ]
        labelled = belief.labels is not None
        terms = [*terms, *flow_terms(responsible=marginal, labelled=labelled, constant=constant)]
        elbo = lower_bound((share * log_likelihood).sum(-1).mean(), terms, *draws)
        return replace(elbo, responsibilities=share) if marginal else elbo

    @torch.no_grad()
    def _responsibilities(self, frames: Frames, belief: FlowBelief, z: Tensor) -> Tensor:
        """Log-responsibilities (B, K) of states z (T+1, K, B, D), where numbers weight the frames."""
        seen = frames.once if self.responsibility_frames == "all" else frames.decoded
        # the first frame is the same under every flow
        return belief.posterior(self._reconstruction(seen.behind_first, z[1:]).sum(0).mT, self._cooled)

    @property
    def _cooled(self) -> float:
        return self.temperature if self.training else 1.0

    def _believe(self, frames: Frames, labels: Tensor | None) -> FlowBelief:
        """q(k|x), p(k) and the labels of sequences."""
        logits = self._flow_logits(frames)
        return FlowBelief.of(logits, self.log_flow_prior(logits), labels)

    def _flow_logits(self, frames: Frames) -> Tensor:
        """Logits (B, K) of q(k|x), checked."""
        logits = self._flow_posterior(frames)
        shape = (len(frames.x), self.flow.num_flows)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ArgumentError(f"flow_posterior: expected logits (B, K) = {shape}, got {got}")
        return logits

    def _flow_posterior(self, frames: Frames) -> object:
        """What the flow_posterior makes of the frames that are there."""
        net = cast(nn.Module, self.flow_posterior)
        wanted = getattr(net, "missing_channel", False)
        flagged = frames.may_be_missing if wanted == "optional" else wanted
        return net(frames.flagged if flagged else frames.observed)


def zero_states(vae: FlowVAE, n: int) -> Tensor:
    """n latent states (n, D) at the prior's mean, in the dtype and on the device of the flow."""
    found = (p for module in (vae.flow, vae) for p in module.parameters() if p.is_floating_point())
    return next(found, torch.empty(())).new_zeros(n, vae.flow.dim)
