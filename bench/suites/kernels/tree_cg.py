"""Each op of `tree_cg`, and the vector work of a whole iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, implementations, over_and_over, repeats
from curvax.kernels import Implementation, tree_cg
from curvax.kernels.tree_cg.workloads import WORKLOADS, Workload

# Vectors read and written per element by each op; the whole iteration is dots, update and direction in turn.
_PASSES = {"dots": 2, "cg_update": 6, "cg_direction": 3, "iteration": 11}
_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """Every op on every workload."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        size = sum(int(np.prod(shape)) for shape in work.shapes)
        count = repeats(max(2, min(200, 20_000_000 // size)), len(work.shapes))
        for op, passes in _PASSES.items():
            yield Case(
                f"tree_cg.{op}, {work.name}",
                f"{size} floats",
                lambda work=work, op=op, count=count: _candidates(work, op, count),
                count,
                passes * size * _FLOAT,
            )


def _candidates(work: Workload, op: str, count: int) -> list[run.Candidate]:
    vectors = _vectors(work, 4)
    ops = {o.name: o for o in tree_cg.OPS}
    wanted = tuple(ops.values()) if op == "iteration" else (ops[op],)
    results = []
    for name in implementations(wanted, vectors[0]):
        step, carry = _loop(op, vectors, name, count)
        baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 1.0)
        results.append(run.Candidate(name, step, carry, baseline=baseline, goal=goal))
    return results


def _vectors(work: Workload, count: int) -> list[list[jax.Array]]:
    rng = np.random.default_rng(0)
    return [[jnp.asarray(rng.normal(size=s), jnp.float32) for s in work.shapes] for _ in range(count)]


def _loop(
    op: str, vectors: list[list[jax.Array]], name: Implementation, count: int
) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """The op `repeats` times inside one compiled loop, as conjugate gradients run it; carry (x, p, r, scalar, step).

    The scalars keep the values bounded: steps along fixed vectors by alternating amounts.
    """

    def body(carry: Any, q: Any) -> Any:
        *vectors, step = carry
        return *once(*vectors, step, q), -step

    def once(x: Any, p: Any, r: Any, scalar: jax.Array, step: jax.Array, q: Any) -> Any:
        small = step + 0 * scalar
        if op == "dots":
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

    looped = over_and_over(body, count)
    *first, q = vectors

    def carry() -> Any:
        return (*jax.tree.map(jnp.copy, tuple(first)), jnp.zeros(()), jnp.asarray(1e-3, jnp.float32))

    return lambda c: looped(c, q), carry
