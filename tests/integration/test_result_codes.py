"""A result code never claims more than the residual bears out, whatever the system, the dtype or the preconditioner."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest

import curvax
from curvax.preconditioners import Preconditioner
from curvax.preconditioners.nystrom import NystromState
from curvax.solvers import (
    CG,
    CR,
    MINRES,
    Cholesky,
    Lineax,
    PseudoInverse,
    Result,
    Solution,
    Solver,
    System,
    batched_cg,
    batched_cholesky_solve,
)
from curvax.solvers.base import Lane, audited, relative_residual
from curvax.telemetry import Metric, MetricRecord, Telemetry
from tests.integration import presets
from tests.integration.harness import batch_of, key, moved, precision
from tests.oracle import models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
SOLVERS = {
    "cg": CG(tol=1e-6, maxiter=200, warm_start=False),
    "cg, Martens": CG(tol=0.0, maxiter=200, warm_start=False, stop=curvax.solvers.MartensStop()),
    "cholesky": Cholesky(),
    "cr": CR(tol=1e-6, maxiter=200),
    "minres": MINRES(tol=1e-6, maxiter=200),
    "pseudo-inverse": PseudoInverse(),
    "lineax": Lineax(lineax.CG(rtol=1e-6, atol=0.0, max_steps=200)),
}
USABLE = (Result.CONVERGED, Result.STOPPED_EARLY)


def _matrix(size: int = 8) -> np.ndarray:
    half = np.random.default_rng(0).standard_normal((size, size))
    return half @ half.T / size + np.eye(size)


@functools.cache
def _compiled(solver: Solver) -> Any:
    """(matrix, right-hand side, diagonal of the preconditioner or None) -> solution, for all systems of one size."""

    def solve(a: jax.Array, b: jax.Array, diagonal: jax.Array | None) -> Solution:
        precondition = None if diagonal is None else lambda v: diagonal * v
        system = System(lambda v: a @ v, precondition=precondition, matrix=lambda: a)
        return solver.solve(system, b, solver.init(b), jnp.zeros((), b.dtype))

    return quick_jit(solve)


def _solve(solver: Solver, matrix: Any, rhs: Any, diagonal: Any = None, dtype: Any = np.float32) -> Solution:
    given = (None if x is None else np.asarray(x).astype(dtype) for x in (matrix, rhs, diagonal))
    return _compiled(solver)(*given)


def _true_residual(matrix: np.ndarray, rhs: np.ndarray, value: Any) -> float:
    """In float64, over the largest magnitude, so that nothing overflows."""
    scale = np.abs(rhs).max()
    rest = rhs / scale - matrix @ (np.asarray(value, np.float64) / scale)
    return float(np.linalg.norm(rest) / np.linalg.norm(rhs / scale))


PRECONDITIONERS = {
    "zero": [0.0] * 8,
    "negative": [-1.0] * 8,
    "one negative entry": [-50.0] + [1.0] * 7,
    "NaN": [np.nan] + [1.0] * 7,
    "infinite": [np.inf] + [1.0] * 7,
}


@pytest.mark.parametrize("name", ["cg", "lineax", "cr", "minres"])
@pytest.mark.parametrize("kind", list(PRECONDITIONERS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_preconditioner_that_is_none_is_told(name, kind, dtype):
    rhs = np.ones(8)
    with precision(dtype):
        solution = _solve(SOLVERS[name], _matrix(), rhs, PRECONDITIONERS[kind], dtype)
    residual = _true_residual(_matrix(), rhs, np.nan_to_num(np.asarray(solution.value)))
    if residual > 1e-2:
        assert int(solution.result) == Result.BAD_PRECONDITIONER, Result(int(solution.result))
    assert "preconditioner" in Result.BAD_PRECONDITIONER.describe()


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 1e37, 5e37, 1e38, 3e38])
def test_right_hand_sides_up_to_the_end_of_the_range(name, size):
    rhs = np.random.default_rng(1).standard_normal(8)
    rhs = size * rhs / np.abs(rhs).max()
    with precision("float32"):
        solution = _solve(SOLVERS[name], _matrix(), rhs)
    if int(solution.result) in USABLE:
        assert _true_residual(_matrix(), rhs, solution.value) < 1e-4
        assert float(solution.residual) < 1e-4
    else:
        assert int(solution.result) == Result.NON_FINITE and size > 1e37
        assert not np.isfinite(np.asarray(solution.value)).any()


MANY = {
    "cg": quick_jit(functools.partial(batched_cg, tol=1e-5, maxiter=100), static_argnames="implementation"),
    "cholesky": quick_jit(batched_cholesky_solve, static_argnames="implementation"),
}


@pytest.mark.parametrize("op", MANY)
@pytest.mark.parametrize("implementation", ["reference", "native"])
@pytest.mark.parametrize("size", [1.0, 1e37, 5e37, 1e38, 3e38])
def test_many_systems_up_to_the_end_of_the_range(op, implementation, size):
    rhs = np.random.default_rng(1).standard_normal((3, 8))
    rhs = rhs / np.abs(rhs).max(-1, keepdims=True) * np.asarray([[size], [1.0], [-size]])
    with precision("float32"):
        matrices, b = np.stack([_matrix()] * 3).astype(np.float32), rhs.astype(np.float32)
        found = MANY[op](matrices, b, implementation=implementation)
    for result, value, own in zip(found.result, found.value, rhs, strict=True):
        if int(result) == Result.CONVERGED:
            assert _true_residual(_matrix(), own, value) < 1e-4
        else:
            assert int(result) == Result.NON_FINITE and np.abs(own).max() > 1e37 and np.isnan(np.asarray(value)).all()
    assert int(found.result[1]) == Result.CONVERGED


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("where", ["matrix", "right-hand side"])
@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_what_is_not_finite_is_told(name, where, what):
    matrix, rhs = _matrix(), np.ones(8)
    if where == "matrix":
        matrix[2, 2] = what
    else:
        rhs[2] = what
    with precision("float32"):
        solution = _solve(SOLVERS[name], matrix, rhs)
    assert int(solution.result) == Result.NON_FINITE


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_zero_right_hand_side_is_solved_by_zero(name):
    with precision("float32"):
        solution = _solve(SOLVERS[name], _matrix(), np.zeros(8))
    assert int(solution.result) == Result.CONVERGED and float(solution.residual) == 0
    assert not np.asarray(solution.value).any()


@pytest.mark.parametrize("name", ["cg", "cholesky", "lineax"])
def test_random_systems_of_any_condition(name):
    """Indefinite, singular, ill-conditioned: CONVERGED goes with a small residual in float64 arithmetic, always."""
    rng = np.random.default_rng(7)
    with precision("float32"):
        for trial in range(30):
            q, _ = np.linalg.qr(rng.standard_normal((8, 8)))
            values = np.geomspace(1, 10.0 ** rng.integers(0, 12), 8) * np.where(rng.random(8) < 0.2, -1, 1)
            if trial % 3 == 0:
                values[0] = 0
            matrix = (q * values) @ q.T
            matrix = ((matrix + matrix.T) / 2).astype(np.float32)
            rhs = rng.standard_normal(8).astype(np.float32)
            solution = _solve(SOLVERS[name], matrix, rhs)
            if int(solution.result) == Result.CONVERGED:
                assert _true_residual(matrix.astype(np.float64), rhs.astype(np.float64), solution.value) < 0.15


@dataclasses.dataclass(frozen=True)
class _Lying(Solver):
    """Says that it has converged, and hands back a multiple of the right-hand side."""

    multiple: float

    @property
    def name(self):
        return "lying"

    @property
    def lane(self):
        return Lane.PARAMETER

    @property
    def products(self):
        return 0

    def init(self, like):
        return ()

    def solve(self, system, rhs, state, lam):
        value = jax.tree.map(lambda x: jnp.asarray(self.multiple, x.dtype) * x, rhs)
        residual = relative_residual(system, lam, rhs, value)
        zero = jnp.zeros((), jnp.int32)
        return Solution(value, jnp.asarray(int(Result.CONVERGED), jnp.int32), zero, residual, ())


@pytest.mark.parametrize(("multiple", "code"), [(0.0, Result.INACCURATE), (np.nan, Result.NON_FINITE)])
@pytest.mark.parametrize("rows", [False, True])
def test_a_solver_of_ones_own_is_not_believed_blindly(multiple, code, rows):
    solver: Solver = _Lying(multiple)
    if rows:
        solver = curvax.solvers.RowSpace(solver)
    with precision("float32"):
        method = curvax.assemble(
            curvature=curvax.curvature.GaussNewton(
                curvax.curvature.Model(MODEL.predict), curvax.losses.SoftmaxCrossEntropy()
            ),
            solver=solver,
            damping=curvax.damping.Constant(0.1),
            telemetry=Telemetry((MetricRecord(Metric.RESULT),)),
        )
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        _, _, info = quick_jit(method.step)(params, batch, method.init(params), key())
    assert int(info["result"]) == code


def test_a_loose_tolerance_is_kept_and_not_called_inaccurate():
    def one(result: Result, residual: float, tolerance: float) -> Result:
        found = Solution((), jnp.asarray(int(result)), jnp.zeros((), jnp.int32), jnp.asarray(residual), ())
        return Result(int(audited(found, tolerance).result))

    assert one(Result.CONVERGED, 0.4, 0.5) is Result.CONVERGED
    assert one(Result.CONVERGED, 0.4, 1e-5) is Result.INACCURATE
    assert one(Result.MAX_ITERATIONS, 0.4, 1e-5) is Result.MAX_ITERATIONS
    assert one(Result.STOPPED_EARLY, np.nan, 1e-5) is Result.NON_FINITE
    assert one(Result.NEGATIVE_CURVATURE, np.nan, 1e-5) is Result.NEGATIVE_CURVATURE


def test_the_diagonal_lane_solves_no_system_and_claims_none():
    records = tuple(MetricRecord(metric) for metric in (Metric.RESULT, Metric.RESIDUAL, Metric.ITERATIONS))
    for extra in ((), (MetricRecord(Metric.UPDATE_NORM),)):  # in one pass, and part by part
        with precision("float32"):
            method = curvax.sophia_g(predict_fn=MODEL.predict, metrics=records + extra)
            params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
            step = quick_jit(method.step)
            _, _, info = step(params, batch, method.init(params), key())
            assert int(info["result"]) == Result.CONVERGED and np.isnan(float(info["residual"]))
            spoilt = {**batch, "x": jnp.full_like(batch["x"], jnp.nan)}
            _, _, info = step(params, spoilt, method.init(params), key())
            assert int(info["result"]) == Result.NON_FINITE and not bool(info["finite"])


@dataclasses.dataclass(frozen=True)
class _Rejecting(Preconditioner):
    """The identity, whose refreshes all fail."""

    every: int = 2

    @property
    def needs_product(self):
        return False

    @property
    def needs_sampling(self):
        return False

    def init(self, params_like):
        return NystromState(jnp.zeros((1, 1)), jnp.zeros(1), jnp.zeros((), jnp.int32))

    def refresh(self, state, linearization, key):
        return dataclasses.replace(state, rejected=state.rejected + 1)

    def apply(self, state, lam, v):
        return v


def test_refused_refreshes_are_counted_in_the_info():
    with precision("float32"):
        method = curvax.sgn_ce(predict_fn=MODEL.predict, precond=_Rejecting())
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        step, state, counts = quick_jit(method.step), method.init(params), []
        for _ in range(5):
            params, state, info = step(params, batch, state, key())
            counts.append(int(info["refreshes_rejected"]))
    assert counts == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("name", ["kfac", "sophia_g", "adahessian"])
def test_a_batch_that_is_not_finite_counts_as_a_refused_refresh(name):
    with precision("float32"):
        if name == "kfac":
            method = curvax.kfac(predict_fn=MODEL.predict, loss=curvax.losses.SoftmaxCrossEntropy())
        else:
            method = presets.BY_NAME[name].make(MODEL, eval_every_k=1)
        kind = "ce" if name == "kfac" else presets.BY_NAME[name].kind
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, kind, jnp.float32)
        step, state = quick_jit(method.step), method.init(params, batch=batch)
        spoilt = {**batch, "x": jnp.full_like(batch["x"], jnp.nan)}
        counts = []
        for data in (batch, spoilt, batch):
            params, state, info = step(params, data, state, key())
            counts.append(int(info["refreshes_rejected"]))
    assert counts == [0, 1, 1]


@pytest.mark.parametrize("maxiter", [1, 7])
def test_the_first_step_in_row_space_is_that_of_parameter_space(maxiter):
    """A warm start from nothing is none: it would cost a direction that the others are conjugate to."""
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "mse", "float64")
        steps = []
        for make in (curvax.egn_mse_cg, curvax.sgn_mse):
            method = make(predict_fn=MODEL.predict, lam0=1e-3, maxiter=maxiter, tol=0.0)
            new, _, info = quick_jit(method.step)(params, batch, method.init(params), key())
            steps.append(moved(params, new))
            assert int(info["iterations"]) == maxiter
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-7, atol=1e-9 * np.abs(steps[1]).max())


def test_a_scheduled_learning_rate_is_in_the_info():
    schedule = optax.exponential_decay(0.5, 1, 0.5)
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        rates = {}
        for name, options in (("sophia_g", {}), ("sgn_ce", {}), ("sgn_ce, clipped", {"clip_norm": 1.0})):
            make = getattr(curvax, name.split(",")[0])
            method = make(predict_fn=MODEL.predict, learning_rate=schedule, **options)
            step, p, state, rates[name] = quick_jit(method.step), params, method.init(params), []
            for _ in range(3):
                p, state, info = step(p, batch, state, key())
                rates[name].append(float(info["learning_rate"]))
    assert all(found == [0.5, 0.25, 0.125] for found in rates.values()), rates


def test_a_learning_rate_of_somebody_elses_chain_is_not_guessed():
    with pytest.raises(ValueError, match="tx="):
        curvax.sgn_ce(predict_fn=MODEL.predict, tx=optax.sgd(0.1), metrics=(MetricRecord(Metric.LEARNING_RATE),))
