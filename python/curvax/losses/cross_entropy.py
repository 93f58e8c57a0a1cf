"""Softmax cross entropy, with integer, one-hot or soft labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels._dispatch import Choice, Implementation, Op, Request
from curvax.kernels.softmax_hvp import SOFTMAX_HVP, softmax_hvp
from curvax.losses.base import (
    Loss,
    Shaped,
    accumulation_dtype,
    append_axes,
    exp_clipped,
    is_real,
    positions_shape,
    root,
    shaped,
    times,
    weigh,
)
from curvax.losses.batch_fault import BatchFault
from curvax.losses.rounding import MARGIN


@final
@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """l(f, y) = -sum_k y_k log p_k with p = softmax(f).

    Outputs are logits (*positions, classes) with at least one position axis. Targets are either integer labels shaped
    like the positions, or label rows y >= 0 shaped like the outputs (one-hot or soft, of any real dtype). Label rows
    need not sum to one: with the mass c = sum_k y_k

        gradient = c p - y,   H = c (diag p - p p^T),   S = sqrt(w c) diag(sqrt p) N,

    where the K - 1 columns of N are orthonormal to sqrt(p), so that N N^T = I - sqrt(p) sqrt(p)^T and S S^T = w H
    holds exactly: H has rank K - 1, and there are no more rows than that. N is the Householder reflection that takes
    sqrt(p) to the axis of the likeliest class, without that column; one class alone has a row of zeros.

    Logits of minus infinity rule a class out: its probability, gradient and curvature are zero. An integer label
    outside 0 .. classes - 1 is legal at zero weight (padding with -1 or -100) and as `ignore_index`; elsewhere it makes
    loss and gradient NaN, so that it cannot pass unseen: a step reports it as `BatchFault.LABEL_OUT_OF_RANGE`.

    Attributes:
      implementation: of the op `softmax_hvp` in `hessian_product`. With `None` (default) a method's plan chooses it by
        the method's backend, and outside a method the best supported one runs; what is named here runs, or raises.
      label_smoothing: share e of the mass that is spread evenly over the classes that the logits allow (all, unless
        some are minus infinity): y becomes (1 - e) y + e c / classes (Szegedy et al. 2016). Default 0.
      ignore_index: integer label of positions that do not count, as if they had weight zero; -100 in data prepared for
        PyTorch. Default `None`: there is none.
      reduction: see `Loss`.

    Raises:
      ValueError: `label_smoothing` is not in [0, 1).
    """

    label_smoothing: float = 0.0
    implementation: Implementation | Choice | None = dataclasses.field(default=None, kw_only=True)
    ignore_index: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Validates the configuration."""
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}: pass a number in [0, 1).")

    @property
    def leaves_out(self) -> bool:
        """Whether there is an `ignore_index`."""
        return self.ignore_index is not None

    def observed_weights(self, outputs: Shaped, targets: Any, weights: Any = None) -> Any:
        """Zero where the label is `ignore_index`; see `Loss.observed_weights`."""
        if self.ignore_index is None or len(targets.shape) == len(outputs.shape):
            return weights
        counted = jnp.asarray(targets).astype(jnp.int32) != self.ignore_index
        if weights is None:
            return counted
        w = append_axes(jnp.asarray(weights), counted.ndim)
        return jnp.where(counted, w, jnp.zeros_like(w))

    def batch_fault(self, outputs: Shaped, targets: Any, weights: Any = None, *, signed: bool = True) -> jax.Array:
        """Looks at integer labels too; see `Loss.batch_fault`."""
        fault = super().batch_fault(outputs, targets, weights, signed=signed)
        if len(targets.shape) == len(outputs.shape):
            return fault
        labels, counted = jnp.asarray(targets).astype(jnp.int32), self.observed_weights(outputs, targets, weights)
        known = (labels >= 0) & (labels < outputs.shape[-1])
        if counted is not None:
            known |= ~append_axes(jnp.asarray(counted).astype(jnp.bool_), labels.ndim)
        return jnp.where((fault == 0) & ~jnp.all(known), int(BatchFault.LABEL_OUT_OF_RANGE), fault).astype(jnp.int32)

    def value(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The loss sum_i w_i sum_k -y_ik log p_ik; see `Loss.value`."""
        log_p, y, _, weight = self._prepare(outputs, targets, weights)
        return -jnp.sum(weigh(weight[..., 0], jnp.sum(times(y, log_p), axis=-1)))

    def gradient(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The gradient weights (c p - y); see `Loss.gradient`."""
        log_p, y, mass, weight = self._prepare(outputs, targets, weights)
        return weigh(weight, mass * jnp.exp(log_p) - y)

    def rounding(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """That of any loss, and what each -log p of a certain p, the logarithm of a sum near 1, is off by.

        See `Loss.rounding`.
        """
        certain = tree.norm(weights) * jnp.asarray(MARGIN * float(jnp.finfo(weights.dtype).eps), weights.dtype)
        return super().rounding(outputs, targets, weights) + certain

    def hessian_product(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """The product weights c p (v - p.v); see `Loss.hessian_product`."""
        outputs, dtype = jnp.asarray(outputs), accumulation_dtype(outputs.dtype)
        mass = _mass(outputs, jnp.asarray(targets), dtype)
        v = v if tree.scalar_dtype((outputs, v)) == dtype else v.astype(dtype)
        return softmax_hvp(outputs, v, weigh(weights.astype(dtype), mass), implementation=self.implementation)

    def kernels(self, outputs: Shaped) -> tuple[tuple[Op, Request], ...]:
        """The op `softmax_hvp`, unless an implementation of it was named; see `Loss.kernels`."""
        if self.implementation is not None:
            return ()
        like = jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)
        return ((SOFTMAX_HVP, Request.of(like, jax.ShapeDtypeStruct(like.shape, accumulation_dtype(like.dtype)))),)

    def with_kernels(self, choices: Mapping[str, Choice]) -> SoftmaxCrossEntropy:
        """The same loss with the choice for `softmax_hvp`, if there is one; see `Loss.with_kernels`."""
        chosen = choices.get(SOFTMAX_HVP.name)
        return self if chosen is None else dataclasses.replace(self, implementation=chosen)

    def row_shape(self, outputs: Shaped) -> tuple[int, ...]:
        """One row less than classes; see `Loss.row_shape`."""
        return (*outputs.shape[:-1], max(outputs.shape[-1] - 1, 1))

    def factor(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, u: jax.Array) -> jax.Array:
        """S u = sqrt(weights c) sqrt(p) (N u); see `Loss.factor`."""
        log_p, _, mass, weight = self._prepare(outputs, targets, weights)
        root_p = jnp.exp(0.5 * log_p)
        return weigh(root(weight * mass), root_p * _complement(root_p, u.astype(log_p.dtype)))

    def factor_transpose(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """S^T v = sqrt(weights c) N^T (sqrt(p) v); see `Loss.factor_transpose`."""
        log_p, _, mass, weight = self._prepare(outputs, targets, weights)
        root_p = jnp.exp(0.5 * log_p)
        return weigh(root(weight * mass), _complement_transpose(root_p, root_p * v.astype(log_p.dtype)))

    def gradient_in_rows(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The rows t = sqrt(w) N^T (c p - y) / (sqrt(c) sqrt(p)); see `Loss.gradient_in_rows`.

        S t is the gradient because what N N^T takes away, sqrt(p) (c p - y) / sqrt(p) summed, is zero. y / sqrt(p) is
        taken from log p, so a confident wrong prediction keeps its full gradient until sqrt(p) itself underflows.
        """
        log_p, y, mass, weight = self._prepare(outputs, targets, weights)
        half = 0.5 * log_p
        root_mass = root(jnp.where(mass == 0, jnp.ones_like(mass), mass))
        rows = mass * jnp.exp(half) - times(y, exp_clipped(-half))
        return weigh(root(weight) / root_mass, _complement_transpose(jnp.exp(half), rows))

    def sample_targets(self, outputs: jax.Array, targets: jax.Array, key: jax.Array) -> jax.Array:
        """Labels drawn from the softmax; see `Loss.sample_targets`.

        Integer labels give integer labels of the same dtype, unless labels are smoothed. Otherwise the sample is a row
        y~, upcast and outputs-shaped, whose gradient is sqrt(c) (p - e_k) with k drawn from p: it is sqrt(c) times the
        preimage under smoothing of the one-hot row e_k (hence with small negative entries if e > 0). The mass c is
        read off the label rows, so these must be arrays.
        """
        z = jnp.asarray(outputs).astype(accumulation_dtype(outputs.dtype))
        label = jax.random.categorical(key, z, axis=-1).astype(jnp.int32)
        is_label = len(targets.shape) < z.ndim
        if is_label and not self.label_smoothing:
            return label.astype(targets.dtype)
        row = (_one_hot(label, z) - self.label_smoothing * _uniform(z)) / (1.0 - self.label_smoothing)
        if is_label:
            return row
        return root(jnp.sum(jnp.asarray(targets).astype(z.dtype), axis=-1, keepdims=True)) * row

    def _prepare(
        self, outputs: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The log p and smoothed label rows (outputs-shaped), mass and weight (with a last axis of one), all upcast."""
        z = jnp.asarray(outputs).astype(accumulation_dtype(outputs.dtype))
        weight = jnp.asarray(weights).astype(z.dtype)[..., None]
        z = jnp.where(weight == 0, jnp.zeros_like(z), z)
        y, mass = self._label_rows(z, jnp.asarray(targets))
        y = jnp.where(weight == 0, jnp.zeros_like(y), y)
        mass = jnp.where(weight == 0, jnp.zeros_like(mass), mass)
        return jax.nn.log_softmax(z, axis=-1), y, mass, weight

    def _label_rows(self, z: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        if targets.ndim < z.ndim:
            labels = targets.astype(jnp.int32)
            known = (labels >= 0) & (labels < z.shape[-1])
            y = jnp.where(known[..., None], _one_hot(labels, z), jnp.full((), jnp.nan, z.dtype))
        else:
            y = targets.astype(z.dtype)
        mass = _mass(z, targets, z.dtype)[..., None]
        if self.label_smoothing:
            y = (1.0 - self.label_smoothing) * y + self.label_smoothing * mass * _uniform(z)
        return y, mass

    def _check_targets(self, outputs: Shaped, targets: Any) -> None:
        logits, labels, positions = tuple(outputs.shape), shaped(targets, "labels"), positions_shape(outputs)
        if len(logits) < 2 or logits[-1] == 0:
            raise ValueError(
                f"the logits have shape {logits}: give them a leading batch axis and a last axis of classes "
                "(one logit per example is SigmoidBinaryCrossEntropy's case)."
            )
        if not is_real(labels.dtype):
            raise TypeError(f"the labels are of dtype {labels.dtype}: pass integer or real ones.")
        if labels.shape == logits:
            return
        if labels.shape != positions:
            raise ValueError(
                f"the labels have shape {labels.shape} with logits of shape {logits}: pass integer labels of shape "
                f"{positions} or label rows of shape {logits}."
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(
                f"labels of shape {labels.shape} must be integers but are {labels.dtype}: cast them with "
                f"labels.astype(int), or pass label rows of shape {logits}."
            )


def _mass(outputs: jax.Array, targets: jax.Array, dtype: Any) -> jax.Array:
    """The mass c of each position's labels."""
    if targets.ndim < outputs.ndim:
        return jnp.ones(outputs.shape[:-1], dtype)
    return jnp.sum(targets.astype(dtype), axis=-1)


def _complement(q: jax.Array, u: jax.Array) -> jax.Array:
    """N u (..., K) for u (..., K - 1) and the unit vector q >= 0.

    With the entries of q arranged so that the largest comes first, N is the reflection I - w w^T / (1 + q_1) without
    its first column, w = q + e_1 with w.w = 2 (1 + q_1). It takes q to -e_1, so its other columns are orthonormal to q.
    Any other axis than the largest would mix rows of a confident wrong prediction, whose entries of `gradient_in_rows`
    are huge, into all others, and lose these.
    """
    if q.shape[-1] == 1:
        return jnp.zeros_like(u * q)
    top = _largest(q)
    q = _swap(q, top)
    inside = _dot(q[..., 1:], u) / (1 + q[..., :1])
    return _swap(jnp.concatenate([-(1 + q[..., :1]) * inside, u - q[..., 1:] * inside], axis=-1), top)


def _complement_transpose(q: jax.Array, v: jax.Array) -> jax.Array:
    """N^T v (..., K - 1) for v (..., K)."""
    if q.shape[-1] == 1:
        return jnp.zeros_like(v * q)
    top = _largest(q)
    q, v = _swap(q, top), _swap(v, top)
    inside = v[..., :1] + _dot(q[..., 1:], v[..., 1:]) / (1 + q[..., :1])
    return v[..., 1:] - q[..., 1:] * inside


def _largest(q: jax.Array) -> jax.Array:
    """A mask of the first largest entry."""
    return _classes(q) == jnp.argmax(q, axis=-1, keepdims=True).astype(jnp.int32)


def _swap(x: jax.Array, top: jax.Array) -> jax.Array:
    """`x` with its first entry and the one that `top` marks exchanged."""
    marked = jnp.sum(jnp.where(top, x, jnp.zeros_like(x)), axis=-1, keepdims=True)
    return jnp.where(top, x[..., :1], jnp.where(_classes(x) == 0, marked, x))


def _classes(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # A contraction, not a sum of products: XLA for CPUs (jaxlib 0.10.2) miscompiles p * (u - sum(p * u)) where a vmap
    # leaves p unbatched and the result has more than 2^15 elements.
    return jnp.einsum("...k,...k->...", a, b, precision=jax.lax.Precision.HIGHEST)[..., None]


def _one_hot(labels: jax.Array, z: jax.Array) -> jax.Array:
    # A comparison, not a gather or scatter: it fuses into whatever reads it.
    return (labels[..., None] == _classes(z)).astype(z.dtype)


def _uniform(z: jax.Array) -> jax.Array:
    """The uniform distribution over the classes that the logits do not rule out."""
    allowed = (z > -jnp.inf).astype(z.dtype)
    return allowed / jnp.sum(allowed, axis=-1, keepdims=True)
