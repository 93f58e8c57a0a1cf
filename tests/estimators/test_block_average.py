"""AdaHessian's averaging against NumPy means, by shapes alone and by what a model says of its leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.estimators import BlockAverage
from curvax.losses import SquaredError
from curvax.structure.axes import LeafAxes, leaf_axes
from tests.oracle.compiling import quick_jit


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((5,), ()),
        ((3, 4), (1,)),
        ((2, 3, 4), (2,)),
        ((3, 3, 4, 5), (0, 1)),
        ((2, 3, 3, 4, 5), (0, 1, 2)),
        ((2, 2, 2, 2, 3, 4), (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_axes_by_shape_alone(x64, shape, axes):
    leaf = np.random.default_rng(0).normal(size=shape)
    got = BlockAverage()({"p": jnp.asarray(leaf)})["p"]
    np.testing.assert_allclose(got, np.broadcast_to(leaf.mean(axis=axes, keepdims=True) if axes else leaf, shape))
    assert got.dtype == jnp.float64


def test_a_callable_replaces_the_rule():
    seen = []

    def rule(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        seen.append((path, shape))
        return (0,) if "embedding" in path else ()

    diagonal = {"embedding": jnp.arange(6.0).reshape(2, 3), "rest": jnp.arange(4.0).reshape(2, 2)}
    got = jax.jit(BlockAverage(rule))(diagonal)
    np.testing.assert_allclose(got["embedding"], [[1.5, 2.5, 3.5]] * 2)
    np.testing.assert_allclose(got["rest"], diagonal["rest"])
    assert seen == [("['embedding']", (2, 3)), ("['rest']", (2, 2))]


def test_empty_leaves_stay():
    assert BlockAverage()({}) == {}
    assert BlockAverage()([jnp.zeros((0, 3))])[0].shape == (0, 3)
    assert BlockAverage()([jnp.zeros((3, 0))])[0].shape == (3, 0)


def conv(x: jax.Array, kernel: jax.Array, layout: str = "WIO") -> jax.Array:
    space = layout.replace("I", "").replace("O", "")
    numbers = ("N" + space + "C", layout, "N" + space + "C")
    return jax.lax.conv_general_dilated(x, kernel, (1,) * len(space), "SAME", dimension_numbers=numbers)


class Layer(NamedTuple):
    """A layer on inputs with one entry that is not zero: the Hessian of a sum of squares is diagonal in its weights."""

    call: Callable[[jax.Array, jax.Array], jax.Array]
    weights: tuple[int, ...]
    inputs: tuple[int, ...]
    averaged: tuple[int, ...]


LAYERS = {
    "dense": Layer(lambda w, x: x @ w, (4, 5), (4,), (1,)),
    "dense, transposed": Layer(lambda w, x: x @ w.T, (5, 4), (4,), (0,)),
    "into heads": Layer(lambda w, x: jnp.einsum("bd,dhe->bhe", x, w), (4, 2, 3), (4,), (2,)),
    "out of heads": Layer(lambda w, x: jnp.einsum("bhe,hed->bd", x, w), (2, 3, 4), (2, 3), (2,)),
    "heads, reshaped": Layer(lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), (4,), (2,)),
    "experts": Layer(lambda w, x: jnp.einsum("bgd,gdf->bgf", x, w), (2, 3, 4), (2, 3), (2,)),
    "convolution in 1 dimension": Layer(lambda w, x: conv(x, w), (3, 2, 4), (6, 2), (0,)),
    "convolution in 2 dimensions": Layer(lambda w, x: conv(x, w, "HWIO"), (2, 3, 2, 3), (3, 4, 2), (0, 1)),
    "convolution in 3 dimensions": Layer(lambda w, x: conv(x, w, "DHWIO"), (2, 1, 2, 2, 3), (2, 3, 2, 2), (0, 2)),
    "convolution, channels first": Layer(lambda w, x: conv(x, w, "OIHW"), (3, 2, 2, 3), (3, 4, 2), (2, 3)),
    "bias": Layer(lambda w, x: x + w, (5,), (5,), ()),
    "gain": Layer(lambda w, x: x * w, (5,), (5,), ()),
    "bias of heads": Layer(lambda w, x: x + w, (2, 3), (2, 3), ()),
}
DEPTH, EXAMPLES = 3, 8


def inputs(layer: Layer) -> jax.Array:
    """Of all layers of a stack; every example has one entry."""
    rng = np.random.default_rng(0)
    x = np.zeros((DEPTH, EXAMPLES, int(np.prod(layer.inputs))))
    for i in range(DEPTH):
        x[i, np.arange(EXAMPLES), rng.permutation(EXAMPLES * 7)[:EXAMPLES] % x.shape[2]] = rng.uniform(1, 2, EXAMPLES)
    return jnp.asarray(x.reshape(DEPTH, EXAMPLES, *layer.inputs))


def weighted_squares(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    outputs = layer.call(w, x)
    scale = 1 + jnp.arange(outputs[0].size, dtype=outputs.dtype).reshape(outputs.shape[1:])
    return jnp.sum(scale * outputs**2) / 2


def scanned(layer: Layer, weights: jax.Array, x: jax.Array) -> jax.Array:
    def body(total: jax.Array, one: Any) -> Any:
        return total + weighted_squares(layer, *one), None

    return jax.lax.scan(body, jnp.zeros((), x.dtype), (weights, x))[0]


def vmapped(layer: Layer, weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(jax.vmap(lambda w, x: weighted_squares(layer, w, x))(weights, x))


def unrolled(layer: Layer, weights: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.stack([weighted_squares(layer, w, part) for w, part in zip(weights, x, strict=True)]))


@functools.cache
def by_hand() -> tuple[Any, Any, Any]:
    """(weights, inputs, first direction) of stacks of layers of all kinds, from dense Hessians."""
    rng = np.random.default_rng(1)
    weights = {name: jnp.asarray(rng.standard_normal((DEPTH, *layer.weights))) for name, layer in LAYERS.items()}
    batch = {name: inputs(layer) for name, layer in LAYERS.items()}

    def curvature(layer: Layer, weights: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat, unravel = ravel_pytree(weights)

        def loss(v: jax.Array) -> jax.Array:
            return vmapped(layer, unravel(v), x)

        return jax.hessian(loss)(flat), jax.grad(loss)(flat)

    curvatures = quick_jit(lambda: {name: curvature(LAYERS[name], weights[name], batch[name]) for name in LAYERS})()
    averaged: dict[str, np.ndarray] = {}
    for name, layer in LAYERS.items():
        hessian = np.asarray(curvatures[name][0])
        np.testing.assert_allclose(hessian, np.diag(np.diag(hessian)), atol=1e-12)
        diagonal, axes = np.diag(hessian).reshape(DEPTH, *layer.weights), tuple(axis + 1 for axis in layer.averaged)
        mean = diagonal.mean(axis=axes, keepdims=True) if axes else diagonal
        averaged[name] = np.broadcast_to(mean, diagonal.shape)
    floor = 1e-4 * np.mean(np.concatenate([x.ravel() for x in averaged.values()]))
    directions = {
        name: np.asarray(curvatures[name][1]).reshape(mean.shape) / (mean + floor) for name, mean in averaged.items()
    }
    return weights, batch, directions


@pytest.mark.parametrize("kind", [scanned, vmapped, unrolled])
def test_layers_of_a_stack_are_averaged_each_for_itself(kind: Any, x64: None) -> None:
    """The first step of AdaHessian, whose diagonal one probe shows exactly."""
    weights, batch, directions = by_hand()

    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.sum(jnp.stack([kind(layer, params[name], batch[name]) for name, layer in LAYERS.items()]))

    params = {name: list(w) for name, w in weights.items()} if kind is unrolled else weights
    method = curvax.adahessian(loss_fn=loss, clip_value=None)
    after, _, _ = quick_jit(method.step)(params, batch, method.init(params), jax.random.key(0))
    for name in LAYERS:
        moved = jnp.stack([a - b for a, b in zip(params[name], after[name], strict=True)])
        np.testing.assert_allclose(moved / 0.15, directions[name], rtol=1e-12, err_msg=name)


def test_a_model_with_a_loss_and_microbatches_average_alike(x64: None) -> None:
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.standard_normal((4, 2, 3))), "b": jnp.asarray(rng.standard_normal((2, 3)))}
    batch = {"x": jnp.eye(4)[jnp.asarray([0, 1, 2, 3, 1])], "y": jnp.asarray(rng.standard_normal((5, 6)))}

    def predict(p: Any, x: jax.Array) -> jax.Array:
        return (jnp.einsum("bd,dhe->bhe", x, p["w"]) + jax.lax.stop_gradient(p["b"])).reshape(x.shape[0], 6)

    def step(**options: Any) -> Any:
        method = curvax.adahessian(
            predict_fn=predict, loss=SquaredError(), frozen={"w": False, "b": True}, clip_value=None, **options
        )
        return quick_jit(method.step)(params, batch, method.init(params), jax.random.key(0))[0]["w"]

    diagonal = np.asarray([1.0, 2.0, 1.0, 1.0])[:, None, None] / 5 * np.ones((4, 2, 3))
    residual = np.asarray(predict(params, batch["x"]) - batch["y"])
    gradient = (np.asarray(batch["x"]).T @ residual / 5).reshape(4, 2, 3)
    expected = np.asarray(params["w"]) - 0.15 * gradient / (diagonal + 1e-4 * diagonal.mean())
    np.testing.assert_allclose(step(), expected, rtol=1e-9)
    np.testing.assert_allclose(step(microbatch_size=2), expected, rtol=1e-9)


def test_axes_of_leaves() -> None:
    x = jnp.ones((2, 5, 4))

    def model(p: Any, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda h, layer: (h @ layer["w"] + layer["b"], None), x, p["layers"])
        x = (x @ p["pair"][0]) @ p["pair"][1]
        return jnp.einsum("btd,dhe->bthe", x, p["heads"]).reshape(2, 5, 6) @ p["last"].reshape(2, 3, 7).reshape(6, 7)

    params = {
        "layers": {"w": jnp.ones((3, 4, 4)), "b": jnp.ones((3, 4))},
        "pair": jnp.ones((2, 4, 4)),
        "heads": jnp.ones((4, 2, 3)),
        "last": jnp.ones((6, 7)),
    }
    found = jax.tree.unflatten(jax.tree.structure(params), leaf_axes(model, params, x))
    assert found["layers"] == {"w": (LeafAxes(copies=(0,), inputs=(1,), outputs=(2,)),), "b": ()}
    assert found["pair"] == (LeafAxes(copies=(0,), inputs=(1,), outputs=(2,)),) * 2
    assert found["heads"] == (LeafAxes(inputs=(0,), outputs=(1, 2)),)
    assert found["last"] == (LeafAxes(inputs=(0,), outputs=(1,)),)
