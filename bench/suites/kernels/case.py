"""One case of a kernel benchmark: several candidates doing one piece of work, and the machine's own limits beside."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.schema import Row
from curvax.kernels import Implementation, Op, Request

COPY = "memory copy"
REFERENCE = "reference"
_LARGEST_COPY = 64_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
      name: op and workload.
      x: its size, as text.
      candidates: makes who does it, timed together; the first is usually the reference.
      repeats: how often one call does the work.
      bytes: fewest bytes that the work moves through memory: inputs read once, outputs written once.
      flops: floating-point operations of the work, 0 where memory alone is the limit.
    """

    name: str
    x: str
    candidates: Callable[[], list[run.Candidate]]
    repeats: int
    bytes: float
    flops: float = 0.0

    @property
    def title(self) -> str:
        """What `--only` searches."""
        return f"{self.name} [{self.x}]"

    def rows(self, suite: str, rounds: int) -> list[Row]:
        """Microseconds per piece of work; the rate of memory traffic beside a copy's; GFLOP/s where they count."""
        size = int(min(self.bytes / 8, _LARGEST_COPY))
        copies = repeats(max(1, min(50, 20_000_000 // max(size, 1))))
        candidates = [copy(size, copies), *self.candidates()]
        if accelerated():
            # A call is asked for while the one before runs: its way through Python is not what is measured.
            candidates = [dataclasses.replace(c, calls=10) for c in candidates]
        timings = run.time_all(candidates, rounds, budget=5 if accelerated() else 15)
        results = run.rows(suite, self.name, self.x, timings[1:], scale=1e6 / self.repeats, metric="us")
        values = run.percentiles(2 * size * 4 * copies / timings[0].seconds / 1e9)
        results.append(Row(suite, self.name, COPY, "GB/s", self.x, *values, rounds=len(timings[0].seconds)))
        limit = values[1]
        for timing in timings[1:]:
            name, n = timing.candidate.name, len(timing.seconds)
            rate = run.percentiles(self.bytes * self.repeats / timing.seconds / 1e9)
            row = Row(suite, self.name, name, "GB/s", self.x, *rate, ratio=rate[1] / limit, baseline=COPY, rounds=n)
            results.append(row)
            if self.flops:
                rate = run.percentiles(self.flops * self.repeats / timing.seconds / 1e9)
                results.append(Row(suite, self.name, name, "GFLOP/s", self.x, *rate, rounds=n))
        return results


def implementations(ops: tuple[Op, ...], *like: object) -> list[Implementation]:
    """The implementations that all of `ops` have and that can run these operands here, the reference first."""
    request = Request.of(*like)
    names = [
        n for n in get_args(Implementation)
        if all((v := o.variant(n)) is not None and v.cannot(request) is None for o in ops)
    ]  # fmt: skip
    return sorted(names, key=lambda n: n != REFERENCE)


def accelerated() -> bool:
    """Whether this runs on no CPU."""
    return jax.default_backend() != "cpu"


def repeats(wanted: int, leaves: int = 1) -> int:
    """How often a compiled call does its work: what fills a CPU's round, or what a GPU's program can spell out."""
    return wanted if not accelerated() else 10 if leaves < 10 else 3


def over_and_over(body: Callable[[Any, Any], Any], count: int) -> Callable[[Any, Any], Any]:
    """`body(carry, fixed) -> carry`, `count` times in one compiled function that takes the carry over (donates it).

    On the CPU a loop. On a GPU spelt out, because a loop's passes cost launches and copies of their own there. Barriers
    keep one pass from being merged with the next, and what is fixed from being worked out once for all.
    """
    barrier = jax.lax.optimization_barrier
    if not accelerated():
        return jax.jit(
            lambda c, f: jax.lax.fori_loop(0, count, lambda _, c: body(*barrier((c, f))), c), donate_argnums=(0,)
        )

    def spelt_out(carry: Any, fixed: Any) -> Any:
        for _ in range(count):
            carry, fixed = barrier((body(carry, fixed), fixed))
        return carry

    return jax.jit(spelt_out, donate_argnums=(0,))


def copy(size: int, count: int) -> run.Candidate:
    """Copies of one float32 vector into another: two passes over memory.

    On the CPU by all cores, each its own part.
    """
    if accelerated():
        # Into another buffer, as copies go: a carry of two swaps them.
        step = over_and_over(lambda pair, _: (pair[1], pair[0] + 1), count)
        return run.Candidate(COPY, lambda pair: step(pair, ()), lambda: tuple(jnp.zeros((2, size), jnp.float32)))
    source, target = np.ones(size, np.float32), np.empty(size, np.float32)
    workers = len(os.sched_getaffinity(0))
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    bounds = np.linspace(0, size, workers + 1).astype(int)

    def part(begin: int, end: int) -> None:
        for _ in range(count):
            np.copyto(target[begin:end], source[begin:end])

    def threaded(carry: None) -> None:
        concurrent.futures.wait([pool.submit(part, b, e) for b, e in itertools.pairwise(bounds)])

    return run.Candidate(COPY, threaded, lambda: None)
