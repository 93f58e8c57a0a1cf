"""Sums of squares in float64 that can be fitted to their last digit: small lam and a search, chosen by the plan."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax.damping import Outcome, TrustRegion
from curvax.losses import SoftmaxCrossEntropy, SquaredError

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
def test_a_stiff_fit_is_brought_to_its_last_digits_by_the_defaults() -> None:
    """Measured: 8e-16 and 3e-11 of the start after 160 steps, by rounding; 1.6e-9 under a lam that follows rho."""
    params, batch = _problem()
    method = curvax.gauss_newton(loss=TERMS)
    state, losses = method.init(params), []
    step = jax.jit(method.step)
    for _ in range(160):
        params, state, info = step(params, batch, state)
        losses.append(float(info["loss"]))
    assert losses[-1] < 5e-10 * losses[0]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert 0 <= info["step_size"] <= 1


def _is_searched(params: Any, batch: Any, **options: Any) -> bool:
    text = curvax.gauss_newton(**options).plan_for(params, batch).explain()
    assert ("by the step size" in text) == ("grid of 12 step sizes" in text)
    return "by the step size" in text


@pytest.mark.usefixtures("x64")
def test_the_plan_searches_where_a_fit_can_be_exact_and_nowhere_else() -> None:
    params, batch = _problem()
    assert _is_searched(params, batch, loss=TERMS)
    one, inside = {"predict_fn": _second, "loss": SquaredError()}, batch["inside"]
    assert _is_searched(params, inside, **one)
    # More residuals than parameters, other losses, a choice of the user's, single precision.
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (20,) + (1,) * (leaf.ndim - 1)), inside)
    assert not _is_searched(params, many, **one)
    labels = {"x": inside["x"], "y": jnp.zeros(POINTS, int)}
    assert not _is_searched(params, labels, predict_fn=_second, loss=SoftmaxCrossEntropy())
    for choice in ({"lam0": 1e-3}, {"lam_kwargs": {"inc": 2.0}}, {"search": curvax.search.Backtracking()}):
        assert not _is_searched(params, inside, **one, **choice)
    assert not _is_searched(*_problem(jnp.float32), loss=TERMS)


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
    assert TrustRegion().beside_search() == damping and TrustRegion(lam0=0.1).beside_search() is None
