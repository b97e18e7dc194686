"""The velocity field of the original code, written anew from its description, and a stacked one by autograd.

Both hold copies of an `MLPPotential`'s weights, so that whatever is compared with cflow computes the same numbers. They
are what one writes without cflow: torchdiffeq's `f(t, z)`, with the gradient of u by autograd.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

import cflow


class AutogradField(nn.Module):
    """dz/dt = ∇_z Σ_k w_k u_k(z, t) by `torch.autograd.grad`, as a field of torchdiffeq.

    Attributes:
        w: mixture weights (B, K).
        nfe: calls so far.
    """

    w: Tensor

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("w", w)
        self.nfe = 0

    def gradient(self, z: Tensor, t: Tensor, training: bool) -> Tensor:
        """∇_z Σ_k w_k u_k (B, D), with a graph in training, for z (B, D) that requires a gradient and a scalar t."""
        raise NotImplementedError

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """The velocity (B, D); it keeps a graph where gradients are recorded."""
        self.nfe += 1
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            if not (training and z.requires_grad):
                z = z.detach().requires_grad_()
            return self.gradient(z, t, training)


class OriginalField(AutogradField):
    """One small network and one gradient a flow, in a Python loop over K.

    Arguments:
        net: the potential whose weights are copied; no output_tanh.
        w: mixture weights (B, K).
    """

    def __init__(self, net: cflow.MLPPotential, w: Tensor) -> None:
        super().__init__(w)
        self.nets = nn.ModuleList(_OriginalPotential(net, k) for k in range(net.num_flows))

    def gradient(self, z: Tensor, t: Tensor, training: bool) -> Tensor:
        """∇_z Σ_k w_k u_k (B, D), the sum of K gradients."""
        v = torch.zeros_like(z)
        for k, net in enumerate(self.nets):
            v = v + self.w[:, k : k + 1] * torch.autograd.grad(net(z, t).sum(), z, create_graph=training)[0]
        return v


class _OriginalPotential(nn.Module):
    """u(z, t) = a · tanh(W2 (tanh(W1 z + b1) + τ(t)) + b2), τ = V2 gelu(V1 s(t) + c1) + c2."""

    frequencies: Tensor

    def __init__(self, net: cflow.MLPPotential, k: int) -> None:
        super().__init__()
        rows = slice(k * net.hidden, (k + 1) * net.hidden)
        time = _time_net(net)
        self.register_buffer("frequencies", frequencies(net), persistent=False)
        self.layer_x = _linear(net.w1[rows], net.b1[rows])
        self.layer_time = _linear(time.w1[rows], time.b1[rows])
        self.layer_time2 = _linear(time.w2[k], time.b2[k, 0])
        self.layer_fusion = _linear(net.w2[k], net.b2[k, 0])
        self.layer_out = _linear(net.a[k], None)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        angle = t.reshape(-1, 1) * self.frequencies
        tau = self.layer_time2(nn.functional.gelu(self.layer_time(torch.cat([angle.sin(), angle.cos()], -1))))
        h = torch.tanh(self.layer_fusion(torch.tanh(self.layer_x(z)) + tau))
        return cast(Tensor, self.layer_out(h)[:, 0])


class StackedField(AutogradField):
    """All flows in one stack of batched products, with one gradient by autograd.

    Arguments:
        net: the potential whose weights are copied; no output_tanh.
        w: mixture weights (B, K).
    """

    frequencies: Tensor

    def __init__(self, net: cflow.MLPPotential, w: Tensor) -> None:
        super().__init__(w)
        time = _time_net(net)
        self.register_buffer("frequencies", frequencies(net), persistent=False)
        shape = (net.num_flows, net.hidden, -1)
        self.w1, self.b1 = _copy(net.w1.view(shape)), _copy(net.b1.view(net.num_flows, 1, -1))
        self.v1, self.c1 = _copy(time.w1.view(shape)), _copy(time.b1.view(net.num_flows, 1, -1))
        self.v2, self.c2 = _copy(time.w2), _copy(time.b2)
        self.w2, self.b2, self.a = _copy(net.w2), _copy(net.b2), _copy(net.a)

    def gradient(self, z: Tensor, t: Tensor, training: bool) -> Tensor:
        """∇_z Σ_k w_k u_k (B, D), one gradient of the sum."""
        angle = t.reshape(-1, 1) * self.frequencies
        s = torch.cat([angle.sin(), angle.cos()], -1)
        tau = nn.functional.gelu(s @ self.v1.mT + self.c1) @ self.v2.mT + self.c2  # (K, 1 or B, H)
        h = torch.tanh((torch.tanh(z @ self.w1.mT + self.b1) + tau) @ self.w2.mT + self.b2)  # (K, B, H)
        u = ((h * self.a).sum(-1).mT * self.w).sum()
        return torch.autograd.grad(u, z, create_graph=training)[0]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| over the largest |b|, in float64."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().amax() / b.abs().amax().clamp_min(1e-30))


def check_same_velocity(net: cflow.MLPPotential, field: AutogradField, z: Tensor, tolerance: float = 2e-5) -> float:
    """Compare a field's velocity with cflow's, at z (B, D) and a few times.

    Returns:
        the largest relative difference.

    Raises:
        RuntimeError: they differ by more than `tolerance`: nothing that is timed with them would be comparable.
    """
    worst, flow = 0.0, cflow.PotentialFlow(net)
    for time in (0.0, 1.5, 8.0):
        with torch.no_grad():
            worst = max(worst, relative_difference(field(z.new_tensor(time), z), flow.velocity(z, field.w, time)))
    field.nfe = 0
    if not worst <= tolerance:
        raise RuntimeError(f"{type(field).__name__} and {type(net).__name__} differ by {worst:.1e}; nothing is timed")
    return worst


def frequencies(net: cflow.MLPPotential) -> Tensor:
    """exp(−i ln(10⁴)/(h − 1)), i = 0 .. h − 1, of the time features (h,), with h = D/2 but at least 4."""
    half = max(net.dim // 2, 4)
    return torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float64) / (half - 1)).to(net.w1)


def _time_net(net: cflow.MLPPotential) -> Any:
    if net.time is None or net.output_tanh:
        raise ValueError("expected a time-dependent MLPPotential without output_tanh")
    return net.time


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of weight (out, in) and bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight = _copy(weight)
    if bias is not None:
        layer.bias = _copy(bias)
    return layer


def _copy(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().clone())
