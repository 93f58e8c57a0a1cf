"""An equation of the race: its conditions, a network for it, and the solution that errors are measured against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bench.suites.untuned.problems.problem import Batch, Data, dense, dense_init
from curvax import Term, Terms

Field: TypeAlias = Callable[[jax.Array], jax.Array]
"""One point (d,) -> values (k,): a network, or the solution itself."""
Operator: TypeAlias = Callable[[Field, jax.Array, jax.Array], jax.Array]
"""(field, coefficients, point) -> what a condition says about the field there, (r,)."""
Params: TypeAlias = dict[str, Any]
_TESTED = 1000


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the solution satisfies: operator(u, z) = source(z) at points (B, d), with a weight in the loss."""

    operator: Operator
    points: np.ndarray
    source: Field
    weight: float = 1.0

    @property
    def data(self) -> Batch:
        """Points and what the operator is there."""
        x = jnp.asarray(self.points)
        return {"x": x, "y": jax.vmap(self.source)(x)}


@dataclasses.dataclass(frozen=True)
class Box:
    """A product of intervals."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def inside(self, count: int, seed: int = 0) -> np.ndarray:
        """Random points (count, d)."""
        return np.random.default_rng(seed).uniform(self.low, self.high, (count, len(self.low)))

    def face(self, count: int, *sides: tuple[int, float], seed: int = 1) -> np.ndarray:
        """Random points of faces (axis, value), as many of each as of any other."""
        points = self.inside(count, seed)
        for i, point in enumerate(points):
            axis, value = sides[i % len(sides)]
            point[axis] = value
        return points

    def border(self, count: int, seed: int = 1) -> np.ndarray:
        """Random points of all faces."""
        ends = [(axis, value) for axis, pair in enumerate(zip(self.low, self.high, strict=True)) for value in pair]
        return self.face(count, *ends, seed=seed)


@dataclasses.dataclass(frozen=True)
class Pde:
    """A problem.

    Attributes:
      name: the rows' case.
      solution: exact, at one point; every problem here has one in closed form (Burgers' by quadrature).
      conditions: by name.
      box: the domain, where errors are measured.
      widths: of the tanh network.
      coefficients: those that the data must tell: (start, truth), positive numbers.
    """

    name: str
    solution: Field
    conditions: Mapping[str, Condition]
    box: Box
    widths: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    def init(self, key: jax.Array) -> Params:
        """First parameters, float64 under x64."""
        start = jnp.log(jnp.asarray(self.coefficients[0], float))
        return {"net": dense_init(*self.widths)(key), **({"log": start} if start.size else {})}

    def data(self) -> Data:
        """Points of every condition, and others with the solution there."""
        tested = jnp.asarray(self.box.inside(_TESTED, seed=2))
        return Data({"terms": self.batch(), "x": tested, "y": jax.vmap(self.solution)(tested)}, {"terms": self.batch()})

    def batch(self) -> Batch:
        """Points and targets of every condition, as `Terms` take them."""
        return {name: condition.data for name, condition in self.conditions.items()}

    def model(self, name: str) -> Callable[[Params, jax.Array], jax.Array]:
        """(parameters, points (B, d)) -> the operator's values (B, r) of one condition."""
        operator = self.conditions[name].operator

        def predict(params: Params, x: jax.Array) -> jax.Array:
            return jax.vmap(lambda z: operator(_field(params), _coefficients(params), z))(x)

        return predict

    @property
    def terms(self) -> Terms:
        """The loss as curvax takes it."""
        return Terms(**{name: Term(self.model(name), weight=c.weight) for name, c in self.conditions.items()})

    def residuals(self, params: Params, terms: Batch) -> jax.Array:
        """All residuals as one vector, half of whose squares sum to the loss: what peers take."""

        def part(name: str) -> jax.Array:
            apart = self.model(name)(params, terms[name]["x"]) - terms[name]["y"]
            return self.scale(name) * apart.ravel()

        return jnp.concatenate([part(name) for name in self.conditions])

    @property
    def count(self) -> int:
        """How many residuals there are."""
        key = jax.random.key(0)
        return jax.eval_shape(lambda: self.residuals(self.init(key), self.batch())).size

    def scale(self, name: str) -> float:
        """The square root of what one residual of a condition counts in the loss."""
        condition = self.conditions[name]
        return math.sqrt(condition.weight / len(condition.points))

    def objective(self, params: Params, batch: Batch) -> jax.Array:
        """The loss."""
        return jnp.sum(jnp.square(self.residuals(params, batch["terms"]))) / 2

    def error(self, params: Params, batch: Batch) -> jax.Array:
        """|u - u*| / |u*| in L2 at points that training never sees; with coefficients the larger of theirs and that."""
        apart = jnp.linalg.norm(jax.vmap(_field(params))(batch["x"]) - batch["y"]) / jnp.linalg.norm(batch["y"])
        if "log" not in params:
            return apart
        truth = jnp.asarray(self.coefficients[1])
        return jnp.maximum(apart, jnp.max(jnp.abs(_coefficients(params) / truth - 1)))


@dataclasses.dataclass(frozen=True)
class Judged:
    """A problem as a race sees it: what it follows is the error, and what it measures at the end the loss."""

    pde: Pde

    def init(self, key: jax.Array) -> Params:
        return self.pde.init(key)

    def data(self) -> Data:
        return self.pde.data()

    def objective(self, params: Params, batch: Batch) -> jax.Array:
        return self.pde.error(params, batch)

    def evaluate(self, params: Params, batch: Batch) -> jax.Array:
        return self.pde.objective(params, batch)

    def order(self, size: int, seed: int) -> None:
        """All points in every step."""
        del size, seed


def _field(params: Params) -> Field:
    return lambda z: dense(params["net"], z)


def _coefficients(params: Params) -> jax.Array:
    return jnp.exp(params["log"]) if "log" in params else jnp.zeros(0)


def along(f: Field, z: jax.Array, axis: int) -> jax.Array:
    """The derivative along an axis, (k,)."""
    return jax.jvp(f, (z,), (jnp.zeros_like(z).at[axis].set(1.0),))[1]


def twice(f: Field, z: jax.Array, axis: int) -> jax.Array:
    """The second derivative along an axis, (k,)."""
    return along(lambda y: along(f, y, axis), z, axis)


def laplacian(f: Field, z: jax.Array) -> jax.Array:
    """The sum of second derivatives, (k,)."""
    return sum((twice(f, z, axis) for axis in range(z.shape[0])), jnp.zeros(()))


def value(u: Field, coefficients: jax.Array, z: jax.Array) -> jax.Array:
    """The field itself: the operator of a boundary, a start, or data."""
    del coefficients
    return u(z)
