"""The op family diagonal_update: the vector work of Sophia and AdaHessian over all leaves of a pytree at once.

Parameters are pytrees of float64, float32, bfloat16 or float16; mean, average and gradient are alike and upcast:
float64 for float64 parameters, float32 for the others, and so is all arithmetic.

| op | reads | writes | FLOPs | (n: elements over all leaves)
|---|---|---|---|---|
| `diagonal_update` | 4 n (3 n without a mean) | 2 n, and n to undo a step | 14 n |
| `diagonal_accumulate` | 2 n; 3 n of two factors, n of block means | n, and n to undo it | 4 n; root mean square 10 n |

A step is taken as a whole or not at all, in place, and whether it may be taken is known only at its end: that costs one
more stream, of copies written (the native kernels) or of results looked at again (the reference).

Batching: `jax.vmap` over any of the operands is exact, each member being taken or not by itself. Partitioning: inside
`jax.shard_map` each device works on its shard, and `finite` and `scale` are the shard's own. A step over shards needs
one answer for all: see `diagonal_update`. Outside, the reference is partitioned by XLA like any JAX code; the native
handlers (C++ and CUDA) are not, so with several devices they are not taken there. Differentiation: none; the ops stay
off the differentiated path.

Papers: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training" (2023); Yao
et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning" (2021).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select, timed_on_hopper
from curvax.kernels._operands import floating, scalar
from curvax.kernels.diagonal_update import native, reference
from curvax.kernels.diagonal_update.rule import AccumulateRule, DiagonalEstimate, UpdateRule, UpdateScalars
from curvax.tree import PyTree, accumulation_dtype

_GAIN = "one pass over all leaves in one C++ call, in place"

_VARIANTS = (Variant("native", native.cannot, timed_on_hopper, gain=_GAIN), Variant("reference"))
DIAGONAL_UPDATE = Op("diagonal_update", _VARIANTS)
DIAGONAL_ACCUMULATE = Op("diagonal_accumulate", _VARIANTS)
OPS = (DIAGONAL_UPDATE, DIAGONAL_ACCUMULATE)


def diagonal_update(
    rule: UpdateRule,
    scalars: UpdateScalars,
    params: PyTree,
    mean: PyTree | None,
    average: PyTree,
    gradient: PyTree,
    *,
    sound: jax.Array | bool = True,
    decay_mask: PyTree | None = None,
    implementation: Implementation | Choice | None = None,
) -> tuple[PyTree, PyTree | None, jax.Array]:
    """One step of a diagonal method, if its outcome is finite.

    With m' = beta1 mean + (1 - beta1) gradient (without a mean, the gradient) and h = correction average:

        direction = clip(mean_correction m' / denominator(h), -clip, clip) + weight_decay params
        params' = params + rate direction

    where a denominator of 0 is replaced by `fallback`. All of params' is rounded to the dtypes of `params`; if any
    entry of it is not finite, no parameter changes. An entry of m' that is not finite is not stored, whatever becomes
    of the step. If `sound` is false nothing changes at all.

    Over shards each device judges its own: pass a `sound` that all agree on, and where `finite` differs between devices
    take the old parameters.

    Args:
      rule: denominator, beta1, clip.
      scalars: corrections, offset, fallback, weight decay, rate; cast to the dtype of each leaf.
      params: the parameters.
      mean: running mean of gradients; `None` exactly if `rule.beta1` is 0.
      average: running average of the diagonal, before its correction.
      gradient: the gradient.
      sound: a boolean scalar: whether the step may be taken at all. The default leaves it to the outcome.
      decay_mask: booleans (no tracers) in the structure of `params`: where weight decay applies; everywhere if `None`.
      implementation: None for the best supported one.

    Returns:
      The parameters, the mean, and whether the step was taken.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: trees differ in structure or shapes, or one is not of the accumulation dtype; `sound` is no boolean
        scalar, or one of `scalars` no real one.
      ValueError: `mean` does not go with `rule.beta1`.
    """
    if (mean is None) != (rule.beta1 == 0):
        raise ValueError(f"beta1 {rule.beta1:g} and mean do not go together: a mean is kept exactly if beta1 is not 0")
    op = DIAGONAL_UPDATE.name
    params, mean, average, gradient = floating(op, params=params, mean=mean, average=average, gradient=gradient)
    upcast = [("average", average), ("gradient", gradient)] + ([] if mean is None else [("mean", mean)])
    for name, tree in upcast:
        _check_wide(op, name, tree, params)
    decays = _flags(decay_mask, params)
    sound = jnp.asarray(sound)
    if sound.ndim or sound.dtype != bool:
        raise TypeError(f"{op}: sound is {sound.dtype}{sound.shape}: pass one boolean, such as `jnp.all(...)`")
    names = [field.name for field in dataclasses.fields(scalars)]
    scalars = UpdateScalars(**{name: scalar(op, name, getattr(scalars, name)) for name in names})
    operands = (rule, scalars, params, mean, average, gradient, sound, decays)
    if select(DIAGONAL_UPDATE, implementation, Request.of(params)).implementation == "native":
        return native.diagonal_update(*operands)
    return reference.diagonal_update(*operands)


def diagonal_accumulate(
    rule: AccumulateRule,
    average: PyTree,
    estimate: DiagonalEstimate,
    correction: jax.Array | float = 1.0,
    *,
    implementation: Implementation | Choice | None = None,
) -> tuple[PyTree, jax.Array, jax.Array]:
    """One more estimate in the running average of the diagonal, if the outcome is finite.

    The new average is beta2 average + (1 - beta2) estimate, or sqrt(beta2 average^2 + (1 - beta2) estimate^2), computed
    so that no square over- or underflows.

    Args:
      rule: beta2, and which of the two means.
      average: running average, in the accumulation dtype.
      estimate: the estimate, as its factors.
      correction: what the average is to be multiplied by, a scalar.
      implementation: None for the best supported one.

    Returns:
      The new average, or the old one where the new one is not finite; the mean magnitude of correction times the new
      average, 0 for an empty tree, in the widest dtype; whether that, and so the average, is finite.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: trees differ in structure, shapes do not go together, a dtype is not floating, or the average not
        upcast.
      ValueError: the estimate has another number of factors than its kind asks for.
    """
    wanted = 2 if estimate.kind in ("product", "magnitude") else 1
    if len(estimate.factors) != wanted:
        raise ValueError(f'an estimate of kind "{estimate.kind}" has {wanted} factors, not {len(estimate.factors)}')
    op = DIAGONAL_ACCUMULATE.name
    named = {f"factor {i} of the estimate": factor for i, factor in enumerate(estimate.factors)}
    average, *factors = floating(op, average=average, **named)
    estimate = DiagonalEstimate(tuple(factors), estimate.kind)
    _check_wide(op, "average", average, average)
    for i, factor in enumerate(estimate.factors):
        _check_factor(i, factor, average, broadcasts=estimate.kind == "value")
    correction = scalar(op, "correction", correction)
    if select(DIAGONAL_ACCUMULATE, implementation, Request.of(average)).implementation == "native":
        return native.diagonal_accumulate(rule, average, estimate, correction)
    return reference.diagonal_accumulate(rule, average, estimate, correction)


def _check_structure(op: str, name: str, tree: PyTree, like: PyTree) -> None:
    actual, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if actual != expected:
        raise TypeError(f"{op}: {name} has structure {actual}, expected {expected}: pass trees alike")


def _check_wide(op: str, name: str, tree: PyTree, params: PyTree) -> None:
    """Raises TypeError unless `tree` is an upcast tree over `params`."""
    _check_structure(op, name, tree, params)
    for i, (leaf, p) in enumerate(zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True)):
        expected = f"{accumulation_dtype(p.dtype)}{p.shape}"
        if f"{leaf.dtype}{leaf.shape}" != expected:
            raise TypeError(f"{op}: leaf {i} of {name} is {leaf.dtype}{leaf.shape}, expected {expected}: upcast it")


def _check_factor(index: int, factor: PyTree, average: PyTree, *, broadcasts: bool) -> None:
    """Raises TypeError unless the leaves of a factor have the shapes of the average, or broadcast to them."""
    name = f"factor {index} of the estimate"
    _check_structure("diagonal_accumulate", name, factor, average)
    for i, (leaf, a) in enumerate(zip(jax.tree.leaves(factor), jax.tree.leaves(average), strict=True)):
        alike = len(leaf.shape) == len(a.shape) and all(
            d == e or (broadcasts and d == 1) for d, e in zip(leaf.shape, a.shape, strict=True)
        )
        if not alike:
            raise TypeError(
                f"diagonal_accumulate: leaf {i} of {name} has shape {leaf.shape}, expected {a.shape}: pass trees alike"
            )


def _flags(mask: PyTree | None, params: PyTree) -> tuple[bool, ...]:
    if mask is None:
        return (True,) * len(jax.tree.leaves(params))
    _check_structure("diagonal_update", "decay_mask", mask, params)
    flags = jax.tree.leaves(mask)
    if any(np.ndim(flag) for flag in flags):
        raise TypeError("diagonal_update: decay_mask has arrays for leaves: give each parameter one boolean")
    return tuple(bool(flag) for flag in flags)
