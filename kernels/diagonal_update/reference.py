"""diagonal_update in plain JAX: any platform, any floating dtypes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels.diagonal_update.rule import (
    AccumulateRule,
    DenominatorRule,
    DiagonalEstimate,
    UpdateRule,
    UpdateScalars,
)
from curvax.numbers import as_dtype, root
from curvax.tree import PyTree, all_finite, cast_like, scalar_dtype, size


def diagonal_update(
    rule: UpdateRule,
    scalars: UpdateScalars,
    params: PyTree,
    mean: PyTree | None,
    average: PyTree,
    gradient: PyTree,
    sound: jax.Array,
    decays: tuple[bool, ...],
) -> tuple[PyTree, PyTree | None, jax.Array]:
    """See `api.diagonal_update`; `decays` says of each leaf whether weight decay applies."""
    structure = jax.tree.structure(params)
    raw = gradient
    if mean is not None:
        raw = jax.tree.map(lambda m, g: rule.beta1 * m + (1 - rule.beta1) * g, mean, gradient)

    def leaf(p: jax.Array, r: jax.Array, a: jax.Array, decay: bool) -> jax.Array:
        s = jax.tree.map(lambda x: jnp.asarray(x).astype(a.dtype), scalars)
        direction = s.mean_correction * r if mean is not None else r
        direction = direction / _denominator(rule.denominator, a * s.correction, s.offset, s.fallback)
        if rule.clip < math.inf:
            direction = jnp.clip(direction, -rule.clip, rule.clip)
        upcast = p.astype(a.dtype)
        if decay:
            direction = direction + s.weight_decay * upcast
        return (upcast + s.rate * direction).astype(p.dtype)

    after = jax.tree.map(leaf, params, raw, average, jax.tree.unflatten(structure, decays))
    finite = sound & all_finite(after)
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, params)
    if mean is None:
        return chosen, None, finite
    kept = jax.tree.map(lambda new, old: jnp.where(sound & jnp.isfinite(new), new, old), raw, mean)
    return chosen, kept, finite


def _denominator(rule: DenominatorRule, h: jax.Array, offset: jax.Array, fallback: jax.Array) -> jax.Array:
    if rule.kind == "floor":
        denominator = jnp.maximum(rule.slope * h, offset)
    elif rule.kind == "power":
        denominator = (h if rule.power == 1 else h**rule.power) + offset
    else:
        denominator = jnp.maximum(h, jnp.zeros_like(h)) + offset
    return jnp.where(denominator > 0, denominator, fallback)


def diagonal_accumulate(
    rule: AccumulateRule, average: PyTree, estimate: DiagonalEstimate, correction: jax.Array
) -> tuple[PyTree, jax.Array, jax.Array]:
    """See `api.diagonal_accumulate`."""
    dtype = scalar_dtype(average)

    def mix(a: jax.Array, d: jax.Array) -> jax.Array:
        beta2 = as_dtype(rule.beta2, a.dtype)
        if rule.root_mean_square:
            return jnp.hypot(root(beta2) * a, root(1 - beta2) * d)
        return beta2 * a + (1 - beta2) * d

    # Squares and products of narrow factors would lose digits, or overflow (float16: from 256 on).
    upcast = DiagonalEstimate(tuple(cast_like(factor, average) for factor in estimate.factors), estimate.kind)
    mixed = jax.tree.map(mix, average, upcast.value())
    total = sum((jnp.sum(jnp.abs(leaf)).astype(dtype) for leaf in jax.tree.leaves(mixed)), np.zeros((), dtype))
    # One entry that is not finite spoils the sum.
    scale = jnp.asarray(total / max(size(mixed), 1) * correction.astype(dtype))
    finite = jnp.isfinite(scale)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), mixed, average), scale, finite
