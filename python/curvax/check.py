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
    going anywhere. A step that was taken and then undone, since it led to where the loss is no finite number, counts as
    refused. Reading `info` waits for the step: call it as often as that may be waited for.

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
        self._before = 0

    def __call__(self, info: Mapping[str, Any]) -> None:
        """Counts a step.

        Args:
          info: what `step` returned.

        Raises:
          StepsRefused: this is one refused step too many in a row.
        """
        if bool(info.get(Metric.UNDONE, False)):
            # The step before this one does not count as taken, so the row of refusals goes on where it broke off.
            self._skips = self._before + 1
        self._before = self._skips
        self._skips = 0 if bool(info[Metric.ACCEPTED]) else self._skips + 1
        if self._skips > self.max_skips:
            raise StepsRefused(f"{self._skips} steps in a row were refused. {cause_of_refusal(info)}")


def cause_of_refusal(info: Mapping[str, Any]) -> str:
    """Why the step of this info was refused, as far as it tells, and what to do."""
    fault = BatchFault(int(info.get(Metric.BATCH_FAULT, 0)))
    if fault is not BatchFault.NONE:
        return fault.describe()
    finite = bool(info[Metric.FINITE])
    if bool(info.get(Metric.UNDONE, False)):
        return (
            "The step before led to where the loss is not finite, and was undone: raise lam0, or lower learning_rate."
        )
    if not finite and not math.isfinite(float(info.get(Metric.LOSS, 0.0))):
        return "The loss is not finite: look at the batch and at the outputs of the model."
    code = int(info.get(Metric.RESULT, Result.CONVERGED))
    if code in _UNSOLVED:
        return Result(code).describe()
    if float(info.get(Metric.STEP_SIZE, 1.0)) == 0 and finite:
        return "The search found no step size that lowers the loss: give it more candidates, or raise lam0."
    if not finite:
        return "The step is not finite: raise lam0, or use float64."
    return "Every step raised the loss: is `predict_fn` the same function at every call, and its gradient finite?"
