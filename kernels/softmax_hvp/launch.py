"""Starting a kernel whose clusters each take one row: memory, barriers and grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels import _mosaic
from curvax.kernels._vary import varying_like
from curvax.kernels.softmax_hvp.rows import EXCHANGED, PART, Exchange, Row
from curvax.kernels.softmax_hvp.tiling import Tiling

TASK = "task"
"""The grid axis: one cluster per task."""


def launch(
    body: Any,
    tiled: Tiling,
    tasks: int,
    out: list[jax.ShapeDtypeStruct],
    kept: list[np.dtype],
    operands: list[jax.Array],
    interpret: Any,
) -> Sequence[jax.Array]:
    """Runs `body` on `tasks` clusters; behind operands and results it gets what `row_of_block` takes apart."""
    plgpu = _mosaic.backend()
    shared, scratch, cluster = [], [], {}
    if tiled.parts > 1:
        cluster = {"cluster": (tiled.parts,), "cluster_names": (PART,)}
        shared = [jax.ShapeDtypeStruct((tasks, tiled.parts, EXCHANGED), jnp.float32)]
        scratch += [plgpu.SMEM((EXCHANGED,), jnp.float32), plgpu.SMEM((tiled.parts, EXCHANGED), jnp.float32)]
        scratch += [plgpu.ClusterBarrier(collective_axes=(PART,)), plgpu.Barrier()]
    if tiled.copied:
        scratch.append(plgpu.Barrier(num_arrivals=len(kept), num_barriers=tiled.kept))
    scratch += [plgpu.SMEM((tiled.kept * tiled.chunk,), dtype) for dtype in kept]
    kernel = plgpu.kernel(
        body,
        out_type=tuple(varying_like(each, operands[0]) for each in (*out, *shared)),
        scratch_types=scratch,
        grid=(tasks,),
        grid_names=(TASK,),
        interpret=interpret,
        **cluster,
    )
    return kernel(*operands)


def row_of_block(tiled: Tiling, sources: list[Any], task: jax.Array, memory: Sequence[Any]) -> Row:
    """The row of a block, from its views in device memory and the memory that `launch` provides."""
    exchange, arrived = None, None
    if tiled.parts > 1:
        shared, mine, everyone, met, fetched, *memory = memory
        exchange = Exchange(shared.at[task], mine, everyone, met, fetched)
    if tiled.copied:
        arrived, *memory = memory
    return Row(tiled, sources, list(memory), arrived, exchange)
