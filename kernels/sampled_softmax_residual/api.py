"""The op sampled_softmax_residual: w (p - e_k) per row, with p the softmax of the row and the label k drawn from p.

Its expected outer product, at sqrt(w) in the place of w, is w (diag p - p p^T), the matrix of `softmax_hvp`: what the
Gauss-Newton-Bartlett estimator and the Monte Carlo Fisher pull back. The label is drawn by inverting the distribution
function at one uniform number per row:

    p           0.2    0.5            0.3
    sums     0 ----|--------------|--------- 1
    u = 0.6              ^                      label 1, the first whose sum exceeds u; residual w (0.2, -0.5, 0.3)

With n elements of logits of b bytes:

| implementation | reads | writes | FLOPs |
|---|---|---|---|
| reference | logits three times or more, running sums written and read | 4 n, and labels | 8 n, an exp per element |
| pallas | b n, once (see `softmax_hvp` for how long a row may be) | 4 n, and labels | 9 n, three exps per element |

Precision: float32 inside, float64 for such logits. The implementations draw the same label unless the share u of the
total falls within rounding of a boundary between two classes. A float32 uniform number has 2^24 values at most, so a
class's chance is met to 6e-8: enough for classes of probability above 1e-6.
Batching: `jax.vmap` is exact and makes more rows.
Partitioning: as `softmax_hvp`: rows are independent, a sharded column axis is not served.
Differentiation: none is meant; a label has no derivative.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select, timed_on_hopper
from curvax.kernels._operands import arrays, row_weights
from curvax.kernels.sampled_softmax_residual import pallas, reference

SAMPLED_SOFTMAX_RESIDUAL = Op(
    "sampled_softmax_residual",
    (
        Variant("pallas", pallas.cannot, timed_on_hopper, gain="logits are read once, running sums are not stored"),
        Variant("reference"),
    ),
)
OPS = (SAMPLED_SOFTMAX_RESIDUAL,)


def sampled_softmax_residual(
    logits: jax.Array,
    uniforms: jax.Array,
    weights: jax.Array | None = None,
    *,
    implementation: Implementation | Choice | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The residuals w (p - e_k) at labels k drawn from p, and the labels.

        uniforms = jax.random.uniform(key, logits.shape[:-1])

    Minus infinity rules a class out: it is never drawn. A row of zero weight, or without a class, has residual zero and
    label 0; NaN or plus infinity among the logits makes its own row NaN, with label 0.

    Args:
      logits: (..., columns), floating.
      uniforms: (...), in [0, 1), floating.
      weights: (...), or any shape that broadcasts to the rows'; ones if `None`.
      implementation: None for the best supported one.

    Returns:
      Residuals shaped like `logits` in the accumulation dtype (float64 for float64 logits, else float32), and int32
      labels.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError, ValueError: operands that do not fit.
    """
    logits, uniforms = arrays(logits, uniforms)
    rows = _check(logits, uniforms)
    weights = row_weights("sampled_softmax_residual", weights, rows)
    if select(SAMPLED_SOFTMAX_RESIDUAL, implementation, Request.of(logits)).implementation == "pallas":
        count = math.prod(rows)
        flat = (x.astype(jnp.float32).reshape(count) for x in (uniforms, weights))
        residual, label = pallas.sampled_softmax_residual(logits.reshape(count, logits.shape[-1]), *flat)
        return residual.reshape(logits.shape), label.reshape(rows)
    return reference.sampled_softmax_residual(logits, uniforms, weights)


def _check(logits: jax.Array, uniforms: jax.Array) -> tuple[int, ...]:
    """The rows' shape; raises if the operands do not fit."""
    op = "sampled_softmax_residual"
    for name, array in (("logits", logits), ("uniforms", uniforms)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{op}: the {name} are of dtype {array.dtype}: pass real floating-point numbers")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: the logits have shape {logits.shape}: give them a last axis of classes")
    if uniforms.shape != logits.shape[:-1]:
        raise ValueError(f"{op}: the uniforms have shape {uniforms.shape}: pass one per row, {logits.shape[:-1]}")
    return logits.shape[:-1]
