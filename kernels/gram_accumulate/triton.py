"""gram_accumulate as a Triton kernel, called through jax-triton: one launch per layer, lower-triangular tiles only."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels._dispatch import Request, timed_on_hopper
from curvax.kernels._vary import vary_alike
from curvax.kernels.gram_accumulate import reference
from curvax.kernels.gram_accumulate.factors import BlockRows, Rows
from curvax.kernels.gram_accumulate.whole import layer_by_layer

# tl.dot takes no less than 16 rows.
_LEAST_DOT = 16


@dataclass(frozen=True)
class Tiling:
    """Shape of the kernel.

    Attributes:
      tile: rows and columns of the result per program.
      block: entries of the rows read at a time.
      warps, stages: as Triton counts them.
    """

    tile: int
    block: int
    warps: int
    stages: int


# Fixed shapes and no autotuning: a choice by the clock would make the last bits of a step differ from run to run.
_SMALL = Tiling(64, 32, 4, 3)
# Half the operand traffic per product, where the registers of Hopper and its successors hold it.
_LARGE = Tiling(128, 32, 8, 3)
# Rows from which large tiles of the lower triangle occupy every multiprocessor of an H100 (16 x 17 / 2 tiles of 132).
_LARGE_ROWS = 2048
# On an H200 the kernel took half of XLA's time at 1,152 and 1,280 rows, as much at 320, and twice as much at 128.
_LEAST_ROWS = 1024


def cannot(request: Request) -> str | None:
    """Why the kernel cannot run a request; None if it can."""
    if request.platform != "gpu":
        return f"the Triton kernel runs on NVIDIA GPUs, and this is {request.platform}"
    if request.capability is None or request.capability < (8, 0):
        actual = "unknown" if request.capability is None else ".".join(map(str, request.capability))
        return f"the Triton kernel needs compute capability 8.0 for TF32, and this device's is {actual}"
    if np.dtype(np.float64) in request.dtypes:
        return "the Triton kernel sums in float32, and these operands are float64"
    if request.devices != 1:
        return f"outside jax.shard_map the Triton kernel is not partitioned, and there are {request.devices} devices"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: pip install 'curvax[triton]'" if missing else None


def better_not(request: Request) -> str | None:
    """Why the reference is the better choice; None if it is not."""
    rows = max(request.shapes[0])
    if rows < _LEAST_ROWS:
        return f"XLA's own products are as fast below {_LEAST_ROWS} rows, and these are {rows}"
    return timed_on_hopper(request)


def tiling(rows: Rows, capability: tuple[int, int] | None) -> Tiling:
    """The shape of the kernel: large tiles where there are many and they spill no registers."""
    if capability is None or capability < (9, 0) or rows.total < _LARGE_ROWS:
        return _SMALL
    # Repeating scales over the rows of their groups, or summing over positions, holds one more tile for a while.
    plain = rows.positions == 1 and (rows.activations is None or rows.per_group == 1)
    return _LARGE if plain else _SMALL


def constants(left: Rows, right: Rows, triangle: bool, shape: Tiling) -> dict[str, int | bool | str]:
    """The compile-time arguments of `triton_kernel.gram_tile`."""
    per_group = left.per_group
    # A tile begins anywhere in a group, so it touches one more than fit.
    touched = shape.tile if per_group == 1 else (shape.tile - 2) // per_group + 2
    halves = {str(x.dtype) for x in jax.tree.leaves((left, right))} <= {"bfloat16", "float16"}
    return {
        "LEFT_GROUPS": left.groups,
        "RIGHT_GROUPS": right.groups,
        "ROWS": per_group,
        "POSITIONS": left.positions,
        "IN": left.width_in,
        "OUT": left.width_out,
        "SCALED": left.activations is not None,
        "TRIANGLE": triangle,
        "TILE": shape.tile,
        "GROUPS": max(_LEAST_DOT, 1 << (touched - 1).bit_length()),
        "BLOCK": shape.block,
        # Half-precision products are exact in one pass.
        "PRECISION": "tf32" if halves else "tf32x3",
    }


def tiles(left: Rows, right: Rows, triangle: bool, shape: Tiling) -> int:
    """Programs per batch member."""
    down, across = -(-left.total // shape.tile), -(-right.total // shape.tile)
    return down * (down + 1) // 2 if triangle else down * across


def accumulate(gram: jax.Array, left: Rows, right: Rows | None, capability: tuple[int, int] | None) -> jax.Array:
    """See `api.gram_accumulate`."""
    triangle = right is None
    columns = left if right is None else right
    leaves, structure = jax.tree.flatten((gram, left, columns))

    def by_triton(*flat: jax.Array) -> jax.Array:
        return vary_alike([_call(0, triangle, capability, structure)(*flat)], like=flat)[0]

    def by_reference(*flat: jax.Array) -> jax.Array:
        first, rows, others = jax.tree.unflatten(structure, flat)
        return reference.accumulate(first, rows, None if triangle else others)

    return jax.lax.platform_dependent(*vary_alike(leaves), cuda=by_triton, default=by_reference)


def gram_of_layers(layers: Sequence[BlockRows], dtype: np.dtype, capability: tuple[int, int] | None) -> jax.Array:
    """See `api.gram_of_layers`: a launch per layer and block."""
    return layer_by_layer(layers, dtype, lambda gram, rows: accumulate(gram, rows, None, capability))


def _call(axes: int, triangle: bool, capability: tuple[int, int] | None, structure: Any) -> Callable[..., jax.Array]:
    """The kernel on operands with `axes` batch axes in front, with its own rule for `jax.vmap`: one batch axis more."""

    @jax.custom_batching.custom_vmap
    def call(*flat: jax.Array) -> jax.Array:
        gram, left, right = jax.tree.unflatten(structure, flat)
        return _launch(axes, gram, left, right, triangle, capability)

    @call.def_vmap
    def batched(size: int, mapped: list[bool], *flat: jax.Array) -> tuple[jax.Array, bool]:
        whole = [x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in zip(flat, mapped, strict=True)]
        return _call(axes + 1, triangle, capability, structure)(*whole), True

    return call


def _launch(
    axes: int, gram: jax.Array, left: Rows, right: Rows, triangle: bool, capability: tuple[int, int] | None
) -> jax.Array:
    """One launch. With batch axes in front, the properties of `left` and `right` themselves mean nothing."""
    import jax_triton  # pyright: ignore[reportMissingImports]

    from curvax.kernels.gram_accumulate.triton_kernel import gram_tile

    one_left, one_right = (_member(rows, axes) for rows in (left, right))
    shape = tiling(one_left, capability)
    nothing = gram  # stands for activations that are not there and never read
    return jax_triton.triton_call(
        gram,
        nothing if left.activations is None else left.activations,
        left.cotangents,
        nothing if right.activations is None else right.activations,
        right.cotangents,
        kernel=gram_tile,
        out_type=jax.ShapeDtypeStruct(gram.shape, gram.dtype),
        grid=(tiles(one_left, one_right, triangle, shape), math.prod(gram.shape[:axes])),
        name="curvax_gram_accumulate",
        num_warps=shape.warps,
        num_stages=shape.stages,
        compute_capability=None if capability is None else 10 * capability[0] + capability[1],
        **constants(one_left, one_right, triangle, shape),
    )


def _member(rows: Rows, axes: int) -> Rows:
    """Shapes of one batch member."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), rows)
