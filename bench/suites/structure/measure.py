"""Steps of several methods on one batch, time and memory; what would take too long or too much is left out by name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from bench import libraries, run
from bench.schema import Row
from bench.workloads import Workload

MOST_SECONDS, MOST_BYTES = 10.0, 8 << 30
# What takes longer leaves cache and memory to the next in a state that it pays for.
SLOW_SECONDS = 0.2
TOO_LONG, TOO_LARGE = "s/step, left out", "GiB temp, left out"


@contextlib.contextmanager
def precision(work: Workload) -> Iterator[None]:
    """float64 where the workload asks for it."""
    with jax.enable_x64(work.dtype == "float64"):
        yield


def steps(
    suite: str,
    case: str,
    work: Workload,
    batch: dict[str, jax.Array],
    methods: Mapping[str, Any],
    *,
    baseline: str | None = None,
    goals: Mapping[str, float | None] | None = None,
    rounds: int = 9,
    budget: float = 6.0,
) -> list[Row]:
    """Rows of a case: ms/step of interleaved rounds and MiB temp per method.

    Args:
      suite, case: of the rows.
      work, batch: what the methods step on.
      methods: by provider.
      baseline: the provider that ratios refer to, if it is not left out.
      goals: largest ratios aimed at, by provider.
      rounds, budget: of `run.time_all`.
    """
    x = f"batch {batch['x'].shape[0]}"
    kept: dict[str, tuple[libraries.Step, Any]] = {}
    quick: set[str] = set()
    results: list[Row] = []
    for provider, method in methods.items():
        step, carry, size = libraries.compiled_stepper(method, work, batch)
        if size > MOST_BYTES:
            results.append(_single(suite, case, provider, TOO_LARGE, x, size / 2**30))
            continue
        results.append(_single(suite, case, provider, "MiB temp", x, size / 2**20))
        if (seconds := _one_step(step, carry)) > MOST_SECONDS:
            results.append(_single(suite, case, provider, TOO_LONG, x, seconds))
        else:
            kept[provider] = step, carry
            quick |= {provider} if seconds < SLOW_SECONDS else set()
    base = baseline if baseline in kept else None
    candidates = [
        run.Candidate(
            name,
            *pieces,
            baseline=base if name != base else None,
            goal=(goals or {}).get(name) if base is not None else None,
            untimed=2 if name in quick and len(quick) < len(kept) else 0,
        )
        for name, pieces in kept.items()
    ]
    return [*run.rows(suite, case, x, run.time_all(candidates, rounds, budget=budget)), *_relative(results, base)]


def _one_step(step: libraries.Step, carry: Any) -> float:
    begin = carry()
    jax.block_until_ready(begin)
    start = time.perf_counter()
    jax.block_until_ready(step(begin))
    return time.perf_counter() - start


def _relative(rows: list[Row], baseline: str | None) -> list[Row]:
    """Memory as a part of the baseline's."""
    base = next((r.p50 for r in rows if r.provider == baseline and r.metric == "MiB temp"), 0.0)

    def against(row: Row) -> Row:
        if not base or row.provider == baseline or row.metric != "MiB temp":
            return row
        return _single(row.suite, row.case, row.provider, row.metric, row.x, row.p50, row.p50 / base, baseline)

    return [against(row) for row in rows]


def _single(
    suite: str,
    case: str,
    provider: str,
    metric: str,
    x: str,
    value: float,
    ratio: float | None = None,
    baseline: str | None = None,
) -> Row:
    return Row(suite, case, provider, metric, x, value, value, value, ratio=ratio, baseline=baseline)
