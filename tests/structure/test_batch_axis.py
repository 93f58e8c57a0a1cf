"""Which models treat examples one by one: found from the jaxpr, and never claimed of a model that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.models import CLASSIFIERS
from oracle.models import MIXING as MIXING_MODELS

from curvax.structure import examples_independent

X = jnp.ones((6, 5), jnp.float32)
W = jnp.ones((5, 5), jnp.float32)


@pytest.mark.parametrize("model", CLASSIFIERS, ids=str)
def test_models_that_act_on_each_example_are_recognised(model: Any) -> None:
    independent, reason = examples_independent(model.predict, model.params(jnp.float32), model.inputs(jnp.float32))
    assert independent, reason


@pytest.mark.parametrize("model", MIXING_MODELS, ids=str)
def test_models_that_do_not_are_not(model: Any) -> None:
    independent, reason = examples_independent(model.predict, model.params(jnp.float32), model.inputs(jnp.float32))
    assert not independent and reason


INDEPENDENT: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "flattened and back": lambda w, x: ((x.reshape(-1) * 2.0).reshape(-1, 5)) @ w,
    "inner jit and remat": lambda w, x: jax.jit(jax.checkpoint(lambda y: jnp.sin(y @ w)))(x),
    "vmap": lambda w, x: jax.vmap(lambda row: jnp.cumsum(w @ row))(x),
    "scan over features": lambda w, x: jax.lax.scan(lambda c, t: (jnp.tanh(c + t), c), x[:, 0], x.T)[1].T @ w,
    "transposed twice": lambda w, x: jnp.flip((w.T @ x.T).T, axis=1),
    "sorted features": lambda w, x: jnp.sort(x, axis=1)[:, :2] @ w[:2],
    "padded and concatenated": lambda w, x: (
        jnp.concatenate([jnp.pad(x, ((0, 0), (1, 1)))[:, :5], x], axis=1) @ jnp.ones((10, 2))
    ),
    "conditional on parameters": lambda w, x: jax.lax.cond(w[0, 0] > 0, jnp.sin, jnp.cos, x),
}
MIXING: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "batch norm": lambda w, x: (x - x.mean(0)) @ w,
    "softmax over the batch": lambda w, x: jax.nn.softmax(x @ w, axis=0),
    "gram of the batch": lambda w, x: (x @ x.T) @ x @ w,
    "running sum": lambda w, x: jnp.cumsum(x, axis=0) @ w,
    "shifted by one": lambda w, x: jnp.roll(x, 1, axis=0) @ w,
    "position in the batch": lambda w, x: (x * jnp.arange(x.shape[0], dtype=x.dtype)[:, None]) @ w,
    "dropout mask": lambda w, x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape).astype(x.dtype),
    "scan over examples": lambda w, x: jax.lax.scan(lambda c, t: (c + t, c), x[0], x)[1],
    "reversed batch": lambda w, x: x[::-1] @ w,
    "first example for all": lambda w, x: x + x[:1],
    "sorted batch": lambda w, x: jnp.sort(x, axis=0) @ w,
    "constant per example": lambda w, x: (x * np.arange(x.shape[0], dtype=x.dtype)[:, None]) @ w,
    "divides by the batch size": lambda w, x: x @ w / x.shape[0],
    "batch last": lambda w, x: (x @ w).T,
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_operations(name: str) -> None:
    independent, reason = examples_independent(INDEPENDENT[name], W, X)
    assert independent, reason


@pytest.mark.parametrize("name", MIXING)
def test_mixing_operations_are_never_called_independent(name: str) -> None:
    independent, reason = examples_independent(MIXING[name], W, X)
    assert not independent and reason


def test_several_input_arrays_need_one_leading_axis() -> None:
    inputs = {"inner": jnp.ones((6, 2)), "edge": jnp.ones((3, 2))}
    independent, reason = examples_independent(lambda w, x: x["inner"] @ w[:2], W, inputs)
    assert not independent and "leading" in reason


def test_parameters_as_long_as_the_probe_do_not_confuse_it() -> None:
    w = jnp.ones((5, 1009), jnp.float32)
    independent, reason = examples_independent(lambda w, x: x @ w, w, X)
    assert independent, reason
