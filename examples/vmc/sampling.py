"""Metropolis sampling of |psi|^2, many walkers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LogPsi = Callable[[Any, jax.Array], jax.Array]
Propose = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(key, walkers, width) -> proposed walkers, with the reverse as likely."""


class Walkers(NamedTuple):
    """Walkers, and the width of the moves that keeps about half of them accepted."""

    x: jax.Array
    width: jax.Array


def gaussian_moves(key: jax.Array, x: jax.Array, width: jax.Array) -> jax.Array:
    """All coordinates by a normal step."""
    return x + width * jax.random.normal(key, x.shape, x.dtype)


def spin_flips(key: jax.Array, x: jax.Array, width: jax.Array) -> jax.Array:
    """One spin of each walker turned over."""
    del width
    site = jax.random.randint(key, (x.shape[0],), 0, x.shape[1])
    return jnp.where(jnp.arange(x.shape[1]) == site[:, None], -x, x)


def metropolis(log_psi: LogPsi, params: Any, walkers: Walkers, key: jax.Array, propose: Propose, moves: int) -> Walkers:
    """`moves` Metropolis moves of every walker."""

    def move(carry: tuple[Walkers, jax.Array], key: jax.Array) -> tuple[tuple[Walkers, jax.Array], None]:
        (x, width), density = carry
        chosen, uniform = jax.random.split(key)
        proposed = propose(chosen, x, width)
        new = 2 * log_psi(params, proposed).real
        accepted = jnp.log(jax.random.uniform(uniform, density.shape, density.dtype)) < new - density
        x = jnp.where(accepted.reshape(-1, *(1,) * (x.ndim - 1)), proposed, x)
        width = width * jnp.where(jnp.mean(accepted) > 0.5, 1.02, 1 / 1.02).astype(width.dtype)
        return (Walkers(x, width), jnp.where(accepted, new, density)), None

    start = (walkers, 2 * log_psi(params, walkers.x).real)
    (walkers, _), _ = jax.lax.scan(move, start, jax.random.split(key, moves))
    return walkers
