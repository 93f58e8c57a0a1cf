"""How the diagonal of a curvature becomes the denominator of a step."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from curvax.kernels.diagonal_update import DenominatorRule
from curvax.numbers import Number, as_dtype, check_not_negative, check_positive, is_known


class Denominator(abc.ABC):
    """How an averaged diagonal h becomes a denominator.

    An implementor writes `root_mean_square`, `denominator` and `fallback`; one that the op `diagonal_update` knows has
    a `rule` and its `offset` too.

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
