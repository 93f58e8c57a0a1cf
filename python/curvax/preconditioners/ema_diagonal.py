"""Running averages of a diagonal: the preconditioners of Sophia and AdaHessian."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.estimators.base import DiagonalEstimator, check_count
from curvax.kernels._dispatch import Choice, Implementation, Op, Request
from curvax.kernels.diagonal_update import (
    DIAGONAL_ACCUMULATE,
    AccumulateRule,
    DenominatorRule,
    diagonal_accumulate,
)
from curvax.numbers import Number, as_dtype, check_fraction, check_not_negative, check_positive, is_known
from curvax.preconditioners._diagonal import divide
from curvax.preconditioners.base import Preconditioner
from curvax.tree import PyTree


class Denominator(abc.ABC):
    """How an averaged diagonal h becomes a denominator.

    Floors are relative to `scale`, the mean of |h| over all parameters, so that rescaling the loss rescales them too.
    """

    @property
    @abc.abstractmethod
    def root_mean_square(self) -> bool:
        """Whether h averages the squares of the diagonal (and takes the root) instead of the diagonal itself."""

    @abc.abstractmethod
    def denominator(self, h: jax.Array, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """The denominator of one leaf, non-negative; all arguments in the dtype of h, `scale` and `lam` scalar."""

    @abc.abstractmethod
    def fallback(self, scale: jax.Array) -> jax.Array:
        """What replaces a denominator of 0: that of an entry of average curvature; 0 only if `scale` is."""

    @property
    def rule(self) -> DenominatorRule | None:
        """The same denominator as the op `diagonal_update` knows it; `None` if it does not."""
        return None

    def offset(self, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """The offset that `rule` leaves open; arguments as for `denominator`."""
        raise NotImplementedError(f"{type(self).__name__} has no rule, so it has no offset.")


@dataclasses.dataclass(frozen=True)
class SophiaFloor(Denominator):
    """max(gamma h, eps scale): with momentum m above it and a clip to 1 behind it, Sophia's step.

    See Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training" (2023).
    Where the curvature is negative or nearly none the floor makes the quotient so large that the clip turns it into a
    sign.

    Attributes:
      gamma: how much of the curvature counts; the larger, the fewer entries are clipped. The default, 0.05, is the
        authors' for Gauss-Newton-Bartlett; they take 0.01 with Hutchinson.
      eps: floor relative to the mean magnitude of h. The default, 1e-8, is small enough that the clip decides, and
        far from overflow.
    """

    gamma: Number = 0.05
    eps: Number = 1e-8

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)
        check_not_negative("eps", self.eps)

    @property
    def root_mean_square(self) -> bool:
        """False."""
        return False

    def denominator(self, h: jax.Array, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """max(gamma h, eps scale); `lam` plays no part."""
        return jnp.maximum(self.fallback(h), self.offset(scale, lam))

    def fallback(self, scale: jax.Array) -> jax.Array:
        """Gamma scale."""
        return as_dtype(self.gamma, scale.dtype) * scale

    @property
    def rule(self) -> DenominatorRule | None:
        """A floor, of a gamma that is known."""
        return DenominatorRule("floor", slope=float(self.gamma)) if is_known(self.gamma) else None

    def offset(self, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """Eps scale."""
        return as_dtype(self.eps, scale.dtype) * scale


@dataclasses.dataclass(frozen=True)
class AdaHessianPower(Denominator):
    """h^power + eps scale^power, with h the root of the averaged squares of the diagonal.

    See Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning" (2021).

    Attributes:
      power: the Hessian power. The default, 1, is the authors'; less damps the differences between entries, and makes
        the step depend on the scale of the loss to the power 1 - power.
      eps: relative floor. The default, 1e-4, is the authors' figure, which they use as an absolute one.
    """

    power: Number = 1.0
    eps: Number = 1e-4

    def __post_init__(self) -> None:
        check_positive("power", self.power)
        check_not_negative("eps", self.eps)

    @property
    def root_mean_square(self) -> bool:
        """True."""
        return True

    def denominator(self, h: jax.Array, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """h^power + eps scale^power; `lam` plays no part."""
        return self.fallback(h) + self.offset(scale, lam)

    def fallback(self, scale: jax.Array) -> jax.Array:
        """scale^power."""
        if is_known(self.power) and self.power == 1:
            return scale
        return scale ** as_dtype(self.power, scale.dtype)

    @property
    def rule(self) -> DenominatorRule | None:
        """A power that is known."""
        return DenominatorRule("power", power=float(self.power)) if is_known(self.power) else None

    def offset(self, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """Eps scale^power."""
        return as_dtype(self.eps, scale.dtype) * self.fallback(scale)


@dataclasses.dataclass(frozen=True)
class Damped(Denominator):
    """max(h, 0) + lam, for use inside a solver for C + lam I."""

    @property
    def root_mean_square(self) -> bool:
        """False."""
        return False

    def denominator(self, h: jax.Array, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """max(h, 0) + lam."""
        return jnp.maximum(h, jnp.zeros_like(h)) + lam

    def fallback(self, scale: jax.Array) -> jax.Array:
        """The scale itself."""
        return scale

    @property
    def rule(self) -> DenominatorRule:
        """Damped."""
        return DenominatorRule("damped")

    def offset(self, scale: jax.Array, lam: jax.Array) -> jax.Array:
        """Lam."""
        return lam


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
