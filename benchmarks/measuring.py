"""How the benchmarks measure: interleaved timing, memory, host reads, CUDA graphs.

Everything that is compared is timed in one process and interleaved: every round runs each call once (or a few times,
where it is short) in a random order, so that a slower minute of the machine hits all of them. Only ratios of one run
mean anything on another machine.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import random
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], object]
Clock = Callable[[], float]

# --- time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one number a round.

    Attributes:
        rounds: seconds a call in each round; the i-th numbers of calls timed together belong to the same moment.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile over the rounds, in seconds: the spread."""
        return quartiles(self.rounds)

    def over(self, other: Timing) -> Timing:
        """How many times the other call's time this one takes, round by round; a ratio instead of seconds."""
        return Timing(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))

    def document(self) -> dict[str, float]:
        """What is kept in JSON."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "rounds": float(len(self.rounds))}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def interleave(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    rounds: int = 20,
    warmup: int = 2,
    budget: float = math.inf,
    least: float = 3e-3,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time calls in one process, interleaved.

    Arguments:
        calls: name → what to time, without arguments.
        device: CUDA is timed by events on the current stream, everything else by the clock.
        rounds: timed rounds.
        warmup: untimed calls of each before.
        budget: seconds after which no further round begins; three rounds are run in any case.
        least: calls shorter than this many seconds are repeated within a round until it is filled.
        clock: `time.process_time` where others use the machine too, and one thread runs.

    Returns:
        name → `Timing`.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        repeats[name] = min(1000, max(1, math.ceil(least / max(stopwatch(call, 1, device, clock), 1e-7))))
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle, start = list(calls), random.Random(0).shuffle, time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        shuffle(order)
        for name in order:
            seconds[name].append(stopwatch(calls[name], repeats[name], device, clock))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def stopwatch(call: Call, repeats: int, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds a call, averaged over `repeats` calls in a row; on CUDA the device's own time, launches included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) * 1e-3 / repeats
    begin = clock()
    for _ in range(repeats):
        call()
    return (clock() - begin) / repeats


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's intra-op threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- memory and synchronisation ----------------------------------------------------------------------------


def held_bytes(forward: Call) -> int:
    """Bytes that a forward pass keeps for its backward pass, its result included.

    Two places are searched after the pass, and each storage is counted once: what autograd saves (seen through
    `saved_tensors_hooks`; what was released again before the end of the pass does not count), and tensors that were
    not alive before (found by the garbage collector: a node may keep states as plain attributes, where the hooks do
    not see them). Storages that existed before the pass, such as parameters, are left out.
    """
    gc.collect()
    before = {x.untyped_storage().data_ptr() for x in _live_tensors()}
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(x: Tensor) -> _Saved:
        kept = _Saved(x.detach())
        saved.add(kept)
        return kept

    gc.freeze()  # what is older need not be searched again
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            result = forward()
        gc.collect()
        found = {}
        for x in [*(kept.tensor for kept in saved), *_live_tensors()]:
            storage = x.untyped_storage()
            if storage.data_ptr() not in before:
                found[storage.data_ptr()] = storage.nbytes()
    finally:
        gc.unfreeze()
    del result
    return sum(found.values())


class _Saved:
    """A tensor that autograd holds; it lives as long as the node that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _live_tensors() -> list[Tensor]:
    kinds = (Tensor, torch.nn.Parameter)  # others, such as those of a tracer, have no memory of their own
    return [x for x in gc.get_objects() if type(x) in kinds and x.layout == torch.strided]


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes that a call allocates at one time beyond those already in use, temporary ones included."""
    if device.type != "cuda":
        return _cpu_peak(call)
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Call) -> int:
    """From the allocator's own events, which PyTorch's profiler records: what a resident set does not tell apart."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    results: Any = profile.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: int(event.start_ns()))
    return max(itertools.accumulate(int(e.nbytes()) for e in events if e.name() == "[memory]"), default=0)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler announces its start and stop there, from C++."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that make the host wait for a number from the device: `.item()`, `bool(x)`, `nonzero`, ….

    On CUDA only tensors that lie there count, and each is a synchronisation. On a CPU all are counted: what would
    synchronise, had every tensor been on a device.

    Example:
        >>> with HostReads() as reads:
        ...     _ = bool(torch.ones(3).sum() > 0), float(torch.ones(()))
        >>> reads.count
        2
    """

    operations = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_cuda = torch.device(device).type == "cuda"
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.operations and (args[0].is_cuda or not self.on_cuda):
            self.count += 1
        return func(*args, **(kwargs or {}))


def cuda_synchronisations(call: Call, device: torch.device) -> int | None:
    """Synchronisations that CUDA's own debug mode reports during a call; None on a CPU, where there are none."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(w.message) for w in caught)


def capture(call: Call, device: torch.device) -> Call | None:
    """Replay of a call recorded as a CUDA graph; None on a CPU.

    Raises:
        RuntimeError: the call makes the host wait for the device, which no graph can hold.
    """
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # warm-up, which PyTorch asks for
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
