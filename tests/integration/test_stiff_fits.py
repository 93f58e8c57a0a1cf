"""Sums of squares in float64 that can be fitted to their last digit: small lam that follows a search."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax.damping import Outcome, TrustRegion

POINTS, HIDDEN = 40, 20


def _net(p: Any, t: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(t * p["w"] + p["b"]) @ p["v"]) @ p["o"]


def _second(p: Any, x: jax.Array) -> jax.Array:
    """u'' at points (B,) -> (B, 1)."""
    return jax.vmap(jax.grad(jax.grad(lambda t: _net(p, t))))(x)[:, None]


def _ends(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda t: _net(p, t))(x)[:, None]


def _problem(dtype: Any = float) -> tuple[Any, dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"w": (HIDDEN,), "b": (HIDDEN,), "v": (HIDDEN, HIDDEN), "o": (HIDDEN,)}
    params = {n: jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    params |= {"v": params["v"] / HIDDEN**0.5, "o": params["o"] / HIDDEN**0.5, "w": 3 * params["w"]}
    x = (jnp.arange(POINTS, dtype=dtype) + 0.5) / POINTS
    ends = {"x": jnp.asarray([0.0, 1.0], dtype), "y": jnp.zeros((2, 1), dtype)}
    return params, {"inside": {"x": x, "y": jnp.sin(6 * x)[:, None] * 40}, "ends": ends}


TERMS = curvax.Terms(inside=curvax.Term(_second), ends=curvax.Term(_ends))


@pytest.mark.usefixtures("x64")
def test_a_stiff_fit_is_brought_to_its_last_digits() -> None:
    """Measured: 8e-16 and 3e-11 of the start after 160 steps, by rounding; 1.6e-9 under a lam that follows rho."""
    params, batch = _problem()
    search = curvax.search.GridSearch(candidates=12)
    method = curvax.gauss_newton(loss=TERMS, search=search, lam_kwargs={"by_step_size": True, "inc": 4.0})
    state, losses = method.init(params), []
    step = jax.jit(method.step)
    for _ in range(160):
        params, state, info = step(params, batch, state)
        losses.append(float(info["loss"]))
    assert losses[-1] < 5e-10 * losses[0]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert 0 <= info["step_size"] <= 1


def test_a_policy_that_follows_the_search_needs_one() -> None:
    with pytest.raises(ValueError, match="by_step_size reads the step size of a search: pass search="):
        curvax.gauss_newton(loss=TERMS, lam_kwargs={"by_step_size": True})


@pytest.mark.usefixtures("x64")
def test_lam_follows_the_step_size() -> None:
    """Up below 1/500 and where the system was not solved, down from 1/8 on, whatever rho says."""
    damping = TrustRegion(by_step_size=True, inc=4.0)
    first = damping.start(damping.init(), jnp.asarray(2.0), lambda: jnp.asarray(4.0))
    assert jnp.isclose(first.lam, 1e-9 * 4.0)
    seen = Outcome(jnp.asarray(True), jnp.asarray(True), jnp.asarray(2.0), jnp.asarray(1.9), jnp.asarray(0.2))

    def lam_after(**changes: Any) -> float:
        outcome = dataclasses.replace(seen, curvature=jnp.asarray(1.0), **changes)
        return float(damping.update(first, outcome, jnp.asarray(True)).lam / first.lam)

    assert lam_after(step_size=1.0) == 0.5 and lam_after(step_size=0.1) == 1.0
    assert lam_after(step_size=1e-3) == 4.0 and lam_after(step_size=1.0, solved=False) == 4.0
    assert lam_after(step_size=0.0, descends=False) == 4.0
