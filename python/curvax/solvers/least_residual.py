"""How solvers of least residual end: what they check, and what they make of the curvature that they found.

MINRES and conjugate residuals make the same iterates, s_k of least |g - A s_k| in the Krylov space, A = C + lam I.
Their residual r_k carries the news of the curvature (Liu and Roosta 2022): while r.A r > 0 the Krylov space has
positive curvature and every s_k points downhill; the first r with r.A r <= 0 is itself a direction of nonpositive
curvature, and downhill too, since r.g = |r|^2.

    r.A r / |r|^2          beyond rounding, positive                 go on
                           negative                                  s_k + t r, NEGATIVE_CURVATURE
                           zero, and |A r| is rounding as well       g has a part that A maps to zero: s_k is the
                                                                     least-squares solution, SINGULAR, r taken out of it
    t = |r| / |A r|, the inverse of the size of A along r: the step that this size would give as a positive curvature.

An example: A = diag(1, -1) and g = (2, 1). r_0 = g has curvature 3 / 5; s_1 = 3 / 5 g leaves r_1 = (4 / 5, 8 / 5),
whose curvature is -3 / 5. So s = s_1 + r_1 = (2, 2.2): downhill, where A^-1 g = (2, -1) is the saddle point.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.solvers.base import Result, Solution, System, UnitVector, audited, code, relative_residual
from curvax.solvers.krylov import RUNNING
from curvax.tree import PyTree

_ROUNDINGS = 8
"""Rounding units of the operator's size below which a curvature is none."""


@dataclasses.dataclass(frozen=True)
class Ending:
    """Where an iteration for a right-hand side of norm 1 ended.

    Attributes:
      x: the last iterate.
      r, z: its residual, and P^-1 r.
      image, length: |A z| and |z|.
      i: iterations.
      result: a `Result`, or RUNNING.
    """

    x: PyTree
    r: PyTree
    z: PyTree
    image: jax.Array
    length: jax.Array
    i: jax.Array
    result: jax.Array


def verdict(curvature: jax.Array, image: jax.Array, largest: jax.Array) -> jax.Array:
    """The result of a residual direction, RUNNING while its curvature is positive.

    Args:
      curvature: z.A z / z.z.
      image: |A z| / |z|.
      largest: largest `image` so far, this one included.
    """
    eps = float(jnp.finfo(curvature.dtype).eps)
    rounding = jnp.asarray(_ROUNDINGS * eps, curvature.dtype) * largest
    # A residual in the null space is what it is to about the root of the rounding unit.
    null = (jnp.abs(curvature) <= rounding) & (image <= jnp.asarray(eps**0.5, curvature.dtype) * largest)
    result = jnp.where(curvature > rounding, jnp.asarray(RUNNING, jnp.int32), code(Result.NEGATIVE_CURVATURE))
    result = jnp.where(null, code(Result.SINGULAR), result)
    return jnp.where(jnp.isfinite(curvature) & jnp.isfinite(image), result, code(Result.NON_FINITE))


def is_bad(squared: jax.Array, inner: jax.Array) -> jax.Array:
    """Whether P^-1 is that of no positive P: it makes v.P^-1 v = `inner` of a vector with v.v = `squared`."""
    return jnp.isfinite(squared) & (squared > 0) & ~((inner > 0) & jnp.isfinite(inner))


def finish(system: System, lam: jax.Array, scaled: UnitVector, end: Ending, tol: float) -> Solution:
    """The solution behind the last iterate: its curvature used, its residual recomputed from its definition."""
    result = jnp.where(end.result == RUNNING, code(Result.MAX_ITERATIONS), end.result)
    result = jnp.where(jnp.isfinite(scaled.size), result, code(Result.NON_FINITE))
    (along, own) = system.space.dots(((end.r, end.x), (end.r, end.z)))
    nothing = jnp.zeros_like(own)
    t = jnp.where(result == int(Result.NEGATIVE_CURVATURE), over(end.length, end.image), nothing)
    t = jnp.where(result == int(Result.SINGULAR), -over(along, own), t)
    x = tree.where(t != 0, tree.axpy(t, end.z, end.x), end.x)
    residual = relative_residual(system, lam, scaled.unit, x)
    residual = jnp.where(jnp.isfinite(scaled.size), residual, scaled.size)
    return audited(Solution(scaled.multiply(x), result, end.i, residual, ()), tol)


def over(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b; 0 where b is not positive."""
    positive = b > 0
    return jnp.where(positive, a, jnp.zeros_like(a)) / jnp.where(positive, b, jnp.ones_like(b))
