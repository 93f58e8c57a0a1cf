"""Tables: regression, logistic regression, a matrix with missing entries; full batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits, make_friedman1

from bench.suites.untuned.problems.problem import (
    Data,
    Params,
    Problem,
    dense,
    dense_init,
    once,
    root_mean_square,
)
from curvax.losses import SigmoidBinaryCrossEntropy, SquaredError

_ROWS, _COLUMNS, _RANK = 60, 50, 4


def _split(x: np.ndarray, y: np.ndarray, held_out: int) -> Data:
    return Data({"x": x[:-held_out], "y": y[:-held_out]}, {"x": x[-held_out:], "y": y[-held_out:]})


def _friedman() -> Data:
    """Friedman's first function of ten inputs, with noise; targets standardized."""
    x, y = make_friedman1(1200, noise=0.5, random_state=0)
    y = (y - y.mean()) / y.std()
    return _split((2 * x - 1).astype(np.float32), y[:, None].astype(np.float32), 400)


def _odd_digits() -> Data:
    """Whether a digit is odd, from pixels of which some are always blank: singular, and no plane separates it."""
    x, y = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(y))
    x, y = (x[shuffled] / 16).astype(np.float32), (y[shuffled] % 2)[:, None].astype(np.float32)
    return _split(x, y, 453)


def _linear_init(key: jax.Array) -> Params:
    del key  # zero, as usual for a convex problem: seeds differ in nothing
    return {"w": jnp.zeros((64, 1)), "b": jnp.zeros(1)}


def _linear(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def _entries() -> Data:
    """Half of the entries of a noisy matrix of low rank, and 400 of the others to test."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(_ROWS, _RANK)) @ rng.normal(size=(_RANK, _COLUMNS)) / _RANK**0.5
    matrix += 0.05 * rng.normal(size=matrix.shape)
    chosen = rng.permutation(matrix.size)[:1900]
    entries = np.stack(np.unravel_index(chosen, matrix.shape), axis=-1).astype(np.int32)
    return _split(entries, matrix.reshape(-1)[chosen].astype(np.float32), 400)


def _factors_init(key: jax.Array) -> Params:
    rows, columns = jax.random.split(key)
    return {
        "rows": 0.3 * jax.random.normal(rows, (_ROWS, _RANK)),
        "columns": 0.3 * jax.random.normal(columns, (_COLUMNS, _RANK)),
    }


def _entry(params: Params, x: jax.Array) -> jax.Array:
    return jnp.sum(params["rows"][x[:, 0]] * params["columns"][x[:, 1]], axis=-1)


TABLES = (
    Problem(
        "tabular",
        SquaredError(),
        dense_init(10, 32, 32, 1),
        dense,
        once(_friedman),
        "test error",
        root_mean_square(dense),
    ),
    Problem(
        "logistic",
        SigmoidBinaryCrossEntropy(),
        _linear_init,
        _linear,
        once(_odd_digits),
        "test accuracy",
        lambda params, batch: jnp.mean((_linear(params, batch["x"]) > 0) == (batch["y"] > 0.5)),
    ),
    Problem(
        "factorization",
        SquaredError(),
        _factors_init,
        _entry,
        once(_entries),
        "test error",
        root_mean_square(_entry),
    ),
)
