"""What the demos print and draw of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from curvax.training import FitResult

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Colors that color-blind readers can tell apart (Okabe and Ito); the first is the one to look at.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#555555", "#CC79A7")


def seconds_to(result: FitResult, measure: str, goal: float, *, rising: bool = False) -> float:
    """Seconds of training to the first evaluation that is at the goal; infinite if there is none."""
    evaluations = result.history.evaluations
    reached = evaluations[measure] >= goal if rising else evaluations[measure] <= goal
    return float(evaluations["seconds"][np.argmax(reached)]) if reached.any() else np.inf


def table_of_race(
    results: Mapping[str, FitResult], measure: str, goals: Sequence[float], *, rising: bool = False
) -> str:
    """One row per run: what it ended with, and seconds to every goal."""
    shown = f"{{:.{2 if rising else 1}{'%' if rising else 'e'}}}"
    headings = [f"s to {goal:.0%}" if rising else f"s to {goal:.0e}" for goal in goals]
    columns = ["steps", "ms/step", "compile s", f"final {measure}", *headings]
    lines = ["", f"{'':<14}" + "".join(f"{c:>{max(len(c) + 2, 11)}}" for c in columns)]
    for name, result in results.items():
        history, times = result.history, [seconds_to(result, measure, goal, rising=rising) for goal in goals]
        cells = [
            str(len(history)),
            f"{1e3 * history.seconds[-1] / len(history):.2f}",
            f"{history.compile_seconds:.1f}",
            shown.format(history.evaluations[measure][-1]),
            *("-" if np.isinf(t) else f"{t:.2f}" for t in times),
        ]
        lines.append(
            f"{name:<14}" + "".join(f"{x:>{max(len(c) + 2, 11)}}" for x, c in zip(cells, columns, strict=True))
        )
    return "\n".join(
        (*lines, "Seconds of training; compilation is apart, and the clock stands during evaluations.", "")
    )


class Words(NamedTuple):
    """What stands at a picture."""

    title: str
    measure: str
    seconds: str = "seconds of training"


def draw_race(results: Mapping[str, FitResult], measure: str, words: Words, path: Path) -> None:
    """The measure against seconds, both logarithmic."""
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    for color, (name, result) in zip(_COLORS, results.items(), strict=False):
        evaluations = result.history.evaluations
        x, y = evaluations["seconds"], evaluations[measure]
        # The start has no place on a logarithmic axis of seconds.
        axis.plot(x[1:], y[1:], color=color, linewidth=2.6 if color == _COLORS[0] else 1.6)
        axis.annotate(name, (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points", color=color, va="center")
    axis.set(xscale="log", yscale="log", xlabel=words.seconds, ylabel=words.measure)
    axis.grid(True, which="major", color="0.88")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(right=axis.get_xlim()[1] * 2.2)
    axis.set_title(words.title, loc="left", fontsize=11)
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        (path.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    print(f"wrote {path}")
