"""Conjugate gradients on one system inside a Mosaic GPU kernel, with the matrix in shared memory.

Written for the body of `pallas`. The decisions are those of csrc/common/batched_cg.h and `reference`. A product takes
64 rows at a time in the layout of the tensor cores' accumulators, in which four neighboring threads share a row. Every
warp holds all of every vector, spread like the columns of that layout: a dot product is a tree over a thread's own
entries and two exchanges between neighbors, without a barrier and the same in each warp, so all decide alike. Only a
product passes through shared memory, where rows become columns. Mosaic divides and takes roots to two units in the last
place, which the course of the iteration does not notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from curvax.kernels import _mosaic
from curvax.result import Result

ROWS = 64
"""Rows of the accumulators' layout."""

COLUMNS = 8
"""Columns of the accumulators' layout, and what matrices and vectors must be multiples of."""

# Unknowns up to which a thread has registers for its part of all vectors.
_IN_REGISTERS = 128
_RUNNING = -1
# See `reference`.
_SLACK = 2
_EPS = float(np.finfo(np.float32).eps)
_FINITE = float(np.finfo(np.float32).max)


def keeps_solution(n: int) -> bool:
    """Whether shared memory has to keep the iterate, for which n unknowns leave no registers."""
    return n > _IN_REGISTERS


def rows_of(n: int) -> int:
    """How many rows shared memory has for a matrix of n unknowns: at least those of one step of a product."""
    return max(n, ROWS)


@dataclasses.dataclass(frozen=True)
class System:
    """One system, in shared memory.

    Attributes:
      matrix: (rows, n), with zeros below the first n rows; `rows_of` says how many rows.
      rhs: (n,).
      start: (n,), or `None` for zero.
      inverse: inverse of the preconditioner, (n,), or `None` for none.
      product: (rows,), where a product's rows become columns.
      solution: (n,), to keep the iterate in; `None` where registers do.
      tol, maxiter: scalars.
    """

    matrix: Any
    rhs: Any
    start: Any
    inverse: Any
    product: Any
    solution: Any
    tol: jax.Array
    maxiter: jax.Array

    @property
    def layout(self) -> Any:
        """Of vectors: that of the columns of a block of the matrix, the same in each warp."""
        return _mosaic.backend().Layout.WGMMA.reduce(0)

    def read(self, vector: Any) -> jax.Array:
        """A vector in shared memory."""
        return _mosaic.load(vector.at[pl.ds(0, self.rhs.shape[0])], self.layout)

    def zero(self) -> jax.Array:
        """The vector of zeros."""
        return _mosaic.backend().layout_cast(jnp.zeros(self.rhs.shape, jnp.float32), self.layout)

    def times(self, v: jax.Array) -> jax.Array:
        """The product with a vector, 64 rows at a time; the last 64 reach back, for what it does twice is the same."""
        rows, columns = self.matrix.shape
        repeated = jax.lax.broadcast_in_dim(v, (ROWS, columns), (1,))
        for first in range(0, rows, ROWS):
            some = pl.ds(min(first, rows - ROWS), ROWS)
            block = _mosaic.load(self.matrix.at[some], _mosaic.backend().Layout.WGMMA)
            self.product[some] = jnp.sum(block.astype(jnp.float32) * repeated, axis=1)
        return self.read(self.product)

    def keep(self, y: jax.Array) -> jax.Array | None:
        """The iterate as it is carried along."""
        if self.solution is None:
            return y
        self.solution[...] = y
        return None

    def kept(self, y: jax.Array | None) -> jax.Array:
        """What `keep` was given last, by what it returned."""
        return self.read(self.solution) if y is None else y

    def precondition(self, r: jax.Array) -> jax.Array:
        """The direction that the preconditioner makes of a residual."""
        return r if self.inverse is None else self.read(self.inverse) * r


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Iteration:
    """What changes; see `reference`."""

    y: jax.Array | None
    r: jax.Array
    p: jax.Array
    rz: jax.Array
    largest: jax.Array
    count: jax.Array
    result: jax.Array


@dataclasses.dataclass(frozen=True)
class Solution:
    """A vector and three scalars; see `curvax.kernels._batched.BatchedSolution`."""

    value: jax.Array
    result: jax.Array
    iterations: jax.Array
    residual: jax.Array


def solve(system: System) -> Solution:
    """Solves one system whose operands have arrived."""
    size, unit = _unit_scale(system.read(system.rhs))
    x, r, cold = _begin(system, unit)
    p = system.precondition(r)
    first, second = _powers(jnp.max(jnp.abs(system.times(p))), jnp.max(jnp.abs(p)))
    rr = _dot(r, r)
    result = jnp.where(rr <= system.tol * system.tol, int(Result.CONVERGED), jnp.int32(_RUNNING))
    result = jnp.where(_is_finite(rr), result, int(Result.NON_FINITE))
    begin = _Iteration(system.keep(system.zero()), r, p, _dot(r, p), jnp.float32(0), jnp.int32(0), result)
    end = jax.lax.while_loop(
        lambda at: (at.result == _RUNNING) & (at.count < system.maxiter),
        lambda at: _advance(system, lambda v: system.times(v * first) * second, cold, at),
        begin,
    )
    b = system.read(system.rhs) * unit
    x = x + system.kept(end.y) * first * second
    # On an indefinite system what is added to a start may point uphill: then a short step along b instead.
    short = b / jnp.where(end.largest > 0, end.largest, jnp.float32(1)) * first * second
    x = _select(_dot(x, b) < 0, short, x)
    rest = b - system.times(x)
    residual = jnp.where(size == 0, jnp.float32(0), jnp.sqrt(_dot(rest, rest)))
    return Solution(x * size, _outcome(system, size, residual, end.result), end.count, residual)


def _begin(system: System, unit: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, b - A x, whether no start was kept); see `reference`."""
    b = system.read(system.rhs) * unit
    if system.start is None:
        return system.zero(), b, jnp.bool_(True)
    x = system.read(system.start) * unit
    r = b - system.times(x)
    xb, xr = _dot(x, b), _dot(x, r)
    good = (xb > 0) & (xb + xr > 0)
    return _select(good, x, system.zero()), _select(good, r, b), jnp.logical_not(good)


def _advance(system: System, product: Callable[[jax.Array], jax.Array], cold: jax.Array, at: _Iteration) -> _Iteration:
    """One iteration."""
    q = product(at.p)
    pq, pp, qq = _dot(at.p, q), _dot(at.p, at.p), _dot(q, q)
    one = jnp.float32(1)
    curvature, magnitude = pq / pp, jnp.sqrt(qq / pp)
    largest = jnp.where(magnitude > at.largest, magnitude, at.largest)
    finite = _is_finite(pq) & _is_finite(qq)
    ahead = finite & (curvature > _EPS * largest)
    negative = finite & (curvature < -_EPS * largest)
    # Along a first direction of negative curvature: the step that |A p| / |p| as curvature would give.
    escape = negative & (at.count == 0) & cold
    alpha = at.rz / jnp.where(ahead, pq, jnp.where(escape, jnp.sqrt(pp * qq), one))
    moves = ahead | escape
    before = system.kept(at.y)
    y = system.keep(_select(moves, before + alpha * at.p, before))
    r = _select(moves, at.r - alpha * q, at.r)
    z = system.precondition(r)
    rr, rz = _dot(r, r), _dot(r, z)
    p = z + rz / jnp.where(at.rz > 0, at.rz, one) * at.p
    result = jnp.where(rr <= system.tol * system.tol, int(Result.CONVERGED), jnp.int32(_RUNNING))
    # A direction of length zero: the residual is exactly zero.
    flat = jnp.where(pp > 0, int(Result.BREAKDOWN), int(Result.CONVERGED))
    result = jnp.where(ahead, result, jnp.where(negative, int(Result.NEGATIVE_CURVATURE), flat))
    result = jnp.where(finite & _is_finite(rr), result, int(Result.NON_FINITE))
    return _Iteration(y, r, p, rz, largest, at.count + 1, result)


def _outcome(system: System, size: jax.Array, residual: jax.Array, result: jax.Array) -> jax.Array:
    met = residual <= _SLACK * system.tol
    reached = jnp.where(met, int(Result.CONVERGED), int(Result.INACCURATE))
    outcome = jnp.where(result == int(Result.CONVERGED), reached, result)
    outcome = jnp.where(result == _RUNNING, int(Result.MAX_ITERATIONS), outcome)
    return jnp.where(_is_finite(size), outcome, int(Result.NON_FINITE))


def _select(first: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """One of two vectors."""
    return jnp.where(jnp.broadcast_to(first, a.shape), a, b)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b)


def _is_finite(v: jax.Array) -> jax.Array:
    return jnp.abs(v) <= _FINITE


def _unit_scale(rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(|b|, 1 / |b|), safe against overflow and underflow of the squares; 0 where |b| has no inverse.

    A norm whose inverse is not a normal number, which processors may take for zero, counts as infinite.
    """
    largest = jnp.max(jnp.abs(rhs))
    # A power of two whose inverse is a normal number: see `tree.divisor`.
    usable = (largest > 0) & _is_finite(largest)
    exponent = _exponent(jnp.where(usable, largest, jnp.float32(1)))
    safe = jnp.where(usable, _power(jnp.clip(exponent, -100, 100)), jnp.float32(1))
    scaled = rhs / safe
    size = safe * jnp.sqrt(_dot(scaled, scaled))
    size = jnp.where(size > 1 / float(jnp.finfo(jnp.float32).tiny), jnp.float32(jnp.inf), size)
    usable = (size > 0) & _is_finite(size)
    return size, jnp.where(usable, 1 / jnp.where(usable, size, jnp.float32(1)), jnp.float32(0))


def _powers(q: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two powers of two whose product is about p / q; 1 where that is zero or not finite."""
    usable = (q > 0) & (p > 0) & _is_finite(q) & _is_finite(p)
    exponent = jnp.where(usable, _exponent(q) - _exponent(p), 0)
    half = exponent >> 1
    return _power(-half), _power(half - exponent)


def _exponent(v: jax.Array) -> jax.Array:
    """e of v = m 2^e with m in [1/2, 1), from the bits of a float32 above zero; a subnormal has the least normal's."""
    return (_bitcast(v, jnp.int32) >> 23) - 126


def _power(e: jax.Array) -> jax.Array:
    """2^e as a float32, for e within its range."""
    return _bitcast((jnp.clip(e, -126, 127) + 127) << 23, jnp.float32)


def _bitcast(v: jax.Array, dtype: Any) -> jax.Array:
    """The bits of a scalar as another dtype; Mosaic has that for vectors alone."""
    return jnp.max(jax.lax.bitcast_convert_type(jnp.broadcast_to(v, (128,)), dtype))
