"""One case of a kernel benchmark: several candidates doing one piece of work, and the machine's own limits beside."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import get_args

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
        copies = max(1, min(50, 20_000_000 // max(size, 1)))
        timings = run.time_all([copy(size, copies), *self.candidates()], rounds, budget=15)
        found = run.rows(suite, self.name, self.x, timings[1:], scale=1e6 / self.repeats, metric="us")
        values = run.percentiles(2 * size * 4 * copies / timings[0].seconds / 1e9)
        found.append(Row(suite, self.name, COPY, "GB/s", self.x, *values, rounds=len(timings[0].seconds)))
        limit = values[1]
        for timing in timings[1:]:
            name, n = timing.candidate.name, len(timing.seconds)
            rate = run.percentiles(self.bytes * self.repeats / timing.seconds / 1e9)
            row = Row(suite, self.name, name, "GB/s", self.x, *rate, ratio=rate[1] / limit, baseline=COPY, rounds=n)
            found.append(row)
            if self.flops:
                rate = run.percentiles(self.flops * self.repeats / timing.seconds / 1e9)
                found.append(Row(suite, self.name, name, "GFLOP/s", self.x, *rate, rounds=n))
        return found


def implementations(ops: tuple[Op, ...], *like: object) -> list[Implementation]:
    """The implementations that all of `ops` have and that can run these operands here, the reference first."""
    request = Request.of(*like)
    names = [
        n for n in get_args(Implementation)
        if all((v := o.variant(n)) is not None and v.cannot(request) is None for o in ops)
    ]  # fmt: skip
    return sorted(names, key=lambda n: n != REFERENCE)


def copy(size: int, repeats: int) -> run.Candidate:
    """Copies of one float32 vector into another: two passes over memory.

    On the CPU by all cores, each its own part.
    """
    if jax.default_backend() != "cpu":
        step = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda i, y: y + i.astype(y.dtype), x))
        return run.Candidate(COPY, step, lambda: jnp.zeros(size, jnp.float32))
    source, target = np.ones(size, np.float32), np.empty(size, np.float32)
    workers = len(os.sched_getaffinity(0))
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    bounds = np.linspace(0, size, workers + 1).astype(int)

    def part(begin: int, end: int) -> None:
        for _ in range(repeats):
            np.copyto(target[begin:end], source[begin:end])

    def threaded(carry: None) -> None:
        concurrent.futures.wait([pool.submit(part, b, e) for b, e in itertools.pairwise(bounds)])

    return run.Candidate(COPY, threaded, lambda: None)
