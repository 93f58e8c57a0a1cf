"""The op softmax_hvp: products with the Hessian of the softmax cross entropy in its logits, row by row.

    u_i = w_i (diag(p_i) - p_i p_i^T) v_i,   p_i = softmax(z_i)

The matrix is never formed: u is p (v - p.v), entry by entry, one inner product and one pass over the row. For z = (0,
0), v = (1, 0) and w = 1: p = (1/2, 1/2), p.v = 1/2, u = (1/4, -1/4).

With n elements of logits, T tangents per row, and b_z, b_v bytes per element of either:

| implementation | reads | writes | FLOPs |
|---|---|---|---|
| reference | logits three times or more, tangents twice, as XLA fuses it | 4 n T | (6 + 4 T) n + an exp per element |
| pallas | (b_z ceil(T / 4) + b_v T) n | 4 n T | the same, two exps per element for each four tangents |

The Mosaic kernel reads each row once, as long as a cluster of eight thread blocks can hold it in shared memory:
212,992 columns of float32 logits with one tangent, 442,368 of bfloat16. What is beyond is read twice (262,144 columns
of float32: 3/16 of them), most likely from the L2 cache. Probabilities are never written. Rows whose bytes are no
multiple of 16 (50,257 columns) go by plain loads, element by element, in place of the copy engine. Rows of fewer than
128 columns are the reference's: XLA makes one kernel of them already.

Precision: float32 inside, with exponents against the largest logit, so logits of any size are exact; float64 operands
are the reference's, in float64.
Batching: `jax.vmap` is exact; tangents batched alone count as more tangents of the same rows.
Partitioning: rows are independent, so inside `jax.shard_map` each device works on its own. A sharded column axis is not
served: a softmax over it needs sums across devices (`jax.lax.psum`), and the op makes none. Outside `jax.shard_map` the
reference is partitioned by XLA like any JAX code; the Mosaic kernel is not, so with several devices it is not taken.
Differentiation: the reference differentiates like any JAX code; the Mosaic kernel does not. The op is linear and
symmetric in the tangents, so it is its own transpose.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, not_faster_on_gpu, select
from curvax.kernels._operands import arrays, row_weights
from curvax.kernels.softmax_hvp import pallas, reference

SOFTMAX_HVP = Op(
    "softmax_hvp",
    (
        Variant("pallas", pallas.cannot, not_faster_on_gpu, gain="logits and tangents are read once"),
        Variant("reference"),
    ),
)
OPS = (SOFTMAX_HVP,)


def softmax_hvp(
    logits: jax.Array,
    tangents: jax.Array,
    weights: jax.Array | None = None,
    *,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """The products w_i (diag(p_i) - p_i p_i^T) v_i with p_i the softmax of row i.

    Minus infinity rules a class out: its products are exactly zero, and a row of nothing else is zero. A row of zero
    weight is exactly zero, whatever it holds. NaN, plus infinity among the logits or an infinite tangent makes its own
    row NaN and no other.

    Args:
      logits: (..., columns), floating.
      tangents: one per row, shaped like `logits`, or several per row, (T, ..., columns): these share one pass over the
        logits. Floating; may differ in dtype from `logits`.
      weights: (...), or any shape that broadcasts to the rows'; ones if `None`.
      implementation: None for the best supported one.

    Returns:
      The products, shaped like `tangents`, in the accumulation dtype: float64 if an operand is, else float32. They are
        terms of
      sums, which a narrower dtype would spoil, and a consumer that casts them fuses with nothing here anyway.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: an operand is not real, or logits or tangents are not floating.
      ValueError: shapes do not fit.

    See Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent" (2002), for the product,
    and Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), for the single pass.
    """
    logits, tangents = arrays(logits, tangents)
    rows = _check(logits, tangents)
    weights = row_weights("softmax_hvp", weights, rows)
    if select(SOFTMAX_HVP, implementation, Request.of(logits, tangents)).implementation == "pallas":
        columns, count = logits.shape[-1], math.prod(rows)
        flat = tangents.reshape(-1, count, columns)
        products = pallas.softmax_hvp(logits.reshape(count, columns), flat, weights.astype(jnp.float32).reshape(count))
        return products.reshape(tangents.shape)
    return reference.softmax_hvp(logits, tangents, weights)


def _check(logits: jax.Array, tangents: jax.Array) -> tuple[int, ...]:
    """The rows' shape; raises if the operands do not fit."""
    for name, array in (("logits", logits), ("tangents", tangents)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"softmax_hvp: the {name} are of dtype {array.dtype}: pass real floating-point numbers")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"softmax_hvp: the logits have shape {logits.shape}: give them a last axis of classes")
    if tangents.shape != logits.shape and tangents.shape[1:] != logits.shape:
        raise ValueError(
            f"softmax_hvp: the tangents have shape {tangents.shape} with logits of shape {logits.shape}: "
            f"pass {logits.shape}, or (T, *{logits.shape}) for T tangents per row"
        )
    return logits.shape[:-1]
