"""Conjugate gradients on one raveled vector: when the plan asks for it, and that the answer does not change."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.estimators import Hutchinson
from curvax.execute import step as step_module
from curvax.kernels import Choice, Request
from curvax.plan import flat_vectors, planner
from curvax.preconditioners import Jacobi
from curvax.solvers import CG
from curvax.solvers.conjugate_gradient import MartensStop
from tests.integration import presets
from tests.integration.harness import assert_close, batch_of, directions, precision, standard_truth
from tests.oracle import models

LAM = 1e-2
REFERENCE = (Choice("dots", "reference", "auto"),)
CASES = {
    "warm": {},
    "cold": {"warm_start": False},
    "martens": {"stop": MartensStop(1e-9)},
    "residual refreshed": {"stabilize_every": 4},
}


def always(choices: object, params: object) -> str:
    del choices, params
    return "asked for by the test"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_raveling_changes_nothing_but_the_layout(case, preconditioned, monkeypatch):
    preset = presets.BY_NAME["sgn_ce"]
    model = models.MLP_TANH
    with precision("float64"):
        params, batch = model.params(), batch_of(model, preset.kind, "float64")
        method = preset.make(model, lam0=LAM, tol=1e-11, maxiter=300)
        changes: dict[str, Any] = {"solver": dataclasses.replace(CG(tol=1e-11, maxiter=300), **CASES[case])}
        if preconditioned:
            changes["preconditioner"] = Jacobi(Hutchinson(8))
        method = dataclasses.replace(method, assembly=dataclasses.replace(method.assembly, **changes))
        tree, tree_infos = directions(method, params, batch, 2)
        monkeypatch.setattr(step_module, "flat_vectors", always)
        flat, flat_infos = directions(method, params, batch, 2)
    # Martens' rule may stop an iteration sooner or later where rounding differs.
    tolerance = 1e-5 if case == "martens" else 1e-9
    for a, b, i, j in zip(tree, flat, tree_infos, flat_infos, strict=True):
        assert_close(b, a, tolerance)
        # Sums in another order; many iterations of a hard system feel it.
        assert abs(int(i["iterations"]) - int(j["iterations"])) <= 1 + int(i["iterations"]) // 10
    assert_close(flat[0], standard_truth(model, preset.kind).direction(LAM), 10 * tolerance)


def on(platform: str, devices: int, dtypes: tuple, shapes: tuple) -> object:
    """Stands in for `Request`: whatever the operands, this request."""
    request = Request(platform, devices, tuple(np.dtype(d) for d in dtypes), shapes, (9, 0))
    return type("Stub", (), {"of": staticmethod(lambda *trees: request)})


SMALL = ((64, 64), (64,), (64, 10))
ONE = (np.float32,)


@pytest.mark.parametrize(
    ("platform", "devices", "dtypes", "shapes", "expected"),
    [
        ("gpu", 1, ONE, SMALL, True),
        ("cpu", 1, ONE, SMALL, False),
        ("gpu", 8, ONE, SMALL, False),
        ("gpu", 1, (np.float32, np.float64), SMALL, False),
        ("gpu", 1, ONE, ((64,),), False),
        ("gpu", 1, ONE, ((4096, 4096), (4096,)), False),
        ("gpu", 1, ONE, (), False),
    ],
)
def test_only_small_unsharded_leaves_on_a_gpu_are_raveled(monkeypatch, platform, devices, dtypes, shapes, expected):
    monkeypatch.setattr(planner, "Request", on(platform, devices, dtypes, shapes))
    assert (flat_vectors(REFERENCE, jnp.zeros(3)) is not None) == expected
    assert flat_vectors((), jnp.zeros(3)) is None
    assert flat_vectors((Choice("dots", "native", "by name"),), jnp.zeros(3)) is None


def test_the_plan_says_so(monkeypatch):
    method = curvax.sgn_ce(predict_fn=lambda p, x: x @ p["w"] + p["b"], backend="reference")
    params = {"w": jnp.zeros((5, 3)), "b": jnp.zeros(3)}
    batch = {"x": jnp.zeros((4, 5)), "y": jnp.zeros(4, jnp.int32)}
    assert "raveled" not in method.plan_for(params, batch).explain()
    monkeypatch.setattr(planner, "Request", on("gpu", 1, ONE, tuple(x.shape for x in jax.tree.leaves(params))))
    assert "the 2 leaves are raveled" in method.plan_for(params, batch).explain()
