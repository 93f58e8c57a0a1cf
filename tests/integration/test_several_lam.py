"""Several lam at once: directions from one decomposition or one Krylov space, and the best of them taken."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.curvature import GaussNewton, Model
from curvax.damping import Marquardt, TrustRegion
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.solvers import CG, QR, Cholesky, Eigen, MultiShiftCG, Result, RowSpace, System
from curvax.telemetry import Metric, MetricRecord, Telemetry
from tests.integration.harness import assert_close, batch_of, key, moved, precision, truth_of
from tests.oracle import models
from tests.oracle.compiling import quick_jit

LAMS = np.asarray([10.0, 1e-3, 0.1])


@pytest.mark.parametrize(
    "solver",
    [Cholesky(), Eigen(), MultiShiftCG(tol=1e-12, maxiter=50)],
    ids=["Cholesky", "eigen", "multi-shift"],
)
def test_every_solution_is_the_dense_one(solver):
    rng = np.random.default_rng(0)
    half, b = rng.standard_normal((8, 6)), rng.standard_normal(8)
    with precision("float64"):
        matrix = jnp.asarray(half @ half.T)
        several = quick_jit(lambda b: solver.solve_several(System(lambda v: matrix @ v), b, jnp.asarray(LAMS)))(
            jnp.asarray(b)
        )
        for lam, x, result in zip(LAMS, several.value, several.result, strict=True):
            assert_close(np.asarray(x), np.linalg.solve(half @ half.T + lam * np.eye(8), b), 1e-8)
            assert int(result) == Result.CONVERGED


def test_multi_shift_makes_the_iterates_of_cg_for_each_lam():
    rng = np.random.default_rng(1)
    half, b = rng.standard_normal((12, 12)), rng.standard_normal(12)
    with precision("float64"):
        matrix = jnp.asarray(half @ half.T)
        system = System(lambda v: matrix @ v)
        rhs, cg = jnp.asarray(b), CG(tol=0.0, maxiter=4, warm_start=False)
        together = quick_jit(lambda b: MultiShiftCG(tol=0.0, maxiter=4).solve_several(system, b, jnp.asarray(LAMS)))
        alone = quick_jit(lambda lam: cg.solve(system, rhs, (), lam))
        for lam, x in zip(LAMS, together(rhs).value, strict=True):
            assert_close(np.asarray(x), np.asarray(alone(jnp.asarray(lam)).value), 1e-9)


def test_multi_shift_says_how_it_ended():
    with precision("float64"):
        diagonal = jnp.asarray([-1.0, 2.0, 3.0])
        indefinite = System(lambda v: diagonal * v)
        outcome = MultiShiftCG().solve_several(indefinite, jnp.ones(3), jnp.asarray([0.1, 1e4]))
        assert [int(r) for r in outcome.result] == [Result.NEGATIVE_CURVATURE, Result.NEGATIVE_CURVATURE]
        zero = MultiShiftCG().solve_several(System(lambda v: v), jnp.zeros(3), jnp.asarray(LAMS))
        assert np.all(np.asarray(zero.value) == 0) and np.all(np.asarray(zero.result) == Result.CONVERGED)
        lost = MultiShiftCG().solve_several(System(lambda v: v), jnp.full(3, jnp.nan), jnp.asarray(LAMS))
        assert np.all(np.asarray(lost.result) == Result.NON_FINITE)


FACTORS = (16.0, 1.0, 1 / 16)


@pytest.mark.parametrize(
    ("solver", "kind", "scaling"),
    [
        (RowSpace(Eigen()), "ce", None),
        (RowSpace(Cholesky()), "mse", Marquardt()),
        (Eigen(), "mse", Marquardt()),
        (MultiShiftCG(tol=1e-12, maxiter=100), "mse", None),
        (RowSpace(QR()), "ce", Marquardt()),
        (RowSpace(MultiShiftCG(tol=1e-12, maxiter=100)), "mse", None),
    ],
    ids=["row eigen", "row Cholesky, scaled", "eigen, scaled", "multi-shift", "QR, scaled", "row multi-shift"],
)
def test_the_best_of_several_is_taken(solver, kind, scaling):
    """It is the dense direction of the lam in `info`, and no other lam leads lower."""
    model, loss = models.LINEAR, SoftmaxCrossEntropy() if kind == "ce" else SquaredError()
    with precision("float64"):
        params, batch = model.params(), batch_of(model, kind, "float64")
        records = tuple(map(MetricRecord, (Metric.LAM, Metric.LOSS_AFTER, Metric.RESULT, Metric.RESIDUAL)))
        method = curvax.assemble(
            curvature=GaussNewton(Model(model.predict), loss), solver=solver, scaling=scaling,
            damping=TrustRegion(lam0=1.0, factors=FACTORS), telemetry=Telemetry(records),
        )  # fmt: skip
        new, state, info = quick_jit(method.step)(params, batch, method.init(params), key())
        truth = truth_of(model, kind, params, batch)
        metric = np.eye(len(truth.ggn)) if scaling is None else np.diag(np.diag(truth.ggn))
        flat, unravel = ravel_pytree(params)
        losses = {}
        for factor in FACTORS:
            s = np.linalg.solve(truth.ggn + factor * metric, truth.gradient)
            outputs = model.predict(unravel(flat - jnp.asarray(s)), batch["x"])
            losses[factor] = float(loss.value(outputs, batch["y"], loss.effective_weights(outputs, None)))
            if factor == float(info["lam"]):
                assert_close(moved(params, new), s, 1e-8)
        best = min(losses, key=losses.__getitem__)
        assert float(info["lam"]) == best
        assert float(info["loss_after"]) == pytest.approx(losses[best], rel=1e-10)
        assert int(info["result"]) == Result.CONVERGED and float(info["residual"]) < 1e-8
        # rho of the step that was taken moves lam on from the one that was chosen.
        assert float(state.damping.lam) == pytest.approx(best * 0.5)


def test_several_lam_need_a_solver_of_several():
    curvature = GaussNewton(Model(models.LINEAR.predict), SquaredError())
    with pytest.raises(ValueError, match=r"CG .* solves for one lam at a time"):
        curvax.assemble(curvature=curvature, solver=CG(), damping=TrustRegion(factors=FACTORS))
    with pytest.raises(ValueError, match="factors must be multiples of lam above 0"):
        TrustRegion(factors=(1.0, 0.0))
    method = curvax.assemble(curvature=curvature, solver=Eigen(), damping=TrustRegion(factors=FACTORS))
    params, batch = models.LINEAR.params(jnp.float32), batch_of(models.LINEAR, "mse", "float32")
    text = method.plan_for(params, batch).explain()
    assert "loss for each lam" in text and "best of lam times 16, 1, 0.0625" in text


def test_small_fits_try_several_by_themselves():
    """The plan of `gauss_newton` says so; in networks, and where lam is given, a step tries one."""

    def factors(size: int, **options) -> tuple[float, ...]:
        method = curvax.gauss_newton(predict_fn=lambda p, x: x @ p, loss=SquaredError(), **options)
        batch = {"x": jax.ShapeDtypeStruct((60, size), jnp.float32), "y": jax.ShapeDtypeStruct((60,), jnp.float32)}
        return method.plan_for(jax.ShapeDtypeStruct((size,), jnp.float32), batch).factors

    assert factors(5) == (0.01, 0.1, 1.0, 10.0)
    assert (
        factors(300) == factors(5, lam_policy="const", lam0=1.0) == factors(5, lam_kwargs={"factors": (1.0,)}) == (1.0,)
    )


def test_fresh_batches_that_see_too_little_keep_lam_from_falling():
    policy = TrustRegion(lam0=1.0)
    state = policy.init()
    few = dataclasses.replace(state, fresh=dataclasses.replace(state.fresh, promised=jnp.asarray(1.0)))
    np.testing.assert_allclose(policy.lams(state, (0.1, 1.0, 10.0)), [0.1, 1.0, 10.0], rtol=1e-6)
    np.testing.assert_allclose(policy.lams(few, (0.1, 1.0, 10.0)), [1.0, 1.0, 10.0], rtol=1e-6)
