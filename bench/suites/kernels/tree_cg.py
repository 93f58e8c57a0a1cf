"""Each op of `tree_cg`, and the vector work of a whole iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, implementations
from curvax.kernels import Implementation, tree_cg
from curvax.kernels.tree_cg.workloads import WORKLOADS, Workload

# Vectors read and written per element by each op; the whole iteration is dots, update and direction in turn.
_PASSES = {"dots": 2, "cg_update": 6, "cg_direction": 3, "iteration": 11}
_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """Every op on every workload."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        size = sum(int(np.prod(shape)) for shape in work.shapes)
        repeats = max(2, min(200, 20_000_000 // size))
        for op, passes in _PASSES.items():
            yield Case(
                f"tree_cg.{op}, {work.name}",
                f"{size} floats",
                lambda work=work, op=op, repeats=repeats: _candidates(work, op, repeats),
                repeats,
                passes * size * _FLOAT,
            )


def _candidates(work: Workload, op: str, repeats: int) -> list[run.Candidate]:
    vectors = _vectors(work, 4)
    ops = {o.name: o for o in tree_cg.OPS}
    wanted = tuple(ops.values()) if op == "iteration" else (ops[op],)
    found = []
    for name in implementations(wanted, vectors[0]):
        step, carry = _loop(op, vectors, name, repeats)
        baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 1.0)
        found.append(run.Candidate(name, step, carry, baseline=baseline, goal=goal))
    return found


def _vectors(work: Workload, count: int) -> list[list[jax.Array]]:
    rng = np.random.default_rng(0)
    return [[jnp.asarray(rng.normal(size=s), jnp.float32) for s in work.shapes] for _ in range(count)]


def _loop(
    op: str, vectors: list[list[jax.Array]], name: Implementation, repeats: int
) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """The op `repeats` times inside one compiled loop, as conjugate gradients run it; carry (x, p, r, scalar).

    The scalars keep the values bounded: steps along fixed vectors by alternating amounts.
    """

    def body(i: jax.Array, carry: Any, q: Any) -> Any:
        x, p, r, scalar = carry
        small = jnp.where(i % 2 == 0, 1e-3, -1e-3) + 0 * scalar
        if op == "dots":
            # The barrier ties the vectors to the last result: without it one evaluation would serve all rounds.
            x, p, scalar = jax.lax.optimization_barrier((x, p, scalar))
            return x, p, r, sum(tree_cg.dots(((p, x), (p, p), (x, x)), implementation=name))
        if op == "cg_update":
            x, r, scalar = tree_cg.cg_update(small, x, p, r, q, implementation=name)
            return x, p, r, scalar
        if op == "cg_direction":
            return x, tree_cg.cg_direction(small, r, p, implementation=name), r, scalar
        pq, pp, qq = tree_cg.dots(((p, q), (p, p), (q, q)), implementation=name)
        alpha = small * pq / jnp.sqrt(pp * qq)
        x, r, rr = tree_cg.cg_update(alpha, x, p, r, q, implementation=name)
        return x, tree_cg.cg_direction(small * rr / (rr + qq), r, p, implementation=name), r, rr

    @jax.jit
    def repeat(carry: Any, q: Any) -> Any:
        return jax.lax.fori_loop(0, repeats, lambda i, c: body(i, c, q), carry)

    looped = jax.jit(lambda carry, q: repeat(carry, q), donate_argnums=(0,))
    *first, q = vectors

    def carry() -> Any:
        return (*jax.tree.map(jnp.copy, tuple(first)), jnp.zeros(()))

    return lambda c: looped(c, q), carry
