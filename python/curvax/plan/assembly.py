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
from curvax.solvers import Solver
from curvax.telemetry import Metric, Telemetry


class PlanMode(enum.Enum):
    """`SHARED` does common work once and cadence work at its cadence; `OFF` runs the same modules without either."""

    SHARED = "shared"
    OFF = "off"


@dataclasses.dataclass(frozen=True)
class Assembly:
    """What a method is made of; each part can be swapped for another of its kind."""

    curvature: Curvature
    solver: Solver
    preconditioner: Preconditioner
    damping: Damping
    transform: optax.GradientTransformationExtraArgs
    telemetry: Telemetry
    backend: Backend = "auto"
    mode: PlanMode = PlanMode.SHARED
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        known = get_args(Backend)
        if self.backend not in known:
            raise ValueError(f"backend must be one of {', '.join(known)}, not {self.backend!r}.")
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
    def reported(self) -> Telemetry:
        """The telemetry that was asked for, and what a method with such modules reports in any case."""
        extra = [Metric.LEARNING_RATE] if callable(learning_rate_of(self.transform)) else []
        extra += [] if self.preconditioner.is_identity else [Metric.REFRESHES_REJECTED]
        return self.telemetry.beside(*extra)

    @property
    def partition(self) -> TrainablePartition:
        """Which parameters train."""
        return self.curvature.partition
