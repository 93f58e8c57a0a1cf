"""Curves of a training run: progress while it goes on, then a table, a JSON file and a figure."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jaxlib
import matplotlib
import matplotlib.ticker
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table

import curvax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOAL = 0.95
_console = rich.console.Console(highlight=False, width=None if rich.console.Console().is_terminal else 120)
# Colors that color-blind readers can tell apart (Okabe and Ito); dashes where two curves may lie on each other.
_STYLES = (
    ("#0072B2", "-"),
    ("#E69F00", "-"),
    ("#D55E00", (0, (4, 2))),
    ("#009E73", "-"),
    ("#555555", "-."),
)


@dataclasses.dataclass
class Curve:
    """What a run did: lists with one entry per point, `steps[i]` steps and `seconds[i]` seconds of training in."""

    name: str
    compile_seconds: float
    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    train_loss: list[float] = dataclasses.field(default_factory=list)
    test_loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)

    def add(self, steps: int, seconds: float, train_loss: float, test_loss: float, accuracy: float) -> None:
        self.steps.append(steps)
        self.seconds.append(seconds)
        self.train_loss.append(train_loss)
        self.test_loss.append(test_loss)
        self.accuracy.append(accuracy)

    @property
    def goal(self) -> tuple[int, float] | None:
        """Steps and seconds to the first point with the accuracy that is asked for."""
        reached = (i for i, accuracy in enumerate(self.accuracy) if accuracy >= GOAL)
        return next(((self.steps[i], self.seconds[i]) for i in reached), None)


class Progress:
    """A bar per method on a terminal, a line per quarter of a run elsewhere."""

    def __init__(self, names: Sequence[str], steps: int) -> None:
        self._steps = steps
        self._bars: rich.progress.Progress | None = None
        if _console.is_terminal:
            columns = (
                rich.progress.TextColumn("{task.description:<14}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
                rich.progress.TimeElapsedColumn(),
            )
            self._bars = rich.progress.Progress(*columns, console=_console)
            self._tasks = {n: self._bars.add_task(n, total=steps, start=False, note="waiting") for n in names}

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def compiling(self, name: str) -> None:
        if self._bars is not None:
            self._bars.start_task(self._tasks[name])
            self._bars.update(self._tasks[name], note="compiling")

    def advance(self, curve: Curve) -> None:
        done, before = curve.steps[-1], curve.steps[-2]
        note = f"test loss {curve.test_loss[-1]:.4f}  accuracy {curve.accuracy[-1]:.2%}"
        if self._bars is not None:
            self._bars.update(self._tasks[curve.name], completed=done, note=note)
        elif done * 4 // self._steps > before * 4 // self._steps:
            print(f"{curve.name:<14}step {done:>4} of {self._steps}  {note}", flush=True)


def say(title: str, text: str) -> None:
    """A heading and a text under it."""
    _console.print(title)
    _console.print(text, markup=False, soft_wrap=True)
    _console.print()


def summarize(curves: Sequence[Curve]) -> None:
    """One row per method."""
    table = rich.table.Table(title="Test accuracy", caption=f"Seconds without compilation; goal: {GOAL:.0%} accuracy.")
    table.add_column("method", no_wrap=True)
    for heading in ("final", "best", "steps", "ms per step", "steps to goal", "seconds to goal", "compile s"):
        table.add_column(heading, justify="right")
    for c in curves:
        goal = ("-", "-") if c.goal is None else (str(c.goal[0]), f"{c.goal[1]:.3f}")
        pace = 1e3 * c.seconds[-1] / c.steps[-1]
        final, best = f"{c.accuracy[-1]:.2%}", f"{max(c.accuracy):.2%}"
        table.add_row(c.name, final, best, str(c.steps[-1]), f"{pace:.2f}", *goal, f"{c.compile_seconds:.1f}")
    _console.print()
    _console.print(table)


def save(curves: Sequence[Curve], config: Mapping[str, Any], path: Path) -> None:
    """Configuration, versions and curves as JSON; a loss that is not a number becomes null."""
    _folder(path)
    content = {
        "config": config,
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (curvax, jax, jaxlib, optax, np)},
        },
        "device": jax.devices()[0].device_kind,
        "goal": GOAL,
        "curves": [_finite(dataclasses.asdict(c)) for c in curves],
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def draw(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Test loss above training loss, against steps and against seconds."""
    _folder(path)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex="col", sharey="row", layout="constrained")
    for curve, (color, dashes) in zip(curves, _STYLES, strict=False):
        for row, losses in enumerate((curve.test_loss, curve.train_loss)):
            for column, abscissa in enumerate((curve.steps, curve.seconds)):
                # The start has no place on a logarithmic axis of seconds.
                axes[row, column].plot(
                    abscissa[column:], losses[column:], color=color, linestyle=dashes, linewidth=1.8, label=curve.name
                )
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(True, which="major", color="0.88")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test loss")
    axes[1, 0].set_ylabel("training loss")
    axes[1, 0].set_xlabel("steps")
    axes[1, 1].set_xlabel("seconds of training (without compilation)")
    axes[1, 1].set_xscale("log")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(curves), frameon=False, handlelength=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")


def _folder(path: Path) -> None:
    """Makes the folder of `path`, one that Git passes over."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        (path.parent / ".gitignore").write_text("*\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
