"""The benchmarks run, and their rows survive being written."""

from __future__ import annotations

import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from bench import run, schema
from bench.suites import kernels, plan, steps
from bench.workloads import CNN, MLP, SMALL


@pytest.mark.parametrize("suite", [steps, plan, kernels], ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_quick_run_gives_rows(suite, tmp_path):
    only = {"kernels": "dots, leaf_270k"}.get(suite.SUITE, "")
    # python-somax relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        rows = [row for case in suite.run_suite(quick=True, only=only) for row in case]
    assert rows and all(row.p20 <= row.p50 <= row.p80 for row in rows)
    assert any(row.ratio is not None for row in rows)
    assert schema.read(schema.write(rows, suite.SUITE, tmp_path)) == rows
    assert all(row.provider in schema.table(rows) for row in rows)


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
