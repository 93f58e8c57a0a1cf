"""The least of a quadratic in a ball, from the eigenvalues of its matrix: the exact trust-region step.

For l_1 <= ... <= l_n and g in the basis of the eigenvectors, minimize s.L s / 2 - g.s over |s| <= radius (Moré and
Sorensen 1983; Conn, Gould and Toint 2000, chapter 7):

    s_i(t) = g_i / (l_i + lift + t),  lift = max(0, -l_1); |s(t)| falls with t

      1. inside?      s(0), if nothing was lifted and it lies in the ball
      2. a start      t >= |g_i| / radius - (l_i + lift) for every i, as |s_i| <= |s|
      3. Newton       on 1 / radius - 1 / |s(t)|, concave: from the left no step goes beyond the root
      4. hard case    g has no part along the lowest l, and s(0) is short: the rest of the radius goes along that one

An example: l = (-2, 1), g = (3, 2), radius 1. Lifted, l is (0, 3); t >= max(3 - 0, 2 - 3) = 3, where |s| = 1.05, and
Newton ends at t = 3.18, s = (0.94, 0.32).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_STEPS = 30
"""Newton converges quadratically from a start whose |s| is at most sqrt(n) times too long."""


def least_in_ball(values: jax.Array, g: jax.Array, radius: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The minimizer, and whether it lies on the boundary.

    Args:
      values: (n,), eigenvalues; what is zero to rounding of the largest counts as zero.
      g: (n,), the right-hand side in the basis of the eigenvectors.
      radius: scalar, at least 0.

    Returns:
      (s, at_boundary), s in that basis.
    """
    eps = jnp.asarray(values.size * float(jnp.finfo(values.dtype).eps), values.dtype)
    radius = radius.astype(values.dtype)
    floor = eps * jnp.max(jnp.abs(values))
    values = jnp.where(jnp.abs(values) <= floor, jnp.zeros_like(values), values)
    lowest = jnp.argmin(values)
    lift = jnp.maximum(-values[lowest], jnp.zeros_like(floor))
    gaps = values + lift
    # A part of g that is rounding, where the quadratic is flat: no reason to run to the boundary.
    g = jnp.where((gaps <= floor) & (jnp.abs(g) <= eps * jnp.linalg.norm(g)), jnp.zeros_like(g), g)

    def at(t: jax.Array) -> jax.Array:
        return _over(g, gaps + t)

    # 1.
    least = jnp.max(_over(jnp.abs(g), jnp.broadcast_to(radius, g.shape)) - gaps)
    still = at(jnp.zeros_like(least))
    short = (least <= 0) & (jnp.linalg.norm(still) <= radius)
    inside = short & (lift == 0)
    # 2., 3.
    shifted = at(_root(gaps, g, radius, jnp.maximum(least, jnp.zeros_like(least))))
    on_boundary = shifted * _over(radius, jnp.linalg.norm(shifted))
    # 4.
    room = jnp.sqrt(jnp.maximum(jnp.square(radius) - jnp.sum(jnp.square(still)), jnp.zeros_like(radius)))
    hard = still.at[lowest].add(room)
    return jnp.where(inside, still, jnp.where(short, hard, on_boundary)), ~inside


def _root(gaps: jax.Array, g: jax.Array, radius: jax.Array, start: jax.Array) -> jax.Array:
    """The t at which |g / (gaps + t)| is the radius, from a start on its left."""
    tolerance = float(jnp.finfo(radius.dtype).eps) ** 0.5

    def far(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        t, i = state
        return (i < _STEPS) & (jnp.linalg.norm(_over(g, gaps + t)) > radius * (1 + tolerance))

    def improve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, i = state
        s = _over(g, gaps + t)
        size, bend = jnp.linalg.norm(s), jnp.sum(s * _over(s, gaps + t))
        return t + _over(jnp.square(size), bend) * _over(size - radius, radius), i + 1

    return jax.lax.while_loop(far, improve, (start, jnp.zeros((), jnp.int32)))[0]


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b; 0 where b is not positive."""
    positive = b > 0
    return jnp.where(positive, a, jnp.zeros_like(a)) / jnp.where(positive, b, jnp.ones_like(b))
