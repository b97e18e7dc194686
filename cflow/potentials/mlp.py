"""The paper's potential, a network with two hidden layers, and its closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import positive_int
from .autograd import Derivatives
from .base import Derivation, Potential
from .closed_form import States
from .field import Mixture, Tensors, Time
from .stack import StackedForm, add, add_product, join, sigmoid, sigmoid_vjp, sigmoid_vjp_into
from .time import ROOT_HALF, TimeNet, affine, gelu, parameters_of, sinusoids, uniform


class MLPPotential(Potential):
    r"""The two-hidden-layer network of Flow Factorized Representation Learning, K of them in one stack.

    .. math:: u_k(z, t) = a_k · tanh(W_{2k}(tanh(W_{1k} z + b_{1k}) + τ_k(t)) + b_{2k}),
        \quad τ_k(t) = V_{2k} gelu(V_{1k} s(t) + c_{1k}) + c_{2k}

    with s(t) sinusoidal features. u_k has no bias of its own (a constant has no gradient), except under
    `output_tanh`, where u_k = tanh(a_k · … + b_k).

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167.

    Arguments:
        dim: latent dimensions D ≥ 1.
        num_flows: number of flows K.
        hidden: width of the hidden layers; None takes D, as in the paper.
        output_tanh: squash u into (−1, 1), as the original code does.
        time_dependent: whether u sees t.

    Example:
        >>> u = MLPPotential(dim=4, num_flows=3)
        >>> u(torch.randn(5, 4), torch.tensor(0.5)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        *,
        hidden: int | None = None,
        output_tanh: bool = False,
        time_dependent: bool = True,
    ) -> None:
        super().__init__(dim, num_flows, time_dependent)
        hidden = self.hidden = dim if hidden is None else positive_int("hidden", hidden)
        self.output_tanh = bool(output_tanh)
        self.w1 = uniform(num_flows * hidden, dim, fan_in=dim)  # rows of flow 0, then of flow 1, …
        self.b1 = uniform(num_flows * hidden, fan_in=dim)
        self.w2 = uniform(num_flows, hidden, hidden, fan_in=hidden)
        self.b2 = uniform(num_flows, 1, hidden, fan_in=hidden)
        self.a = uniform(num_flows, 1, hidden, fan_in=hidden)
        self.b = uniform(num_flows, fan_in=hidden) if output_tanh else None
        self.time = _StackedTimeNet(dim, num_flows, hidden) if time_dependent else None

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z, t) of shape (B, K), for z (B, D) and t a scalar or (B,)."""
        h1 = torch.tanh(torch.addmm(self.b1, z, self.w1.mT)).view(len(z), self.num_flows, self.hidden).transpose(0, 1)
        if self.time is not None:
            h1 = h1 + self.time(t)  # (K, 1 or B, H)
        out = (torch.tanh(torch.baddbmm(self.b2, h1, self.w2.mT)) * self.a).sum(-1).mT
        return out if self.b is None else torch.tanh(out + self.b)

    def derivation(self) -> Derivation:
        """As for every potential, but under `output_tanh` the field is that of the argument of the last tanh."""
        found = super().derivation()
        return "gradient" if found == "field" and self.output_tanh else found

    def field(self, mixture: Mixture) -> MLPClosedForm:
        """∇ Σ w_k u_k of one mixture; under `output_tanh` that of the argument of the last tanh."""
        return MLPClosedForm(mixture, parameters_of(self, "w1", "b1", "w2", "b2", "a"), self.time)

    def gradient(self, z: Tensor, w: Tensor, t: Tensor, *, laplacian: bool = False) -> Derivatives:
        """∇_z Σ w_k u_k (B, D) and, if asked, its Laplacian (B,), which costs K·H²·D multiplications a sample."""
        if self._derivation != "field" or not self.output_tanh:
            return super().gradient(z, w, t, laplacian=laplacian)
        # u = tanh(g): ∇u = (1 − u²) ∇g, Δu = (1 − u²) (Δg − 2 u ‖∇g‖²)
        u = self(z, t)
        w = w * (1 - u.square())
        form = self.field(Mixture(w, row_times=t.ndim > 0))
        if not laplacian:
            return form.velocity(z, form.at(t)), None
        v, lap = form.with_divergence(None).velocity_and_divergence(z, form.at(t))
        forms = [self.field(Mixture(flows=(k,), row_times=t.ndim > 0)) for k in range(self.num_flows)]
        squares = torch.stack([form.velocity(z, form.at(t)).square().sum(-1) for form in forms], 1)
        return v, lap - 2 * (w * u * squares).sum(-1)


class _StackedTimeNet(TimeNet):
    """τ_k(t) of the paper's network for all k, (K, 1 or n, H) at times () or (n,)."""

    def __init__(self, dim: int, num_flows: int, hidden: int) -> None:
        super().__init__(dim)
        self.w1 = uniform(num_flows * hidden, self.size, fan_in=self.size)
        self.b1 = uniform(num_flows * hidden, fan_in=self.size)
        self.w2 = uniform(num_flows, hidden, hidden, fan_in=hidden)
        self.b2 = uniform(num_flows, 1, hidden, fan_in=hidden)

    def forward(self, t: Tensor) -> Tensor:
        return _tau(t, self.tensors(Mixture()), 1)

    def tensors(self, mixture: Mixture) -> Tensors:
        """What `_tau` reads for the flows that take part."""
        w1, b1, w2, b2 = parameters_of(self, "w1", "b1", "w2", "b2")
        if mixture.flows:
            hidden = w2.shape[1]
            w1, b1 = (mixture.stack(x.view(-1, hidden, *x.shape[1:])).flatten(0, 1) for x in (w1, b1))
            w2, b2 = mixture.stack(w2), mixture.stack(b2)
        return self._buffers["frequency"], self._buffers["phase"], w1, b1, w2, b2  # type: ignore[return-value]


def _tau(t: Tensor, tensors: Sequence[Tensor], blocks: int) -> Tensor:
    """(G, 1, H) at a time (), (G, n, H) at shared times (n,); (n, G, R or R/G, H) at times of rows (n, R)."""
    frequency, phase, w1, b1, w2, b2 = tensors
    s = sinusoids(t, frequency, phase)  # (F,), (n, F) or (n, R, F)
    flows, _, hidden = b2.shape
    if t.ndim == 0:
        y = affine(s, w1, b1, ROOT_HALF, ROOT_HALF).view(flows, 1, hidden)
    elif t.ndim == 2 and blocks > 1:
        s = s.view(len(t), flows, -1, s.shape[-1]).transpose(0, 1).flatten(1, 2)  # (G, n · R/G, F)
        w1, b1 = w1.view(flows, hidden, -1), b1.view(flows, 1, hidden)
        y = torch.baddbmm(b1, s, w1.mT, beta=ROOT_HALF, alpha=ROOT_HALF)
    else:
        y = affine(s.flatten(0, -2), w1, b1, ROOT_HALF, ROOT_HALF).view(-1, flows, hidden).transpose(0, 1)
    out = torch.baddbmm(b2, gelu(y), w2.mT, alpha=ROOT_HALF)  # (G, n or n · R/G, H)
    return out if t.ndim < 2 else out.view(flows, len(t), -1, hidden).transpose(0, 1)


class MLPClosedForm(StackedForm):
    r"""∇ Σ_k w_k a_k · tanh(W_{2k}(tanh(W_{1k} z + b_{1k}) + τ_k(t)) + b_{2k}).

    With s₁ = σ(2a₁), s₂ = σ(2a₂) and c = 16 w a the pass backwards is q = c s₂(1 − s₂) (4 ∂U/∂a₂), p = W₂ᵀ q, and
    r = p s₁(1 − s₁) = ∂U/∂a₁. Its main tensors are W₁, b₁, W₂, c; and b₂ − W₂ 1 where τ differs from row to row. Its
    entry of the times is b₂ + W₂(τ − 1), or else τ/2. Activations are s₁, x = s₁ + τ/2, s₂, q, r.
    """

    stage_axis = 1

    def __init__(self, mixture: Mixture, parameters: Sequence[Tensor], time: _StackedTimeNet | None) -> None:
        w1, b1, w2, b2, a = parameters
        hidden, factors = w2.shape[1], mixture.factors()
        if mixture.flows:
            w1, b1 = self.layer(mixture, hidden, w1, b1)
            w2, b2, a = map(mixture.stack, (w2, b2, a))
        c = torch.add(a, a, alpha=15)  # without a conversion of the number
        main: Tensors = (w1, b1, w2, c if factors is None else c * factors)
        if mixture.row_times and time is not None:
            main += (torch.baddbmm(b2, torch.full_like(b2, -1.0), w2.mT),)
        rest = (b2,) if time is None else (b2, *time.tensors(mixture))
        super().__init__(mixture, (*main, *rest), len(main), hidden)
        self.row_times &= time is not None

    def prepare(self) -> None:
        super().prepare()
        self.unused, self.w2t = self.tensors[1], self.tensors[2].mT
        self.base = self.tensors[4 : self.num_main]
        self.b2, *self.time = self.tensors[self.num_main :]

    def _bias(self, t: Tensor) -> Tensor:
        """b₂ + W₂(τ − 1) (G, 1 or n, H) at times () or (n,)."""
        tau = _tau(t, self.time, self.blocks) - 1 if self.time else torch.full_like(self.b2, -1.0)
        return torch.baddbmm(self.b2, tau, self.w2t)

    def embed(self, t: Tensor) -> Tensors:
        if self.row_times:
            return (0.5 * _tau(t, self.time, self.blocks),)  # (n, G, R or R/G, H)
        if not self.time:
            return (self._bias(t).expand(len(t), *self.b2.shape),)
        return (self._bias(t).transpose(0, 1)[:, :, None],)  # (n, G, 1, H)

    def at(self, t: Tensor) -> Time:
        return super().at(t) if self.row_times else (self._bias(t),)

    def activations(self, z: Tensor, time: Tensors, *, inplace: bool) -> Tensors:
        _, b1, w2, c = self.tensors[:4]
        s1 = sigmoid(self.first(z, b1, 2), inplace=inplace)
        x, bias = (s1 + time[0], self.base[0]) if self.base else (s1, time[0])
        s2 = sigmoid(torch.baddbmm(bias, x, self.w2t, beta=2, alpha=4), inplace=inplace)
        q = sigmoid_vjp(c, s2)
        p = torch.bmm(q, w2)
        return s1, x, s2, q, sigmoid_vjp_into(self.rowwise(p), p, s1) if inplace else sigmoid_vjp(p, s1)

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        _, b1, w2, c = self.tensors[:4]
        r, s1 = self.first_sigmoid(z, b1)
        x, bias = (s1 + time[0], self.base[0]) if self.base else (s1, time[0])
        s2 = torch.baddbmm(bias, x, self.w2t, beta=2, alpha=4).sigmoid_()
        sigmoid_vjp_into(s1, torch.bmm(sigmoid_vjp_into(s2, c, s2), w2), s1)
        return self.last_of(r)

    def activations_of_several(self, z: Tensor, times: Tensors) -> Tensors:
        """Of S states at once, (G, S, R or R/G, H), with two factors that every product needs."""
        _, b1, w2, c = self.tensors[:4]
        count, flows, hidden = z.shape[0], self.flows, self.hidden
        if self.blocks > 1:
            z = z.view(count, flows, -1, z.shape[-1]).transpose(0, 1)
        s1 = torch.sigmoid_(self.first(z.reshape(-1, self.dim), b1, 2)).reshape(flows, count, -1, hidden)
        time = times[0].transpose(0, 1)  # (G, S, 1 or R or R/G, H)
        x, bias = (s1 + time, self.base[0][:, None]) if self.base else (s1, time)
        a2 = torch.bmm(x.flatten(1, 2), self.w2t).view(x.shape)
        s2 = torch.sigmoid_(torch.add(2 * bias, a2, alpha=4))
        q = sigmoid_vjp(c[:, None], s2)
        r = sigmoid_vjp(torch.bmm(q.flatten(1, 2), w2).view(x.shape), s1)
        return s1, x, s2, q, r, *_curvatures(s1, s2, q, r)

    def velocity_of(self, activations: Tensors, *, inplace: bool) -> Tensor:
        return self.last(activations[4])

    def vjp(self, activations: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        s1, _, s2, q, r, *curved = activations
        w2 = self.tensors[2]
        curved2, curved1 = curved or _curvatures(s1, s2, q, r)
        a1 = self.first_linear(cotangent, 8)  # 8 times the derivative of a₁ along λ
        h1 = sigmoid_vjp(a1, s1)  # twice that of tanh(a₁)
        a2 = torch.bmm(h1, self.w2t)
        dq = curved2 * a2
        dp = torch.bmm(dq, w2)
        dr = sigmoid_vjp_into(self.rowwise(dp), dp, s1).addcmul_(curved1, a1, value=0.25)
        return self.last(dr), (h1, a2, dq, dr)

    def vjp_parameters(self, states: States, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        w2, c = self.tensors[2:4]
        w1_total, w2_total = (None, None) if totals is None else (totals[0], totals[2])
        _, x, s2, q, r = (part.flatten(1, 2) for part in states.activations[:5])  # (G, S·R or S·R/G, H)
        h1, a2, dq = (join([each[i] for each in states.tangents]) for i in range(3))
        shape = len(dq), len(states.tangents), -1, dq.shape[-1]
        grad_w1, grad_b1 = self.first_gradient(states, [each[3] for each in states.tangents], r, w1_total)
        grad_w2 = add_product(add_product(w2_total, q.mT, h1, 0.125), dq.mT, x, 0.5)
        grad_c = sigmoid_vjp(a2, s2).view(shape)
        grad_c = grad_c.sum((1, 2)) if c.shape[1] == 1 else grad_c.sum(1) if shape[1] > 1 else grad_c[:, 0]
        grad_c = grad_c.mul_(0.125).view(c.shape)
        grads = grad_w1, grad_b1, grad_w2, grad_c
        if self.base:
            times = 0.5 * torch.bmm(dq, w2).view(shape)
            return add((*grads, 0.25 * dq.sum(1, keepdim=True)), totals), (times.transpose(0, 1),)
        return add(grads, totals), (0.25 * dq.view(shape).sum(2, keepdim=True).transpose(0, 1),)

    def prepare_laplacian(self, probe: Tensor | None) -> Tensors:
        """2 ‖W_{1i}‖² (G, 1, H); and 4 W₁ times the probe, if there is one."""
        return (2 * self.norms(), *(() if probe is None else (self.first_linear(probe, 4),)))

    def laplacian(self, activations: Tensors, factors: Tensors) -> Tensor:
        """Σ_i U''(a_{1i}) ‖W_{1i}‖² + Σ_i U''(a_{2i}) ‖(W₂ diag(tanh' a₁) W₁)_i‖²; a probe estimates the last norm."""
        s1, _, s2, q, r = activations
        norms, *grad_probe = factors
        if grad_probe:
            squares = torch.bmm(sigmoid_vjp(grad_probe[0], s1), self.w2t).square()
        else:
            squares = self._jacobian_squares(4 * s1 * (1 - s1))
        curved2, curved1 = _curvatures(s1, s2, q, r)
        return self.of_rows(torch.addcmul(curved1 * norms, curved2, squares, value=0.5))

    def _jacobian_squares(self, d1: Tensor) -> Tensor:
        """‖(W₂ diag(d₁) W₁)_i‖² (G, R or R/G, H), by columns or by rows, whichever takes less memory."""
        w1, w2 = self.w.view(self.flows, 1, self.hidden, self.dim), self.tensors[2]
        if self.dim > self.hidden:
            return ((w2[:, None] * d1[:, :, None]) @ w1).square().sum(-1)
        columns = d1[:, :, None] * w1.mT  # (G, R or R/G, D, H)
        return torch.bmm(columns.flatten(1, 2), self.w2t).view(columns.shape).square().sum(2)


def _curvatures(s1: Tensor, s2: Tensor, q: Tensor, r: Tensor) -> Tensors:
    """The factors of tanh'' = −2 tanh tanh': q and r times −tanh."""
    return torch.addcmul(q, q, s2, value=-2), torch.addcmul(r, r, s1, value=-2)
