"""Tables that need nothing but rows: one line per row, one line per kernel, one line per compiled program.

Suites with questions of their own have their table in `bench.markdown` or beside the suite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.schema import Row

TIME = ("us", "ms", "ms/step")
BANDWIDTH = "GB/s"
RATES = (BANDWIDTH, "GFLOP/s")
LAUNCHES = ("own kernels", "launches per iteration", "launches outside loops")
MEMORY = "MiB temp"

Key = tuple[str, str]


def groups(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """Rows by case and x, in order."""
    by_case: dict[Key, list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.case, row.x), []).append(row)
    return by_case


def value(rows: Sequence[Row], provider: str, metric: str) -> float | None:
    """The median of a provider's metric, if it was measured."""
    return next((r.p50 for r in rows if (r.provider, r.metric) == (provider, metric)), None)


def larger_is_better(metric: str) -> bool:
    """Whether a larger ratio of this metric is the better one: of rates, not of times, bytes, errors or counts."""
    return metric in RATES


def plain(rows: Sequence[Row]) -> Iterator[str]:
    """Every row with its percentiles, its ratio to the baseline and the goal."""
    yield "| case | x | provider | metric | p20 | p50 | p80 | ratio | to | goal |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for r in rows:
        goal = "" if r.goal is None else f"{r.goal:.3g} {'met' if r.meets_goal else 'missed'}"
        cells = (r.provider, r.metric, *_percentiles(r), _ratio(r), r.baseline or "", goal)
        yield f"| {r.case} | {r.x} | {' | '.join(cells)} |"


def kernels(rows: Sequence[Row]) -> Iterator[str]:
    """Times of kernels, and beside each the part of a copy's bandwidth that it reaches."""
    yield "| case | x | provider | metric | p20 | p50 | p80 | ratio | to | of a copy's GB/s |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for (case, x), group in groups(rows).items():
        for r in group:
            if r.metric in TIME:
                cells = (r.provider, r.metric, *_percentiles(r), _ratio(r), r.baseline or "", share_of_copy(r, group))
                yield f"| {case} | {x} | {' | '.join(cells)} |"


def programs(rows: Sequence[Row]) -> Iterator[str]:
    """What compiled programs launch and how much memory they take, one line each."""
    yield f"| case | x | provider | {' | '.join(LAUNCHES)} | {MEMORY} | ratio | to |"
    yield "|---|---|---|" + "---|" * (len(LAUNCHES) + 3)
    for (case, x), group in groups(rows).items():
        for memory in (r for r in group if r.metric == MEMORY):
            counts = [value(group, memory.provider, metric) for metric in LAUNCHES]
            cells = ["" if n is None else f"{n:.0f}" for n in counts]
            cells += [f"{memory.p50:.4g}", _ratio(memory), memory.baseline or ""]
            yield f"| {case} | {x} | {memory.provider} | {' | '.join(cells)} |"


def share_of_copy(row: Row, rows: Sequence[Row]) -> str:
    """The part of a copy's bandwidth that the work of a row reaches, or nothing if it was not measured."""
    same = (r for r in rows if (r.case, r.x, r.provider, r.metric) == (row.case, row.x, row.provider, BANDWIDTH))
    ratio = next((r.ratio for r in same), None)
    return "" if ratio is None else f"{100 * ratio:.0f} %"


def _percentiles(row: Row) -> tuple[str, str, str]:
    return f"{row.p20:.4g}", f"{row.p50:.4g}", f"{row.p80:.4g}"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.3g}"
