"""The diagonal lane: a preconditioner by itself, on a running mean of the gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.numbers import Number, as_dtype, is_known, shown
from curvax.solvers.base import Lane, Solution, Solver, System, unsolved
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalState:
    """Running mean of the right-hand sides and the number of steps in it."""

    mean: PyTree
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class Diagonal(Solver):
    """s = P^-1 m with m the bias-corrected exponential mean of the gradients.

    Attributes:
      beta1: decay of the mean; 0 uses the gradient itself (unless it is traced). 0.965 (Sophia) and 0.9 (AdaHessian)
        in their papers.
    """

    beta1: Number = 0.0

    @property
    def name(self) -> str:
        return f"diagonal (beta1 {shown(self.beta1)})"

    @property
    def lane(self) -> Lane:
        return Lane.DIAGONAL

    @property
    def products(self) -> int:
        return 0

    @property
    def entrywise(self) -> Diagonal:
        return self

    def init(self, like: PyTree) -> DiagonalState | tuple[()]:
        if is_known(self.beta1) and self.beta1 == 0:
            return ()
        return DiagonalState(tree.zeros_like(like), jnp.zeros((), jnp.int32))

    def restarted(
        self, state: DiagonalState | tuple[()], accepted: jax.Array, trusted: jax.Array
    ) -> DiagonalState | tuple[()]:
        """A mean of nothing, where a step was rejected: it is full of the gradients on the way there."""
        del trusted
        return tree.where(accepted, state, jax.tree.map(jnp.zeros_like, state))

    def correction(self, count: jax.Array, dtype: Any) -> jax.Array:
        """1 / (1 - beta1^count): the factor from a mean over `count` steps that started at 0 to the weighted mean."""
        return 1 / (1 - jnp.asarray(self.beta1, dtype) ** count.astype(dtype))

    def solve(self, system: System, rhs: PyTree, state: DiagonalState | tuple[()], lam: jax.Array) -> Solution:
        if system.precondition is None:
            raise ValueError("the diagonal lane needs a preconditioner: give one with an estimator.")
        mean, next_state = rhs, state
        if isinstance(state, DiagonalState):

            def mix(m: jax.Array, g: jax.Array) -> jax.Array:
                beta1 = as_dtype(self.beta1, m.dtype)
                return beta1 * m + (1 - beta1) * g

            raw = jax.tree.map(mix, state.mean, rhs)
            count = state.count + 1
            next_state = DiagonalState(raw, count)
            mean = tree.scale(self.correction(count, tree.scalar_dtype(rhs)), raw)
        value = system.precondition(mean)
        return unsolved(tree.all_finite(value), tree.scalar_dtype(rhs), value, next_state)
