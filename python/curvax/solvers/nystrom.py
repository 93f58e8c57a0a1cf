"""Conjugate gradients with a randomized preconditioner, where rows are more than a factorization holds.

With G ~ U diag(l) U^T, a Nystrom approximation from `rank` products, and l_r the smallest value kept,

    P^-1 = (l_r + lam) U (diag(l) + lam)^-1 U^T + (I - U U^T)

takes the large eigenvalues of G + lam I to l_r + lam (Frangella, Tropp and Udell, "Randomized Nystrom preconditioning",
2023; for row spaces of physics-informed networks arXiv 2505.21404). One solve:

    1. sketch in blocks of columns until l_r <= lam, where more would not help, or the rank is used up
    2. conjugate gradients with P^-1

Whether that pays is measured, not believed. Each solve reports what it spent, in products, extrapolated to the
tolerance where it ended above it: plain ones their iterations, helped ones the columns of the sketch as well.

    step           0      1      2      3     ...   every    every + 1   ...
    solve        plain  helped  the cheaper one      both are tried again

`LowRankRows` takes the approximation for G itself and does not iterate (arXiv 2505.12149).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.loops import for_loop_body
from curvax.numbers import whole
from curvax.sketches import LowRank, columns_product, matmul, nystrom, orthonormal
from curvax.solvers.base import Lane, Result, Solution, Solver, System, code, relative_residual
from curvax.solvers.conjugate_gradient import CG
from curvax.solvers.krylov import KrylovSolver
from curvax.tree import PyTree
from curvax.work import Cost, SolveCost, SystemWork

_BLOCKS = 4
"""Blocks of columns that a sketch is made of: it ends after a quarter of its rank where that suffices."""
_SEED = 0
"""Of the test matrix, which is the same in every step: with another the preconditioner would jump from step to step."""


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A Nystrom approximation of G.

    Attributes:
      low_rank: basis and values, (R, rank) and (rank,), zero behind `count`.
      count: columns made, int32.
    """

    low_rank: LowRank
    count: jax.Array

    @staticmethod
    def of(system: System, like: PyTree, rank: int, lam: jax.Array) -> Sketch:
        """In blocks, until the smallest value is no more than lam."""
        flat, _ = tree.ravel(like)
        rank = min(rank, flat.size)
        block = -(-rank // _BLOCKS)
        width = min(block * _BLOCKS, flat.size)
        test = orthonormal(jax.random.normal(jax.random.key(_SEED), (flat.size, width), flat.dtype))
        multiply = for_loop_body(columns_product(system.product, like))
        nothing = jnp.zeros_like(test)
        first = (jnp.zeros((), jnp.int32), nothing, LowRank(nothing, nothing[0]))

        def unfinished(at: tuple[jax.Array, jax.Array, LowRank]) -> jax.Array:
            count, _, low_rank = at
            smallest = low_rank.values[jnp.maximum(count - 1, 0)]
            return (count < width) & ((count == 0) | (smallest > lam.astype(smallest.dtype)))

        def more(at: tuple[jax.Array, jax.Array, LowRank]) -> tuple[jax.Array, jax.Array, LowRank]:
            count, image, _ = at
            # The last block may overlap the one before it.
            start = jnp.minimum(count, width - min(block, width))
            columns = jax.lax.dynamic_slice_in_dim(test, start, min(block, width), axis=1)
            image = jax.lax.dynamic_update_slice_in_dim(image, multiply(columns), start, axis=1)
            count = start + min(block, width)
            made = jnp.arange(width, dtype=jnp.int32) < count
            return count, image, nystrom(jnp.where(made, test, jnp.zeros_like(test)), image)

        count, _, low_rank = jax.lax.while_loop(unfinished, more, first)
        return Sketch(low_rank, count)

    def level(self) -> jax.Array:
        """l_r, raised to the rounding of the largest value."""
        values = self.low_rank.values
        rounding = 10 * float(jnp.finfo(values.dtype).eps) * values[0]
        return jnp.maximum(values[jnp.maximum(self.count - 1, 0)], rounding)

    def inverse(self, lam: jax.Array, v: jax.Array) -> jax.Array:
        """(l_r + lam) (U diag(l) U^T + lam I, at least l_r off U)^-1 v: P^-1 v."""
        lam, level = lam.astype(v.dtype), self.level()
        below = jnp.maximum(self.low_rank.values, level) + lam
        one = jnp.ones_like(below)
        ratios = jnp.where(below > 0, (level + lam) / jnp.where(below > 0, below, one), one)
        return v + matmul(self.low_rank.basis, (ratios - 1) * matmul(self.low_rank.basis.T, v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NystromCGState:
    """What solves were seen to spend. All scalars.

    Attributes:
      step: solves so far, int32.
      plain, helped: products to the tolerance, without and with the preconditioner, at the last solve of each kind.
    """

    step: jax.Array
    plain: jax.Array
    helped: jax.Array


@dataclasses.dataclass(frozen=True)
class NystromCG(KrylovSolver):
    """CG on the row system, with a Nystrom preconditioner where that is seen to pay: `RowSpace(NystromCG())`.

    Attributes:
      tol: relative residual of the row system; 1e-5, as of `CG`.
      maxiter: most iterations; 100.
      rank: most columns of the sketch, each a product with G (in batches) and a vector of memory; 64.
      every: steps from one trial of both kinds to the next; 50, so that trials are 4 steps in a hundred.
    """

    maxiter: int = 100
    rank: int = 64
    every: int = 50
    _cg: CG = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field, least in (("rank", 1), ("every", 3)):
            if whole(field, getattr(self, field)) < least:
                raise ValueError(f"{field} must be at least {least}, not {getattr(self, field)}.")
        object.__setattr__(self, "_cg", CG(self.tol, self.maxiter, warm_start=False))

    @property
    def name(self) -> str:
        return f"Nystrom CG (rank at most {self.rank}, at most {self.maxiter} iterations, tolerance {self.tol:g})"

    @property
    def products(self) -> int:
        return self.rank + self.maxiter + 1

    def iterations(self, rank: int) -> tuple[int, str]:
        count = min(self.maxiter, rank + 1)
        return count, f"at most {count} iterations; a sketch where it costs less"

    def init(self, like: PyTree) -> NystromCGState:
        dtype = tree.scalar_dtype(like)
        return NystromCGState(jnp.zeros((), jnp.int32), jnp.zeros((), dtype), jnp.zeros((), dtype))

    def solve(self, system: System, rhs: PyTree, state: NystromCGState, lam: jax.Array) -> Solution:
        trial = state.step % self.every
        # A plain solve shorter than the first block of a sketch cannot be beaten.
        worth = (state.helped < state.plain) & (state.plain > self.rank / _BLOCKS)
        helps = (trial == 1) | ((trial > 1) & worth)

        def plain() -> tuple[Solution, jax.Array]:
            return self._cg.iterate(system, rhs, None, lam), jnp.zeros((), jnp.int32)

        def helped() -> tuple[Solution, jax.Array]:
            sketch = Sketch.of(system, rhs, self.rank, lam)
            _, unravel = tree.ravel(rhs)

            def precondition(v: PyTree) -> PyTree:
                return unravel(sketch.inverse(lam, tree.ravel(v)[0]))

            better = dataclasses.replace(system, precondition=precondition)
            return self._cg.iterate(better, rhs, None, lam), sketch.count

        solution, columns = jax.lax.cond(helps, helped, plain)
        spent = self._to_tolerance(solution).astype(state.plain.dtype) + columns.astype(state.plain.dtype)
        new = NystromCGState(
            state.step + 1, jnp.where(helps, state.plain, spent), jnp.where(helps, spent, state.helped)
        )
        return dataclasses.replace(solution, iterations=solution.iterations + columns, state=new)

    def _to_tolerance(self, solution: Solution) -> jax.Array:
        """Iterations to the tolerance, at the rate at which these came down where they ended above it."""
        residual = solution.residual
        small = jnp.asarray(max(self.tol, float(jnp.finfo(residual.dtype).eps)), residual.dtype)
        share = jnp.log(small) / jnp.log(jnp.clip(residual, small, 0.99))
        return solution.iterations.astype(residual.dtype) * jnp.maximum(share, jnp.ones_like(share))


@dataclasses.dataclass(frozen=True)
class LowRankRows(Solver):
    """(U diag(l) U^T + lam I)^-1 t of a randomized low-rank approximation of G, without iterating.

    Guzman-Cordero et al., "Improving energy natural gradient descent through Woodbury, momentum, and randomization"
    (arXiv 2505.12149), save that what U does not span counts as l_r + lam and not as lam, so that a rank too small
    makes steps shorter and not longer. The residual says how well the rank did, and INACCURATE that it did not.

    Attributes:
      rank: most columns; each costs a product with G, in batches, and a vector of memory. 128.
    """

    rank: int = 128

    def __post_init__(self) -> None:
        if whole("rank", self.rank) < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}.")

    @property
    def name(self) -> str:
        return f"low-rank rows (rank at most {self.rank})"

    @property
    def lane(self) -> Lane:
        return Lane.PARAMETER

    @property
    def products(self) -> int:
        return self.rank + 1

    def system_cost(self, system: SystemWork) -> SolveCost:
        columns = float(min(self.rank, system.unknowns))
        dense = Cost(8 * system.unknowns * columns**2, 8 * system.itemsize * system.unknowns * columns, launches=60.0)
        cost = dataclasses.replace(system.product.times(columns), launches=system.product.launches) + dense
        return SolveCost(cost, f"{columns:.0f} columns")

    def init(self, like: PyTree) -> tuple[()]:
        return ()

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        flat, unravel = tree.ravel(rhs)
        sketch = Sketch.of(system, rhs, self.rank, lam)
        size = sketch.level() + lam.astype(flat.dtype)
        value = unravel(sketch.inverse(lam, flat) / jnp.where(size > 0, size, jnp.ones_like(size)))
        residual = relative_residual(system, lam, rhs, value)
        return Solution(value, code(Result.CONVERGED), sketch.count, residual, ())
