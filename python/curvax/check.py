"""A check on the host that training goes on: many steps refused in a row are an error with a cause."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from curvax.losses.batch_fault import BatchFault
from curvax.result import SOLVED, Result
from curvax.telemetry import Metric

_MAX_SKIPS = 20
"""A trust region that was off by twenty orders of magnitude finds its damping in fewer refusals."""


_UNSOLVED = frozenset(Result) - SOLVED


class StepsRefused(RuntimeError):
    """No step was taken for a long time; the message says why."""


class Check:
    """Raises once too many steps in a row were refused.

    A refused step leaves parameters and state as they were, so a loop that looks at nothing may run for hours without
    going anywhere. Reading `info` waits for the step: call it as often as that may be waited for.

        check = curvax.Check()
        for batch in batches:
            params, state, info = step(params, batch, state, rng)
            check(info)

    Attributes:
      max_skips: refused steps in a row that are no error; 20.
    """

    def __init__(self, max_skips: int = _MAX_SKIPS) -> None:
        if max_skips < 1:
            raise ValueError(f"max_skips must be at least 1, not {max_skips}.")
        self.max_skips = max_skips
        self._skips = 0

    def __call__(self, info: Mapping[str, Any]) -> None:
        """Counts a step.

        Args:
          info: what `step` returned.

        Raises:
          StepsRefused: this is one refused step too many in a row.
        """
        self._skips = 0 if bool(info[Metric.ACCEPTED]) else self._skips + 1
        if self._skips > self.max_skips:
            raise StepsRefused(f"{self._skips} steps in a row were refused. {_cause(info)}")


def _cause(info: Mapping[str, Any]) -> str:
    """Why the step of this info was refused, as far as it tells, and what to do."""
    fault = BatchFault(int(info.get(Metric.BATCH_FAULT, 0)))
    if fault is not BatchFault.NONE:
        return fault.describe()
    finite = bool(info[Metric.FINITE])
    if not finite and not math.isfinite(float(info.get(Metric.LOSS, 0.0))):
        return "The loss is not finite: look at the batch and at the outputs of the model."
    code = int(info.get(Metric.RESULT, Result.CONVERGED))
    if code in _UNSOLVED:
        return Result(code).describe()
    if not finite:
        return "The step is not finite: raise lam0, or use float64."
    return "Every step raised the loss: is `predict_fn` the same function at every call, and its gradient finite?"
