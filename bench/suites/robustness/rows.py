"""Rows: two numbers a run, of which the table makes finite, recovered, minimum reached, steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bench.schema import Row
from bench.suites.robustness.case import Case, Outcome
from bench.suites.robustness.classic import Classic
from bench.suites.robustness.least_squares import STEPS, Found

SUITE = "robustness"
LOSS, TO_MINIMUM = "final loss over start", "steps to the minimum"
SQUARES, CLASSIC = "sum of squares", "classic: "
_FINITE_BUT_WORSE = 1e300


def of_case(case: Case, provider: str, outcome: Outcome) -> Iterator[Row]:
    """The final loss over that at the start, infinite if parameters ever were not finite; steps; what was raised."""
    x = f"{case.steps} steps"
    # A start without loss is its own unit; a loss that is no number at finite parameters is a large one.
    over = outcome.final / outcome.start if outcome.start > 0 else outcome.final + 1
    if outcome.finite:
        over = min(over, _FINITE_BUT_WORSE)
    yield _row(case.name, provider, LOSS, x, over)
    yield _row(case.name, provider, TO_MINIMUM, x, outcome.steps)
    if outcome.error:
        yield _row(case.name, provider, f"raised {outcome.error}", x, 1.0)


def of_classic(problem: Classic, provider: str, results: Found) -> Iterator[Row]:
    """The sum of squares in the end, and steps."""
    case, x = CLASSIC + problem.name, f"{STEPS} steps"
    yield _row(case, provider, SQUARES, x, results.final if results.finite else math.inf)
    yield _row(case, provider, TO_MINIMUM, x, results.steps)


def _row(case: str, provider: str, metric: str, x: str, value: float) -> Row:
    return Row(SUITE, case, provider, metric, x, value, value, value)
