"""Pictures of ratios: a panel per metric and baseline, a line per case, a mark per provider, on a logarithmic axis.

ms/step over python-somax
sgn_ce, mlp      |        o o    :            left of the line: less than the baseline
egn_ce, mlp      |  o            :
                 0.01   0.1      1      10
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.schema import Row
from bench.tables import larger_is_better

# More lines than one can read are one per first word of their cases.
_LINES = 32
_MARKS = "osd^v<>P*X"


def times(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Titles and pictures: how much of the baseline's time, memory or error each provider takes."""
    return _panels([row for row in rows if not larger_is_better(row.metric)])


def limits(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Titles and pictures: which part of the machine's limit (a copy, a matrix product) each provider reaches."""
    return _panels([row for row in rows if larger_is_better(row.metric)])


def _panels(rows: Sequence[Row]) -> list[tuple[str, str]]:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        # A row per seed repeats what the row of all seeds says.
        if row.ratio and math.isfinite(row.ratio) and ", seed " not in row.metric:
            panels.setdefault(f"{row.metric} over {row.baseline}", []).append(row)
    return [(title, _uri(_panel(own, title))) for title, own in panels.items()]


def _panel(rows: Sequence[Row], title: str) -> Any:
    lines = list(dict.fromkeys(row.case for row in rows))
    short = len(lines) > _LINES
    lines = list(dict.fromkeys(_line(row, short) for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    figure, axis = plt.subplots(figsize=(10, 1.1 + 0.26 * max(len(lines), len(providers))), layout="constrained")
    for number, provider in enumerate(providers):
        own = [row for row in rows if row.provider == provider]
        places = [lines.index(_line(row, short)) for row in own]
        mark = _MARKS[number % len(_MARKS)]
        style = {"color": f"C{number % 10}", "markersize": 5, "alpha": 0.8, "linestyle": "none", "marker": mark}
        axis.plot([row.ratio for row in own], places, label=provider, **style)
    axis.axvline(1.0, color="0.4", linewidth=1)
    axis.set(xscale="log", xlabel=f"{title} (the line: as much as it)", ylim=(len(lines) - 0.5, -0.5))
    axis.set_yticks(range(len(lines)), lines, fontsize=9)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _line(row: Row, short: bool) -> str:
    return row.case.split(",")[0] if short else row.case


def _uri(figure: Any) -> str:
    """The picture as an address that an `img` carries in itself: ids of several pictures cannot meet so."""
    file = io.BytesIO()
    # Without a date the same rows make the same page; as text the letters stay small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curvax"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
