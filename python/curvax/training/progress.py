"""What a run shows while it goes on: a bar on a terminal where rich is installed, plain lines elsewhere."""

from __future__ import annotations

import abc
import dataclasses
import math
import sys
import time
from types import TracebackType
from typing import Any, Self

import numpy as np

from curvax.telemetry import Metric
from curvax.training.history import Recorder


@dataclasses.dataclass(frozen=True)
class Progress:
    """How a run shows that it goes on.

    Attributes:
      label: its name.
      seconds: between plain lines, where there is no bar; the last step has one in any case.
    """

    label: str = "fit"
    seconds: float = 5.0


class Display(abc.ABC):
    """A context in which progress is shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abc.abstractmethod
    def show(self, done: int, recorder: Recorder, *, last: bool = False) -> None:
        """So many steps are done."""


class _Silent(Display):
    def show(self, done: int, recorder: Recorder, *, last: bool = False) -> None:
        return None


class _Lines(Display):
    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps, self._shown, self._done = progress, steps, math.inf, -1

    def show(self, done: int, recorder: Recorder, *, last: bool = False) -> None:
        now = time.monotonic()
        self._shown = min(self._shown, now)  # compilation, which comes before the first steps, is not waited for
        if (last and done != self._done) or now - self._shown >= self._progress.seconds:
            self._shown, self._done = now, done
            text = f"step {done:>{len(str(self._steps))}} of {self._steps}  {recorder.elapsed:7.2f} s  {note(recorder)}"
            print(f"{self._progress.label}  {text}", flush=True)


class _Bar(Display):
    def __init__(self, progress: Progress, steps: int, rich: Any) -> None:
        columns = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[note]}"),
        )
        self._bar = rich.Progress(*columns)
        self._task = self._bar.add_task(progress.label, total=steps, note="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, done: int, recorder: Recorder, *, last: bool = False) -> None:
        self._bar.update(self._task, completed=done, note=note(recorder))


def display(progress: Progress | bool, steps: int) -> Display:
    """The display of a run of so many steps."""
    if progress is False:
        return _Silent()
    chosen = Progress() if progress is True else progress
    if sys.stdout.isatty():
        try:
            import rich.progress as rich
        except ImportError:
            return _Lines(chosen, steps)
        return _Bar(chosen, steps, rich)
    return _Lines(chosen, steps)


def note(recorder: Recorder) -> str:
    """Loss, damping, share of the last chunk's steps that were taken, and the last evaluation."""
    last, parts = recorder.last, []
    for metric in (Metric.LOSS, Metric.LAM):
        if metric in last:
            parts.append(f"{metric.value} {last[metric][-1]:.3e}")
    if Metric.ACCEPTED in last:
        parts.append(f"accepted {np.mean(last[Metric.ACCEPTED]):.0%}")
    parts += [f"{name} {v:.4g}" for name, v in recorder.last_evaluation.items() if name not in ("step", "seconds")]
    return "  ".join(parts)
