"""linear_softmax_hvp with the Mosaic kernel of softmax_hvp between the matmuls of each block of rows.

Where even a few rows are too many at once the columns are cut too, and that form has no use for the kernel.
"""

from __future__ import annotations

from typing import Any

import jax

from curvax.kernels.linear_softmax_hvp import reference
from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Head, LogitBlocks, Tangent
from curvax.kernels.softmax_hvp import pallas as softmax


def linear_softmax_hvp(
    at: Head,
    tangent: Tangent,
    weights: jax.Array,
    blocks: LogitBlocks,
    precision: jax.lax.PrecisionLike,
    *,
    interpret: Any = None,
) -> Cotangents:
    """See `reference.linear_softmax_hvp`."""

    def product(logits: jax.Array, tangents: jax.Array, weights: jax.Array) -> jax.Array:
        return softmax.softmax_hvp(logits, tangents[None], weights, interpret=interpret)[0]

    return reference.linear_softmax_hvp(at, tangent, weights, blocks, precision, product)
