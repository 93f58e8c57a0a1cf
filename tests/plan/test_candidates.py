"""What solvers are predicted to cost, and which one the planner takes: logic, not timings."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax.curvature import Evaluation
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.plan import Cost, Plan, choose_solver
from curvax.plan import cost as costing
from curvax.plan.machine import CPU, GPU, machine
from curvax.solvers import CG, QR, Cholesky, RowSpace, Solver
from curvax.work import StepWork

pytestmark = pytest.mark.fast


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def shapes(*widths: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(pair, jnp.float32) for pair in itertools.pairwise(widths)]


def plan(widths: tuple[int, ...], size: int, **options: Any) -> Plan:
    method = curvax.gauss_newton(predict_fn=mlp, loss=SoftmaxCrossEntropy(), **options)
    batch = {
        "x": jax.ShapeDtypeStruct((size, widths[0]), jnp.float32),
        "y": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    return method.plan_for(shapes(*widths), batch)


def is_row_cg(solver: Solver) -> bool:
    return isinstance(solver, RowSpace) and isinstance(solver.solver, CG)


def is_row_cholesky(solver: Solver) -> bool:
    return isinstance(solver, RowSpace) and isinstance(solver.solver, Cholesky)


def is_row_qr(solver: Solver) -> bool:
    return isinstance(solver, RowSpace) and isinstance(solver.solver, QR)


def predicted(found: Plan) -> dict[str, float]:
    kinds = {"param CG": lambda s: isinstance(s, CG), "row CG": is_row_cg, "row Cholesky": is_row_cholesky,
             "param Cholesky": lambda s: isinstance(s, Cholesky)}  # fmt: skip
    return {name: c.seconds for c in found.candidates for name, fits in kinds.items() if fits(c.solver)}


def test_known_extremes_choose_the_obvious_lane() -> None:
    # Two examples, a hundred iterations: four rows against hundreds of products.
    assert is_row_cholesky(plan((64, 256, 256, 3), 2, maxiter=100, tol=0.0).solver)
    # 9,216 rows are beyond any factorization.
    many = plan((64, 256, 256, 10), 1024)
    assert isinstance(many.solver, CG) or is_row_cg(many.solver)
    # A million parameters that few examples of many outputs see: vectors of row space are the shorter ones.
    assert is_row_cg(plan((64, 1024, 1024, 1000), 16).solver)
    # Four parameters: an exact solve, and one that loses no digits.
    assert is_row_qr(plan((2, 2), 512, maxiter=500, tol=0.0).solver)
    # More than a small fit has.
    assert not is_row_qr(plan((64, 4, 3), 4).solver)


def test_more_rows_parameters_and_iterations_cost_more() -> None:
    base = predicted(plan((64, 128, 128, 10), 32))
    assert set(base) == {"param CG", "row CG", "row Cholesky", "param Cholesky"}
    for other in (plan((64, 128, 128, 10), 64), plan((64, 256, 256, 10), 32), plan((64, 128, 128, 20), 32)):
        more = predicted(other)
        assert all(more[name] > base[name] for name in base)
    longer = predicted(plan((64, 128, 128, 10), 32, maxiter=40))
    assert longer["row CG"] > 1.5 * base["row CG"] and longer["param CG"] > 1.5 * base["param CG"]
    assert longer["row Cholesky"] == base["row Cholesky"]


def test_factorization_grows_with_the_cube_of_the_rows() -> None:
    base = _work(rows=2000)
    one = RowSpace(Cholesky()).solve_cost(base).cost
    two = RowSpace(Cholesky()).solve_cost(dataclasses.replace(base, rows=4000)).cost
    assert two.factorization == 8 * one.factorization
    assert (
        7
        < CPU.seconds(Cost(flops=two.factorization, factorization=two.factorization))
        / CPU.seconds(Cost(flops=one.factorization, factorization=one.factorization))
        < 8
    )


def test_cg_is_not_predicted_to_outlast_the_rank() -> None:
    few = _work(rows=3)
    for solver in (CG(maxiter=100), RowSpace(CG(maxiter=100))):
        stopped, reason = solver.solve_cost(few)
        endless, _ = _without_tolerance(solver).solve_cost(few)
        assert stopped.flops < 0.1 * endless.flops and "the rank being 3" in reason


def test_bytes_come_from_the_cache_as_far_as_it_reaches() -> None:
    small, large = Cost(bytes=1e9, memory=CPU.cache / 2), Cost(bytes=1e9, memory=CPU.cache * 1e3)
    assert CPU.seconds(small) == pytest.approx(1e9 / CPU.cached)
    assert CPU.seconds(large) == pytest.approx(1e9 / CPU.bandwidth, rel=1e-2)
    assert CPU.seconds(Cost(flops=1e9), itemsize=8) == pytest.approx(2 * CPU.seconds(Cost(flops=1e9)))
    assert GPU.seconds(Cost(flops=1e12)) < CPU.seconds(Cost(flops=1e12))
    assert machine() is (CPU if jax.default_backend() == "cpu" else GPU)


def test_loops_launch_as_often_as_they_run_and_elementwise_chains_not_at_all() -> None:
    x = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    one = costing.trace(lambda w: jnp.tanh(w @ w) + 1, x)
    many = costing.trace(lambda w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w) + 1, None), w, None, length=7)[0], x)
    assert one.launches > 0 and many.launches == 7 * one.launches
    assert costing.trace(lambda w: jnp.tanh(w) * 2 + w, x).launches == 0


def test_updates_in_place_move_the_part_alone() -> None:
    whole, part = jax.ShapeDtypeStruct((1000, 1000), jnp.float32), jax.ShapeDtypeStruct((10, 10), jnp.float32)
    cost = costing.trace(lambda w, p: jax.lax.dynamic_update_slice(w, p, (0, 0)), whole, part)
    assert cost.bytes == 2 * 400


def test_explain_shows_every_candidate_with_its_time_and_marks_the_one_taken() -> None:
    found = plan((64, 128, 128, 10), 32)
    lines = [
        line
        for line in found.explain().splitlines()
        if "rows" in line or "iterations" in line or "->" in line or "parameters" in line
    ]
    for each in found.candidates:
        assert any(each.solver.name in line and each.reason in line for line in lines)
    (taken,) = [line for line in lines if "->" in line]
    assert found.solver.name in taken and any(unit in taken for unit in (" us ", " ms ", " s "))
    assert "predicted for a CPU, measured on 2 cores" in found.explain()


def test_a_gradient_from_elsewhere_rules_out_cg_in_row_space() -> None:
    method = curvax.assemble(
        curvature=curvax.curvature.GaussNewton(curvax.curvature.Model(mlp), SquaredError()),
        solver=curvax.solvers.Automatic((RowSpace(CG()), CG())),
    )
    params = shapes(4, 64, 64, 3)
    batch = {"x": jax.ShapeDtypeStruct((2, 4), jnp.float32), "y": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    evaluation = Evaluation(batch)
    assert is_row_cg(choose_solver(method.assembly, params, evaluation).solver)
    # It could not serve; the other one can.
    assert isinstance(choose_solver(method.assembly, params, evaluation, own_gradient=False).solver, CG)

    def step(p: Any, b: Any) -> Any:
        return method.step(p, b, method.init(p), curvature_batch=b)[0]

    zeros = [jnp.zeros(s.shape) for s in params]
    assert jax.tree.structure(jax.eval_shape(step, zeros, batch)) == jax.tree.structure(zeros)


def _work(rows: int) -> StepWork:
    piece = Cost(flops=1e6, bytes=1e6, launches=10)
    return StepWork(
        parameters=1000, leaves=4, itemsize=4, rows=rows, linearize=piece, gradient=piece, product=piece,
        residuals=1000, gram=lambda _: piece,
    )  # fmt: skip


def _without_tolerance(solver: Solver) -> Solver:
    if isinstance(solver, RowSpace):
        return dataclasses.replace(solver, solver=_without_tolerance(solver.solver))
    assert isinstance(solver, CG)
    return dataclasses.replace(solver, tol=0.0)
