"""Jitted steps to lower and compile: presets on shapes alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import curvax
from curvax.curvature import Evaluation, GaussNewton, Model, Needs
from curvax.kernels import Backend
from curvax.loops import for_loop_body

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Network:
    """A multilayer perceptron.

    Attributes:
      name: as tests and rows print it.
      widths: inputs, hidden layers, outputs.
      batch: examples per step.
    """

    name: str
    widths: tuple[int, ...]
    batch: int

    def params(self) -> PyTree:
        """Shapes of (weights, bias) of each layer."""
        return [(_float(a, b), _float(b)) for a, b in itertools.pairwise(self.widths)]

    def data(self) -> PyTree:
        """Shapes of a batch with integer labels."""
        return {"x": _float(self.batch, self.widths[0]), "y": jax.ShapeDtypeStruct((self.batch,), jnp.int32)}


def predict(params: PyTree, x: jax.Array) -> jax.Array:
    """The network's logits."""
    for weights, bias in params[:-1]:
        x = jnp.tanh(x @ weights + bias)
    weights, bias = params[-1]
    return x @ weights + bias


SMALL = Network("mlp 784-256-256-10", (784, 256, 256, 10), 128)
DEEP = Network("25-layer mlp, 50 leaves", (784, *(256,) * 24, 10), 128)
HEAD = Network("mlp 784-256-4096", (784, 256, 4096), 128)


def _sgn_ce(backend: Backend) -> Any:
    return curvax.sgn_ce(predict_fn=predict, lam0=0.1, maxiter=20, learning_rate=0.1, backend=backend)


def _egn_ce(backend: Backend) -> Any:
    return curvax.egn_ce(predict_fn=predict, lam0=0.1, learning_rate=0.1, backend=backend)


def _sophia_g(backend: Backend) -> Any:
    return curvax.sophia_g(predict_fn=predict, learning_rate=1e-3, eval_every_k=10, backend=backend)


def _adahessian(backend: Backend) -> Any:
    loss = curvax.losses.SoftmaxCrossEntropy()
    return curvax.adahessian(predict_fn=predict, loss=loss, learning_rate=1e-3, eval_every_k=1, backend=backend)


OWN_KERNELS = ("curvax_", "triton_kernel_call", "mosaic_gpu")
"""How the custom call targets of curvax's own kernels begin: C++, Triton, Mosaic."""

PRESETS: dict[str, Callable[[Backend], Any]] = {
    "sgn_ce": _sgn_ce,
    "egn_ce": _egn_ce,
    "sophia_g": _sophia_g,
    "adahessian": _adahessian,
}


CASES = (
    *((preset, network) for network in (SMALL, DEEP) for preset in PRESETS),
    # Enough outputs for the kernels along them; far too many for one row each.
    ("sgn_ce", HEAD),
)


def step(preset: str, network: Network, backend: Backend) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A preset's step (params, batch, state, key data) -> (params, state, info), and the shapes of its arguments."""
    method = PRESETS[preset](backend)
    params = network.params()
    # Key data and not a key: a key type has no place in a described device's arguments.
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def stepped(params: PyTree, batch: PyTree, state: PyTree, key: jax.Array) -> Any:
        return method.step(params, batch, state, jax.random.wrap_key_data(key, impl="threefry2x32"))

    return stepped, (params, network.data(), jax.eval_shape(method.init, params), key)


def products(network: Network) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The Gauss-Newton products of a solve and nothing else, which conjugate gradients add to."""

    def repeated(params: PyTree, batch: PyTree) -> PyTree:
        operator = GaussNewton(Model(predict), curvax.losses.SoftmaxCrossEntropy())
        at = operator.linearize(params, Evaluation(batch), Needs(gradient=True, product=True))
        if at.product is None:
            raise AssertionError("a linearization asked for products has them.")
        product = for_loop_body(at.product)
        return jax.lax.fori_loop(0, 20, lambda _, v: product(v), at.gradient)

    return repeated, (network.params(), network.data())


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
