"""The ten problems, each with its solution in closed form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.suites.physics.pde import Box, Condition, Field, Operator, Pde, along, laplacian, twice, value

PI = math.pi


def poisson(name: str, solution: Field, source: Field, counts: tuple[int, int], widths: tuple[int, ...]) -> Pde:
    """laplacian u = source inside the unit cube, u = u* on its border."""

    def inside(u: Field, _: jax.Array, z: jax.Array) -> jax.Array:
        return laplacian(u, z)

    box = _unit(widths[0])
    conditions = {
        "interior": Condition(inside, box.inside(counts[0]), source),
        "boundary": Condition(value, box.border(counts[1]), solution),
    }
    return Pde(name, solution, conditions, box, widths)


def _unit(dimensions: int) -> Box:
    return Box((0.0,) * dimensions, (1.0,) * dimensions)


def _zero(count: int) -> Field:
    return lambda z: jnp.zeros(count, z.dtype)


def poisson_1d() -> Pde:
    """u = sin(2 pi x) exp(x)."""

    def source(x: jax.Array) -> jax.Array:
        angle = 2 * PI * x
        return jnp.exp(x) * ((1 - 4 * PI**2) * jnp.sin(angle) + 4 * PI * jnp.cos(angle))

    return poisson("Poisson 1-D", lambda x: jnp.sin(2 * PI * x) * jnp.exp(x), source, (100, 2), (1, 32, 32, 1))


def poisson_2d() -> Pde:
    """u = sin(pi x) sin(pi y)."""

    def solution(z: jax.Array) -> jax.Array:
        return jnp.prod(jnp.sin(PI * z))[None]

    return poisson("Poisson 2-D", solution, lambda z: -2 * PI**2 * solution(z), (900, 120), (2, 32, 32, 1))


def poisson_5d() -> Pde:
    """u = sum of cos(pi x_i)."""

    def solution(z: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(PI * z))[None]

    return poisson("Poisson 5-D", solution, lambda z: -(PI**2) * solution(z), (800, 200), (5, 24, 24, 1))


def poisson_10d() -> Pde:
    """The harmonic u = x1 x2 + x3 x4 + ... + x9 x10, from 90 points per dimension."""

    def solution(z: jax.Array) -> jax.Array:
        return jnp.sum(z[0::2] * z[1::2])[None]

    return poisson("Poisson 10-D", solution, _zero(1), (600, 300), (10, 20, 20, 1))


def heat() -> Pde:
    """u_t = u_xx / 4, u = exp(-pi^2 t / 4) sin(pi x)."""

    def solution(z: jax.Array) -> jax.Array:
        return (jnp.exp(-(PI**2) * z[1] / 4) * jnp.sin(PI * z[0]))[None]

    def inside(u: Field, _: jax.Array, z: jax.Array) -> jax.Array:
        return along(u, z, 1) - twice(u, z, 0) / 4

    return _evolution("heat 1+1-D", solution, inside, _unit(2), (2, 32, 32, 1))


def burgers(viscosity: float = 0.02) -> Pde:
    """u_t + u u_x = nu u_xx from -sin(pi x): a steep front at x = 0; by Cole and Hopf's formula (Basdevant 1986)."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)

    def solution(z: jax.Array) -> jax.Array:
        y = z[0] - 2 * jnp.sqrt(viscosity * z[1]) * nodes
        kernel = weights * jnp.exp(-(jnp.cos(PI * y) + 1) / (2 * PI * viscosity))
        return (-jnp.sum(kernel * jnp.sin(PI * y)) / jnp.sum(kernel))[None]

    def inside(u: Field, _: jax.Array, z: jax.Array) -> jax.Array:
        return along(u, z, 1) + u(z) * along(u, z, 0) - viscosity * twice(u, z, 0)

    return _evolution("Burgers", solution, inside, Box((-1.0, 0.0), (1.0, 1.0)), (2, 24, 24, 24, 1))


def allen_cahn(diffusion: float = 0.01, reaction: float = 5.0) -> Pde:
    """u_t = D u_xx + a (u - u^3): a front of width 1 / k that travels at 3 a / 2 k, with k^2 = a / 2 D."""
    steep = math.sqrt(reaction / (2 * diffusion))
    speed = 1.5 * reaction / steep

    def solution(z: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(-steep * (z[0] + 0.25 - speed * z[1]))[None]

    def inside(u: Field, _: jax.Array, z: jax.Array) -> jax.Array:
        return along(u, z, 1) - diffusion * twice(u, z, 0) - reaction * (u(z) - u(z) ** 3)

    return _evolution("Allen-Cahn", solution, inside, Box((-1.0, 0.0), (1.0, 1.0)), (2, 24, 24, 24, 1))


def _evolution(name: str, solution: Field, inside: Operator, box: Box, widths: tuple[int, ...]) -> Pde:
    """An equation in (x, t) with its start and both ends."""
    conditions = {
        "interior": Condition(inside, box.inside(900), _zero(1)),
        "start": Condition(value, box.face(100, (1, 0.0)), solution),
        "ends": Condition(value, box.face(80, (0, box.low[0]), (0, box.high[0])), solution),
    }
    return Pde(name, solution, conditions, box, widths)


def helmholtz() -> Pde:
    """laplacian u + u = f with u = sin(pi x) sin(4 pi y): two scales."""

    def solution(z: jax.Array) -> jax.Array:
        return (jnp.sin(PI * z[0]) * jnp.sin(4 * PI * z[1]))[None]

    def inside(u: Field, _: jax.Array, z: jax.Array) -> jax.Array:
        return laplacian(u, z) + u(z)

    box = Box((-1.0, -1.0), (1.0, 1.0))
    conditions = {
        "interior": Condition(inside, box.inside(900), lambda z: (1 - 17 * PI**2) * solution(z)),
        "boundary": Condition(value, box.border(160), solution),
    }
    return Pde("Helmholtz", solution, conditions, box, (2, 32, 32, 32, 1))


def kovasznay(reynolds: float = 40.0) -> Pde:
    """Stationary Navier-Stokes equations behind a grid (Kovasznay 1948): (u, v, p), p given at the outflow alone."""
    rate = reynolds / 2 - math.sqrt(reynolds**2 / 4 + 4 * PI**2)

    def solution(z: jax.Array) -> jax.Array:
        fade, angle = jnp.exp(rate * z[0]), 2 * PI * z[1]
        return jnp.stack(
            [1 - fade * jnp.cos(angle), rate / (2 * PI) * fade * jnp.sin(angle), (1 - fade**2) / 2]
        )  # fmt: skip

    def inside(f: Field, _: jax.Array, z: jax.Array) -> jax.Array:
        (u, v, _p), by_x, by_y = f(z), along(f, z, 0), along(f, z, 1)
        momentum = u * by_x[:2] + v * by_y[:2] + jnp.stack([by_x[2], by_y[2]]) - laplacian(f, z)[:2] / reynolds
        return jnp.append(momentum, by_x[0] + by_y[1])

    box = Box((-0.5, -0.5), (1.0, 1.5))
    conditions = {
        "interior": Condition(inside, box.inside(400), _zero(3)),
        "boundary": Condition(lambda f, _, z: f(z)[:2], box.border(120), lambda z: solution(z)[:2]),
        "outflow": Condition(lambda f, _, z: f(z)[2:], box.face(20, (0, 1.0)), lambda z: solution(z)[2:]),
    }
    return Pde("Kovasznay flow", solution, conditions, box, (2, 32, 32, 32, 3))


def inverse() -> Pde:
    """The heat equation with unknown conductivity, which 50 values of u tell: 0.1, sought from 1."""
    truth = 0.1

    def solution(z: jax.Array) -> jax.Array:
        x, t = z
        waves = ((k, jnp.exp(-((k * PI) ** 2) * truth * t) * jnp.sin(k * PI * x)) for k in (1, 3))
        return sum((wave / k for k, wave in waves), jnp.zeros(()))[None]

    def inside(u: Field, conductivity: jax.Array, z: jax.Array) -> jax.Array:
        return along(u, z, 1) - conductivity[0] * twice(u, z, 0)

    box = _unit(2)
    conditions = {
        "interior": Condition(inside, box.inside(500), _zero(1)),
        "ends": Condition(value, box.face(60, (0, 0.0), (0, 1.0)), solution),
        "data": Condition(value, box.inside(50, seed=3), solution),
    }
    return Pde("inverse heat", solution, conditions, box, (2, 32, 32, 1), ((1.0,), (truth,)))


PROBLEMS: tuple[Callable[[], Pde], ...] = tuple(
    functools.cache(make)
    for make in (
        *(poisson_1d, poisson_2d, poisson_5d, poisson_10d, heat, burgers, allen_cahn, helmholtz, kovasznay),
        inverse,
    )
)
