"""Which models treat examples one by one: found from the jaxpr, and never claimed of a model that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.structure import examples_independent
from tests.oracle.models import CLASSIFIERS
from tests.oracle.models import MIXING as MIXING_MODELS

pytestmark = pytest.mark.fast

X = jnp.ones((6, 5), jnp.float32)
W = jnp.ones((5, 5), jnp.float32)


@pytest.mark.parametrize("model", CLASSIFIERS, ids=str)
def test_models_that_act_on_each_example_are_recognized(model: Any) -> None:
    independent, reason = examples_independent(model.predict, model.params(jnp.float32), model.inputs(jnp.float32))
    assert independent, reason


@pytest.mark.parametrize("model", MIXING_MODELS, ids=str)
def test_models_that_do_not_are_not(model: Any) -> None:
    independent, reason = examples_independent(model.predict, model.params(jnp.float32), model.inputs(jnp.float32))
    assert not independent and reason


def _matrices(x: jax.Array) -> jax.Array:
    return x[:, :, None] * x[:, None] + jnp.eye(x.shape[1])


def _pooled(row: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jax.lax.reduce_window(jnp.square(row), -jnp.inf, jax.lax.max, (2,), (1,), "VALID")))


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
    "split": lambda w, x: jnp.concatenate(jnp.split(x @ w, 5, axis=1)[::-1], axis=1),
    "stacked and unstacked": lambda w, x: jnp.add(*jnp.unstack(jnp.stack([x, x @ w], axis=1), axis=1)),
    "tiled features": lambda w, x: jnp.tile(x, (1, 2)) @ jnp.tile(w, (2, 1)) + jnp.tile(w[:1], (x.shape[0], 1)),
    "associative scan": lambda w, x: jax.lax.associative_scan(jnp.multiply, x, axis=1) @ w,
    "argsort and one-hot": lambda w, x: jax.nn.one_hot(jnp.argsort(x, axis=1), 5)[:, 0] @ w,
    "top of the features": lambda w, x: jax.lax.top_k(x @ w, 2)[0],
    "cumulative": lambda w, x: jax.lax.cumlogsumexp(jnp.cumprod(x @ w, axis=1), axis=1),
    "spectrum": lambda w, x: (
        jnp.abs(jnp.fft.rfft(x, axis=1)) + jnp.fft.irfft(jax.lax.complex(x, x), n=3, axis=1)[:, :1]
    ),
    "set and added at fixed places": lambda w, x: x.at[:, 1].set(0.0).at[:, 2:].add(1.0).at[:, 0].multiply(w[0, 0]),
    "set at places of its own": lambda w, x: jax.vmap(lambda r: r.at[jnp.argmax(r)].set(0.0))(x) @ w,
    "dynamic slices": lambda w, x: jax.lax.dynamic_update_slice_in_dim(x, x[:, :2] * 2.0, jnp.int32(w[0, 0]), 1),
    "solve with one matrix": lambda w, x: jax.scipy.linalg.solve_triangular(w + jnp.eye(5), x.T, lower=True).T,
    "solve with matrices": lambda w, x: jnp.linalg.solve(x[:, :, None] * x[:, None] + jnp.eye(5), x[..., None])[..., 0],
    "decompositions": lambda w, x: (
        jnp.linalg.cholesky(_matrices(x))[:, 0]
        + jnp.linalg.eigh(_matrices(x))[0]
        + jnp.linalg.qr(_matrices(x))[1][:, 0]
    ),
    "solve with Cholesky factors": lambda w, x: jax.vmap(
        lambda m, r: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(m), r)
    )(_matrices(x), x),
    "barrier of weights and inputs": lambda w, x: jnp.matmul(*jax.lax.optimization_barrier((w, x))[::-1]),
    "clipped": lambda w, x: jnp.clip(x @ w, -1.0, w[0, 0]) + jax.lax.erf_inv(x) + jnp.nan_to_num(x),
    "fixed random features": lambda w, x: x @ jax.random.normal(jax.random.key(3), (5, 4)),
    "max pooling and its derivative": lambda w, x: jax.vmap(jax.grad(_pooled))(x) @ w,
    "derivative of its derivative": lambda w, x: jax.vmap(lambda r: jax.jvp(jax.grad(_pooled), (r,), (r,))[1])(x),
    "dropout mask": lambda w, x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape).astype(x.dtype),
    "convolution and its derivative": lambda w, x: jax.vmap(jax.grad(lambda r: jnp.sum(jnp.convolve(r, w[0]) ** 2)))(x),
}
MIXING: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "batch norm": lambda w, x: (x - x.mean(0)) @ w,
    "softmax over the batch": lambda w, x: jax.nn.softmax(x @ w, axis=0),
    "gram of the batch": lambda w, x: (x @ x.T) @ x @ w,
    "running sum": lambda w, x: jnp.cumsum(x, axis=0) @ w,
    "shifted by one": lambda w, x: jnp.roll(x, 1, axis=0) @ w,
    "position in the batch": lambda w, x: (x * jnp.arange(x.shape[0], dtype=x.dtype)[:, None]) @ w,
    "scan over examples": lambda w, x: jax.lax.scan(lambda c, t: (c + t, c), x[0], x)[1],
    "reversed batch": lambda w, x: x[::-1] @ w,
    "first example for all": lambda w, x: x + x[:1],
    "sorted batch": lambda w, x: jnp.sort(x, axis=0) @ w,
    "constant per example": lambda w, x: (x * np.arange(x.shape[0], dtype=x.dtype)[:, None]) @ w,
    "divides by the batch size": lambda w, x: x @ w / x.shape[0],
    "batch last": lambda w, x: (x @ w).T,
    "reshaped in another order": lambda w, x: jax.lax.reshape(x, x.shape, (1, 0)) @ w,
    "tiled batch": lambda w, x: jnp.tile(x, (2, 1))[: x.shape[0]],
    "iota over the batch": lambda w, x: x + jax.lax.broadcasted_iota(jnp.float32, x.shape, 0),
    "set in the first example": lambda w, x: x.at[0].set(0.0),
    "added to the first example": lambda w, x: x.at[0].add(x[1]),
    "set from another": lambda w, x: x.at[:, 0].set(x[::-1, 0]),
    "scattered over the batch": lambda w, x: jnp.zeros_like(x).at[jnp.int32(x[:, 0])].add(x),
    "spectrum over the batch": lambda w, x: jnp.abs(jnp.fft.fft(x, axis=0)),
    "slice written over the batch": lambda w, x: jax.lax.dynamic_update_slice_in_dim(x, x[:1] * 2.0, 1, 0),
    "solve over the batch": lambda w, x: jnp.linalg.solve(x @ x.T + jnp.eye(x.shape[0]), x),
    "triangular solve over the batch": lambda w, x: jax.scipy.linalg.solve_triangular(jnp.tril(x @ x.T), x),
    "windows over the batch": lambda w, x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 1), (1, 1), "SAME"),
    "associative scan over the batch": lambda w, x: jax.lax.associative_scan(jnp.add, x, axis=0),
    "best of the batch": lambda w, x: jax.lax.top_k(x.T, 2)[0].T,
    "stacked with its reverse": lambda w, x: jnp.stack([x, x[::-1]], axis=1)[:, 1],
    "batch split in halves": lambda w, x: jnp.concatenate(jnp.split(x, 2)[::-1]),
    "unstacked examples": lambda w, x: jnp.stack(jnp.unstack(x)[::-1]),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_operations(name: str) -> None:
    independent, reason = examples_independent(INDEPENDENT[name], W, X)
    assert independent, reason


@pytest.mark.parametrize("name", MIXING)
def test_mixing_operations_are_never_called_independent(name: str) -> None:
    independent, reason = examples_independent(MIXING[name], W, X)
    assert not independent and reason


def test_parameters_as_long_as_the_probe_do_not_confuse_it() -> None:
    w = jnp.ones((5, 1009), jnp.float32)
    independent, reason = examples_independent(lambda w, x: x @ w, w, X)
    assert independent, reason
