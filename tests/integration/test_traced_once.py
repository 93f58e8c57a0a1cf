"""The model's Python runs once for each set of shapes, however often a step evaluates, differentiates and counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.layerwise import ByLeaf, full_gn, layerwise_gn
from curvax.traced_once import traced_once

SHAPES = {"w": (5, 7), "b": (7,), "v": (7, 3)}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
BATCH = {"x": jax.ShapeDtypeStruct((8, 5), jnp.float32), "y": jax.ShapeDtypeStruct((8,), jnp.int32)}
INNER: dict[str, Any] = {"inner": optax.sgd(0.1), "inner_steps": 3}
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    # The whole batch; of methods that look at single examples also one of them, and as many as no axis is long.
    "sgn": (curvax.sgn, {}, 1),
    "sophia_g": (curvax.sophia_g, {}, 1),
    "newton_cg": (curvax.newton_cg, {}, 1),
    "sophia_h": (curvax.sophia_h, {}, 1),
    "adahessian": (curvax.adahessian, {}, 1),
    "gauss_newton": (curvax.gauss_newton, {}, 3),
    "egn": (curvax.egn, {}, 3),
    "spring": (curvax.spring, {}, 3),
    "kfac": (curvax.kfac, {}, 3),
    "ekfac": (curvax.ekfac, {}, 3),
    # The whole batch to find its examples, by the probe too, and a minibatch.
    "full_gn": (full_gn, INNER, 3),
    "layerwise_gn": (layerwise_gn, {**INNER, "partition": ByLeaf()}, 3),
}


def _counting() -> tuple[Callable[..., jax.Array], list[tuple[int, ...]]]:
    calls: list[tuple[int, ...]] = []

    def predict(params: Any, x: jax.Array) -> jax.Array:
        calls.append(x.shape)
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]

    return predict, calls


@pytest.mark.parametrize("name", METHODS)
def test_tracing_a_step_runs_the_model_once_for_each_number_of_examples(name: str) -> None:
    make, options, most = METHODS[name]
    predict, calls = _counting()
    method = make(predict_fn=predict, loss=curvax.losses.SoftmaxCrossEntropy(), **options)
    state = jax.eval_shape(lambda p, b: method.init(p, batch=b), PARAMS, BATCH)
    calls.clear()
    jax.eval_shape(method.step, PARAMS, BATCH, state, jax.random.key(0))
    assert len(calls) == len(set(calls)) <= most, calls
    if name == "gauss_newton":
        calls.clear()
        method.plan_for(PARAMS, BATCH)
        assert len(calls) == len(set(calls)) <= most, calls


def test_a_loss_function_runs_once() -> None:
    _, calls = _counting()

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        calls.append(batch["x"].shape)
        return jnp.mean(jnp.square(batch["x"] @ params["w"] + params["b"]))

    for method in (curvax.newton_cg(loss_fn=loss_fn), curvax.adahessian(loss_fn=loss_fn)):
        calls.clear()
        state = jax.eval_shape(method.init, PARAMS)
        jax.eval_shape(method.step, PARAMS, BATCH, state, jax.random.key(0))
        assert len(calls) == 1


def test_a_step_sees_what_the_model_has_closed_over_by_then() -> None:
    """A trace serves one step: the next one follows the user's objects, as it does without curvax."""
    gain = [1.0]
    method = curvax.sgn(predict_fn=lambda p, x: gain[0] * x @ p["w"], loss=curvax.losses.SquaredError())
    params = {"w": jax.ShapeDtypeStruct((2, 1), jnp.float32)}
    batch = {"x": jax.ShapeDtypeStruct((3, 2), jnp.float32), "y": jax.ShapeDtypeStruct((3, 1), jnp.float32)}
    state, texts = jax.eval_shape(method.init, params), []
    for gain[0] in (1.0, 37.0):
        texts.append(str(jax.make_jaxpr(lambda *args: method.step(*args))(params, batch, state)))
    assert "37.0" in texts[1] and "37.0" not in texts[0]


def test_what_is_no_array_comes_back_as_it_is() -> None:
    seen: list[Any] = []

    @traced_once
    def function(x: jax.Array, *, scale: jax.Array) -> Any:
        seen.append(x.shape)
        return {"y": scale * x, "name": "double", "none": None, "count": 3}

    for x in (jnp.ones(2), jnp.zeros(2), jnp.ones(3)):
        results = function(x, scale=jnp.asarray(2.0))
        np.testing.assert_array_equal(results.pop("y"), 2 * x)
        assert results == {"name": "double", "none": None, "count": 3}
    assert seen == [(2,), (3,)]
