"""What a release still takes under a former name."""

from __future__ import annotations

import importlib.metadata

import pytest

import curvax
from curvax import deprecation
from curvax.solvers import CG

pytestmark = pytest.mark.fast


def test_the_former_name_of_the_transforms_warns_and_works() -> None:
    with pytest.warns(DeprecationWarning, match=r"curvax\.optax\.scale_by_ggn is curvax\.transforms\.scale_by_ggn now"):
        former = curvax.optax.scale_by_ggn
    assert former is curvax.transforms.scale_by_ggn
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = curvax.optax.no_such_thing


def test_a_name_of_a_module_that_has_another_now() -> None:
    attribute = deprecation.former_names("curvax.telemetry", {"Record": "curvax.telemetry.MetricRecord"})
    with pytest.warns(
        DeprecationWarning, match=r"curvax\.telemetry\.Record is curvax\.telemetry\.MetricRecord now"
    ) as seen:
        assert attribute("Record") is curvax.telemetry.MetricRecord
    assert seen[0].filename == __file__, "the warning points to who asked"
    with pytest.raises(AttributeError, match=r"module 'curvax\.telemetry' has no attribute 'Recrd'"):
        attribute("Recrd")


def test_somax_spellings_of_keywords() -> None:
    def predict(params, x):
        return x @ params["w"]

    method = curvax.make(
        "sgn_ce", predict_fn=predict, stabilise_every=7, lam_policy="trust_region", lam_kwargs={"every_k": 3}
    )
    solver = method.assembly.solver
    assert isinstance(solver, CG) and solver.stabilize_every == 7
    assert method.assembly.damping.evaluate_every == 3
    with pytest.raises(TypeError, match="stabilise_every and stabilize_every are one thing"):
        curvax.make("sgn_ce", predict_fn=predict, stabilise_every=7, stabilize_every=7)
    with pytest.raises(TypeError, match="every_k and every are one thing"):
        curvax.make("sgn_ce", predict_fn=predict, lam_policy="trust_region", lam_kwargs={"every_k": 3, "every": 3})


def test_one_version() -> None:
    assert curvax.__version__ == importlib.metadata.version("curvax")
