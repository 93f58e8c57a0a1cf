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

The reference holds a panel of the product (a quarter of the rows) beside `gram`. The C++ handler for CPUs packs the
factors once and then makes each tile of both products in cache. Its sums are taken in the dtype of `gram`, 256 products
at a time: each is off by at most 256 + width / 256 roundings of the sum of magnitudes. The Triton kernel makes each
tile of both products on chip and multiplies them there: neither goes to memory. It takes float32 operands apart into
two TF32 parts each, x = h + l with |l| <= 2^-11 |x| and a rest below 2^-22 |x|, and leaves out l l' alone of the four
products: each product of two entries is off by at most 3 x 2^-22 of its magnitude, six times float32's own rounding,
besides the float32 rounding of the sum (three sums per entry, each of at most 2^-23 per term).
bfloat16 and float16 operands are exact in it.

Three examples of two rows each, one tile per pair of examples. Only `*` is made; it is mirrored once at the end:

              rows of example  0   1   2        tile (b, c) = (a_b . a_c) * D_b D_c^T, one number times (2, 2),
    rows of example 0          *                for one position; for T positions a sum of T^2 such products.
                    1          *   *
                    2          *   *   *

Batching: `jax.vmap` over any operand; the Triton kernel takes the batch as one more axis of its grid, the C++ handler
one member after the other.
Partitioning: inside `jax.shard_map` with all axes manual each device adds its own rows or, with `against`, its rows
against gathered ones. Outside, the reference is partitioned by XLA; kernel and handler are not and with several devices
are refused.
Differentiation: none through kernel or handler; the op stays off the differentiated path.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select
from curvax.kernels._operands import arrays
from curvax.kernels.gram_accumulate import native, reference, triton
from curvax.kernels.gram_accumulate.factors import (
    BlockRows,
    block_rows,
    check_alike,
    form,
    formed_is_cheaper,
    one_layout,
    rows,
)

GRAM_ACCUMULATE = Op(
    "gram_accumulate",
    (
        Variant("triton", triton.cannot, triton.better_not, gain="lower-triangular tiles on tensor cores, one launch"),
        Variant("native", native.cannot, native.better_not, gain="lower-triangular tiles, both products made in cache"),
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
        groups, and then symmetry halves the work. Rows that differ in rows per group or positions meet in plain JAX,
        whatever the implementation.
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
    if right is not None and not one_layout(left, right):
        return reference.accumulate(gram, left, right)
    request = Request.of(gram, left, right)
    match select(GRAM_ACCUMULATE, implementation, request).implementation:
        case "triton":
            return triton.accumulate(gram, left, right, request.capability)
        case "native":
            return native.accumulate(gram, left, right)
        case _:
            return reference.accumulate(gram, left, right)


def gram_of_layers(
    layers: Sequence[tuple[jax.Array | None, jax.Array]],
    dtype: np.dtype,
    *,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """The whole symmetric matrix of inner products of the rows of all layers, at least one.

    What `gram_accumulate` makes of zeros layer by layer, mirrored; the native form takes each tile of the result
    through all layers while it is in cache.

    Args:
      layers: activations (groups, blocks, positions, in) and cotangents (groups, blocks, rows, positions, out) of each;
        None and (groups, blocks, rows, width) for explicit rows. Rows of different blocks do not meet.
      dtype: of the result, float32 or float64; the layers' dtypes as for `gram_accumulate`.
      implementation: None for the best supported one.

    Returns:
      (N, N) with N = groups x rows.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: a dtype is not one of those.
      ValueError: shapes do not belong together.
    """
    blocks = [block_rows(*arrays(*layer)) for layer in layers]
    if not blocks:
        raise ValueError("gram_accumulate: there are no layers: pass at least one")
    total = blocks[0].total
    gram = jax.ShapeDtypeStruct((total, total), np.dtype(dtype))
    for layer in blocks:
        _check_alike(layer, blocks[0])
        _check_gram(gram, (layer.total, layer.total), layer.cotangents.dtype)
    blocks = [layer for layer in blocks if all(x.size for x in jax.tree.leaves(layer))]
    if not blocks:
        return jnp.zeros(gram.shape, gram.dtype)
    blocks = [_cheaper(layer, gram.dtype) for layer in blocks]
    request = Request.of(gram, blocks)
    match select(GRAM_ACCUMULATE, implementation, request).implementation:
        case "triton":
            return triton.gram_of_layers(blocks, gram.dtype, request.capability)
        case "native":
            return native.gram_of_layers(blocks, gram.dtype)
        case _:
            return reference.gram_of_layers(blocks, gram.dtype)


def _cheaper(layer: BlockRows, dtype: np.dtype) -> BlockRows:
    """The layer with its rows formed where that is cheaper."""
    one = jax.eval_shape(lambda: layer.first)
    if not formed_is_cheaper(one, one, triangle=True):
        return layer
    made = jax.vmap(lambda rows: form(rows, dtype), in_axes=1, out_axes=1)(layer.as_rows)
    return BlockRows(made.activations, made.cotangents)


def _check_alike(layer: BlockRows, first: BlockRows) -> None:
    groups, of_group = (layer.cotangents.shape[axis] for axis in (0, 2))
    expected = tuple(first.cotangents.shape[axis] for axis in (0, 2))
    if (groups, of_group) != expected:
        raise ValueError(
            f"gram_accumulate: a layer has (groups, rows) {(groups, of_group)} and the first {expected}: "
            "they must be equal"
        )


def _check_gram(gram: jax.Array | jax.ShapeDtypeStruct, shape: tuple[int, int], *dtypes: np.dtype) -> None:
    if gram.shape != shape:
        raise ValueError(f"gram_accumulate: gram has shape {gram.shape}, and rows by rows are {shape}")
    if str(gram.dtype) not in ("float32", "float64"):
        raise TypeError(f"gram_accumulate: gram is {gram.dtype}: sums need float32 or float64")
    if gram.dtype == np.float32 and any(dtype == np.float64 for dtype in dtypes):
        raise TypeError("gram_accumulate: float64 rows need a float64 gram, and this one is float32")
