"""Interleaved timing: every candidate once per round, in random order, so that a busy machine slows all of them alike.

The ratio of two candidates is the median over rounds of the quotient of their times in the same round. On a machine
that others use it is steadier by far than the quotient of two medians.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bench.schema import Row


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
      name: the row's provider.
      step: carry -> carry, jitted; may donate its carry.
      carry: makes the first carry, afresh at every call.
      calls: calls per round; the time of a round is divided by it. Ten for a step with work every tenth call.
      baseline: name of the candidate that the ratio refers to, or `None`.
      goal: largest ratio aimed at, or `None`.
      untimed: calls before the timed ones of a round: beside candidates of seconds and gigabytes, whose pages and cache
        lines the next one pays for, one or two.
      rest: seconds before these. XLA gives memory back on a thread of its own when the result is ready; where that is
        gigabytes, the next candidate would have one core less until it is done.
    """

    name: str
    step: Callable[[Any], Any]
    carry: Callable[[], Any]
    calls: int = 1
    baseline: str | None = None
    goal: float | None = None
    untimed: int = 0
    rest: float = 0.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one entry per round."""

    candidate: Candidate
    seconds: np.ndarray


def time_all(candidates: Sequence[Candidate], rounds: int, *, budget: float = 60.0, seed: int = 0) -> list[Timing]:
    """Times all candidates in `rounds` interleaved rounds, or fewer (at least 3) if they would exceed the budget.

    Args:
      candidates: what to time; names distinct.
      rounds: rounds wanted.
      budget: seconds for the timed rounds.
      seed: of the order within each round.
    """
    carries = [_warm(c) for c in candidates]
    seconds: list[list[float]] = [[] for _ in candidates]
    shuffle = random.Random(seed)
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > budget:
            break
        for i in shuffle.sample(range(len(candidates)), len(candidates)):
            carries[i], spent = _once(candidates[i], carries[i])
            seconds[i].append(spent)
    return [Timing(c, np.asarray(s)) for c, s in zip(candidates, seconds, strict=True)]


def _warm(candidate: Candidate) -> Any:
    """Compiles, and leaves the carry at a multiple of `calls`, so that rounds and cadences stay in phase."""
    carry = candidate.carry()
    for _ in range(max(candidate.calls, 2)):
        carry = candidate.step(carry)
    return jax.block_until_ready(carry)


def _once(candidate: Candidate, carry: Any) -> tuple[Any, float]:
    time.sleep(candidate.rest)
    for _ in range(candidate.untimed):
        carry = candidate.step(carry)
    jax.block_until_ready(carry)
    begin = time.perf_counter()
    for _ in range(candidate.calls):
        carry = candidate.step(carry)
    jax.block_until_ready(carry)
    return carry, (time.perf_counter() - begin) / candidate.calls


def rows(
    suite: str, case: str, x: str, timings: Sequence[Timing], *, scale: float = 1e3, metric: str = ""
) -> list[Row]:
    """One row per candidate, times in milliseconds (`scale` 1e3)."""
    by_name = {t.candidate.name: t for t in timings}
    results = []
    for t in timings:
        base = by_name[t.candidate.baseline] if t.candidate.baseline is not None else None
        results.append(
            Row(
                suite,
                case,
                t.candidate.name,
                metric or "ms/step",
                x,
                *percentiles(t.seconds * scale),
                ratio=None if base is None else ratio(t, base),
                baseline=t.candidate.baseline,
                goal=t.candidate.goal,
                rounds=len(t.seconds),
            )
        )
    return results


def ratio(timing: Timing, base: Timing) -> float:
    """Median of the paired quotients of two candidates timed together."""
    return float(np.median(timing.seconds / base.seconds))


def percentiles(values: np.ndarray) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    p20, p50, p80 = np.percentile(values, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of values ~ sizes^p: the slope of log(values) over log(sizes), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
