"""Each op of `diagonal_update`, and an Optax chain that makes the same step without asking whether it is finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, implementations, over_and_over, repeats
from curvax.kernels import diagonal_update as ops
from curvax.kernels.diagonal_update.workloads import WORKLOADS
from curvax.kernels.tree_cg.workloads import Workload

_OPTAX = "optax chain, unchecked"
_FLOAT = 4
_SOPHIA = ops.UpdateRule(ops.DenominatorRule("floor", slope=0.05), beta1=0.965, clip=1.0)
_ADAHESSIAN = ops.UpdateRule(ops.DenominatorRule("power"), beta1=0.9)
_SCALARS = ops.UpdateScalars(1.5, 1.2, 1e-8, 0.05, 0.2, -1e-4)
_GNB = ops.AccumulateRule(0.99)
_HUTCHINSON = ops.AccumulateRule(0.999, root_mean_square=True)


def cases(quick: bool) -> Iterator[Case]:
    """Both ops as Sophia and as AdaHessian use them, on every workload.

    Bytes of an update: four vectors read, two written, and one more stream without which a step could not be undone in
    place. Of an accumulation: two vectors read (three for z and C z), one written, and the same one more.
    """
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        size = sum(int(np.prod(shape)) for shape in work.shapes)
        count = repeats(max(2, min(200, 20_000_000 // size)), len(work.shapes))
        for name, streams, build in (
            ("diagonal_update, sophia", 7, lambda w, r: _updates(w, r, _SOPHIA)),
            ("diagonal_update, adahessian", 7, lambda w, r: _updates(w, r, _ADAHESSIAN)),
            ("diagonal_accumulate, square", 4, lambda w, r: _accumulations(w, r, _GNB, "square")),
            ("diagonal_accumulate, product", 5, lambda w, r: _accumulations(w, r, _GNB, "product")),
            ("diagonal_accumulate, row means", 3, lambda w, r: _accumulations(w, r, _HUTCHINSON, "value")),
        ):
            yield Case(
                f"{name}, {work.name}",
                f"{size} floats",
                lambda work=work, count=count, build=build: build(work, count),
                count,
                streams * size * _FLOAT,
            )


def _vectors(work: Workload, count: int) -> list[list[jax.Array]]:
    rng = np.random.default_rng(0)
    return [[jnp.asarray(0.1 + rng.random(size=s), jnp.float32) for s in work.shapes] for _ in range(count)]


def _looped(body: Callable[[Any, Any], Any], count: int, first: Any, fixed: Any) -> run.Candidate:
    step = over_and_over(body, count)
    return run.Candidate("", lambda c: step(c, fixed), lambda: jax.tree.map(jnp.copy, first))


def _named(candidate: run.Candidate, name: str) -> run.Candidate:
    baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 1.0 if name != _OPTAX else None)
    return run.Candidate(name, candidate.step, candidate.carry, baseline=baseline, goal=goal)


def _updates(work: Workload, count: int, rule: ops.UpdateRule) -> list[run.Candidate]:
    params, mean, average, gradient = _vectors(work, 4)
    results = []
    for name in implementations((ops.DIAGONAL_UPDATE,), params):

        def body(carry: Any, fixed: Any, name: Any = name) -> Any:
            params, mean, _ = carry
            return ops.diagonal_update(rule, _SCALARS, params, mean, *fixed, implementation=name)

        first = (params, mean, jnp.asarray(True))
        results.append(_named(_looped(body, count, first, (average, gradient)), name))
    results.append(_named(_optax(rule, count, params, mean, average, gradient), _OPTAX))
    return results


def _optax(rule: ops.UpdateRule, count: int, params: Any, mean: Any, average: Any, gradient: Any) -> run.Candidate:
    """The mean, the quotient, and Optax's clip, weight decay and learning rate; nothing is looked at again."""
    chain = optax.chain(
        optax.clip(rule.clip) if np.isfinite(rule.clip) else optax.identity(),
        optax.add_decayed_weights(0.2),
        optax.scale_by_learning_rate(1e-4),
    )

    def body(carry: Any, fixed: Any) -> Any:
        params, mean, state = carry
        average, gradient = fixed
        mean = optax.tree.update_moment(gradient, mean, rule.beta1, 1)
        slope = rule.denominator.slope
        direction = jax.tree.map(lambda m, h: 1.5 * m / jnp.maximum(slope * 1.2 * h, 1e-8), mean, average)
        update, state = chain.update(direction, state, params)
        return optax.apply_updates(params, update), mean, state

    return _looped(body, count, (params, mean, chain.init(params)), (average, gradient))


def _accumulations(work: Workload, count: int, rule: ops.AccumulateRule, kind: Any) -> list[run.Candidate]:
    average, a, b = _vectors(work, 3)
    if kind == "value":
        a = [leaf.mean(axis=-1, keepdims=True) if leaf.ndim > 1 else leaf for leaf in a]
    factors = (a, b) if kind == "product" else (a,)
    results = []
    for name in implementations((ops.DIAGONAL_ACCUMULATE,), average):

        def body(carry: Any, fixed: Any, name: Any = name) -> Any:
            estimate = ops.DiagonalEstimate(fixed, kind)
            return ops.diagonal_accumulate(rule, carry[0], estimate, 1.2, implementation=name)

        first = (average, jnp.zeros(()), jnp.asarray(True))
        results.append(_named(_looped(body, count, first, factors), name))
    return results
