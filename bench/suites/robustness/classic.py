"""The least-squares problems of Moré, Garbow and Hillstrom (1981, ACM TOMS 7, 17-41), with their published minima.

f is the sum of squared residuals. Every function takes x (n,) and returns residuals (m,); numbers are the paper's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Residuals: TypeAlias = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Classic:
    """A problem.

    Attributes:
      name: with its number in the paper.
      residuals: x (n,) -> (m,).
      start: the paper's.
      minima: published values of f at minima, the global one first.
    """

    name: str
    residuals: Residuals
    start: tuple[float, ...]
    minima: tuple[float, ...] = (0.0,)

    def reached(self, value: float, at_start: float) -> bool:
        """Whether f is at a published minimum, which the paper gives to six digits, or below the first of them.

        A minimum of zero is reached at what rounding makes of it, 1e-14 of f at the start.
        """
        slack = [2e-5 * f if f else 1e-14 * at_start for f in self.minima]
        near = any(abs(value - f) <= each for f, each in zip(self.minima, slack, strict=True))
        return near or value <= self.minima[0]


def _index(count: int, first: int = 1) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.float64)


def rosenbrock(x: jax.Array) -> jax.Array:
    """Extended to pairs."""
    even, odd = x[1::2], x[::2]
    return jnp.concatenate([10 * (even - odd**2), 1 - odd])


def _freudenstein_roth(x: jax.Array) -> jax.Array:
    a, b = x
    return jnp.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def _powell_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


def _brown_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: jax.Array) -> jax.Array:
    """Three residuals of two unknowns."""
    return jnp.asarray([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** _index(3))


def _jennrich_sampson(x: jax.Array) -> jax.Array:
    i = _index(10)
    return -(jnp.exp(i * x[0]) + jnp.exp(i * x[1])) + 2 + 2 * i


def _helical_valley(x: jax.Array) -> jax.Array:
    # The paper's angle is arctan(x2 / x1) / 2 pi, plus 1/2 where x1 is negative.
    angle = jnp.arctan(x[1] / x[0]) / (2 * math.pi) + jnp.where(x[0] < 0, 0.5, 0.0)
    return jnp.stack([10 * (x[2] - 10 * angle), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


_BARD = (0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


def _bard(x: jax.Array) -> jax.Array:
    u, v = _index(15), 16 - _index(15)
    return jnp.asarray(_BARD) - (x[0] + u / (v * x[1] + np.minimum(u, v) * x[2]))


_GAUSSIAN = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989)


def _gaussian(x: jax.Array) -> jax.Array:
    t = (8 - _index(15)) / 2
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - np.asarray(_GAUSSIAN + _GAUSSIAN[-2::-1])


_MEYER = (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)


def _meyer(x: jax.Array) -> jax.Array:
    return x[0] * jnp.exp(x[1] / (45 + 5 * _index(16) + x[2])) - np.asarray(_MEYER, np.float64)


def _gulf(x: jax.Array) -> jax.Array:
    t = _index(100) / 100
    y = 25 + (-50 * np.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def _box(x: jax.Array) -> jax.Array:
    t = 0.1 * _index(10)
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (np.exp(-t) - np.exp(-10 * t))


def powell_singular(x: jax.Array) -> jax.Array:
    """Extended to groups of four; singular at the minimum."""
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    return jnp.concatenate([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2])


def wood(x: jax.Array) -> jax.Array:
    """Six residuals of four unknowns."""
    a, b, c, d = x
    return jnp.stack(
        [
            *(10 * (b - a**2), 1 - a, math.sqrt(90) * (d - c**2)),
            *(1 - c, math.sqrt(10) * (b + d - 2), (b - d) / math.sqrt(10)),
        ]
    )


_KOWALIK = (0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
_KOWALIK_U = (4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def _kowalik_osborne(x: jax.Array) -> jax.Array:
    u = np.asarray(_KOWALIK_U)
    return jnp.asarray(_KOWALIK) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def _brown_dennis(x: jax.Array) -> jax.Array:
    t = _index(20) / 5
    return (x[0] + t * x[1] - np.exp(t)) ** 2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2


# fmt: off
_OSBORNE_1 = (
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628,
    0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420,
    0.414, 0.411, 0.406,
)
_OSBORNE_2 = (
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616,
    0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495,
    0.500, 0.423, 0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672,
    0.708, 0.633, 0.668, 0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581,
    0.428, 0.292, 0.162, 0.098, 0.054,
)
# fmt: on


def _osborne_1(x: jax.Array) -> jax.Array:
    t = 10 * _index(33, 0)
    return jnp.asarray(_OSBORNE_1) - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def _osborne_2(x: jax.Array) -> jax.Array:
    t = _index(65, 0) / 10
    peaks = sum(x[k] * jnp.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3))
    return jnp.asarray(_OSBORNE_2) - (x[0] * jnp.exp(-t * x[4]) + peaks)


def _biggs(x: jax.Array) -> jax.Array:
    t = 0.1 * _index(13)
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


def _watson(x: jax.Array) -> jax.Array:
    t, powers = _index(29)[:, None] / 29, np.arange(x.size)
    slopes = (powers[1:] * t ** (powers[1:] - 1)) @ x[1:]
    values = t**powers @ x
    return jnp.concatenate([slopes - values**2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1])


def _penalty_1(x: jax.Array) -> jax.Array:
    return jnp.concatenate([math.sqrt(1e-5) * (x - 1), jnp.sum(x**2, keepdims=True) - 0.25])


def _penalty_2(x: jax.Array) -> jax.Array:
    n, root = x.size, math.sqrt(1e-5)
    y = np.exp(_index(n - 1, 2) / 10) + np.exp(_index(n - 1) / 10)
    grown = jnp.exp(x / 10)
    total = jnp.sum((n - _index(n) + 1) * x**2, keepdims=True) - 1
    return jnp.concatenate(
        [x[:1] - 0.2, root * (grown[1:] + grown[:-1] - y), root * (grown[1:] - math.exp(-0.1)), total]
    )


def _variably_dimensioned(x: jax.Array) -> jax.Array:
    total = jnp.sum(_index(x.size) * (x - 1), keepdims=True)
    return jnp.concatenate([x - 1, total, total**2])


def _trigonometric(x: jax.Array) -> jax.Array:
    return x.size - jnp.sum(jnp.cos(x)) + _index(x.size) * (1 - jnp.cos(x)) - jnp.sin(x)


def _brown_almost_linear(x: jax.Array) -> jax.Array:
    sums = x[:-1] + jnp.sum(x) - (x.size + 1)
    return jnp.concatenate([sums, jnp.prod(x, keepdims=True) - 1])


def _boundary_value(x: jax.Array) -> jax.Array:
    h = 1 / (x.size + 1)
    padded, t = jnp.pad(x, 1), _index(x.size) * h
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2


def _integral_equation(x: jax.Array) -> jax.Array:
    h = 1 / (x.size + 1)
    t = _index(x.size) * h
    kernel = np.where(t[None] <= t[:, None], (1 - t[:, None]) * t[None], t[:, None] * (1 - t[None]))
    return x + h * (kernel @ (x + t + 1) ** 3) / 2


def _broyden_tridiagonal(x: jax.Array) -> jax.Array:
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def _broyden_banded(x: jax.Array) -> jax.Array:
    i = np.arange(x.size)
    apart = i[None] - i[:, None]
    band = ((apart >= -5) & (apart <= 1) & (apart != 0)).astype(np.float64)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


_M = 20  # residuals of the linear problems


def _linear_full_rank(x: jax.Array) -> jax.Array:
    shift = 2 / _M * jnp.sum(x) + 1
    return jnp.concatenate([x, jnp.zeros(_M - x.size, x.dtype)]) - shift


def _linear_rank_1(x: jax.Array) -> jax.Array:
    return jnp.sum(_index(x.size) * x) * _index(_M) - 1


def _linear_rank_1_zeros(x: jax.Array) -> jax.Array:
    inner = (_index(_M) - 1) * jnp.sum((_index(x.size) * x)[1:-1])
    return jnp.where(np.arange(_M) < _M - 1, inner, 0.0) - 1


def _chebyquad(x: jax.Array) -> jax.Array:
    shifted = 2 * x - 1
    values = [jnp.ones_like(x), shifted]
    for _ in range(x.size - 1):
        values.append(2 * shifted * values[-1] - values[-2])
    i = _index(x.size)
    integrals = np.where(i % 2 == 0, -1 / (np.maximum(i, 2) ** 2 - 1), 0.0)
    return jnp.mean(jnp.stack(values[1:]), axis=1) - integrals


def _fill(value: float, count: int) -> tuple[float, ...]:
    return (value,) * count


def _steps(n: int) -> tuple[float, ...]:
    return tuple(float(v) for v in _index(n) / (n + 1))


def _bent(n: int) -> tuple[float, ...]:
    return tuple(t * (t - 1) for t in _steps(n))


CLASSICS = (
    Classic("1 Rosenbrock", rosenbrock, (-1.2, 1.0)),
    Classic("2 Freudenstein and Roth", _freudenstein_roth, (0.5, -2.0), (0.0, 48.9842)),
    Classic("3 Powell badly scaled", _powell_badly_scaled, (0.0, 1.0)),
    Classic("4 Brown badly scaled", _brown_badly_scaled, (1.0, 1.0)),
    Classic("5 Beale", beale, (1.0, 1.0)),
    Classic("6 Jennrich and Sampson", _jennrich_sampson, (0.3, 0.4), (124.362,)),
    Classic("7 helical valley", _helical_valley, (-1.0, 0.0, 0.0)),
    Classic("8 Bard", _bard, _fill(1.0, 3), (8.21487e-3, 17.4286)),
    Classic("9 Gaussian", _gaussian, (0.4, 1.0, 0.0), (1.12793e-8,)),
    Classic("10 Meyer", _meyer, (0.02, 4000.0, 250.0), (87.9458,)),
    Classic("11 Gulf research", _gulf, (5.0, 2.5, 0.15)),
    Classic("12 Box", _box, (0.0, 10.0, 20.0)),
    Classic("13 Powell singular", powell_singular, (3.0, -1.0, 0.0, 1.0)),
    Classic("14 Wood", wood, (-3.0, -1.0, -3.0, -1.0)),
    Classic("15 Kowalik and Osborne", _kowalik_osborne, (0.25, 0.39, 0.415, 0.39), (3.07505e-4, 1.02734e-3)),
    Classic("16 Brown and Dennis", _brown_dennis, (25.0, 5.0, -5.0, -1.0), (85822.2,)),
    Classic("17 Osborne 1", _osborne_1, (0.5, 1.5, -1.0, 0.01, 0.02), (5.46489e-5,)),
    Classic("18 Biggs", _biggs, (1.0, 2.0, *_fill(1.0, 4)), (0.0, 5.65565e-3)),
    Classic("19 Osborne 2", _osborne_2, (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5), (4.01377e-2,)),
    Classic("20 Watson, 6", _watson, _fill(0.0, 6), (2.28767e-3,)),
    Classic("20 Watson, 9", _watson, _fill(0.0, 9), (1.39976e-6,)),
    Classic("20 Watson, 12", _watson, _fill(0.0, 12), (4.72238e-10,)),
    Classic("21 extended Rosenbrock, 10", rosenbrock, (-1.2, 1.0) * 5),
    Classic("22 extended Powell, 12", powell_singular, (3.0, -1.0, 0.0, 1.0) * 3),
    Classic("23 penalty I, 4", _penalty_1, tuple(_index(4)), (2.24997e-5,)),
    Classic("23 penalty I, 10", _penalty_1, tuple(_index(10)), (7.08765e-5,)),
    Classic("24 penalty II, 4", _penalty_2, _fill(0.5, 4), (9.37629e-6,)),
    Classic("24 penalty II, 10", _penalty_2, _fill(0.5, 10), (2.93660e-4,)),
    Classic("25 variably dimensioned, 10", _variably_dimensioned, tuple(1 - _index(10) / 10)),
    Classic("26 trigonometric, 10", _trigonometric, _fill(0.1, 10), (0.0, 2.79506e-5)),
    Classic("27 Brown almost linear, 10", _brown_almost_linear, _fill(0.5, 10), (0.0, 1.0)),
    Classic("28 boundary value, 10", _boundary_value, _bent(10)),
    Classic("29 integral equation, 10", _integral_equation, _bent(10)),
    Classic("30 Broyden tridiagonal, 10", _broyden_tridiagonal, _fill(-1.0, 10)),
    Classic("31 Broyden banded, 10", _broyden_banded, _fill(-1.0, 10)),
    Classic("32 linear, full rank, 10", _linear_full_rank, _fill(1.0, 10), (10.0,)),
    Classic("33 linear, rank 1, 10", _linear_rank_1, _fill(1.0, 10), (_M * (_M - 1) / (2 * (2 * _M + 1)),)),
    Classic(
        "34 linear, rank 1 with zeros, 10",
        _linear_rank_1_zeros,
        _fill(1.0, 10),
        ((_M**2 + 3 * _M - 6) / (2 * (2 * _M - 3)),),
    ),
    Classic("35 Chebyquad, 8", _chebyquad, _steps(8), (3.51687e-3,)),
    Classic("35 Chebyquad, 9", _chebyquad, _steps(9)),
    Classic("35 Chebyquad, 10", _chebyquad, _steps(10), (6.50395e-3,)),
)
