"""The classic least-squares set: curvax at defaults, optimistix's Levenberg-Marquardt, SciPy's (MINPACK)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import curvax
from bench.suites.robustness.classic import Classic, Residuals
from curvax.damping import Marquardt
from curvax.losses import SquaredError
from curvax.solvers import GeodesicAcceleration

Values: TypeAlias = Iterator[float]
"""f after each step."""
STEPS = 500
_EXACT = 1e-15  # tolerances of peers, so that they do not stop early


@dataclasses.dataclass(frozen=True)
class Found:
    """How a solver went.

    Attributes:
      finite: whether f was finite after every step.
      final: f in the end.
      steps: to a published minimum, evaluations for SciPy; infinite where none was reached.
    """

    finite: bool
    final: float
    steps: float


def solve(solver: Callable[[Classic], Values], problem: Classic) -> Found:
    """Steps until a published minimum is reached, or until no step is left."""
    with jax.enable_x64(True):
        at_start = float(jnp.sum(problem.residuals(jnp.asarray(problem.start)) ** 2))
        value = at_start
        for step, value in enumerate(itertools.islice(solver(problem), STEPS), 1):
            if not math.isfinite(value):
                return Found(False, math.inf, math.inf)
            if problem.reached(value, at_start):
                return Found(True, value, step)
    return Found(True, value, math.inf)


def _curvax(name: str, **options: Any) -> Callable[[Classic], Values]:
    def values(problem: Classic) -> Values:
        def half(params: jax.Array, batch: Any) -> jax.Array:
            del batch
            return 0.5 * jnp.sum(problem.residuals(params) ** 2)

        if name == "newton_cg":
            method = curvax.make(name, loss_fn=half)
        else:
            # An example is the index of a residual.
            loss = SquaredError(reduction="sum")
            method = curvax.make(name, predict_fn=_indexed(problem.residuals), loss=loss, **options)
        count = problem.residuals(jnp.asarray(problem.start)).size
        batch = {"x": jnp.arange(count), "y": jnp.zeros(count)}

        @jax.jit
        def step(params: jax.Array, state: Any) -> tuple[jax.Array, Any, jax.Array]:
            params, state, _ = method.step(params, batch, state)
            return params, state, 2 * half(params, batch)

        params = jnp.asarray(problem.start)
        state = method.init(params)
        while True:
            params, state, value = step(params, state)
            yield float(value)

    return values


def _indexed(residuals: Residuals) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda params, index: residuals(params)[index]


def _optimistix(problem: Classic) -> Values:
    # Of the `bench` extra; the rest of this module serves tests without it.
    import equinox as eqx
    import optimistix

    solver = optimistix.LevenbergMarquardt(rtol=_EXACT, atol=_EXACT)
    tags: frozenset[object] = frozenset()

    def function(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return problem.residuals(x), None

    @eqx.filter_jit
    def step(x: jax.Array, state: Any) -> tuple[jax.Array, Any, jax.Array]:
        x, state, _ = solver.step(function, x, None, {}, state, tags)
        return x, state, jnp.sum(problem.residuals(x) ** 2)

    x = jnp.asarray(problem.start)
    shape = jax.eval_shape(problem.residuals, x)
    state = solver.init(function, x, None, {}, shape, None, tags)
    while True:
        x, state, value = step(x, state)
        yield float(value)
        if bool(solver.terminate(function, x, None, {}, state, tags)[0]):
            return


def _scipy(problem: Classic) -> Values:
    residuals, jacobian = jax.jit(problem.residuals), jax.jit(jax.jacfwd(problem.residuals))
    seen: list[float] = []

    def function(x: np.ndarray) -> np.ndarray:
        results = np.asarray(residuals(x))
        seen.append(float(results @ results))
        return results

    scipy.optimize.least_squares(
        function,
        np.asarray(problem.start),
        jac=lambda x: np.asarray(jacobian(x)),  # type: ignore[arg-type]  # SciPy's stubs know names alone
        method="lm",
        ftol=_EXACT,
        xtol=_EXACT,
        gtol=_EXACT,
        max_nfev=STEPS,
    )
    yield from seen


SOLVERS: dict[str, Callable[[Classic], Values]] = {
    "gauss_newton": _curvax("gauss_newton"),
    "gauss_newton, Marquardt": _curvax("gauss_newton", scaling=Marquardt()),
    "gauss_newton, accelerated": _curvax("gauss_newton", acceleration=GeodesicAcceleration()),
    "newton_cg": _curvax("newton_cg"),
    "optimistix LM": _optimistix,
    "scipy least_squares, lm": _scipy,
}
