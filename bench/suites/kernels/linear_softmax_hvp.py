"""linear_softmax_hvp, and the product as one writes it in JAX: all logits in memory, by jvp and vjp of the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import Case, implementations, over_and_over, repeats
from curvax.kernels import linear_softmax_hvp as op
from curvax.kernels.linear_softmax_hvp.workloads import WORKLOADS, Workload
from curvax.kernels.softmax_hvp import softmax_hvp

_WRITTEN = "all logits at once"
# The chunked product should cost no more than this times the one that keeps all logits.
_GOAL = 1.2
_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """Every workload in float32; head, tangent and cotangent once each, the matmuls' operations."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        flops = 10 * work.rows * work.features * work.columns
        count = repeats(max(1, min(20, 2_000_000_000 // flops)))
        yield Case(
            f"linear_softmax_hvp, {work.name}",
            f"{work.rows} x {work.features} x {work.columns}, {work.max_bytes >> 20} MiB",
            lambda work=work, count=count: _candidates(work, count),
            count,
            3 * (work.rows + work.columns) * work.features * _FLOAT,
            flops,
        )


def _candidates(work: Workload, count: int) -> list[run.Candidate]:
    rng = np.random.default_rng(0)
    shapes = ((work.rows, work.features), (work.features, work.columns))
    hidden, head = (jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for shape in shapes)
    tangent = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    weights = jnp.full(work.rows, 1 / work.rows, jnp.float32)

    def written(hidden: jax.Array, head: jax.Array, d_hidden: jax.Array, d_head: jax.Array) -> Any:
        logits, moved = jax.jvp(jnp.matmul, (hidden, head), (d_hidden, d_head))
        u = softmax_hvp(logits, moved, weights)
        return jax.vjp(jnp.matmul, hidden, head)[1](u)

    results = [_looped(_WRITTEN, written, (hidden, head), tangent, count, None, None)]
    for name in implementations(op.OPS, jax.ShapeDtypeStruct((work.rows, work.columns), jnp.float32)):

        def blocks(*operands: jax.Array, name: Any = name) -> tuple[jax.Array, jax.Array]:
            out = op.linear_softmax_hvp(*operands, weights=weights, max_bytes=work.max_bytes, implementation=name)
            return out.hidden, out.head

        results.append(_looped(name, blocks, (hidden, head), tangent, count, _WRITTEN, _GOAL))
    return results


def _looped(
    name: str,
    product: Callable[..., tuple[jax.Array, jax.Array]],
    at: tuple[jax.Array, ...],
    tangent: tuple[jax.Array, ...],
    count: int,
    baseline: str | None,
    goal: float | None,
) -> run.Candidate:
    """The product over and over, each of the last one's result."""
    looped = over_and_over(lambda carry, at: product(*at, *carry), count)
    return run.Candidate(
        name, lambda carry: looped(carry, at), lambda: tuple(map(jnp.copy, tangent)), baseline=baseline, goal=goal
    )
