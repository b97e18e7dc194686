"""The closed forms of cflow's own potentials, each with its vector-Jacobian products and Laplacian.

Shapes: R rows of the state, G flows in the stack, S stages, H hidden units, D dimensions. tanh(x) = 2σ(2x) − 1
everywhere: on CPUs `torch.sigmoid` is several times faster than `torch.tanh`, and one `sigmoid_backward` gives
g·σ(1 − σ).
"""

from .linear import LinearKernel
from .ridge import RidgeKernel
from .two_layer import TwoLayerKernel

__all__ = ["LinearKernel", "RidgeKernel", "TwoLayerKernel"]
