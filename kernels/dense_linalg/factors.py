"""What the dense factorizations give; every field has the batch axes in front."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CholeskyFactor:
    """A = L L^T.

    Attributes:
      lower: L, (..., n, n), zeros above the diagonal; NaN where there is none.
      result: a `curvax.solvers.Result` per matrix, int32: CONVERGED, NOT_POSITIVE_DEFINITE (a pivot is not positive)
        or NON_FINITE.
    """

    lower: jax.Array
    result: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """A = V diag(values) V^T.

    Attributes:
      values: (..., n), rising; NaN where the decomposition failed.
      vectors: V, (..., n, n): column j belongs to value j, orthonormal, of either sign.
      result: a `curvax.solvers.Result` per matrix, int32: CONVERGED, MAX_ITERATIONS (it did not converge, which has
        not been seen of a finite matrix) or NON_FINITE.
    """

    values: jax.Array
    vectors: jax.Array
    result: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QrFactors:
    """A = Q R, with k = min(m, n).

    Attributes:
      q: (..., m, k), orthonormal columns, also where those of A depend on each other; NaN where A is not finite.
      r: (..., k, n), zeros below the diagonal, whose entries have either sign.
      result: a `curvax.solvers.Result` per matrix, int32: CONVERGED or NON_FINITE.
    """

    q: jax.Array
    r: jax.Array
    result: jax.Array
