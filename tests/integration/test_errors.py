"""Wrong use raises one sentence that names the mistake and, where there is one, the mend."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from tests.integration.harness import batch_of, key, precision
from tests.oracle import models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH


@pytest.fixture(autouse=True)
def _single():
    with precision("float32"):
        yield


def _start(method):
    params = MODEL.params(jnp.float32)
    return params, method.init(params)


def _step(method, batch, params=None, state=None):
    fresh, fresh_state = _start(method)
    return method.step(fresh if params is None else params, batch, fresh_state if state is None else state, key())


def _batch(kind="ce", **changes):
    return {**batch_of(MODEL, kind, jnp.float32), **changes}


def _says(raised, *parts):
    text = str(raised.value).strip().strip("'\"")
    for part in parts:
        assert part.lower() in text.lower(), f"{part!r} is not in: {text}"
    assert len(text) > 20 and "\n" not in text, f"not one sentence: {text}"


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("max_iter", "maxiter"), ("lam", "lam0"), ("learning_rat", "learning_rate"), ("clipnorm", "clip_norm")],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_unknown_keyword_names_the_nearest(option, nearest, by_name):
    wrong: dict[str, Any] = {option: 3}
    with pytest.raises(TypeError) as raised:
        if by_name:
            curvax.make("sgn_ce", predict_fn=MODEL.predict, **wrong)
        else:
            curvax.sgn_ce(predict_fn=MODEL.predict, **wrong)
    _says(raised, option, nearest)


@pytest.mark.fast
def test_unknown_method_names_the_nearest():
    with pytest.raises((KeyError, ValueError)) as raised:
        curvax.make("sng_ce", predict_fn=MODEL.predict)
    _says(raised, "sng_ce", "sgn_ce")


@pytest.mark.parametrize("option", ["lam_policy", "backend", "plan"])
def test_unknown_choice_lists_the_choices(option):
    wrong: dict[str, Any] = {option: "nonsense"}
    with pytest.raises((TypeError, ValueError)) as raised:
        curvax.sgn_ce(predict_fn=MODEL.predict, **wrong)
    _says(raised, "nonsense")


@pytest.mark.parametrize("option", [{"lam0": -1.0}, {"maxiter": 0}, {"tol": -1.0}, {"microbatch_size": 0}])
def test_impossible_values(option):
    with pytest.raises((TypeError, ValueError)) as raised:
        curvax.sgn_ce(predict_fn=MODEL.predict, **option)
    _says(raised, next(iter(option)))


def test_unknown_trust_region_option_names_the_nearest():
    with pytest.raises(TypeError) as raised:
        curvax.sgn_ce(predict_fn=MODEL.predict, lam_policy="trust_region", lam_kwargs={"evry": 5})
    _says(raised, "evry", "every")


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce", "sophia_g"])
@pytest.mark.parametrize(
    "labels",
    [np.zeros(5, np.int32), np.zeros((6, 2), np.float32), np.zeros((6, 1), np.int32), np.zeros(6, np.float32)],
    ids=["short", "classes", "column", "float"],
)
def test_wrong_labels(name, labels):
    with pytest.raises((TypeError, ValueError)) as raised:
        _step(getattr(curvax, name)(predict_fn=MODEL.predict), _batch(y=jnp.asarray(labels)))
    _says(raised, str(labels.shape) if labels.shape != (6,) else "float")


@pytest.mark.parametrize("name", ["sgn_mse", "egn_mse", "egn_mse_cg"])
def test_wrong_targets(name):
    with pytest.raises((TypeError, ValueError)) as raised:
        _step(getattr(curvax, name)(predict_fn=MODEL.predict), _batch("mse", y=jnp.zeros((6, 3))))
    _says(raised, "(6, 3)", "(6, 4)")


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sgn_ce", "egn_mse", "sophia_g"])
@pytest.mark.parametrize("missing", ["x", "y"])
def test_batch_without_its_keys(name, missing):
    batch = _batch("mse" if "mse" in name else "ce")
    batch["other"] = batch.pop(missing)
    with pytest.raises(KeyError) as raised:
        _step(getattr(curvax, name)(predict_fn=MODEL.predict), batch)
    _says(raised, f"'{missing}'", "other")


def test_batch_without_its_weights():
    with pytest.raises(KeyError) as raised:
        _step(curvax.sgn_ce(predict_fn=MODEL.predict, weight_key="w"), _batch())
    _says(raised, "'w'", "weight_key")


@pytest.mark.parametrize("shape", [(5,), (6, 2), (6, 4, 1)])
def test_wrong_weight_shape(shape):
    with pytest.raises((TypeError, ValueError)) as raised:
        _step(curvax.sgn_ce(predict_fn=MODEL.predict, weight_key="w"), _batch(w=jnp.ones(shape)))
    _says(raised, "weight", str(shape))


def test_batch_that_is_no_mapping():
    batch = _batch()
    with pytest.raises(TypeError) as raised:
        _step(curvax.sgn_ce(predict_fn=MODEL.predict), (batch["x"], batch["y"]))
    _says(raised, "mapping", "tuple")


def test_row_lane_with_a_hessian():
    def loss_fn(params, batch):
        return jnp.mean(MODEL.predict(params, batch["x"]) ** 2)

    hessian = curvax.curvature.Hessian(curvax.curvature.LossFunction(loss_fn))
    solver = curvax.solvers.RowSpace(curvax.solvers.Cholesky())
    with pytest.raises((TypeError, ValueError)) as raised:
        _step(curvax.assemble(curvature=hessian, solver=solver), _batch())
    _says(raised, "row")


def test_loss_function_that_is_not_a_scalar():
    def loss_fn(params, batch):
        return jnp.mean(MODEL.predict(params, batch["x"]) ** 2, axis=-1)

    with pytest.raises((TypeError, ValueError)) as raised:
        _step(curvax.newton_cg(loss_fn=loss_fn), _batch())
    _says(raised, "scalar")


def test_model_that_returns_a_tuple():
    def predict(params, x):
        return MODEL.predict(params, x), {"aux": x}

    with pytest.raises((TypeError, ValueError)) as raised:
        _step(curvax.sgn_ce(predict_fn=predict), _batch())
    _says(raised, "has_aux")


@pytest.mark.parametrize(
    "kind", [lambda o: (o, o), lambda o: [o, o], lambda o: {"a": o, "b": o}, lambda o: jnp.argmax(o, -1)]
)
def test_outputs_that_are_no_array(kind):
    """One sentence, whoever asks the model: a method, its plan, or a function of `structure`."""
    params, batch, loss = MODEL.params(jnp.float32), _batch(), SoftmaxCrossEntropy()

    def predict(p, x):
        return kind(MODEL.predict(p, x))

    problem = (predict, loss, params, batch["x"], batch["y"])
    asked = [
        lambda: _step(curvax.sgn_ce(predict_fn=predict), batch),
        lambda: curvax.kfac(predict_fn=predict, loss=loss).init(params, batch=batch),
        lambda: curvax.structure.report(predict, params, batch["x"]),
        lambda: curvax.structure.jacobian_gram(predict, params, batch["x"]),
        lambda: curvax.structure.ggn_diagonal(*problem),
        lambda: curvax.structure.empirical_fisher_diagonal(*problem),
        lambda: curvax.structure.per_example_gradient_norms(*problem),
    ]
    for ask in asked:
        with pytest.raises(TypeError) as raised:
            ask()
        _says(raised, "predict_fn", "array")


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("rng", [3, jnp.asarray(3), jnp.asarray([1, 2]), 0.5, "key"], ids=str)
def test_a_key_that_is_none(rng, jitted):
    """A number is no key, whether JAX has made an array of it or not."""
    method = curvax.sophia_g(predict_fn=MODEL.predict)
    params, state = _start(method)
    step = (lambda *arguments: jax.eval_shape(method.step, *arguments)) if jitted else method.step
    if jitted and isinstance(rng, str):
        return
    with pytest.raises(TypeError, match=r"rng must be a random key such as jax\.random\.key\(0\), not an? "):
        step(params, _batch(), state, rng)
    for real in (jax.random.key(0), jax.random.PRNGKey(0)):
        jax.eval_shape(method.step, params, _batch(), state, real)


@pytest.mark.parametrize("how", ["leaf", "shape", "dtype"])
def test_state_of_other_parameters(how):
    method = curvax.sgn_ce(predict_fn=MODEL.predict, warm_start=True)
    params = MODEL.params(jnp.float32)
    other = {
        "leaf": lambda: [*params, {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}],
        "shape": lambda: models.MLP_RELU.params(jnp.float32),
        "dtype": lambda: MODEL.params(jnp.bfloat16),
    }[how]()
    with pytest.raises((TypeError, ValueError)) as raised:
        quick_jit(method.step)(params, _batch(), method.init(other), key())
    _says(raised, "state", "init")


SAME_MODEL = {
    "param": lambda **k: curvax.sgn_mse(predict_fn=MODEL.predict, **k),
    "row": lambda **k: curvax.egn_mse(predict_fn=MODEL.predict, **k),
    "diagonal": lambda **k: curvax.sophia_g(predict_fn=MODEL.predict, loss=curvax.losses.SquaredError(), **k),
    "layers": lambda **k: curvax.kfac(predict_fn=MODEL.predict, loss=curvax.losses.SquaredError(), **k),
    "other layers": lambda **k: curvax.ekfac(predict_fn=MODEL.predict, loss=curvax.losses.SquaredError(), **k),
    "automatic": lambda **k: curvax.gauss_newton(predict_fn=MODEL.predict, loss=curvax.losses.SquaredError(), **k),
}
OTHER_OPTIONS = {
    "damping": {"lam_policy": "const"},
    "momentum": {"direction_momentum": 0.9},
    "schedule": {"learning_rate": optax.constant_schedule(0.1)},
    "chain": {"tx": optax.adam(0.1)},
    "preconditioner": {"precond": "diag_direct"},
    "average": {"precond": "diag_ema"},
    "cold start": {"warm_start": False},
}


@pytest.mark.parametrize("own", list(SAME_MODEL))
@pytest.mark.parametrize("other", list(SAME_MODEL))
def test_state_of_another_method(own, other):
    if own == other:
        return
    method, batch = SAME_MODEL[own](), _batch("mse")
    params = MODEL.params(jnp.float32)
    with pytest.raises(ValueError) as raised:
        method.step(params, batch, SAME_MODEL[other]().init(params, batch=batch), key())
    _says(raised, "another method", "init")


@pytest.mark.parametrize("which", list(OTHER_OPTIONS))
def test_state_of_the_same_method_with_another_chain(which):
    params = MODEL.params(jnp.float32)
    plain, changed = SAME_MODEL["param"](), SAME_MODEL["param"](**OTHER_OPTIONS[which])
    for method, state in ((plain, changed.init(params)), (changed, plain.init(params))):
        with pytest.raises(ValueError) as raised:
            quick_jit(method.step)(params, _batch("mse"), state, key())
        _says(raised, "another method", "init")


def test_model_state_in_another_form():
    """Boxed on the way in and plain on the way out, or the other way round."""

    def predict(params, x, state):
        return MODEL.predict(params, x), state["box"] if isinstance(state["box"], dict) else {"box": state["box"]}

    method = curvax.sgn_ce(predict_fn=predict, has_state=True)
    params = MODEL.params(jnp.float32)
    state = method.init(params, model_state={"box": {"mean": jnp.zeros(3)}})
    with pytest.raises(TypeError) as raised:
        method.step(params, _batch(), state, key())
    _says(raised, "['box']['mean']", "whole new state", "containers of the old one")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("gradient_nrom", "'gradient_norm'"), ("LOSS", "'loss'"), ("cg_iters", "'iterations'"), ("qqq", "Known:")],
)
def test_unknown_metric_names_the_nearest(name, nearest):
    with pytest.raises(ValueError) as raised:
        curvax.telemetry.MetricRecord(name)
    _says(raised, name, nearest)


def test_a_metric_that_is_no_record():
    metrics: Any = ("gradient_norm",)
    with pytest.raises(TypeError) as raised:
        curvax.sgn_ce(predict_fn=MODEL.predict, metrics=metrics)
    _says(raised, "gradient_norm", "Record")


@pytest.mark.parametrize("rates", [(None, {}), ("0.1", {}), (-0.1, {}), (0.1, {"weight_decay": -1.0})])
@pytest.mark.parametrize("name", ["soap", "shampoo", "muon_adamw"])
def test_rates_that_are_none(name, rates):
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(curvax.optimizers, name)(rates[0], **rates[1])
    _says(raised, next(iter(rates[1]), "learning_rate"))


def test_momentum_that_is_none():
    with pytest.raises(ValueError) as raised:
        curvax.optimizers.shampoo(0.1, momentum=1.0)
    _says(raised, "momentum", "[0, 1)")


def test_parameters_that_are_no_arrays():
    with pytest.raises(TypeError) as raised:
        curvax.sgn_ce(predict_fn=MODEL.predict).init({"w": jnp.ones((3, 4)), "name": "dense"})
    _says(raised, "name", "array")


def test_random_model_without_a_key():
    def predict(params, x, rng):
        return MODEL.predict(params, x)

    method = curvax.sgn_ce(predict_fn=predict, has_rng=True)
    params, state = _start(method)
    with pytest.raises((TypeError, ValueError)) as raised:
        method.step(params, _batch(), state, None)
    _says(raised, "key", "rng")


def test_frozen_mask_that_does_not_fit():
    with pytest.raises((TypeError, ValueError)) as raised:
        curvax.sgn_ce(predict_fn=MODEL.predict, frozen={"nothing": True}).init(MODEL.params(jnp.float32))
    _says(raised, "frozen")


def test_everything_frozen():
    with pytest.raises(ValueError) as raised:
        _step(curvax.sgn_ce(predict_fn=MODEL.predict, frozen=True), _batch())
    _says(raised, "trainable")


def test_positional_arguments_are_refused():
    preset: Any = curvax.sgn_ce
    with pytest.raises(TypeError, match="keyword"):
        preset(MODEL.predict)


def _of_params(p):
    return jnp.sum(p)


SLIPS = {
    "loss_fn is called as loss_fn(params, batch), and this one takes (p)": ("newton_cg", {"loss_fn": _of_params}),
    "predict_fn is called as predict_fn(params, inputs), and this one takes (p)": ("egn", {"predict_fn": _of_params}),
    "write lam0= for a number or a schedule, and lam_policy=": ("egn", {"damping": 0.1}),
    "take sgn, newton_cg, newton_direct or ggn_direct_*": ("kfac", {"lam_policy": "radius"}),
    "give lam_policy='const' with lam0= and no search": ("vmc", {"search": curvax.search.GridSearch()}),
    "write predict_fn=, a function of (params, inputs)": ("egn", {"model": _of_params}),
    "write predict_fn= and loss=, or take newton_cg": ("egn", {"loss_fn": _of_params}),
    "write learning_rate=, a number": ("kfac", {"lr": 0.1}),
    "write tx=, an Optax chain": ("sgn", {"optimizer": optax.sgd(0.1)}),
    "write direction_momentum=": ("sgn", {"momentum": 0.9}),
    "the random key goes to step": ("kfac", {"seed": 0}),
    "each preset has its own: take": ("egn", {"solver": "cg"}),
    "lam0 has the shape (3,): pass one number": ("egn", {"lam0": jnp.ones(3)}),
    "lam_policy is the class TrustRegion: pass an instance": ("egn", {"lam_policy": curvax.damping.TrustRegion}),
    "lam_kwargs is an int: pass a mapping": ("egn", {"lam_kwargs": 3}),
    "precond is the class KFAC: pass an instance": ("sgn", {"precond": curvax.preconditioners.KFAC}),
    "estimator is an int": ("sgn", {"precond": "ema", "estimator": 3}),
    "inverse is a str: pass a curvax.preconditioners.FactorInverse": ("kfac", {"inverse": "cholesky"}),
    "fisher is a str": ("egn", {"fisher": "mc"}),
    "sharing is a str: pass a curvax.structure.WeightSharing": ("ekfac", {"sharing": "reduce"}),
    "tx is a function: pass an Optax transformation, called: sgd(...)": ("egn", {"tx": optax.sgd}),
    "clip_norm must be positive": ("egn", {"clip_norm": -1.0}),
    "direction_momentum must be in [0, 1)": ("egn", {"direction_momentum": 2.0}),
    "weight_decay is a str: pass a number": ("egn", {"weight_decay": "1e-4"}),
    "microbatch_size is a float: pass a whole number": ("egn", {"microbatch_size": 2.0}),
    "max_bytes is a str": ("egn", {"max_bytes": "2GB"}),
    "warm_start is a str: pass True or False": ("sgn", {"warm_start": "yes"}),
    "stop is a bool: pass a curvax.solvers.MartensStop": ("sgn", {"stop": True}),
    "gamma is a str: pass a number": ("sophia_g", {"gamma": "x"}),
}


@pytest.mark.parametrize("words", list(SLIPS))
def test_slips_in_keywords_are_told_in_a_sentence(words):
    name, option = SLIPS[words]
    model = {"predict_fn": lambda p, x: x @ p["w"]} if name != "newton_cg" else {}
    model |= {"loss": SquaredError()} if name not in ("newton_cg", "vmc") else {}
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        curvax.make(name, **{**model, **option})


def test_one_metric_is_as_good_as_a_tuple_of_it():
    record = curvax.telemetry.MetricRecord(curvax.telemetry.Metric.GRADIENT_NORM)
    one, several = (
        curvax.egn(predict_fn=lambda p, x: x @ p["w"], loss=SquaredError(), metrics=m) for m in (record, (record,))
    )
    assert one.plan.explain() == several.plan.explain()
