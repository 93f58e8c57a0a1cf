"""Sequences: a tiny transformer on text by minibatches, a recurrent network on a chaotic series by full batches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from examples.language_model import data, model

from bench.suites.untuned.problems.problem import Batch, Data, Params, Problem, once, root_mean_square
from curvax.losses import SoftmaxCrossEntropy, SquaredError

_SIZE = model.SIZES["tiny"]
_WIDTH, _LENGTH, _AHEAD, _STRIDE, _DELAY = 16, 24, 2, 3, 17

_transformer = functools.partial(model.predict, heads=_SIZE.heads)


def _text() -> Data:
    corpus = data.load()
    train = corpus.batch(np.random.default_rng(0), 1024, _SIZE.length)
    return Data(train, corpus.held_out(64, _SIZE.length))


def _text_loss(params: Params, held_out: Batch) -> jax.Array:
    loss, outputs = SoftmaxCrossEntropy(), _transformer(params, held_out["x"])
    return loss.value(outputs, held_out["y"], loss.effective_weights(outputs))


def _mackey_glass(length: int) -> np.ndarray:
    """Mackey and Glass's series with a delay of 17, standardized."""
    results = [1.2] * (_DELAY + 1)
    for _ in range(length + 200):
        late = results[-1 - _DELAY]
        results.append(0.9 * results[-1] + 0.2 * late / (1 + late**10))
    series = np.asarray(results[-length:])
    return (series - series.mean()) / series.std()


def _windows() -> Data:
    """Windows (length, 1) of the series and the value some strides behind each; the last third is for testing."""
    windows, span = 384, (_LENGTH + _AHEAD) * _STRIDE
    series = _mackey_glass(4 * windows + span).astype(np.float32)
    starts = 4 * np.arange(windows)
    x = series[starts[:, None] + _STRIDE * np.arange(_LENGTH)][..., None]
    y = series[starts + _STRIDE * (_LENGTH + _AHEAD - 1)][:, None]
    train = np.random.default_rng(0).permutation(256)  # some methods cut the batch into parts
    return Data({"x": x[train], "y": y[train]}, {"x": x[256:], "y": y[256:]})


def _recurrent_init(key: jax.Array) -> Params:
    keys = jax.random.split(key, 3)
    return {
        "input": jax.random.normal(keys[0], (1, _WIDTH)),
        "state": jax.random.normal(keys[1], (_WIDTH, _WIDTH)) / _WIDTH**0.5,
        "bias": jnp.zeros(_WIDTH),
        "output": jax.random.normal(keys[2], (_WIDTH, 1)) / _WIDTH**0.5,
    }


def _recurrent(params: Params, x: jax.Array) -> jax.Array:
    """Sequences (B, T, 1) -> (B, 1): a tanh network that reads one value after another."""

    def cell(state: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(value @ params["input"] + state @ params["state"] + params["bias"]), None

    start = jnp.zeros((x.shape[0], _WIDTH), x.dtype)
    return jax.lax.scan(cell, start, x.swapaxes(0, 1))[0] @ params["output"]


SEQUENCES = (
    Problem(
        "transformer",
        SoftmaxCrossEntropy(),
        functools.partial(model.init, size=_SIZE),
        _transformer,
        once(_text),
        "test loss",
        _text_loss,
        batch=16,
    ),
    Problem(
        "recurrent",
        SquaredError(),
        _recurrent_init,
        _recurrent,
        once(_windows),
        "test error",
        root_mean_square(_recurrent),
    ),
)
