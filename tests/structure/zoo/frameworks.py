"""Models of Flax and Equinox, whose parameters are objects of the framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

from tests.structure.zoo.entry import BIAS, CONVOLUTION, DENSE, SCALE, TIED, flat, labelled, model


class Net(nnx.Module):
    """A convolution, a norm, and a dense layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 3, (2, 2), rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.head = nnx.Linear(27, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(flat(nnx.silu(self.norm(self.conv(x)))))


class Attention(nnx.Module):
    """A table that is also the last layer's weights, and attention between."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return self.embed.attend(self.norm(x + self.attend(x)))


def flax_model(
    name: str, inputs: tuple[int, ...], module: nnx.Module, rules: Mapping[str, str], **options: Any
) -> None:
    """Puts a module of Flax into the zoo."""
    graph, state = nnx.split(module, nnx.Param)

    @model(name, inputs, labelled(state, rules), **options)
    def predict(p: Any, x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return nnx.merge(graph, p)(x)


def equinox_model(name: str, inputs: tuple[int, ...], module: Any, rules: Mapping[str, str]) -> None:
    """Puts a module of Equinox into the zoo."""
    arrays, static = eqx.partition(module, eqx.is_inexact_array)

    @model(name, inputs, labelled(arrays, rules))
    def predict(p: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(p, static))(x)


def of_layers(rule: str, *names: str) -> dict[str, str]:
    """Rules of the kernels and biases of layers."""
    return {f"{name}.kernel": rule for name in names} | {f"{name}.bias": BIAS for name in names}


flax_model(
    "flax convolution and norm",
    (3, 3, 2),
    Net(nnx.Rngs(0)),
    of_layers(CONVOLUTION, "conv") | of_layers(DENSE, "head") | {"norm.scale": SCALE, "norm.bias": BIAS},
)

# Flax takes the statistics of norms in float32.
flax_model(
    "flax attention",
    (3,),
    Attention(nnx.Rngs(0)),
    of_layers(DENSE, *(f"attend.{name}" for name in ("key", "out", "query", "value")))
    | {"embed.embedding": TIED, "norm.scale": SCALE},
    high=5,
    tolerance=1e-6,
)

equinox_model(
    "equinox convolution",
    (2, 3, 3),
    eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 3, 2, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.AvgPool2d(2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(3, 2, key=jax.random.key(1)),
        ]
    ),
    {"layers.0.weight": CONVOLUTION, "layers.0.bias": BIAS, "layers.4.weight": DENSE, "layers.4.bias": BIAS},
)
