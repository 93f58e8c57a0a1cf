"""Gauss-Newton presets: SGN (parameter-space CG), EGN (row space), dense, and the automatic choice."""

from __future__ import annotations

import dataclasses

from curvax.curvature import FisherType, GeneralizedGaussNewton, Terms
from curvax.damping import Scaling
from curvax.losses import Loss, SoftmaxCrossEntropy, SquaredError
from curvax.method import Method
from curvax.methods.options import (
    SHORTENED,
    AssemblyOptions,
    CGOptions,
    DampingOptions,
    ModelOptions,
    PrecondOptions,
    SolveRecordOptions,
    TransformOptions,
)
from curvax.methods.registry import preset
from curvax.search import StepSearch
from curvax.solvers import QR, Automatic, Cholesky, GeodesicAcceleration, MultiShiftCG, RowSpace, Solver
from curvax.structure.memory import DEFAULT_MAX_BYTES


def _tries_several(options: DampingOptions) -> bool:
    return len(options.damping.factors or ()) > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussNewtonOptions(SolveRecordOptions, TransformOptions, DampingOptions, ModelOptions, AssemblyOptions):
    """Keywords that all Gauss-Newton presets share.

    Attributes:
      scaling: D of the damping lam D: `curvax.damping.Marquardt()` follows the units of each parameter. `None`, the
        default, is the identity, which went as far on the classic least-squares problems.
      acceleration: `curvax.solvers.GeodesicAcceleration()` adds the second-order correction of the step in curved
        valleys; `None` takes the step as it is.
    """

    scaling: Scaling | None = None
    acceleration: GeodesicAcceleration | None = None

    @property
    def correction(self) -> GeodesicAcceleration | None:
        return self.acceleration


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGNFixedOptions(PrecondOptions, CGOptions, GaussNewtonOptions):
    """Keywords of `sgn_ce` and `sgn_mse`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGNOptions(SGNFixedOptions):
    """Keywords of `sgn`.

    Attributes:
      loss: loss in output space, or the `Terms` of one.
      fisher: which member of the Gauss-Newton family: GGN, Monte Carlo Fisher, empirical Fisher.
    """

    loss: Loss | Terms
    fisher: FisherType = GeneralizedGaussNewton()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EGNFixedOptions(GaussNewtonOptions):
    """Keywords of `egn_ce` and `egn_mse`.

    Attributes:
      search: as in other presets. By default a step that the trust region would refuse is halved up to five times
        before; `None` refuses it at once.
      max_bytes: bound on the memory of explicit rows.
    """

    search: StepSearch | None = SHORTENED
    max_bytes: int = DEFAULT_MAX_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class EGNOptions(EGNFixedOptions):
    """Keywords of `egn`; `loss` and `fisher` as in `sgn`."""

    loss: Loss | Terms
    fisher: FisherType = GeneralizedGaussNewton()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCGOptions(CGOptions, GaussNewtonOptions):
    """Keywords of `egn_mse_cg`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutomaticOptions(CGOptions, GaussNewtonOptions):
    """Keywords of `gauss_newton`.

    Attributes:
      lam_policy: a trust region, whether it gets a `lam0` or not.
      search: as in `egn`.
      max_bytes: bound on the memory of explicit rows.
      loss, fisher: as in `sgn`.
    """

    loss: Loss | Terms
    fisher: FisherType = GeneralizedGaussNewton()
    lam_policy: object = "trust_region"
    search: StepSearch | None = SHORTENED
    max_bytes: int = DEFAULT_MAX_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpringOptions(GaussNewtonOptions):
    """Keywords of `spring`, with momentum and a trust region.

    Attributes:
      learning_rate: 1, the direction as it is. The paper has lam = 1e-3, decays a small rate and bounds the step
        (`clip_norm`); the trust region here, which replaces all three, needs none of them tuned.
      momentum: how much of the previous direction the regularizer pulls towards; 0.9. The paper's 0.99 goes with its
        small rates: at full steps 0.9 went further on PDE residuals (3.6e-8 against 4.7e-7 after 150 steps), and small
        batches that differ do not pile up.
      loss, fisher: as in `sgn`; `SquaredError(centered=True)` for variational Monte Carlo.
      max_bytes: bound on the memory of explicit rows.
    """

    loss: Loss | Terms = SquaredError()
    fisher: FisherType = GeneralizedGaussNewton()
    momentum: float = 0.9
    max_bytes: int = DEFAULT_MAX_BYTES


def _iterative(options: RowCGOptions | SGNFixedOptions | AutomaticOptions) -> Solver:
    """CG, in one Krylov space for several lam where the damping tries them."""
    return MultiShiftCG(options.tol, options.maxiter) if _tries_several(options) else options.cg


def _build(
    options: GaussNewtonOptions, loss: Loss | Terms, solver: Solver, fisher: FisherType = GeneralizedGaussNewton()
) -> Method:
    return options.build(
        options.gauss_newton(loss, fisher),
        solver,
        damping=options.damping,
        scaling=options.scaling,
        preconditioner=options.preconditioner if isinstance(options, PrecondOptions) else None,
        transform=options.transform,
        telemetry=options.telemetry,
    )


@preset("SGN: Gauss-Newton by CG in parameter space, any loss.", SGNOptions)
def sgn(options: SGNOptions) -> Method:
    """Stochastic Gauss-Newton (Gargiani et al. 2020): CG on the damped Gauss-Newton system in parameter space."""
    return _build(options, options.loss, _iterative(options), options.fisher)


@preset("SGN (CE): Gauss-Newton by CG in parameter space, softmax cross entropy.", SGNFixedOptions)
def sgn_ce(options: SGNFixedOptions) -> Method:
    """`sgn` with softmax cross entropy."""
    return _build(options, SoftmaxCrossEntropy(), _iterative(options))


@preset("SGN (MSE): Gauss-Newton by CG in parameter space, squared error.", SGNFixedOptions)
def sgn_mse(options: SGNFixedOptions) -> Method:
    """`sgn` with squared error."""
    return _build(options, SquaredError(), _iterative(options))


@preset("EGN: exact Gauss-Newton direction by Cholesky in row space, any loss.", EGNOptions)
def egn(options: EGNOptions) -> Method:
    """Exact Gauss-Newton (Korbit et al. 2024): the damped system solved exactly through its batch x outputs rows."""
    return _build(options, options.loss, RowSpace(Cholesky(), max_bytes=options.max_bytes), options.fisher)


@preset("EGN (CE): exact Gauss-Newton direction in row space, softmax cross entropy.", EGNFixedOptions)
def egn_ce(options: EGNFixedOptions) -> Method:
    """`egn` with softmax cross entropy."""
    return _build(options, SoftmaxCrossEntropy(), RowSpace(Cholesky(), max_bytes=options.max_bytes))


@preset("EGN (MSE): exact Gauss-Newton direction in row space, squared error.", EGNFixedOptions)
def egn_mse(options: EGNFixedOptions) -> Method:
    """`egn` with squared error."""
    return _build(options, SquaredError(), RowSpace(Cholesky(), max_bytes=options.max_bytes))


@preset("EGN (MSE) by CG in row space.", RowCGOptions)
def egn_mse_cg(options: RowCGOptions) -> Method:
    """Squared error, conjugate gradients in row space: the iterates of `sgn_mse`, on vectors of batch x outputs."""
    return _build(options, SquaredError(), RowSpace(_iterative(options)))


@preset("Gauss-Newton (CE) by dense Cholesky in parameter space (small models).", GaussNewtonOptions)
def ggn_direct_ce(options: GaussNewtonOptions) -> Method:
    """The dense parameters x parameters matrix of softmax cross entropy, factorized: exact, for small models."""
    return _build(options, SoftmaxCrossEntropy(), Cholesky())


@preset("Gauss-Newton (MSE) by dense Cholesky in parameter space (small models).", GaussNewtonOptions)
def ggn_direct_mse(options: GaussNewtonOptions) -> Method:
    """The dense parameters x parameters matrix of squared error, factorized: exact, for small models."""
    return _build(options, SquaredError(), Cholesky())


@preset("Gauss-Newton, solver and lane chosen by the planner: start here.", AutomaticOptions)
def gauss_newton(options: AutomaticOptions) -> Method:
    """Damped Gauss-Newton with a trust region; the planner picks the solver that it predicts to be fastest.

    Exact in row space or parameter space, or CG in either: both make the same iterates, row space with vectors of batch
    x outputs but only where gradient and curvature are of one batch. Small fits (up to 256 parameters, 65,536 entries
    of the Jacobian) are solved by QR of their rows, which loses no digits to a squared condition number, at several
    lam.
    """
    cg = _iterative(options)
    rowwise = (RowSpace(Cholesky(), max_bytes=options.max_bytes), RowSpace(cg), RowSpace(QR()))
    candidates = (cg, *rowwise, Cholesky())
    return _build(options, options.loss, Automatic(candidates), options.fisher)


@preset("SPRING: row-space Cholesky with momentum in parameter space (VMC, PINNs).", SpringOptions)
def spring(options: SpringOptions) -> Method:
    """SPRING (Goldshlager, Abrahamsen and Lin 2024): the regularizer pulls towards the previous direction."""
    solver = RowSpace(Cholesky(), momentum=options.momentum, max_bytes=options.max_bytes)
    return _build(options, options.loss, solver, options.fisher)
