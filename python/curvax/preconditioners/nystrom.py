"""The randomized Nystrom preconditioner."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.estimators.base import check_count
from curvax.estimators.nystrom import RandomizedNystrom
from curvax.preconditioners.base import Preconditioner, accept_finite
from curvax.tree import PyTree
from curvax.work import Cost, StepWork


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NystromState:
    """State of `NystromPreconditioner`.

    Attributes:
      basis: U, (n, rank), orthonormal columns on flattened parameters; zeros before the first refresh.
      values: (rank,), non-negative, descending.
      rejected: number of non-finite refreshes (int32).
    """

    basis: jax.Array
    values: jax.Array
    rejected: jax.Array


@dataclasses.dataclass(frozen=True)
class NystromPreconditioner(Preconditioner):
    """P^-1 = (l + lam) U (Lambda + lam)^-1 U^T + (I - U U^T), with U Lambda U^T a Nystrom approximation of C.

    l is the smallest value of Lambda: what U does not span is taken to have at most that curvature, and P is scaled
    to be 1 there, so P^-1 does not change when C and lam are rescaled together. For positive semidefinite C the
    condition number of P^-1/2 (C + lam I) P^-1/2 is at most (l + lam + |E|) / lam with E = C - U Lambda U^T; it pays
    off where `rank` reaches the effective dimension of C at lam, and not on flat spectra. See Frangella, Tropp and
    Udell, "Randomized Nystrom Preconditioning" (2023), section 5.

    Values below rounding relative to the largest, where the rank of C is smaller than `rank`, are raised to it in
    P^-1, so that it stays positive definite at lam = 0; for C = 0 it is the identity.

    Attributes:
      rank: number of directions; each costs one curvature product per refresh and n numbers of memory.
      every: steps from one refresh to the next. The default, 1, is the safe one; the cost of `rank` products usually
        asks for more.
      indefinite: see `RandomizedNystrom`; then the directions of positive curvature alone are preconditioned, at two
        products each. False by default.
    """

    rank: int
    every: int = 1
    indefinite: bool = False

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("every", self.every)

    @property
    def needs_product(self) -> bool:
        """True."""
        return True

    @property
    def needs_sampling(self) -> bool:
        """False."""
        return False

    def refresh_cost(self, work: StepWork) -> Cost:
        """A product for each direction."""
        return work.product.times(self.rank)

    def init(self, params_like: PyTree) -> NystromState:
        """The identity."""
        n, dtype = tree.size(params_like), tree.scalar_dtype(params_like)
        rank = min(self.rank, n)
        return NystromState(jnp.zeros((n, rank), dtype), jnp.zeros((rank,), dtype), jnp.zeros((), jnp.int32))

    def refresh(self, state: NystromState, linearization: Linearization, key: jax.Array) -> NystromState:
        """A new approximation in place of the old one."""
        if linearization.product is None:
            raise ValueError("NystromPreconditioner needs curvature products; linearize with `Needs(product=True)`.")
        low_rank = RandomizedNystrom(self.rank, self.indefinite).low_rank(
            linearization.product, linearization.params_like, key
        )
        refreshed = NystromState(
            low_rank.basis.astype(state.basis.dtype), low_rank.values.astype(state.values.dtype), state.rejected
        )
        return accept_finite(state, refreshed)

    def apply(self, state: NystromState, lam: jax.Array | float, v: PyTree) -> PyTree:
        """Two products with U: v + U (ratios - 1) U^T v."""
        if not state.values.size:
            return v
        flat, unravel = tree.ravel(v)
        flat = flat.astype(state.basis.dtype)
        ratios = self._ratios(state.values, jnp.asarray(lam).astype(state.values.dtype))
        highest = jax.lax.Precision.HIGHEST
        inside = jnp.matmul(state.basis.T, flat, precision=highest)
        flat = flat + jnp.matmul(state.basis, (ratios - 1) * inside, precision=highest)
        return tree.cast_like(unravel(flat), v)

    def _ratios(self, values: jax.Array, lam: jax.Array) -> jax.Array:
        """(l + lam) / (values + lam), in (0, 1]; 1 where that is 0 / 0."""
        level = jnp.maximum(values[-1], 10 * float(jnp.finfo(values.dtype).eps) * values[0])
        denominators = jnp.maximum(values, level) + lam
        nothing = denominators == 0
        one = jnp.ones_like(denominators)
        return jnp.where(nothing, one, (level + lam) / jnp.where(nothing, one, denominators))
