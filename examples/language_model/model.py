"""A decoder-only transformer in plain JAX: parameters are a dictionary, layers a list, so blocks are easy to name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """A configuration.

    Attributes:
      width, layers, heads: of the transformer; the MLP is four times as wide.
      length: tokens of one sequence.
      vocabulary: 256 for bytes; 32,000, the paper's, at 45M, where bytes use the first 256 and the rest costs the same.
    """

    width: int
    layers: int
    heads: int
    length: int
    vocabulary: int = 256


SIZES = {
    "tiny": Size(32, 2, 2, 32),
    "0.3M": Size(80, 3, 4, 64),
    "1M": Size(128, 5, 4, 128),
    "45M": Size(512, 4, 8, 1024, 32_000),
}
# Up to so many classes logits are no larger than what the layers keep.
_FEW = 4096
OUTER = ("embed", "head")  # the entries whose matrices are not hidden layers


def init(key: jax.Array, size: Size) -> Params:
    """Normal weights of variance 1 / fan-in; those that write into the residual stream shrink with its depth."""
    width = size.width
    keys = iter(jax.random.split(key, 3 + 4 * size.layers))

    def normal(*shape: int, scale: float) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape)

    into, deep = width**-0.5, (2 * size.layers) ** -0.5

    def layer() -> Params:
        return {
            "attention_norm": jnp.ones(width),
            "qkv": normal(width, 3 * width, scale=into),
            "out": normal(width, width, scale=into * deep),
            "mlp_norm": jnp.ones(width),
            "up": normal(width, 4 * width, scale=into),
            "down": normal(4 * width, width, scale=0.5 * into * deep),
        }

    embed = {"tokens": normal(size.vocabulary, width, scale=0.1), "positions": normal(size.length, width, scale=0.1)}
    layers = [layer() for _ in range(size.layers)]
    return {
        "embed": embed,
        "layers": layers,
        "head": {"norm": jnp.ones(width), "w": normal(width, size.vocabulary, scale=into)},
    }


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """RMS norm, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype) * gain


def _attention(layer: Params, x: jax.Array, heads: int) -> jax.Array:
    batch, length, width = x.shape
    q, k, v = jnp.split((x @ layer["qkv"]).reshape(batch, length, heads, 3 * (width // heads)), 3, axis=-1)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * (width // heads) ** -0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width) @ layer["out"]


def hidden(params: Params, tokens: jax.Array, heads: int = 4) -> jax.Array:
    """Tokens (B, T) -> hidden states (B, T, width), of which `head` makes logits."""
    x = params["embed"]["tokens"][tokens] + params["embed"]["positions"][: tokens.shape[1]]
    for layer in params["layers"]:
        x = x + _attention(layer, _norm(x, layer["attention_norm"]), heads)
        x = x + jax.nn.gelu(_norm(x, layer["mlp_norm"]) @ layer["up"]) @ layer["down"]
    return _norm(x, params["head"]["norm"])


def head(params: Params) -> jax.Array:
    """The matrix (width, vocabulary) of the output."""
    return params["head"]["w"]


def predict(params: Params, tokens: jax.Array, heads: int = 4) -> jax.Array:
    """Tokens (B, T) -> logits (B, T, vocabulary)."""
    return hidden(params, tokens, heads) @ head(params)


def outputs(size: Size) -> dict[str, Callable[..., jax.Array]]:
    """The model as keywords of `full_gn` and `layerwise_gn`: `predict_fn`, and `head` where the logits are many."""
    if size.vocabulary <= _FEW:
        return {"predict_fn": functools.partial(predict, heads=size.heads)}
    return {"predict_fn": functools.partial(hidden, heads=size.heads), "head": head}


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
