"""The summary of the rows: on how many equations the defaults end lowest, and each contender's error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import tables
from bench.schema import Row
from bench.suites.physics.contenders import DEFAULTS
from bench.suites.physics.race import ARRIVAL, ERROR, LOSS, RATE, STEP, STEPS

_METRICS = (ERROR, LOSS, STEPS, STEP, ARRIVAL, RATE)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: the verdict and the races, then all other rows."""
    races = {(r.case, r.x) for r in rows if r.metric == ERROR}
    raced = [r for r in rows if (r.case, r.x) in races]
    if raced:
        yield from _verdict(raced)
        yield ""
        yield from _races(raced)
        yield ""
    yield from tables.plain([r for r in rows if (r.case, r.x) not in races])


def _verdict(rows: Sequence[Row]) -> Iterator[str]:
    own = [r for r in rows if r.provider == DEFAULTS[0] and r.ratio is not None]
    lowest, sooner = ([r for r in own if r.metric == metric] for metric in (ERROR, ARRIVAL))
    yield f"`{DEFAULTS[0]}` at defaults ends at or below all others on {_met(lowest)} of {len(lowest)} equations,"
    yield f"and is at tuned Adam's best error at least 20 times sooner on {_met(sooner)} of {len(sooner)}."


def _met(rows: Sequence[Row]) -> int:
    return sum(bool(r.meets_goal) for r in rows)


def _races(rows: Sequence[Row]) -> Iterator[str]:
    """Per equation and contender: error, loss, steps, ms/step, seconds to Adam's best error, the tuned rate."""
    yield f"| equation | x | contender | {' | '.join(_METRICS)} | over the best peer | over adam's time |"
    yield "|---|---|---|" + "---|" * (len(_METRICS) + 2)
    for (case, x), group in tables.groups(rows).items():
        for name in dict.fromkeys(r.provider for r in group):
            by_metric = {r.metric: r for r in group if r.provider == name}
            cells = [f"{by_metric[m].p50:.3g}" if m in by_metric else "-" for m in _METRICS]
            ratios = [by_metric[m].ratio if m in by_metric else None for m in (ERROR, ARRIVAL)]
            cells += ["" if ratio is None else f"{ratio:.3g}" for ratio in ratios]
            yield f"| {case} | {x} | {name} | {' | '.join(cells)} |"
