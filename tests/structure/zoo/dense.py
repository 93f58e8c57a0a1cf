"""Products with a matrix of weights, and what may stand between the leaf and the product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.structure.zoo.entry import bias, dense, explicit, model, scale


@model("mlp", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2), c=bias(2)))
@model("mlp on positions", (2, 3), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2), c=bias(2)))
def mlp(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["w"] + p["b"])
    return h @ p["v"] + p["c"]


@model("deep and narrow", (2,), [dict(w=dense(2, 2), b=bias(2))] * 8)
def deep(p: Any, x: jax.Array) -> jax.Array:
    for layer in p[:-1]:
        x = x + jax.nn.gelu(x @ layer["w"] + layer["b"])
    return x @ p[-1]["w"] + p[-1]["b"]


@model("scalar output", (3,), dict(w=dense(3), b=bias()))
def scalar_output(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


@model("tied autoencoder", (3,), dict(w=dense(3, 2), b=bias(2), c=bias(3)))
def autoencoder(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T + p["c"]


@model("gated linear unit", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(3, 4), o=dense(4, 2)))
def glu(p: Any, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ p["w"] + p["b"]) * (x @ p["v"])) @ p["o"]


@model("fused, split after", (3,), dict(w=dense(3, 6), b=bias(6)))
def fused_split_after(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
    return q * jax.nn.softmax(k) + v


@model("fused, split before", (2, 3), dict(w=dense(3, 6)))
def fused_split_before(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ w for w in jnp.split(p["w"], 3, axis=1))
    return q * jax.nn.softmax(k) + v


@model("fused, reshaped", (2, 3), dict(w=dense(3, 6), b=bias(6)))
def fused_reshaped(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.moveaxis((x @ p["w"] + p["b"]).reshape(*x.shape[:-1], 3, 2), -2, 0)
    return q * jax.nn.softmax(k) + v


@model("weight normalization", (3,), dict(w=scale(3, 4), g=scale(4), b=bias(4)))
def normalized_weights(p: Any, x: jax.Array) -> jax.Array:
    w = p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)
    return jnp.tanh(x @ w + p["b"])


@model("low rank update", (3,), dict(w=dense(3, 4), a=dense(3, 2), d=dense(2, 4), v=dense(4, 2)))
def lora(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["w"] + 0.5 * (p["a"] @ p["d"]))) @ p["v"]


@model("low rank path", (3,), dict(w=dense(3, 4), a=dense(3, 2), d=dense(2, 4)))
def lora_outside(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + (x @ p["a"]) @ p["d"] * 0.5)


MASK = np.asarray([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])


@model("masked weights", (3,), dict(w=scale(3, 4), b=bias(4), v=dense(4, 2)))
def masked(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["w"] * MASK.astype(p["w"].dtype)) + p["b"]) @ p["v"]


@model("weights masked by where", (3,), dict(w=explicit(3, 4), b=bias(4), v=dense(4, 2)))
def masked_where(p: Any, x: jax.Array) -> jax.Array:
    w = jnp.where(MASK > 0, p["w"], jnp.zeros_like(p["w"]))
    return jnp.tanh(x @ w + p["b"]) @ p["v"]


@model("triangular weights", (2, 3), dict(w=explicit(3, 3), v=explicit(3, 3)))
def triangular(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ jnp.tril(p["w"])) @ jnp.triu(p["v"], 1)


@model("scaled weights", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2), c=bias(2)))
def scaled(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ (p["w"] / np.sqrt(3.0)) + 0.1 * p["b"])
    return h @ (p["v"] * 0.5) - 2.0 * p["c"]


@model("differences", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2), c=bias(2), g=explicit(4, 2)))
def differences(p: Any, x: jax.Array) -> jax.Array:
    return p["c"] - jnp.tanh(x @ p["w"] - p["b"]) @ (jnp.sin(p["g"]) - p["v"])


@model("scaled twice", (3,), dict(w=dense(3, 3)))
@model("scaled twice on positions", (2, 3), dict(w=dense(3, 3)))
def scaled_twice(p: Any, x: jax.Array) -> jax.Array:
    """One leaf at two layer uses that scale it differently."""
    return jnp.tanh(jnp.tanh(x @ (2.0 * p["w"])) @ -p["w"])
