"""EKFAC: K-FAC's eigenvectors, with the curvature along them measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.eigenbases import eigenbasis
from curvax.estimators.base import check_count
from curvax.kernels._dispatch import Choice, Implementation, Op, Request
from curvax.kernels.dense_linalg import EIGH
from curvax.output_space import FisherType, MonteCarloFisher
from curvax.preconditioners._blocks import (
    MAX_WIDTH,
    FactorAverages,
    apply_blocks,
    averages,
    check_cadences,
    correction,
    measured,
    when_due,
)
from curvax.preconditioners.base import BlockPreconditioner
from curvax.preconditioners.factor_inverses import (
    damp,
    divided,
    eigen,
    identities,
    into_basis,
    matmul,
    of_matrices,
    out_of_basis,
)
from curvax.requirements import Cadence, Part, Requirement
from curvax.spelling import check_instance
from curvax.structure.block_rules import BlockRule
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.kronecker import WeightSharing, projected_squares
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EKFACState:
    """State of `EKFAC`.

    Attributes:
      factors: running averages of A and B, and of the diagonals of leaves without factors.
      bases: per Kronecker block eigenvectors of A, (G, n, n) or `None` where A is a diagonal, and of B, (G, m, m).
      squares: per Kronecker block the running average of the curvature along them, (G, n, m).
      scale: mean curvature over all parameters.
      rejected: number of refreshes that were not finite (int32).
      blocks: the blocks; static.
    """

    factors: FactorAverages
    bases: list[tuple[jax.Array | None, jax.Array]]
    squares: list[jax.Array]
    scale: jax.Array
    rejected: jax.Array
    blocks: KroneckerBlocks = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class EKFAC(BlockPreconditioner):
    """P^-1 = (W diag(s) W^T + lam I)^-1 per block, W = U kron V the eigenvectors of K-FAC's A and B.

    s is the diagonal of the Gauss-Newton matrix in that basis, measured as mean squares of projected rows, so that
    W diag(s) W^T is the closest of all matrices with these eigenvectors: K-FAC's A kron B is one of them. It is
    measured at every refresh, while eigenvectors are old by up to `inverse_every` steps. See George et al., "Fast
    Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis" (2018).

    Where eigenvalues of A or B are rounding, as of any factor of fewer terms than rows, s depends on which of many
    bases is taken; `eigenbases` chooses one that rounding does not change.

    When the basis turns, the average of s turns with it: what was diag(s) in the old basis has the diagonal
    (Q * Q)^T s (R * R) in the new one, Q and R the turns of U and V.

    Attributes:
      fisher, sharing, decay, every, inverse_every, max_width, blocks: as in `KFAC`; `sharing` shapes the basis alone,
        as s is measured on the rows themselves, summed over positions.
      decompose: implementation of `eigh`, by name or as the planner's choice; `None` takes the best one.
    """

    fisher: FisherType = MonteCarloFisher()
    sharing: WeightSharing = WeightSharing.EXPAND
    decay: float = 0.95
    every: int = 1
    inverse_every: int = 10
    max_width: int = MAX_WIDTH
    decompose: Implementation | Choice | None = dataclasses.field(default=None, repr=False, compare=False)
    blocks: tuple[BlockRule, ...] = ()

    def __post_init__(self) -> None:
        check_instance("fisher", self.fisher, FisherType)
        check_instance("sharing", self.sharing, WeightSharing)
        check_cadences(self.decay, self.every, self.inverse_every)
        check_count("max_width", self.max_width)

    def requirements(self) -> tuple[Requirement, ...]:
        """A refresh of the factors and, more seldom, one of the inverses."""
        inverses = Requirement(Part.INVERSES, Cadence((self.inverse_every,)), type(self).__name__)
        return (*super().requirements(), inverses)

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The op `eigh`."""
        return ((EIGH, of_matrices(upcast)),)

    def with_kernels(self, choices: Mapping[str, Choice]) -> EKFAC:
        """With the choice for `eigh`."""
        return dataclasses.replace(self, decompose=choices.get(EIGH.name, self.decompose))

    def init_blocks(self, blocks: KroneckerBlocks) -> EKFACState:
        """No curvature seen."""
        blocks = blocks.narrowed(self.max_width)
        bases: list[tuple[jax.Array | None, jax.Array]] = []
        for block in blocks.kronecker:
            groups, n, m = block.shape
            u = None if block.embedding else identities(groups, n, blocks.dtype)
            bases.append((u, identities(groups, m, blocks.dtype)))
        squares = [jnp.zeros(block.shape, blocks.dtype) for block in blocks.kronecker]
        zero = jnp.zeros((), blocks.dtype)
        return EKFACState(FactorAverages.zeros(blocks), bases, squares, zero, jnp.zeros((), jnp.int32), blocks)

    def refresh(
        self, state: EKFACState, linearization: Linearization, key: jax.Array, lam: jax.Array | float = 0.0
    ) -> EKFACState:
        """Factors of one more batch in the averages, new bases where these are due, then the curvature along them."""
        del lam
        blocks = state.blocks
        # 1.
        sums, total = measured(blocks, linearization, self.fisher, key, self.sharing)
        # 2.
        finite = tree.all_finite(sums)
        factors = tree.where(finite, state.factors.with_batch(sums, self.decay), state.factors)
        # 3.
        ratio = self.inverse_every // self.every

        def turn() -> tuple[list[tuple[jax.Array | None, jax.Array]], list[jax.Array], jax.Array]:
            now = factors.corrected(self.decay)
            pairs = eigen(now.inputs, now.outputs, lambda matrices: eigenbasis(matrices, self.decompose))
            bases = [(e.input_vectors, e.output_vectors) for e in pairs]
            rotations = [_rotate(s, old, new) for s, old, new in zip(state.squares, state.bases, bases, strict=True)]
            usable = finite & tree.all_finite((bases, rotations))
            return *tree.where(usable, (bases, rotations), (state.bases, state.squares)), finite & ~usable

        due = finite & (state.factors.count % ratio == 0)
        old = (state.bases, state.squares, jnp.zeros_like(finite))
        bases, squares, failed = when_due(due, ratio == 1, turn, lambda: old)
        # 4.
        new = averages(squares, total(lambda examples: projected_squares(blocks, examples, bases)), self.decay)
        usable = finite & tree.all_finite(new)
        squares = tree.where(usable, new, squares)
        # 5.
        scale = jnp.where(finite, factors.corrected(self.decay).mean_curvature(blocks), state.scale)
        rejected = state.rejected + (~usable | failed).astype(jnp.int32)
        return EKFACState(factors, bases, squares, scale, rejected, blocks)

    def apply(self, state: EKFACState, lam: jax.Array | float, v: PyTree) -> PyTree:
        """Into the basis of each block, divided by the damped curvature there, and back."""
        damping = jnp.asarray(lam).astype(state.blocks.dtype)
        factor = correction(state.factors.count, self.decay)

        def inverse(index: int, entries: jax.Array) -> jax.Array:
            (u, v), squares = state.bases[index], state.squares[index]
            inside = into_basis(u, v, entries)
            along = damp(squares * factor.astype(squares.dtype), damping)
            return out_of_basis(u, v, divided(inside, along, state.scale))

        diagonal = [d * factor.astype(d.dtype) for d in state.factors.diagonal]
        return apply_blocks(state.blocks, v, damping, state.scale, diagonal, inverse)


def _rotate(
    squares: jax.Array, old: tuple[jax.Array | None, jax.Array], new: tuple[jax.Array | None, jax.Array]
) -> jax.Array:
    """The diagonal in the new basis of what has the diagonal `squares` in the old one, and nothing beside it."""
    v = jnp.square(matmul(jnp.swapaxes(old[1], -1, -2), new[1]))
    if old[0] is None or new[0] is None:
        return matmul(squares, v)
    u = jnp.square(matmul(jnp.swapaxes(old[0], -1, -2), new[0]))
    return matmul(matmul(jnp.swapaxes(u, -1, -2), squares), v)
