"""The whole matrix of several layers, made layer by layer by whatever adds one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels.gram_accumulate.factors import BlockRows, Rows

Accumulate: TypeAlias = Callable[[jax.Array, Rows], jax.Array]


def layer_by_layer(layers: Sequence[BlockRows], dtype: np.dtype, accumulate: Accumulate) -> jax.Array:
    """The symmetric matrix; `accumulate` adds the lower triangle of some rows."""
    gram = jnp.zeros((layers[0].total, layers[0].total), dtype)

    def add(gram: jax.Array, rows: Rows) -> tuple[jax.Array, None]:
        return accumulate(gram, rows), None

    for layer in layers:
        one = layer.cotangents.shape[1] == 1
        gram, _ = add(gram, layer.first) if one else jax.lax.scan(add, gram, layer.by_block())
    return mirror(gram)


def mirror(lower: jax.Array) -> jax.Array:
    """The symmetric matrix whose lower triangle is that of `lower`."""
    return jnp.tril(lower) + jnp.tril(lower, -1).T
