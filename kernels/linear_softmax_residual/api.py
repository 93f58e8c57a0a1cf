"""The op linear_softmax_residual: softmax cross entropy and its gradient through the last matmul of a language model.

With logits Z = H W + b, H (N, D) and W (D, C), labels k, row weights w and a one-hot row y_i (smoothed: y = (1 - e)
one_hot + e / classes on the classes that are not ruled out),

    L = sum_i w_i (logsumexp(z_i) - y_i . z_i),   u_i = w_i (p_i - y_i),   gradient (u W^T, H^T u, sum_i u_i).

With a tangent (dH, dW, db), whose tangent of the logits is V = dH W + H dW + db, it is one of the two inner problems
of a Gauss-Newton step, as a function of the tangent:

    linearized    L(Z + V),                   u_i = w_i (softmax(z_i + v_i) - y_i)
    quadratic     L(Z) + g.V + V.(H V) / 2,   u_i = w_i (p_i - y_i + (diag(p_i) - p_i p_i^T) v_i)

As in `linear_softmax_hvp`, and by the same loop, the (N, C) arrays are made and used up block by block of rows, within
`max_bytes`. With B rows per block:

| form | FLOPs | alive beside operands and results | head read |
|---|---|---|---|
| loss alone | 2 N D C | `max_bytes` | ceil(N / B) times |
| gradient | 6 N D C | `max_bytes`, and one (D, C) product before it is added | twice that |
| gradient at a tangent | 10 N D C, less 4 for a part held fixed | the same | three times |

Columns are cut, and logits and tangents made twice, only where 16 rows are more than `max_bytes`.

Precision, batching, partitioning: as `linear_softmax_hvp`; inside `jax.shard_map` the loss too is a sum to be added up.
Differentiation: none is meant; the op is itself a derivative.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvax.kernels._dispatch import Choice, Implementation, Op, Variant, select
from curvax.kernels._operands import arrays
from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Tangent
from curvax.kernels.linear_softmax_hvp.loop import Rows, Wanted
from curvax.kernels.linear_softmax_hvp.operands import MAX_BYTES, Operands
from curvax.kernels.linear_softmax_residual import reference

LINEAR_SOFTMAX_RESIDUAL = Op("linear_softmax_residual", (Variant("reference"),))
OPS = (LINEAR_SOFTMAX_RESIDUAL,)


def linear_softmax_residual(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    tangent: Tangent | None = None,
    quadratic: bool = False,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    max_bytes: int = MAX_BYTES,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | Choice | None = None,
) -> tuple[jax.Array, Cotangents]:
    """The weighted softmax cross entropy of logits = hidden @ head + bias, and its gradient.

    A row of zero weight contributes exactly zero whatever its hidden state, tangent and label hold. A label outside
    0 .. columns - 1 at another weight makes loss and gradient NaN. Minus infinity in the bias rules a class out.

    Args:
      hidden: (..., features), floating: what the head is applied to.
      head: (features, columns), in the dtype of `hidden`.
      labels: (...), integer.
      bias: (columns,), likewise.
      tangent: moves of hidden, head and bias, each like what it moves; the gradient is then that in the tangent, of the
        parts that it has: the others are held fixed, and their cotangents None. `None` takes the gradient of all parts
        without a move.
      quadratic: with a tangent, the quadratic model of the loss in place of the loss of linearized logits.
      weights: (...), or what broadcasts to it: effective weights of the rows (`Loss.effective_weights`); ones if None.
      label_smoothing: share of a label's mass that goes evenly to all classes; as in `SoftmaxCrossEntropy`.
      max_bytes: for logits and what is made of them; 256 MiB as in `linear_softmax_hvp`.
      precision: of the matmuls, as in `jax.lax.dot_general`; JAX's own default if `None`.
      implementation: None for the best supported one.

    Returns:
      (loss, `Cotangents` of hidden, head and bias), in the accumulation dtype: float64 for such operands, else
      float32. The loss is that of the linearized logits, with `quadratic` that of the logits themselves.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError, ValueError: operands that do not fit, a tangent without parts, or a `max_bytes` below 1.
    """
    if quadratic and tangent is None:
        raise ValueError("linear_softmax_residual: a quadratic model is one of a tangent: pass it, or quadratic=False")
    if tangent is not None and not any(part is not None for part in tangent):
        raise ValueError("linear_softmax_residual: the tangent holds everything fixed: give it a part, or pass None")
    operands, rows = _operands("linear_softmax_residual", hidden, head, labels, bias, weights, max_bytes)
    direction = None if tangent is None else operands.tangent(tangent)
    parts = operands.at if direction is None else direction
    if operands.rows == 0:
        return jnp.zeros((), operands.weight.dtype), operands.zero(parts)
    select(LINEAR_SOFTMAX_RESIDUAL, implementation, operands.request())
    rule = reference.Residual(label_smoothing, linearized=not quadratic)
    loss, cotangents = reference.run(operands.at, direction, rows, operands.blocks, precision, rule, Wanted.of(parts))
    return loss, operands.shaped(cotangents)


def linear_softmax_loss(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    max_bytes: int = MAX_BYTES,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """The loss alone, by the op linear_softmax_residual; arguments and errors as for that."""
    operands, rows = _operands("linear_softmax_residual", hidden, head, labels, bias, weights, max_bytes)
    if operands.rows == 0:
        return jnp.zeros((), operands.weight.dtype)
    select(LINEAR_SOFTMAX_RESIDUAL, implementation, operands.request())
    rule = reference.Residual(label_smoothing)
    return reference.run(operands.at, None, rows, operands.blocks, precision, rule, Wanted(False, False, False))[0]


def _operands(
    op: str, hidden: Any, head: Any, labels: Any, bias: Any, weights: Any, max_bytes: int
) -> tuple[Operands, Rows]:
    operands = Operands.of(op, hidden, head, bias, weights, max_bytes)
    (array,) = arrays(labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{op}: the labels are of dtype {array.dtype}: pass integers")
    if array.shape != operands.shape[:-1]:
        raise ValueError(f"{op}: the labels have shape {array.shape}: pass one per row, {operands.shape[:-1]}")
    label = array.astype(jnp.int32).reshape(-1)
    known = (label >= 0) & (label < operands.at.head.shape[1])
    return operands, Rows(operands.weight, jnp.where(known, label, reference.UNKNOWN))
