"""Small models on which every dense object (Jacobian, GGN, Hessian) is cheap: below 200 parameters, batch 5 to 7.

A `Model` is `predict(params, inputs) -> outputs` with a way to make its parameters and its inputs. Together the models
cover what curvature code stumbles over: shared weights, scans, strides, attention, integer inputs, odd pytrees, scalar
outputs, several output axes, and custom derivative rules. They are written for strict dtype promotion.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .compiling import array, quick_jit

PyTree = Any


@dataclass(frozen=True)
class Model:
    """One test model.

    Attributes:
        name: what it is, used as the test id.
        init: `(key, dtype) -> params`, in NumPy.
        predict: `(params, inputs) -> outputs`, each example of the leading axis by itself.
        input_shape: shape of the inputs, batch first; the outputs keep the batch axis.
        output_shape: shape of the outputs, batch first.
        vocabulary: 0 for floating inputs, otherwise the inputs are integers below it.
        forward_mode: `jax.jvp` of `predict` works (a `custom_vjp` forbids it).
        true_derivative: derivative rules are the mathematical derivative, so that a Hessian means something.
    """

    name: str
    init: Callable[[jax.Array, Any], PyTree]
    predict: Callable[[PyTree, jax.Array], jax.Array]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    vocabulary: int = 0
    forward_mode: bool = True
    true_derivative: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def positions(self) -> tuple[int, ...]:
        """All output axes but the last; of scalar outputs, the batch."""
        return self.output_shape[:-1] if len(self.output_shape) > 1 else self.output_shape

    @property
    def outputs(self) -> int:
        """Number of outputs per position."""
        return self.output_shape[-1] if len(self.output_shape) > 1 else 1

    def params(self, dtype: Any = jnp.float64, seed: int = 0) -> PyTree:
        """Parameters drawn in float32 and cast, so that every dtype starts from the same point up to rounding."""
        with jax.enable_x64(False):
            drawn = self.init(jax.random.key(seed), np.float32)
        return jax.tree.map(lambda leaf: _as(leaf, dtype), drawn)

    def rng(self, seed: int = 0) -> np.random.Generator:
        """NumPy generator private to this model and seed."""
        return np.random.default_rng([seed, zlib.crc32(self.name.encode())])

    def inputs(self, dtype: Any = jnp.float64, seed: int = 0) -> jax.Array:
        """Standard normal inputs, or integers below `vocabulary`."""
        if self.vocabulary:
            return array(self.rng(seed).integers(0, self.vocabulary, self.input_shape), jnp.int32)
        return _as(self.rng(seed).standard_normal(self.input_shape), dtype)

    def labels(self, seed: int = 0) -> jax.Array:
        """Integer labels, one per position."""
        return array(self.rng(seed + 1).integers(0, self.outputs, self.positions), jnp.int32)

    def soft_labels(self, dtype: Any = jnp.float64, seed: int = 0) -> jax.Array:
        """Soft labels, one distribution per position."""
        raw = self.rng(seed + 2).random((*self.positions, self.outputs)) + 0.1
        return _as(raw / raw.sum(-1, keepdims=True), dtype)

    def targets(self, dtype: Any = jnp.float64, seed: int = 0) -> jax.Array:
        """Real targets with the shape of the outputs."""
        return _as(self.rng(seed + 3).standard_normal(self.output_shape), dtype)

    def weights(self, dtype: Any = jnp.float64, seed: int = 0) -> jax.Array:
        """Non-negative weights, one per position, some of them zero."""
        raw = self.rng(seed + 4).random(self.positions) * 2.0
        raw.ravel()[1::4] = 0.0
        return _as(raw, dtype)


def _as(values: Any, dtype: Any) -> jax.Array:
    """Through float32 to `dtype`."""
    return array(np.asarray(values, np.float32), dtype)


@quick_jit
def _split(key: jax.Array) -> list[jax.Array]:
    return list(jax.random.split(key, 16))


@quick_jit
def _draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (256,), jnp.float32)


def _keys(key: jax.Array, count: int) -> list[jax.Array]:
    """The first of sixteen keys: two programs draw everything here, in place of some for every shape."""
    return _split(key)[:count]


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 0.6) -> np.ndarray:
    drawn = np.asarray(_draw(key))[: math.prod(shape)].reshape(shape)
    return (drawn * np.float32(scale)).astype(dtype)


def _dense_init(widths: tuple[int, ...]) -> Callable[[jax.Array, Any], PyTree]:
    def init(key: jax.Array, dtype: Any) -> PyTree:
        keys = jax.random.split(key, 2 * len(widths))
        return [
            {"w": _normal(keys[2 * i], (m, n), dtype), "b": _normal(keys[2 * i + 1], (n,), dtype, 0.2)}
            for i, (m, n) in enumerate(itertools.pairwise(widths))
        ]

    return init


def _mlp(activation: Callable[[jax.Array], jax.Array]) -> Callable[[PyTree, jax.Array], jax.Array]:
    def predict(params: PyTree, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = activation(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return predict


def _scalar(predict: Callable[[PyTree, jax.Array], jax.Array]) -> Callable[[PyTree, jax.Array], jax.Array]:
    return lambda params, x: predict(params, x)[..., 0]


def _linear_init(key: jax.Array, dtype: Any) -> PyTree:
    return {"w": _normal(key, (4, 3), dtype), "b": _normal(_keys(key, 2)[1], (3,), dtype, 0.2)}


def _linear(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def _cnn_init(key: jax.Array, dtype: Any) -> PyTree:
    k1, k2, k3 = _keys(key, 3)
    return {
        "conv": {"kernel": _normal(k1, (3, 3, 2, 3), dtype, 0.4), "bias": _normal(k2, (3,), dtype, 0.1)},
        "head": {"w": _normal(k3, (12, 3), dtype, 0.5), "b": np.zeros((3,), dtype)},
    }


def _cnn(params: PyTree, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jnp.tanh(y + params["conv"]["bias"]).reshape(x.shape[0], -1)
    return y @ params["head"]["w"] + params["head"]["b"]


def _shared_init(key: jax.Array, dtype: Any) -> PyTree:
    k1, k2, k3 = _keys(key, 3)
    return {"tied": _normal(k1, (3, 5), dtype), "bias": _normal(k2, (5,), dtype), "head": _normal(k3, (3, 4), dtype)}


def _shared(params: PyTree, x: jax.Array) -> jax.Array:
    """One matrix used twice (as it is and transposed) at every one of the T positions of (B, T, 3)."""
    hidden = jnp.tanh(x @ params["tied"] + params["bias"])
    return (hidden @ params["tied"].T) @ params["head"]


def _recurrent_init(key: jax.Array, dtype: Any) -> PyTree:
    k1, k2, k3 = _keys(key, 3)
    return {
        "inputs": _normal(k1, (2, 4), dtype),
        "state": _normal(k2, (4, 4), dtype, 0.4),
        "bias": np.zeros((4,), dtype),
        "head": _normal(k3, (4, 3), dtype),
    }


def _recurrent(params: PyTree, x: jax.Array) -> jax.Array:
    def cell(carry: jax.Array, x_t: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x_t @ params["inputs"] + carry @ params["state"] + params["bias"]), None

    start = jnp.zeros((x.shape[0], 4), x.dtype)
    last, _ = jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
    return last @ params["head"]


def _attention_init(key: jax.Array, dtype: Any) -> PyTree:
    keys = _keys(key, 5)
    return {
        "norm": {"scale": np.ones((4,), dtype), "bias": np.zeros((4,), dtype)},
        "q": _normal(keys[0], (4, 4), dtype),
        "k": _normal(keys[1], (4, 4), dtype),
        "v": _normal(keys[2], (4, 4), dtype),
        "out": _normal(keys[3], (4, 4), dtype),
        "head": _normal(keys[4], (4, 3), dtype),
    }


def _attention(params: PyTree, x: jax.Array) -> jax.Array:
    """Pre-norm causal self-attention block with a residual and a head, (B, T, 4) -> (B, T, 3)."""
    centered = x - jnp.mean(x, -1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(centered * centered, -1, keepdims=True) + jnp.asarray(1e-3, x.dtype))
    h = centered / spread * params["norm"]["scale"] + params["norm"]["bias"]
    q, k, v = h @ params["q"], h @ params["k"], h @ params["v"]
    scores = jnp.einsum("btd,bsd->bts", q, k) / jnp.asarray(2.0, x.dtype)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    attended = jax.nn.softmax(jnp.where(causal, scores, jnp.asarray(-1e9, x.dtype)), axis=-1)
    return (x + jnp.einsum("bts,bsd->btd", attended, v) @ params["out"]) @ params["head"]


def _embedding_init(key: jax.Array, dtype: Any) -> PyTree:
    k1, k2 = _keys(key, 2)
    return {"table": _normal(k1, (7, 3), dtype), "head": _normal(k2, (3, 4), dtype)}


def _embedding(params: PyTree, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.mean(params["table"][tokens], axis=1)) @ params["head"]


def _array_init(key: jax.Array, dtype: Any) -> PyTree:
    return _normal(key, (4, 3), dtype)


def _array(params: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params)


def _odd_tree_init(key: jax.Array, dtype: Any) -> PyTree:
    return {
        "nothing": {},
        "missing": None,
        "pair": (_normal(key, (3, 4), dtype), ()),
        "log_scale": jnp.asarray(0.3, dtype),
        "no_rows": np.zeros((0, 4), dtype),
    }


def _odd_tree(params: PyTree, x: jax.Array) -> jax.Array:
    """Empty subtrees, `None`, a leaf without entries and a scalar leaf."""
    return jnp.exp(params["log_scale"]) * jnp.sin(x @ params["pair"][0]) + jnp.sum(params["no_rows"], axis=0)


def _grid_init(key: jax.Array, dtype: Any) -> PyTree:
    k1, k2 = _keys(key, 2)
    return {"w": _normal(k1, (3, 4), dtype), "v": _normal(k2, (4, 6), dtype)}


def _grid(params: PyTree, x: jax.Array) -> jax.Array:
    """Two output axes beside the batch: (B, 2, 3)."""
    return (jnp.tanh(x @ params["w"]) @ params["v"]).reshape(x.shape[0], 2, 3)


def _dense_forms_init(key: jax.Array, dtype: Any) -> PyTree:
    keys = _keys(key, 7)
    return {
        "rows": _normal(keys[0], (5, 3), dtype),
        "minus": _normal(keys[1], (5,), dtype, 0.2),
        "block": _normal(keys[2], (5, 3), dtype),
        "plus": _normal(keys[3], (1, 5), dtype, 0.2),
        "unit": _normal(keys[4], (5, 4), dtype),
        "gain": jnp.asarray(0.7, dtype),
        "masked": _normal(keys[5], (5, 4), dtype),
        "skip": _normal(keys[6], (3, 4), dtype),
    }


def _dense_forms(params: PyTree, x: jax.Array) -> jax.Array:
    """Dense layers in unusual clothes: kernel first, subtracted bias, reshaped, summed, normalized, masked, jitted."""
    left = jnp.einsum("oi,bi->bo", params["rows"], x) - params["minus"]
    right = jax.jit(lambda y: y @ params["block"].reshape(3, 5))(x)
    hidden = jnp.tanh(left + right + params["plus"])
    unit = params["unit"] / jnp.sqrt(jnp.sum(params["unit"] * params["unit"], axis=0))
    mask = (jnp.arange(20).reshape(5, 4) % 3 > 0).astype(x.dtype)
    return params["gain"] * (hidden @ unit) + hidden @ (params["masked"] * mask) + (x[:, None] @ params["skip"])[:, 0]


def _reused_init(key: jax.Array, dtype: Any) -> PyTree:
    keys = _keys(key, 6)
    return {
        "square": _normal(keys[0], (4, 4), dtype),
        "bias": _normal(keys[1], (4,), dtype, 0.2),
        "thin": _normal(keys[2], (4, 2), dtype),
        "wide": _normal(keys[3], (2, 4), dtype),
        "vector": _normal(keys[4], (4,), dtype),
        "deep": _normal(keys[5], (2, 4, 4), dtype),
    }


def _reused(params: PyTree, x: jax.Array) -> jax.Array:
    """Weights that enter twice, through products of weights, remat, a scan over stacked layers, and as output."""
    hidden = jnp.tanh(jnp.tanh(x @ params["square"] + params["bias"]) @ params["square"].T + params["bias"])
    hidden = jax.checkpoint(lambda h, u, v: jnp.tanh(h @ (u @ v)))(hidden, params["thin"], params["wide"])
    hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, params["deep"])
    return hidden + (x @ params["vector"])[:, None] * params["vector"] + params["vector"]


@jax.custom_vjp
def _swish(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


def _swish_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    gate = jax.nn.sigmoid(x)
    return x * gate, (x, gate)


def _swish_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    x, gate = saved
    return (g * (gate + x * gate * (jnp.ones_like(gate) - gate)),)


_swish.defvjp(_swish_forward, _swish_backward)


@jax.custom_vjp
def _straight_through(x: jax.Array) -> jax.Array:
    return jnp.round(x * jnp.asarray(4.0, x.dtype)) / jnp.asarray(4.0, x.dtype)


def _straight_through_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _straight_through(x), x


def _straight_through_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g / jnp.cosh(x),)


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def _batch_norm(params: PyTree, x: jax.Array) -> jax.Array:
    hidden = x @ params[0]["w"] + params[0]["b"]
    centered = hidden - jnp.mean(hidden, axis=0)
    spread = jnp.sqrt(jnp.mean(centered * centered, axis=0) + jnp.asarray(1e-2, x.dtype))
    return jnp.tanh(centered / spread) @ params[1]["w"] + params[1]["b"]


def _reversed_batch(params: PyTree, x: jax.Array) -> jax.Array:
    """Row i answers for example B-1-i: every example alone, but not in its place."""
    return _mlp(jnp.tanh)(params, x[::-1])


def _neighbour(params: PyTree, x: jax.Array) -> jax.Array:
    out = _mlp(jnp.tanh)(params, x)
    return out + jnp.asarray(0.5, x.dtype) * jnp.roll(out, 1, axis=0)


def _batch_attention(params: PyTree, x: jax.Array) -> jax.Array:
    """Examples attend to each other."""
    hidden = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
    return jax.nn.softmax(hidden @ hidden.T, axis=-1) @ hidden @ params[1]["w"] + params[1]["b"]


def _counts_its_batch(params: PyTree, x: jax.Array) -> jax.Array:
    """Uses the batch size as a number: on one example alone it answers differently."""
    return _mlp(jnp.tanh)(params, x) * jnp.asarray(2.0 / x.shape[0], x.dtype)


_OFFSETS = np.linspace(-1.0, 1.0, 6).astype(np.float32)[:, None]


def _own_offsets(params: PyTree, x: jax.Array) -> jax.Array:
    """Adds a constant of its own to each of exactly 6 examples."""
    return _mlp(jnp.tanh)(params, x + jnp.asarray(_OFFSETS, x.dtype))


def _positions_in_batch(params: PyTree, x: jax.Array) -> jax.Array:
    """Scales each example by its place in the batch."""
    place = jnp.arange(x.shape[0], dtype=x.dtype)[:, None]
    return _mlp(jnp.tanh)(params, x * (place + jnp.ones_like(place)) / jnp.asarray(4.0, x.dtype))


def _branch_on_size(params: PyTree, x: jax.Array) -> jax.Array:
    """Works across examples for one batch size only."""
    out = _mlp(jnp.tanh)(params, x)
    return out - jnp.mean(out, axis=0) if x.shape[0] == 6 else out


def _loops_over_size(params: PyTree, x: jax.Array) -> jax.Array:
    """As many rounds of the first layer as there are examples, in a loop whose body does not show it."""
    rounds = jax.lax.fori_loop(0, x.shape[0], lambda _, h: jnp.tanh(h @ params[0]["w"] @ params[0]["w"].T), x)
    return _mlp(jnp.tanh)(params, rounds)


def _power_of_size(params: PyTree, x: jax.Array) -> jax.Array:
    """The batch size as an exponent, a static parameter of an operation."""
    return _mlp(jnp.tanh)(params, (x / jnp.asarray(2.0, x.dtype)) ** x.shape[0])


def _folded(params: PyTree, x: jax.Array) -> jax.Array:
    """Flattens (B, T, 3) with the batch fastest, as models with time first do, and back."""
    batch, time, width = x.shape
    flat = jnp.swapaxes(x, 0, 1).reshape(time * batch, width)
    out = _mlp(jnp.tanh)(params, flat)
    return jnp.swapaxes(out.reshape(time, batch, -1), 0, 1)


LINEAR = Model("linear", _linear_init, _linear, (6, 4), (6, 3))
MLP_TANH = Model("mlp_tanh", _dense_init((3, 5, 4)), _mlp(jnp.tanh), (6, 3), (6, 4))
MLP_RELU = Model("mlp_relu", _dense_init((3, 5, 4, 3)), _mlp(jax.nn.relu), (7, 3), (7, 3))
CNN = Model("cnn_stride", _cnn_init, _cnn, (5, 6, 6, 2), (5, 3))
SHARED = Model("sequence_shared", _shared_init, _shared, (5, 3, 3), (5, 3, 4))
RECURRENT = Model("recurrent_scan", _recurrent_init, _recurrent, (6, 4, 2), (6, 3))
ATTENTION = Model("attention_norm", _attention_init, _attention, (5, 4, 4), (5, 4, 3))
EMBEDDING = Model("embedding_integer", _embedding_init, _embedding, (7, 4), (7, 4), vocabulary=7)
ARRAY = Model("single_array", _array_init, _array, (6, 4), (6, 3))
ODD_TREE = Model("odd_tree", _odd_tree_init, _odd_tree, (6, 3), (6, 4))
GRID = Model("grid_outputs", _grid_init, _grid, (6, 3), (6, 2, 3))
SCALAR = Model("scalar_output", _dense_init((3, 4, 1)), _scalar(_mlp(jnp.tanh)), (7, 3), (7,))
ONE_OUTPUT = Model("one_output", _dense_init((3, 4, 1)), _mlp(jnp.tanh), (7, 3), (7, 1))
DENSE_FORMS = Model("dense_forms", _dense_forms_init, _dense_forms, (6, 3), (6, 4))
REUSED = Model("reused_weights", _reused_init, _reused, (6, 4), (6, 4))
CUSTOM_VJP = Model("custom_vjp", _dense_init((3, 5, 4)), _mlp(_swish), (6, 3), (6, 4), forward_mode=False)
STRAIGHT_THROUGH = Model(
    "straight_through",
    _dense_init((3, 5, 4)),
    _mlp(_straight_through),
    (6, 3),
    (6, 4),
    forward_mode=False,
    true_derivative=False,
)

_MLP_INIT = _dense_init((3, 5, 4))
MIXING = (
    Model("batch_norm", _MLP_INIT, _batch_norm, (6, 3), (6, 4)),
    Model("reversed_batch", _MLP_INIT, _reversed_batch, (6, 3), (6, 4)),
    Model("neighbor", _MLP_INIT, _neighbour, (6, 3), (6, 4)),
    Model("batch_attention", _MLP_INIT, _batch_attention, (6, 3), (6, 4)),
    Model("counts_its_batch", _MLP_INIT, _counts_its_batch, (6, 3), (6, 4)),
    Model("own_offsets", _MLP_INIT, _own_offsets, (6, 3), (6, 4)),
    Model("positions_in_batch", _MLP_INIT, _positions_in_batch, (6, 3), (6, 4)),
    Model("branch_on_size", _MLP_INIT, _branch_on_size, (6, 3), (6, 4)),
    Model("loops_over_size", _MLP_INIT, _loops_over_size, (6, 3), (6, 4)),
    Model("power_of_size", _MLP_INIT, _power_of_size, (6, 3), (6, 4)),
    Model("folded_time_first", _MLP_INIT, _folded, (5, 2, 3), (5, 2, 4)),
)
"""Models whose output i is not a function of example i alone, or looks like it is not."""

CLASSIFIERS = (
    LINEAR,
    MLP_TANH,
    MLP_RELU,
    CNN,
    SHARED,
    RECURRENT,
    ATTENTION,
    EMBEDDING,
    ARRAY,
    ODD_TREE,
    GRID,
    DENSE_FORMS,
    REUSED,
    CUSTOM_VJP,
    STRAIGHT_THROUGH,
)
"""Models with two or more outputs per position, for the softmax cross entropy."""

REGRESSORS = (MLP_TANH, CNN, SHARED, RECURRENT, ODD_TREE, GRID, SCALAR, ONE_OUTPUT, CUSTOM_VJP)
"""Models for the squared error."""

ALL = (*CLASSIFIERS, *MIXING, SCALAR, ONE_OUTPUT)
