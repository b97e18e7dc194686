"""The same potentials in JAX, solved by diffrax under jit. Imported only where both are installed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from original import frequencies
from peer import STEPS, Peer
from problems import HORIZON, TOLERANCE, Problem

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
diffrax: Any = importlib.import_module("diffrax")


def peer(problem: Problem, method: str) -> Peer:
    """diffrax's dopri5 (PID controller at the same tolerance) or a classical rk4, compiled before it is timed.

    Reverse mode is diffrax's default, `RecursiveCheckpointAdjoint`: gradients of the discrete solve.
    """
    if problem.device.type == "cuda" and jax.default_backend() != "gpu":
        raise ImportError("JAX finds no GPU")
    # as PyTorch multiplies float32 unless told otherwise; JAX rounds factors to TF32 on a GPU
    jax.config.update("jax_default_matmul_precision", "highest")
    parameters, frequency = weights(problem), jnp.asarray(frequencies(problem.net).cpu().numpy())
    z0, w, cotangent = (jnp.asarray(x.cpu().numpy()) for x in (problem.z0, problem.w, problem.cotangent))
    adaptive = method == "dopri5"
    controller = diffrax.PIDController(TOLERANCE, TOLERANCE) if adaptive else diffrax.ConstantStepSize()
    term = diffrax.ODETerm(lambda t, z, p: jax.grad(lambda z: potential(p, frequency, z, t, w).sum())(z))

    def solve(z0: Any, p: Any) -> Any:
        return diffrax.diffeqsolve(
            term,
            diffrax.Dopri5() if adaptive else rk4(),
            *HORIZON,
            dt0=None if adaptive else (HORIZON[1] - HORIZON[0]) / STEPS,
            y0=z0,
            args=p,
            stepsize_controller=controller,
            max_steps=4096,
        )

    @jax.jit  # type: ignore[untyped-decorator]
    def forward(z0: Any, p: Any) -> Any:
        return solve(z0, p).ys[-1]

    @jax.jit  # type: ignore[untyped-decorator]
    def gradients(z0: Any, p: Any) -> Any:
        loss = lambda z0, p: (solve(z0, p).ys[-1] * cotangent).sum()  # noqa: E731
        by_z0, by_p = jax.grad(loss, argnums=(0, 1))(z0, p)
        return by_z0, *by_p.values()

    def evaluations() -> int:
        steps = int(solve(z0, parameters).stats["num_steps"])
        return 6 * steps + 1 if adaptive else 4 * steps  # the last stage of dopri5 is the first of the next step

    return Peer(
        "diffrax, jit",
        lambda: forward(z0, parameters),
        lambda: gradients(z0, parameters),
        evaluations,
        jax.block_until_ready,
    )


def weights(problem: Problem) -> dict[str, Any]:
    """The parameters of the potentials, K first."""
    net = problem.net
    time: Any = net.time
    shape, bias = (net.num_flows, net.hidden, -1), (net.num_flows, 1, -1)
    tensors = {"w1": net.w1.view(shape), "b1": net.b1.view(bias), "w2": net.w2, "b2": net.b2, "a": net.a}
    tensors |= {"v1": time.w1.view(shape), "c1": time.b1.view(bias), "v2": time.w2, "c2": time.b2}
    return {name: jnp.asarray(x.detach().cpu().numpy()) for name, x in tensors.items()}


def potential(p: Any, frequency: Any, z: Any, t: Any, w: Any) -> Any:
    """Σ_k w_k u_k (B,) at z (B, D), a scalar t, and weights (B, K)."""
    s = jnp.concatenate([jnp.sin(t * frequency), jnp.cos(t * frequency)])
    tau = jax.nn.gelu(s @ jnp.swapaxes(p["v1"], 1, 2) + p["c1"][:, 0], approximate=False)[:, None]
    tau = tau @ jnp.swapaxes(p["v2"], 1, 2) + p["c2"]  # (K, 1, H)
    h = jnp.tanh(z @ jnp.swapaxes(p["w1"], 1, 2) + p["b1"])  # (K, B, H)
    h = jnp.tanh((h + tau) @ jnp.swapaxes(p["w2"], 1, 2) + p["b2"])
    return ((h * p["a"]).sum(-1).T * w).sum(-1)


def rk4() -> Any:
    """The classical method of order 4, which diffrax does not bring along."""
    tableau = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0]),
    )
    line = lambda *, t0, t1, y0, y1, k: diffrax.LocalLinearInterpolation(t0=t0, t1=t1, y0=y0, y1=y1)  # noqa: E731
    members = {"tableau": tableau, "interpolation_cls": staticmethod(line), "order": lambda self, terms: 4}
    return type("RK4", (diffrax.AbstractERK,), members)()
