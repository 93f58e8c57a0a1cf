"""The pseudo-inverse of a small dense system, with a smooth cut-off of small eigenvalues.

An inverse that drops eigenvalues below a threshold jumps where one passes it, and a small perturbation of the data
makes another step. The smooth one has no such place:

    1 / (l (1 + (rcond l_max / l)^6))      times l
                                             1 |            .------      eigenvalues well above rcond l_max: inverted
                                               |          /
                                           1/2 |- - - - -+               at the threshold: half
                                               |       / :
                                             0 |_____-'__:_______ l      well below: left out
                                                    rcond l_max

An example: eigenvalues (1, 1e-2) and rcond = 1e-2 have the inverse (1 - 1e-12, 50).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Op, Request
from curvax.kernels.dense_linalg import EIGH, eigh
from curvax.solvers.base import Result, Solution, System, code
from curvax.solvers.dense import MatrixSolver, apply_function, assemble, dense_residual, rounding_floor
from curvax.tree import PyTree

_POWER = 6
"""NetKet's: an eigenvalue a tenth of the threshold counts a millionth."""


@dataclasses.dataclass(frozen=True)
class PseudoInverse(MatrixSolver):
    """s = V diag(1 / (d (1 + (rcond max d / d)^6))) V^T g, with d = |l| + lam for the eigenvalues l of C.

    For singular systems at little or no lam: variational Monte Carlo, fits with more parameters than data (NetKet's
    `pinv_smooth`; Medvidović and Sels 2022). In row space it is `RowSpace(PseudoInverse())`.

    The result says what became of the spectrum: CONVERGED where nothing was cut, SINGULAR where an inverse lost more
    than a hundredth (below 2.2 times the threshold) or was rounding and left out whole, INDEFINITE where C + lam I has
    a negative eigenvalue beyond rounding, whose magnitude was used. It costs a decomposition by eigenvalues, some 20
    Cholesky factorizations.

    Attributes:
      rcond: threshold, relative to the largest d; 0 for none but rounding. `None` for the root of the rounding unit,
        where half of an eigenvalue's digits are left.
    """

    rcond: float | None = None

    def __post_init__(self) -> None:
        if self.rcond is not None and not 0 <= self.rcond < 1:
            raise ValueError(f"rcond must be at least 0 and below 1, not {self.rcond}.")

    @property
    def name(self) -> str:
        return f"pseudo-inverse (rcond {'root of rounding' if self.rcond is None else format(self.rcond, 'g')})"

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        size, dtype = tree.size(like), tree.scalar_dtype(like)
        return ((EIGH, Request.of(jax.ShapeDtypeStruct((size, size), dtype))),)

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        b, unravel = tree.ravel(rhs)
        c = assemble(system, rhs).astype(b.dtype)
        finite = jnp.all(jnp.isfinite(c)) & jnp.all(jnp.isfinite(b))
        pairs = eigh(jnp.where(finite, c, jnp.eye(b.size, dtype=b.dtype)))
        mu = lam.astype(b.dtype)
        size, floor = jnp.abs(pairs.values) + mu, rounding_floor(pairs.values + mu)
        kept = jnp.where(size > floor, self._kept(size), jnp.zeros_like(size))
        usable = kept > 0
        inverse = jnp.where(usable, kept / jnp.where(usable, size, jnp.ones_like(size)), jnp.zeros_like(size))
        value = jnp.where(finite, apply_function(pairs, inverse, b), jnp.full_like(b, jnp.nan))
        cut = jnp.any(1 - kept > self.tolerance)
        result = jnp.where(cut, code(Result.SINGULAR), code(Result.CONVERGED))
        result = jnp.where(jnp.any(pairs.values + mu < -floor), code(Result.INDEFINITE), result)
        result = jnp.where(finite, result, code(Result.NON_FINITE))
        return Solution(unravel(value), result, jnp.zeros((), jnp.int32), dense_residual(c, b, value, lam), ())

    def _kept(self, size: jax.Array) -> jax.Array:
        """The share of each inverse that stays: 1 / (1 + (threshold / d)^6), with no overflow on the way."""
        rcond = float(jnp.finfo(size.dtype).eps) ** 0.5 if self.rcond is None else self.rcond
        threshold = rcond * jnp.max(size)
        below = jnp.minimum(size / jnp.where(threshold > 0, threshold, jnp.ones_like(threshold)), 1.0) ** _POWER
        above = jnp.minimum(threshold / jnp.where(size > 0, size, jnp.ones_like(size)), 1.0) ** _POWER
        kept = jnp.where(size >= threshold, 1 / (1 + above), below / (1 + below))
        return jnp.where(size > 0, kept, jnp.zeros_like(kept))
