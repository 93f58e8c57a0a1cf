"""Plans as drawings: an SVG for pages and notebooks, written without any library.

    lane row, Cholesky
                      step 0 1 2 3 4 5 6 ...   asked for by          work of an average step
    linearize              # # # # # # #       gradient, Cholesky    ####            118 kFLOP
    refresh                # . . . . # .       Jacobi                #                56 kFLOP
    solver that could serve                    predicted time of a step
    Cholesky <-                                ##                    166 us

A drawing is a column of bands (`_Band`), each of which knows its height and writes its elements below a given line. It
stands on a light card of its own, so that it reads alike on light and dark pages.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

from curvax.requirements import Cadence, Part

WIDTH = 920
STEPS = 16
"""Steps that are drawn: enough to see the cadences 3, 5 and 10 keep their own steps."""

_INK, _MUTED, _FULL, _SOFT = ('fill="#1f2328"', 'fill="#59636e"', 'fill="#3b5bdb"', 'fill="#dbe4ff"')
_CARD = 'fill="#ffffff" stroke="#d0d7de"'
_END, _MIDDLE, _BOLD, _SMALL, _LARGE = (
    ' text-anchor="end"', ' text-anchor="middle"', ' font-weight="600"', ' font-size="10"', ' font-size="16"',
)  # fmt: skip
_LEFT, _GRID, _BY, _BAR, _VALUE = 20, 170, 420, 690, 900
_ROW, _CELL = 22, 15


@dataclasses.dataclass(frozen=True)
class PartRow:
    """A part of a step: when it is due, who asks for it, and what it costs in an average step (None: unknown)."""

    part: str
    cadence: Cadence
    by: str
    work: float | None
    work_text: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """A named quantity beside others of its kind; `chosen` is drawn in full color."""

    name: str
    value: float
    text: str
    chosen: bool = True


@dataclasses.dataclass(frozen=True)
class _Band:
    height: int
    draw: Callable[[int], list[str]]


def rows_of(
    requirements: Sequence[tuple[Part, Cadence, str]],
    work: dict[Part, float],
    text: Callable[[float], str],
) -> list[PartRow]:
    """One row for each part that somebody asks for or that costs something, in the order in which a step runs them."""
    rows: list[PartRow] = []
    for part in Part:
        asked = [(cadence, by) for one, cadence, by in requirements if one is part]
        if not asked and part not in work:
            continue
        cadence = Cadence(tuple(period for each, _ in asked for period in each.periods) or (1,))
        cost = work.get(part)
        by = "; ".join(dict.fromkeys(name for _, name in asked))
        rows.append(PartRow(part.value, cadence, by, cost, "" if cost is None else text(cost)))
    return rows


def title(first: str, second: str) -> _Band:
    """The heading, and a line below it."""

    def draw(top: int) -> list[str]:
        return [
            _text(_LEFT, top + 20, first, _INK + _LARGE + _BOLD),
            _text(_LEFT, top + 40, _cut(second, 130), _MUTED),
        ]

    return _Band(54, draw)


def timeline(rows: Sequence[PartRow]) -> _Band:
    """Parts over the first steps, as filled cells where a part is due."""

    def draw(top: int) -> list[str]:
        marks = [_text(_GRID + _CELL * t + 6, top + 12, str(t), _MUTED + _SMALL + _MIDDLE) for t in _TICKS]
        heads = [
            _text(_LEFT, top + 12, "part", _MUTED),
            _text(_GRID - 8, top + 12, "step", _MUTED + _SMALL + _END),
            *marks,
            _text(_BY, top + 12, "asked for by", _MUTED),
            _text(_VALUE, top + 12, "work of an average step", _MUTED + _END),
        ]
        most = max((row.work or 0.0 for row in rows), default=0.0)
        lines = (_part_line(row, top + 20 + _ROW * i, most) for i, row in enumerate(rows))
        return [*heads, *(element for line in lines for element in line)]

    return _Band(34 + _ROW * len(rows), draw)


_TICKS = range(0, STEPS, 5)


def _part_line(row: PartRow, top: int, most: float) -> list[str]:
    cells = [
        _rect(_GRID + _CELL * t, top + 3, 12, 12, _FULL if due else _SOFT, label=f"{row.part}, step {t}" if due else "")
        for t in range(STEPS)
        for due in [any(t % period == 0 for period in row.cadence.periods)]
    ]
    line = [_text(_LEFT, top + 13, row.part), *cells, _text(_BY, top + 13, _cut(row.by, 40), _MUTED, full=row.by)]
    if row.work is not None:
        line += _bar(row.work / most if most else 0.0, top, row.work_text, chosen=True)
    return line


def bars(heading: str, right: str, entries: Sequence[Bar]) -> _Band:
    """Named quantities as bars on one scale, logarithmic where they differ by more than a factor of fifty."""
    values = [entry.value for entry in entries if entry.value > 0]
    logarithmic = bool(values) and max(values) > 50 * min(values)
    scale = " (logarithmic)" if logarithmic else ""

    def share(value: float) -> float:
        if not logarithmic:
            return value / max(values, default=1.0)
        return (1 + math.log(value / min(values))) / (1 + math.log(max(values) / min(values))) if value > 0 else 0.0

    def draw(top: int) -> list[str]:
        elements = [
            _text(_LEFT, top + 12, heading, _MUTED),
            _text(_VALUE, top + 12, right + scale, _MUTED + _END),
        ]
        for i, entry in enumerate(entries):
            line = top + 20 + _ROW * i
            look = _INK + _BOLD if entry.chosen and not all(e.chosen for e in entries) else _INK
            elements.append(_text(_LEFT, line + 13, _cut(entry.name, 95), look, full=entry.name))
            elements += _bar(share(entry.value), line, entry.text, chosen=entry.chosen)
        return elements

    return _Band(34 + _ROW * len(entries), draw)


def table(heading: str, rows: Sequence[tuple[str, str, str]]) -> _Band:
    """Three columns of words."""

    def draw(top: int) -> list[str]:
        elements = [_text(_LEFT, top + 12, heading, _MUTED)]
        for i, (first, second, third) in enumerate(rows):
            line = top + 33 + 18 * i
            elements += [
                _text(_LEFT, line, _cut(first, 26), full=first),
                _text(_LEFT + 180, line, _cut(second, 12)),
                _text(_LEFT + 270, line, _cut(third, 96), _MUTED, full=third),
            ]
        return elements

    return _Band(32 + 18 * len(rows), draw)


def drawing(bands: Sequence[_Band], description: str) -> str:
    """The bands one below another as an SVG, which says `description` to whoever cannot see it."""
    top, parts = 14, list[str]()
    for band in bands:
        parts += band.draw(top)
        top += band.height
    height = top + 6
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="plan" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" style="max-width:100%;height:auto" role="img" font-size="12" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            f"<title>{html.escape(description)}</title>",
            _rect(0.5, 0.5, WIDTH - 1, height - 1, _CARD),
            *parts,
            "</svg>",
            "",
        ]
    )


def page(svg: str, text: str) -> str:
    """The drawing as a notebook shows it, with the plan's text folded away below it."""
    return f"<div>{svg}<details><summary>explain()</summary><pre>{html.escape(text)}</pre></details></div>"


def _bar(share: float, top: int, text: str, *, chosen: bool) -> list[str]:
    length = max(share, 0.0) * (_VALUE - 90 - _BAR)
    return [
        _rect(_BAR, top + 4, max(length, 1.0), 10, _FULL if chosen else _SOFT),
        _text(_VALUE, top + 13, text, _INK + _END),
    ]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip(" ,;(") + "…"


def _text(x: float, y: float, text: str, look: str = _INK, full: str = "") -> str:
    hint = f"<title>{html.escape(full)}</title>" if full else ""
    return f'<text x="{x:g}" y="{y:g}" {look}>{html.escape(text)}{hint}</text>'


def _rect(x: float, y: float, width: float, height: float, look: str, label: str = "") -> str:
    body = f"><title>{html.escape(label)}</title></rect>" if label else "/>"
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" {look}{body}'
