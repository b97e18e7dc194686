"""The modes in which PyTorch computes: inference, autocast, and transformations that look at every operation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since torch 2.7


def traced() -> bool:
    """Whether values may not be read: inside transformations of `torch.func`, and `torch.export`.

    Not inside `torch.compile`, which leaves what it cannot trace to the interpreter.
    """
    return torch._C._are_functorch_transforms_active() or exporting()


def unreadable(x: Tensor) -> bool:
    """Whether the values of a tensor may not be read for a check: traced, or while a CUDA graph is recorded."""
    return traced() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def concrete() -> contextlib.AbstractContextManager[object]:
    """Outside of tracers: what is made of plain numbers stays plain numbers."""
    return _disable_current_modes() if exporting() else contextlib.nullcontext()  # type: ignore[no-untyped-call]


class _Recording(threading.local):
    on = False


_recording = _Recording()


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """`transformed`, in this thread: a compiler is shown every operation, and arranges memory itself."""
    _recording.on = True
    try:
        yield
    finally:
        _recording.on = False


def transformed() -> bool:
    """Whether every operation is looked at: as `traced`, for forward-mode derivatives, or by `plain_operations`.

    Then memory may not be used again, and nothing be hidden in a node of its own.
    """
    return _recording.on or traced() or forward_ad._current_level >= 0


def unrecorded() -> contextlib.AbstractContextManager[object]:
    """Inference mode, where every operation costs less, unless something records or transforms what is computed.

    Closed forms only: inside it the gradient of a user's module would be zero. What is made inside and lives on as a
    result has to be copied outside, see `ordinary`.
    """
    if torch.is_grad_enabled() or transformed():
        return contextlib.nullcontext()
    return torch.inference_mode()


def recorded() -> contextlib.AbstractContextManager[object]:
    """Gradients are recorded, also inside inference mode."""
    if not torch.is_inference_mode_enabled():
        return torch.enable_grad()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    return stack


def ordinary(x: Tensor) -> Tensor:
    """x, or a copy of one that was made in inference mode, which autograd would refuse to save."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def full_precision(device: str) -> contextlib.AbstractContextManager[object]:
    """Autocast off; and out of inference mode, where a gradient would silently be zero."""
    if not torch.is_inference_mode_enabled():
        if not torch.is_autocast_enabled(device):
            return contextlib.nullcontext()
        return torch.autocast(device, enabled=False)
    stack = contextlib.ExitStack()
    for mode in (torch.autocast(device, enabled=False), torch.inference_mode(False), torch.no_grad()):
        stack.enter_context(mode)
    return stack
