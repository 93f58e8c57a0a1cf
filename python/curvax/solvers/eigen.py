"""Direct solution by eigenvalues: one decomposition serves every damping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Op, Request
from curvax.kernels.dense_linalg import EIGH, eigh
from curvax.solvers.base import Solution, System
from curvax.solvers.dense import MatrixSolver, assemble, by_magnitude, dense_residual
from curvax.tree import PyTree
from curvax.work import SolveCost, SystemWork

# A decomposition takes 6 n^3 operations at a third of the rate of a Cholesky factorization, which takes n^3 / 3.
_DECOMPOSITION = 54.0


@dataclasses.dataclass(frozen=True)
class Eigen(MatrixSolver):
    """s = V (Lambda + lam)^-1 V^T g with C = V Lambda V^T: dearer than `Cholesky`, and then for any number of lam.

    In row space (`RowSpace(Eigen())`) the matrix is the Gram matrix. Eigenvalues of C + lam I below rounding are left
    out (SINGULAR), negative ones enter by their magnitude (INDEFINITE).
    """

    @property
    def solves_several(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "eigenvalues"

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        size = tree.size(like)
        return ((EIGH, Request.of(jax.ShapeDtypeStruct((size, size), tree.scalar_dtype(like)))),)

    def system_cost(self, system: SystemWork) -> SolveCost:
        dense, matrix = system.dense_solve(), system.matrix()
        factorization = _DECOMPOSITION * dense.factorization
        more = factorization - dense.factorization
        cost = dataclasses.replace(dense, flops=dense.flops + more, factorization=factorization)
        cost = dataclasses.replace(cost, memory=matrix.memory + 5.0 * system.itemsize * system.unknowns**2)
        return SolveCost(cost, f"{system.unknowns} unknowns")

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        return jax.tree.map(lambda x: x[0], self.solve_several(system, rhs, lam[None]))

    def solve_several(self, system: System, rhs: PyTree, lams: jax.Array) -> Solution:
        b, unravel = tree.ravel(rhs)
        c = assemble(system, rhs).astype(b.dtype)
        pairs = eigh(c)

        def at(lam: jax.Array) -> Solution:
            x, result = by_magnitude(pairs, b, lam)
            return Solution(unravel(x), result, jnp.zeros((), jnp.int32), dense_residual(c, b, x, lam), ())

        return jax.vmap(at)(lams)
