"""softmax_hvp, and the product as one writes it in JAX: `jax.jvp` of the residual softmax(z) - y."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, accelerated, implementations, over_and_over, repeats
from curvax.kernels import softmax_hvp as op
from curvax.kernels.softmax_hvp.workloads import WORKLOADS, Workload

_JVP = "jax.jvp of softmax"
_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """Every workload in float32; logits and tangents read once, products written once."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        if work.large and not accelerated():
            continue
        size = work.rows * work.columns
        count = repeats(max(2, min(200, 50_000_000 // (size * work.tangents))))
        yield Case(
            f"softmax_hvp, {work.name}",
            f"{work.rows} x {work.columns}" + (f" x {work.tangents}" if work.tangents > 1 else ""),
            lambda work=work, count=count: _candidates(work, count),
            count,
            (1 + 2 * work.tangents) * size * _FLOAT,
            (6 + 4 * work.tangents) * size,
        )


def _candidates(work: Workload, count: int) -> list[run.Candidate]:
    rng = np.random.default_rng(0)
    shape = (work.rows, work.columns)
    logits = jnp.asarray(rng.normal(size=shape), jnp.float32)
    tangents = jnp.asarray(rng.normal(size=(work.tangents, *shape)), jnp.float32)
    weights = jnp.full(work.rows, 1 / work.rows, jnp.float32)

    def written(z: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return jax.vmap(lambda t: jax.jvp(lambda x: w[:, None] * jax.nn.softmax(x), (z,), (t,))[1])(v)

    results = []
    for name in implementations(op.OPS, logits, tangents):
        baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 1.0)

        def product(z: jax.Array, v: jax.Array, w: jax.Array, name: str = name) -> jax.Array:
            return op.softmax_hvp(z, v, w, implementation=name)  # type: ignore[arg-type]

        results.append(_looped(name, product, logits, tangents, weights, count, baseline, goal))
    return [*results, _looped(_JVP, written, logits, tangents, weights, count, REFERENCE, None)]


def _looped(
    name: str,
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    logits: jax.Array,
    tangents: jax.Array,
    weights: jax.Array,
    count: int,
    baseline: str | None,
    goal: float | None,
) -> run.Candidate:
    """The product over and over, each of the last one's result."""
    step = over_and_over(lambda carry, fixed: product(fixed[0], carry, fixed[1]), count)
    fixed = (logits, weights)
    return run.Candidate(
        name, lambda carry: step(carry, fixed), lambda: jnp.copy(tangents), baseline=baseline, goal=goal
    )
