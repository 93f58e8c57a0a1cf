"""The planner: cadences, cost counts, the automatic choice, and what explain prints."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.ffi import native_status
from curvax.kernels import Unsupported, clear_report, report
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.plan import Cadence, Part
from curvax.plan import cost as costing
from curvax.solvers import CG, Cholesky, RowSpace
from tests.oracle.compiling import quick_jit


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def shapes(*widths: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(pair, jnp.float32) for pair in itertools.pairwise(widths)]


def batch(size: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"x": jax.ShapeDtypeStruct((size, width), jnp.float32), "y": jax.ShapeDtypeStruct((size,), jnp.int32)}


def test_cadences_stay_apart_and_drop_multiples() -> None:
    both = Cadence((3,)) | Cadence((5,))
    due = [t for t in range(16) if bool(both.due(jnp.asarray(t)))]
    assert due == [0, 3, 5, 6, 9, 10, 12, 15]
    assert (Cadence((2,)) | Cadence((4,))).periods == (2,)
    assert both.rate == pytest.approx(7 / 15)
    assert Cadence().never and (both | Cadence((1,))).always
    with pytest.raises(ValueError, match="every 1 or more"):
        Cadence((0,))


def test_flops_of_matrix_products_are_exact_and_loops_count_as_often_as_they_run() -> None:
    x = jax.ShapeDtypeStruct((7, 5), jnp.float32)
    w = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    one = costing.trace(lambda w, x: x @ w, w, x)
    assert one.flops == 2 * 7 * 5 * 5
    many = costing.trace(lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=11)[0], w, x)
    assert many.flops == 11 * one.flops


def test_flops_of_convolutions() -> None:
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    k = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)

    def conv(k: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert costing.trace(conv, k, x).flops == 2 * (2 * 6 * 6 * 4) * (3 * 3 * 3)


def test_residuals_of_a_dense_layer_are_its_inputs() -> None:
    x = jnp.ones((7, 5), jnp.float32)
    held = costing.residual_bytes(lambda w: jnp.sum(jnp.tanh(x @ w)), jax.ShapeDtypeStruct((5, 4), jnp.float32))
    assert held >= 7 * 4 * 4


def automatic(**options: Any) -> curvax.Method:
    return curvax.gauss_newton(predict_fn=mlp, loss=SoftmaxCrossEntropy(), **options)


def test_automatic_step_equals_the_candidate_it_chose() -> None:
    key = jax.random.key(0)
    params = [jax.random.normal(jax.random.fold_in(key, i), s.shape) for i, s in enumerate(shapes(4, 6, 3))]
    data = {"x": jax.random.normal(key, (5, 4)), "y": jnp.arange(5) % 3}
    plan = automatic().plan_for(params, data)
    damping = curvax.damping.TrustRegion(factors=plan.factors)
    fixed = curvax.assemble(curvature=automatic().assembly.curvature, solver=plan.solver, damping=damping)
    ours, _, _ = quick_jit(automatic().step)(params, data, automatic().init(params))
    theirs, _, _ = quick_jit(fixed.step)(params, data, fixed.init(params))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.fast
def test_explain_names_lane_parts_cadences_and_reasons() -> None:
    method = curvax.sgn_ce(predict_fn=mlp, lam_policy="trust_region", lam_kwargs={"every": 5}, record_rho_every_k=3)
    text = method.plan_for(shapes(8, 8, 3), batch(16, 8)).explain()
    for words in ("lane param", "every 5 steps", "every 3 steps", "cg_update", "trust region", "FLOP", "peak"):
        assert words in text
    apart = curvax.sophia_g(predict_fn=mlp).plan
    assert apart.refresh_apart and "every 10 steps" in apart.explain()
    assert not curvax.sophia_g(predict_fn=mlp, eval_every_k=1).plan.refresh_apart


@pytest.mark.fast
def test_row_lane_names_its_kernel_and_honours_the_backend() -> None:
    clear_report()  # of what other tests asked for by name

    def plan(backend: Any) -> Any:
        method = curvax.egn_ce(predict_fn=mlp, backend=backend)
        return method.plan_for(shapes(8, 8, 3), batch(16, 8))

    best = "native" if native_status().available else "reference"
    for backend, expected in (("auto", best), ("reference", "reference")):
        planned = plan(backend)
        chosen = {choice.op: choice.implementation for choice in planned.choices}
        for op in ("gram_accumulate", "batched_cholesky_solve"):
            assert chosen[op] == expected
            assert op in planned.explain()
    with curvax.strict_backend(), pytest.raises(Unsupported, match="triton"):
        plan("triton")
    # Counting the plan's FLOPs is no use of an op that the report should show as asked for.
    assert not any(r.choice.reason == "asked for by name" for r in report() if r.choice.op == "gram_accumulate")


def test_custom_vjp_and_frozen_leaves_are_named() -> None:
    @jax.custom_vjp
    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    method = curvax.sgn_ce(predict_fn=lambda p, x: double(mlp(p, x)), frozen=[True, False])
    notes = " ".join(method.plan_for(shapes(4, 4, 3), batch(5, 4)).notes)
    assert "custom_vjp" in notes and "1 parameter leaf is frozen" in notes


@pytest.mark.fast
def test_costs_follow_cadence_and_plan_off() -> None:
    shared = curvax.sophia_g(predict_fn=mlp).plan_for(shapes(8, 8, 3), batch(16, 8))
    off = curvax.sophia_g(predict_fn=mlp, plan="off").plan_for(shapes(8, 8, 3), batch(16, 8))
    rate = {p.part: p.rate for p in shared.costs}
    assert rate[Part.REFRESH] == pytest.approx(0.1)
    assert off.cost.flops > 1.5 * shared.cost.flops


def test_modules_that_cannot_work_together_are_refused_at_assembly() -> None:
    hessian = curvax.curvature.Hessian(curvax.curvature.LossFunction(lambda p, b: jnp.sum(p**2)))
    ggn = curvax.curvature.GaussNewton(curvax.curvature.Model(mlp), SquaredError())
    with pytest.raises(ValueError, match="no row factors"):
        curvax.assemble(curvature=hessian, solver=RowSpace(Cholesky()))
    with pytest.raises(ValueError, match="is its preconditioner"):
        curvax.assemble(curvature=ggn, solver=curvax.solvers.Diagonal())
    gnb = curvax.preconditioners.Jacobi(curvax.estimators.GaussNewtonBartlett())
    with pytest.raises(ValueError, match="samples targets"):
        curvax.assemble(curvature=hessian, solver=CG(), preconditioner=gnb)
    with pytest.raises(ValueError, match="take no preconditioner"):
        curvax.assemble(curvature=ggn, solver=RowSpace(CG()), preconditioner=gnb)
