"""Steps that nobody looks at: one that leads to where the loss is no number is taken back by the step after it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax.losses import SquaredError
from curvax.telemetry import Metric, MetricRecord
from tests.integration.harness import key, same_bits
from tests.oracle.compiling import quick_jit


def _root(params: Any, batch: Any) -> jax.Array:
    """Falls all the way down to w = 0, and is NaN beyond."""
    return jnp.sum(jnp.sqrt(params["w"])) * batch["scale"]


def _predict(params: Any, x: jax.Array) -> jax.Array:
    return x * jnp.sqrt(params["w"])


ROOT, RESIDUALS = {"loss_fn": _root}, {"predict_fn": _predict, "loss": SquaredError()}
PARTS = {"metrics": (MetricRecord(Metric.UPDATE_NORM),)}
UNSEEN: list[tuple[str, dict[str, Any]]] = [
    ("adahessian", {**ROOT, "learning_rate": 3.0}),
    ("adahessian", {**ROOT, "learning_rate": 3.0, **PARTS}),
    ("sophia_h", {**ROOT, "learning_rate": 0.3}),
    ("newton_cg", {**ROOT, "lam0": 1.0}),
    ("spring", {**RESIDUALS, "lam0": 1e-3, "learning_rate": 4.0}),
    ("sgn", {**RESIDUALS, "lam0": 1e-3, "learning_rate": 4.0}),
]


def _start(options: dict, dtype: Any = jnp.float32) -> tuple[Any, dict]:
    batch = {"scale": jnp.ones((), dtype)} if "loss_fn" in options else {"x": jnp.ones((4, 1)), "y": jnp.zeros((4, 1))}
    return {"w": jnp.ones(1, dtype)}, batch


def _poisoned(batch: dict) -> dict:
    return jax.tree.map(lambda x: x * jnp.nan, batch)


@pytest.mark.parametrize(("name", "options"), UNSEEN, ids=[f"{n}-{i}" for i, (n, _) in enumerate(UNSEEN)])
def test_the_last_good_parameters_come_back(name: str, options: dict) -> None:
    method = curvax.make(name, **options)
    params, batch = _start(options)
    step, state = quick_jit(method.step), method.init(params)
    assert "undo" in method.plan.explain()
    over = 0
    for _ in range(25):
        before = params
        params, state, info = step(params, batch, state, key())
        if float(params["w"][0]) >= 0:
            continue
        over += 1
        assert bool(info["accepted"]) and not bool(info["undone"])
        # A batch that is bad by itself says nothing about the step before it; the one behind it does.
        params, state, info = step(params, _poisoned(batch), state, key())
        assert float(params["w"][0]) < 0 and not bool(info["undone"]) and not bool(info["accepted"])
        params, state, info = step(params, batch, state, key())
        assert same_bits(params, before) and bool(info["undone"]) and not bool(info["accepted"])
    assert over, "the method was to be led astray"


def test_many_undone_steps_are_an_error_with_a_cause() -> None:
    """Each is taken, and the next one takes it back: no two refusals stand side by side."""
    name, options = UNSEEN[0]
    method, check = curvax.make(name, **options), curvax.Check(6)
    params, batch = _start(options)
    step, state = quick_jit(method.step), method.init(params)
    with pytest.raises(curvax.StepsRefused, match="The step before led to where the loss is not finite"):
        for _ in range(40):
            params, state, info = step(params, batch, state, key())
            check(info)
    good = {"accepted": True, "undone": False}
    undone = {"accepted": False, "undone": True, "finite": False, "loss": 1.0}
    check = curvax.Check(2)
    for info in (good, undone, good, good, undone, good, good):  # never three in a row without one that stays
        check(info)


@pytest.mark.parametrize("name", ["adahessian", "sgn"])
def test_no_copy_where_it_is_not_wanted_or_not_needed(name: str) -> None:
    options = dict(UNSEEN)[name]
    params, batch = _start(options)
    method = curvax.make(name, undo=False, **options)
    state = method.init(params)
    assert state.last is None and "undo" not in method.plan.explain()
    step = quick_jit(method.step)
    for _ in range(30):
        params, state, info = step(params, batch, state, key())
    assert "undone" not in info and not jnp.isfinite(info["loss"])
    assert curvax.make(name, **options).init(params).last is not None
    if name == "sgn":
        judged = curvax.make(name, **{k: v for k, v in options.items() if k != "lam0"})
        assert judged.init(params).last is None, "a trust region looks at every step"
    with pytest.raises(ValueError, match="made by another method"):
        curvax.make(name, **options).step(params, batch, state, key())
