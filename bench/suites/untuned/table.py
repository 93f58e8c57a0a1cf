"""The summary of the rows: what defaults win, what they lose, and which presets end above their start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from bench.schema import Row
from bench.suites.untuned.contenders import ADAMW, CONTENDERS, GAUSS_NEWTON
from bench.suites.untuned.rows import LEFT_OUT, START, STEPS, WORST
from bench.suites.untuned.tuning import COMPILE, FINAL, TARGET_TIME

_ByName: TypeAlias = Mapping[tuple[str, str, str], Row]
_TUNED = tuple(c.name for c in CONTENDERS if c.kind == "tuned")
_DEFAULTS = tuple(c.name for c in CONTENDERS if c.kind != "tuned")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: the verdict, `gauss_newton` beside the tuned methods, and all defaults over their start."""
    results = {(r.case, r.provider, r.metric): r for r in rows}
    problems = list(dict.fromkeys(r.case for r in rows))
    yield from _verdict(results, problems)
    yield ""
    yield from _beside_tuned(results, problems)
    yield ""
    yield from _over_start(results, problems)


def _verdict(results: _ByName, problems: Sequence[str]) -> Iterator[str]:
    own = [p for p in problems if (p, GAUSS_NEWTON, FINAL) in results]
    sooner = [p for p in own if _ratio(results, p, GAUSS_NEWTON, TARGET_TIME) <= 1]
    close = [p for p in own if _ratio(results, p, GAUSS_NEWTON, FINAL) <= 1.05]
    yield f"`{GAUSS_NEWTON}` reaches tuned AdamW's final loss sooner on {len(sooner)} of {len(own)}"
    yield f"({', '.join(sooner) or 'none'}), ends within 1.05 of it on {len(close)}"
    yield f"(not on {', '.join(p for p in own if p not in close) or 'any'})."


def _beside_tuned(results: _ByName, problems: Sequence[str]) -> Iterator[str]:
    """Seconds to AdamW's final loss (median seed), final loss over AdamW's, compile time over AdamW's, steps."""
    names = (*_TUNED, GAUSS_NEWTON)
    yield "| problem | " + " | ".join(f"{n}: s to, loss" for n in names) + f" | compile | steps ({ADAMW}) |"
    yield "|---|" + "---|" * (len(names) + 2)
    for problem in problems:
        cells = [_arrival(results, problem, name) for name in names]
        steps = [_number(results, problem, name, STEPS) for name in (GAUSS_NEWTON, ADAMW)]
        compiling = _ratio(results, problem, GAUSS_NEWTON, COMPILE)
        yield f"| {problem} | {' | '.join(cells)} | {compiling:.1f} | {steps[0]} ({steps[1]}) |"


def _arrival(results: _ByName, problem: str, name: str) -> str:
    seconds, loss = (results.get((problem, name, metric)) for metric in (TARGET_TIME, FINAL))
    if seconds is None or loss is None:
        return "-"
    when = "never" if math.isinf(seconds.p50) else f"{seconds.p50:.3g}"
    return f"{when}, {loss.p50:.2e}" if loss.ratio is None else f"{when}, {loss.ratio:.3g}"


def _over_start(results: _ByName, problems: Sequence[str]) -> Iterator[str]:
    """Final loss over start, the worse seeds'; in parentheses the worst loss on the way where it is above 10."""
    yield "| final loss over start | " + " | ".join(problems) + " |"
    yield "|---|" + "---|" * len(problems)
    for name in _DEFAULTS:
        yield f"| {name} | " + " | ".join(_rise(results, problem, name) for problem in problems) + " |"


def _rise(results: _ByName, problem: str, name: str) -> str:
    if (problem, name, LEFT_OUT) in results:
        return "left out"
    final, worst = (results.get((problem, name, metric)) for metric in (START, WORST))
    if final is None or worst is None:
        return "-"
    shown = f"**{final.p80:.2g}**" if final.p80 > 1 else f"{final.p80:.2g}"
    return f"{shown} ({worst.p80:.1g})" if worst.p80 > 10 else shown


def _ratio(results: _ByName, problem: str, name: str, metric: str) -> float:
    row = results.get((problem, name, metric))
    return math.nan if row is None or row.ratio is None else row.ratio


def _number(results: _ByName, problem: str, name: str, metric: str) -> str:
    row = results.get((problem, name, metric))
    return "-" if row is None else f"{row.p50:.0f}"
