"""Handwritten digits of scikit-learn: a classifier, K-FAC's autoencoder, a convolutional network; minibatches."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from bench.suites.untuned.problems.problem import Data, Params, Problem, accuracy, dense, dense_init, once
from curvax.losses import SigmoidBinaryCrossEntropy, SoftmaxCrossEntropy

_AUTOENCODER = (64, 100, 50, 20, 10, 20, 50, 100, 64)


def _digits(held_out: int) -> tuple[np.ndarray, np.ndarray, slice, slice]:
    """Images in [0, 1], labels, and where to train and to test."""
    pixels, classes = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(classes))
    images, labels = (pixels[shuffled] / 16).astype(np.float32), classes[shuffled].astype(np.int32)
    return images, labels, slice(None, -held_out), slice(-held_out, None)


def _labelled() -> Data:
    images, labels, train, test = _digits(453)
    return Data({"x": images[train], "y": labels[train]}, {"x": images[test], "y": labels[test]})


def _unlabelled() -> Data:
    images, _, train, test = _digits(297)
    return Data({"x": images[train], "y": images[train]}, {"x": images[test], "y": images[test]})


def _cnn_init(key: jax.Array) -> Params:
    shapes = {"first": (3, 3, 1, 8), "second": (3, 3, 8, 16), "last": (4 * 4 * 16, 10)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"w": jax.random.normal(k, s) * math.sqrt(2 / math.prod(s[:-1])), "b": jnp.zeros(s[-1])}
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


def _cnn(params: Params, x: jax.Array) -> jax.Array:
    """Images (B, 64) -> logits (B, 10): two convolutions, the second with stride 2."""
    hidden = x.reshape(-1, 8, 8, 1)
    for name, stride in (("first", 1), ("second", 2)):
        layer, axes = params[name], ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(hidden, layer["w"], 2 * (stride,), "SAME", dimension_numbers=axes)
        hidden = jax.nn.relu(hidden + layer["b"])
    return hidden.reshape(len(x), -1) @ params["last"]["w"] + params["last"]["b"]


def _reconstruction(params: Params, held_out: dict[str, jax.Array]) -> jax.Array:
    loss, outputs = SigmoidBinaryCrossEntropy(), dense(params, held_out["x"])
    return loss.value(outputs, held_out["y"], loss.effective_weights(outputs))


IMAGES = (
    Problem(
        "digits",
        SoftmaxCrossEntropy(),
        dense_init(64, 64, 10),
        dense,
        once(_labelled),
        "test accuracy",
        accuracy(dense),
        batch=64,
    ),
    Problem(
        "autoencoder",
        SigmoidBinaryCrossEntropy(),
        dense_init(*_AUTOENCODER),
        dense,
        once(_unlabelled),
        "test loss",
        _reconstruction,
        batch=500,
    ),
    Problem(
        "cnn",
        SoftmaxCrossEntropy(),
        _cnn_init,
        _cnn,
        once(_labelled),
        "test accuracy",
        accuracy(_cnn),
        batch=64,
    ),
)
