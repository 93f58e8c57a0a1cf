"""K-FAC: the Gauss-Newton matrix as one Kronecker product per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.estimators.base import check_count
from curvax.kernels._dispatch import Choice, Op, Request
from curvax.output_space import FisherType, MonteCarloFisher
from curvax.preconditioners._blocks import (
    MAX_WIDTH,
    FactorAverages,
    apply_blocks,
    check_cadences,
    correction,
    measured,
    when_due,
)
from curvax.preconditioners.base import BlockPreconditioner
from curvax.preconditioners.factor_inverses import EigenInverse, FactorInverse
from curvax.requirements import Cadence, Part, Requirement
from curvax.spelling import check_instance
from curvax.structure.block_rules import BlockRule
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.kronecker import WeightSharing
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KFACState:
    """State of `KFAC`.

    Attributes:
      factors: running averages of A and B, and of the diagonals of leaves without factors.
      inverses: per Kronecker block the state of `KFAC.inverse`.
      scale: mean curvature over all parameters.
      rejected: number of refreshes that were not finite (int32).
      blocks: the blocks; static.
    """

    factors: FactorAverages
    inverses: list[Any]
    scale: jax.Array
    rejected: jax.Array
    blocks: KroneckerBlocks = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class KFAC(BlockPreconditioner):
    """P^-1 = (A kron B + lam I)^-1 per block: Kronecker-factored approximate curvature.

    See Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015), Grosse
    and Martens (2016) for convolutions, and Eschenhagen et al. (2023) for weights shared over positions; the factors
    are those of `curvax.structure.kronecker`. A is a mean over examples of products of activations, B a sum over
    examples of products of cotangents whose outer products have the Gauss-Newton matrix as expectation. A leaf that is
    never multiplied into activations (a scale, say) keeps a diagonal; the plan says which do.

    Attributes:
      fisher: whose rows the cotangents are. One sampled target per position by default, as in the paper: one backward
        pass for any number of outputs. `GeneralizedGaussNewton()` takes all columns of the loss Hessian's root instead:
        exact, one backward pass per output; `ObservedFisher()` the batch's own targets.
      sharing: what positions with shared weights are; `EXPAND` by default, which is exact for losses that are sums
        over positions and is the usual approximation of convolutions; `REDUCE` costs less where positions are many.
      decay: weight of the past in the averages, in [0, 1), corrected for the start at zero. 0.95 by default, the
        paper's.
      every: steps from one refresh of the factors to the next. 1 by default: they cost about a gradient.
      inverse_every: steps from one refresh of the inverses to the next, a multiple of `every`. 10 by default: they cost
        many gradients, and averages with decay 0.95 move little in 10 steps.
      max_width: leaves with a factor of more rows keep a diagonal. 8192 by default: 256 MiB of float32 per matrix; the
        outputs of a large vocabulary would take gigabytes.
      inverse: `EigenInverse()` by default, whose damping is exact and follows lam at every step; `CholeskyInverse()`
        is cheaper, and keeps to the lam of its refresh.
      blocks: rules that give leaves other kinds of blocks (`curvax.structure.BlockRule`); the first that fits counts.
        None by default: structure decides.
    """

    fisher: FisherType = MonteCarloFisher()
    sharing: WeightSharing = WeightSharing.EXPAND
    decay: float = 0.95
    every: int = 1
    inverse_every: int = 10
    max_width: int = MAX_WIDTH
    inverse: FactorInverse = EigenInverse()
    blocks: tuple[BlockRule, ...] = ()

    def __post_init__(self) -> None:
        check_instance("fisher", self.fisher, FisherType)
        check_instance("sharing", self.sharing, WeightSharing)
        check_instance("inverse", self.inverse, FactorInverse)
        check_cadences(self.decay, self.every, self.inverse_every)
        check_count("max_width", self.max_width)

    def requirements(self) -> tuple[Requirement, ...]:
        """A refresh of the factors and, more seldom, one of the inverses."""
        inverses = Requirement(Part.INVERSES, Cadence((self.inverse_every,)), type(self).__name__)
        return (*super().requirements(), inverses)

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """Those of the inverses."""
        return self.inverse.kernels(upcast)

    def with_kernels(self, choices: Mapping[str, Choice]) -> KFAC:
        """With the choices for the inverses."""
        return dataclasses.replace(self, inverse=self.inverse.with_kernels(choices))

    def init_blocks(self, blocks: KroneckerBlocks) -> KFACState:
        """No curvature seen."""
        blocks = blocks.narrowed(self.max_width)
        inverses = [self.inverse.init(block, blocks.dtype) for block in blocks.kronecker]
        zero = jnp.zeros((), blocks.dtype)
        return KFACState(FactorAverages.zeros(blocks), inverses, zero, jnp.zeros((), jnp.int32), blocks)

    def refresh(
        self, state: KFACState, linearization: Linearization, key: jax.Array, lam: jax.Array | float = 0.0
    ) -> KFACState:
        """Factors of one more batch in the averages, and new inverses where these are due.

        Inverses are due with the first refresh that is finite, and then with every `inverse_every / every`-th.
        """
        blocks = state.blocks
        # 1.
        sums, _ = measured(blocks, linearization, self.fisher, key, self.sharing)
        # 2.
        finite = tree.all_finite(sums)
        factors = tree.where(finite, state.factors.with_batch(sums, self.decay), state.factors)
        # 3.
        ratio = self.inverse_every // self.every
        damping = jnp.asarray(lam).astype(blocks.dtype)

        def compute() -> tuple[list[Any], jax.Array]:
            now = factors.corrected(self.decay)
            inverses = self.inverse.compute(blocks, now.inputs, now.outputs, damping)
            usable = finite & tree.all_finite(inverses)
            return tree.where(usable, inverses, state.inverses), finite & ~usable

        due = finite & (state.factors.count % ratio == 0)
        inverses, failed = when_due(due, ratio == 1, compute, lambda: (state.inverses, jnp.zeros_like(finite)))
        # 5.
        scale = jnp.where(finite, factors.corrected(self.decay).mean_curvature(blocks), state.scale)
        rejected = state.rejected + (~finite | failed).astype(jnp.int32)
        return KFACState(factors, inverses, scale, rejected, blocks)

    def apply(self, state: KFACState, lam: jax.Array | float, v: PyTree) -> PyTree:
        """The inverse of each block on its entries."""
        damping = jnp.asarray(lam).astype(state.blocks.dtype)
        factor = correction(state.factors.count, self.decay)

        def inverse(index: int, entries: jax.Array) -> jax.Array:
            return self.inverse.apply(state.inverses[index], damping, state.scale, entries)

        diagonal = [d * factor.astype(d.dtype) for d in state.factors.diagonal]
        return apply_blocks(state.blocks, v, damping, state.scale, diagonal, inverse)
