"""A solver whose system lives in row space (sample space, minSR, kernel form) instead of parameter space.

Let J be the Jacobian of all outputs of the batch, Q = S S^T the Hessian of the loss in these outputs, C = J^T Q J, and
g = J^T r the gradient. The unknowns are as many as outputs, R, where parameter space has n, the parameters:

    parameter space (n)                     row space (R)

    (J^T Q J + lam I) s = g                 (S^T J J^T S + lam I) z = t,  S t = r,  s = J^T S z     with a matrix
                                            (Q K + lam I) u = r,  K = J J^T,        s = J^T u       with products

The first form is for solvers of a matrix. The second is for conjugate gradients: in the inner product <a, b> = a^T K b
its operator is symmetric, and J^T u has the norm of u, so that iterates and residuals are those of parameter space. It
needs no square root of Q. A third form, least squares, is for solvers that take S^T J itself
(`curvax/solvers/least_squares.py`). In the second form a vector is a pair (u, K u), which makes an iteration cost one
product with K:

    1. r and its image                (r, K r)                               one product
    2. a start from the last step     in span{r, r - Q J s'}                 one and a half
    3. the iteration                  p -> (Q (K p), K (Q (K p)))            one each
    4. back                           s = J^T u                              a half

An example: J = (1, 2)^T, Q = I, lam = 1 and r = (1, 1) have C = 5 and g = 3, so s = 3 / 6. In row space I + K is
[[2, 2], [2, 5]], u = (1/2, 0), and J^T u = 1/2.

`curvax/execute/directions.py` runs both forms. SPRING and warm starts keep the last direction in parameter space, whose
shape does not depend on the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from curvax import tree
from curvax.kernels import Op, Request, gram_accumulate
from curvax.solvers.base import Lane, Solution, Solver, System
from curvax.solvers.least_squares import LeastSquaresSolver
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.tree import PyTree
from curvax.work import ITERATION_LAUNCHES, Cost, SolveCost, StepWork, SystemWork

# The pair space keeps an image beside each vector, and its updates are not fused.
_PAIR_PASSES, _PAIR_FLOPS, _PAIR_VECTORS = 25.0, 20.0, 16.0
# The row lane's own residual is a product, J^T u of the answer half of one.
_LANE_PRODUCTS = 1.5
# CG in row space begins with the image of the right-hand side, one product, and tests a warm start with one and a half.
_PAIR_PRODUCTS, _PAIR_WARM_PRODUCTS = 1.0, 1.5


@dataclasses.dataclass(frozen=True)
class RowSpace(Solver):
    """Solves the damped Gauss-Newton system through its rows; the row lane does the translation.

    Attributes:
      solver: solves the row system: `Cholesky` or `QR` (exact), `CG`, `LSMR`, or an adapter.
      momentum: SPRING's mu: the previous direction s' enters as (C + lam I) s = g + lam mu s' (Goldshlager, Abrahamsen
        and Lin 2024). 0 is the plain damped system.
      max_bytes: bound on the memory of explicit rows.
    """

    solver: Solver
    momentum: float = 0.0
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        if self.solver.lane is not Lane.PARAMETER and not isinstance(self.solver, LeastSquaresSolver):
            raise ValueError(f"RowSpace takes a solver of a plain linear system, not {self.solver.name}.")
        like = jax.ShapeDtypeStruct((1,), "float32")
        if self.momentum and not self.solver.warm_start and jax.tree.leaves(jax.eval_shape(self.solver.init, like)):
            raise ValueError(f"{self.solver.name} has a state of its own beside which no momentum is kept: drop one.")

    @property
    def name(self) -> str:
        spring = f", momentum {self.momentum:g}" if self.momentum else ""
        return f"row-space {self.solver.name}{spring}"

    @property
    def lane(self) -> Lane:
        return Lane.ROW

    @property
    def tolerance(self) -> float:
        # Of the row system; in parameter space, where the residual is taken, the rounding of two more products adds up.
        return max(self.solver.tolerance, 1e-2)

    @property
    def products(self) -> int:
        return self.solver.products

    @property
    def needs_own_gradient(self) -> bool:
        return self.solver.takes_any_space or isinstance(self.solver, LeastSquaresSolver)

    @property
    def exact(self) -> bool:
        return self.solver.exact

    @property
    def solves_several(self) -> bool:
        return self.solver.solves_several and not self.momentum

    @property
    def keeps_digits(self) -> bool:
        return self.solver.keeps_digits

    def restarted(self, state: Any, accepted: jax.Array, trusted: jax.Array) -> Any:
        """Without momentum, where a step was rejected or fresh batches see their loss climb.

        SPRING's damping pulls towards the last direction, and no lam makes that pull smaller.
        """
        if not self.momentum:
            return state
        return tree.where(accepted & trusted, state, tree.zeros_like(state))

    def matrix_size(self, parameters: int, rows: Callable[[], int]) -> int | None:
        if isinstance(self.solver, LeastSquaresSolver):
            return self.solver.matrix_size(parameters, rows)
        return rows() if self.solver.takes_matrix else None

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        if self.solver.takes_any_space:
            return ()
        if isinstance(self.solver, LeastSquaresSolver):
            return self.solver.kernels(like, rows)
        size, dtype = rows(), tree.scalar_dtype(like)
        matrix, vector = jax.ShapeDtypeStruct((size, size), dtype), jax.ShapeDtypeStruct((size,), dtype)
        gram = tuple((op, Request.of(matrix)) for op in gram_accumulate.OPS if self.solver.takes_matrix)
        return (*gram, *self.solver.kernels(vector, rows))

    def solve_cost(self, work: StepWork) -> SolveCost:
        inner = self.solver.system_cost(self._system(work))
        if isinstance(self.solver, LeastSquaresSolver):
            return SolveCost(inner.cost, f"{work.rows} rows, {inner.reason}")
        beside = _LANE_PRODUCTS + (0.0 if self.solver.takes_matrix else _PAIR_PRODUCTS)
        total = dataclasses.replace(inner.cost + work.product.times(beside), memory=inner.cost.memory)
        return SolveCost(total, f"{work.rows} rows, {inner.reason}")

    def _system(self, work: StepWork) -> SystemWork:
        """The row system: its vectors are pairs, its matrix is the Gram matrix as the model's structure makes it."""
        vector = work.itemsize * work.rows

        def gram() -> Cost:
            cost = work.gram(self.max_bytes)
            return dataclasses.replace(cost, memory=work.residuals + cost.memory)

        return SystemWork(
            unknowns=work.rows,
            rank=work.rank,
            itemsize=work.itemsize,
            parameters=work.parameters,
            leaves=1,
            product=work.product,
            vectors=Cost(_PAIR_FLOPS * work.rows, _PAIR_PASSES * vector, launches=ITERATION_LAUNCHES),
            start=work.product.times(_PAIR_WARM_PRODUCTS),
            matrix=gram,
            memory=work.around_product + _PAIR_VECTORS * vector,
        )

    @property
    def keeps_direction(self) -> bool:
        """Whether the previous direction is state: for momentum, or as the source of a warm start.

        A row vector belongs to its batch and means nothing for the next; the direction lives in parameter space and
        keeps its shape.
        """
        return self.momentum != 0 or self.solver.warm_start

    def init(self, like: PyTree) -> PyTree:
        return tree.zeros_like(like) if self.keeps_direction else self.solver.init(like)

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        """Solves a row system that the row lane has set up; the lane owns the state."""
        return self.solver.solve(system, rhs, state, lam)
