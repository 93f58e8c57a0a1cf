"""Diagonal presets: Sophia and AdaHessian."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from curvax.chain import EntrywiseUpdate, ScalarOrSchedule
from curvax.curvature import Terms
from curvax.estimators import BlockAverage, DiagonalEstimator, GaussNewtonBartlett, Hutchinson
from curvax.losses import Loss, SoftmaxCrossEntropy
from curvax.method import Method
from curvax.methods.newton import HessianOptions
from curvax.methods.options import (
    AssemblyOptions,
    LossRecordOptions,
    ModelOptions,
    TransformOptions,
    whole_transform,
)
from curvax.methods.registry import preset
from curvax.preconditioners import AdaHessianPower, EmaDiagonal, SophiaFloor
from curvax.solvers import Diagonal


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaTransformOptions:
    """Keywords of the Optax chain behind Sophia's direction.

    Attributes:
      learning_rate: 1e-3, of the order that the paper trains language models with.
      weight_decay: decoupled; 0.2.
      clip_value: bound on each entry of the direction; 1.
      weight_decay_mask: what weight decay applies to: tree of booleans like the parameters, or a function to one.
      mask: the same, by Somax's name for it.
      tx: an Optax chain in place of all of these.
    """

    learning_rate: ScalarOrSchedule = 1e-3
    weight_decay: ScalarOrSchedule | None = 0.2
    clip_value: float = 1.0
    weight_decay_mask: Any | None = None
    mask: Any | None = None
    tx: optax.GradientTransformation | None = None

    @property
    def transform(self) -> optax.GradientTransformationExtraArgs:
        if self.mask is not None and self.weight_decay_mask is not None:
            raise ValueError("mask and weight_decay_mask are one thing: give weight_decay_mask alone.")
        if self.tx is not None:
            return whole_transform(self, self.tx, SophiaTransformOptions)
        return EntrywiseUpdate(
            self.learning_rate,
            clip_value=self.clip_value,
            weight_decay=self.weight_decay,
            weight_decay_mask=self.mask if self.weight_decay_mask is None else self.weight_decay_mask,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaOptions(LossRecordOptions, SophiaTransformOptions):
    """Keywords of both Sophia forms (Liu et al. 2023).

    Attributes:
      beta1: decay of the gradient mean; 0.965.
      beta2: decay of the curvature mean; 0.99.
      gamma: scale of the curvature in the denominator; tune it so that 10 to 50 % of the updates stay unclipped.
      eps: floor of the denominator, relative to the mean magnitude of the diagonal; 1e-8.
      eval_every_k: steps between curvature refreshes; 10.
    """

    beta1: float = 0.965
    beta2: float = 0.99
    gamma: float = 0.05
    eps: float = 1e-8
    eval_every_k: int = 10

    def preconditioner(self, estimator: DiagonalEstimator) -> EmaDiagonal:
        denominator = SophiaFloor(self.gamma, self.eps)
        return EmaDiagonal(estimator, beta2=self.beta2, every=self.eval_every_k, denominator=denominator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaGOptions(SophiaOptions, ModelOptions, AssemblyOptions):
    """Keywords of `sophia_g`.

    Attributes:
      n_samples: label samples per refresh.
      loss: loss in output space that labels can be sampled from.
    """

    n_samples: int = 1
    loss: Loss | Terms = SoftmaxCrossEntropy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaHOptions(SophiaOptions, HessianOptions):
    """Keywords of `sophia_h`.

    Attributes:
      gamma: 0.01.
      n_probes: Rademacher probes per refresh.
      use_abs: take the magnitude of each probe's estimate.
    """

    gamma: float = 0.01
    n_probes: int = 1
    use_abs: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaHessianOptions(LossRecordOptions, TransformOptions, HessianOptions):
    """Keywords of `adahessian` (Yao et al. 2021).

    Attributes:
      beta1, beta2: decays of the gradient mean and of the mean squared diagonal; 0.9 and 0.999.
      hessian_power: power of the root mean square diagonal in the denominator; 1.
      eps: added to the denominator, relative to the mean magnitude of the diagonal; 1e-4 as in the authors' code.
      n_probes: Rademacher probes per refresh.
      use_abs: take the magnitude of each probe's estimate before averaging.
      spatial_averaging: average the diagonal over blocks (`estimators.BlockAverage`).
      eval_every_k: steps between refreshes.
      learning_rate: 0.15 as in the authors' code.
      clip_value: bound on each entry of the direction; 0.1, which the paper does not have. One probe leaves entries of
        the diagonal near zero, and first steps without a bound multiplied losses by 2 to 18. `None` for the paper's.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    hessian_power: float = 1.0
    eps: float = 1e-4
    n_probes: int = 1
    use_abs: bool = False
    spatial_averaging: bool = True
    eval_every_k: int = 1
    learning_rate: ScalarOrSchedule = 0.15
    clip_value: float | None = 0.1


@preset("Sophia-G: diagonal Gauss-Newton from resampled labels, clipped.", SophiaGOptions)
def sophia_g(options: SophiaGOptions) -> Method:
    """Sophia with the Gauss-Newton-Bartlett estimator; labels are sampled from the model at each refresh."""
    return options.build(
        options.gauss_newton(options.loss),
        Diagonal(options.beta1),
        preconditioner=options.preconditioner(GaussNewtonBartlett(options.n_samples)),
        transform=options.transform,
        telemetry=options.telemetry,
    )


@preset("Sophia-H: diagonal Hessian by Hutchinson, clipped.", SophiaHOptions)
def sophia_h(options: SophiaHOptions) -> Method:
    """Sophia with Hutchinson's estimator of the Hessian's diagonal."""
    return options.build(
        options.hessian,
        Diagonal(options.beta1),
        preconditioner=options.preconditioner(Hutchinson(options.n_probes, options.use_abs)),
        transform=options.transform,
        telemetry=options.telemetry,
    )


@preset("AdaHessian: diagonal Hessian by Hutchinson, root mean square over steps.", AdaHessianOptions)
def adahessian(options: AdaHessianOptions) -> Method:
    """AdaHessian: Adam with the squared diagonal of the Hessian in place of the squared gradient."""
    average = BlockAverage() if options.spatial_averaging else None
    denominator = AdaHessianPower(options.hessian_power, options.eps)
    estimator = Hutchinson(options.n_probes, options.use_abs, average)
    return options.build(
        options.hessian,
        Diagonal(options.beta1),
        preconditioner=EmaDiagonal(estimator, beta2=options.beta2, every=options.eval_every_k, denominator=denominator),
        transform=options.transform,
        telemetry=options.telemetry,
    )
