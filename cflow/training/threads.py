"""One CPU thread or all of them, whichever is faster at the moment."""

from __future__ import annotations

import os
import time
from collections import deque
from statistics import median

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class FasterThreads(Callback):
    """Now and then tries a few training steps with the other number of threads, and keeps the faster one.

    PyTorch's threads wait for each other busily. On a quiet machine two are faster than one; where another
    program takes one of the cores, a step with two can last ten times as long as with one. Nothing is done on
    other devices, nor where the user has set ``OMP_NUM_THREADS``.

    Arguments:
        interval: seconds before the first trial; it doubles, up to two minutes, with every trial in vain.
        steps: steps of a trial. The first one that lasts three times as long as usual ends it.
    """

    def __init__(self, interval: float = 3.0, steps: int = 5) -> None:
        self.first_interval = self.interval = interval
        self.steps = steps
        self.other = 0
        self._recent: deque[float] = deque(maxlen=5)
        self._best = float("inf")
        self._trial: list[float] | None = None
        self._next = self._step_start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether there is a choice."""
        threads = torch.get_num_threads()
        free = pl_module.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ
        self.other = 1 if free and threads > 1 else 0
        self._next = time.monotonic() + self.interval

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start the clock of a step."""
        self._step_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Take the time of a step."""
        if self.other:
            now = time.monotonic()
            self.record(now - self._step_start, now)

    def record(self, seconds: float, now: float) -> None:
        """Take the time of a step, and begin or end a trial.

        Arguments:
            seconds: what the step took.
            now: the time, in seconds.
        """
        if self._trial is not None:
            self._trial.append(seconds)
            if len(self._trial) == self.steps or seconds > 3 * median(self._recent):
                self._end_trial(now)
            return
        self._recent.append(seconds)
        if len(self._recent) < self.steps:
            return
        usual = median(self._recent)
        self._best = min(self._best, usual)
        # Twice as slow as before: somebody else came.
        if usual > 2 * self._best:
            self._next = min(self._next, now + self.first_interval)
            self._best = usual
        if now >= self._next:
            self._trial = []
            self._switch()

    def _end_trial(self, now: float) -> None:
        trial, self._trial = self._trial or [], None
        if median(trial) < 0.95 * median(self._recent):
            self.interval, self._best = self.first_interval, float("inf")
            self._recent.clear()
            self._recent.extend(trial)
        else:
            self._switch()
        self.interval = min(2 * self.interval, 120.0)
        self._next = now + self.interval

    def _switch(self) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(self.other)
        self.other = threads
