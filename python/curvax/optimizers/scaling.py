"""What SOAP and Shampoo share beside arithmetic: keywords on the matrices that they see, and the count of updates."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from curvax.numbers import check_positive, whole
from curvax.optimizers.axes import LastTwoAxes, MatrixRule
from curvax.optimizers.choices import FactorTerms, Sides
from curvax.optimizers.views import MatrixViews


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixScaling:
    """Keywords of `scale_by_soap` and `scale_by_shampoo`.

    Attributes:
      max_dim: a longer side has no factor with all entries: SOAP keeps the standard basis there (the paper's one-sided
        SOAP), Shampoo the factor's diagonal (the paper's diagonal Shampoo). `None` stands for 10,000 in SOAP, as in the
        paper, and for 8,192 in Shampoo. It shapes the state, so `optax.inject_hyperparams` must not trace a number in
        its place.
      block_dim: a side longer than this is cut into blocks, each a matrix of its own. `None`, the default, cuts none;
        it shapes the state too.
      matrices: which axes of a leaf are rows and columns; the last two by default. What is no matrix gets Adam from
        SOAP, and is one vector to Shampoo.
      sides: which sides have a factor; both by default. A single one of Shampoo has the exponent -1/2.
      terms: what a gradient adds to the factors. `FactorTerms.KULLBACK_LEIBLER` makes KL-SOAP, and KL-Shampoo, whose
        exponents are -1/2 and which needs b2.
    """

    max_dim: int | None = None
    block_dim: int | None = None
    matrices: MatrixRule = LastTwoAxes()
    sides: Sides = Sides.BOTH
    terms: FactorTerms = FactorTerms.GRADIENT

    default_max_dim: ClassVar[int]

    @property
    def longest(self) -> int:
        """The longest side with a factor of all entries."""
        return self.default_max_dim if self.max_dim is None else whole("max_dim", self.max_dim)

    def views(self, params: Any) -> MatrixViews:
        """The stacks of matrices of these parameters."""
        if self.block_dim is None:
            return MatrixViews.of(params, self.matrices)
        block = whole("block_dim", self.block_dim)
        check_positive("block_dim", block)
        return MatrixViews.of(params, self.matrices, block)


@dataclasses.dataclass(frozen=True)
class Update:
    """One update of all stacks.

    Attributes:
      count: updates before this one.
      finite: whether the gradients are, so that this is one.
    """

    count: jax.Array
    finite: jax.Array

    @property
    def after(self) -> jax.Array:
        """Updates with this one."""
        return self.count + self.finite.astype(jnp.int32)
