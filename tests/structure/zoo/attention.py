"""Attention, and other products with weights per head or expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.structure.zoo.entry import bias, dense, embedding, model, normalize, scale, tied


@model(
    "transformer",
    (3,),
    dict(
        embedding=tied(5, 4),
        position=bias(3, 4),
        gain=scale(4),
        shift=bias(4),
        q=dense(4, 2, 2),
        k=dense(4, 2, 2),
        v=dense(4, 2, 2),
        o=dense(2, 2, 4),
        up=dense(4, 5),
        up_bias=bias(5),
        down=dense(5, 4),
        down_bias=bias(4),
    ),
    high=5,
)
def transformer(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["embedding"][tokens] + p["position"][: tokens.shape[1]]
    h = normalize(x) * p["gain"] + p["shift"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    logits = jnp.einsum("bthk,bshk->bhts", q, k)
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
    x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])
    x = x + jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
    return x @ p["embedding"].T


@model("weights per head", (2, 3), dict(w=dense(2, 3, 4), b=bias(2, 4), v=dense(2, 4, 2)))
def heads(p: Any, x: jax.Array) -> jax.Array:
    """Weights per head on both sides of a batched product."""
    h = jnp.tanh(jnp.einsum("bhi,hio->bho", x, p["w"]) + p["b"])
    return jnp.einsum("bho,hoc->bc", h, p["v"])


@model("mixture of experts", (3,), dict(g=dense(3, 2), w=dense(2, 3, 4), b=bias(2, 4), v=dense(2, 4, 2)))
def experts(p: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.softmax(x @ p["g"])
    h = jax.nn.relu(jnp.einsum("bd,edh->ebh", x, p["w"]) + p["b"][:, None])
    return jnp.einsum("be,ebh,ehd->bd", gates, h, p["v"])


@model("bilinear", (3,), dict(w=dense(2, 3, 3)))
def bilinear(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("bi,kij,bj->bk", x, p["w"], jnp.tanh(x))


@model("routed experts", (3,), dict(g=dense(3, 4), w=embedding(4, 3, 2)))
def routed(p: Any, x: jax.Array) -> jax.Array:
    """The best two of four experts."""
    gates, chosen = lax.top_k(x @ p["g"], 2)
    return jnp.einsum("bk,bkd->bd", jax.nn.softmax(gates), jnp.einsum("bi,bkid->bkd", x, p["w"][chosen]))
