"""Error against seconds: all contenders on one equation, in turns, in one process.

Rates are tuned by runs of a quarter of the time, on the error itself, which no user could do; that time is not counted,
nor is compilation. Curvature methods of curvax have nothing to tune.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from bench.schema import Row
from bench.suites.physics.contenders import ADAM, CONTENDERS, DEFAULTS
from bench.suites.physics.pde import Judged, Pde
from bench.suites.untuned.contenders import Contender
from bench.suites.untuned.runner import Compiled, Course, Effort, Trajectory, race
from bench.suites.untuned.tuning import best_rates

ERROR, LOSS, ARRIVAL = "relative L2 error", "loss", "s to tuned adam's error"
STEPS, STEP, RATE, CURVE = "steps", "ms/step", "rate or damping", "error after a share of the time"
_TUNED_FOR = 0.25
_SOONER = 1 / 20
_SHARES = (0.05, 0.1, 0.2, 0.5)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contender, its rate if it has one, and its run."""

    name: str
    rate: float | None
    run: Trajectory


def rows_of(suite: str, pde: Pde, effort: Effort, contenders: Sequence[Contender[Pde]] = CONTENDERS) -> Iterator[Row]:
    """The race of all contenders on one equation, as rows.

    Args:
      suite: the rows' suite.
      pde: the equation.
      effort: seconds of each run and the clock that counts them.
      contenders: who takes part.
    """
    course = Course(Judged(pde))
    compiled = [Compiled(c, c.build(pde), course, effort.clock) for c in contenders]
    rates = {c.contender.name: c.contender.rates[0] for c in compiled if len(c.contender.rates) == 1}
    several = [c for c in compiled if len(c.contender.rates) > 1]
    rates |= best_rates(several, dataclasses.replace(effort, budget=_TUNED_FOR * effort.budget))
    runs = race([(c, rates.get(c.contender.name, 0.0), 0) for c in compiled], effort.budget)
    entries = [
        Entry(c.contender.name, rates.get(c.contender.name) if len(c.contender.rates) > 1 else None, run)
        for c, run in zip(compiled, runs, strict=True)
    ]
    yield from _rows(suite, pde.name, effort.x, entries)


def _rows(suite: str, case: str, x: str, entries: Sequence[Entry]) -> Iterator[Row]:
    """Final errors over the best of all others', seconds to Adam's best error over Adam's."""
    adam = next((e.run for e in entries if e.name == ADAM), None)
    # Who stands for others: all but curvax at defaults.
    others = [e for e in entries if e.name not in DEFAULTS]
    best = min(others, key=lambda e: e.run.final.loss, default=None)
    for entry in entries:
        run, own = entry.run, entry.name in DEFAULTS

        def row(metric: str, value: float, to: tuple[str, float] | None = None, goal: float | None = None) -> Row:
            baseline, ratio = (None, None) if to is None else (to[0], value / to[1] if to[1] else math.inf)
            return Row(suite, case, entry.name, metric, x, value, value, value, ratio, baseline, goal)  # noqa: B023

        first = entry.name == DEFAULTS[0]
        rival = (best.name, best.run.final.loss) if own and best is not None else None
        yield row(ERROR, run.final.loss, rival, 1.0 if first else None)
        yield row(LOSS, run.held_out)
        yield row(STEPS, run.final.steps)
        yield row(STEP, 1e3 * run.final.seconds / max(run.final.steps, 1))
        if adam is not None:
            reached = lowest(adam)
            own_time = (ADAM, adam.seconds_to(reached)) if entry.name != ADAM else None
            yield row(ARRIVAL, run.seconds_to(reached), own_time, _SOONER if first else None)
        if entry.rate is not None:
            yield row(RATE, entry.rate)
        for share in _SHARES:
            yield row(f"{CURVE}, {share:g}", _after(run, share))


def lowest(run: Trajectory) -> float:
    """The best error of a run."""
    return min(p.loss for p in run.points)


def _after(run: Trajectory, share: float) -> float:
    """The error when a share of the time was spent, as last looked at."""
    return next(p.loss for p in reversed(run.points) if p.seconds <= share * run.final.seconds)
