"""Solvers of the damped rows keep the digits that the squared condition number of normal equations loses."""

from __future__ import annotations

import fractions

import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.curvature import GaussNewton, Model, MonteCarloFisher
from curvax.losses import Loss, SoftmaxCrossEntropy, SquaredError
from curvax.solvers import LSMR, QR, Cholesky, Result, RowSpace, Solver
from curvax.telemetry import Metric, MetricRecord, Telemetry
from tests.integration.harness import (
    TOLERANCE,
    assert_close,
    batch_of,
    directions,
    key,
    moved,
    precision,
    standard_truth,
    truth_of,
)
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

_SQUARED = SquaredError()
SOLVERS = {"qr": QR(), "lsmr": LSMR(tol=1e-12, maxiter=400)}


def _method(solver: Solver, predict, loss: Loss = _SQUARED, lam=1e-2, momentum=0.0, fisher=None):
    curvature = GaussNewton(Model(predict), loss) if fisher is None else GaussNewton(Model(predict), loss, fisher)
    rows = RowSpace(solver, momentum)
    records = tuple(MetricRecord(m) for m in (Metric.LOSS, Metric.RESULT, Metric.ITERATIONS, Metric.RESIDUAL))
    return curvax.assemble(
        curvature=curvature, solver=rows, damping=curvax.damping.Constant(lam), telemetry=Telemetry(records)
    )


def _linear(params, x):
    return x @ params


def _exact(matrix: np.ndarray, rest: np.ndarray, lam: float) -> np.ndarray:
    """(A^T A + lam I)^-1 A^T t in rational numbers."""
    a = [[fractions.Fraction(float(v)) for v in row] for row in matrix]
    t, n = [fractions.Fraction(float(v)) for v in rest], len(a[0])
    system = [
        [sum((r[i] * r[j] for r in a), fractions.Fraction(0)) + (fractions.Fraction(lam * (i == j))) for j in range(n)]
        + [sum((r[i] * v for r, v in zip(a, t, strict=True)), fractions.Fraction(0))]
        for i in range(n)
    ]
    for i in range(n):
        for j in range(n):
            if i != j:
                factor = system[j][i] / system[i][i]
                system[j] = [u - factor * v for u, v in zip(system[j], system[i], strict=True)]
    return np.asarray([float(system[i][n] / system[i][i]) for i in range(n)])


def _ill_conditioned(shape: tuple[int, int], condition: float, dtype: type) -> np.ndarray:
    rng = np.random.default_rng(0)
    m, n = shape
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return (u * np.logspace(0, -np.log10(condition), k)) @ v.T.astype(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "condition"), [((12, 4), "float64", 1e8), ((4, 12), "float32", 2e3)], ids=["tall", "wide"]
)
def test_digits_that_normal_equations_lose(shape, dtype, condition):
    """The error of QR and LSMR grows with the condition number, that of Cholesky with its square."""
    eps = float(jnp.finfo(dtype).eps)
    matrix = np.asarray(_ill_conditioned(shape, condition, np.float64), dtype)
    lam = float(np.float32(1e-2 / condition**2))
    with precision(dtype):
        batch = {"x": jnp.asarray(matrix), "y": jnp.asarray(np.random.default_rng(1).standard_normal(shape[0]), dtype)}
        want = _exact(matrix, -np.asarray(batch["y"]), lam)
        errors = {}
        for name, solver in {**SOLVERS, "cholesky": Cholesky()}.items():
            method = _method(solver, _linear, SquaredError(reduction="sum"), lam)
            (got,), (info,) = directions(method, jnp.zeros(shape[1], dtype), batch)
            errors[name] = dense.relative_error(got, want)
            if name != "cholesky":
                assert int(info["result"]) == Result.CONVERGED, name
    assert errors["qr"] < 100 * condition * eps
    assert errors["lsmr"] < 1e4 * condition * eps
    assert errors["cholesky"] > 100 * max(errors["qr"], errors["lsmr"])


@pytest.mark.parametrize(
    ("name", "model", "kind", "dtype"),
    [
        ("qr", models.ATTENTION, "ce", "float64"),
        ("qr", models.LINEAR, "mse", "float32"),
        ("lsmr", models.MLP_TANH, "ce", "float64"),
    ],
    ids=str,
)
def test_direction_is_the_dense_one(name, model, kind, dtype):
    loss = SoftmaxCrossEntropy() if kind == "ce" else SquaredError()
    with precision(dtype):
        params, batch = model.params(dtype), batch_of(model, kind, dtype)
        (got,), (info,) = directions(_method(SOLVERS[name], model.predict, loss), params, batch)
    assert_close(got, standard_truth(model, kind).direction(1e-2), TOLERANCE[dtype])
    assert int(info["result"]) == (Result.CONVERGED if dtype == "float64" or name == "qr" else info["result"])
    assert float(info["residual"]) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "model"), [("qr", models.MLP_TANH), ("qr", models.LINEAR), ("lsmr", models.LINEAR)], ids=str
)
def test_a_gradient_of_another_batch(name, model):
    """It does not lie in the range of the rows."""
    with precision("float64"):
        params, batch, other = (model.params(), *(batch_of(model, "mse", "float64", seed=i) for i in (0, 1)))
        method = _method(SOLVERS[name], model.predict)
        new, _, _ = quick_jit(method.step)(params, batch, method.init(params), key(), curvature_batch=other)
        gradient = truth_of(model, "mse", params, batch).gradient
        want = dense.damped_direction(truth_of(model, "mse", params, other).ggn, gradient, 1e-2)
        assert_close(moved(params, new), want, 1e-8)


def test_momentum_is_that_of_spring():
    model = models.MLP_TANH
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "mse", "float64")
        truth = truth_of(model, "mse", params, batch)
        found, _ = directions(_method(QR(), model.predict, momentum=0.9), params, batch, 2)
        want = dense.damped_direction(truth.ggn, truth.gradient + 1e-2 * 0.9 * found[0], 1e-2)
        assert_close(found[1], want, 1e-8)


@pytest.mark.parametrize("rows", [6, 3], ids=["tall", "wide"])
def test_dependent_columns_without_damping_give_the_least_solution(rows):
    matrix = np.random.default_rng(0).standard_normal((rows, 2)) @ np.random.default_rng(1).standard_normal((2, 4))
    with precision("float64"):
        batch = {"x": jnp.asarray(matrix), "y": jnp.ones(rows)}
        method = _method(QR(), _linear, SquaredError(reduction="sum"), 0.0)
        (got,), (info,) = directions(method, jnp.zeros(4), batch)
    assert int(info["result"]) == Result.SINGULAR
    assert_close(got, -np.linalg.pinv(matrix) @ np.ones(rows), 1e-6)


def test_what_is_not_finite_is_no_solution():
    for solver in (QR(), LSMR()):
        method = _method(solver, _linear)
        _, (info,) = directions(method, jnp.zeros(3), {"x": jnp.full((5, 3), jnp.nan), "y": jnp.ones(5)})
        assert int(info["result"]) == Result.NON_FINITE


def test_lsmr_says_when_it_ran_out_of_iterations():
    model = models.MLP_TANH
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "mse", "float64")
        _, (info,) = directions(_method(LSMR(tol=1e-12, maxiter=3), model.predict), params, batch)
    assert int(info["result"]) == Result.MAX_ITERATIONS and int(info["iterations"]) == 3


def test_rows_are_asked_for_by_name():
    with pytest.raises(ValueError, match=r"wrap it as RowSpace"):
        method = curvax.assemble(curvature=GaussNewton(Model(_linear), SquaredError()), solver=QR())
        method.step(jnp.zeros(3), {"x": jnp.ones((5, 3)), "y": jnp.ones(5)}, method.init(jnp.zeros(3)))


def test_sampled_targets_have_a_direction_too():
    """Their gradient is not in the range of the sampled rows."""
    model = models.LINEAR
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "mse", "float64")
        found = [
            directions(_method(solver, model.predict, fisher=MonteCarloFisher(3)), params, batch)[0][0]
            for solver in (QR(), Cholesky())
        ]
    assert_close(found[0], found[1], 1e-8)
