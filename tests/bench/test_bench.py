"""The benchmarks run, and their rows survive being written."""

from __future__ import annotations

import dataclasses

import bench.run as run
import bench.schema as schema
import jax
import numpy as np
import pytest
from bench.generic import without_structure
from bench.suites import estimators, kernels, kronecker, lanes, layerwise, linalg, plan, steps, structure
from bench.suites import growth as step_growth
from bench.suites.layerwise.contenders import CONTENDERS
from bench.suites.structure import growth
from bench.workloads import CNN, MLP, SMALL

import curvax
from curvax.solvers import Automatic
from tests.oracle.compiling import quick_jit

SUITES = (steps, plan, kernels, structure, linalg, estimators, kronecker)
ONLY = {
    "kernels": "dots, leaf_270k",
    "structure": "exact GGN diagonal",
    "linalg": "cholesky, float32",
    "estimators": "low rank, fast",
    "kronecker": "Muon",
}


@pytest.mark.parametrize("suite", SUITES, ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_quick_run_gives_rows(suite, tmp_path):
    only = ONLY.get(suite.SUITE, "")
    # python-somax relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        rows = [row for case in suite.run_suite(quick=True, only=only) for row in case]
    assert rows and all(row.p20 <= row.p50 <= row.p80 for row in rows)
    assert any(row.ratio is not None for row in rows)
    assert schema.read(schema.write(rows, suite.SUITE, tmp_path)) == rows
    assert all(row.provider in schema.table(rows) for row in rows)


def test_layerwise_study_reaches_its_target_and_says_in_how_many_steps():
    """A target just below the checkpoint's loss, one method; Optax relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        setting = dataclasses.replace(layerwise.QUICK, size="tiny", checkpoint=3, target=100.0)
        with pytest.raises(ValueError, match="set a lower target"):
            layerwise.Study(setting)
        study = layerwise.Study(dataclasses.replace(setting, target=0.0))
        study.setting = dataclasses.replace(setting, target=study.start - 0.02)
        adamw = next(c for c in CONTENDERS if c.name == "adamw")
        rows = [row for found in layerwise.compare(study, "case", (adamw,)) for row in found]
    found = {row.metric: row.p50 for row in rows}
    # How many steps it takes is the optimizer's business; none, or more than allowed, would be the study's mistake.
    assert 1 <= found["steps"] <= setting.steps
    assert found["tokens"] == found["steps"] * setting.tokens
    assert found["test loss"] <= study.setting.target


def test_update_replaces_the_cases_that_were_run(tmp_path):
    old = [schema.Row("s", case, "p", "m", x, 1.0, 1.0, 1.0) for case, x in (("a", "x"), ("b", "x"), ("a", "y"))]
    new = [dataclasses.replace(old[0], p50=2.0)]
    schema.write(old, "s", tmp_path)
    assert schema.read(schema.update(new, "s", tmp_path)) == [*old[1:], new[0]]
    assert schema.read(schema.update(new, "t", tmp_path)) == new


def test_workload_outputs():
    for work in (MLP, CNN, SMALL):
        batch = work.batch(4)
        assert work.predict(work.params(), batch["x"]).shape == (4, work.outputs)
    assert MLP.size == 269_322


def test_ratio_is_paired():
    once = run.Candidate("a", lambda c: c, lambda: 0)
    base = run.Timing(once, np.asarray([1.0, 2.0, 4.0]))
    twice = run.Timing(once, base.seconds * 2)
    assert run.ratio(twice, base) == 2.0


def test_lanes_cover_a_grid_and_every_candidate():
    cases = list(lanes.cases())
    assert len({(case.name, case.batch) for case in cases}) == len(cases) >= 40
    solver = lanes.automatic(SMALL, curvax.losses.SoftmaxCrossEntropy()).assembly.solver
    assert isinstance(solver, Automatic)
    assert {lanes.provider(each) for each in solver.candidates} >= set(lanes.methods(SMALL, "cross entropy"))


def test_growth_is_the_slope_in_logarithms():
    rows = [
        schema.Row("s", "egn_ce, mlp 784-8-8-3", "curvax", "ms/step", f"batch {b}", 0, 0.5 * b**2, 1)
        for b in (8, 16, 64)
    ]
    ((found,),) = growth.tables("s", rows)
    assert found.p50 == pytest.approx(2.0) and found.x == "batch 8 to 64"


def test_growth_of_a_step_sweeps_one_size_at_a_time_and_its_table_has_exponents_first():
    for axis, points in step_growth.sweeps().items():
        assert [p.size for p in points] == sorted({p.size for p in points}) and len(points) > 4
        same = {"batch": lambda p: p.batch, "iterations": lambda p: p.iterations}.get(axis, lambda p: p.work.name)
        assert len({same(p) for p in points}) == len(points)
        assert sum(len({of(p) for p in points}) > 1 for of in (lambda p: p.batch, lambda p: p.iterations)) == (
            axis in ("batch", "iterations")
        )
    rows = [
        [schema.Row("growth", "batch", "kfac", metric, str(n), 1.0, 3.0 * n**power, 9e9) for metric, power in sizes]
        for n in (8, 16, 32, 64)
        for sizes in [(("ms/step", 2), ("MiB temp", 1))]
    ]
    fitted = list(step_growth._exponents("batch", rows))
    assert [row.p50 for row in fitted] == pytest.approx([2.0, 1.0]) and {row.x for row in fitted} == {"16 to 64"}
    text = list(step_growth.table([row for group in rows for row in group] + fitted))
    assert text[2] == "| batch | ms/step | 2.00 |" and "| 64 | 1.23e+04 / 192 / - |  |" in text


def test_generic_route_is_the_same_method():
    batch, params = SMALL.batch(6), SMALL.params()
    method = curvax.egn_ce(predict_fn=SMALL.predict, lam0=0.1)
    ours, _, _ = quick_jit(method.step)(params, batch, method.init(params))
    generic = without_structure(method)
    theirs, _, _ = quick_jit(generic.step)(params, batch, generic.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
