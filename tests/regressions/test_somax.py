"""Names that python-somax 1.0.1 takes: curvax takes them too, or says in one sentence what to write instead."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import pytest

import curvax
from curvax.damping import Constant, TrustRegion
from curvax.estimators import GaussNewtonBartlett, Hutchinson
from curvax.preconditioners import EmaDiagonal, IdentityPreconditioner, Jacobi
from curvax.solvers import Lane
from tests.integration.harness import batch_of, key, precision, same_bits
from tests.oracle import models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "somax.md"


def _sgn(**options: Any) -> Any:
    return curvax.sgn_ce(predict_fn=MODEL.predict, **options)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        *((name, TrustRegion) for name in ("trust_region", "tr", "lm", "levenberg_marquardt", "TR", "LM")),
        *((name, Constant) for name in ("const", "constant", "fixed", "CONST")),
    ],
)
@pytest.mark.parametrize("preset", ["sgn_ce", "egn_mse", "newton_cg", "kfac", "gauss_newton"])
def test_every_name_of_a_damping_policy(preset, policy, kind):
    given: dict[str, Any] = {"loss_fn": lambda p, b: jnp.zeros(())} if preset == "newton_cg" else {}
    given |= {} if preset == "newton_cg" else {"predict_fn": MODEL.predict}
    given |= {"loss": curvax.losses.SoftmaxCrossEntropy()} if preset in ("kfac", "gauss_newton") else {}
    method = getattr(curvax, preset)(lam_policy=policy, lam0=0.25, **given)
    assert type(method.assembly.damping) is kind and method.assembly.damping.lam0 == 0.25
    if preset == "kfac" and kind is TrustRegion:
        assert method.assembly.damping.inc == (20 / 19) ** 5, "K-FAC's own trust region, by whichever name"


@pytest.mark.parametrize(
    ("name", "kind"), [("hutchinson", Hutchinson), ("hutch", Hutchinson), ("gnb", GaussNewtonBartlett),
                       ("gnb_ce", GaussNewtonBartlett), ("GaussNewtonBartlett", GaussNewtonBartlett)]
)  # fmt: skip
def test_every_name_of_an_estimator(name, kind):
    assert isinstance(_sgn(estimator=name, precond="direct").assembly.preconditioner.estimator, kind)


@pytest.mark.parametrize(
    ("name", "kind"), [("diag_direct", Jacobi), ("direct", Jacobi), ("diag_ema", EmaDiagonal), ("ema", EmaDiagonal),
                       ("EMA", EmaDiagonal), ("none", IdentityPreconditioner), ("identity", IdentityPreconditioner)]
)  # fmt: skip
def test_every_name_of_a_preconditioner(name, kind):
    assert type(_sgn(precond=name).assembly.preconditioner) is kind


@pytest.mark.parametrize("add", [True, False])
def test_damping_in_the_diagonal_by_either_name(add):
    for word in ("add_lambda", "add_lam"):
        assert _sgn(precond="direct", precond_kwargs={word: add}).assembly.preconditioner.add_lam is add


REFUSED = {
    "rho_clip": {"lam_policy": "tr", "lam_kwargs": {"rho_clip": 5.0}},
    "dtype": {"lam_policy": "tr", "lam_kwargs": {"dtype": jnp.float32}},
    "eps": {"precond": "direct", "precond_kwargs": {"eps": 1e-8}},
    "clip_nonneg": {"precond": "direct", "precond_kwargs": {"clip_nonneg": True}},
    "beta1": {"precond": "ema", "precond_kwargs": {"beta1": 0.9}},
    "add_lambda": {"precond": "ema", "precond_kwargs": {"add_lambda": True}},
    "diag_fn": {"precond": "ema", "precond_kwargs": {"diag_fn": None}},
}


@pytest.mark.parametrize("word", list(REFUSED))
def test_what_is_not_taken_says_what_to_write_instead(word):
    with pytest.raises(TypeError) as raised:
        _sgn(**REFUSED[word])
    text = str(raised.value)
    assert word in text and ("drop it" in text or "pass" in text) and "Did you mean" not in text
    assert f"`{word}`" in DOCUMENT.read_text(), "and the page for Somax's users lists it"


def test_estimator_dtype_says_what_to_write_instead():
    with pytest.raises(TypeError, match="drop it"):
        _sgn(precond="direct", estimator="hutch", estimator_kwargs={"dtype": jnp.float32})


def test_presets_by_name_in_any_case():
    assert curvax.make("SGN_CE", predict_fn=MODEL.predict).plan == _sgn().plan
    assert curvax.describe("Egn_Mse").name == "egn_mse"


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_an_unknown_preset_is_a_missing_key(error):
    for call in (curvax.make, curvax.describe):
        with pytest.raises(error) as raised:
            call("sng_ce")
        assert str(raised.value) == "there is no method 'sng_ce'. Did you mean 'sgn_ce'?"


@pytest.mark.parametrize(("name", "lane"), [("sgn_ce", "param"), ("egn_ce", "row"), ("sophia_g", "diag")])
def test_lanes_compare_with_strings(name, lane):
    found = getattr(curvax, name)(predict_fn=MODEL.predict).plan.lane
    assert found == lane and found is Lane(lane) and f"lane {lane}" in f"lane {found}"


def test_weight_decay_masks_have_one_name_everywhere():
    mask = [{"w": True, "b": False}] * 2
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        results = []
        for word in ("mask", "weight_decay_mask"):
            given: dict[str, Any] = {word: mask}
            method = curvax.sophia_g(predict_fn=MODEL.predict, weight_decay=0.5, learning_rate=0.1, **given)
            results.append(quick_jit(method.step)(params, batch, method.init(params), key())[0])
    assert same_bits(*results)
    with pytest.raises(ValueError, match="weight_decay_mask alone"):
        curvax.sophia_g(predict_fn=MODEL.predict, mask=mask, weight_decay_mask=mask)


@pytest.mark.parametrize(
    ("name", "word", "instead"),
    [
        ("sophia_g", "clip_norm", "clip_value="),
        ("egn_ce", "mask", "weight_decay_mask"),
    ],
)
def test_a_keyword_of_other_presets_says_what_to_write(name, word, instead):
    with pytest.raises(TypeError) as raised:
        getattr(curvax, name)(predict_fn=MODEL.predict, **{word: 1.0})
    assert word in str(raised.value) and instead in str(raised.value)
