"""What all pictures share: the colours, and the axes they are drawn into. Loads no matplotlib until it draws."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ..checks import instance
from ..errors import DependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.floating]

# Okabe and Ito (2008): told apart under the common forms of colour blindness, and in grey.
ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, BLACK = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"),
)
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # of lines, darkest first; yellow is lost on white
TRUE_COLOUR, GENERATED_COLOUR = BLUE, VERMILION
DASHES = ("-", "--", ":")
COLOUR_MAP = "cividis"


def colour(i: int) -> str:
    """The colour of line or group i, any integer."""
    return PALETTE[i % len(PALETTE)]


def dash(i: int) -> str:
    """The line style of line or group i, another one each time the colours begin anew."""
    return DASHES[i // len(PALETTE) % len(DASHES)]


def to_array(x: torch.Tensor) -> NDArray[np.float64]:
    """A tensor of any shape, dtype and device as matplotlib takes it."""
    return x.detach().cpu().double().numpy()


def require(module: str) -> None:
    """Raise an error that names the fix where a module that pictures need is not installed."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is there, and lacks something itself
            raise
        package = {"PIL": "pillow"}.get(module, module)
        raise DependencyError(
            f"cflow.plots: this picture needs {package}, which is not installed; "
            f"pip install {package}, or all that training needs: pip install 'cflow-torch[train]'"
        ) from None


def new_axes(ax: Axes | None, projection: str | None = None) -> Axes:
    """The axes given, or those of a figure of their own."""
    require("matplotlib")
    if ax is not None:
        from matplotlib.axes import Axes as Given

        instance("ax", ax, Given, "axes of matplotlib")
        return ax
    from .figure import ShownFigure

    return ShownFigure(figsize=(5.2, 4.4), layout="constrained").add_subplot(projection=projection)
