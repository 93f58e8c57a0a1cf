"""What a linear system, a solver and a solution are. Solvers know nothing of models."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import tree_cg
from curvax.kernels._dispatch import Choice, Implementation, Op, Request
from curvax.numbers import Number
from curvax.requirements import EVERY_STEP, Part, Requirement
from curvax.result import Result as Result
from curvax.result import bounded as bounded
from curvax.result import code as code
from curvax.result import solved as solved
from curvax.tree import PyTree
from curvax.work import SolveCost, StepWork, SystemWork


class Lane(enum.StrEnum):
    """Where the linear system lives; a string, so that `plan.lane == "row"` says what it seems to."""

    DIAGONAL = "diag"
    PARAMETER = "param"
    ROW = "row"


class Space(abc.ABC):
    """Vector arithmetic of one Krylov space, the two updates of conjugate gradients included.

    An implementor chooses what a vector is (any pytree) and its inner product. C must be symmetric in that product.
    """

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
      factorize: implementation of `batched_cholesky_solve` for solvers of the dense matrix; `None` takes the best
        supported one.
      radius: bound on |s|, for solvers that say `takes_radius`; `None` for none.
    """

    product: Callable[[PyTree], PyTree]
    space: Space = TreeSpace()
    precondition: Callable[[PyTree], PyTree] | None = None
    matrix: Callable[[], jax.Array] | None = None
    factorize: Implementation | Choice | None = None
    radius: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
      value: s, an upcast vector.
      result: a `Result`, int32.
      iterations: products spent in the iteration, int32; 0 for direct solvers.
      residual: |g - (C + lam I) s| / |g|, recomputed from its definition (not a recurrence); NaN where no system is
        solved.
      state: the solver's next state.
      acceleration: 2 |c| / |s| of a second-order correction c (`solvers.acceleration`); `None` where none was made.
    """

    value: PyTree
    result: jax.Array
    iterations: jax.Array
    residual: jax.Array
    state: Any
    acceleration: jax.Array | None = None


class EntrywiseMean(Protocol):
    """A running mean of gradients that the op `diagonal_update` can keep; its state is a `DiagonalState` or ()."""

    @property
    def beta1(self) -> Number:
        """Decay of the mean."""
        ...

    def correction(self, count: jax.Array, dtype: Any) -> jax.Array:
        """1 / (1 - beta1^count): the factor from the mean, which starts at zero, to the weighted mean."""
        ...


class Solver(abc.ABC):
    """Solves (C + lam I) s = g.

    An implementor is a frozen dataclass. It must say `name`, `lane` and `products`, make a state (`init`, `()` for
    none) and solve one system (`solve`), whose result code the true residual has to bear out (`audited`). Everything
    else is what the planner asks: the defaults are those of a solver that calls `system.product` at most `products`
    times. One that factorizes `system.matrix()` says `takes_matrix`; one that ends sooner overrides `iterations`; one
    that calls ops names them in `kernels`; one whose work is of another kind overrides `system_cost`.

    Attributes:
      candidates: solvers of which the planner takes one in this one's place; none by default.
      warm_start: whether a solve starts from the last solution, which is the state.
    """

    candidates: tuple[Solver, ...] = ()
    warm_start: bool = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The solver's name in the plan."""

    @property
    @abc.abstractmethod
    def lane(self) -> Lane:
        """Where the system lives."""

    @property
    def tolerance(self) -> float:
        """Relative residual that CONVERGED stands for; of direct solvers a hundredth, far above what they leave."""
        return 1e-2

    @property
    @abc.abstractmethod
    def products(self) -> int:
        """Most curvature products one solve takes; 0 for solvers that take a matrix or a diagonal."""

    @abc.abstractmethod
    def init(self, like: PyTree) -> Any:
        """State with shapes and dtypes that `solve` keeps; `like` holds upcast parameter shapes."""

    @abc.abstractmethod
    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        """Solves for one right-hand side."""

    def solve_several(self, system: System, rhs: PyTree, lams: jax.Array) -> Solution:
        """Solves for every damping of `lams`, (k,): a solution whose fields have that axis in front; without state.

        The residual may be NaN, which says that nobody has looked.
        """
        del system, rhs, lams
        raise ValueError(f"{self.name} solves for one lam at a time: take Cholesky, Eigen or MultiShiftCG.")

    def repeated(self, system: System, like: PyTree, lam: jax.Array) -> Callable[[PyTree], Solution]:
        """rhs -> solution, for several right-hand sides of one system in turn; one that factorizes does so once.

        Args:
          like: a right-hand side, or its shapes.
        """
        return lambda rhs: self.solve(system, rhs, self.init(like), lam)

    def restarted(self, state: Any, accepted: jax.Array, trusted: jax.Array) -> Any:
        """The state behind a step, for solvers whose state pulls towards earlier directions; by default as it is.

        Momentum towards a direction that was rejected would propose it again however large the damping.

        Args:
          state: from `solve`.
          accepted: whether the step was taken.
          trusted: whether the steps before are a guide for the next one (`Damping.trusts`).
        """
        del accepted, trusted
        return state

    @property
    def takes_matrix(self) -> bool:
        """Whether it solves with the dense matrix, made from `parameters` products where nothing better is known."""
        return False

    @property
    def takes_any_space(self) -> bool:
        """Whether it works in the inner product of `system.space`, so that row space needs no matrix for it."""
        return False

    @property
    def exact(self) -> bool:
        """Whether it solves to rounding whatever the system's condition, instead of to a tolerance; no by default."""
        return False

    @property
    def takes_radius(self) -> bool:
        """Whether it keeps |s| within `system.radius`, which a damping that owns a radius asks for; no by default."""
        return False

    @property
    def keeps_digits(self) -> bool:
        """Whether its error grows with the condition number of the rows and not with its square; no by default."""
        return False

    @property
    def solves_several(self) -> bool:
        """Whether it solves for several lam at once (`solve_several`); no by default."""
        return False

    @property
    def needs_own_gradient(self) -> bool:
        """Whether the right-hand side must be the gradient of the curvature's own batch."""
        return False

    @property
    def entrywise(self) -> EntrywiseMean | None:
        """The running mean whose preconditioned value is the whole solution, for the op `diagonal_update`."""
        return None

    def requirements(self) -> tuple[Requirement, ...]:
        """The parts of a step that it asks for: the solve, and the factors of rows if that is its lane."""
        rows = (Requirement(Part.ROWS, EVERY_STEP, self.name),) if self.lane is Lane.ROW else ()
        return (*rows, Requirement(Part.SOLVE, EVERY_STEP, self.name))

    def matrix_size(self, parameters: int, rows: Callable[[], int]) -> int | None:
        """Size of the dense matrix that the step forms for it; `None` for none. `rows()` counts the row system's."""
        del rows
        return parameters if self.takes_matrix else None

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        """The ops that a solve calls, and what it asks of them.

        Args:
          like: shapes of a vector of the system.
          rows: () -> unknowns of the row system.
        """
        del like, rows
        return ()

    def solve_cost(self, work: StepWork) -> SolveCost:
        """Predicted work of one solve in a step of which so much is counted."""
        return self.system_cost(work.parameter_system())

    def system_cost(self, system: SystemWork) -> SolveCost:
        """Predicted work of one solve of such a system, by `takes_matrix`, `lane` and `iterations`."""
        if self.takes_matrix:
            return SolveCost(system.dense_solve(), f"{system.parameters} parameters")
        if self.lane is Lane.DIAGONAL:
            return SolveCost(system.entrywise_solve(), "one pass over the parameters")
        count, reason = self.iterations(system.rank)
        return SolveCost(system.iterative_solve(count, self.warm_start), reason)

    def iterations(self, rank: int) -> tuple[int, str]:
        """Iterations expected of one solve where C has at most that rank, and why so many."""
        del rank
        return self.products, f"{self.products} products at most"


def damped(system: System, lam: jax.Array) -> Callable[[PyTree], PyTree]:
    """v -> (C + lam I) v."""
    return lambda v: tree.axpy(lam, v, system.product(v))


def relative_residual(system: System, lam: jax.Array, rhs: PyTree, value: PyTree) -> jax.Array:
    """|g - (C + lam I) s| / |g|; 0 for a zero right-hand side."""
    return tree.relative_norm(jax.tree.map(jnp.subtract, rhs, damped(system, lam)(value)), rhs)


def unsolved(finite: jax.Array, dtype: Any, value: PyTree = None, state: Any = None) -> Solution:
    """The solution of a lane that solves no system: a direction without iterations and residual (NaN)."""
    result = jnp.where(finite, code(Result.CONVERGED), code(Result.NON_FINITE))
    return Solution(value, result, jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, dtype), state)


# How far a residual may be above the tolerance that a solver decided by: a recurrence and the residual itself differ.
_SLACK = 10.0


def audited(solution: Solution, tolerance: float) -> Solution:
    """The solution, with a result code that agrees with its true residual.

    Args:
      solution: with its true residual.
      tolerance: relative residual that CONVERGED stands for. More than 10 times that (and more than the root of the
        rounding unit, which no solver is sure to reach) is INACCURATE instead; a residual that is not finite is
        NON_FINITE, whatever the solver said of its own.
    """
    result, residual = solution.result, solution.residual
    limit = max(_SLACK * tolerance, float(jnp.finfo(residual.dtype).eps) ** 0.5)
    far = (result == int(Result.CONVERGED)) & ~(residual <= limit)
    result = jnp.where(far, code(Result.INACCURATE), result)
    lost = ~jnp.isfinite(residual) & (solved(result) | far)
    return dataclasses.replace(solution, result=jnp.where(lost, code(Result.NON_FINITE), result))


@dataclasses.dataclass(frozen=True)
class UnitVector:
    """A vector v = scale size unit, in factors that neither overflow nor vanish.

    Attributes:
      unit: of norm 1; zero where v is zero, or not finite.
      scale: near the largest magnitude in v (`tree.divisor`).
      size: norm of v / scale; 0 for zero, not finite where v is not.
    """

    unit: PyTree
    scale: jax.Array
    size: jax.Array

    @staticmethod
    def of(space: Space, v: PyTree) -> UnitVector:
        """In the inner product of `space`."""
        scale = tree.divisor(tree.max_abs(v))
        near = jax.tree.map(lambda x: x / scale.astype(x.dtype), v)
        # In a semidefinite inner product rounding may leave a tiny negative square.
        (squared,) = space.dots(((near, near),))
        size = jnp.sqrt(jnp.maximum(squared, jnp.zeros_like(squared)))
        usable = (size > 0) & jnp.isfinite(size)
        inverse = jnp.where(usable, 1 / jnp.where(usable, size, jnp.ones_like(size)), jnp.zeros_like(size))
        # Zero times infinity would be NaN, which stops debuggers.
        unit = jax.tree.map(lambda x: jnp.where(usable, inverse.astype(x.dtype) * x, jnp.zeros_like(x)), near)
        return UnitVector(unit, scale, size)

    def divide(self, v: PyTree) -> PyTree:
        """v / (scale size), for a vector that goes with this one; v / scale where this one is zero."""
        size = jnp.where(self.size > 0, self.size, jnp.ones_like(self.size))
        return jax.tree.map(lambda x: x / self.scale.astype(x.dtype) / size.astype(x.dtype), v)

    def divide_length(self, length: jax.Array) -> jax.Array:
        """length / (scale size), cut to what a square of it can bear."""
        most = float(jnp.finfo(self.size.dtype).max) ** 0.5 / 4
        return jnp.minimum(self.divide(length.astype(self.size.dtype)), jnp.asarray(most, self.size.dtype))

    def multiply(self, v: PyTree) -> PyTree:
        """v scale size: not finite where this vector is not."""
        return jax.tree.map(lambda x: x * self.size.astype(x.dtype) * self.scale.astype(x.dtype), v)
