"""sampled_softmax_residual, and the residual at a label of `jax.random.categorical`, which draws a number per class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, accelerated, implementations, over_and_over, repeats
from curvax.kernels import sampled_softmax_residual as op
from curvax.kernels.sampled_softmax_residual.workloads import WORKLOADS
from curvax.kernels.softmax_hvp.workloads import Workload

_CATEGORICAL = "jax.random.categorical"
_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """Every workload in float32, random numbers included; logits read once, residuals written once."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        if work.large and not accelerated():
            continue
        size = work.rows * work.columns
        count = repeats(max(2, min(200, 20_000_000 // size)))
        yield Case(
            f"sampled_softmax_residual, {work.name}",
            f"{work.rows} x {work.columns}",
            lambda work=work, count=count: _candidates(work, count),
            count,
            2 * size * _FLOAT,
        )


def _candidates(work: Workload, count: int) -> list[run.Candidate]:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(work.rows, work.columns)), jnp.float32)

    def categorical(z: jax.Array, key: jax.Array) -> jax.Array:
        return jax.nn.softmax(z) - jax.nn.one_hot(jax.random.categorical(key, z), z.shape[-1], dtype=z.dtype)

    results = []
    for name in implementations(op.OPS, logits):

        def sampled(z: jax.Array, key: jax.Array, name: Any = name) -> jax.Array:
            return op.sampled_softmax_residual(z, jax.random.uniform(key, z.shape[:-1]), implementation=name)[0]

        baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 1.0)
        results.append(_looped(name, sampled, logits, count, baseline, goal))
    return [*results, _looped(_CATEGORICAL, categorical, logits, count, REFERENCE, None)]


def _looped(
    name: str,
    sampled: Callable[[jax.Array, jax.Array], jax.Array],
    logits: jax.Array,
    count: int,
    baseline: str | None,
    goal: float | None,
) -> run.Candidate:
    """The residual over and over, each with a key of its own and as the next one's logits."""

    def body(carry: tuple[jax.Array, jax.Array], _: Any) -> tuple[jax.Array, jax.Array]:
        z, seed = carry
        return sampled(z, jax.random.key(seed)), seed + 1

    step = over_and_over(body, count)
    first = (logits, jnp.zeros((), jnp.uint32))
    return run.Candidate(
        name, lambda carry: step(carry, ()), lambda: jax.tree.map(jnp.copy, first), baseline=baseline, goal=goal
    )
