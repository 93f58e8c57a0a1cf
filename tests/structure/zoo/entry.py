"""What a model of the zoo is, and the decorator that puts one there.

    @model("low rank path", (3,), dict(w=dense(3, 4), a=dense(3, 2), d=dense(2, 4)))
    def lora_outside(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"] + (x @ p["a"]) @ p["d"] * 0.5)

Each leaf of the parameters says its rule and its shape: `dense(3, 4)` is a matrix of 3 by 4 that is to be recognized as
the weights of a dense layer. A function may have several decorators: one model per shape.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.oracle.compiling import array

PyTree = Any
Predict = Callable[[Any, Any], jax.Array]
BATCH = 3
DENSE, CONVOLUTION, EMBEDDING, BIAS, SCALE = "dense", "convolution", "embedding", "bias", "scale"
TIED, EXPLICIT, NONE = "dense and embedding", "explicit rows", "no rows"
ZOO: list[Entry] = []


@dataclass(frozen=True)
class Leaf:
    """Shape of a leaf of the parameters, and the rule that it is to be recognized by."""

    rule: str
    shape: tuple[int, ...]


def dense(*shape: int) -> Leaf:
    return Leaf(DENSE, shape)


def convolution(*shape: int) -> Leaf:
    return Leaf(CONVOLUTION, shape)


def embedding(*shape: int) -> Leaf:
    return Leaf(EMBEDDING, shape)


def tied(*shape: int) -> Leaf:
    return Leaf(TIED, shape)


def bias(*shape: int) -> Leaf:
    return Leaf(BIAS, shape)


def scale(*shape: int) -> Leaf:
    return Leaf(SCALE, shape)


def explicit(*shape: int) -> Leaf:
    return Leaf(EXPLICIT, shape)


def none(*shape: int) -> Leaf:
    return Leaf(NONE, shape)


@dataclass(frozen=True, eq=False)
class Entry:
    """One model of the zoo.

    Attributes:
        name: what it is, used as the test id.
        predict: `(params, inputs) -> outputs`.
        leaves: a pytree of `Leaf`.
        inputs: shape of an example's input; with `high` of integers in [low, high).
        tolerance: relative, of float64 rows.
    """

    name: str
    predict: Predict
    leaves: PyTree
    inputs: tuple[int, ...]
    low: int = 0
    high: int = 0
    tolerance: float = 1e-10

    def __str__(self) -> str:
        return self.name

    @property
    def rules(self) -> dict[str, str]:
        """Rule per leaf, by the leaf's path."""
        return dict(zip(paths(self.leaves), (leaf.rule for leaf in jax.tree.leaves(self.leaves)), strict=True))

    def params(self, dtype: Any = jnp.float64) -> PyTree:
        """Normal parameters of moderate size."""
        rng = np.random.default_rng([0, zlib.crc32(self.name.encode())])
        return jax.tree.map(lambda leaf: array(0.6 * rng.standard_normal(leaf.shape), dtype), self.leaves)

    def batch(self, dtype: Any = jnp.float64, size: int = BATCH) -> jax.Array:
        """Normal inputs, or integers."""
        rng = np.random.default_rng([1, zlib.crc32(self.name.encode())])
        if self.high:
            return array(rng.integers(self.low, self.high, (size, *self.inputs)), jnp.int32)
        return array(rng.standard_normal((size, *self.inputs)), dtype)


def model(
    name: str, inputs: tuple[int, ...], leaves: PyTree, *, low: int = 0, high: int = 0, tolerance: float = 1e-10
) -> Callable[[Predict], Predict]:
    """Puts the function that follows into the zoo; the arguments are `Entry`'s."""

    def add(predict: Predict) -> Predict:
        ZOO.append(Entry(name, predict, leaves, inputs, low, high, tolerance))
        return predict

    return add


def labelled(params: PyTree, rules: Mapping[str, str]) -> PyTree:
    """A framework's parameters as a pytree of `Leaf`, by the rule of each path."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(Leaf(rules[path], leaf.shape) for path, leaf in zip(paths(params), leaves, strict=True))


def paths(tree: PyTree) -> list[str]:
    """A short name per leaf: the words of its path."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [".".join(re.findall(r"\w+", name)).removesuffix(".value") for name in names]


def flat(x: jax.Array) -> jax.Array:
    """(B, ...) to (B, n)."""
    return x.reshape(x.shape[0], -1)


def normalize(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """To mean zero and variance one over the last axis."""
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + eps)
