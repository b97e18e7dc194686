"""How the weights learn: Adam, and Muon for the hidden layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..errors import ArgumentError
from ..vae import FlowVAE

OptimizerName = Literal["adam", "muon"]
Group = dict[str, Any]  # parameters with settings of their own, as in PyTorch's optimizers
BETAS = (0.9, 0.99)  # on digits 3 % better than PyTorch's 0.999 at equal steps
MOMENTUM = 0.95
LENGTH = 0.4
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class MuonAdam(Optimizer):
    r"""Muon for hidden layers, Adam for everything else, as one optimizer.

    Muon moves a matrix by its momentum with all singular values made (nearly) equal, so that no direction of a layer
    has to wait for the strong ones:

    .. math:: W ← W − 0.4\,lr \sqrt{\max(m, n)}\; U V^T, \quad U S V^T = \text{momentum}, \quad W ∈ R^{m×n}

    The weights of a convolution are a matrix too, a row for each output channel. With the factor 0.2 steps would be as
    long as Adam's; twice that did better on digits, at learning rates where Adam is well.

    `torch.optim.Muon` always computes in bfloat16, which takes 20 to 40 times as long as float32 on a CPU without it.

    Arguments:
        hidden: weights (m, …) of layers, each a matrix (m, n).
        others: all other parameters, or groups of them as PyTorch's optimizers take.
        lr: learning rate.
        dtype: in which the singular values are made equal, that of the weights by default; bfloat16 is enough.

    References:
        Jordan et al.: Muon: an optimizer for hidden layers in neural networks, 2024.
        Liu et al.: Muon is scalable for LLM training, 2025, arXiv:2502.16982, eq. 4 (the length of a step).

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> optimizer = MuonAdam([layer.weight], [layer.bias], lr=0.1)
        >>> layer(torch.randn(5, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        hidden: Iterable[Tensor],
        others: Iterable[Tensor] | Sequence[Group],
        lr: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        rest: list[Any] = list(others)
        groups: list[Group] = rest if rest and isinstance(rest[0], dict) else [{"params": rest}]
        super().__init__([{"params": list(hidden), "muon": True}, *({"muon": False, **g} for g in groups)], {"lr": lr})
        self._adam = Adam([{**group} for group in self.param_groups[1:]], lr=lr, betas=BETAS, fused=True)
        self._share()

    def _share(self) -> None:
        """Let Adam work on the state and the settings that are saved and set here."""
        for own, made in zip(self.param_groups[1:], self._adam.param_groups, strict=True):
            own |= {k: v for k, v in made.items() if k not in own}
        self._adam.state, self._adam.param_groups = self.state, self.param_groups[1:]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state over."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a step; a closure computes the loss and its gradients first, and the loss is given back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for p in (p for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            matrix = torch.lerp(p.grad, momentum, MOMENTUM).flatten(1).to(self.dtype or p.dtype)
            p.add_(orthogonal(matrix).view_as(p), alpha=-LENGTH * group["lr"] * math.sqrt(max(matrix.shape)))
        self._adam.step()
        return loss


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """U Vᵀ of a matrix (m, n) = U S Vᵀ, but for singular values between 0.7 and 1.2 in place of 1.

    Newton-Schulz iterations with the polynomial whose slope at 0 is steepest, so that small singular values grow fast.

    References:
        Jordan et al., 2024, as `MuonAdam`.

    Example:
        >>> singular_values = torch.linalg.svdvals(orthogonal(torch.diag(torch.tensor([1.0, 0.5, 0.1]))))
        >>> bool(((singular_values > 0.6) & (singular_values < 1.3)).all())
        True
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


def hidden_weights(encoder: nn.Module, decoder: nn.Module) -> list[Tensor]:
    """Weights of the layers of both networks, but for the encoder's first and the decoder's last: those see images.

    Example:
        >>> encoder, decoder = nn.Sequential(nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 4)), nn.Linear(2, 12)
        >>> [tuple(p.shape) for p in hidden_weights(encoder, decoder)]
        [(4, 8)]
    """
    first, last = ([m.weight for m in net.modules() if isinstance(m, LAYERS)] for net in (encoder, decoder))
    return [*first[1:], *last[:-1]]


def make_optimizer(
    name: OptimizerName, vae: FlowVAE, lr: float, dtype: torch.dtype | None = None, *, flow_lr: float = 1.0
) -> Optimizer:
    """Adam for all parameters of a model, or Muon for the hidden layers of encoder and decoder and Adam for the rest.

    Arguments:
        name: which one.
        vae: the model.
        lr: learning rate.
        dtype: of Muon.
        flow_lr: that of the flow, as a part of it; its parameters are a group of their own where this is not 1.

    Raises:
        ArgumentError: another name.
    """
    if name not in get_args(OptimizerName):
        raise ArgumentError(f"model.optimizer: expected {' or '.join(get_args(OptimizerName))}, got {name!r}")
    hidden = hidden_weights(vae.encoder, vae.decoder) if name == "muon" else []
    flow = list(vae.flow.parameters()) if flow_lr != 1 else []
    chosen = {id(p) for p in (*hidden, *flow)}
    groups: list[Group] = [{"params": [p for p in vae.parameters() if id(p) not in chosen]}]
    if flow:
        groups.append({"params": flow, "lr": lr * flow_lr, "part": flow_lr})
    if name == "adam":
        return Adam(groups, lr=lr, betas=BETAS, fused=True)
    return MuonAdam(hidden, groups, lr, dtype)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """The learning rate of the next step, of what `make_optimizer` has made.

    Example:
        >>> from cflow import nets
        >>> optimizer = make_optimizer("adam", nets.build_vae(latent_dim=4, width=16), lr=1.0, flow_lr=0.25)
        >>> set_learning_rate(optimizer, 0.1)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.025]
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("part", 1.0)


def bfloat16_in_software(accelerator: object) -> bool:
    """Whether a trainer of this accelerator runs on a CPU for which oneDNN has no bfloat16 kernels.

    Convolutions then take ten times as long as in float32 (AVX2 processors).
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return on_cpu and supported is not None and not supported()
