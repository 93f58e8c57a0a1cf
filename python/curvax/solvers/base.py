"""What a linear system, a solver and a solution are. Solvers know nothing of models."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import tree_cg
from curvax.kernels._dispatch import Choice, Implementation
from curvax.result import Result as Result
from curvax.result import code as code
from curvax.tree import PyTree


class Lane(enum.Enum):
    """Where the linear system lives."""

    DIAGONAL = "diag"
    PARAMETER = "param"
    ROW = "row"


class Space(abc.ABC):
    """Vector arithmetic of one Krylov space, the two updates of conjugate gradients included."""

    @abc.abstractmethod
    def dots(self, pairs: tuple[tuple[PyTree, PyTree], ...]) -> tuple[jax.Array, ...]:
        """Inner products of the pairs."""

    @abc.abstractmethod
    def update(
        self, alpha: jax.Array, lam: jax.Array, x: PyTree, p: PyTree, r: PyTree, q: PyTree
    ) -> tuple[PyTree, PyTree, jax.Array]:
        """(x + alpha p, r - alpha (q + lam p), <r, r> of the new r)."""

    @abc.abstractmethod
    def direction(self, beta: jax.Array, z: PyTree, p: PyTree) -> PyTree:
        """z + beta p."""


@dataclasses.dataclass(frozen=True)
class TreeSpace(Space):
    """Pytrees with the standard inner product, served by the `tree_cg` ops.

    Attributes:
      for_dots, for_update, for_direction: implementation of each op, by name or as the planner's choice; `None` takes
        the best supported one.
    """

    for_dots: Implementation | Choice | None = None
    for_update: Implementation | Choice | None = None
    for_direction: Implementation | Choice | None = None

    def dots(self, pairs: tuple[tuple[PyTree, PyTree], ...]) -> tuple[jax.Array, ...]:
        return tree_cg.dots(pairs, implementation=self.for_dots)

    def update(
        self, alpha: jax.Array, lam: jax.Array, x: PyTree, p: PyTree, r: PyTree, q: PyTree
    ) -> tuple[PyTree, PyTree, jax.Array]:
        return tree_cg.cg_update(alpha, x, p, r, q, lam=lam, implementation=self.for_update)

    def direction(self, beta: jax.Array, z: PyTree, p: PyTree) -> PyTree:
        return tree_cg.cg_direction(beta, z, p, implementation=self.for_direction)


@dataclasses.dataclass(frozen=True)
class System:
    """(C + lam I) s = g, matrix-free; `lam` comes with the call to `solve`.

    Attributes:
      product: v -> C v.
      space: vector arithmetic of s.
      precondition: v -> P^-1 v for a symmetric positive definite P near C + lam I, or `None`.
      matrix: () -> C as a dense matrix over raveled vectors, or `None` to build it from products.
      factorise: implementation of `batched_cholesky_solve` for solvers of the dense matrix; `None` takes the best
        supported one.
    """

    product: Callable[[PyTree], PyTree]
    space: Space = TreeSpace()
    precondition: Callable[[PyTree], PyTree] | None = None
    matrix: Callable[[], jax.Array] | None = None
    factorise: Implementation | Choice | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
      value: s, a wide vector.
      result: a `Result`, int32.
      iterations: products spent in the iteration, int32; 0 for direct solvers.
      residual: |g - (C + lam I) s| / |g|, recomputed from its definition (not a recurrence).
      state: the solver's next state.
    """

    value: PyTree
    result: jax.Array
    iterations: jax.Array
    residual: jax.Array
    state: Any


class Solver(abc.ABC):
    """Solves (C + lam I) s = g."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The solver's name in the plan."""

    @property
    @abc.abstractmethod
    def lane(self) -> Lane:
        """Where the system lives."""

    @property
    @abc.abstractmethod
    def products(self) -> int:
        """Most curvature products one solve takes; 0 for solvers that take a matrix or a diagonal."""

    @abc.abstractmethod
    def init(self, like: PyTree) -> Any:
        """State with shapes and dtypes that `solve` keeps; `like` holds wide parameter shapes."""

    @abc.abstractmethod
    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        """Solves for one right-hand side."""


def damped(system: System, lam: jax.Array) -> Callable[[PyTree], PyTree]:
    """v -> (C + lam I) v."""
    return lambda v: tree.axpy(lam, v, system.product(v))


def relative_residual(system: System, lam: jax.Array, rhs: PyTree, value: PyTree) -> jax.Array:
    """|g - (C + lam I) s| / |g|; 0 for a zero right-hand side."""
    rest = jax.tree.map(jnp.subtract, rhs, damped(system, lam)(value))
    size = tree.norm(rhs)
    return jnp.where(size > 0, tree.norm(rest) / jnp.where(size > 0, size, jnp.ones_like(size)), jnp.zeros_like(size))
