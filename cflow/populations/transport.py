"""Optimal transport between two samples: exact, and entropic without its bias."""

from __future__ import annotations

import importlib
import math
import numbers
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..checks import finite, instance, positive_number
from ..errors import ArgumentError, ArgumentTypeError, CflowError, DependencyError
from .snapshots import Cells, _array

ITERATIONS = 100  # of Sinkhorn at most
ANNEALING = 0.5  # by which the regularisation shrinks in each


def wasserstein(x: Cells, y: Cells, p: float = 1, *, a: Tensor | None = None, b: Tensor | None = None) -> float:
    r"""The Wasserstein distance between two samples, by exact optimal transport of all their members.

    .. math:: W_p(x, y) = \min_{π ∈ Π(a, b)} (Σ_{ij} π_{ij} ‖x_i − y_j‖^p)^{1/p}

    Arguments:
        x, y: samples (N, D) and (M, D).
        p: the power, at least 1.
        a, b: weights (N,) and (M,), not negative, normalised here; all equal by default.

    Returns:
        The distance, in the units of x; computed in float64.

    Raises:
        ArgumentError, ArgumentTypeError: samples of another shape or with NaN, or weights that are none.
        DependencyError: samples of two sizes or with weights need POT (extra `cells`), others SciPy at least.

    References:
        Bonneel, van de Panne, Paris, Heidrich: Displacement interpolation using Lagrangian mass transport, 2011 (the
        network simplex of POT). Flamary et al.: POT: Python Optimal Transport, JMLR 22, 2021.

    Example:
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> round(wasserstein(x, x + torch.tensor([3.0, 0.0, 4.0])), 9)  # of two shifted sets: the shift
        5.0
    """
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not (math.isfinite(p) and p >= 1):
        raise ArgumentError(f"p: expected a number ≥ 1, got {p!r}")
    x, y = sample("x", x).double().cpu(), sample("y", y).double().cpu()
    if x.shape[1] != y.shape[1]:
        raise ArgumentError(f"y: expected samples (M, D) with D = {x.shape[1]} as of x, got {tuple(y.shape)}")
    cost = distances(x, y) ** p
    if a is None and b is None and len(x) == len(y):
        return cast(float, (cost[torch.arange(len(x)), assignment(cost)].mean() ** (1 / p)).item())
    pair = (_weights("a", a, len(x)), _weights("b", b, len(y)))
    total, _ = _emd(pair, cost, "emd2")
    return float(total) ** (1 / float(p))


def transport_plan(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The plan π (N, M) of least cost Σ π_ij cost_ij with marginals a (N,) and b (M,), by default uniform ones.

    Raises:
        ArgumentError, ArgumentTypeError: no (N, M) of finite numbers, or weights that are none.
        DependencyError: see `wasserstein`.
    """
    if not isinstance(cost, Tensor) or cost.ndim != 2 or not cost.numel():
        got = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
        raise ArgumentError(f"cost: expected a tensor (N, M) with N, M ≥ 1, got {got}")
    finite("cost", cost)
    n, m = cost.shape
    exact = cost.detach().double().cpu()
    if a is None and b is None and n == m:
        plan = torch.zeros_like(exact)
        plan[torch.arange(n), assignment(exact)] = 1 / n
    else:
        plan, _ = _emd((_weights("a", a, n), _weights("b", b, m)), exact, "emd")
    return torch.as_tensor(plan).to(cost)


def priced_plan(cost: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The plan (N, M) from weights a (N,) to equal ones, and the price (N,) of more weight: d(least cost)/da."""
    n, m = cost.shape
    plan, log = _emd((_weights("a", a, n), _weights("b", None, m)), cost.detach().double().cpu(), "emd")
    return torch.as_tensor(plan).to(cost), torch.as_tensor(log["u"]).to(cost)


def assignment(cost: Tensor) -> Tensor:
    """The column (N,) of each row in the assignment of least total cost, of a square matrix of costs (N, N)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise _missing("SciPy or POT") from None
    return torch.from_numpy(linear_sum_assignment(cost.detach().cpu().numpy())[1]).to(cost.device)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖ (N, M), by differences: products would lose half the digits of small distances."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² (N, M), differentiable also where points meet."""
    return (x[:, None] - y[None]).square().sum(-1)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    blur: float = 0.05,
    tol: float = 1e-2,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    r"""The Sinkhorn divergence of two samples, between ½W₂² (blur → 0) and ½‖mean x − mean y‖² (blur → ∞).

    .. math:: S(x, y) = OT_ε(x, y) − ½ OT_ε(x, x) − ½ OT_ε(y, y), \quad ε = \text{blur}², \quad
        OT_ε(x, y) = \min_π Σ π_{ij} ½‖x_i − y_j‖² + ε KL(π | a ⊗ b)

    It is zero for equal samples, which OT_ε alone is not: by that it would shrink what it fits. Differentiable in x, y
    and the weights, by the potentials (the envelope theorem), once.

    Arguments:
        x, y: samples (N, D) and (M, D), of one dtype.
        blur: the length below which the two are not told apart, in the units of x.
        tol: iterations end when no potential changes by more than tol · ε, or after `ITERATIONS`.
        a, b: weights (N,) and (M,) that sum to one; all equal by default.

    References:
        Genevay, Peyré, Cuturi: Learning generative models with Sinkhorn divergences, 2018, arXiv:1706.00292.
        Feydy, Séjourné, Vialard, Amari, Trouvé, Peyré: Interpolating between optimal transport and MMD using Sinkhorn
        divergences, 2019, arXiv:1810.08278, algorithm 1.

    Raises:
        ArgumentError, ArgumentTypeError: a blur or tolerance that is not positive, samples of another shape or with
            NaN, or weights that are none.

    Example:
        >>> x = torch.randn(40, 2)
        >>> abs(float(sinkhorn_divergence(x, x))) < 1e-6
        True
    """
    positive_number("blur", blur), positive_number("tol", tol)
    for name, members in (("x", x), ("y", y)):
        instance(name, members, Tensor, "a tensor (N, D)")
        sample(name, members)
    if x.shape[1] != y.shape[1]:
        raise ArgumentError(f"y: expected samples (M, D) with D = {x.shape[1]} as of x, got {tuple(y.shape)}")
    for name, weights, number in (("a", a, len(x)), ("b", b, len(y))):
        _weights(name, weights, number)
    a = x.new_full((len(x),), 1 / len(x)) if a is None else a
    b = y.new_full((len(y),), 1 / len(y)) if b is None else b
    f, g, f_own, g_own = _sinkhorn(x, y, a, b, blur**2, tol)
    return (a * (f - f_own)).sum() + (b * (g - g_own)).sum()


def _sinkhorn(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, least: float, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials of x (N,) and y (M,): of the pair, and of each with itself. Their gradients are those of OT_ε."""
    log_a, log_b = a.detach().log(), b.detach().log()
    with torch.no_grad():
        xy, xx, yy = (0.5 * squared_distances(u, v) for u, v in ((x, y), (x, x), (y, y)))
        largest = max(float(cost.max()) for cost in (xy, xx, yy))
        f, f_own = torch.zeros_like(a), torch.zeros_like(a)
        g, g_own = torch.zeros_like(b), torch.zeros_like(b)
        for i in range(ITERATIONS):
            eps = max(largest * ANNEALING**i, least)  # from far away, where it converges at once
            new = (
                0.5 * (f + _soft(xy, log_b, g, eps)),
                0.5 * (g + _soft(xy.mT, log_a, f, eps)),
                0.5 * (f_own + _soft(xx, log_a, f_own, eps)),
                0.5 * (g_own + _soft(yy, log_b, g_own, eps)),
            )
            old, (f, g, f_own, g_own) = (f, g, f_own, g_own), new
            if eps == least and all((u - v).abs().max() <= tol * least for u, v in zip(old, new, strict=True)):
                break
    x_fixed, y_fixed = x.detach(), y.detach()
    return (
        _soft(0.5 * squared_distances(x, y_fixed), log_b, g, least),
        _soft(0.5 * squared_distances(y, x_fixed), log_a, f, least),
        _soft(0.5 * squared_distances(x, x_fixed), log_a, f_own, least),
        _soft(0.5 * squared_distances(y, y_fixed), log_b, g_own, least),
    )


def _soft(cost: Tensor, log_weights: Tensor, potential: Tensor, eps: float) -> Tensor:
    """−ε log Σ_j w_j exp((g_j − C_ij)/ε), (N,)."""
    return -eps * torch.logsumexp(log_weights + (potential - cost) / eps, 1)


def sample(name: str, x: object) -> Tensor:
    """The argument as members (N, D) of floating point, N ≥ 1, all finite."""
    found = _array(name, x)
    if found.ndim != 2 or not len(found):
        raise ArgumentError(f"{name}: expected a sample (N, D) of at least one member, got shape {tuple(found.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise ArgumentError(f"{name}: holds NaN or infinity; leave those members out")
    return found


def _weights(name: str, w: Tensor | None, number: int) -> Tensor:
    if w is None:
        return torch.full((number,), 1 / number, dtype=torch.float64)
    if not isinstance(w, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor of weights ({number},), got {type(w).__name__}")
    exact = w.detach().double().cpu()
    if exact.shape != (number,) or not bool(((exact >= 0) & exact.isfinite()).all()) or not bool(exact.sum() > 0):
        raise ArgumentError(f"{name}: expected weights ≥ 0 of shape ({number},), not all zero, got {tuple(w.shape)}")
    return exact / exact.sum()


def _emd(weights: tuple[Tensor, Tensor], cost: Tensor, name: str) -> tuple[Any, dict[str, Any]]:
    """What POT's `emd` (the plan) or `emd2` (the cost) finds."""
    try:
        ot = importlib.import_module("ot")
    except ModuleNotFoundError:
        raise _missing("POT") from None
    a, b = (np.ascontiguousarray(w.numpy()) for w in weights)
    found, log = getattr(ot, name)(a, b, cost.numpy(), numItermax=100_000_000, log=True)
    if log["warning"]:
        raise CflowError(f"x, y: exact transport did not finish: {log['warning']}")
    return found, log


def _missing(what: str) -> DependencyError:
    return DependencyError(f"exact transport needs {what}, which is not installed: pip install 'cflow-torch[cells]'")
