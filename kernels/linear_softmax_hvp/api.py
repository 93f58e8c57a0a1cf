"""The op linear_softmax_hvp: the Gauss-Newton product through the last matmul and the softmax of a language model.

With logits Z = H W + b, H (N, D) and W (D, C), a tangent (dH, dW, db) and row weights w,

    V = dH W + H dW + db,   u_i = w_i (diag(p_i) - p_i p_i^T) v_i,   result (u W^T, H^T u, sum_i u_i).

The (N, C) arrays are made and used up block by block of rows, within `max_bytes`; they never exist as a whole:

         D           C
    N  [ H ]  *  [ W ]  ->  [ Z, V, u of rows 0 .. B-1 ]  ->  their rows of u W^T, and a term of H^T u and sum u
       [   ]                [ then of rows B .. 2B-1   ]  ->  ...

With B rows per block and s bytes per element of the operands:

| form | FLOPs | alive beside operands and results | head read |
|---|---|---|---|
| as written | 10 N D C | about 16 N C bytes | 3 times |
| blocks of rows | 10 N D C | `max_bytes`, and one (D, C) product before it is added | 3 ceil(N / B) times |
| blocks of rows and columns | 16 N D C | `max_bytes` | 6 ceil(N / B) times |

Columns are cut only where 16 rows are more than `max_bytes`: that costs three matmuls a second time.

Precision: the matmuls run in the operands' dtype (for float16 those with cotangents in float32, for their range) and
accumulate in float32 or wider; results are upcast. `precision` is that of `jax.lax.dot_general`, by default JAX's own
setting: the product is then that of the matmul a model itself makes, on GPUs with TensorFloat-32. Ask for "highest"
where conjugate gradients should converge beyond three digits.
Batching: `jax.vmap` is exact; every member has blocks of its own, so divide `max_bytes` by their number.
Partitioning: inside `jax.shard_map` rows are each device's own, and head and bias cotangents are sums over them: add
them up with `jax.lax.psum`. A head sharded over its columns is not served. Outside, XLA partitions the reference; the
Mosaic kernel is not partitioned, so with several devices it is not taken.
Differentiation: none; the op is itself a derivative, linear and symmetric in its tangent.
"""

from __future__ import annotations

import jax

from curvax.kernels._dispatch import Choice, Implementation, Op, Variant, not_faster_on_gpu, select
from curvax.kernels.linear_softmax_hvp import pallas, reference
from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Tangent
from curvax.kernels.linear_softmax_hvp.operands import MAX_BYTES, Operands
from curvax.kernels.softmax_hvp import pallas as softmax_pallas

LINEAR_SOFTMAX_HVP = Op(
    "linear_softmax_hvp",
    (
        Variant("pallas", softmax_pallas.cannot, not_faster_on_gpu, gain="logits and tangents are read once"),
        Variant("reference"),
    ),
)
OPS = (LINEAR_SOFTMAX_HVP,)


def linear_softmax_hvp(
    hidden: jax.Array,
    head: jax.Array,
    d_hidden: jax.Array | None,
    d_head: jax.Array | None,
    *,
    bias: jax.Array | None = None,
    d_bias: jax.Array | None = None,
    weights: jax.Array | None = None,
    max_bytes: int = MAX_BYTES,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | Choice | None = None,
) -> Cotangents:
    """The Gauss-Newton product of the weighted softmax cross entropy of logits = hidden @ head + bias.

    Args:
      hidden: (..., features), floating: what the head is applied to.
      head: (features, columns), in the dtype of `hidden`.
      bias: (columns,), likewise.
      d_hidden, d_head, d_bias: the tangent, each like what it moves. What has none is held fixed and gets no cotangent:
        the product is that of the block of the matrix that belongs to the other parts, in fewer matmuls.
      weights: (...), or what broadcasts to it: effective weights of the rows (`Loss.effective_weights`, times the
        label mass); ones if `None`.
      max_bytes: for logits and what is made of them; 256 MiB by default, some hundred rows of a large vocabulary, with
        which the matmuls still run at speed.
      precision: of the matmuls, as in `jax.lax.dot_general`; JAX's own default if `None`.
      implementation: None for the best supported one.

    Returns:
      `Cotangents` of hidden, head and bias (None where there is no tangent), in the accumulation dtype: float64 for
      such operands, else float32.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError, ValueError: operands that do not fit, or a `max_bytes` below 1.

    See Schraudolph (2002) for the product, and Wijmans et al., "Cut your losses in large-vocabulary language models"
    (2024), for losses over such a head in little memory.
    """
    operands = Operands.of("linear_softmax_hvp", hidden, head, bias, weights, max_bytes)
    tangent = operands.tangent(Tangent(d_hidden, d_head, d_bias))
    if not any(part is not None for part in tangent):
        raise ValueError("linear_softmax_hvp: everything is held fixed: pass d_hidden, d_head or d_bias")
    if operands.rows == 0:
        return operands.zero(tangent)
    chosen = select(LINEAR_SOFTMAX_HVP, implementation, operands.request()).implementation
    run = pallas.linear_softmax_hvp if chosen == "pallas" else reference.linear_softmax_hvp
    return operands.shaped(run(operands.at, tangent, operands.weight, operands.blocks, precision))
