"""What a chapter is about: a model, held-out data, and how the two belong together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...composition import Composition, Flows, flow_weights, single
from ...data import Sequences
from ...vae import FlowVAE
from .. import results
from ..datamodule import SequenceDataModule
from ..module import FlowVAEModule


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, and the held-out part of its data.

    Attributes:
        model: the model.
        data: its data.
        device: where the model is, and everything is computed.
    """

    model: FlowVAEModule
    data: SequenceDataModule
    device: torch.device

    @cached_property
    def vae(self) -> FlowVAE:
        """The model itself."""
        return self.model.to(self.device).eval().vae

    @cached_property
    def test(self) -> Sequences:
        """The held-out things."""
        return self.data.source.split("test")

    @cached_property
    def names(self) -> list[str]:
        """The transformations, or numbers of flows where nobody knows those."""
        return results.flow_names(self.model, self.data)

    @cached_property
    def flows(self) -> Flows:
        """What each transformation has become, where flows are inferred and transformations known."""
        self.vae.eval()
        return results.flows_of(self.model, self.data, self.device)

    @property
    def numbers(self) -> list[int]:
        """The number of the flow of each transformation."""
        return results.flow_numbers(self.flows) or list(range(len(self.names)))

    @cached_property
    def labels(self) -> list[str]:
        """The names, with the flow that each has become where that was inferred."""
        return results.labels_of(self.names, self.flows)

    @property
    def times(self) -> Tensor:
        """Times of the frames (T+1,)."""
        return self.data.source.times.to(self.device)

    @property
    def rows(self) -> list[Composition]:
        """Every transformation alone."""
        return [single(k, len(self.names)) for k in range(len(self.names))]

    @property
    def shared(self) -> bool:
        """Whether every thing can be shown under every transformation, or nobody knows better."""
        return self.test.labels is None or self.test.unlabelled

    def things(self, count: int, t: Tensor) -> Tensor:
        """At most `count` things for each transformation (K, S), the same for all where they are `shared`."""
        rows = self.rows[:1] if self.shared else self.rows
        chosen = results.shown_things(self.test, rows, t.cpu(), count)
        return chosen.expand(len(self.names), -1)

    def true_frames(self, k: int, things: Tensor, t: Tensor) -> Tensor:
        """Frames (S, N, C, H, W) of things (S,) under transformation k; the input alone where no more is known."""
        return results.true_frames(self.test, self.rows[k], things, t).to(self.dtype)

    def starts(self, k: int, count: int) -> Tensor:
        """Latent states (S, D) of at most `count` things at the first frame."""
        t = self.times[:1]
        return self.vae.encode(self.vae.encoder_input(self.true_frames(k, self.things(count, t)[k], t)))

    def weights(self, weights: Tensor) -> Tensor:
        """Weights of flows for weights of transformations, (…, K)."""
        return flow_weights(weights, self.flows)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.vae.parameters()).dtype
