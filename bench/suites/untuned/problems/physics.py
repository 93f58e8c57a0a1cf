"""Residuals of differential equations, in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bench.suites.untuned.problems.problem import Batch, Data, Params, Problem, dense, dense_init, once
from curvax.losses import SquaredError

Field: TypeAlias = Callable[[jax.Array], jax.Array]
"""A scalar function of one point."""
_INSIDE, _EDGE = 400, 80
FREQUENCY = 0.5  # of the trap; at 1/2 the ground state of two electrons in it has the energy 2, exactly
_WALKERS = 256


def _laplacian(function: Field, x: jax.Array) -> jax.Array:
    """The Laplacian of a function of one point, by forward over forward mode."""

    def second(direction: jax.Array) -> jax.Array:
        return jax.jvp(lambda t: jax.jvp(function, (t,), (direction,))[1], (x,), (direction,))[1]

    return jnp.sum(jax.vmap(second)(jnp.eye(x.shape[0], dtype=x.dtype)))


def poisson_solution(x: jax.Array) -> jax.Array:
    """The solution at points (..., 2)."""
    return jnp.prod(jnp.sin(math.pi * x), axis=-1)


def poisson_residuals(u: Field, inputs: Batch) -> jax.Array:
    """Inside the square Laplacian + forcing, on its edge u, each over the root of its share of the points: (B,)."""

    def residual(point: jax.Array, inside: jax.Array) -> jax.Array:
        forcing = 2 * math.pi**2 * poisson_solution(point)
        share = jnp.where(inside, _INSIDE, _EDGE) / (_INSIDE + _EDGE)
        return jnp.where(inside, _laplacian(u, point) + forcing, u(point)) / jnp.sqrt(share)

    return jax.vmap(residual)(inputs["point"], inputs["inside"])


def _network_residuals(params: Params, inputs: Batch) -> jax.Array:
    return poisson_residuals(lambda x: dense(params, x)[0], inputs)


def _poisson_data() -> Data:
    rng = np.random.default_rng(0)
    edge = rng.random((_EDGE, 2))
    side = np.arange(_EDGE) % 4
    edge[np.arange(_EDGE), side // 2] = side % 2
    # Shuffled, as some methods cut the batch into parts.
    shuffled = rng.permutation(_INSIDE + _EDGE)
    points, inside = np.concatenate([rng.random((_INSIDE, 2)), edge])[shuffled], shuffled < _INSIDE
    grid = np.stack(np.meshgrid(*2 * [np.linspace(0, 1, 41)]), axis=-1).reshape(-1, 2)
    return Data({"x": {"point": points, "inside": inside}, "y": np.zeros(len(points))}, {"x": grid})


def _poisson_error(params: Params, held_out: Batch) -> jax.Array:
    truth = poisson_solution(held_out["x"])
    return jnp.linalg.norm(dense(params, held_out["x"])[:, 0] - truth) / jnp.linalg.norm(truth)


def _log_wave_function(layers: Any, x: jax.Array) -> jax.Array:
    """log psi of two electrons at x (6,): a Gaussian, Kato's cusp where they meet, a network of smooth invariants."""
    first, second = x[:3], x[3:]
    sum_of_squares = jnp.sum(jnp.square(x))
    apart = jnp.sum(jnp.square(first - second))
    spread = jnp.square(jnp.sum(jnp.square(first)) - jnp.sum(jnp.square(second)))
    distance = jnp.sqrt(apart)
    features = jnp.stack([FREQUENCY * sum_of_squares / 3, FREQUENCY * apart / 6, FREQUENCY**2 * spread / 18]) - 0.5
    cusp = 0.5 * distance / (1 + 0.2 * distance)
    return cusp - 0.5 * FREQUENCY * sum_of_squares + dense(layers, features)[0]


def local_energy(log_psi: Field, x: jax.Array) -> jax.Array:
    """H psi / psi at x (6,): the same energy everywhere for an eigenstate."""
    kinetic = -0.5 * (_laplacian(log_psi, x) + jnp.sum(jnp.square(jax.grad(log_psi)(x))))
    trap = 0.5 * FREQUENCY**2 * jnp.sum(jnp.square(x))
    return kinetic + trap + 1 / jnp.linalg.norm(x[:3] - x[3:])


def _energy_residuals(params: Params, walkers: jax.Array) -> jax.Array:
    """Local energies less the energy, which is a parameter: (B,), zero for every eigenstate."""
    log_psi = functools.partial(_log_wave_function, params["layers"])
    return jax.vmap(functools.partial(local_energy, log_psi))(walkers) - params["energy"]


def _wave_function_init(key: jax.Array) -> Params:
    return {"layers": dense_init(3, 16, 16, 1)(key), "energy": jnp.ones(())}


def _walkers() -> Data:
    """Walkers of the trap's own Gaussian."""
    rng, width = np.random.default_rng(0), math.sqrt(0.5 / FREQUENCY)
    return Data({"x": width * rng.normal(size=(_WALKERS, 6)), "y": np.zeros(_WALKERS)}, {})


PHYSICS = (
    Problem(
        "poisson2d",
        SquaredError(),
        dense_init(2, 32, 32, 1),
        _network_residuals,
        once(_poisson_data),
        "relative L2 error",
        _poisson_error,
        float64=True,
    ),
    Problem(
        "wave_function",
        SquaredError(),
        _wave_function_init,
        _energy_residuals,
        once(_walkers),
        "error of the energy",
        lambda params, _: jnp.abs(params["energy"] - 2.0),
        float64=True,
    ),
)
