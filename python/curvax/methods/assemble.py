"""Methods from module objects."""

from __future__ import annotations

import dataclasses

import optax

from curvax.chain import build_transform
from curvax.curvature import Curvature, in_pieces
from curvax.damping import Constant, Damping, Scaling
from curvax.kernels._dispatch import Backend
from curvax.keywords import spread
from curvax.method import Method
from curvax.plan import Assembly, PlanMode
from curvax.preconditioners import IdentityPreconditioner, Preconditioner
from curvax.search import StepBound, StepSearch
from curvax.solvers import GeodesicAcceleration, Solver
from curvax.telemetry import Telemetry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modules:
    """Keywords of `assemble`.

    Attributes:
      curvature: `curvax.curvature.GaussNewton(Model(predict_fn), loss)` or `Hessian(LossFunction(loss_fn))`.
      solver: `CG()`, `Cholesky()`, `RowSpace(...)`, `Diagonal(...)`, `Lineax(...)`, `Automatic((...))`.
      damping: lam's policy; no damping if `None`.
      scaling: D of the damping lam D; `None`, the default, for the identity.
      preconditioner: for CG, or the whole of the diagonal lane.
      telemetry: what `info` has; the loss and lam if `None`.
      tx: Optax chain behind the direction, sign included; the full direction with learning rate 1 if `None`.
      acceleration: `GeodesicAcceleration()`, for a Gauss-Newton curvature.
      search, step_bound, undo: a search for the step size, a bound on the update, and whether a step that nobody looked
        at is undone where it leads to no finite loss (`methods.options.AssemblyOptions`).
      microbatch_size: examples per accumulated piece.
      backend: preferred implementation of kernels.
      plan: `PlanMode.OFF` runs the modules without sharing and cadences.
    """

    curvature: Curvature
    solver: Solver
    damping: Damping | None = None
    scaling: Scaling | None = None
    preconditioner: Preconditioner | None = None
    telemetry: Telemetry | None = None
    tx: optax.GradientTransformation | None = None
    acceleration: GeodesicAcceleration | None = None
    search: StepSearch | None = None
    step_bound: StepBound | None = None
    undo: bool = True
    microbatch_size: int | None = None
    backend: Backend = "auto"
    plan: PlanMode = PlanMode.SHARED


@spread(Modules)
def assemble(modules: Modules) -> Method:
    """A method from its modules.

    Raises:
      ValueError: modules that cannot work together.
    """
    curvature = modules.curvature
    if modules.microbatch_size is not None:
        curvature = in_pieces(curvature, modules.microbatch_size)
    transform = build_transform() if modules.tx is None else optax.with_extra_args_support(modules.tx)
    return Method(
        Assembly(
            curvature=curvature,
            solver=modules.solver,
            preconditioner=modules.preconditioner or IdentityPreconditioner(),
            damping=modules.damping or Constant(0.0),
            transform=transform,
            telemetry=modules.telemetry or Telemetry(),
            acceleration=modules.acceleration,
            step_bound=modules.step_bound,
            search=modules.search,
            undo=modules.undo,
            backend=modules.backend,
            mode=modules.plan,
            scaling=modules.scaling,
        )
    )
