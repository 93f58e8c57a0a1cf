"""The metric schema: which scalars a step reports, and when.

Info is a dictionary with the same keys in every step, chosen at assembly. A metric that is not due is NaN (floats),
-1 (integers) or False (booleans). Metrics cost what the plan orders for them and nothing else; none of them waits for
the device. A loss of several terms has "loss/name" beside "loss" for what each of them adds to it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp

from curvax.requirements import Cadence, Part, Requirement
from curvax.spelling import nearest


class Metric(enum.StrEnum):
    """A scalar that a step can report; the value is its key in `info`."""

    STEP = "step"
    LOSS = "loss"
    LAM = "lam"
    RADIUS = "radius"
    ACCEPTED = "accepted"
    FINITE = "finite"
    REJECTED = "rejected"
    BATCH_FAULT = "batch_fault"
    UNDONE = "undone"
    RESULT = "result"
    ITERATIONS = "iterations"
    RESIDUAL = "residual"
    ACCELERATION = "acceleration"
    LOSS_AFTER = "loss_after"
    PREDICTED = "predicted"
    ACTUAL = "actual"
    RHO = "rho"
    GRADIENT_NORM = "gradient_norm"
    DIRECTION_NORM = "direction_norm"
    UPDATE_NORM = "update_norm"
    LEARNING_RATE = "learning_rate"
    SHARPNESS = "sharpness"
    REFRESHES_REJECTED = "refreshes_rejected"
    STEP_SIZE = "step_size"
    SEARCH_LOSS = "search_loss"
    SEARCH_LOSS_AFTER = "search_loss_after"

    @property
    def meaning(self) -> str:
        """One line for tables and documentation."""
        return _MEANING[self]

    @property
    def evaluates(self) -> bool:
        """Whether it needs the loss after the step."""
        return self in (Metric.LOSS_AFTER, Metric.ACTUAL, Metric.RHO)

    @property
    def predicts(self) -> bool:
        """Whether it needs the decrease that the quadratic model predicts."""
        return self in (Metric.PREDICTED, Metric.RHO)

    def missing(self) -> jax.Array:
        """The value in a step where the metric is not due."""
        if self in _BOOLEANS:
            return jnp.asarray(False)
        if self in _INTEGERS:
            return jnp.asarray(-1, jnp.int32)
        return jnp.asarray(jnp.nan, jnp.result_type(float))


_BOOLEANS = (Metric.ACCEPTED, Metric.FINITE, Metric.UNDONE)
_INTEGERS = (
    Metric.STEP,
    Metric.REJECTED,
    Metric.BATCH_FAULT,
    Metric.RESULT,
    Metric.ITERATIONS,
    Metric.REFRESHES_REJECTED,
)
_MEANING = {
    Metric.STEP: "number of steps before this one",
    Metric.LOSS: "loss before the step, on the step's batch; of an inner loop the mean over its minibatches",
    Metric.LAM: "damping used",
    Metric.RADIUS: "bound on the norm of the direction, of a damping that has one; NaN of others",
    Metric.ACCEPTED: "the step was taken",
    Metric.FINITE: "the step is made of finite numbers",
    Metric.REJECTED: "steps not taken so far, this one included",
    Metric.BATCH_FAULT: "what is wrong with the values of the batch, a curvax.losses.BatchFault",
    Metric.UNDONE: "the step before this one was taken back: it led to where the loss is no finite number",
    Metric.RESULT: "how the solve ended, a curvax.solvers.Result",
    Metric.ITERATIONS: "iterations of the solver",
    Metric.RESIDUAL: "true residual of the linear system relative to its right-hand side; NaN where none is solved",
    Metric.ACCELERATION: "2 |c| / |s| of the second-order correction c to the direction s; it is left out above `most`",
    Metric.LOSS_AFTER: "loss after the proposed step, on the same batch",
    Metric.PREDICTED: "decrease of the loss that the quadratic model predicts",
    Metric.ACTUAL: "decrease of the loss",
    Metric.RHO: "actual over predicted decrease",
    Metric.GRADIENT_NORM: "Euclidean norm of the gradient",
    Metric.DIRECTION_NORM: "Euclidean norm of the solution of the linear system",
    Metric.UPDATE_NORM: "Euclidean norm of the proposed update; of an inner loop that of the update taken, 0 for none",
    Metric.LEARNING_RATE: "learning rate of this step",
    Metric.SHARPNESS: "largest eigenvalue of the curvature, by ten products in the steps that are due",
    Metric.REFRESHES_REJECTED: "refreshes of the preconditioner that were not finite so far, this step's included",
    Metric.STEP_SIZE: "step size that the search took, 0 for none",
    Metric.SEARCH_LOSS: "loss before the step on the search's data",
    Metric.SEARCH_LOSS_AFTER: "loss after the step on the search's data",
}
SEARCH_METRICS = (Metric.SEARCH_LOSS, Metric.SEARCH_LOSS_AFTER)
"""What a search that evaluates losses reports beside its step size."""


@dataclasses.dataclass(frozen=True)
class MetricRecord:
    """A metric and every how many steps it is reported."""

    metric: Metric
    every: int = 1

    def __post_init__(self) -> None:
        known = [metric.value for metric in Metric]
        if self.metric not in known:
            raise ValueError(f"there is no metric {self.metric!r}.{nearest(str(self.metric).lower(), known)}")
        object.__setattr__(self, "metric", Metric(self.metric))  # its name will do
        if self.every < 1:
            raise ValueError(f"{self.metric.value} must be recorded every 1 or more steps, not {self.every}.")


ALWAYS = tuple(map(MetricRecord, (Metric.STEP, Metric.ACCEPTED, Metric.FINITE, Metric.REJECTED, Metric.BATCH_FAULT)))


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """The records of a method; `step`, `accepted`, `finite`, `rejected` and `batch_fault` are always among them."""

    records: tuple[MetricRecord, ...] = (MetricRecord(Metric.LOSS), MetricRecord(Metric.LAM))

    def __post_init__(self) -> None:
        for record in self.records:
            if not isinstance(record, MetricRecord):
                raise TypeError(f"{record!r} is no record: pass curvax.telemetry.MetricRecord('gradient_norm'), say.")
        chosen = tuple(r for r in ALWAYS if r.metric not in {x.metric for x in self.records}) + self.records
        if len({r.metric for r in chosen}) != len(chosen):
            raise ValueError("a metric is recorded twice: give each one once.")
        object.__setattr__(self, "records", chosen)

    def check(self, offered: Collection[Metric], owner: str) -> None:
        """Raises ValueError for a record of a metric that `owner`, which reports those `offered`, does not have."""
        for record in self.records:
            if record.metric not in offered:
                raise ValueError(f"{owner} has no {record.metric.value} to record: drop its MetricRecord.")

    def beside(self, *metrics: Metric) -> Telemetry:
        """With those metrics in every step that no record is about yet."""
        known = {record.metric for record in self.records}
        return Telemetry((*self.records, *(MetricRecord(m) for m in metrics if m not in known)))

    def requirements(self) -> tuple[Requirement, ...]:
        """The parts of a step that its metrics ask for, one for each period."""
        evaluated = [r for r in self.records if r.metric.evaluates]
        predicted = [r for r in self.records if r.metric.predicts]
        sharp = [r for r in self.records if r.metric is Metric.SHARPNESS]
        return (
            *_by_period(Part.LOSS_AFTER, evaluated),
            *_by_period(Part.PREDICTED, predicted),
            *_by_period(Part.SHARPNESS, sharp),
        )

    def collect(self, step: jax.Array, values: Mapping[Metric, jax.Array]) -> dict[str, jax.Array]:
        """The info of one step from the values of its metrics."""
        info = {}
        for record in self.records:
            missing = record.metric.missing()
            value = values[record.metric].astype(missing.dtype)
            info[record.metric.value] = _when_due(step, record.every, value, missing)
        return info

    def collect_losses(self, step: jax.Array, losses: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What each term adds to the loss, as "loss/name" where and when the loss itself is reported."""
        missing = Metric.LOSS.missing()
        return {
            f"{Metric.LOSS.value}/{name}": _when_due(step, record.every, loss.astype(missing.dtype), missing)
            for record in self.records
            if record.metric is Metric.LOSS
            for name, loss in losses.items()
        }


def _when_due(step: jax.Array, every: int, value: jax.Array, missing: jax.Array) -> jax.Array:
    return value if every == 1 else jnp.where(step % every == 0, value, missing)


def _by_period(part: Part, records: list[MetricRecord]) -> list[Requirement]:
    periods = sorted({record.every for record in records})
    names = {period: ", ".join(r.metric.value for r in records if r.every == period) for period in periods}
    return [Requirement(part, Cadence((period,)), f"telemetry: {names[period]}") for period in periods]
