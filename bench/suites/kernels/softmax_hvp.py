"""softmax_hvp, and the product as one writes it in JAX: `jax.jvp` of the residual softmax(z) - y."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, implementations
from curvax.kernels import softmax_hvp as op
from curvax.kernels.softmax_hvp.workloads import WORKLOADS, Workload

_JVP = "jax.jvp of softmax"
_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """Every workload in float32; logits and tangents read once, products written once."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        size = work.rows * work.columns
        repeats = max(2, min(200, 50_000_000 // (size * work.tangents)))
        yield Case(
            f"softmax_hvp, {work.name}",
            f"{work.rows} x {work.columns}" + (f" x {work.tangents}" if work.tangents > 1 else ""),
            lambda work=work, repeats=repeats: _candidates(work, repeats),
            repeats,
            (1 + 2 * work.tangents) * size * _FLOAT,
            (6 + 4 * work.tangents) * size,
        )


def _candidates(work: Workload, repeats: int) -> list[run.Candidate]:
    rng = np.random.default_rng(0)
    shape = (work.rows, work.columns)
    logits = jnp.asarray(rng.normal(size=shape), jnp.float32)
    tangents = jnp.asarray(rng.normal(size=(work.tangents, *shape)), jnp.float32)
    weights = jnp.full(work.rows, 1 / work.rows, jnp.float32)

    def written(z: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return jax.vmap(lambda t: jax.jvp(lambda x: w[:, None] * jax.nn.softmax(x), (z,), (t,))[1])(v)

    found = []
    for name in implementations(op.OPS, logits, tangents):
        baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 1.0)

        def product(z: jax.Array, v: jax.Array, w: jax.Array, name: str = name) -> jax.Array:
            return op.softmax_hvp(z, v, w, implementation=name)  # type: ignore[arg-type]

        found.append(_looped(name, product, logits, tangents, weights, repeats, baseline, goal))
    return [*found, _looped(_JVP, written, logits, tangents, weights, repeats, REFERENCE, None)]


def _looped(
    name: str,
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    logits: jax.Array,
    tangents: jax.Array,
    weights: jax.Array,
    repeats: int,
    baseline: str | None,
    goal: float | None,
) -> run.Candidate:
    """The product `repeats` times in one compiled loop, each at logits of its own: nothing can be kept from before."""

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array], w: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, v = jax.lax.optimization_barrier(carry)
        return z, product(z, v, w)

    @jax.jit
    def loop(carry: tuple[jax.Array, jax.Array], w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(0, repeats, lambda i, c: body(i, c, w), carry)

    looped = jax.jit(lambda carry: loop(carry, weights), donate_argnums=(0,))
    return run.Candidate(name, looped, lambda: (jnp.copy(logits), jnp.copy(tangents)), baseline=baseline, goal=goal)
