"""Steps on a GPU with each backend, against the same steps on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Backend, strict_backend
from tests.lowering import steps

pytestmark = [pytest.mark.gpu, pytest.mark.fallback]

SMALL = steps.Network("mlp 20-32-16-130", (20, 32, 16, 130), 24)
# Whose kernels every one of these presets must really run: the ops that it has are chosen, or the plan says why not.
EXPECTED: dict[tuple[str, Backend], set[str]] = {
    ("sgn_ce", "native"): {"dots", "cg_update", "cg_direction"},
    ("sgn_ce", "pallas"): {"softmax_hvp"},
    ("egn_ce", "triton"): {"gram_accumulate"},
    ("sophia_g", "native"): {"diagonal_update", "diagonal_accumulate"},
    ("adahessian", "native"): {"diagonal_update", "diagonal_accumulate"},
}


SAMPLED = ("sophia_g", "adahessian")
"""Presets that draw labels or signs. Their truth is the reference in float32 on the CPU."""


def made(network: steps.Network, dtype: Any) -> tuple[Any, Any]:
    """Parameters and a batch, the same numbers in any dtype."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, network.widths[-1], leaf.shape), jnp.int32)
        return jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32) / 4, dtype)

    return jax.tree.map(fill, network.params()), jax.tree.map(fill, network.data())


def moved(method: Any, network: steps.Network, dtype: Any) -> np.ndarray:
    """How far two steps go, as one float64 vector."""
    params, batch = made(network, dtype)
    state, after, step = method.init(params), params, jax.jit(method.step)
    for i in range(2):
        after, state, _ = step(after, batch, state, jax.random.key(i, impl="threefry2x32"))
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)
    return np.concatenate([(np.asarray(a, np.float64) - np.asarray(b, np.float64)).ravel() for a, b in pairs])


@pytest.mark.parametrize("preset", steps.PRESETS)
@pytest.mark.parametrize("backend", ["reference", "native", "pallas", "triton"])
def test_step_agrees_with_the_cpu(preset: str, backend: Backend) -> None:
    with warnings.catch_warnings(), jax.default_matmul_precision("highest"):
        warnings.simplefilter("ignore")  # ops without this backend
        method = steps.PRESETS[preset](backend)
        chosen = {c.op for c in method.plan_for(*made(SMALL, jnp.float32)).choices if c.implementation == backend}
        assert chosen >= EXPECTED.get((preset, backend), set())
        got = moved(method, SMALL, jnp.float32)
    # Labels and signs are drawn alike only in the same dtype, since a float64 takes more random bits than a float32.
    sampled = preset in SAMPLED
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(not sampled), strict_backend():
        exact = moved(steps.PRESETS[preset]("reference"), SMALL, jnp.float32 if sampled else jnp.float64)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert error < 5e-3, f"relative error {error:.2g}"
