"""Models and batches, the same for every library, deterministic, float32."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model.

    Attributes:
      name: as rows print it.
      shapes: shapes of the parameter leaves: (matrix or filter, bias) in turn.
      predict: (params, inputs) -> outputs.
      input_shape: of one example.
      outputs: outputs per example.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    predict: Callable[[PyTree, jax.Array], jax.Array]
    input_shape: tuple[int, ...]
    outputs: int

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def params(self) -> PyTree:
        """Initial parameters: a list of (weights, bias), weights with variance 2 / fan-in."""
        rng = np.random.default_rng(0)
        leaves = [
            rng.normal(size=s) * math.sqrt(2 / math.prod(s[:-1])) if len(s) > 1 else np.zeros(s) for s in self.shapes
        ]
        arrays = [jnp.asarray(leaf, jnp.float32) for leaf in leaves]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def batch(self, size: int, *, labels: bool = True) -> dict[str, jax.Array]:
        """Inputs "x" and "y": integer labels, or real targets."""
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.normal(size=(size, *self.input_shape)), jnp.float32)
        if labels:
            return {"x": x, "y": jnp.asarray(rng.integers(0, self.outputs, size), jnp.int32)}
        return {"x": x, "y": jnp.asarray(rng.normal(size=(size, self.outputs)), jnp.float32)}

    def cross_entropy(self, params: PyTree, batch: dict[str, jax.Array]) -> jax.Array:
        """Mean cross entropy, as a user writes it."""
        log_p = jax.nn.log_softmax(self.predict(params, batch["x"]))
        return -jnp.mean(jnp.take_along_axis(log_p, batch["y"][:, None], axis=-1))


def _dense(params: PyTree, x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def _convolutional(params: PyTree, x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + b)
    w, b = params[-1]
    return x.reshape(x.shape[0], -1) @ w + b


def _layers(*widths: int) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for a, b in itertools.pairwise(widths) for shape in ((a, b), (b,)))


MLP = Workload("mlp 784-256-256-10", _layers(784, 256, 256, 10), _dense, (784,), 10)
REGRESSION = Workload("mlp 784-256-256-1", _layers(784, 256, 256, 1), _dense, (784,), 1)
SMALL = Workload("mlp 8-16-5", _layers(8, 16, 5), _dense, (8,), 5)
WIDE = Workload("mlp 784-1024-512-10", _layers(784, 1024, 512, 10), _dense, (784,), 10)
CNN = Workload(
    "cnn 16-32-32-10",
    ((3, 3, 1, 16), (16,), (3, 3, 16, 32), (32,), (3, 3, 32, 32), (32,), (4 * 4 * 32, 10), (10,)),
    _convolutional,
    (28, 28, 1),
    10,
)
