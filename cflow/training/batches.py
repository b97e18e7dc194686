"""What a training step sees: which things, under which transformations, at which times. It follows from a seed alone.

Everything is drawn from (seed, number of the batch), never from a generator that has been used before: a fit that goes
on from a checkpoint sees what it would have seen, with any number of workers.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from einops import repeat
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data import Sequences, constant_speeds, draw_speeds


class Batch(NamedTuple):
    """B things, each under one transformation.

    Attributes:
        stored: what is stored of them, (B, …).
        k: their transformations (B,), of which the frames are made; or, where those are mixed, how fast each goes in
            each interval between the frames of a whole sequence (B, S, K).
        t: times of the frames, (T+1,) or (B, T+1), or (B, m+1) where only those are made that are decoded.
        mask: how often each frame counts, or booleans where some are missing; None where every frame counts once.
        labels: k where the model is told, −1 where it is not, (B,); None where it is never told, or always.
        start: by how much of each transformation (B, K) what is stored is transformed before; None for not at all.
    """

    stored: Tensor
    k: Tensor
    t: Tensor
    mask: Tensor | None
    labels: Tensor | None = None
    start: Tensor | None = None

    def times(self, rows: Tensor) -> Tensor:
        """The times of some sequences, (T+1,) or (n, T+1)."""
        return self.t if self.t.ndim == 1 else self.t[rows]

    def there(self, rows: Tensor) -> Tensor | None:
        """The mask of some sequences (n, T+1)."""
        return None if self.mask is None else self.mask[rows]

    def of(self, rows: Tensor) -> Batch:
        """Some sequences alone."""
        t, each = self.times(rows), (self.stored, self.k, self.mask, self.labels, self.start)
        stored, k, *rest = (None if x is None else x[rows] for x in each)
        return Batch(cast(Tensor, stored), cast(Tensor, k), t, *rest)


class Stream(Sampler[list[tuple[int, int]]]):
    """One endless sequence of batches: all things in a new order, and again. Lists of (number of the batch, thing).

    An epoch ends after as many batches as hold all things once; batches are always full, and may reach across the
    orders. Of several processes each gets its part of a batch.

    Arguments:
        count: number of things.
        batch_size: things a batch, and process.
        seed: of the orders.
        start: number of the batch with which the next epoch begins.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int, start: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start
        self.rank, self.world_size = rank, world_size
        self._order = functools.lru_cache(2)(self._new_order)

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start()
        for number in range(first, first + len(self)):
            yield [(number, thing) for thing in self.batch(number)]

    def batch(self, number: int) -> list[int]:
        """The things in a batch."""
        place = (number * self.world_size + self.rank) * self.batch_size
        return [self._order(i // self.count)[i % self.count] for i in range(place, place + self.batch_size)]

    def _new_order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(self.count, generator=generator(self.seed, epoch)).tolist()
        return order


class Drawn(Dataset[Batch]):
    """Things, each under a transformation and at times of its own, drawn anew for every batch.

    Arguments:
        source: what is trained on.
        frames_per_step: frames decoded of each, see `draw_frames`.
        seed: of the draws.
        rank: number of this process.
        whole: whether all frames are made, for a model that infers k from them, and the others only weigh 0.
        labelled: part of the things that have a label: under any transformation the model is told which one it is.
        random_starts: whether sequences begin anywhere, see `draw_starts`.
        mixed: whether transformations are mixed, see `data.draw_speeds`.
    """

    def __init__(
        self,
        source: Sequences,
        frames_per_step: int,
        seed: int,
        rank: int = 0,
        *,
        whole: bool = False,
        labelled: float = 0.0,
        random_starts: bool = False,
        mixed: bool = False,
    ) -> None:
        self.mixed = mixed
        self.source, self.frames_per_step, self.seed, self.rank = source, frames_per_step, seed, rank
        self.whole, self.random_starts = whole, random_starts
        self.has_label = choose_labelled(len(source), labelled, seed) if labelled else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, chosen: list[tuple[int, int]]) -> Batch:
        """A whole batch: PyTorch's loader asks for it where a data set can."""
        index = torch.tensor([thing for _, thing in chosen])
        draws = generator(self.seed, chosen[0][0], self.rank, 1)
        if self.mixed:
            k = draw_speeds(len(index), self.source.num_frames - 1, len(self.source.names), draws)
        else:
            k = draw_transformations(self.source, index, draws)
        times, there = self.source.frame_times(index)
        if times.ndim == 1 and there is None:
            t, mask = draw_frames(times, len(index), self.frames_per_step, draws, whole=self.whole)
        else:
            times = times.expand(len(index), -1)
            t, mask = draw_own_frames(times, there, self.frames_per_step, draws, whole=self.whole)
        labels = None if self.has_label is None else torch.where(self.has_label[index], k, -1)
        start = None
        if self.random_starts:
            t, start = draw_starts(t, k, len(self.source.names), float(self.source.times[-1]), draws)
        return Batch(self.source.read(index, k, t), k, t, mask, labels, start)


class Whole(Dataset[Batch]):
    """Things, each under every transformation and at all times: K sequences of each of the first `count`, in order.

    Of things that show one transformation only, that one; of each transformation one sequence at least. Where they are
    mixed there is one sequence more of each thing, behind the others, always the same.
    """

    def __init__(self, source: Sequences, count: int, *, mixed: bool = False) -> None:
        self.mixed = mixed
        self.source, self.count = source, count if source.labels is None else max(count, len(source.names))

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitems__(self, chosen: list[int]) -> Batch:
        """A whole batch, transformation by transformation: K·B sequences, or B of things that have one each."""
        things = torch.tensor(chosen)
        k, index = every(self.source, things)
        if self.mixed:
            intervals, count = self.source.num_frames - 1, len(self.source.names)
            own = [draw_speeds(1, intervals, count, generator("mixed", thing)) for thing in chosen]
            k, index = torch.cat([constant_speeds(k, intervals, count), *own]), torch.cat([index, things])
        t, there = self.source.frame_times(index)
        return Batch(self.source.read(index, k, t), k, t, there)


def every(source: Sequences, things: Tensor) -> tuple[Tensor, Tensor]:
    """All sequences of things (B,): their transformations, one after the other, and the numbers of the things."""
    if source.labels is not None:
        return source.labels[things], things
    flows = len(source.names)
    return repeat(torch.arange(flows), "k -> (k b)", b=len(things)), repeat(things, "b -> (k b)", k=flows)


def seen(trainer: Any) -> int:
    """How many batches the trainer has seen in all, over all resumed fits: the number of the batch that comes next."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def generator(*numbers: int | str) -> torch.Generator:
    """A generator whose numbers follow from some others: a seed, and what they are drawn for."""
    return torch.Generator().manual_seed(mixed(*numbers))


def mixed(*numbers: int | str) -> int:
    """One seed in [0, 2^32) out of several numbers; neighbours give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest())


def choose_labelled(count: int, part: float, seed: int) -> Tensor:
    """Which of `count` things have a label, (count,): always the same ones under one seed, and at least one.

    Example:
        >>> int(choose_labelled(1000, 0.01, seed=0).sum())
        10
    """
    order = torch.randperm(count, generator=generator(seed, "labelled"))
    return order < max(round(part * count), 1)


def draw_transformations(source: Sequences, index: Tensor, draws: torch.Generator) -> Tensor:
    """The transformation of each thing (B,): any one where there are sequences under all, else its own."""
    if source.labels is not None:
        return source.labels[index]
    return torch.randint(len(source.names), (len(index),), generator=draws)


def draw_frames(
    times: Tensor, batch: int, count: int, draws: torch.Generator | None = None, *, whole: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Draw the frames that a training step decodes.

    The T+1 frames are cut into `count` stretches of nearly equal length; each sample draws one frame of each.

    Arguments:
        times: times of the frames (T+1,).
        batch: number of samples B.
        count: frames decoded a sample, m ≤ T+1.
        draws: the generator to use.
        whole: keep the other frames, with weight 0.

    Returns:
        Times (B, m+1), the first of which is that of the input, and a mask (B, m+1) that weights each frame
        by the length of its stretch (0 for the input), so that the expected sum is that over all frames;
        with `whole` times (T+1,) and a mask (B, T+1) of the same weights; times (T+1,) and None where all frames
        are decoded.

    Example:
        >>> t, mask = draw_frames(torch.arange(9.0), batch=4, count=3)
        >>> t.shape, mask[0]
        (torch.Size([4, 4]), tensor([0., 3., 3., 3.]))
        >>> t, mask = draw_frames(torch.arange(9.0), batch=4, count=3, whole=True)
        >>> t.shape, mask.count_nonzero(1)
        (torch.Size([9]), tensor([3, 3, 3, 3]))
    """
    if count >= len(times):
        return times, None
    stretches = torch.tensor_split(torch.arange(len(times)), count)
    drawn = torch.stack([part[torch.randint(len(part), (batch,), generator=draws)] for part in stretches], 1)
    lengths = torch.tensor([float(len(part)) for part in stretches]).expand(batch, -1)
    if whole:
        return times, torch.zeros(batch, len(times)).scatter_(1, drawn, lengths)
    first = torch.zeros(batch, 1)
    return torch.cat([times[first.long()], times[drawn]], 1), torch.cat([first, lengths], 1)


def draw_own_frames(
    times: Tensor, there: Tensor | None, count: int, draws: torch.Generator | None = None, *, whole: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`draw_frames` of sequences with times of their own, of whose frames some may be missing.

    Arguments:
        times: of the frames (B, T+1).
        there: which of them are there (B, T+1), the first one always; None for all.
        count: frames decoded a sample, m ≤ T+1, or all where fewer are there.
        draws: the generator to use.
        whole: keep the other frames, with weight 0; where some are missing, all that are there count.

    Returns:
        Times and weights (B, m+1), or (B, T+1) with `whole`; times and `there` where all frames are decoded.

    Example:
        >>> times = torch.tensor([[0.0, 0.5, 2.0, 2.0], [0.0, 1.0, 2.5, 3.0]])
        >>> there = torch.tensor([[True, True, True, False], [True, False, True, False]])
        >>> t, weights = draw_own_frames(times, there, 2)
        >>> weights.sum(1), t[1]
        (tensor([3., 2.]), tensor([0.0000, 0.0000, 2.5000]))
    """
    batch, frames = times.shape
    if count >= frames or (whole and there is not None):
        return times, there
    if there is None:
        slots, weights = draw_frames(torch.arange(frames), batch, count, draws, whole=whole)
        return (times, weights) if whole else (times.gather(1, slots), weights)
    slots, weights = torch.zeros(batch, count + 1, dtype=torch.long), torch.zeros(batch, count + 1)
    for row, own in enumerate(there):
        drawn, weight = draw_frames(own.nonzero()[:, 0], 1, count, draws)
        kept = drawn.shape[-1]
        slots[row, -kept:], weights[row, -kept:] = drawn.flatten(), 1 if weight is None else weight.flatten()
    return times.gather(1, slots), weights


def draw_starts(
    t: Tensor, k: Tensor, count: int, last: float, draws: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw where sequences begin, so that training sees what one transformation does to the work of others.

    Each of the other transformations has been applied before with probability ½, by an amount uniform in [0, T]. With
    probability ½ the sequence's own goes not from 0 to T but between two times uniform in [0, T], in either direction:
    the times of all its frames are stretched to these.

    Arguments:
        t: times of the frames, (m+1,) or (B, m+1), within [0, T].
        k: the transformation of each sequence (B,).
        count: number of transformations K.
        last: T.
        draws: the generator to use.

    Returns:
        The times (B, m+1), and how much of each transformation there is before (B, K), 0 of a sequence's own.

    Example:
        >>> t, start = draw_starts(torch.arange(9.0), torch.tensor([0, 2]), count=3, last=8.0)
        >>> t.shape, start.shape, start[0, 0].item(), start[1, 2].item()
        (torch.Size([2, 9]), torch.Size([2, 3]), 0.0, 0.0)
    """
    batch, rows = len(k), torch.arange(len(k))
    some = torch.rand(batch, count, generator=draws) < 0.5
    start = last * torch.rand(batch, count, generator=draws) * some
    anywhere = last * torch.rand(batch, generator=draws)
    begin, end = start[rows, k], torch.where(some[rows, k], anywhere, last)
    start[rows, k] = 0
    return begin[:, None] + (end - begin)[:, None] * (t / last), start
