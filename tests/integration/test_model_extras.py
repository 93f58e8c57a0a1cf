"""What a model may take and return beside parameters and inputs, parts that do not train, batches in pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.integration import presets
from tests.integration.harness import (
    TOLERANCE,
    all_finite,
    assert_close,
    batch_of,
    directions,
    key,
    moved,
    precision,
    standard_truth,
    truth_of,
)
from tests.oracle import dense, losses, models
from tests.oracle.compiling import quick_jit

pytestmark = pytest.mark.filterwarnings("ignore:the model's examples interact")

MODEL = models.MLP_TANH
CG = {"tol": 1e-12, "maxiter": 500}
LANES = {"sgn_ce": CG, "egn_ce": {}, "ggn_direct_ce": {}, "sophia_g": {}}
LAM = 0.1


def _options(name):
    return {**LANES[name], **({"lam0": LAM} if name != "sophia_g" else {"learning_rate": 0.1})}


def _stateful(params, x, running):
    """Normalizes by statistics kept in the state, and moves them toward the batch's own mean."""
    out = MODEL.predict(params, x - running["mean"])
    moved_mean = 0.9 * running["mean"] + 0.1 * jnp.mean(x, axis=0)
    return out, {"mean": moved_mean, "count": running["count"] + 1}


@pytest.mark.parametrize("name", list(LANES))
def test_model_state_moves_once_per_step_and_enters_the_direction(name):
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        running = {"mean": jnp.asarray([0.3, -0.2, 0.1]), "count": jnp.asarray(0, jnp.int32)}
        method = getattr(curvax, name)(predict_fn=_stateful, has_state=True, **_options(name))
        step, state = quick_jit(method.step), method.init(params, model_state=running)
        new, state, _info = step(params, batch, state, key())
        want_mean = 0.9 * np.asarray(running["mean"]) + 0.1 * np.asarray(batch["x"]).mean(0)
        np.testing.assert_allclose(state.model_state["mean"], want_mean, rtol=1e-12)
        assert int(state.model_state["count"]) == 1
        if name != "sophia_g":
            mean = np.asarray(running["mean"])
            truth = dense.truth(
                lambda p, x: MODEL.predict(p, x - mean), losses.softmax_cross_entropy, params, batch["x"], batch["y"]
            )
            assert_close(moved(params, new), truth.direction(LAM), TOLERANCE["float64"])
        _, state, _ = step(new, batch, state, key())
        assert int(state.model_state["count"]) == 2


@pytest.mark.parametrize("name", ["sgn_ce", "sophia_g", "full_gn"])
@pytest.mark.parametrize("size", [None, 3])
def test_a_state_of_numbers_compiles_one_step(name, size):
    """JAX's weakly typed numbers, Python's, and a dtype that the model itself would not keep."""
    traces, traced = [], 0

    def predict(params, x, state):
        traces.append(1)
        new = {
            "momentum": state["momentum"] * 0.5 + 1,
            "count": state["count"] + 1,
            "mean": jnp.mean(x, axis=0).astype(jnp.bfloat16),
            "seed": jax.random.fold_in(state["seed"], 1),
        }
        return MODEL.predict(params, x) * state["momentum"], new

    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        first = {"momentum": jnp.asarray(1.0), "count": 0, "mean": np.zeros(3), "seed": jax.random.key(0)}
        if name == "full_gn":
            method = curvax.layerwise.full_gn(
                predict_fn=predict, loss=curvax.losses.SoftmaxCrossEntropy(), inner=optax.sgd(0.1), inner_steps=1,
                line_search=None, has_state=True, microbatch_size=size,
            )  # fmt: skip
        else:
            method = getattr(curvax, name)(predict_fn=predict, has_state=True, microbatch_size=size, **_options(name))
        step, state = quick_jit(method.step), method.init(params, model_state=first)
        kinds = [(x.dtype, x.weak_type) for x in map(jax.typeof, jax.tree.leaves(state))]
        for i in range(3):
            params, state, _ = step(params, batch, state, key())
            traced = len(traces) if i == 0 else traced
            assert [(x.dtype, x.weak_type) for x in map(jax.typeof, jax.tree.leaves(state))] == kinds
        assert not any(weak for _, weak in kinds)
        assert len(traces) == traced
        assert int(state.model_state["count"]) == (3 if size is None else 6)


def test_batch_norm_in_training_mode_couples_the_batch():
    """The mean over the batch is differentiated through; no lane may treat examples one by one."""

    def predict(params, x, running):
        hidden = x @ params[0]["w"] + params[0]["b"]
        mean = jnp.mean(hidden, axis=0)
        spread = jnp.sqrt(jnp.mean((hidden - mean) ** 2, axis=0) + 1e-2)
        out = jnp.tanh((hidden - mean) / spread) @ params[1]["w"] + params[1]["b"]
        return out, 0.9 * running + 0.1 * mean

    norm = next(model for model in models.MIXING if model.name == "batch_norm")
    with precision("float64"):
        params, batch = norm.params(), batch_of(norm, "ce", "float64")
        truth = truth_of(norm, "ce", params, batch)
        for preset, options in ((curvax.egn_ce, {}), (curvax.sgn_ce, CG)):
            method = preset(predict_fn=predict, has_state=True, lam0=LAM, **options)
            state = method.init(params, model_state=jnp.zeros(5))
            new, state, _ = quick_jit(method.step)(params, batch, state, key())
            assert_close(moved(params, new), truth.direction(LAM), TOLERANCE["float64"])
            assert np.any(np.asarray(state.model_state) != 0)


@pytest.mark.parametrize("model", models.MIXING, ids=str)
def test_row_lane_on_models_that_work_across_the_batch(model):
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "ce", "float64")
        truth = truth_of(model, "ce", params, batch)
        (got,), _ = directions(curvax.egn_ce(predict_fn=model.predict, lam0=LAM), params, batch)
        assert_close(got, truth.direction(LAM), TOLERANCE["float64"], "row lane")


def _dropout(params, x, rng):
    keep = jax.random.bernoulli(rng, 0.5, (x.shape[0], 5))
    hidden = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
    hidden = jnp.where(keep, hidden * 2, jnp.zeros_like(hidden))
    return hidden @ params[1]["w"] + params[1]["b"]


@pytest.mark.parametrize("name", list(LANES))
def test_dropout_draws_one_mask_per_step(name):
    """All products of a step see the mask of its gradient: the direction is the dense one for some fixed mask."""
    seen = []

    def predict(params, x, rng):
        jax.debug.callback(lambda k: seen.append(np.asarray(k)), jax.random.key_data(rng))
        return _dropout(params, x, rng)

    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        method = getattr(curvax, name)(predict_fn=predict, has_rng=True, **_options(name))
        step, state = quick_jit(method.step), method.init(params)
        used = []
        for _ in range(2):
            seen.clear()
            new, state, _info = step(params, batch, state, key())
            jax.effects_barrier()
            assert all(np.array_equal(seen[0], other) for other in seen), "different masks within one step"
            used.append(seen[0])
            if name != "sophia_g":
                mask_key = jax.random.wrap_key_data(jnp.asarray(seen[0]))
                truth = dense.truth(
                    lambda p, x, k=mask_key: _dropout(p, x, k),
                    losses.softmax_cross_entropy,
                    params,
                    batch["x"],
                    batch["y"],
                )
                assert_close(moved(params, new), truth.direction(LAM), TOLERANCE["float64"])
        assert not np.array_equal(*used), "the same mask in two steps with one key"


@pytest.mark.parametrize("name", list(LANES))
def test_aux_is_handed_out_and_changes_nothing(name):
    def predict(params, x):
        out = MODEL.predict(params, x)
        return out, {"mean_logit": jnp.mean(out)}

    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        preset, options = getattr(curvax, name), _options(name)
        with_aux = preset(predict_fn=predict, has_aux=True, **options)
        plain = preset(predict_fn=MODEL.predict, **options)
        new, _, info = quick_jit(with_aux.step)(params, batch, with_aux.init(params), key())
        want, _, _ = quick_jit(plain.step)(params, batch, plain.init(params), key())
    np.testing.assert_allclose(dense.vector(new), dense.vector(want), rtol=1e-9)
    assert float(info["aux"]["mean_logit"]) == pytest.approx(
        float(np.mean(truth_of(MODEL, "ce", params, batch).outputs)), rel=1e-9
    )


def test_state_aux_and_key_together_with_a_loss_function():
    def loss_fn(params, batch, running, rng):
        noise = 0.1 * jax.random.normal(rng, batch["x"].shape, batch["x"].dtype)
        out = MODEL.predict(params, batch["x"] + noise)
        loss = 0.5 * jnp.mean(jnp.sum((out - batch["y"]) ** 2, -1))
        return loss, running + 1, {"largest": jnp.max(out)}

    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "mse", jnp.float32)
        for name in ("newton_cg", "adahessian"):
            method = getattr(curvax, name)(
                loss_fn=loss_fn, has_state=True, has_aux=True, has_rng=True, learning_rate=0.1
            )
            state = method.init(params, model_state=jnp.zeros((), jnp.int32))
            new, state, info = quick_jit(method.step)(params, batch, state, key())
            assert int(state.model_state) == 1 and np.isfinite(info["aux"]["largest"])
            assert all_finite(new)


# --- frozen parameters ------------------------------------------------------------------------------------------------

MASKS = {
    "tree": [{"w": True, "b": False}, {"w": False, "b": True}],
    "prefix": [True, False],
    "function": lambda params: jax.tree.map(lambda leaf: leaf.ndim == 1, params),
}


FROZEN_CASES = [("sgn_ce", mask) for mask in MASKS] + [(name, "tree") for name in LANES if name != "sgn_ce"]


@pytest.mark.fast
@pytest.mark.parametrize(("name", "mask"), FROZEN_CASES)
def test_frozen_parameters_stay_and_the_rest_solves_its_own_system(name, mask):
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        method = getattr(curvax, name)(predict_fn=MODEL.predict, frozen=MASKS[mask], **_options(name))
        new, _, _ = quick_jit(method.step)(params, batch, method.init(params), key())
        chosen = MASKS[mask](params) if callable(MASKS[mask]) else MASKS[mask]
        full = jax.tree.map(lambda m, p: jax.tree.map(lambda leaf: np.full(leaf.shape, m), p), chosen, params)
        frozen = dense.vector(jax.tree.map(lambda x: x.astype(np.float64), full)) > 0
        step = moved(params, new)
        assert not np.any(step[frozen]) and np.all(step[~frozen] != 0)
        if name != "sophia_g":
            truth = truth_of(MODEL, "ce", params, batch)
            part = np.ix_(~frozen, ~frozen)
            want = dense.damped_direction(truth.ggn[part], truth.gradient[~frozen], LAM)
            assert_close(step[~frozen], want, TOLERANCE["float64"])


def test_frozen_parameters_with_weight_decay_and_its_mask():
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        decay = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        method = curvax.sgn_ce(
            predict_fn=MODEL.predict,
            frozen=MASKS["prefix"],
            weight_decay=0.1,
            weight_decay_mask=decay,
            learning_rate=0.1,
            direction_momentum=0.9,
        )
        new, _, _ = quick_jit(method.step)(params, batch, method.init(params), key())
    assert not np.any(moved(params[0], new[0]))
    assert np.all(moved(params[1], new[1]) != 0)


def test_integer_leaves_are_carried_along():
    def predict(params, x):
        return MODEL.predict(params["layers"], x) * params["scale"].astype(x.dtype)

    with precision("float64"):
        params = {"layers": MODEL.params(), "scale": jnp.asarray(2, jnp.int32), "seed": jnp.arange(3)}
        batch = batch_of(MODEL, "ce", "float64")
        truth = dense.truth(
            lambda p, x: 2.0 * MODEL.predict(p, x),
            losses.softmax_cross_entropy,
            params["layers"],
            batch["x"],
            batch["y"],
        )
        method = curvax.egn_ce(predict_fn=predict, lam0=LAM)
        new, _, _ = quick_jit(method.step)(params, batch, method.init(params), key())
        assert_close(moved(params["layers"], new["layers"]), truth.direction(LAM), TOLERANCE["float64"])
        assert new["scale"].dtype == jnp.int32 and int(new["scale"]) == 2
        np.testing.assert_array_equal(new["seed"], params["seed"])


# --- microbatches and a second batch ----------------------------------------------------------------------------------


MICROBATCH_CASES = [("sgn_ce", 2), ("egn_ce", 2)] + [
    (name, 4) for name in ("sgn_ce", "egn_ce", "newton_cg", "egn_mse_cg", "ggn_direct_mse")
]


@pytest.mark.parametrize(("name", "size"), MICROBATCH_CASES)
def test_microbatches_give_the_step_of_the_whole_batch(name, size):
    """Batch 6 in pieces of 2, and of 4 with a rest."""
    preset = presets.BY_NAME[name]
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, preset.kind, "float64")
        options = {"lam0": 1.0, **(CG if "cg" in name or "sgn" in name else {})}
        (got,), (info,) = directions(preset.make(MODEL, microbatch_size=size, **options), params, batch)
        truth = standard_truth(MODEL, preset.kind)
        want = truth.direction(1.0)
        if preset.takes == "loss_fn":
            loss_fn = presets.loss_function(MODEL.predict, preset.kind)
            hessian = dense.hessian(lambda p: loss_fn(p, batch), params)
            want = dense.damped_direction(hessian, truth.gradient, 1.0)
    assert_close(got, want, TOLERANCE["float64"])
    assert info["loss"] == pytest.approx(truth.loss.value, rel=1e-12)


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce"])
def test_microbatches_with_weights_and_a_mask_that_empties_a_piece(name):
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64", weighted=True)
        batch["w"] = batch["w"].at[:2].set(0.0)
        truth = truth_of(MODEL, "ce", params, batch)
        method = getattr(curvax, name)(
            predict_fn=MODEL.predict, weight_key="w", microbatch_size=2, lam0=LAM, **LANES[name]
        )
        (got,), (info,) = directions(method, params, batch)
    assert_close(got, truth.direction(LAM), TOLERANCE["float64"])
    assert info["loss"] == pytest.approx(truth.loss.value, rel=1e-10)


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce"])
@pytest.mark.parametrize("size", [6, 3])
def test_curvature_from_another_batch_than_the_gradient(name, size):
    """(C(B2) + lam I) s = g(B1), for curvature batches of the same and of another size."""
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        other = jax.tree.map(lambda x: x[:size], batch_of(MODEL, "ce", "float64", seed=7))
        gradient, matrix = truth_of(MODEL, "ce", params, batch).gradient, truth_of(MODEL, "ce", params, other).ggn
        method = getattr(curvax, name)(predict_fn=MODEL.predict, lam0=LAM, **LANES[name])
        step = quick_jit(lambda p, b, s, k, c: method.step(p, b, s, k, curvature_batch=c))
        new, _, info = step(params, batch, method.init(params), key(), other)
    assert_close(moved(params, new), dense.damped_direction(matrix, gradient, LAM), TOLERANCE["float64"])
    assert info["loss"] == pytest.approx(truth_of(MODEL, "ce", params, batch).loss.value, rel=1e-10)


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce", "sophia_g"])
def test_masked_positions_may_hold_anything(name):
    """Under zero weight labels may be out of range and inputs large; the direction is that of the rest."""
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        mask = jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
        clean = {name: value[np.flatnonzero(mask)] for name, value in batch.items()}
        batch = {"x": batch["x"].at[2].set(1e3), "y": batch["y"].at[2].set(-100).at[4].set(-1), "w": mask}
        method = getattr(curvax, name)(predict_fn=MODEL.predict, weight_key="w", **_options(name))
        (got,), (info,) = directions(method, params, batch)
        truth = truth_of(MODEL, "ce", params, clean)
    assert np.all(np.isfinite(got))
    assert info["loss"] == pytest.approx(truth.loss.value, rel=1e-9)
    if name != "sophia_g":
        assert_close(got, truth.direction(LAM), TOLERANCE["float64"])


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce"])
def test_a_batch_of_zero_weights_moves_nothing(name):
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        batch["w"] = jnp.zeros(6, jnp.float32)
        method = getattr(curvax, name)(predict_fn=MODEL.predict, weight_key="w", lam0=LAM)
        (got,), (info,) = directions(method, params, batch)
    assert not np.any(got) and bool(info["finite"]) and float(info["loss"]) == 0.0


def test_other_batch_keys_and_pytree_inputs():
    def predict(params, inputs):
        return MODEL.predict(params, inputs["left"] + inputs["right"])

    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        named = {"features": {"left": 0.25 * batch["x"], "right": 0.75 * batch["x"]}, "label": batch["y"], "id": 3}
        truth = truth_of(MODEL, "ce", params, batch)
        for name in ("sgn_ce", "egn_ce"):
            method = getattr(curvax, name)(predict_fn=predict, x_key="features", y_key="label", lam0=LAM, **LANES[name])
            (got,), _ = directions(method, params, named)
            assert_close(got, truth.direction(LAM), TOLERANCE["float64"])
