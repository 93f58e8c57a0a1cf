"""What the block preconditioners share: averages of factors, their cadence, and the walk over the blocks.

A layer h = a W has the gradient sum_t a_t d_t^T, so its block of the Gauss-Newton matrix is an expectation of
(a a^T) kron (d d^T), which is approximated by A kron B with A = E a a^T and B = E d d^T. A block keeps its n x m
weights as a matrix V, and nothing of the size (n m) x (n m) is ever made:

      A (n, n)   V (n, m)   B (m, m)
      +-----+    +------+   +----+            (A kron B)^-1 vec(V)  =  vec(A^-1 V B^-1)
      |     |    |      |   |    |
      +-----+    +------+   +----+            n^3 + m^3 to factorize, n m (n + m) to apply

An example: a dense layer of 512 inputs with a bias and 10 outputs has n = 513 (the bias is one more activation, always
1) and m = 10: factors of 263,169 and 100 numbers stand for a block of 26 million.

A refresh, with the numbers of the comments in `KFAC.refresh` and `EKFAC.refresh` (Martens and Grosse 2015, algorithm 2;
George et al. 2018, algorithm 1):

      1. sum a a^T and d d^T over the batch             `measured`
      2. running averages of A and B                    `FactorAverages.with_batch`
      3. inverses or eigenvectors, at a cadence         `when_due`
      4. EKFAC: the curvature along the eigenvectors
      5. count what was not finite, and keep the old
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from curvax.curvature import FisherType, Linearization
from curvax.curvature.base import Measure
from curvax.estimators.base import check_count
from curvax.loops import for_loop_body
from curvax.preconditioners._diagonal import divide
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.kronecker import FactorSums, WeightSharing, factor_sums
from curvax.tree import PyTree

T = TypeVar("T")

MAX_WIDTH = 8192
"""Rows of the largest factor that is stored as a matrix."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorAverages:
    """Running averages of factors, before bias correction; or, corrected, the factors themselves.

    Attributes:
      inputs: A per Kronecker block, (G, n, n), of an embedding (G, n).
      outputs: B per Kronecker block, (G, m, m).
      diagonal: per diagonal block, leaf-shaped.
      count: refreshes in the average (int32).
    """

    inputs: list[jax.Array]
    outputs: list[jax.Array]
    diagonal: list[jax.Array]
    count: jax.Array

    @staticmethod
    def zeros(blocks: KroneckerBlocks) -> FactorAverages:
        """No curvature seen."""
        return FactorAverages(
            [jnp.zeros(b.input_shape, blocks.dtype) for b in blocks.kronecker],
            [jnp.zeros(b.output_shape, blocks.dtype) for b in blocks.kronecker],
            [jnp.zeros(b.shape, blocks.dtype) for b in blocks.diagonal],
            jnp.zeros((), jnp.int32),
        )

    def with_batch(self, sums: FactorSums, decay: float) -> FactorAverages:
        """The averages with the factors of one more batch."""
        mine = (self.inputs, self.outputs, self.diagonal)
        averaged = averages(mine, (*sums.factors(), sums.diagonal), decay)
        return FactorAverages(averaged[0], averaged[1], averaged[2], self.count + 1)

    def corrected(self, decay: float) -> FactorAverages:
        """The factors: weighted means over the refreshes."""
        factor = correction(self.count, decay)
        scaled = jax.tree.map(lambda x: x * factor.astype(x.dtype), (self.inputs, self.outputs, self.diagonal))
        return FactorAverages(scaled[0], scaled[1], scaled[2], self.count)

    def mean_curvature(self, blocks: KroneckerBlocks) -> jax.Array:
        """Mean of the diagonal that the factors stand for, tr A tr B per block, over all entries."""
        total = sum((jnp.sum(d) for d in self.diagonal), start=jnp.zeros((), blocks.dtype))
        for a, b in zip(self.inputs, self.outputs, strict=True):
            total = total + jnp.sum(trace(a) * trace(b))
        return total / max(sum(map(math.prod, blocks.shapes)), 1)


def averages(old: PyTree, new: PyTree, decay: float) -> PyTree:
    """Decay old + (1 - decay) new, leaf by leaf."""
    return jax.tree.map(lambda x, y: decay * x + (1 - decay) * y.astype(x.dtype), old, new)


def correction(count: jax.Array, decay: float) -> jax.Array:
    """Bias correction of an exponential average that started at zero, 1 / (1 - decay^count); 1 before any term."""
    dtype = jnp.result_type(float)
    if decay == 0:
        return jnp.ones((), dtype)
    gathered = -jnp.expm1(math.log(decay) * jnp.maximum(count, 1).astype(dtype))
    return jnp.where(count > 0, 1 / gathered, jnp.ones_like(gathered))


def trace(matrices: jax.Array) -> jax.Array:
    """Traces (G,) of (G, n, n), or of diagonals (G, n)."""
    return jnp.sum(matrices if matrices.ndim == 2 else jnp.diagonal(matrices, axis1=-2, axis2=-1), axis=-1)


def measured(
    blocks: KroneckerBlocks, linearization: Linearization, fisher: FisherType, key: jax.Array, sharing: WeightSharing
) -> tuple[FactorSums, Callable[[Measure], PyTree]]:
    """The sums of one batch, and the function that takes further measures of the same rows."""
    if linearization.layer_factors is None:
        raise ValueError("Kronecker factors need the model's layer uses; linearize with `Needs(factors=True)`.")
    total = linearization.layer_factors(fisher, key)
    return total(lambda examples: factor_sums(blocks, examples, sharing)), total


def when_due(due: jax.Array, always: bool, work: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """`work()` in the refreshes that are due."""
    return work() if always else jax.lax.cond(due, for_loop_body(work), otherwise)


def by_size(
    function: Callable[[jax.Array], Sequence[jax.Array]], matrices: Sequence[jax.Array]
) -> list[tuple[jax.Array, ...]]:
    """`function` on stacks of square matrices, (G, n, n), one call per size n."""
    sizes: dict[int, list[int]] = collections.defaultdict(list)
    for index, matrix in enumerate(matrices):
        sizes[matrix.shape[-1]].append(index)
    results: dict[int, tuple[jax.Array, ...]] = {}
    for indices in sizes.values():
        stacks = function(jnp.concatenate([matrices[i] for i in indices]))
        cuts = [sum(matrices[i].shape[0] for i in indices[:k]) for k in range(1, len(indices))]
        parts = [jnp.split(x, cuts) for x in stacks]
        results |= {i: tuple(part[k] for part in parts) for k, i in enumerate(indices)}
    return [results[i] for i in range(len(matrices))]


def apply_blocks(
    blocks: KroneckerBlocks,
    v: PyTree,
    lam: jax.Array,
    scale: jax.Array,
    diagonal: Sequence[jax.Array],
    inverse: Callable[[int, jax.Array], jax.Array],
) -> PyTree:
    """P^-1 v, block by block.

    Args:
      blocks: the blocks.
      v: the vector.
      lam: damping.
      scale: mean curvature, in place of a curvature that is zero while there is no damping.
      diagonal: curvature of the diagonal blocks.
      inverse: (index of a Kronecker block, its entries (G, n, m)) -> the same of P^-1 v.
    """
    return blocks.map_entries(
        v,
        inverse,
        lambda index, entries: divide(entries, diagonal[index] + lam, scale),
        # No output depends on what is in no block: its curvature is zero.
        lambda idle: divide(idle, jnp.broadcast_to(lam, idle.shape), scale),
    )


def check_cadences(decay: float, every: int, inverse_every: int) -> None:
    """Raises for settings that do not fit."""
    check_count("every", every)
    check_count("inverse_every", inverse_every)
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}.")
    if inverse_every % every:
        raise ValueError(f"inverse_every must be a multiple of every ({every}), got {inverse_every}.")
