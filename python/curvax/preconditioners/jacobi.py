"""The Jacobi (diagonal) preconditioner."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.estimators.base import DiagonalEstimator, check_count
from curvax.kernels._dispatch import Choice, Op, Request
from curvax.preconditioners._diagonal import divide, mean_magnitude
from curvax.preconditioners.base import Preconditioner, accept_finite
from curvax.tree import PyTree
from curvax.work import Cost, StepWork


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JacobiState:
    """State of `Jacobi`.

    Attributes:
      diagonal: the latest estimate of diag(C), an upcast tree; zeros before the first refresh.
      scale: mean magnitude of `diagonal` over all parameters.
      rejected: number of non-finite refreshes (int32).
    """

    diagonal: PyTree
    scale: jax.Array
    rejected: jax.Array


@dataclasses.dataclass(frozen=True)
class Jacobi(Preconditioner):
    """P^-1 v = v / (max(d, 0) + lam), with d the latest estimate of diag(C).

    A denominator of 0 (no positive curvature seen in that entry, and no damping) is replaced by the mean magnitude of
    d over all parameters: the step such an entry gets is that of an average one. If d is 0 everywhere, as before the
    first refresh, it is replaced by 1.

    Attributes:
      estimator: what estimates d.
      every: steps from one refresh to the next. The default, 1, keeps d in step with C.
      add_lam: whether lam enters the denominator. True (default) suits solvers for C + lam I.
    """

    estimator: DiagonalEstimator
    every: int = 1
    add_lam: bool = True

    def __post_init__(self) -> None:
        check_count("every", self.every)

    @property
    def needs_product(self) -> bool:
        """As the estimator."""
        return self.estimator.needs_product

    @property
    def needs_sampling(self) -> bool:
        """As the estimator."""
        return self.estimator.needs_sampling

    @property
    def needs_rows(self) -> bool:
        """As the estimator."""
        return self.estimator.needs_rows

    def refresh_cost(self, work: StepWork) -> Cost:
        """The estimator's."""
        return self.estimator.cost(work)

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The estimator's."""
        return self.estimator.kernels(upcast)

    def with_kernels(self, choices: Mapping[str, Choice]) -> Jacobi:
        """The estimator's choices."""
        return dataclasses.replace(self, estimator=self.estimator.with_kernels(choices))

    def init(self, params_like: PyTree) -> JacobiState:
        """No curvature seen."""
        return JacobiState(
            tree.zeros_like(params_like),
            jnp.zeros((), tree.scalar_dtype(params_like)),
            jnp.zeros((), jnp.int32),
        )

    def refresh(self, state: JacobiState, linearization: Linearization, key: jax.Array) -> JacobiState:
        """A new estimate in place of the old one."""
        diagonal = tree.cast_like(self.estimator.diagonal(linearization, key), state.diagonal)
        return accept_finite(state, JacobiState(diagonal, mean_magnitude(diagonal), state.rejected))

    def apply(self, state: JacobiState, lam: jax.Array | float, v: PyTree) -> PyTree:
        """Entrywise division."""

        def leaf(d: jax.Array, x: jax.Array) -> jax.Array:
            denominator = jnp.maximum(d, jnp.zeros_like(d))
            if self.add_lam:
                denominator = denominator + jnp.asarray(lam).astype(d.dtype)
            return divide(x, denominator, state.scale)

        return jax.tree.map(leaf, state.diagonal, v)
