"""batched_cg in plain JAX: one loop over all systems, in which those that are done stand still.

Conjugate gradients (Hestenes and Stiefel 1952; Nocedal and Wright, algorithm 5.3) on every system of a batch. Each has
its own end, so the loop runs as long as the slowest one, and a mask keeps the others as they are. Three systems:

    iteration       1        2        3        4
    system 0    running  running  CONVERGED    .        count 3
    system 1    running  NEGATIVE_CURVATURE    .    .   count 2, the iterate before
    system 2    running  running  running   running     MAX_ITERATIONS at maxiter = 4

An iteration, for the operator A, the preconditioner M and the residual r = b - A x, with z = M^-1 r:

    q = A p;   alpha = r.z / p.q;   x += alpha p;   r -= alpha q;   p = z' + (r'.z' / r.z) p

Around it: b has norm 1, so that tolerances are relative and no square overflows; A is scaled by a power of two; and at
the end the residual is computed from its definition, which is what the outcome is judged by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax.kernels._batched import BatchedSolution, unit_scale
from curvax.kernels._vary import vary_alike
from curvax.result import Result, code

Product: TypeAlias = Callable[[jax.Array], jax.Array]

# A residual of at most so many times the tolerance is the tolerance met: the recurrence of the residual, which decides
# when to stop, and the residual itself differ by rounding.
_SLACK = 2

_RUNNING = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Iteration:
    """Vectors are (..., n), scalars (...)."""

    y: jax.Array  # x = start + first second y, for a right-hand side of norm 1
    r: jax.Array
    p: jax.Array
    rz: jax.Array
    largest: jax.Array  # the largest |A p| / |p| so far
    count: jax.Array
    result: jax.Array  # -1 while running


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _System:
    """What stays the same while the systems are solved.

    The operator is divided by a power of two, the size of its product with the first direction: squares of products
    then neither overflow nor vanish, and since powers of two are exact, nothing else changes. The inverse of that power
    is in two factors, each far from the ends of the range.
    """

    b: jax.Array
    start: jax.Array
    cold: jax.Array  # whether it starts from zero
    inverse: jax.Array | None
    tol: jax.Array
    maxiter: jax.Array
    first: jax.Array  # (..., 1)
    second: jax.Array

    def iterate(self, y: jax.Array) -> jax.Array:
        return self.start + y * self.first * self.second

    def precondition(self, r: jax.Array) -> jax.Array:
        return r if self.inverse is None else self.inverse * r


def solve_dense(matrices: jax.Array, rhs: jax.Array, *operands: Any) -> BatchedSolution:
    """`solve` with dense matrices, (..., n, n), whose batch axes broadcast against those of `rhs`."""
    upcast = matrices.astype(rhs.dtype)

    def product(v: jax.Array) -> jax.Array:
        return jnp.einsum("...ij,...j->...i", upcast, v, precision=jax.lax.Precision.HIGHEST)

    return solve(product, rhs, *operands)


def solve(
    product: Product,
    rhs: jax.Array,
    start: jax.Array | None,
    tol: jax.Array,
    maxiter: jax.Array,
    inverse: jax.Array | None,
) -> BatchedSolution:
    """See `api.batched_cg`.

    Args:
      product: v -> A v on (..., n), system by system.
      rhs: (..., n), float32 or float64, with all batch axes.
      start: like `rhs`, or `None` for zero.
      tol, maxiter: (...).
      inverse: inverse of the diagonal preconditioner, (..., n), positive, at least 1; `None` for none.
    """
    # 1. A right-hand side of norm 1, and the start if it is better than zero.
    size, unit = unit_scale(rhs)
    b = rhs * unit[..., None]
    x, r, cold = _begin(product, b, start, unit)
    # 2. The first direction, and from its product the scale of the operator.
    p = r if inverse is None else inverse * r
    system = _System(b, x, cold, inverse, tol, maxiter, *_powers(product(p), p))
    # 3. Systems that are done before they begin.
    rr = _dot(r, r)
    result = jnp.where(rr <= tol**2, code(Result.CONVERGED), jnp.asarray(_RUNNING, jnp.int32))
    result = jnp.where(jnp.isfinite(rr), result, code(Result.NON_FINITE))
    begin = _Iteration(jnp.zeros_like(b), r, p, _dot(r, p), jnp.zeros_like(rr), jnp.zeros_like(result), result)
    # The products of an iteration vary over whatever mesh axes operands or product do, so the first iterate must too.
    carried, structure = jax.tree.flatten(begin)
    begin = jax.tree.unflatten(structure, vary_alike(carried, like=jax.tree.leaves(system)))

    # 4. Iterate until no system is live, then judge every one.
    def live(at: _Iteration) -> jax.Array:
        return (at.result == _RUNNING) & (at.count < maxiter)

    def advance(carry: tuple[jax.Array, _Iteration]) -> tuple[jax.Array, _Iteration]:
        i, at = carry
        return i + 1, _advance(product, system, i, live(at), at)

    _, end = jax.lax.while_loop(lambda c: jnp.any(live(c[1])), advance, (jnp.zeros((), jnp.int32), begin))
    return _finish(product, system, size, end)


def broadcast(
    batch: tuple[int, ...],
    rhs: jax.Array,
    x0: jax.Array | None,
    tol: jax.Array,
    maxiter: jax.Array,
    inverse: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array, jax.Array | None]:
    """Operands of `solve` with all batch axes."""
    shape = (*batch, rhs.shape[-1])
    x0, inverse = (None if v is None else jnp.broadcast_to(v, shape) for v in (x0, inverse))
    return jnp.broadcast_to(rhs, shape), x0, jnp.broadcast_to(tol, batch), jnp.broadcast_to(maxiter, batch), inverse


def _begin(
    product: Product, b: jax.Array, start: jax.Array | None, unit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, b - A x, False) where x points downhill and lowers the quadratic x.A x / 2 - b.x = -x.(b + r) / 2.

    Elsewhere (0, b, True): a stale start may point uphill on an indefinite system, and elsewhere be worse than none.
    """
    if start is None:
        return jnp.zeros_like(b), b, jnp.ones(b.shape[:-1], bool)
    x = start * unit[..., None]
    r = b - product(x)
    xb = _dot(x, b)
    good = (xb > 0) & (xb + _dot(x, r) > 0)
    return jnp.where(good[..., None], x, jnp.zeros_like(x)), jnp.where(good[..., None], r, b), ~good


def _advance(product: Product, system: _System, i: jax.Array, live: jax.Array, at: _Iteration) -> _Iteration:
    """One iteration of the live systems; the others stand still."""
    # 1. The curvature along p, judged against the largest seen: positive, zero to rounding, negative, not finite.
    q = product(at.p * system.first) * system.second
    pq, pp, qq = _dot(at.p, q), _dot(at.p, at.p), _dot(q, q)
    eps = jnp.asarray(jnp.finfo(pq.dtype).eps, pq.dtype)
    one = jnp.ones_like(pq)
    curvature = pq / pp
    largest = jnp.maximum(at.largest, jnp.sqrt(qq / pp))
    finite = jnp.isfinite(pq) & jnp.isfinite(qq)
    negative = curvature < -eps * largest
    flat = ~negative & ~(curvature > eps * largest)
    proceed = finite & ~negative & ~flat
    # 2. The step. Along a first direction of negative curvature: the step that |A p| / |p| as curvature would give.
    escape = finite & negative & (i == 0) & system.cold
    alpha = at.rz / jnp.where(proceed, pq, jnp.where(escape, jnp.sqrt(pp * qq), one))
    moves = (live & (proceed | escape))[..., None]
    y = jnp.where(moves, at.y + alpha[..., None] * at.p, at.y)
    r = jnp.where(moves, at.r - alpha[..., None] * q, at.r)
    # 3. The next direction.
    z = system.precondition(r)
    rr, rz = _dot(r, r), _dot(r, z)
    p = jnp.where(live[..., None], z + (rz / jnp.where(at.rz > 0, at.rz, one))[..., None] * at.p, at.p)
    # 4. The outcome: what is last here outranks what is above it.
    result = jnp.where(rr <= system.tol**2, code(Result.CONVERGED), jnp.asarray(_RUNNING, jnp.int32))
    # A direction of length zero: the residual is exactly zero.
    result = jnp.where(flat, jnp.where(pp > 0, code(Result.BREAKDOWN), code(Result.CONVERGED)), result)
    result = jnp.where(negative, code(Result.NEGATIVE_CURVATURE), result)
    result = jnp.where(finite & jnp.isfinite(rr), result, code(Result.NON_FINITE))
    largest = jnp.where(live, largest, at.largest)
    result = jnp.where(live, result, at.result)
    return _Iteration(y, r, p, rz, largest, at.count + live.astype(at.count.dtype), result)


def _finish(product: Product, system: _System, size: jax.Array, end: _Iteration) -> BatchedSolution:
    x = system.iterate(end.y)
    # On an indefinite system what is added to a start may point uphill: then a short step along b instead.
    largest = jnp.where(end.largest > 0, end.largest, jnp.ones_like(end.largest))
    short = system.b / largest[..., None] * system.first * system.second
    x = jnp.where((_dot(x, system.b) < 0)[..., None], short, x)
    rest = system.b - product(x)
    residual = jnp.where(size == 0, jnp.zeros_like(size), jnp.sqrt(_dot(rest, rest)))
    far = (end.result == int(Result.CONVERGED)) & ~(residual <= _SLACK * system.tol)
    result = jnp.where(end.result == _RUNNING, code(Result.MAX_ITERATIONS), end.result)
    result = jnp.where(far, code(Result.INACCURATE), result)
    result = jnp.where(jnp.isfinite(size), result, code(Result.NON_FINITE))
    # A right-hand side that is not finite leaves x at zero, and zero times its norm is NaN: not a step to take.
    return BatchedSolution(x * size[..., None], result, end.count, residual)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1)


def _powers(q: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two powers of two, (..., 1), whose product is about max |p| / max |q|; 1 where that is zero or not finite."""
    _, of_q = jnp.frexp(jnp.max(jnp.abs(q), axis=-1, keepdims=True, initial=0))
    _, of_p = jnp.frexp(jnp.max(jnp.abs(p), axis=-1, keepdims=True, initial=0))
    exponent = of_q - of_p
    one = jnp.ones(exponent.shape, q.dtype)
    return jnp.ldexp(one, -(exponent // 2)), jnp.ldexp(one, exponent // 2 - exponent)
