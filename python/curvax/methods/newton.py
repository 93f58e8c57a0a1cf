"""Newton presets: the Hessian of a loss function, by CG or dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from curvax.curvature import Curvature, Hessian, LossFunction, Model, ModelLoss, Objective, SumOfTerms, Terms
from curvax.losses import Loss
from curvax.method import Method
from curvax.methods.options import (
    AssemblyOptions,
    CGOptions,
    DampingOptions,
    PrecondOptions,
    SolveRecordOptions,
    TransformOptions,
    refuse_beside_terms,
)
from curvax.methods.registry import preset
from curvax.solvers import CG, CR, MINRES, Automatic, Cholesky, Solver

SolverName = Literal["auto", "cg", "cr", "minres", "cholesky"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianOptions(AssemblyOptions):
    """Keywords of presets on the Hessian: a loss function, or a model and a loss.

    Attributes:
      loss_fn: `loss_fn(params, batch) -> scalar`, or `-> (total, weight)` with the loss total / weight, which is what
        microbatches need of a loss with a normalizer of its own (`curvature.LossFunction`).
      predict_fn, loss: in place of `loss_fn`: a model and a loss in output space, or `loss=Terms(...)` alone.
      x_key, y_key, weight_key: keys of the batch; `loss_fn` reads the batch itself and ignores them.
      reduction: how `loss_fn` combines examples, for microbatching.
    """

    loss_fn: Callable[..., Any] | None = None
    predict_fn: Callable[..., Any] | None = None
    loss: Loss | Terms | None = None
    x_key: str = "x"
    y_key: str = "y"
    weight_key: str | None = None
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def hessian(self) -> Curvature:
        """The Hessian of the loss function, of the model's loss, or of all terms of a loss."""
        if not isinstance(self.loss, Terms):
            return Hessian(self._objective(self.loss))
        if self.loss_fn is not None:
            raise ValueError("give loss_fn, or loss=Terms(...), not both.")
        refuse_beside_terms(self)
        return SumOfTerms.of(self.loss, self.extras, lambda model, loss: Hessian(ModelLoss(model, loss)))

    def _objective(self, loss: Loss | None) -> Objective:
        if self.loss_fn is not None:
            if self.predict_fn is not None or loss is not None:
                raise ValueError("give loss_fn, or predict_fn and loss, not both.")
            return LossFunction(self.loss_fn, self.extras, self.reduction, batch_axes=self.batch_axes)
        if self.predict_fn is None or loss is None:
            raise TypeError("loss_fn is missing: pass loss_fn(params, batch) -> scalar, or predict_fn and loss.")
        model = Model(self.predict_fn, self.x_key, self.y_key, self.weight_key, self.extras, self.batch_axes)
        return ModelLoss(model, loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonCGOptions(PrecondOptions, CGOptions, SolveRecordOptions, TransformOptions, DampingOptions, HessianOptions):
    """Keywords of `newton_cg`.

    Attributes:
      solver: a `Solver`, or the name of one: "cg", "cr" (conjugate residuals) and "minres", which take `tol` and
        `maxiter`; "cholesky", exact; "auto", of which the planner takes Cholesky for small models and for others
        conjugate residuals, or CG under a radius. By default, `None`, "auto", and "cg" for whoever gives a constant or
        scheduled `lam0` alone, as in python-somax, a preconditioner, or another keyword of CG. Conjugate residuals use
        negative curvature that CG stops short of: after 60 steps they were ahead on all four networks tried
        (docs/indefinite.md).
    """

    solver: Solver | SolverName | None = None

    @property
    def chosen_solver(self) -> Solver:
        """The solver that `solver` names."""
        if isinstance(self.solver, Solver):
            return self.solver
        somax = self.lam0 is not None and self.lam_policy is None
        of_cg = self.cg != CG(self.tol, self.maxiter)
        name = self.solver or ("cg" if somax or of_cg or not self.preconditioner.is_identity else "auto")
        residuals = CR(self.tol, self.maxiter)
        known: dict[str, Solver] = {
            "auto": Automatic((self.cg if self.damping.has_radius else residuals, Cholesky())),
            "cg": self.cg,
            "cr": residuals,
            "minres": MINRES(self.tol, self.maxiter),
            "cholesky": Cholesky(),
        }
        if name not in known:
            raise ValueError(f"solver must be a Solver or one of {', '.join(known)}, not {name!r}.")
        if of_cg and self.cg not in (known[name], *known[name].candidates):
            raise ValueError(f"warm_start, stabilize_every and stop are CG's: drop them, or solver={name!r}.")
        return known[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonDirectOptions(SolveRecordOptions, TransformOptions, DampingOptions, HessianOptions):
    """Keywords of `newton_direct`."""


@preset(
    "Truncated Newton: the Hessian of a loss function, exactly or by iterations, negative curvature used.",
    NewtonCGOptions,
)
def newton_cg(options: NewtonCGOptions) -> Method:
    """Truncated Newton (Martens 2010; Liu and Roosta 2022) on the damped Hessian, whose negative curvature is used.

    Small models are solved exactly, with lam added to the magnitudes of the eigenvalues; others iterate.
    """
    return options.build(
        options.hessian,
        options.chosen_solver,
        damping=options.damping,
        preconditioner=options.preconditioner,
        transform=options.transform,
        telemetry=options.telemetry,
    )


@preset("Newton with a dense Hessian (small models).", NewtonDirectOptions)
def newton_direct(options: NewtonDirectOptions) -> Method:
    """The dense damped Hessian, factorized; where indefinite, by the magnitudes of its eigenvalues."""
    return options.build(
        options.hessian,
        Cholesky(),
        damping=options.damping,
        transform=options.transform,
        telemetry=options.telemetry,
    )
