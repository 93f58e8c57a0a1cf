"""The op linear_softmax_hvp: the Gauss-Newton product through the last matmul and the softmax of a language model.

With logits Z = H W + b, H (N, D) and W (D, C), a tangent (dH, dW, db) and row weights w,

    V = dH W + H dW + db,   u_i = w_i (diag(p_i) - p_i p_i^T) v_i,   result (u W^T, H^T u, sum_i u_i).

The (N, C) arrays are made and used up block by block of rows, within `max_bytes`; they never exist as a whole. With B
rows per block and s bytes per element of the operands:

| form | FLOPs | alive beside operands and results | head read |
|---|---|---|---|
| as written | 10 N D C | about 16 N C bytes | 3 times |
| blocks of rows | 10 N D C | `max_bytes`, and one (D, C) product before it is added | 3 ceil(N / B) times |
| blocks of rows and columns | 16 N D C | `max_bytes` | 6 ceil(N / B) times |

Columns are cut only where 16 rows are more than `max_bytes`: that costs three matmuls a second time.

Precision: the matmuls run in the operands' dtype (for float16 those with cotangents in float32, for their range) and
accumulate in float32 or wider; results are wide. `precision` is that of `jax.lax.dot_general`, by default JAX's own
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
import jax.numpy as jnp

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select, unmeasured_on_gpu
from curvax.kernels._operands import arrays, row_weights
from curvax.kernels.linear_softmax_hvp import pallas, reference
from curvax.kernels.linear_softmax_hvp.blocks import Blocks, Cotangents, Head
from curvax.kernels.softmax_hvp import pallas as softmax_pallas
from curvax.tree import wide_dtype

LINEAR_SOFTMAX_HVP = Op(
    "linear_softmax_hvp",
    (
        Variant("pallas", softmax_pallas.cannot, unmeasured_on_gpu, gain="logits and tangents are read once"),
        Variant("reference"),
    ),
)
OPS = (LINEAR_SOFTMAX_HVP,)

_MAX_BYTES = 256 * 2**20


def linear_softmax_hvp(
    hidden: jax.Array,
    head: jax.Array,
    d_hidden: jax.Array,
    d_head: jax.Array,
    *,
    bias: jax.Array | None = None,
    d_bias: jax.Array | None = None,
    weights: jax.Array | None = None,
    max_bytes: int = _MAX_BYTES,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | Choice | None = None,
) -> Cotangents:
    """The Gauss-Newton product of the weighted softmax cross entropy of logits = hidden @ head + bias.

    Args:
      hidden: (..., features), floating: what the head is applied to.
      head: (features, columns), in the dtype of `hidden`.
      d_hidden, d_head: the tangent, alike.
      bias, d_bias: (columns,), both or neither.
      weights: (...), or what broadcasts to it: effective weights of the rows (`Loss.effective_weights`, times the
        label mass); ones if `None`.
      max_bytes: for logits and what is made of them; 256 MiB by default, some hundred rows of a large vocabulary, with
        which the matmuls still run at speed.
      precision: of the matmuls, as in `jax.lax.dot_general`; JAX's own default if `None`.
      implementation: None for the best supported one.

    Returns:
      `Cotangents` of hidden, head and bias (None without one), in the wide dtype: float64 for such operands, else
      float32.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError, ValueError: operands that do not fit, or a `max_bytes` below 1.

    See Schraudolph (2002) for the product, and Wijmans et al., "Cut your losses in large-vocabulary language models"
    (2024), for losses over such a head in little memory.
    """
    at, tangent = Head(*arrays(hidden, head, bias)), Head(*arrays(d_hidden, d_head, d_bias))
    _check(at, tangent, max_bytes)
    shape, columns = at.hidden.shape, at.head.shape[1]
    wide = wide_dtype(at.hidden.dtype)
    weight = row_weights("linear_softmax_hvp", weights, shape[:-1]).astype(wide).reshape(-1)
    at, tangent = (each._replace(hidden=each.hidden.reshape(weight.size, shape[-1])) for each in (at, tangent))
    if weight.size == 0:
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), at)
        return Cotangents(zero.hidden.reshape(shape), zero.head, zero.bias)
    blocks = Blocks.of(weight.size, columns, max_bytes)
    logits = jax.ShapeDtypeStruct((blocks.rows, columns), wide)
    if select(LINEAR_SOFTMAX_HVP, implementation, Request.of(logits)).implementation == "pallas":
        found = pallas.linear_softmax_hvp(at, tangent, weight, blocks, precision)
    else:
        found = reference.linear_softmax_hvp(at, tangent, weight, blocks, precision)
    return found._replace(hidden=found.hidden.reshape(shape))


def _check(at: Head, tangent: Head, max_bytes: int) -> None:
    op = "linear_softmax_hvp"
    if not jnp.issubdtype(at.hidden.dtype, jnp.floating):
        raise TypeError(f"{op}: hidden is of dtype {at.hidden.dtype}: pass real floating-point numbers")
    if max_bytes < 1:
        raise ValueError(f"{op}: max_bytes is {max_bytes}: pass a positive number of bytes")
    if at.hidden.ndim < 1 or at.head.ndim != 2 or at.hidden.shape[-1] != at.head.shape[0] or at.head.shape[1] == 0:
        raise ValueError(
            f"{op}: hidden has shape {at.hidden.shape} and head {at.head.shape}: "
            "pass (..., features) and (features, columns)"
        )
    if (at.bias is None) != (tangent.bias is None):
        raise ValueError(f"{op}: bias and d_bias go together: pass both or neither")
    for name, value, other in zip(Head._fields, at, tangent, strict=True):
        if value is None or other is None:
            continue
        if value.dtype != at.hidden.dtype:
            raise TypeError(f"{op}: {name} is of dtype {value.dtype} and hidden of {at.hidden.dtype}: cast one of them")
        if (other.shape, other.dtype) != (value.shape, value.dtype):
            raise TypeError(
                f"{op}: d_{name} is {other.dtype}{other.shape} and {name} {value.dtype}{value.shape}: pass them alike"
            )
    if at.bias is not None and at.bias.shape != at.head.shape[1:]:
        raise ValueError(f"{op}: bias has shape {at.bias.shape}: pass {at.head.shape[1:]}, one entry per column")
