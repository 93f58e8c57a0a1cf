"""Rows of a contender on a problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from bench.schema import Row
from bench.suites.untuned.contenders import ADAMW, Contender
from bench.suites.untuned.problems import Problem
from bench.suites.untuned.runner import Effort, Trajectory
from bench.suites.untuned.tuning import COMPILE, FINAL, RATE, TARGET_TIME, Baseline, by_seed

SUITE = "untuned"
LEFT_OUT = "GFLOP of a step, left out"
START, WORST, STEPS, DIVERGED = "final loss over start", "worst loss over start", "steps", "diverged"
_GOALS = {TARGET_TIME: 1.0, FINAL: 1.05, COMPILE: 3.0}


@dataclasses.dataclass(frozen=True)
class Result:
    """The runs of one contender, one per seed.

    Attributes:
      contender: who.
      rate: at which it ran; `None` for its own.
      compile: seconds to trace and compile its step.
      runs: by seed.
    """

    contender: Contender
    rate: float | None
    compile: float
    runs: tuple[Trajectory, ...]


def rows(problem: Problem, result: Result, baseline: Baseline, effort: Effort) -> Iterator[Row]:
    """One row per metric; percentiles are seeds, ratios are medians of quotients of the same seed."""
    name, tuned = result.contender.name, result.contender.kind == "tuned"

    def row(metric: str, values: Sequence[float], to: Sequence[float] | None = None, goal: float | None = None) -> Row:
        p20, p50, p80 = (float(v) for v in np.percentile(values, (20, 50, 80), method="nearest"))
        ratio = None if to is None or name == ADAMW else _ratio(values, to)
        under = None if ratio is None else ADAMW
        return Row(
            SUITE, problem.name, name, metric, effort.x, p20, p50, p80, ratio, under, goal, rounds=len(values)
        )  # fmt: skip

    def against(metric: str, values: Sequence[float], to: Sequence[float]) -> Row:
        return row(metric, values, to, _GOALS[metric] if result.contender.kind == "untuned" else None)

    runs = result.runs
    finals = [t.final.loss for t in runs]
    times = [t.seconds_to(loss) for t, loss in zip(runs, baseline.losses, strict=True)]
    if result.rate is not None:
        yield row(RATE, [result.rate])
    yield against(TARGET_TIME, times, baseline.seconds)
    yield against(FINAL, finals, baseline.losses)
    yield against(COMPILE, [result.compile], [baseline.compile])
    yield row(START, [t.final.loss / t.start for t in runs], goal=None if tuned else 1.0)
    yield row(WORST, [t.worst / t.start for t in runs])
    # Above the start at the end, or without a number.
    yield row(DIVERGED, [float(not t.final.loss <= t.start) for t in runs])
    yield row(STEPS, [float(t.final.steps) for t in runs])
    yield row(problem.metric, [t.held_out for t in runs])
    if name == ADAMW:
        for seed, (loss, seconds) in enumerate(zip(baseline.losses, baseline.seconds, strict=True)):
            yield row(by_seed(FINAL, seed), [loss])
            yield row(by_seed(TARGET_TIME, seed), [seconds])


def left_out(problem: Problem, contender: Contender, flops: float, effort: Effort) -> Row:
    """The row of a contender that did not run, as a step of it would take too long or too much memory."""
    size = flops / 1e9
    return Row(SUITE, problem.name, contender.name, LEFT_OUT, effort.x, size, size, size)


def _ratio(values: Sequence[float], to: Sequence[float]) -> float:
    """The median of quotients; infinite where the median seed never arrives."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.percentile(np.asarray(values) / np.asarray(to), 50, method="nearest"))
