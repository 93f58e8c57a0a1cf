"""Models and batches, the same for every library, deterministic, float32 but for the PINN."""

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
      dtype: of parameters and inputs; float64 needs `jax.enable_x64`.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    predict: Callable[[PyTree, jax.Array], jax.Array]
    input_shape: tuple[int, ...]
    outputs: int
    dtype: str = "float32"

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
        arrays = [jnp.asarray(leaf, self.dtype) for leaf in leaves]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def batch(self, size: int, *, labels: bool = True) -> dict[str, jax.Array]:
        """Inputs "x" and "y": integer labels, or real targets."""
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.normal(size=(size, *self.input_shape)), self.dtype)
        if labels:
            return {"x": x, "y": jnp.asarray(rng.integers(0, self.outputs, size), jnp.int32)}
        return {"x": x, "y": jnp.asarray(rng.normal(size=(size, self.outputs)), self.dtype)}

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


def _residual(params: PyTree, points: jax.Array) -> jax.Array:
    """The residual of u'' = -f at each point, (B, 1): second derivatives by forward over reverse mode."""

    def u(x: jax.Array) -> jax.Array:
        return _dense(params, x)[0]

    def residual(x: jax.Array) -> jax.Array:
        basis = jnp.eye(x.shape[0], dtype=x.dtype)
        columns = [jax.jvp(jax.grad(u), (x,), (e,))[1] for e in basis]
        laplacian = sum(column[i] for i, column in enumerate(columns))
        return (laplacian + jnp.prod(jnp.sin(math.pi * x)))[None]

    return jax.vmap(residual)(points)


def layered(*widths: int) -> Workload:
    """A network of dense layers, from inputs over hidden layers to outputs."""
    return Workload(f"mlp {'-'.join(map(str, widths))}", _layers(*widths), _dense, widths[:1], widths[-1])


def mlp(width: int, outputs: int, inputs: int = 784) -> Workload:
    """A network with two hidden layers of one width."""
    return layered(inputs, width, width, outputs)


def cnn(width: int, outputs: int) -> Workload:
    """A network of three convolutions with stride 2."""
    shapes = (
        *((3, 3, 1, width // 2), (width // 2,), (3, 3, width // 2, width), (width,), (3, 3, width, width), (width,)),
        *((4 * 4 * width, outputs), (outputs,)),
    )
    return Workload(f"cnn {width // 2}-{width}-{width}-{outputs}", shapes, _convolutional, (28, 28, 1), outputs)


def pinn(width: int, depth: int = 5) -> Workload:
    """Poisson's equation on the plane: `depth` hidden layers of one width, one residual per point."""
    shapes = _layers(2, *[width] * depth, 1)
    return Workload(f"pinn {depth}x{width}, float64", shapes, _residual, (2,), 1, "float64")


MLP = mlp(256, 10)
REGRESSION = mlp(256, 1)
SMALL = Workload("mlp 8-16-5", _layers(8, 16, 5), _dense, (8,), 5)
UNEVEN = Workload("mlp 700-240-260-10", _layers(700, 240, 260, 10), _dense, (700,), 10)
WIDE = Workload("mlp 784-1024-512-10", _layers(784, 1024, 512, 10), _dense, (784,), 10)
CNN = cnn(32, 10)
PINN = pinn(64)
