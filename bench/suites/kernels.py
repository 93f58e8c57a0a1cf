"""Kernels: each op of `tree_cg` in its implementations, against the memory bandwidth measured in the same run."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.schema import Row
from curvax.kernels import Implementation, Request, tree_cg
from curvax.kernels.tree_cg.workloads import WORKLOADS, Workload

SUITE = "kernels"
_COPY = "memory copy"
_REFERENCE = "reference"
# Vectors read and written per element by each op; the whole iteration is dots, update and direction in turn.
_PASSES = {"dots": 2, "cg_update": 6, "cg_direction": 3, "iteration": 11}
_FLOAT = 4


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, workload by workload; `quick` and `only` as in `steps`."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        for op in _PASSES:
            if only in f"{op}, {work.name}":
                yield from _compare(work, op, 2 if quick else 15)


def _compare(work: Workload, op: str, rounds: int) -> Iterator[list[Row]]:
    size = sum(int(np.prod(shape)) for shape in work.shapes)
    repeats = max(2, min(200, 20_000_000 // size))
    vectors = _vectors(work, 4)
    candidates = [_copy(size, repeats)]
    for name in _implementations(op, vectors[0]):
        step, carry = _loop(op, vectors, name, repeats)
        baseline, goal = (None, None) if name == _REFERENCE else (_REFERENCE, 1.0)
        candidates.append(run.Candidate(name, step, carry, baseline=baseline, goal=goal))
    timings = run.time_all(candidates, rounds, budget=15)
    case, x = f"tree_cg.{op}, {work.name}", f"{size} floats"
    microseconds = run.rows(SUITE, case, x, timings[1:], scale=1e6 / repeats, metric="us")
    yield [*microseconds, *_rates(case, x, timings, size, repeats, op)]


def _rates(case: str, x: str, timings: list[run.Timing], size: int, repeats: int, op: str) -> list[Row]:
    rows: list[Row] = []
    for timing in timings:
        passes = 2 if timing.candidate.name == _COPY else _PASSES[op]
        values = run.percentiles(passes * size * _FLOAT * repeats / timing.seconds / 1e9)
        limit = rows[0].p50 if rows else None
        ratio = None if limit is None else values[1] / limit
        baseline = None if limit is None else _COPY
        rows.append(Row(SUITE, case, timing.candidate.name, "GB/s", x, *values, ratio=ratio, baseline=baseline,
                        rounds=len(timing.seconds)))  # fmt: skip
    return rows


def _implementations(op: str, like: Any) -> list[Implementation]:
    """The implementations that can run here, the reference first."""
    ops = {o.name: o for o in tree_cg.OPS}
    wanted = list(ops.values()) if op == "iteration" else [ops[op]]
    request = Request.of(like)
    names = [
        n for n in get_args(Implementation)
        if all((v := o.variant(n)) is not None and v.cannot(request) is None for o in wanted)
    ]  # fmt: skip
    return sorted(names, key=lambda n: n != _REFERENCE)


def _vectors(work: Workload, count: int) -> list[list[jax.Array]]:
    rng = np.random.default_rng(0)
    return [[jnp.asarray(rng.normal(size=s), jnp.float32) for s in work.shapes] for _ in range(count)]


def _copy(size: int, repeats: int) -> run.Candidate:
    """Copies of one vector into another by all cores, each its own part: two passes over memory."""
    source, target = np.ones(size, np.float32), np.empty(size, np.float32)
    workers = len(os.sched_getaffinity(0))
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    bounds = np.linspace(0, size, workers + 1).astype(int)

    def part(begin: int, end: int) -> None:
        for _ in range(repeats):
            np.copyto(target[begin:end], source[begin:end])

    def step(carry: None) -> None:
        concurrent.futures.wait([pool.submit(part, b, e) for b, e in itertools.pairwise(bounds)])

    return run.Candidate(_COPY, step, lambda: None)


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
