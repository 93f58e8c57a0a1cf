"""The tables of docs/claims.md: what composition, planning and estimators are worth, from committed rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from bench import schema, tables
from bench.schema import Row
from bench.suites import growth
from bench.suites.untuned import table as untuned

_PRODUCTS = ("6", "24", "96")


def claims() -> Iterator[str]:
    """A section for each claim whose rows there are."""
    for title, suite, lines in SECTIONS:
        rows = _rows(suite)
        yield from (f"## {title}", "", f"`python -m bench {suite}`", "", *lines(rows), "")


def _composition(rows: Sequence[Row]) -> Iterator[str]:
    yield "The slope of log(measurement) over log(size); 1 is linear. Below, the planner's pick over the best lane."
    yield ""
    yield from growth.exponents(rows)
    yield ""
    picks = [row for row in rows if row.metric == growth.PICKED]
    good = sum(bool(row.meets_goal) for row in picks)
    worst = max(picks, key=lambda row: row.p50)
    yield f"The planner's pick takes at most 1.3 of the best lane's time at {good} of {len(picks)} sizes; at worst"
    yield f"{worst.p50:.2f} ({worst.case}, {worst.x}; best: {worst.baseline})."


def _planning(rows: Sequence[Row]) -> Iterator[str]:
    """Planned steps over `plan="off"`."""
    yield '| step | x | time over `plan="off"` | temporary memory over it |'
    yield "|---|---|---|---|"
    for (case, x), group in tables.groups(rows).items():
        shared = {row.metric: row for row in group if row.provider == "plan shared"}
        cells = [shared[m].ratio if m in shared else None for m in ("ms/step", tables.MEMORY)]
        yield f"| {case} | {x} | {' | '.join('' if c is None else f'{c:.2f}' for c in cells)} |"


def _untuned(rows: Sequence[Row]) -> Iterator[str]:
    """The verdict, losses included."""
    for line in untuned.table(rows):
        if not line:
            return
        yield line


def _estimators(rows: Sequence[Row]) -> Iterator[str]:
    """Median relative errors over keys, at a few numbers of products."""
    chosen = [row for row in rows if row.x.split()[0] in _PRODUCTS]
    counts = [x for x in dict.fromkeys(row.x for row in chosen)]
    yield f"| estimate | of | {' | '.join(counts)} |"
    yield "|---|---|" + "---|" * len(counts)
    for case, provider in dict.fromkeys((row.case, row.provider) for row in chosen):
        errors = {row.x: row.p50 for row in chosen if (row.case, row.provider) == (case, provider)}
        yield f"| {provider} | {case} | {' | '.join(f'{errors[x]:.2g}' if x in errors else '' for x in counts)} |"


SECTIONS: tuple[tuple[str, str, Callable[[Sequence[Row]], Iterator[str]]], ...] = (
    ("Composition changes how a step scales", "growth", _composition),
    ("Planning pays", "plan", _planning),
    ("Without tuning", "untuned", _untuned),
    ("Estimators: error over products", "estimators", _estimators),
)


@functools.cache
def _rows(suite: str) -> list[Row]:
    return schema.read(schema.RESULTS / f"{suite}.jsonl")
