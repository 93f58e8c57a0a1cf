"""Running averages of a diagonal: the preconditioners of Sophia and AdaHessian."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.estimators.base import DiagonalEstimator, check_count
from curvax.kernels._dispatch import Choice, Implementation, Op, Request
from curvax.kernels.diagonal_update import DIAGONAL_ACCUMULATE, AccumulateRule, diagonal_accumulate
from curvax.numbers import Number, as_dtype, check_fraction, is_known
from curvax.preconditioners._diagonal import divide
from curvax.preconditioners.base import Preconditioner
from curvax.preconditioners.denominators import Damped, Denominator
from curvax.tree import PyTree
from curvax.work import Cost, StepWork


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmaDiagonalState:
    """State of `EmaDiagonal`.

    Attributes:
      average: running average, an upcast tree in the units of the diagonal; before bias correction; zeros at first.
      scale: mean magnitude of the bias-corrected average over all parameters.
      count: number of refreshes in the average (int32).
      rejected: number of non-finite refreshes (int32).
    """

    average: PyTree
    scale: jax.Array
    count: jax.Array
    rejected: jax.Array


@dataclasses.dataclass(frozen=True)
class EmaDiagonal(Preconditioner):
    """P^-1 v = v / denominator(h), with h an exponential moving average of estimates of diag(C).

    A denominator of 0 is replaced by that of an entry of average curvature, and by 1 if h is 0 everywhere, as before
    the first refresh.

    Attributes:
      estimator: what estimates the diagonal.
      beta2: weight of the past, in [0, 1). The default, 0.99, is Sophia's; AdaHessian's is 0.999.
      every: steps from one refresh to the next; Sophia's is 10. The default, 1, is AdaHessian's.
      denominator: how h becomes a denominator; `Damped()` by default.
      bias_correction: divide by 1 - beta2^t, so that h is a mean of the estimates from the first refresh on. True by
        default; the authors' Sophia has none.
      accumulate: implementation of `diagonal_accumulate`, by name or as the planner's choice; `None` takes the best
      one.
    """

    estimator: DiagonalEstimator
    beta2: Number = 0.99
    every: int = 1
    denominator: Denominator = Damped()
    bias_correction: bool = True
    accumulate: Implementation | Choice | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_fraction("beta2", self.beta2)

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

    @property
    def entrywise(self) -> EmaDiagonal:
        """Itself."""
        return self

    def refresh_cost(self, work: StepWork) -> Cost:
        """The estimator's."""
        return self.estimator.cost(work)

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The accumulation's and the estimator's."""
        return ((DIAGONAL_ACCUMULATE, Request.of(upcast)), *self.estimator.kernels(upcast))

    def with_kernels(self, choices: Mapping[str, Choice]) -> EmaDiagonal:
        """Its own choice and the estimator's."""
        accumulate = choices.get(DIAGONAL_ACCUMULATE.name, self.accumulate)
        return dataclasses.replace(self, estimator=self.estimator.with_kernels(choices), accumulate=accumulate)

    def init(self, params_like: PyTree) -> EmaDiagonalState:
        """No curvature seen."""
        # Two zeros, not one twice: a buffer cannot be donated twice.
        counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        scale = jnp.zeros((), tree.scalar_dtype(params_like))
        return EmaDiagonalState(tree.zeros_like(params_like), scale, *counts)

    def refresh(self, state: EmaDiagonalState, linearization: Linearization, key: jax.Array) -> EmaDiagonalState:
        """One more estimate in the average; one that is not finite leaves it as it was.

        For root mean squares the average is the root and not the square: a square would overflow or underflow with the
        curvature of a rescaled loss.
        """
        count = state.count + 1
        average, scale, finite = diagonal_accumulate(
            AccumulateRule(self.beta2, self.denominator.root_mean_square),
            state.average,
            self.estimator.estimate(linearization, key),
            self.correction(count),
            implementation=self.accumulate if is_known(self.beta2) else "reference",
        )
        return EmaDiagonalState(
            average=average,
            scale=jnp.where(finite, scale, state.scale),
            count=jnp.where(finite, count, state.count),
            rejected=state.rejected + (~finite).astype(jnp.int32),
        )

    def apply(self, state: EmaDiagonalState, lam: jax.Array | float, v: PyTree) -> PyTree:
        """Entrywise division."""
        correction = self.correction(state.count)

        def leaf(average: jax.Array, x: jax.Array) -> jax.Array:
            dtype = average.dtype
            scale = state.scale.astype(dtype)
            h = average * correction.astype(dtype)
            denominator = self.denominator.denominator(h, scale, jnp.asarray(lam).astype(dtype))
            return divide(x, denominator, self.denominator.fallback(scale))

        return jax.tree.map(leaf, state.average, v)

    def correction(self, count: jax.Array) -> jax.Array:
        """What the average of `count` estimates is multiplied by: 1 / (1 - beta2^count) or its root; 1 before any."""
        dtype = jnp.result_type(float)
        if not self.bias_correction or (is_known(self.beta2) and self.beta2 == 0):
            return jnp.ones((), dtype)
        log = math.log(self.beta2) if is_known(self.beta2) else jnp.log(as_dtype(self.beta2, dtype))
        gathered = -jnp.expm1(log * jnp.maximum(count, 1).astype(dtype))
        weight = jnp.where(count > 0, gathered, jnp.ones_like(gathered))
        return 1 / (jnp.sqrt(weight) if self.denominator.root_mean_square else weight)
