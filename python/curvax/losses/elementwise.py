"""What losses share that are sums of scalar losses, one per output."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from curvax.losses.base import Loss, Shaped, accumulation_dtype, append_axes, is_real, root, shaped, weigh


@dataclasses.dataclass(frozen=True)
class ElementwiseLoss(Loss):
    """A loss l(f, y) = sum_k l(f_k, y_k).

    Targets have the outputs' shape; a last axis of length one may be missing from, or be extra in, either of them.
    Weights may also have the outputs' shape.
    """

    _weights_each_output: ClassVar[bool] = True

    def _prepare(self, outputs: jax.Array, targets: Any, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Outputs, targets (both outputs-shaped) and weights (broadcasting against them), all upcast."""
        f = jnp.asarray(outputs)
        f = f.astype(accumulation_dtype(f.dtype))
        y = jnp.asarray(targets)
        if not _same_but_last_one(y.shape, f.shape):
            raise ValueError(_mismatch(y.shape, f.shape))
        y = y.astype(f.dtype).reshape(f.shape)
        weight = append_axes(jnp.asarray(weights).astype(f.dtype), f.ndim)
        zero = jnp.zeros((), f.dtype)
        return jnp.where(weight == 0, zero, f), jnp.where(weight == 0, zero, y), weight

    def _check_targets(self, outputs: Shaped, targets: Any) -> None:
        spec = shaped(targets, "targets")
        if not is_real(spec.dtype):
            raise TypeError(f"the targets are of dtype {spec.dtype}: pass real ones.")
        if len(outputs.shape) == 0:
            raise ValueError("the outputs have no axis: give them a leading batch axis.")
        if not _same_but_last_one(spec.shape, outputs.shape):
            raise ValueError(_mismatch(spec.shape, outputs.shape))


@dataclasses.dataclass(frozen=True)
class DiagonalLoss(ElementwiseLoss):
    """An elementwise loss given by four scalar functions; Q and S = sqrt(Q) are diagonal."""

    def value(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """See `Loss.value`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return jnp.sum(weigh(weight, self._term(f, y)))

    def gradient(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """See `Loss.gradient`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return weigh(weight, self._slope(f, y))

    def hessian_product(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """See `Loss.hessian_product`."""
        f, _, weight = self._prepare(outputs, targets, weights)
        return weigh(weight, self._root_curvature(f) ** 2 * v.astype(f.dtype))

    def factor(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, u: jax.Array) -> jax.Array:
        """See `Loss.factor`."""
        f, _, weight = self._prepare(outputs, targets, weights)
        return weigh(root(weight), self._root_curvature(f) * u.astype(f.dtype))

    def factor_transpose(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """See `Loss.factor_transpose`; S is symmetric."""
        return self.factor(outputs, targets, weights, v)

    def gradient_in_rows(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The rows t = sqrt(w) l' / sqrt(l''); see `Loss.gradient_in_rows`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return weigh(root(weight), self._slope_over_root(f, y))

    @abc.abstractmethod
    def _term(self, f: jax.Array, y: jax.Array) -> jax.Array:
        """The scalar loss l(f, y), elementwise."""

    @abc.abstractmethod
    def _slope(self, f: jax.Array, y: jax.Array) -> jax.Array:
        """l'(f, y)."""

    @abc.abstractmethod
    def _root_curvature(self, f: jax.Array) -> jax.Array:
        """sqrt(l''(f)), which does not depend on y for the losses here (canonical links)."""

    @abc.abstractmethod
    def _slope_over_root(self, f: jax.Array, y: jax.Array) -> jax.Array:
        """l'(f, y) / sqrt(l''(f)), without forming the quotient where both are tiny."""


def _same_but_last_one(targets: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    targets, outputs = tuple(targets), tuple(outputs)
    return targets == outputs or (*targets, 1) == outputs or targets == (*outputs, 1)


def _mismatch(targets: tuple[int, ...], outputs: tuple[int, ...]) -> str:
    return (
        f"the targets have shape {tuple(targets)} with outputs of shape {tuple(outputs)}: reshape one to the other "
        "(nothing is broadcast, only a last axis of length one may be missing)."
    )
