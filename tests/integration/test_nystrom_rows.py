"""Row systems by conjugate gradients with a sketch, which stays where it pays, and by the sketch alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.curvature import GaussNewton, Model
from curvax.losses import SquaredError
from curvax.solvers import CG, LowRankRows, NystromCG, Result, RowSpace, System
from tests.integration.harness import assert_close, batch_of, directions, precision, truth_of
from tests.oracle import models
from tests.oracle.compiling import quick_jit

SIZE = 60


def _spectrum(values: np.ndarray) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    return (q * values) @ q.T


def _run(matrix: np.ndarray, solver: NystromCG, steps: int, lam: float = 1e-4):
    with precision("float64"):
        a, b = jnp.asarray(matrix), jnp.asarray(np.random.default_rng(1).standard_normal(SIZE))
        step = quick_jit(lambda state: solver.solve(System(lambda v: a @ v), b, state, jnp.asarray(lam)))
        state, found = solver.init(b), []
        for _ in range(steps):
            solution = step(state)
            state = solution.state
            found.append(solution)
    return found


def test_a_sketch_stays_where_it_pays():
    """Step 0 plain, step 1 with the sketch, then the cheaper one; and every answer is the dense one."""
    matrix = _spectrum(np.concatenate([np.logspace(3, 0, 20), np.full(SIZE - 20, 1e-5)]))
    found = _run(matrix, NystromCG(rank=32, tol=1e-9, maxiter=2000, every=5), 6)
    spent = [int(s.iterations) for s in found]
    assert spent[1] < 0.75 * spent[0]
    assert spent[2] == spent[3] == spent[4] == spent[1] and spent[5] == spent[0]
    want = np.linalg.solve(matrix + 1e-4 * np.eye(SIZE), np.random.default_rng(1).standard_normal(SIZE))
    for solution in found[:2]:
        assert int(solution.result) == Result.CONVERGED
        assert_close(np.asarray(solution.value), want, 1e-5)


def test_a_sketch_that_does_not_pay_is_tried_once_in_a_while():
    flat = _spectrum(np.linspace(1.0, 2.0, SIZE))
    found = _run(flat, NystromCG(rank=32, tol=1e-8, maxiter=100, every=4), 7)
    spent = [int(s.iterations) for s in found]
    assert spent[1] > spent[0] == spent[2] == spent[3] == spent[4] == spent[6] and spent[5] == spent[1]


def test_the_rank_follows_the_damping():
    """Few values above lam take the first block of the sketch, many all of it."""
    for above, columns in ((6, 16), (50, 60)):
        values = np.concatenate([np.full(above, 1e3), np.full(SIZE - above, 1e-9)])
        found = _run(_spectrum(values), NystromCG(rank=64, tol=1e-8, maxiter=50), 2)
        assert columns <= int(found[1].iterations) <= columns + 8


@pytest.mark.parametrize(
    "solver", [NystromCG(rank=8, tol=1e-11, maxiter=200), LowRankRows(rank=200)], ids=["cg", "low rank"]
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_direction_is_the_dense_one(solver, dtype):
    model = models.LINEAR
    with precision(dtype):
        params, batch = model.params(dtype), batch_of(model, "mse", dtype)
        method = curvax.assemble(
            curvature=GaussNewton(Model(model.predict), SquaredError()), solver=RowSpace(solver),
            damping=curvax.damping.Constant(1e-2),
        )  # fmt: skip
        found, _ = directions(method, params, batch, 3)
    with precision("float64"):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, batch))
        want = truth_of(model, "mse", *exact).direction(1e-2)
    for step in found:
        assert_close(step, want, 1e-7 if dtype == "float64" else 1e-2)


def test_too_small_a_rank_makes_the_step_shorter_and_says_so():
    matrix = _spectrum(np.logspace(2, -1, SIZE))
    with precision("float64"):
        a, b = jnp.asarray(matrix), jnp.asarray(np.random.default_rng(1).standard_normal(SIZE))
        solver, system = LowRankRows(rank=10), System(lambda v: a @ v)
        solution = quick_jit(lambda b: solver.solve(system, b, (), jnp.asarray(1e-2)))(b)
        want = np.linalg.solve(matrix + 1e-2 * np.eye(SIZE), np.asarray(b))
    assert np.linalg.norm(solution.value) < np.linalg.norm(want)
    assert float(solution.residual) > 0.1 and np.vdot(b, solution.value) > 0


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        NystromCG(rank=0)
    with pytest.raises(ValueError, match="maxiter must be at least 1"):
        NystromCG(maxiter=0)
    with pytest.raises(ValueError, match="beside which no momentum is kept"):
        RowSpace(NystromCG(), momentum=0.9)
    assert RowSpace(CG(warm_start=False)).init(jnp.zeros(3)) == ()
