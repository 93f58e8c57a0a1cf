"""Optax optimizers as methods, against Optax loops written by hand in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.losses import SquaredError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 2))
START = {"w": RNG.normal(size=(3, 4)), "v": RNG.normal(size=(4, 2))}


def predict(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def half_square(outputs: Any, targets: Any, weights: Any) -> Any:
    return jnp.sum(weights * jnp.sum((outputs - targets) ** 2, -1)) / 2 / jnp.sum(weights)


def optax_loop(tx: Any, loss: Any, steps: int) -> tuple[Any, list[float]]:
    tx, params = optax.with_extra_args_support(tx), jax.tree.map(jnp.asarray, START)
    state, losses = tx.init(params), []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(params, updates), state, value

    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return params, losses


def run(method: Any, batch: Any, steps: int) -> tuple[Any, list[float]]:
    params, losses = jax.tree.map(jnp.asarray, START), []
    state, step = method.init(params), jax.jit(method.step)
    for _ in range(steps):
        params, state, info = step(params, batch, state)
        losses.append(float(info["loss"]))
        assert bool(info["accepted"])
    return params, losses


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11), a, b)


@jax.numpy_dtype_promotion("standard")
def test_a_masked_example_of_nan_is_left_out(x64: None) -> None:
    mask = np.array([1.0, 1, 0, 1, 1, 0.5])
    batch = {"x": np.where(mask[:, None] > 0, X, np.nan), "y": Y, "w": mask}
    method = curvax.first_order(optax.adam(0.1), predict_fn=predict, loss=SquaredError(), weight_key="w")
    by_hand = optax_loop(optax.adam(0.1), lambda p: half_square(predict(p, X), Y, mask), 5)
    for mine, theirs in zip(run(method, batch, 5), by_hand, strict=True):
        close(mine, theirs)


@jax.numpy_dtype_promotion("standard")
def test_terms_pieces_and_frozen_parameters(x64: None) -> None:
    terms = curvax.Terms(a=curvax.Term(predict), b=curvax.Term(predict, weight=3.0))
    batch = {"a": {"x": X, "y": Y}, "b": {"x": X[:4], "y": Y[:4]}}
    method = curvax.first_order(optax.sgd(0.1), loss=terms, frozen={"w": False, "v": True}, microbatch_size=2)

    def loss(params: Any) -> Any:
        params = params | {"v": START["v"]}
        first, second = (half_square(predict(params, X[:n]), Y[:n], np.ones(n)) for n in (6, 4))
        return first + 3 * second

    params, losses = run(method, batch, 4)
    expected, expected_losses = optax_loop(optax.sgd(0.1), loss, 4)
    close((params["w"], losses), (expected["w"], expected_losses))
    np.testing.assert_array_equal(params["v"], START["v"])


@jax.numpy_dtype_promotion("standard")
def test_a_line_search_gets_the_loss_of_the_batch(x64: None) -> None:
    def loss_fn(params: Any, batch: Any) -> Any:
        return half_square(predict(params, batch["x"]), batch["y"], np.ones(6))

    batch = {"x": X, "y": Y}
    expected = optax_loop(optax.lbfgs(), lambda p: loss_fn(p, batch), 4)
    for reuse in (False, True):
        method = curvax.first_order(optax.lbfgs(), loss_fn=loss_fn, reuse_gradient=reuse)
        close(run(method, batch, 4), expected)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"tx is a float: pass an Optax optimizer"):
        curvax.first_order(0.1, predict_fn=predict, loss=SquaredError())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="first_order needs predict_fn, loss"):
        curvax.first_order(optax.sgd(0.1))
    with pytest.raises(ValueError, match="not both"):
        curvax.first_order(optax.sgd(0.1), predict_fn=predict, loss_fn=lambda p, b: p)
    method = curvax.first_order(optax.sgd(0.1), predict_fn=predict, loss=SquaredError(), reuse_gradient=True)
    params = jax.tree.map(jnp.asarray, START)
    with pytest.raises(ValueError, match="drop reuse_gradient"):
        method.step(params, {"x": jnp.asarray(X), "y": jnp.asarray(Y)}, method.init(params))
    assert "first order" in method.explain()


def test_the_plan_says_what_the_optimizer_keeps() -> None:
    method = curvax.first_order(optax.scale_by_adam(), predict_fn=predict, loss=SquaredError())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), START)
    plan = method.plan_for(shapes, {"x": jnp.asarray(X, jnp.float32), "y": jnp.asarray(Y, jnp.float32)})
    entries = sum(x.size for x in jax.tree.leaves(shapes))
    assert plan.state_bytes == 4 * (2 * entries + 1)
    assert f"state of the optimizer {plan.state_bytes} B" in plan.explain()


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    method = curvax.first_order(optax.sgd(jnp.float32(jnp.inf)), predict_fn=predict, loss=SquaredError())
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), START)
    batch = {"x": jnp.asarray(X, jnp.bfloat16), "y": jnp.asarray(Y, jnp.float32)}
    after, state, info = jax.jit(method.step)(params, batch, method.init(params))
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert int(state.rejected) == 1 and not info["accepted"] and after["w"].dtype == jnp.bfloat16
