"""The table of the rows: finite, recovered, minimum reached, steps; and the classic set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bench.schema import Row
from bench.suites.robustness.rows import CLASSIC, LOSS, TO_MINIMUM


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: counts for each method, then a line per case."""
    hard = [r for r in rows if not r.case.startswith(CLASSIC)]
    classic = [r for r in rows if r.case.startswith(CLASSIC)]
    yield from _counts(hard)
    yield ""
    yield "Steps to the minimum; `-`: not reached; `worse`: ends above its start; **x**: parameters not finite.\n"
    yield from _lines(hard)
    yield ""
    yield "Classic set, steps to a published minimum (evaluations for SciPy):\n"
    yield from _lines(classic)
    providers = list(dict.fromkeys(r.provider for r in classic))
    arrived = {p: [r for r in classic if r.provider == p and r.metric == TO_MINIMUM] for p in providers}
    counts = (f"{sum(math.isfinite(r.p50) for r in own)} of {len(own)}" for own in arrived.values())
    yield f"| reached | {' | '.join(counts)} |"


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    yield "| method | cases | finite | recovered | minimum reached |"
    yield "|---|---|---|---|---|"
    for provider in _providers(rows):
        own = [r for r in rows if r.provider == provider]
        losses = [r.p50 for r in own if r.metric == LOSS]
        reached = sum(math.isfinite(r.p50) for r in own if r.metric == TO_MINIMUM)
        finite, recovered = sum(map(math.isfinite, losses)), sum(loss <= 1 + 1e-5 for loss in losses)
        yield f"| {provider} | {len(losses)} | {finite} | {recovered} | {reached} |"


def _providers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r.provider for r in rows if r.metric == TO_MINIMUM))


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    providers = _providers(rows)
    yield f"| case | {' | '.join(providers)} |"
    yield "|---|" + "---|" * len(providers)
    results = {(r.case, r.provider, r.metric): r.p50 for r in rows}
    for case in dict.fromkeys(r.case for r in rows):
        cells = (_cell(results.get((case, p, LOSS), 1.0), results.get((case, p, TO_MINIMUM))) for p in providers)
        yield f"| {case.removeprefix(CLASSIC)} | {' | '.join(cells)} |"


def _cell(loss: float, steps: float | None) -> str:
    if steps is None:
        return ""
    if math.isfinite(steps):
        return f"{steps:.0f}"
    if not math.isfinite(loss):
        return "**x**"
    return "worse" if loss > 1 + 1e-5 else "-"
