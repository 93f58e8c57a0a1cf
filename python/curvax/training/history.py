"""What a run did: a column for each scalar that its steps reported, and its evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from curvax.figures import new_axes
from curvax.telemetry import Metric

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, repr=False)
class History:
    """One entry for each step in every column.

    Attributes:
      columns: the scalars of `info`, by name, "step" and "loss" among them; (steps,) each.
      seconds: (steps,) seconds of training behind each step, without compilation and evaluations. They are measured
        chunk by chunk and spread evenly over its steps.
      evaluations: "step" (steps done before it), "seconds", and what `Evaluate` returned, by name; empty without one.
      compile_seconds: to trace and compile, all programs together.
    """

    columns: Mapping[str, np.ndarray]
    seconds: np.ndarray
    evaluations: Mapping[str, np.ndarray]
    compile_seconds: float

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column.

        Raises:
          KeyError: there is none of that name; the sentence lists those there are.
        """
        if name not in self.columns:
            raise KeyError(f"the history has no column {name!r}: choose from {', '.join(self.columns)}.")
        return self.columns[name]

    @property
    def measures(self) -> list[tuple[str, np.ndarray]]:
        """What was evaluated: names and values, that which chooses the best parameters first."""
        return [(name, values) for name, values in self.evaluations.items() if name not in ("step", "seconds")]

    def __repr__(self) -> str:
        return f"<curvax.training.History, {len(self)} steps of {', '.join(self.columns)}>"

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists, ready for JSON or a data frame."""
        return {
            "columns": {name: column.tolist() for name, column in self.columns.items()},
            "seconds": self.seconds.tolist(),
            "evaluations": {name: column.tolist() for name, column in self.evaluations.items()},
            "compile_seconds": self.compile_seconds,
        }

    def plot(self, ax: Any = None, *, label: str | None = None) -> Any:
        """Draws the loss against steps and against seconds, on logarithmic axes where all of it is positive.

        Args:
          ax: a pair of matplotlib axes, as an earlier call returned them, to compare runs; a single one for steps
            alone. A new figure by default.
          label: the curve's name, for `legend()`.

        Returns:
          The axes.

        Raises:
          ImportError: matplotlib is not installed.
        """
        axes = new_axes("history.plot()", 2, sharey=True) if ax is None else ax
        steps, loss = self[Metric.STEP] + 1, self[Metric.LOSS]
        abscissas = (("steps", steps), ("seconds of training", self.seconds))
        for axis, (name, x) in zip(np.atleast_1d(axes), abscissas, strict=False):
            axis.plot(x, loss, label=label)
            axis.set_xlabel(name)
            axis.set_ylabel("loss")
            if len(loss) and np.nanmin(loss) > 0:
                axis.set_yscale("log")
        return axes


class Recorder:
    """A history under way."""

    def __init__(self) -> None:
        self.compile_seconds, self.elapsed = 0.0, 0.0
        self._chunks: list[Columns] = []
        self._seconds: list[np.ndarray] = []
        self._evaluations: list[dict[str, float]] = []

    def add(self, columns: Columns, seconds: float) -> None:
        """Steps that took so many seconds together."""
        count = len(next(iter(columns.values())))
        self._chunks.append(columns)
        self._seconds.append(self.elapsed + seconds * np.arange(1, count + 1) / max(count, 1))
        self.elapsed += seconds

    def add_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation after so many steps."""
        self._evaluations.append({"step": step, "seconds": self.elapsed, **values})

    @property
    def last(self) -> Columns:
        """The last chunk of steps."""
        return self._chunks[-1] if self._chunks else {}

    @property
    def last_evaluation(self) -> Mapping[str, float]:
        """The last evaluation; empty if there was none."""
        return self._evaluations[-1] if self._evaluations else {}

    def history(self) -> History:
        """All of it so far."""
        names = self._chunks[0] if self._chunks else {}
        columns = {name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in names}
        seconds = np.concatenate(self._seconds) if self._seconds else np.zeros(0)
        entries = self._evaluations[0] if self._evaluations else {}
        evaluations = {name: np.asarray([entry[name] for entry in self._evaluations]) for name in entries}
        return History(columns, seconds, evaluations, self.compile_seconds)

    def restore(self, history: History) -> None:
        """Goes on from a history."""
        self.compile_seconds = history.compile_seconds
        if len(history):
            self._chunks, self._seconds = [dict(history.columns)], [history.seconds]
            self.elapsed = float(history.seconds[-1])
        names, columns = list(history.evaluations), history.evaluations.values()
        self._evaluations = [dict(zip(names, map(_number, entry), strict=True)) for entry in zip(*columns, strict=True)]


def _number(value: Any) -> Any:
    return value.item()
