"""Functions behind `torch.compile`, with eager execution where no compiler works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config


class Compiled:
    """A function that is compiled at its first call, and again for inputs of another kind.

    Where compiling fails (no C++ compiler, an operation that cannot be compiled) it warns once and runs eagerly. Its
    backward pass may run twice: buffers are not donated, which torchdiffeq's adjoint would trip over.

    Example:
        >>> square = Compiled(torch.square)
        >>> square.is_compiled  # nothing has been called yet
        False
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.failed = False
        self._compiled: Any = None

    @property
    def is_compiled(self) -> bool:
        """Whether calls run compiled code."""
        return self._compiled is not None and not self.failed

    def __call__(self, *args: Any) -> Any:
        """Call the function, compiled where that works."""
        if self.failed:
            return self.function(*args)
        if self._compiled is None:
            self._compiled = torch.compile(self.function, backend=_inductor)
        try:
            with warnings.catch_warnings():
                # the compiler looks at .grad of everything it sees, and under "error" would stumble over the warning
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
                return self._compiled(*args)
        except Exception as error:
            result = self.function(*args)  # an error of the function itself comes again here
            self.failed = True
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"compile: the velocity could not be compiled ({type(error).__name__}: {reason[:200]}); it runs "
                "uncompiled. Install a C++ compiler, or leave compile=True out",
                stacklevel=2,
            )
            return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # compiled code can be neither pickled nor copied


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """PyTorch's default backend, without donated buffers: set here, and not around each call, which costs 50 µs."""
    from torch._inductor.compile_fx import compile_fx  # it takes seconds to import

    with torch._functorch.config.patch(donated_buffer=False):
        return compile_fx(graph, inputs)
