"""Random values of a model, made for the whole batch of one key: each example has its own part of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from curvax.curvature import Evaluation, Extras, GaussNewton, Model, Needs
from curvax.losses import SquaredError
from curvax.structure import examples_independent, ggn_diagonal, jacobian_gram, per_example_gradient_norms, report
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import Problem, block_diagonal, kronecker_matrix, normal

pytestmark = pytest.mark.usefixtures("x64")
Draw = Callable[[jax.Array, jax.Array], jax.Array]
B, N, WIDTH, M = 4, 3, 5, 2


def _dropout(key: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.where(random.bernoulli(key, 0.6, h.shape), h / 0.6, 0.0)


def _scanned(key: jax.Array, h: jax.Array) -> jax.Array:
    return lax.scan(lambda c, k: (jnp.tanh(c * random.normal(k, c.shape)), None), h, random.split(key, 3))[0]


def _carried_key(key: jax.Array, h: jax.Array) -> jax.Array:
    def layer(carry: Any, _: None) -> Any:
        key, h = carry
        key, used = random.split(key)
        return (key, h + random.normal(used, h.shape)), None

    return lax.scan(layer, (key, h), length=2)[0][1] * h


def _numbered(key: jax.Array, h: jax.Array) -> jax.Array:
    numbers = jnp.arange(h.shape[0])
    return jax.vmap(lambda i, row: row * random.normal(random.fold_in(key, i), row.shape))(numbers, h)


DRAWS: dict[str, Draw] = {
    "dropout": _dropout,
    "dropout within remat": lambda key, h: jax.checkpoint(_dropout)(key, h),
    "dropout within jit": lambda key, h: jax.jit(_dropout)(key, h),
    "one number per example": lambda key, h: h * random.normal(key, (h.shape[0], 1)),
    "another order of axes": lambda key, h: h * random.normal(key, h.shape[::-1]).T,
    "flattened": lambda key, h: (h.reshape(-1) * random.normal(key, (h.size,))).reshape(h.shape),
    "a key per example": lambda key, h: jax.vmap(_dropout)(random.split(key, h.shape[0]), h),
    "a key folded with the example's number": _numbered,
    "a key per layer of a scan": _scanned,
    "a key that a scan carries": _carried_key,
    "gamma": lambda key, h: h * random.gamma(key, 2.0, h.shape),
    "categorical": lambda key, h: h + random.categorical(key, h)[:, None].astype(h.dtype),
    "one mask for all examples": lambda key, h: h * random.normal(key, h.shape[1:]),
    "noise of a width that is a parameter": lambda key, h: h + random.normal(key, h.shape) * jnp.mean(h, 1)[:, None],
}


def model(draw: Draw, key: jax.Array) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda p, x: draw(key, jnp.tanh(x @ p["w"] + p["b"])) @ p["v"]


def parameters() -> dict[str, jax.Array]:
    return {"b": normal(0, WIDTH), "v": normal(1, WIDTH, M), "w": normal(2, N, WIDTH)}


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.ravel(got), np.ravel(want), rtol=1e-9, atol=1e-11 * np.abs(want).max())


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_rows_are_those_of_the_batch_s_own_draws(draw: Draw) -> None:
    """With typed keys and raw ones, which draw the same."""
    params, x, y = parameters(), normal(7, B, N), normal(8, B, M)

    @quick_jit
    def everything(params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        fresh, loss = model(draw, key), SquaredError(reduction="sum")
        return (
            [jacobian_gram(fresh, params, x, max_bytes=bound) for bound in (1, 1 << 30)],
            ggn_diagonal(fresh, loss, params, x, y),
            per_example_gradient_norms(fresh, loss, params, x, y),
        )

    outputs, jacobian = dense.outputs_and_jacobian(model(draw, random.key(5)), params, x)
    rows = np.einsum("bk,bkn->bn", outputs - np.asarray(y), jacobian.reshape(B, M, -1))
    for key in (random.key(5), random.PRNGKey(5)):
        assert {leaf.rule for leaf in report(model(draw, key), params, x)} == {"dense", "bias"}
        grams, diagonal, norms = everything(params, key, x, y)
        for gram in grams:
            close(gram, jacobian @ jacobian.T)
        close(dense.vector(diagonal), np.sum(jacobian**2, axis=0))
        close(norms, np.linalg.norm(rows, axis=1))


@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_keys_may_come_with_the_examples(raw: bool) -> None:
    params, keys = parameters(), random.split(random.PRNGKey(1) if raw else random.key(1), B)
    inputs = {"key": keys, "x": normal(7, B, N)}

    def predict(p: Any, inputs: Any) -> jax.Array:
        h = jnp.tanh(inputs["x"] @ p["w"] + p["b"])
        return jax.vmap(_dropout)(inputs["key"], h) @ p["v"]

    assert examples_independent(predict, params, inputs) == (True, "")
    gram = quick_jit(lambda p, inputs: jacobian_gram(predict, p, inputs))(params, inputs)
    jacobian = dense.outputs_and_jacobian(lambda p, x: predict(p, {"key": keys, "x": x}), params, inputs["x"])[1]
    close(gram, jacobian @ jacobian.T)


def test_kronecker_factors_are_those_of_the_batch_s_own_draws() -> None:
    """A linear layer behind dropout of its inputs, whose product is exact."""
    params, x, y = {"w": normal(0, N, M), "b": normal(1, M)}, normal(7, B, N), normal(8, B, M)
    problem = Problem(lambda p, x: _dropout(random.key(2), x) @ p["w"] + p["b"], params, {"x": x, "y": y})
    blocks, sums = problem.blocks, problem.sums()
    found = kronecker_matrix(blocks, sums.means(), sums.outputs, params)
    close(found, block_diagonal(problem.truth().ggn, blocks, params))


@pytest.mark.parametrize("seed", range(3))
def test_the_key_of_a_step_is_the_key_of_its_rows(seed: int) -> None:
    params, x, y = parameters(), normal(7, B, N), normal(8, B, M)

    def predict(p: Any, x: jax.Array, rng: jax.Array) -> jax.Array:
        return model(_dropout, rng)(p, x)

    curvature = GaussNewton(Model(predict, extras=Extras(has_rng=True)), SquaredError(reduction="sum"))

    def gram(params: Any, key: jax.Array) -> jax.Array:
        rows = curvature.linearize(params, Evaluation({"x": x, "y": y}, model_key=key), Needs(rows=True)).rows
        assert rows is not None
        return rows.gram(1 << 30)

    key = random.key(seed)
    jacobian = dense.outputs_and_jacobian(model(_dropout, key), params, x)[1]
    close(quick_jit(gram)(params, key), jacobian @ jacobian.T)


def _summed_noise(key: jax.Array, h: jax.Array) -> jax.Array:
    return h + lax.scan(lambda c, k: (c + jnp.sum(random.normal(k, h.shape)), None), 0.0, random.split(key))[0]


def _in_a_branch(key: jax.Array, h: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(jnp.ones(3)) > 2, lambda: h * random.normal(key, h.shape), lambda: h)


MIXING: dict[str, Draw] = {
    "shuffled": lambda key, h: h + h[random.permutation(key, h.shape[0])],
    "shuffled at once": lambda key, h: h + random.permutation(key, h),
    "centered noise": lambda key, h: h + (lambda e: e - jnp.sum(e, 0))(random.normal(key, h.shape)),
    "mean of noise": lambda key, h: h + jnp.mean(random.normal(key, h.shape)),
    "noise summed in a scan": _summed_noise,
    "drawn in a branch": _in_a_branch,
    "for pairs of examples": lambda key, h: random.normal(key, (h.shape[0], h.shape[0])) @ h,
    "the example's number": lambda key, h: h * jnp.arange(h.shape[0], dtype=h.dtype)[:, None],
}


@pytest.mark.parametrize("draw", MIXING.values(), ids=MIXING.keys())
def test_what_is_random_does_not_excuse_mixing(draw: Draw) -> None:
    independent, reason = examples_independent(model(draw, random.key(0)), parameters(), normal(7, B, N))
    assert not independent and reason
