"""What the ops of diagonal_update compute: static rules, traced scalars, and estimates as their factors."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from curvax.numbers import Number
from curvax.tree import PyTree

DenominatorKind: TypeAlias = Literal["floor", "power", "damped"]
EstimateKind: TypeAlias = Literal["value", "square", "product", "magnitude"]


@dataclasses.dataclass(frozen=True)
class DenominatorRule:
    """How the averaged diagonal h becomes a denominator, up to a scalar `offset` that comes with the call.

    Attributes:
      kind: "floor" is max(slope h, offset), Sophia's; "power" is h^power + offset for h >= 0, AdaHessian's; "damped" is
        max(h, 0) + offset.
      slope, power: as above.
    """

    kind: DenominatorKind
    slope: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        """Checks the kind."""
        if self.kind not in get_args(DenominatorKind):
            raise ValueError(f"a denominator is one of {', '.join(get_args(DenominatorKind))}, got {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """The static part of a step.

    Attributes:
      denominator: of the direction.
      beta1: weight of the past in the mean of gradients; 0 for none, and then there is no mean.
      clip: bound on each entry of the direction; infinity for none.
    """

    denominator: DenominatorRule
    beta1: float = 0.0
    clip: float = math.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateScalars:
    """The traced part of a step; scalars of any floating dtype.

    Attributes:
      mean_correction: 1 / (1 - beta1^t), or 1.
      correction: the average times this is h.
      offset: of the denominator.
      fallback: what replaces a denominator of 0; positive.
      weight_decay: decoupled: the direction gets `weight_decay` times the parameter.
      rate: what the direction is multiplied by, minus the learning rate.
    """

    mean_correction: jax.Array | float
    correction: jax.Array | float
    offset: jax.Array | float
    fallback: jax.Array | float
    weight_decay: jax.Array | float
    rate: jax.Array | float


@dataclasses.dataclass(frozen=True)
class AccumulateRule:
    """How an estimate enters the running average of the diagonal.

    Attributes:
      beta2: weight of the past; only the reference takes one that is traced.
      root_mean_square: the average is the root of the averaged squares instead of the averaged diagonal.
    """

    beta2: Number
    root_mean_square: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalEstimate:
    """An estimate of a diagonal as the factors that it is made of, so that nobody has to write it down.

    Attributes:
      factors: pytrees alike: one for "value" (d) and "square" (a^2), two for "product" (a b) and "magnitude" (|a b|).
        The leaves of a "value" may have size 1 on some first and some last axes: the mean of a block stands for all of
        its entries.
      kind: which of these; static.
    """

    factors: tuple[PyTree, ...]
    kind: EstimateKind = dataclasses.field(default="value", metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks the kind."""
        if self.kind not in get_args(EstimateKind):
            raise ValueError(f"an estimate is one of {', '.join(get_args(EstimateKind))}, got {self.kind!r}")

    def value(self) -> PyTree:
        """The estimate itself."""
        if self.kind == "value":
            return self.factors[0]
        if self.kind == "square":
            return jax.tree.map(jnp.square, self.factors[0])
        product = jax.tree.map(jnp.multiply, *self.factors)
        return jax.tree.map(jnp.abs, product) if self.kind == "magnitude" else product
