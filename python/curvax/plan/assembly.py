"""The modules of a method, before they are planned."""

from __future__ import annotations

import dataclasses
import enum
from typing import get_args

import optax

from curvax.chain import learning_rate_of
from curvax.curvature import Curvature, TrainablePartition
from curvax.damping import Damping, Scaling
from curvax.kernels._dispatch import Backend
from curvax.preconditioners import Preconditioner
from curvax.search import StepBound, StepSearch
from curvax.solvers import GeodesicAcceleration, Solver
from curvax.spelling import check_instance
from curvax.telemetry import SEARCH_METRICS, Metric, Telemetry


class PlanMode(enum.Enum):
    """`SHARED` does common work once and cadence work at its cadence; `OFF` runs the same modules without either."""

    SHARED = "shared"
    OFF = "off"


@dataclasses.dataclass(frozen=True)
class Assembly:
    """What a method is made of; each part can be swapped for another of its kind.

    Attributes:
      acceleration: the second-order correction of a Gauss-Newton direction, or `None`.
      step_bound, search: what shortens the update, and what chooses a step size along it; `None` takes it as it is.
      undo: keep the parameters before a step whose loss nobody evaluates, to return to them if that step leads to
        where the loss is no finite number. A copy of the parameters in the state, and none where every step is judged.
    """

    curvature: Curvature
    solver: Solver
    preconditioner: Preconditioner
    damping: Damping
    transform: optax.GradientTransformationExtraArgs
    telemetry: Telemetry
    acceleration: GeodesicAcceleration | None = None
    step_bound: StepBound | None = None
    search: StepSearch | None = None
    undo: bool = True
    backend: Backend = "auto"
    mode: PlanMode = PlanMode.SHARED
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        known = get_args(Backend)
        if self.backend not in known:
            raise ValueError(f"backend must be one of {', '.join(known)}, not {self.backend!r}.")
        for name, part, kind in (
            ("curvature", self.curvature, Curvature),
            ("solver", self.solver, Solver),
            ("preconditioner", self.preconditioner, Preconditioner),
            ("damping", self.damping, Damping),
        ):
            check_instance(name, part, kind)
        for name, part, kind in (
            ("search", self.search, StepSearch),
            ("step_bound", self.step_bound, StepBound),
            ("acceleration", self.acceleration, GeodesicAcceleration),
            ("scaling", self.scaling, Scaling),
        ):
            check_instance(name, part, kind, optional=True)
        if self.damping.needs_search and self.search is None:
            raise ValueError(
                "by_step_size reads the step size of a search: pass search=curvax.search.GridSearch(candidates=12)."
            )
        if not isinstance(self.undo, bool):
            raise TypeError(f"undo is a {type(self.undo).__name__}: pass True or False.")
        rate = learning_rate_of(self.transform)
        if rate is None and any(record.metric is Metric.LEARNING_RATE for record in self.telemetry.records):
            raise ValueError(
                "learning_rate cannot be recorded of a transform that tx= brings along: read it from state.transform, "
                "or pass learning_rate= in place of tx."
            )

    def traced_once(self) -> Assembly:
        """The same modules on a curvature that runs the user's functions once for each set of shapes."""
        return dataclasses.replace(self, curvature=self.curvature.traced_once())

    @property
    def may_undo(self) -> bool:
        """Whether the state has to keep the parameters before the last step."""
        return self.undo and self.damping.evaluate_every != 1

    @property
    def reads_product(self) -> bool:
        """Whether bound or search multiply the update with the curvature."""
        return any(part is not None and part.needs_product for part in (self.step_bound, self.search))

    @property
    def reads_rows(self) -> bool:
        """Whether scaling or acceleration read the factors of the curvature, whatever the lane."""
        return self.scaling is not None or self.acceleration is not None

    @property
    def offered(self) -> frozenset[Metric]:
        """The metrics that a method with such modules can report."""
        missing: set[Metric] = set() if self.may_undo else {Metric.UNDONE}
        if self.search is None:
            missing.add(Metric.STEP_SIZE)
        if self.search is None or not self.search.evaluations:
            missing.update(SEARCH_METRICS)
        if self.acceleration is None:
            missing.add(Metric.ACCELERATION)
        return frozenset(Metric) - missing

    @property
    def reported(self) -> Telemetry:
        """The telemetry that was asked for, and what a method with such modules reports in any case."""
        extra = [Metric.LEARNING_RATE] if callable(learning_rate_of(self.transform)) else []
        extra += [] if self.preconditioner.is_identity else [Metric.REFRESHES_REJECTED]
        extra += [Metric.UNDONE] if self.may_undo else []
        extra += [Metric.STEP_SIZE] if self.search is not None else []
        extra += SEARCH_METRICS if self.search is not None and self.search.evaluations else []
        return self.telemetry.beside(*extra)

    @property
    def partition(self) -> TrainablePartition:
        """Which parameters train."""
        return self.curvature.partition
