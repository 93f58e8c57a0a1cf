"""Keywords of `scale_by_*`, in the groups that they share, and the transformation that each group makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import optax

from curvax.curvature import (
    Curvature,
    Extras,
    FisherType,
    GaussNewton,
    GeneralizedGaussNewton,
    Hessian,
    LossFunction,
    Model,
    Objective,
)
from curvax.damping import Constant
from curvax.damping.base import ScalarLike
from curvax.estimators import BlockAverage, GaussNewtonBartlett, Hutchinson
from curvax.kernels._dispatch import Backend
from curvax.losses import Loss, SoftmaxCrossEntropy
from curvax.methods.assemble import assemble
from curvax.numbers import Number, whole
from curvax.preconditioners import EKFAC, KFAC, EmaDiagonal, Preconditioner, SophiaFloor
from curvax.solvers import CG, Diagonal, Solver
from curvax.structure.batch_axes import AxesPrefix
from curvax.telemetry import Telemetry
from curvax.transforms.whole import as_gradient_transformation
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceOptions:
    """Keywords of every `scale_by_*`.

    Attributes:
      extras: model state, aux, random key, frozen parameters.
      microbatch_size: examples per accumulated piece.
      batch_axes: which axis of each leaf of the batch holds the examples (`curvature.Model`).
      backend: preferred implementation of kernels.
    """

    extras: Extras = Extras()
    microbatch_size: int | None = None
    batch_axes: AxesPrefix | None = None
    backend: Backend = "auto"

    def face(
        self,
        curvature: Curvature,
        solver: Solver,
        *,
        lam: ScalarLike = 0.0,
        preconditioner: Preconditioner | None = None,
        tx: optax.GradientTransformation | None = None,
        shapes: Mapping[str, Any] = MappingProxyType({}),
    ) -> optax.GradientTransformationExtraArgs:
        """The direction alone, without sign, rate or telemetry; `shapes` go to `as_gradient_transformation`."""
        method = assemble(
            curvature=curvature,
            solver=solver,
            damping=Constant(lam),
            preconditioner=preconditioner,
            telemetry=Telemetry(()),
            tx=optax.identity() if tx is None else tx,
            microbatch_size=self.microbatch_size,
            backend=self.backend,
            # What comes of a direction is for the rest of the chain to judge.
            undo=False,
        )
        return as_gradient_transformation(method, **shapes)


@dataclasses.dataclass(frozen=True)
class ModelFaceOptions(FaceOptions):
    """Keywords of transformations on a model with outputs.

    Attributes:
      predict_fn: `predict_fn(params, inputs) -> outputs`.
      loss: loss in output space.
      x_key, y_key, weight_key: keys of the batch.
    """

    predict_fn: Callable[..., Any]
    loss: Loss
    _: dataclasses.KW_ONLY
    x_key: str = "x"
    y_key: str = "y"
    weight_key: str | None = None

    def gauss_newton(self, fisher: FisherType = GeneralizedGaussNewton()) -> GaussNewton:
        """The curvature."""
        model = Model(self.predict_fn, self.x_key, self.y_key, self.weight_key, self.extras, self.batch_axes)
        return GaussNewton(model, self.loss, fisher)


@dataclasses.dataclass(frozen=True)
class HessianFaceOptions(FaceOptions):
    """Keywords of transformations on a loss function.

    Attributes:
      loss_fn: `loss_fn(params, batch) -> scalar`, or a model with a loss: `curvature.ModelLoss(Model(predict), loss)`.
      reduction: how `loss_fn` combines examples, for microbatches.
    """

    loss_fn: Callable[..., Any] | Objective
    _: dataclasses.KW_ONLY
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def hessian(self) -> Hessian:
        """The curvature."""
        if not isinstance(self.loss_fn, Objective):
            return Hessian(LossFunction(self.loss_fn, self.extras, self.reduction, batch_axes=self.batch_axes))
        if self.extras != Extras() or self.reduction != "mean" or self.batch_axes is not None:
            raise ValueError("extras, reduction and batch_axes go into the objective that loss_fn is: drop them here.")
        return Hessian(self.loss_fn)


@dataclasses.dataclass(frozen=True)
class DampedFaceOptions(FaceOptions):
    """Keywords of transformations that solve a damped system.

    Attributes:
      lam: damping; `optax.inject_hyperparams(scale_by_ggn, static_args=("predict_fn",))` can schedule it.
    """

    lam: ScalarLike = 1.0


@dataclasses.dataclass(frozen=True)
class SolverFaceOptions(DampedFaceOptions):
    """Keywords of those that leave the solver to the user.

    Attributes:
      solver: `CG()`, `Cholesky()`, `RowSpace(Cholesky())` (of a Gauss-Newton matrix), ...
      preconditioner: of CG; none by default.
    """

    _: dataclasses.KW_ONLY
    solver: Solver = CG()
    preconditioner: Preconditioner | None = None


@dataclasses.dataclass(frozen=True)
class GGNFaceOptions(SolverFaceOptions, ModelFaceOptions):
    """Keywords of `scale_by_ggn`.

    Attributes:
      fisher: GGN, Monte Carlo Fisher or empirical Fisher.
    """

    _: dataclasses.KW_ONLY
    fisher: FisherType = GeneralizedGaussNewton()


@dataclasses.dataclass(frozen=True)
class EGNFaceOptions(DampedFaceOptions, ModelFaceOptions):
    """Keywords of `scale_by_egn`.

    Attributes:
      fisher: as in `scale_by_ggn`.
      max_bytes: bound on the memory of explicit rows; `None` for 2 GiB.
    """

    _: dataclasses.KW_ONLY
    fisher: FisherType = GeneralizedGaussNewton()
    max_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class NewtonCGFaceOptions(SolverFaceOptions, HessianFaceOptions):
    """Keywords of `scale_by_newton_cg`."""


@dataclasses.dataclass(frozen=True)
class KFACFaceOptions(ModelFaceOptions):
    """Keywords of `scale_by_kfac`.

    Attributes:
      batch: a batch, or its shapes: `init` learns the layers from them.
      lam: damping, 1e-3 by default.
      preconditioner: `KFAC(...)` (the default, `KFAC()`) or `EKFAC(...)`, cadences included.
      full_params: all parameters of the model, or their shapes, within `optax.masked` and the like.
    """

    batch: Any
    lam: ScalarLike = 1e-3
    _: dataclasses.KW_ONLY
    preconditioner: KFAC | EKFAC | None = None
    full_params: PyTree | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalFaceOptions(FaceOptions):
    """Keywords of `scale_by_sophia_*` and `scale_by_adahessian`.

    Attributes:
      b1: decay of the gradient mean; it and other numbers can be scheduled by `optax.inject_hyperparams` with
        `predict_fn` or `loss_fn` among its `static_args`.
      b2: decay of the curvature mean.
      eps: floor of the denominator, relative to the mean magnitude of the diagonal.
      every: steps between refreshes of the diagonal; `None` for 10 (Sophia) and 1 (AdaHessian). It shapes what is
        computed, as do counts of samples and probes, so a number in its place goes into `static_args`.
    """

    b1: Number
    b2: Number
    eps: Number
    every: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaFaceOptions(DiagonalFaceOptions):
    """Keywords of both `scale_by_sophia_*`.

    Attributes:
      gamma: scale of the curvature in the denominator; 0.05 for Sophia-G, 0.01 for Sophia-H.
      clip_value: bound on each entry of the direction; 1.
    """

    b1: Number = 0.965
    b2: Number = 0.99
    gamma: Number
    eps: Number = 1e-8
    clip_value: Number = 1.0

    def sophia(
        self, curvature: Curvature, estimator: GaussNewtonBartlett | Hutchinson
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation with that estimator of the diagonal."""
        diagonal = EmaDiagonal(
            estimator,
            beta2=self.b2,
            every=count("every", self.every, 10),
            denominator=SophiaFloor(self.gamma, self.eps),
        )
        return self.face(curvature, Diagonal(self.b1), preconditioner=diagonal, tx=optax.clip(self.clip_value))


@dataclasses.dataclass(frozen=True)
class SophiaGFaceOptions(SophiaFaceOptions, ModelFaceOptions):
    """Keywords of `scale_by_sophia_g`.

    Attributes:
      n_samples: label samples of each refresh; `None` for 1.
    """

    loss: Loss = SoftmaxCrossEntropy()
    _: dataclasses.KW_ONLY
    gamma: Number = 0.05
    n_samples: int | None = None


@dataclasses.dataclass(frozen=True)
class SophiaHFaceOptions(SophiaFaceOptions, HessianFaceOptions):
    """Keywords of `scale_by_sophia_h`.

    Attributes:
      n_probes: probes of each refresh; `None` for 1.
      use_abs: take the magnitude of each estimate.
    """

    _: dataclasses.KW_ONLY
    gamma: Number = 0.01
    n_probes: int | None = None
    use_abs: bool = False


@dataclasses.dataclass(frozen=True)
class AdaHessianFaceOptions(DiagonalFaceOptions, HessianFaceOptions):
    """Keywords of `scale_by_adahessian`.

    Attributes:
      power: of the root mean square diagonal in the denominator; 1.
      n_probes: probes of each refresh; `None` for 1.
      use_abs: take the magnitude of each estimate before averaging.
      block_average: which entries are averaged; `True`, the default, for `BlockAverage()`, `None` or `False` for none.
    """

    _: dataclasses.KW_ONLY
    b1: Number = 0.9
    b2: Number = 0.999
    power: Number = 1.0
    eps: Number = 1e-4
    n_probes: int | None = None
    use_abs: bool = False
    block_average: BlockAverage | bool | None = True


def count(name: str, value: int | None, default: int) -> int:
    """A count; `None`, which unlike a number `optax.inject_hyperparams` does not trace, for the default."""
    return default if value is None else whole(name, value)
