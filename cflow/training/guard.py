"""Batches that give no step: reported, skipped, and too many in a row end the fit. No batch spoils the weights."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from ..checks import all_finite
from ..errors import IntegrationError, TrainingError

MOST = 10  # batches in a row that are skipped


class GuardedModule(LightningModule):
    """A LightningModule that skips a batch whose loss or gradient is not finite, or whose solve fails.

    A skipped batch leaves weights, the optimizer's state and the number of steps as they are; the next batch is another
    one. Of several processes all stop together, because a batch that one of them skips would leave the others waiting.

    Attributes:
        skipped: batches skipped since the fit began.

    Raises:
        TrainingError: more than `MOST` batches in a row, or one of several processes' batches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped = self._in_a_row = 0
        self._no_step = False

    @abstractmethod
    def losses(self, batch: Any) -> Mapping[str, Tensor]:
        """What is minimised, "loss", and the terms that it is made of, all ()."""

    def parts(self, batch: Any) -> Iterable[tuple[str, Any]]:
        """The parts of a batch that may be to blame, by name."""
        return ()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the loss of a batch; None where it is skipped."""
        losses, why = self._attempt(batch)
        if why:
            why += self._blamed(batch)
        if why := self._agreed(why):
            self._skip(why)
            return None
        self.log("loss", losses["loss"], prog_bar=True, batch_size=self.batch_length(batch))
        return losses["loss"]

    def batch_length(self, batch: Any) -> int:
        """How many a batch counts for in averages."""
        return 1

    def _attempt(self, batch: Any) -> tuple[Mapping[str, Tensor], str]:
        """The losses of a batch, and why they cannot be used, "" where they can."""
        try:
            losses = self.losses(batch)
        except IntegrationError as error:
            return {}, str(error)
        if all_finite(losses["loss"]):
            return losses, ""
        kind = "NaN" if bool(losses["loss"].isnan()) else "infinite"
        bad = [name for name, value in losses.items() if name != "loss" and not all_finite(value)]
        return losses, f"the loss is {kind}" + (f", from the term {', '.join(bad)}" if bad else "")

    def _blamed(self, batch: Any) -> str:
        """The parts of a batch that give no loss by themselves, in words."""
        found = {name: self._attempt(part)[1] for name, part in self.parts(batch)}
        bad = [name for name, why in found.items() if why]
        if not bad:
            return ""
        return " (of every transformation)" if len(bad) == len(found) > 1 else f" (of {', '.join(bad)})"

    def _agreed(self, why: str) -> str:
        """The reason of the first process that has one, told to all: none of them may go on alone."""
        if self.trainer.world_size == 1:
            return why
        if not self.trainer.strategy.reduce_boolean_decision(bool(why), all=False):
            return ""
        reasons: list[str] = [""] * self.trainer.world_size
        torch.distributed.all_gather_object(reasons, why)
        rank = next(i for i, reason in enumerate(reasons) if reason)
        return f"in process {rank} {reasons[rank]}"

    def _skip(self, why: str) -> None:
        """Count a batch that gives no step, and say so.

        Raises:
            TrainingError: it was one too many.
        """
        step = self.global_step + 1
        if self.trainer.world_size > 1:
            raise TrainingError(f"step {step}: {why}. The fit stops in all processes, with the weights before the step")
        self.skipped, self._in_a_row, self._no_step = self.skipped + 1, self._in_a_row + 1, True
        if self._in_a_row > MOST:
            raise TrainingError(
                f"step {step}: {why}. {self._in_a_row} batches in a row gave no step: the fit stops, with the weights "
                "before them; lower model.lr, or look at what is named"
            )
        print(f"step {step}: batch skipped, {why}", file=sys.stderr, flush=True)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Find the gradient, unless a solve that the continuous adjoint makes for it fails."""
        try:
            super().backward(loss, *args, **kwargs)
        except IntegrationError as error:
            self.zero_grad()
            self._skip(f"in the backward pass {error}")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Forget gradients that are not finite: the optimizer then leaves weights and its state alone."""
        grads = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        if not grads:
            return
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # which looks itself
        if scaled or all_finite(torch.nn.utils.get_total_norm(grads.values())):
            self._in_a_row, self._no_step = 0, False
            return
        bad = [name for name, grad in grads.items() if not all_finite(grad)]
        optimizer.zero_grad()
        more = f" and {len(bad) - 1} more parameters" if len(bad) > 1 else ""
        self._skip(f"the gradient of {bad[0]}{more} is not finite" if bad else "the gradient overflows")

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make a step, which counts unless its batch was skipped."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._no_step:
            self._no_step = False
            counts = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
            for count in (counts.total, counts.current):  # Lightning adds 1 after this
                count.completed -= 1
