"""The op gram_accumulate: adds what one layer contributes to the inner products of all rows of a Jacobian.

Row r of example (group) b, restricted to the weights of a dense layer h_t = a_t W that is applied at T positions, is
sum_t a_bt d_brt^T, with a the layer's input and d the row's cotangent of h. Two rows meet without being formed,

    <row br, row cs> = sum_{t,u} (a_bt . a_cu) (d_brt . d_csu),

which for one position is the elementwise product (A A^T) * (D D^T) with the entries of A A^T repeated over the rows
of their groups (Dangel, Kunstner and Hennig 2020; Novak et al. 2017 for the two factors). Summed over layers it is the
Gram matrix J J^T, in which a Gauss-Newton system has batch x outputs unknowns instead of one per parameter.

B groups of R rows, N = B R, T positions, widths I (in) and O (out), F bytes per number; symmetric half:

| form | FLOPs | bytes, least |
|---|---|---|
| kept, chosen where T^2 is below about I | T^2 (N^2 O + B^2 I) | N^2 F (gram in and out) + (B T I + N T O) F |
| rows formed first | N^2 I O + 2 N T I O | N^2 F + (B T I + N T O + 2 N I O) F |
| explicit rows (no activations) of width O | N^2 O | N^2 F + N O F |

The reference holds a panel of the product (a quarter of the rows) beside `gram`. The Triton kernel makes each tile of
both products on chip and multiplies them there: neither goes to memory. It takes float32 operands apart into two TF32
parts each, x = h + l with |l| <= 2^-11 |x| and a rest below 2^-22 |x|, and leaves out l l' alone of the four products:
each product of two entries is off by at most 3 x 2^-22 of its magnitude, six times float32's own rounding, besides the
float32 rounding of the sum (three sums per entry, each of at most 2^-23 per term).
bfloat16 and float16 operands are exact in it.

Batching: `jax.vmap` over any operand; the Triton kernel takes the batch as one more axis of its grid.
Partitioning: inside `jax.shard_map` with all axes manual each device adds its own rows or, with `against`, its rows
against gathered ones. Outside, the reference is partitioned by XLA; the Triton kernel is not and with several devices
is refused.
Differentiation: none through the Triton kernel; the op stays off the differentiated path.
"""

from __future__ import annotations

import jax
import numpy as np

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select, unmeasured_on_gpu
from curvax.kernels._operands import arrays
from curvax.kernels.gram_accumulate import reference, triton
from curvax.kernels.gram_accumulate.factors import check_alike, form, formed_is_cheaper, rows

GRAM_ACCUMULATE = Op(
    "gram_accumulate",
    (
        Variant("triton", triton.cannot, unmeasured_on_gpu, gain="lower-triangular tiles on tensor cores, one launch"),
        Variant("reference"),
    ),
)
OPS = (GRAM_ACCUMULATE,)


def gram_accumulate(
    gram: jax.Array,
    activations: jax.Array | None,
    cotangents: jax.Array,
    *,
    against: tuple[jax.Array | None, jax.Array] | None = None,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """`gram` plus the inner products of one layer's rows.

    Args:
      gram: (N, N) with N = groups x rows, or (N, rows of `against`); float32 or float64: sums are taken in its dtype,
        products at highest precision.
      activations: (groups, in), or (groups, positions, in) for a layer that is applied at several positions; None if
        the rows are explicit.
      cotangents: (groups, rows, out) or (groups, rows, positions, out); explicit rows are (groups, rows, width).
        Activations and cotangents may be bfloat16, float16, float32 or, if `gram` is, float64.
      against: activations and cotangents of other groups: the columns of `gram`. None, the default, means the same
        groups, and then symmetry halves the work.
      implementation: None for the best supported one.

    Returns:
      The sum, in the dtype of `gram`. Without `against` only its lower triangle, diagonal included, is meaningful:
      what stands above is unspecified, so that several layers can be added before it is mirrored once.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: a dtype is not one of those.
      ValueError: shapes do not belong together.
    """
    gram, activations, cotangents = arrays(gram, activations, cotangents)
    left = rows("", activations, cotangents)
    right = None if against is None else rows("against: ", *arrays(*against))
    columns = left if right is None else right
    check_alike(left, columns)
    _check_gram(gram, (left.total, columns.total), left.cotangents.dtype, columns.cotangents.dtype)
    if gram.size == 0 or any(x.size == 0 for x in jax.tree.leaves((left, columns))):
        return gram
    if formed_is_cheaper(left, columns, triangle=right is None):
        left, right = form(left, gram.dtype), None if right is None else form(right, gram.dtype)
    request = Request.of(gram, left, right)
    if select(GRAM_ACCUMULATE, implementation, request).implementation == "triton":
        return triton.accumulate(gram, left, right, request.capability)
    return reference.accumulate(gram, left, right)


def _check_gram(gram: jax.Array, shape: tuple[int, int], *dtypes: np.dtype) -> None:
    if gram.shape != shape:
        raise ValueError(f"gram_accumulate: gram has shape {gram.shape}, and rows by rows are {shape}")
    if str(gram.dtype) not in ("float32", "float64"):
        raise TypeError(f"gram_accumulate: gram is {gram.dtype}: sums need float32 or float64")
    if gram.dtype == np.float32 and any(dtype == np.float64 for dtype in dtypes):
        raise TypeError("gram_accumulate: float64 rows need a float64 gram, and this one is float32")
