"""Indefinite and singular systems: every solver against a dense float64 computation, and steps away from saddles."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.damping import Outcome, Radius
from curvax.losses import SquaredError
from curvax.solvers import (
    CG,
    CR,
    MINRES,
    Automatic,
    Cholesky,
    PseudoInverse,
    Result,
    RowSpace,
    Solution,
    Solver,
    System,
)
from curvax.telemetry import Metric, MetricRecord, Telemetry
from tests.integration.harness import batch_of, precision, truth_of
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

SIZE = 9
SPECTRA = {
    "definite": np.geomspace(0.1, 3, SIZE),
    "indefinite": np.r_[-1.5, -0.2, np.geomspace(0.1, 3, SIZE - 2)],
    "singular": np.r_[0.0, 0.0, np.geomspace(0.1, 3, SIZE - 2)],
    "negative": -np.geomspace(0.1, 3, SIZE),
}
DTYPES = ("float64", "float32")
EXACT = {"float64": 1e-9, "float32": 2e-3}


def _matrix(kind: str, scale: float = 1.0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    return scale * (q * SPECTRA[kind]) @ q.T


RHS = np.random.default_rng(1).standard_normal(SIZE)
PRECONDITIONER = np.linspace(0.5, 2.0, SIZE)


@functools.cache
def _compiled(solver: Solver, preconditioned: bool, bounded: bool) -> Any:
    def solve(a: jax.Array, b: jax.Array, lam: jax.Array, radius: jax.Array) -> Solution:
        # A tree of two leaves: solvers work on whatever the parameters are.
        cut = {"u": b[:4], "v": b[4:].reshape(-1, 1)}

        def product(v: Any) -> Any:
            image = a @ jnp.concatenate([v["u"], v["v"][:, 0]])
            return {"u": image[:4], "v": image[4:].reshape(-1, 1)}

        inverse = jnp.asarray(PRECONDITIONER, b.dtype)

        def precondition(v: Any) -> Any:
            return {"u": v["u"] / inverse[:4], "v": v["v"] / inverse[4:].reshape(-1, 1)}

        system = System(
            product, precondition=precondition if preconditioned else None, radius=radius if bounded else None
        )
        return solver.solve(system, cut, solver.init(cut), lam)

    return quick_jit(solve)


def _solve(
    solver: Solver, a: np.ndarray, b: np.ndarray, dtype: str = "float64", lam: float = 0.0,
    radius: float | None = None, preconditioned: bool = False,
) -> tuple[np.ndarray, Solution]:  # fmt: skip
    with precision(dtype):
        args = [jnp.asarray(x, dtype) for x in (a, b, lam, 0.0 if radius is None else radius)]
        solution = _compiled(solver, preconditioned, radius is not None)(*args)
        value = np.concatenate([np.asarray(solution.value[k], np.float64).ravel() for k in ("u", "v")])
    return value, solution


def _least_residual(a: np.ndarray, b: np.ndarray, k: int, p: np.ndarray) -> np.ndarray:
    """argmin |b - a x| in the norm of p^-1 over the Krylov space of p^-1 a and p^-1 b, by dense least squares."""
    basis = np.stack([np.linalg.matrix_power(a / p[:, None], i) @ (b / p) for i in range(k)], 1)
    q, _ = np.linalg.qr(basis)
    weights = 1 / np.sqrt(p)
    return q @ np.linalg.lstsq(weights[:, None] * (a @ q), weights * b, rcond=None)[0]


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("make", [CR, MINRES])
def test_iterates_have_the_least_residual(make: Any, preconditioned: bool) -> None:
    a, p = _matrix("definite") + 0.3 * np.eye(SIZE), PRECONDITIONER if preconditioned else np.ones(SIZE)
    for k in (1, 4):
        value, solution = _solve(make(0.0, k), a - 0.3 * np.eye(SIZE), RHS, lam=0.3, preconditioned=preconditioned)
        want = _least_residual(a, RHS, k, p)
        np.testing.assert_allclose(value, want, rtol=1e-8, atol=1e-9)
        assert int(solution.result) == Result.MAX_ITERATIONS and int(solution.iterations) == k
        rest = np.linalg.norm(RHS - a @ want) / np.linalg.norm(RHS)
        assert float(solution.residual) == pytest.approx(rest, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["indefinite", "negative"])
@pytest.mark.parametrize("solver", [CR(0.0, 30), MINRES(0.0, 30)], ids=["CR", "MINRES"])
def test_the_first_residual_of_negative_curvature_is_used(solver: Solver, kind: str, dtype: str) -> None:
    a, k = _matrix(kind), 0
    residual = RHS
    while residual @ a @ residual > 0:
        k += 1
        residual = RHS - a @ _least_residual(a, RHS, k, np.ones(SIZE))
    want = RHS - residual
    want = np.linalg.solve(a, want) + np.linalg.norm(residual) / np.linalg.norm(a @ residual) * residual
    value, solution = _solve(solver, a, RHS, dtype)
    assert int(solution.result) == Result.NEGATIVE_CURVATURE and int(solution.iterations) == k
    np.testing.assert_allclose(value, want, rtol=EXACT[dtype], atol=EXACT[dtype])
    assert value @ RHS > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_minres_goes_on_where_it_is_told_to(dtype: str) -> None:
    value, solution = _solve(MINRES(1e-6, 60, detect=False), _matrix("indefinite"), RHS, dtype)
    assert int(solution.result) == Result.CONVERGED
    np.testing.assert_allclose(value, np.linalg.solve(_matrix("indefinite"), RHS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", [CR(1e-9, 60), MINRES(1e-9, 60), PseudoInverse()], ids=["CR", "MINRES", "inverse"])
def test_singular_systems_have_the_least_squares_solution_of_least_norm(solver: Solver, dtype: str) -> None:
    for scale in (1.0, 1e-6):
        a = _matrix("singular", scale)
        value, solution = _solve(solver, a, RHS, dtype)
        assert int(solution.result) == Result.SINGULAR, Result(int(solution.result))
        want = np.linalg.pinv(a, rcond=1e-10) @ RHS
        np.testing.assert_allclose(scale * value, scale * want, rtol=EXACT[dtype], atol=EXACT[dtype])


def test_the_cut_off_is_smooth_and_told() -> None:
    for kind, lam, rcond in (("definite", 0.0, 0.1), ("definite", 1e-2, 1e-3), ("indefinite", 0.1, 0.0)):
        size = np.abs(SPECTRA[kind]) + lam
        q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
        want = q @ ((q.T @ RHS) / (size * (1 + (rcond * size.max() / size) ** 6)))
        value, solution = _solve(PseudoInverse(rcond), _matrix(kind), RHS, lam=lam)
        np.testing.assert_allclose(value, want, rtol=1e-9)
        cut = Result.INDEFINITE if kind == "indefinite" else Result.SINGULAR if rcond == 0.1 else Result.CONVERGED
        assert int(solution.result) == cut
    with pytest.raises(ValueError, match="rcond must be at least 0"):
        PseudoInverse(-1.0)


def test_rows_have_a_pseudo_inverse_too() -> None:
    model = models.SCALAR
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "mse", "float64")
        method = curvax.assemble(
            curvature=curvax.curvature.GaussNewton(curvax.curvature.Model(model.predict), SquaredError()),
            solver=RowSpace(PseudoInverse(1e-4)),
            damping=curvax.damping.Constant(0.0),
            telemetry=Telemetry((MetricRecord(Metric.RESULT),)),
        )
        new, _, info = quick_jit(method.step)(params, batch, method.init(params))
        truth = truth_of(model, "mse", params, batch)
    values, vectors = np.linalg.eigh(truth.ggn)
    kept = np.where(values > 1e-12, values, np.inf)
    want = vectors @ ((vectors.T @ truth.gradient) / (kept * (1 + (1e-4 * values.max() / kept) ** 6)))
    np.testing.assert_allclose(dense.vector(params) - dense.vector(new), want, rtol=1e-5, atol=1e-8)
    assert int(info["result"]) in (Result.CONVERGED, Result.SINGULAR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(SPECTRA))
def test_cholesky_adds_lam_to_magnitudes_where_the_system_is_indefinite(kind: str, dtype: str) -> None:
    lam = 0.01
    value, solution = _solve(Cholesky(), _matrix(kind), RHS, dtype, lam)
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    want = q @ ((q.T @ RHS) / (np.abs(SPECTRA[kind]) + lam))
    np.testing.assert_allclose(value, want, rtol=EXACT[dtype], atol=EXACT[dtype])
    assert int(solution.result) == (Result.INDEFINITE if kind in ("indefinite", "negative") else Result.CONVERGED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(SPECTRA))
def test_the_exact_step_is_the_least_of_the_quadratic_in_the_ball(kind: str, dtype: str) -> None:
    """Its optimality conditions: (A + t I) s = g with A + t I semidefinite and t >= 0, and |s| = radius where t > 0."""
    a, low = _matrix(kind), SPECTRA[kind].min()
    lowest = np.linalg.eigh(a)[1][:, 0]
    hard = RHS - (RHS @ lowest) * lowest
    for b in (RHS, 1e-5 * RHS, hard, 1e-9 * lowest + hard):
        for radius in (1e-3, 0.7, 1e3):
            s, solution = _solve(Cholesky(), a, b, dtype, radius=radius)
            norm, slack = np.linalg.norm(s), EXACT[dtype]
            assert norm <= radius * (1 + slack)
            at_boundary = int(solution.result) == Result.BOUNDARY
            t = (s @ (b - a @ s)) / (s @ s) if at_boundary else 0.0
            assert at_boundary == (norm >= radius * (1 - slack)) or kind == "singular"
            assert t >= max(0.0, -low) - slack * 3
            rounding = 100 * float(jnp.finfo(dtype).eps) * norm
            rest = np.linalg.norm((a + t * np.eye(SIZE)) @ s - b)
            assert rest <= rounding + 20 * slack * max(np.linalg.norm(b), t * radius)


def test_a_saddle_without_gradient_is_left_along_the_lowest_curvature() -> None:
    s, solution = _solve(Cholesky(), _matrix("indefinite"), np.zeros(SIZE), radius=0.3)
    assert int(solution.result) == Result.BOUNDARY and np.linalg.norm(s) == pytest.approx(0.3)
    assert s @ _matrix("indefinite") @ s == pytest.approx(-1.5 * 0.09)
    s, solution = _solve(Cholesky(), _matrix("definite"), np.zeros(SIZE), radius=0.3)
    assert int(solution.result) == Result.CONVERGED and not s.any()


def _steihaug(a: np.ndarray, b: np.ndarray, radius: float, maxiter: int) -> tuple[np.ndarray, Result]:
    """As the paper has it, in NumPy."""
    x, r, p = np.zeros_like(b), b, b
    for _ in range(maxiter):
        bend = p @ a @ p
        roots = np.roots([p @ p, 2 * x @ p, x @ x - radius**2])
        if bend <= 0:
            return x + roots.max() * p, Result.NEGATIVE_CURVATURE
        alpha = (r @ r) / bend
        if np.linalg.norm(x + alpha * p) >= radius:
            return x + roots.max() * p, Result.BOUNDARY
        x, new = x + alpha * p, r - alpha * a @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    return x, Result.MAX_ITERATIONS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["definite", "indefinite", "negative"])
def test_cg_under_a_radius_is_that_of_steihaug_and_toint(kind: str, dtype: str) -> None:
    solver = CG(0.0, 4, warm_start=False)
    for scale in (1.0, 1e-8):
        for radius in (1e-6, 0.2, 1.5, 1e6):
            want, result = _steihaug(_matrix(kind), RHS, radius, 4)
            value, solution = _solve(solver, scale * _matrix(kind), scale * RHS, dtype, radius=radius)
            assert int(solution.result) == result, (Result(int(solution.result)), result)
            np.testing.assert_allclose(value, want, rtol=10 * EXACT[dtype], atol=10 * EXACT[dtype] * radius)
            assert np.linalg.norm(value) <= radius * (1 + 1e-5)


def test_a_radius_follows_rho_and_not_what_ends_inside() -> None:
    policy = Radius(radius0=1.0, inc=4.0, dec=0.5)

    def after(actual: float, at_boundary: bool, *, times: int = 1) -> float:
        state = policy.init()
        for _ in range(times):
            outcome = Outcome(
                finite=jnp.asarray(True), evaluated=jnp.asarray(True), loss=jnp.asarray(1.0),
                loss_after=jnp.asarray(1.0 - actual), predicted=jnp.asarray(0.1), at_boundary=jnp.asarray(at_boundary),
            )  # fmt: skip
            state = policy.update(state, outcome, jnp.asarray(True))
        return float(policy.radius(state))

    assert after(0.1, True) == pytest.approx(2.0) and after(0.1, False) == pytest.approx(1.0)
    assert after(0.05, True) == pytest.approx(1.0)
    assert after(0.01, True) == pytest.approx(0.25)
    assert after(-0.1, False) == pytest.approx(0.25)
    assert after(-0.1, True, times=2) == pytest.approx(1 / 64)
    assert after(float("nan"), True, times=40) >= 1e-7, "what was of use bounds it"
    with pytest.raises(ValueError, match="radius0 must be above 0"):
        Radius(radius0=0.0)


def test_a_radius_needs_a_solver_that_keeps_to_it() -> None:
    for solver in ("cr", "minres"):
        with pytest.raises(ValueError, match="keeps to none"):
            curvax.newton_cg(loss_fn=_saddle, solver=solver, lam_policy="radius")
    with pytest.raises(ValueError, match="solver must be a Solver or one of"):
        curvax.make("newton_cg", loss_fn=_saddle, solver="lu")


def _saddle(x: jax.Array, batch: Any) -> jax.Array:
    del batch
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4 + 1


def _rosenbrock(x: jax.Array, batch: Any) -> jax.Array:
    del batch
    return jnp.sum(100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2)


def _beale(x: jax.Array, batch: Any) -> jax.Array:
    del batch
    return sum(((c - x[0] * (1 - x[1] ** i)) ** 2 for i, c in ((1, 1.5), (2, 2.25), (3, 2.625))), jnp.zeros(()))


def _tail(x: jax.Array, batch: Any) -> jax.Array:
    del batch
    return jnp.sum(jnp.logaddexp(x, -x) - jnp.log(2.0))


BATCH = {"x": np.zeros(1)}
STARTS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "saddle": (_saddle, (1.0, 1e-6)),
    "Rosenbrock": (_rosenbrock, (-1.2, 1.0) * 2),
    "Beale": (_beale, (1.0, 1.0)),
    "flat tail": (_tail, (100.0, -50.0)),
}


def _run(method: Any, start: Any, steps: int, batch: Any = BATCH) -> dict[str, np.ndarray]:
    def advance(carry: Any, _: Any) -> Any:
        params, state, info = method.step(carry[0], batch, carry[1])
        return (params, state), info

    params = jnp.asarray(start)
    _, infos = quick_jit(lambda c: jax.lax.scan(advance, c, length=steps))((params, method.init(params)))
    return {name: np.asarray(value) for name, value in infos.items()}


@pytest.mark.parametrize("name", list(STARTS))
def test_newton_cg_at_its_defaults_finds_minima_and_stays(name: str, x64: None) -> None:
    """Down to rounding without a rise, and at a solved point neither refusals nor a damping that climbs."""
    loss_fn, start = STARTS[name]
    infos = _run(curvax.newton_cg(loss_fn=loss_fn), start, 200)
    loss = infos["loss"]
    assert loss.min() >= -1e-12 and np.all(np.diff(loss) <= 1e-12)
    assert loss[60] < 1e-10
    assert np.mean(infos["accepted"][100:]) >= 0.92


def test_scaling_the_loss_changes_no_step_under_a_radius(x64: None) -> None:
    method = curvax.newton_cg(loss_fn=lambda p, b: b["scale"] * _beale(p, b), lam_policy="radius")
    step, runs = quick_jit(method.step), []
    for scale in (1.0, 2.0**20, 2.0**-20):
        params, state, losses = jnp.ones(2), method.init(jnp.ones(2)), []
        for _ in range(5):
            params, state, info = step(params, {"scale": scale}, state)
            losses.append(float(info["loss"]) / scale)
        runs.append(losses)
    np.testing.assert_allclose(runs, [runs[0]] * 3, rtol=1e-9)


def test_the_planner_factorizes_small_models_and_iterates_on_others() -> None:
    def loss(p: Any, b: Any) -> jax.Array:
        return jnp.sum((b["x"] @ p["w"]) ** 2) + jnp.sum(p["w"] ** 4)

    method = curvax.newton_cg(loss_fn=loss)
    assert isinstance(method.assembly.solver, Automatic)
    for width, name in ((20, "Cholesky"), (4000, "conjugate residuals")):
        params, batch = {"w": jnp.ones((width, 1))}, {"x": jnp.ones((8, width))}
        plan = method.plan_for(params, batch)
        assert plan.solver.name.startswith(name)
    assert isinstance(curvax.newton_cg(loss_fn=loss, lam0=1.0).assembly.solver, CG), "as in python-somax"
    preconditioned = curvax.newton_cg(loss_fn=loss, precond="diag_direct")
    assert isinstance(preconditioned.assembly.solver, CG), "a preconditioner serves iterations"
    assert "radius (from" in curvax.newton_cg(loss_fn=loss, lam_policy="radius").explain()
