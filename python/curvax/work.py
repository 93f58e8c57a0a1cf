"""What work costs, and the counted pieces of a step from which modules add up what they cost.

The planner counts the pieces of a step once, on traces (`StepWork`). A solver, a preconditioner and an estimator say
how many of which pieces they take; none of them needs to know a model:

    StepWork ---- preconditioner.refresh_cost ---> Cost of a refresh
       |--------- solver.solve_cost -------------> Cost of a solve, and the sizes it follows from
       '-- parameter_system() --> SystemWork ----> solver.system_cost: the same for any linear system

An example: on a model of 1,000 parameters whose product with the curvature takes 2 MFLOP, ten iterations of conjugate
gradients take 10 (2 MFLOP + 12 x 1,000 FLOP) = 20.1 MFLOP.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

# Passes over the vectors of one CG iteration: three inner products read two, the update reads four and writes two, its
# norm reads one, the direction reads two and writes one, less what is fused.
_VECTOR_PASSES, _VECTOR_FLOPS = 7.0, 12.0
# Operations of an iteration: per leaf, and (scalars, tests) in all.
LEAF_LAUNCHES, ITERATION_LAUNCHES = 4.0, 15.0
# A dense solve beside its factorization: damping, mirroring, the check for finite numbers, refinement and residual.
_DENSE_PASSES, _DENSE_LAUNCHES = 10.0, 100.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one execution.

    Attributes:
      flops: floating-point operations.
      bytes: bytes moved to and from memory.
      memory: bytes alive at once beyond the arguments; of a counted trace, its largest value.
      launches: operations that run one by one.
      factorization, convolution: how many of the floating-point operations dense factorizations and convolutions do.
    """

    flops: float = 0.0
    bytes: float = 0.0
    memory: float = 0.0
    launches: float = 0.0
    factorization: float = 0.0
    convolution: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return self._with(other, lambda a, b: a + b, max(self.memory, other.memory))

    def __sub__(self, other: Cost) -> Cost:
        """The work without a part of it."""
        return self._with(other, lambda a, b: max(a - b, 0.0), self.memory)

    def times(self, count: float) -> Cost:
        """The work `count` times over, one after another."""
        return self._with(self, lambda a, _: a * count, self.memory)

    def _with(self, other: Cost, rule: Callable[[float, float], float], memory: float) -> Cost:
        return Cost(
            flops=rule(self.flops, other.flops),
            bytes=rule(self.bytes, other.bytes),
            memory=memory,
            launches=rule(self.launches, other.launches),
            factorization=rule(self.factorization, other.factorization),
            convolution=rule(self.convolution, other.convolution),
        )


class SolveCost(NamedTuple):
    """Predicted work of one solve, and the sizes that it follows from in a few words."""

    cost: Cost
    reason: str


@dataclasses.dataclass(frozen=True)
class SystemWork:
    """A linear system (C + lam I) s = g, as the cost of its solution depends on it.

    Attributes:
      unknowns: size of the system.
      rank: bound on the rank of C.
      itemsize: bytes of a number.
      parameters, leaves: of the model, whatever space the system is posed in.
      product: a product with C.
      vectors: the vector work of one iteration of conjugate gradients.
      start: the residual of a warm start.
      matrix: () -> C as a dense matrix; its `memory` is all that is alive meanwhile beside that matrix and its factor.
      memory: bytes alive during an iteration.
    """

    unknowns: int
    rank: int
    itemsize: int
    parameters: int
    leaves: int
    product: Cost
    vectors: Cost
    start: Cost
    matrix: Callable[[], Cost]
    memory: float

    def iterative_solve(self, count: float, warm_start: bool) -> Cost:
        """Work of `count` iterations with one product each."""
        total = (self.product + self.vectors).times(count)
        return dataclasses.replace(total + self.start if warm_start else total, memory=self.memory)

    def dense_solve(self) -> Cost:
        """Work of making the matrix, factorizing it, and what surrounds that."""
        matrix, entries = self.matrix(), float(self.unknowns) ** 2
        factorization = self.unknowns * entries / 3
        total = matrix + Cost(
            flops=factorization + 4 * entries,
            bytes=_DENSE_PASSES * self.itemsize * entries,
            launches=_DENSE_LAUNCHES,
            factorization=factorization,
        )
        return dataclasses.replace(total, memory=matrix.memory + 3.0 * self.itemsize * self.unknowns**2)

    def entrywise_solve(self) -> Cost:
        """Work of one pass that reads gradient, mean and diagonal and writes mean and solution."""
        vector = self.unknowns * self.itemsize
        return Cost(6.0 * self.unknowns, 5.0 * vector, 2.0 * vector, self.leaves)


@dataclasses.dataclass(frozen=True)
class StepWork:
    """Counted work of the pieces that a step is made of, from shapes alone.

    Attributes:
      parameters, leaves, itemsize: of the trainable parameters; bytes of a number of an upcast vector.
      rows: unknowns of the row system; 0 for a curvature without rows.
      linearize: a forward pass.
      gradient: forward and reverse pass of a gradient; of targets sampled from the model it costs the same.
      product: a product with the curvature.
      residuals: bytes that reverse mode keeps.
      gram: max_bytes -> work of the Gram matrix of the rows, whose `memory` is alive beside it; with whatever structure
        the model has, and made in pieces where so much memory does not hold all rows.
      count_refresh: counts `refresh`, for who asks for it.
    """

    parameters: int
    leaves: int
    itemsize: int
    rows: int
    linearize: Cost
    gradient: Cost
    product: Cost
    residuals: int
    gram: Callable[[int], Cost] = lambda max_bytes: Cost()
    count_refresh: Callable[[], Cost] = Cost

    @functools.cached_property
    def refresh(self) -> Cost:
        """One `refresh` of the method's preconditioner as its trace counts it, without the forward pass."""
        return self.count_refresh()

    @property
    def vector(self) -> int:
        """Bytes of one upcast parameter vector."""
        return self.parameters * self.itemsize

    @property
    def around_product(self) -> int:
        """Bytes that every product touches: residuals, parameters, its argument and its result."""
        return self.residuals + 3 * self.vector

    @property
    def rank(self) -> int:
        """Bound on the rank of the curvature."""
        return min(self.rows, self.parameters) if self.rows else self.parameters

    def parameter_system(self) -> SystemWork:
        """The system over all parameters; its matrix is made of a product for each."""
        launches = LEAF_LAUNCHES * self.leaves + ITERATION_LAUNCHES
        vectors = Cost(_VECTOR_FLOPS * self.parameters, _VECTOR_PASSES * self.vector, launches=launches)
        columns = dataclasses.replace(
            self.product.times(self.parameters),
            launches=self.product.launches,
            memory=float(self.residuals * (1 + self.parameters)),
        )
        return SystemWork(
            unknowns=self.parameters,
            rank=self.rank,
            itemsize=self.itemsize,
            parameters=self.parameters,
            leaves=self.leaves,
            product=self.product,
            vectors=vectors,
            start=self.product + vectors,
            matrix=lambda: columns,
            # The iterate, residual and search direction beside what the product touches.
            memory=self.around_product + 3.0 * self.vector,
        )

    def with_forward(self) -> StepWork:
        """The same where whatever looks at the curvature begins with a forward pass of its own."""
        return dataclasses.replace(
            self,
            gradient=self.gradient + self.linearize,
            product=self.product + self.linearize,
            count_refresh=lambda: self.refresh + self.linearize,
        )
