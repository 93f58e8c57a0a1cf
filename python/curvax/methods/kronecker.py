"""Kronecker-factored presets: K-FAC and EKFAC."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from curvax.chain import ScalarOrSchedule
from curvax.curvature import FisherType, MonteCarloFisher, Terms
from curvax.losses import Loss
from curvax.method import Method
from curvax.methods.options import (
    AssemblyOptions,
    DampingOptions,
    ModelOptions,
    SolveRecordOptions,
    TransformOptions,
)
from curvax.methods.registry import preset
from curvax.preconditioners import EKFAC, KFAC, EigenInverse, FactorInverse
from curvax.solvers import Diagonal
from curvax.structure.block_rules import BlockRule
from curvax.structure.kronecker import WeightSharing


@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerOptions(SolveRecordOptions, TransformOptions, DampingOptions, ModelOptions, AssemblyOptions):
    """Keywords that `kfac` and `ekfac` share.

    Attributes:
      loss: loss in output space, or the `Terms` of one.
      fisher: whose rows the cotangents are: sampled targets (one per position by default), `ObservedFisher()`, or
        `GeneralizedGaussNewton()` for all columns of the loss Hessian's root.
      sharing: `WeightSharing.EXPAND` (default) takes positions with shared weights as examples, `REDUCE` as one.
      factor_decay: weight of the past in the averages of factors; 0.95.
      factor_every: steps between refreshes of the factors; 1.
      inverse_every: steps between refreshes of the inverses, a multiple of `factor_every`; 10.
      max_width: leaves with a factor of more rows keep a diagonal; 8192.
      blocks: rules for leaves that are to have another kind of block than structure gives them, the first that fits:
        `(curvax.structure.BlockRule(BlockKind.FULL, r"scale", largest=64),)`. None by default.
      lam_policy: a trust region, whether it gets a `lam0` or not.
      lam_kwargs: further fields of the policy. The trust region of these presets changes lam by (19/20)^5, as in the
        K-FAC paper, but looks at every step and not at every 5th: with steps between that nobody judges the loss of
        stiff problems rises (to 1.8 times its start on one of the tests). `{"every": 5}` saves a forward pass and a
        product in four steps of five.
      beta1: decay of the mean of gradients that the inverse is applied to; 0.9. Momentum behind the inverse
        (`direction_momentum`) is kept through rejected steps, whatever lam becomes, and so can stall a trust region.
      learning_rate: 0.1; a full step follows the noise of its batch.
      record_cg_stats: False: there is no iteration to report.
    """

    loss: Loss | Terms
    fisher: FisherType = MonteCarloFisher()
    sharing: WeightSharing = WeightSharing.EXPAND
    factor_decay: float = 0.95
    factor_every: int = 1
    inverse_every: int = 10
    max_width: int = 8192
    blocks: tuple[BlockRule, ...] = ()
    lam_policy: object = "trust_region"
    beta1: float = 0.9
    learning_rate: ScalarOrSchedule = 0.1
    record_cg_stats: bool = False

    trust_region = MappingProxyType({"inc": (20 / 19) ** 5, "dec": (19 / 20) ** 5})


@dataclasses.dataclass(frozen=True, kw_only=True)
class KFACOptions(KroneckerOptions):
    """Keywords of `kfac`.

    Attributes:
      inverse: `EigenInverse()` (default) damps the Kronecker product exactly, with the lam of each step;
        `CholeskyInverse()` damps each factor at its refresh, and costs less.
    """

    inverse: FactorInverse = EigenInverse()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EKFACOptions(KroneckerOptions):
    """Keywords of `ekfac`."""


@preset("K-FAC: Kronecker-factored Gauss-Newton, one block per layer.", KFACOptions)
def kfac(options: KFACOptions) -> Method:
    """K-FAC (Martens and Grosse 2015) with a trust region and momentum.

    The state has factors per layer, which `init` knows from the shapes of a batch: `init(params, batch=batch)`.
    """
    return _build(
        options,
        KFAC(
            options.fisher,
            options.sharing,
            options.factor_decay,
            options.factor_every,
            options.inverse_every,
            options.max_width,
            options.inverse,
            tuple(options.blocks),
        ),
    )


@preset("EKFAC: K-FAC's eigenvectors with measured curvature along them.", EKFACOptions)
def ekfac(options: EKFACOptions) -> Method:
    """EKFAC (George et al. 2018) with a trust region and momentum.

    The state has factors per layer, which `init` knows from the shapes of a batch: `init(params, batch=batch)`.
    """
    return _build(
        options,
        EKFAC(
            options.fisher,
            options.sharing,
            options.factor_decay,
            options.factor_every,
            options.inverse_every,
            options.max_width,
            blocks=tuple(options.blocks),
        ),
    )


def _build(options: KroneckerOptions, preconditioner: KFAC | EKFAC) -> Method:
    return options.build(
        options.gauss_newton(options.loss),
        Diagonal(options.beta1),
        damping=options.damping,
        preconditioner=preconditioner,
        transform=options.transform,
        telemetry=options.telemetry,
    )
