"""Every kind of model whose structure is recognized, tiny: what it computes, and the rule expected for each leaf.

All take a batch of examples and strict dtype promotion. Expected rules are stated, not derived: where a change of the
recognition changes one, that is either a gain to be written down here or a loss.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.oracle.compiling import array

PyTree = Any
Predict = Callable[[Any, Any], jax.Array]
BATCH = 3
DENSE, CONVOLUTION, EMBEDDING, BIAS, SCALE = "dense", "convolution", "embedding", "bias", "scale"
BOTH, EXPLICIT, NONE = "dense and embedding", "explicit rows", "no rows"


@dataclass(frozen=True, eq=False)
class Entry:
    """One model of the zoo.

    Attributes:
        name: what it is, used as the test id.
        predict: `(params, inputs) -> outputs`.
        shapes: shapes of the leaves, or a function from a generator to the parameters.
        inputs: shape of an example's input; with `high` of integers in [low, high).
        rules: rule per leaf, by the leaf's path.
        tolerance: relative, of float64 rows.
        independent: examples do not interact.
    """

    name: str
    predict: Predict
    shapes: Any
    inputs: tuple[int, ...]
    rules: Mapping[str, str]
    low: int = 0
    high: int = 0
    tolerance: float = 1e-10
    independent: bool = True

    def __str__(self) -> str:
        return self.name

    def params(self, dtype: Any = jnp.float64) -> PyTree:
        """Normal parameters of moderate size."""
        rng = np.random.default_rng([0, zlib.crc32(self.name.encode())])
        if callable(self.shapes):
            return jax.tree.map(lambda x: array(x, dtype), self.shapes(rng))
        return jax.tree.map(
            lambda shape: array(0.6 * rng.standard_normal(shape), dtype),
            self.shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def batch(self, dtype: Any = jnp.float64, size: int = BATCH) -> jax.Array:
        """Normal inputs, or integers."""
        rng = np.random.default_rng([1, zlib.crc32(self.name.encode())])
        if self.high:
            return array(rng.integers(self.low, self.high, (size, *self.inputs)), jnp.int32)
        return array(rng.standard_normal((size, *self.inputs)), dtype)


def paths(tree: PyTree) -> list[str]:
    """A short name per leaf: the words of its path."""
    found = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [".".join(re.findall(r"\w+", path)).removesuffix(".value") for path in found]


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _sum(x: jax.Array) -> jax.Array:
    """A few outputs from many entries: fixed, different weights."""
    x = _flat(x)
    return x @ jnp.asarray(np.cos(np.arange(x.shape[1] * 3.0)).reshape(x.shape[1], 3), x.dtype)


# Dense layers.


def _mlp(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["w"] + p["b"])
    return h @ p["v"] + p["c"]


def _deep(p: Any, x: jax.Array) -> jax.Array:
    for layer in p[:-1]:
        x = x + jax.nn.gelu(x @ layer["w"] + layer["b"])
    return x @ p[-1]["w"] + p[-1]["b"]


def _autoencoder(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T + p["c"]


def _glu(p: Any, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ p["w"] + p["b"]) * (x @ p["v"])) @ p["o"]


def _fused_split_after(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
    return q * jax.nn.softmax(k) + v


def _fused_split_before(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ w for w in jnp.split(p["w"], 3, axis=1))
    return q * jax.nn.softmax(k) + v


def _fused_reshaped(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.moveaxis((x @ p["w"] + p["b"]).reshape(*x.shape[:-1], 3, 2), -2, 0)
    return q * jax.nn.softmax(k) + v


def _normalized_weights(p: Any, x: jax.Array) -> jax.Array:
    w = p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)
    return jnp.tanh(x @ w + p["b"])


def _lora(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["w"] + 0.5 * (p["a"] @ p["d"]))) @ p["v"]


def _lora_outside(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + (x @ p["a"]) @ p["d"] * 0.5)


MASK = np.asarray([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])


def _masked(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["w"] * MASK.astype(p["w"].dtype)) + p["b"]) @ p["v"]


def _masked_where(p: Any, x: jax.Array) -> jax.Array:
    w = jnp.where(MASK > 0, p["w"], jnp.zeros_like(p["w"]))
    return jnp.tanh(x @ w + p["b"]) @ p["v"]


def _triangular(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ jnp.tril(p["w"])) @ jnp.triu(p["v"], 1)


def _scaled(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ (p["w"] / np.sqrt(3.0)) + 0.1 * p["b"])
    return h @ (p["v"] * 0.5) - 2.0 * p["c"]


def _differences(p: Any, x: jax.Array) -> jax.Array:
    return p["c"] - jnp.tanh(x @ p["w"] - p["b"]) @ (jnp.sin(p["g"]) - p["v"])


def _scaled_twice(p: Any, x: jax.Array) -> jax.Array:
    """One leaf at two layer uses that scale it differently."""
    return jnp.tanh(jnp.tanh(x @ (2.0 * p["w"])) @ -p["w"])


# Convolutions.


def _cnn(p: Any, x: jax.Array) -> jax.Array:
    x = lax.conv_general_dilated(x, p["k"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + p["b"]
    x = lax.conv_general_dilated(
        jnp.tanh(x),
        p["l"],
        (1, 2),
        ((1, 2), (0, 1)),
        rhs_dilation=(2, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    return _flat(jnp.tanh(x + p["c"])) @ p["w"]


def _conv(strides: Any, padding: Any, numbers: Any, **options: Any) -> Predict:
    def predict(p: Any, x: jax.Array) -> jax.Array:
        bias = p["b"].reshape(tuple(-1 if a == "C" else 1 for a in numbers[2]))
        y = lax.conv_general_dilated(x, p["k"], strides, padding, dimension_numbers=numbers, **options)
        return _sum(jnp.tanh(y + bias))

    return predict


def _transposed(p: Any, x: jax.Array) -> jax.Array:
    y = lax.conv_transpose(x, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return _sum(jnp.tanh(y + p["b"]))


def _transposed_kernel(p: Any, x: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return _sum(lax.conv_transpose(x, p["k"], (2, 1), "VALID", dimension_numbers=numbers, transpose_kernel=True))


def _pooled(kind: str) -> Predict:
    def predict(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jnp.tanh(lax.conv_general_dilated(x, p["k"], (1, 1), "VALID", dimension_numbers=numbers) + p["b"])
        window, strides = (1, 2, 2, 1), (1, 2, 1, 1)
        if kind == "max":
            y = lax.reduce_window(y, -jnp.inf, lax.max, window, strides, "SAME")
        else:
            y = lax.reduce_window(y, 0.0, lax.add, window, strides, "VALID") / 4.0
        return jnp.mean(y, (1, 2)) @ p["w"]

    return predict


# Sequences.


def _norm(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + eps)


def _transformer(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["e"][tokens] + p["pos"][: tokens.shape[1]]
    h = _norm(x) * p["g"] + p["gb"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    logits = jnp.einsum("bthk,bshk->bhts", q, k)
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
    x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])
    x = x + jax.nn.gelu(x @ p["up"] + p["ub"]) @ p["down"] + p["db"]
    return x @ p["e"].T


TRANSFORMER: dict[str, Any] = dict(e=(5, 4), pos=(3, 4), g=(4,), gb=(4,), q=(4, 2, 2), k=(4, 2, 2), v=(4, 2, 2))
TRANSFORMER |= dict(o=(2, 2, 4), up=(4, 5), ub=(5,), down=(5, 4), db=(4,))


def _cell(p: Any) -> Callable[[jax.Array, jax.Array], Any]:
    def cell(h: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(h @ p["u"] + t @ p["w"] + p["b"])
        return h, h

    return cell


def _time(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)


def _state(p: Any, x: jax.Array) -> jax.Array:
    return jnp.zeros((x.shape[0], p["u"].shape[0]), x.dtype)


def _recurrent(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(_cell(p), _state(p, x), _time(x))[0]


def _recurrent_reverse(p: Any, x: jax.Array) -> jax.Array:
    return _time(lax.scan(_cell(p), _state(p, x), _time(x), reverse=True, unroll=2)[1])


def _recurrent_carried(p: Any, x: jax.Array) -> jax.Array:
    def cell(carry: Any, t: jax.Array) -> Any:
        h, q = carry
        return (_cell(q)(h, t)[0], q), None

    return lax.scan(cell, (_state(p, x), p), _time(x))[0][0]


def _gru(p: Any, x: jax.Array) -> jax.Array:
    def cell(h: jax.Array, t: jax.Array) -> Any:
        z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([t, h], -1) @ p["zr"] + p["b"]), 2, axis=-1)
        n = jnp.tanh(t @ p["n"] + r * (h @ p["u"]))
        return (1 - z) * n + z * h, None

    return lax.scan(cell, _state(p, x), _time(x))[0]


def _stacked(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, q: (jnp.tanh(h @ q["w"] + q["b"]), None), x, p)[0]


def _stacked_remat(p: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, q: Any) -> Any:
        return h + jnp.tanh(h @ q["w"] + q["b"]) @ q["v"].T * q["g"], None

    return lax.scan(jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable), x, p)[0]


def _nested(p: Any, x: jax.Array) -> jax.Array:
    """Stacked layers, each applied twice, over time."""

    def layer(h: jax.Array, q: Any) -> Any:
        return lax.scan(lambda g, _: (jnp.tanh(g @ q["w"] + q["b"]), None), h, length=2)[0], None

    def step(h: jax.Array, t: jax.Array) -> Any:
        return lax.scan(layer, h + t @ p["in"], p["layers"])[0], None

    return lax.scan(step, jnp.zeros((x.shape[0], 3), x.dtype), _time(x))[0]


def _unrolled(p: Any, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i] + p["b"][i])
    return x


def _overlapping(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"][:3]) @ p["w"][1:].T @ p["w"][1:4:2].T


def _indexed_in_loop(p: Any, x: jax.Array) -> jax.Array:
    def body(i: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.tanh(h @ p["w"][i] + p["b"][i])

    return lax.fori_loop(0, 3, body, x)


def _dynamic_index(p: Any, x: jax.Array) -> jax.Array:
    def body(h: jax.Array, i: jax.Array) -> Any:
        return jnp.tanh(h @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), None

    return lax.scan(body, x, jnp.arange(3))[0]


def _fori(p: Any, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda _, h: h + 0.5 * jnp.tanh(h @ p["w"] + p["b"]), x)


def _neural_ode(p: Any, x: jax.Array) -> jax.Array:
    def field(y: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.tanh(y @ p["w"] + t * p["t"] + p["b"]) @ p["v"]

    def step(y: jax.Array, t: jax.Array) -> Any:
        half = y + 0.1 * field(y, t)
        return y + 0.2 * field(half, t + 0.1), None

    return lax.scan(step, x, jnp.arange(3, dtype=x.dtype) * 0.2)[0]


# Tables.


def _table(**options: Any) -> Predict:
    def predict(p: Any, tokens: jax.Array) -> jax.Array:
        rows = jnp.take(p["e"], tokens, axis=0, **options)
        # What is filled is NaN: it is none of the table's business.
        return jnp.tanh(jnp.nan_to_num(jnp.sum(rows, 1))) @ p["w"]

    return predict


def _indexed_table(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(p["e"][tokens]) @ p["w"]


def _tied(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(p["e"][tokens]) @ p["e"].T + p["b"]


def _one_hot(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(jax.nn.one_hot(tokens, 4, dtype=p["e"].dtype) @ p["e"]) @ p["w"]


def _two_tables(p: Any, tokens: jax.Array) -> jax.Array:
    segments = (tokens > 1).astype(jnp.int32)
    return _norm(p["e"][tokens] + p["s"][segments] + p["pos"]) * p["g"]


# Einsum, vmap and calls.


def _heads(p: Any, x: jax.Array) -> jax.Array:
    """Weights per head on both sides of a batched product."""
    h = jnp.tanh(jnp.einsum("bhi,hio->bho", x, p["w"]) + p["b"])
    return jnp.einsum("bho,hoc->bc", h, p["v"])


def _experts(p: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.softmax(x @ p["g"])
    h = jax.nn.relu(jnp.einsum("bd,edh->ebh", x, p["w"]) + p["b"][:, None])
    return jnp.einsum("be,ebh,ehd->bd", gates, h, p["v"])


def _bilinear(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("bi,kij,bj->bk", x, p["w"], jnp.tanh(x))


def _over_time(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda t: jnp.tanh(t @ p["w"] + p["b"]), in_axes=1, out_axes=1)(x)


def _per_example(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: jnp.dot(p["v"], jnp.tanh(p["w"] @ row + p["b"])))(x)


def _ensemble(p: Any, x: jax.Array) -> jax.Array:
    return jnp.moveaxis(jax.vmap(_mlp, (0, None))(p, x), 0, 1)


def _convolutions(p: Any, x: jax.Array) -> jax.Array:
    """An ensemble of two convolutions each, which becomes one with as many groups."""

    def one(k: jax.Array, b: jax.Array, last: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        y = jnp.tanh(lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=numbers) + b)
        return lax.conv_general_dilated(y, last, (2,), "VALID", dimension_numbers=numbers)[:, 0]

    return jnp.moveaxis(jax.vmap(one)(p["k"], p["b"], p["l"]), 0, 1)


def _scaled_table(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh((p["e"] * 3.0)[tokens]), 1) + (p["s"] / 2.0)[tokens[:, 0]]


def _jitted(p: Any, x: jax.Array) -> jax.Array:
    layer = jax.jit(lambda w, b, h: jax.nn.relu(jax.jit(jnp.matmul)(h, w) + b))
    return layer(p["v"], p["c"], layer(p["w"], p["b"], x))


def _remat(p: Any, x: jax.Array) -> jax.Array:
    save = jax.checkpoint_policies.save_only_these_names("kept")
    block = jax.checkpoint(lambda q, h: jnp.sin(checkpoint_name(h @ q["w"] + q["b"], "kept")), policy=save)
    return block(p, block(p, x)) @ p["v"]


@jax.custom_vjp
def _straight_through(x: jax.Array) -> jax.Array:
    return jnp.sign(x)


_straight_through.defvjp(lambda x: (jnp.sign(x), x), lambda x, u: (u * jnp.exp(-jnp.square(x)),))


@jax.custom_jvp
def _snake(x: jax.Array, a: jax.Array) -> jax.Array:
    return x + jnp.square(jnp.sin(a * x)) / a


@_snake.defjvp
def _snake_rule(primals: Any, tangents: Any) -> Any:
    (x, a), (dx, da) = primals, tangents
    return _snake(x, a), dx * (1 + jnp.sin(2 * a * x)) + 0.5 * da * x


# Norms and gains.


def _rms(p: Any, x: jax.Array) -> jax.Array:
    h = x @ p["w"]
    return h * lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6) * (1.0 + p["g"])


def _group_norm(p: Any, x: jax.Array) -> jax.Array:
    h = x @ p["w"]
    grouped = _norm(h.reshape(h.shape[0], 2, -1)).reshape(h.shape)
    return grouped * p["g"] + p["b"]


def _broadcast_reshaped(p: Any, x: jax.Array) -> jax.Array:
    """One gain and one bias per group of two channels."""
    h = x @ p["w"]
    return h * jnp.repeat(p["g"], 2) + jnp.broadcast_to(p["b"][:, None], (2, 2)).reshape(-1)


# A leaf that plays several parts.


def _weight_and_bias(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["w"][0]) @ p["v"]


def _scale_and_weight(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"])[..., None] * p["w"]


def _penalized(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ p["v"] + jnp.sum(jnp.square(p["w"]))


# Physics, complex numbers, control flow, dtypes.


def _network(p: Any, x: jax.Array) -> jax.Array:
    return (jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]) @ p["o"])[0]


def _pinn_reverse(p: Any, x: jax.Array) -> jax.Array:
    """u_xx - u_y by reverse over reverse mode."""

    def residual(point: jax.Array) -> jax.Array:
        gradient = jax.grad(_network, argnums=1)
        return jax.hessian(_network, argnums=1)(p, point)[0, 0] - gradient(p, point)[1]

    return jax.vmap(residual)(x)[:, None]


def _pinn_forward(p: Any, x: jax.Array) -> jax.Array:
    direction = jnp.asarray([1.0, 0.0], x.dtype)

    def along(point: jax.Array) -> jax.Array:
        return jax.jvp(lambda y: _network(p, y), (point,), (direction,))[1]

    return jax.vmap(lambda point: jax.jvp(along, (point,), (direction,))[1] + _network(p, point))(x)


def _fourier(p: Any, x: jax.Array) -> jax.Array:
    """A spectral layer: complex weights from two real leaves."""
    modes = jnp.fft.rfft(x @ p["w"], axis=-1) * lax.complex(p["re"], p["im"])
    return jnp.fft.irfft(modes, n=4, axis=-1) + p["b"]


def _fourier_features(p: Any, x: jax.Array) -> jax.Array:
    return jnp.abs(jnp.fft.fft(x @ p["w"])) @ p["v"]


def _branched(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(p["s"]) > 0, lambda: jnp.tanh(x @ p["w"]), lambda: x @ p["w"] + p["b"]) * p["s"]


def _root(p: Any, x: jax.Array) -> jax.Array:
    """A fixed point that gradients do not enter, then one step."""
    h = lax.while_loop(
        lambda c: c[0] < 3,
        lambda c: (c[0] + 1, jnp.tanh(c[1] @ lax.stop_gradient(p["w"]) + x)),
        (0, jnp.zeros_like(x)),
    )[1]
    return jnp.tanh(lax.stop_gradient(h) @ p["w"] + p["b"])


def _half_inside(p: Any, x: jax.Array) -> jax.Array:
    half = jnp.bfloat16
    h = jnp.tanh(x.astype(half) @ p["w"].astype(half) + p["b"].astype(half))
    return (h @ p["v"].astype(half)).astype(x.dtype)


def _single_inside(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x.astype(jnp.float32) @ p["w"].astype(jnp.float32) + p["b"].astype(jnp.float32))
    return (h @ p["v"].astype(jnp.float32)).astype(x.dtype)


def _integers(p: Any, counts: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.log1p(counts.astype(p["w"].dtype)) @ p["w"] + p["b"])


def _dead(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["w"] + jnp.sum(p["empty"])) * p["s"]


def _barrier(p: Any, x: jax.Array) -> jax.Array:
    w, v = lax.optimization_barrier((p["w"], p["v"]))
    return jnp.tanh(x @ jnp.copy(w)) @ v


def _outer_broadcast(p: Any, x: jax.Array) -> jax.Array:
    """A vector that is broadcast to a matrix of weights; a kernel that is repeated."""
    w = jnp.broadcast_to(p["w"], (3, 4)) * p["s"]
    return jnp.tanh(x @ w) @ jnp.tile(p["v"], (2, 1))


def _concatenated(p: Any, x: jax.Array) -> jax.Array:
    """Weights joined before one product."""
    return jnp.tanh(x @ jnp.concatenate([p["w"], p["v"]], axis=1) + jnp.concatenate([p["b"], p["c"]]))


def _stacked_list(p: Any, x: jax.Array) -> jax.Array:
    """Layers of a list, stacked and scanned."""
    return _stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *p), x)


def _padded(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.pad(x, ((0, 0), (0, 1))) @ jnp.pad(p["w"], ((1, 0), (0, 0))) + jnp.pad(p["b"], (1, 1)))


def _flipped(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.flip(x @ p["w"][::-1, ::-1], -1) + jnp.flip(p["b"]))


def _rotated(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ jnp.roll(p["w"], 1, axis=1)) @ p["v"][np.asarray([2, 0, 1])]


def _activated_bias(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) * jax.nn.softplus(p["s"]) + jax.nn.silu(p["b"])


def _causal_mean(p: Any, x: jax.Array) -> jax.Array:
    count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return (jnp.cumsum(x @ p["w"], axis=1) / count[:, None]) @ p["v"]


def _linear_recurrence(p: Any, x: jax.Array) -> jax.Array:
    """A state-space layer: an associative scan over time with learnt decay."""

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    h = x @ p["w"]
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"]), h.shape)
    return lax.associative_scan(combine, (decay, h), axis=1)[1] @ p["v"]


def _kernel_machine(p: Any, x: jax.Array) -> jax.Array:
    """Random features, then a triangular solve with learnt factors."""
    h = jnp.cos(x @ jax.random.normal(jax.random.key(0), (3, 3), x.dtype)) @ p["w"]
    factor = jnp.tril(p["l"], -1) + 2.0 * jnp.eye(3, dtype=x.dtype)
    return jax.scipy.linalg.solve_triangular(factor, h.T, lower=True).T


def _routed(p: Any, x: jax.Array) -> jax.Array:
    """The best two of four experts."""
    gates, chosen = lax.top_k(x @ p["g"], 2)
    return jnp.einsum("bk,bkd->bd", jax.nn.softmax(gates), jnp.einsum("bi,bkid->bkd", x, p["w"][chosen]))


# Frameworks.


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 3, (2, 2), rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.head = nnx.Linear(27, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(_flat(nnx.silu(self.norm(self.conv(x)))))


class _Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return self.embed.attend(self.norm(x + self.attend(x)))


def _flax(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Predict, Callable[[Any], PyTree]]:
    graph, state = nnx.split(make(nnx.Rngs(0)), nnx.Param)

    def predict(p: Any, x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return nnx.merge(graph, p)(x)

    return predict, lambda rng: jax.tree.map(lambda x: 0.6 * rng.standard_normal(x.shape), state)


def _equinox(make: Callable[[jax.Array], Any]) -> tuple[Predict, Callable[[Any], PyTree]]:
    arrays, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)

    def predict(p: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(p, static))(x)

    return predict, lambda rng: jax.tree.map(lambda x: 0.6 * rng.standard_normal(x.shape), arrays)


def _equinox_convolution(key: jax.Array) -> Any:
    one, two = jax.random.split(key)
    pool, flat = eqx.nn.AvgPool2d(2), eqx.nn.Lambda(jnp.ravel)
    return eqx.nn.Sequential(
        [eqx.nn.Conv2d(2, 3, 2, key=one), eqx.nn.Lambda(jax.nn.relu), pool, flat, eqx.nn.Linear(3, 2, key=two)]
    )


NHWC = ("NHWC", "HWIO", "NHWC")
NET, ATTENTION, EQUINOX = _flax(_Net), _flax(_Attention), _equinox(_equinox_convolution)
LAYER = (("kernel", DENSE), ("bias", BIAS))
MLP_SHAPES: dict[str, Any] = dict(w=(3, 4), b=(4,), v=(4, 2), c=(2,))
MLP_RULES = dict(w=DENSE, b=BIAS, v=DENSE, c=BIAS)
CELL: dict[str, Any] = dict(u=(4, 4), w=(3, 4), b=(4,))
CELL_RULES = dict(u=DENSE, w=DENSE, b=BIAS)
PINN: dict[str, Any] = dict(w=(2, 4), b=(4,), v=(4, 4), c=(4,), o=(4, 1))
PINN_RULES = dict(w=DENSE, b=BIAS, v=DENSE, c=BIAS, o=DENSE)


def _lookup(name: str, predict: Predict) -> Entry:
    """A table whose indices run out of range on either side."""
    return Entry(name, predict, dict(e=(4, 3), w=(3, 2)), (4,), dict(e=EMBEDDING, w=DENSE), low=-6, high=7)


ZOO = (
    Entry("mlp", _mlp, MLP_SHAPES, (3,), MLP_RULES),
    Entry("mlp on positions", _mlp, MLP_SHAPES, (2, 3), MLP_RULES),
    Entry(
        "deep and narrow",
        _deep,
        [dict(w=(2, 2), b=(2,))] * 8,
        (2,),
        {f"{i}.{k}": rule for i in range(8) for k, rule in (("w", DENSE), ("b", BIAS))},
    ),
    Entry("scalar output", lambda p, x: x @ p["w"] + p["b"], dict(w=(3,), b=()), (3,), dict(w=DENSE, b=BIAS)),
    Entry("tied autoencoder", _autoencoder, dict(w=(3, 2), b=(2,), c=(3,)), (3,), dict(w=DENSE, b=BIAS, c=BIAS)),
    Entry(
        "gated linear unit",
        _glu,
        dict(w=(3, 4), b=(4,), v=(3, 4), o=(4, 2)),
        (3,),
        dict(w=DENSE, b=BIAS, v=DENSE, o=DENSE),
    ),
    Entry("fused, split after", _fused_split_after, dict(w=(3, 6), b=(6,)), (3,), dict(w=DENSE, b=BIAS)),
    Entry("fused, split before", _fused_split_before, dict(w=(3, 6)), (2, 3), dict(w=DENSE)),
    Entry("fused, reshaped", _fused_reshaped, dict(w=(3, 6), b=(6,)), (2, 3), dict(w=DENSE, b=BIAS)),
    Entry(
        "weight normalization",
        _normalized_weights,
        dict(w=(3, 4), g=(4,), b=(4,)),
        (3,),
        dict(w=SCALE, g=SCALE, b=BIAS),
    ),
    Entry(
        "low rank update",
        _lora,
        dict(w=(3, 4), a=(3, 2), d=(2, 4), v=(4, 2)),
        (3,),
        dict(w=DENSE, a=DENSE, d=DENSE, v=DENSE),
    ),
    Entry("low rank path", _lora_outside, dict(w=(3, 4), a=(3, 2), d=(2, 4)), (3,), dict(w=DENSE, a=DENSE, d=DENSE)),
    Entry("masked weights", _masked, dict(w=(3, 4), b=(4,), v=(4, 2)), (3,), dict(w=SCALE, b=BIAS, v=DENSE)),
    Entry(
        "weights masked by where",
        _masked_where,
        dict(w=(3, 4), b=(4,), v=(4, 2)),
        (3,),
        dict(w=EXPLICIT, b=BIAS, v=DENSE),
    ),
    Entry("triangular weights", _triangular, dict(w=(3, 3), v=(3, 3)), (2, 3), dict(w=EXPLICIT, v=EXPLICIT)),
    Entry("scaled weights", _scaled, MLP_SHAPES, (3,), MLP_RULES),
    Entry(
        "differences",
        _differences,
        MLP_SHAPES | dict(g=(4, 2)),
        (3,),
        MLP_RULES | dict(g=EXPLICIT),
    ),
    Entry("scaled twice", _scaled_twice, dict(w=(3, 3)), (3,), dict(w=DENSE)),
    Entry("scaled twice on positions", _scaled_twice, dict(w=(3, 3)), (2, 3), dict(w=DENSE)),
    Entry(
        "strides, dilation, groups",
        _cnn,
        dict(k=(2, 2, 2, 4), b=(4,), l=(2, 1, 2, 4), c=(4,), w=(32, 2)),
        (5, 3, 2),
        dict(k=CONVOLUTION, b=BIAS, l=CONVOLUTION, c=BIAS, w=DENSE),
    ),
    Entry(
        "depthwise convolution",
        _conv((1, 1), "SAME", NHWC, feature_group_count=3),
        dict(k=(2, 2, 1, 6), b=(6,)),
        (3, 3, 3),
        dict(k=CONVOLUTION, b=BIAS),
    ),
    Entry("transposed convolution", _transposed, dict(k=(3, 2, 2, 3), b=(3,)), (2, 3, 2), dict(k=CONVOLUTION, b=BIAS)),
    Entry("transposed kernel", _transposed_kernel, dict(k=(3, 2, 3, 2)), (2, 3, 2), dict(k=CONVOLUTION)),
    Entry(
        "convolution over time",
        _conv((2,), "VALID", ("NWC", "WIO", "NWC"), rhs_dilation=(2,)),
        dict(k=(2, 2, 3), b=(3,)),
        (6, 2),
        dict(k=CONVOLUTION, b=BIAS),
    ),
    Entry(
        "causal convolution, channels first",
        _conv((1,), [(2, 0)], ("NCW", "OIW", "NCW")),
        dict(k=(3, 2, 3), b=(3,)),
        (2, 4),
        dict(k=CONVOLUTION, b=BIAS),
    ),
    Entry(
        "convolution in three dimensions",
        _conv((1, 2, 1), "SAME", ("NDHWC", "DHWIO", "NDHWC")),
        dict(k=(2, 1, 2, 1, 2), b=(2,)),
        (2, 3, 2, 1),
        dict(k=CONVOLUTION, b=BIAS),
    ),
    Entry(
        "channels first, negative padding",
        _conv((1, 1), ((1, -1), (0, 1)), ("NCHW", "OIHW", "NCHW")),
        dict(k=(3, 2, 2, 2), b=(3,)),
        (2, 4, 3),
        dict(k=CONVOLUTION, b=BIAS),
    ),
    Entry(
        "max pooling",
        _pooled("max"),
        dict(k=(2, 2, 2, 3), b=(3,), w=(3, 2)),
        (4, 4, 2),
        dict(k=CONVOLUTION, b=BIAS, w=DENSE),
    ),
    Entry(
        "average pooling",
        _pooled("mean"),
        dict(k=(2, 2, 2, 3), b=(3,), w=(3, 2)),
        (4, 4, 2),
        dict(k=CONVOLUTION, b=BIAS, w=DENSE),
    ),
    Entry(
        "transformer",
        _transformer,
        TRANSFORMER,
        (3,),
        dict(e=BOTH, pos=BIAS, g=SCALE, gb=BIAS, ub=BIAS, db=BIAS)
        | dict.fromkeys(("q", "k", "v", "o", "up", "down"), DENSE),
        high=5,
    ),
    Entry("recurrent", _recurrent, CELL, (3, 3), CELL_RULES),
    Entry("recurrent, reverse", _recurrent_reverse, CELL, (3, 3), CELL_RULES),
    Entry("recurrent, weights carried", _recurrent_carried, CELL, (3, 3), CELL_RULES),
    Entry(
        "gated recurrent unit",
        _gru,
        dict(zr=(5, 4), b=(4,), n=(3, 2), u=(2, 2)),
        (3, 3),
        dict(zr=DENSE, b=BIAS, n=DENSE, u=DENSE),
    ),
    Entry("stacked layers", _stacked, dict(w=(3, 4, 4), b=(3, 4)), (4,), dict(w=DENSE, b=BIAS)),
    Entry("stacked layers on positions", _stacked, dict(w=(3, 4, 4), b=(3, 4)), (2, 4), dict(w=DENSE, b=BIAS)),
    Entry(
        "stacked layers, rematerialized",
        _stacked_remat,
        dict(w=(3, 3, 4), b=(3, 4), v=(3, 3, 4), g=(3, 3)),
        (2, 3),
        dict(w=DENSE, b=BIAS, v=DENSE, g=SCALE),
    ),
    Entry(
        "layers of a list, stacked",
        _stacked_list,
        [dict(w=(3, 3), b=(3,))] * 2,
        (3,),
        dict.fromkeys(("0.w", "0.b", "1.w", "1.b"), EXPLICIT),
    ),
    Entry(
        "nested scans",
        _nested,
        {"in": (2, 3), "layers": dict(w=(2, 3, 3), b=(2, 3))},
        (2, 2),
        {"in": DENSE, "layers.w": DENSE, "layers.b": BIAS},
    ),
    Entry("unrolled layers", _unrolled, dict(w=(3, 3, 3), b=(3, 3)), (3,), dict(w=DENSE, b=BIAS)),
    Entry("overlapping slices", _overlapping, dict(w=(4, 3)), (3,), dict(w=DENSE)),
    Entry(
        "layers indexed in a loop", _indexed_in_loop, dict(w=(3, 3, 3), b=(3, 3)), (3,), dict(w=EXPLICIT, b=EXPLICIT)
    ),
    Entry("dynamic index of layers", _dynamic_index, dict(w=(3, 3, 3)), (3,), dict(w=EXPLICIT)),
    Entry("fori_loop", _fori, dict(w=(3, 3), b=(3,)), (3,), dict(w=DENSE, b=BIAS)),
    Entry(
        "neural differential equation",
        _neural_ode,
        dict(w=(2, 4), t=(4,), b=(4,), v=(4, 2)),
        (2,),
        dict(w=DENSE, t=SCALE, b=BIAS, v=DENSE),
    ),
    Entry("table", _indexed_table, dict(e=(4, 3), w=(3, 2)), (2,), dict(e=EMBEDDING, w=DENSE), high=4),
    _lookup("table, indices out of range", _indexed_table),
    _lookup("table, filled", _table(mode="fill")),
    _lookup("table, filled with zero", _table(mode="fill", fill_value=0)),
    _lookup("table, clipped", _table(mode="clip")),
    _lookup("table, wrapped", _table(mode="wrap")),
    Entry("tied table", _tied, dict(e=(4, 3), b=(4,)), (2,), dict(e=BOTH, b=BIAS), high=4),
    Entry("one-hot table", _one_hot, dict(e=(4, 3), w=(3, 2)), (2,), dict(e=DENSE, w=DENSE), high=4),
    Entry(
        "two tables",
        _two_tables,
        dict(e=(4, 3), s=(2, 3), pos=(2, 3), g=(3,)),
        (2,),
        dict(e=EMBEDDING, s=EMBEDDING, pos=BIAS, g=SCALE),
        high=4,
    ),
    Entry("weights per head", _heads, dict(w=(2, 3, 4), b=(2, 4), v=(2, 4, 2)), (2, 3), dict(w=DENSE, b=BIAS, v=DENSE)),
    Entry(
        "mixture of experts",
        _experts,
        dict(g=(3, 2), w=(2, 3, 4), b=(2, 4), v=(2, 4, 2)),
        (3,),
        dict(g=DENSE, w=DENSE, b=BIAS, v=DENSE),
    ),
    Entry("bilinear", _bilinear, dict(w=(2, 3, 3)), (3,), dict(w=DENSE)),
    Entry("vmap over time", _over_time, dict(w=(3, 2), b=(2,)), (2, 3), dict(w=DENSE, b=BIAS)),
    Entry("vmap over examples", _per_example, dict(w=(4, 3), b=(4,), v=(2, 4)), (3,), dict(w=DENSE, b=BIAS, v=DENSE)),
    Entry("ensemble", _ensemble, dict(w=(2, 3, 4), b=(2, 4), v=(2, 4, 2), c=(2, 2)), (3,), MLP_RULES),
    Entry(
        "ensemble of convolutions",
        _convolutions,
        dict(k=(2, 3, 2, 3), b=(2, 3), l=(2, 2, 3, 2)),
        (3, 2),
        dict(k=CONVOLUTION, b=BIAS, l=CONVOLUTION),
    ),
    Entry("scaled tables", _scaled_table, dict(e=(4, 3), s=(4, 3)), (3,), dict(e=EMBEDDING, s=EMBEDDING), high=4),
    Entry("inner jit", _jitted, MLP_SHAPES, (3,), MLP_RULES),
    Entry("rematerialized", _remat, dict(w=(3, 3), b=(3,), v=(3, 2)), (3,), dict(w=DENSE, b=BIAS, v=DENSE)),
    Entry(
        "custom_vjp",
        lambda p, x: _straight_through(x @ p["w"] + p["b"]) @ p["v"],
        dict(w=(3, 4), b=(4,), v=(4, 2)),
        (3,),
        dict(w=DENSE, b=BIAS, v=DENSE),
    ),
    Entry(
        "custom_jvp of a parameter",
        lambda p, x: _snake(x @ p["w"] + p["b"], p["a"]) @ p["v"],
        dict(w=(3, 4), b=(4,), a=(), v=(4, 2)),
        (3,),
        dict(w=DENSE, b=BIAS, a=EXPLICIT, v=DENSE),
    ),
    Entry("rms norm", _rms, dict(w=(3, 4), g=(4,)), (2, 3), dict(w=DENSE, g=SCALE)),
    Entry("group norm", _group_norm, dict(w=(3, 4), g=(4,), b=(4,)), (3,), dict(w=DENSE, g=SCALE, b=BIAS)),
    Entry(
        "broadcast, then reshaped",
        _broadcast_reshaped,
        dict(w=(3, 4), g=(2,), b=(2,)),
        (3,),
        dict(w=DENSE, g=EXPLICIT, b=EXPLICIT),
    ),
    Entry("weight and bias", _weight_and_bias, dict(w=(3, 4), v=(4, 2)), (3,), dict(w=EXPLICIT, v=DENSE)),
    Entry("scale and weight", _scale_and_weight, dict(w=(3,)), (2, 3), dict(w=EXPLICIT)),
    Entry("penalized", _penalized, dict(w=(3, 4), v=(4, 2)), (3,), dict(w=EXPLICIT, v=DENSE)),
    Entry("residual by grad", _pinn_reverse, PINN, (2,), PINN_RULES),
    Entry("residual by jvp", _pinn_forward, PINN, (2,), PINN_RULES),
    Entry(
        "spectral layer",
        _fourier,
        dict(w=(3, 4), re=(3,), im=(3,), b=(4,)),
        (3,),
        dict(w=DENSE, re=EXPLICIT, im=EXPLICIT, b=BIAS),
    ),
    Entry("magnitudes of a spectrum", _fourier_features, dict(w=(3, 4), v=(4, 2)), (3,), dict(w=DENSE, v=DENSE)),
    Entry("cond", _branched, dict(w=(3, 2), b=(2,), s=()), (3,), dict(w=EXPLICIT, b=EXPLICIT, s=SCALE)),
    Entry("while loop", _root, dict(w=(3, 3), b=(3,)), (3,), dict(w=DENSE, b=BIAS)),
    Entry(
        "bfloat16 inside",
        _half_inside,
        dict(w=(3, 4), b=(4,), v=(4, 2)),
        (3,),
        dict(w=DENSE, b=BIAS, v=DENSE),
        tolerance=2e-2,
    ),
    Entry(
        "float32 inside",
        _single_inside,
        dict(w=(3, 4), b=(4,), v=(4, 2)),
        (3,),
        dict(w=DENSE, b=BIAS, v=DENSE),
        tolerance=1e-6,
    ),
    Entry("integer inputs", _integers, dict(w=(3, 2), b=(2,)), (3,), dict(w=DENSE, b=BIAS), high=9),
    Entry(
        "dead, empty and scalar leaves",
        _dead,
        dict(w=(3, 2), dead=(7,), empty=(0, 2), s=()),
        (3,),
        dict(w=DENSE, dead=NONE, empty=NONE, s=SCALE),
    ),
    Entry("copies and barriers", _barrier, dict(w=(3, 4), v=(4, 2)), (3,), dict(w=DENSE, v=DENSE)),
    Entry(
        "weights broadcast",
        _outer_broadcast,
        dict(w=(4,), s=(), v=(2, 2)),
        (3,),
        dict(w=SCALE, s=SCALE, v=EXPLICIT),
    ),
    Entry(
        "weights joined",
        _concatenated,
        dict(w=(3, 2), v=(3, 2), b=(2,), c=(2,)),
        (2, 3),
        dict.fromkeys("wvbc", EXPLICIT),
    ),
    Entry("weights padded", _padded, dict(w=(3, 4), b=(2,)), (3,), dict(w=EXPLICIT, b=EXPLICIT)),
    Entry("weights reversed", _flipped, dict(w=(3, 4), b=(4,)), (3,), dict(w=DENSE, b=BIAS)),
    Entry("weights rolled and permuted", _rotated, dict(w=(3, 3), v=(3, 2)), (3,), dict(w=EXPLICIT, v=EMBEDDING)),
    Entry(
        "bias through an activation",
        _activated_bias,
        dict(w=(3, 2), s=(), b=(2,)),
        (3,),
        dict(w=DENSE, s=EXPLICIT, b=EXPLICIT),
    ),
    Entry("running mean over time", _causal_mean, dict(w=(3, 4), v=(4, 2)), (3, 3), dict(w=DENSE, v=DENSE)),
    Entry(
        "linear recurrence",
        _linear_recurrence,
        dict(w=(3, 4), a=(4,), v=(4, 2)),
        (4, 3),
        dict(w=DENSE, a=EXPLICIT, v=DENSE),
    ),
    Entry("random features and a solve", _kernel_machine, dict(w=(3, 3), l=(3, 3)), (3,), dict(w=DENSE, l=EXPLICIT)),
    Entry("routed experts", _routed, dict(g=(3, 4), w=(4, 3, 2)), (3,), dict(g=DENSE, w=EMBEDDING)),
    Entry(
        "flax convolution and norm",
        NET[0],
        NET[1],
        (3, 3, 2),
        {
            "conv.kernel": CONVOLUTION,
            "conv.bias": BIAS,
            "norm.scale": SCALE,
            "norm.bias": BIAS,
            "head.kernel": DENSE,
            "head.bias": BIAS,
        },
    ),
    # Flax takes the statistics of norms in float32.
    Entry(
        "flax attention",
        ATTENTION[0],
        ATTENTION[1],
        (3,),
        {f"attend.{name}.{leaf}": rule for name in ("key", "out", "query", "value") for leaf, rule in LAYER}
        | {"embed.embedding": BOTH, "norm.scale": SCALE},
        high=5,
        tolerance=1e-6,
    ),
    Entry(
        "equinox convolution",
        EQUINOX[0],
        EQUINOX[1],
        (2, 3, 3),
        {"layers.0.weight": CONVOLUTION, "layers.0.bias": BIAS, "layers.4.weight": DENSE, "layers.4.bias": BIAS},
    ),
)
