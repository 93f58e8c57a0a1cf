"""Functions of a few variables for `newton_cg`: valleys, saddles, maxima, flat tails; in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bench.suites.robustness import classic
from bench.suites.robustness.case import Batch, Case, Task


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function, its start, its least value, and how far above that its other minima are, which count too."""

    name: str
    value: Callable[[jax.Array], jax.Array]
    start: tuple[float, ...]
    least: float = 0.0
    slack: float = 1e-8


def _squares(residuals: classic.Residuals) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jnp.sum(residuals(x) ** 2)


def _himmelblau(x: jax.Array) -> jax.Array:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def _styblinski_tang(x: jax.Array) -> jax.Array:
    return jnp.sum(x**4 - 16 * x**2 + 5 * x) / 2


def _three_hump_camel(x: jax.Array) -> jax.Array:
    return 2 * x[0] ** 2 - 1.05 * x[0] ** 4 + x[0] ** 6 / 6 + x[0] * x[1] + x[1] ** 2


def _six_hump_camel(x: jax.Array) -> jax.Array:
    a, b = x
    return (4 - 2.1 * a**2 + a**4 / 3) * a**2 + a * b + (-4 + 4 * b**2) * b**2


def _saddle(x: jax.Array) -> jax.Array:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4


def _monkey_saddle(x: jax.Array) -> jax.Array:
    return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + jnp.sum(x**2) ** 2


def _maximum(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cos(x))


def _factors(x: jax.Array) -> jax.Array:
    """|u v^T - 1|^2 of vectors of four: a saddle at zero."""
    return jnp.mean((jnp.outer(x[:4], x[4:]) - 1) ** 2)


def _log_cosh(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.logaddexp(x, -x) - jnp.log(2.0))


def _quartic(x: jax.Array) -> jax.Array:
    return jnp.sum(x**4)


def _steep(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(x**2))


def _plane(x: jax.Array) -> jax.Array:
    """A loss without curvature; its smooth cap keeps it bounded."""
    return jnp.log1p(jnp.exp(x[0])) + 0 * x[1]


_FUNCTIONS = (
    _Function("Rosenbrock", _squares(classic.rosenbrock), (-1.2, 1.0)),
    _Function("Rosenbrock, 10 variables", _squares(classic.rosenbrock), (-1.2, 1.0) * 5),
    _Function("Beale", _squares(classic.beale), (1.0, 1.0)),
    _Function("Wood", _squares(classic.wood), (-3.0, -1.0, -3.0, -1.0)),
    _Function("Powell singular", _squares(classic.powell_singular), (3.0, -1.0, 0.0, 1.0)),
    _Function("Himmelblau", _himmelblau, (0.0, 0.0)),
    _Function("Styblinski and Tang", _styblinski_tang, (0.1, -0.1, 0.2), -117.49850, 42.5),
    _Function("three-hump camel", _three_hump_camel, (2.0, 1.0), 0.0, 0.2987),
    _Function("six-hump camel", _six_hump_camel, (0.1, 0.1), -1.0316285, 0.8163),
    _Function("beside a saddle", _saddle, (1.0, 1e-6), -1.0),
    _Function("beside a monkey saddle", _monkey_saddle, (1e-3, 1e-4), -27 / 256),
    _Function("beside a maximum", _maximum, (1e-3, -1e-3), -2.0),
    _Function("factors beside zero", _factors, tuple(1e-3 * v for v in (1, 2, -1, 3, 2, 1, 1, -2))),
    _Function("log cosh from its flat tail", _log_cosh, (100.0, -50.0)),
    _Function("x^4 from 1000", _quartic, (1e3, -1e3)),
    _Function("exp x^2 from 5", _steep, (5.0, -4.0), 2.0),
    _Function("softplus, no minimum and a dead variable", _plane, (3.0, 1.0), 0.0, 1e-2),
)


def _above(function: _Function, params: jax.Array, batch: Batch) -> jax.Array:
    """The function counted from its least value, as losses are compared by their quotient with the start."""
    del batch
    return function.value(params) - function.least


def cases() -> Iterator[Case]:
    """A case for each function."""
    for each in _FUNCTIONS:
        task = Task(each.name, loss_fn=functools.partial(_above, each), somax="newton_cg", float64=True)
        yield Case(each.name, task, np.asarray(each.start), {"x": np.zeros(1)}, each.slack, steps=300)
