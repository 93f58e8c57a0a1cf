"""K-FAC and EKFAC as methods: one step against a dense K-FAC step written by hand, and everything a method must do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.curvature import GaussNewton, GeneralizedGaussNewton, Model
from curvax.damping import Constant
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.preconditioners import EKFAC, KFAC, CholeskyInverse
from curvax.solvers import CG
from tests.oracle import dense, losses
from tests.oracle.compiling import quick_jit
from tests.oracle.token_model import drawn
from tests.structure.kronecker_models import normal

EXACT = GeneralizedGaussNewton()
LAM, KEY = 0.05, jax.random.key(3)


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


def cnn(p, x):
    h = jax.lax.conv_general_dilated(x, p["k"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(h + p["b"]).reshape(x.shape[0], -1) @ p["v"] + p["c"]


MODELS = {
    "mlp": (mlp, {"w": (3, 6), "b": (6,), "v": (6, 4), "c": (4,)}, (3,)),
    "cnn": (cnn, {"k": (2, 2, 2, 3), "b": (3,), "v": (12, 4), "c": (4,)}, (5, 5, 2)),
}


def setting(name, dtype=jnp.float64, examples=8):
    predict, shapes, inputs = MODELS[name]
    params = {k: drawn(i, *s, dtype=dtype) * np.asarray(0.5, dtype) for i, (k, s) in enumerate(shapes.items())}
    y = jnp.array(np.random.default_rng(5).integers(0, 4, examples).astype(np.int32))
    return predict, params, {"x": drawn(9, examples, *inputs, dtype=dtype), "y": y}


def preset(name, predict, **options):
    return getattr(curvax, name)(predict_fn=predict, loss=SoftmaxCrossEntropy(), **options)


def plain(**options):
    """Options that leave a step the bare preconditioned gradient."""
    return {"fisher": EXACT, "lam_policy": "const", "lam0": LAM, "beta1": 0.0, "learning_rate": 1.0, **options}


def dense_kfac(name, params, batch, ekfac):
    """The direction in float64 NumPy, from patches and cotangents cut out by hand; softmax cross entropy, mean."""
    p = {k: np.asarray(v) for k, v in params.items()}
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
    b = len(x)
    if name == "mlp":
        a = x[:, None]
        weights, shift = p["w"], p["b"]
    else:
        patches = [x[:, i : i + 2, j : j + 2].reshape(b, -1) for i in (0, 2) for j in (0, 2)]
        a = np.stack(patches, axis=1)
        weights, shift = p["k"].reshape(8, 3), p["b"]
    hidden = np.tanh(a @ weights + shift)  # (B, T, width)
    flat = hidden.reshape(b, -1)
    z = flat @ p["v"] + p["c"]
    prob = np.exp(z - z.max(1, keepdims=True))
    prob /= prob.sum(1, keepdims=True)
    onehot = np.eye(4)[y]
    root = np.stack([np.diag(np.sqrt(q)) - np.outer(q, np.sqrt(q)) for q in prob]).transpose(0, 2, 1) / np.sqrt(b)

    def back(u):  # (B, R, 4) -> cotangents of the hidden layer before tanh
        return (u @ p["v"].T).reshape(b, -1, *hidden.shape[1:]) * (1 - hidden**2)[:, None]

    residual = ((prob - onehot) / b)[:, None]
    ones = np.ones((b, a.shape[1], 1))
    layers = [
        (np.concatenate([a, ones], -1), back(root), back(residual)),
        (np.concatenate([flat, np.ones((b, 1))], -1)[:, None], root[:, :, None], residual[:, :, None]),
    ]
    found = []
    for acts, d, g in layers:
        big_a = np.einsum("bti,btj->ij", acts, acts) / (b * acts.shape[1])
        big_b = np.einsum("brti,brtj->ij", d, d)
        gradient = np.einsum("bti,brtm->im", acts, g)
        values_a, u = np.linalg.eigh(big_a)
        values_b, v = np.linalg.eigh(big_b)
        along = np.outer(values_a, values_b)
        if ekfac:
            along = np.sum(np.einsum("ni,btn,brtm,ml->bril", u, acts, d, v) ** 2, axis=(0, 1))
        found.append(u @ ((u.T @ gradient @ v) / (along + LAM)) @ v.T)
    first = "w" if name == "mlp" else "k"
    return {
        first: found[0][:-1].reshape(p[first].shape), "b": found[0][-1], "v": found[1][:-1], "c": found[1][-1],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_one_step_is_the_dense_one(x64, name, method):
    predict, params, batch = setting(name)
    made = preset(method, predict, **plain())
    new, _, _ = quick_jit(made.step)(params, batch, made.init(params, batch=batch), KEY)
    expected = dense_kfac(name, params, batch, method == "ekfac")
    for leaf in params:
        np.testing.assert_allclose(params[leaf] - new[leaf], expected[leaf], rtol=1e-7, atol=1e-9)


@pytest.mark.fast
def test_one_step_in_float32_is_near_the_dense_one():
    predict, params, batch = setting("cnn", jnp.float32)
    made = preset("kfac", predict, **plain())
    new, _, _ = quick_jit(made.step)(params, batch, made.init(params, batch=batch), KEY)
    expected = dense_kfac("cnn", params, batch, False)
    moved = jax.tree.map(lambda x, y: x - y, params, new)
    assert dense.relative_error(dense.vector(moved), dense.vector(expected)) < 1e-3


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_scans_donates_and_resumes_without_another_trace(name):
    predict, params, batch = setting("mlp", jnp.float32)
    traces = []

    def counted(p, x):
        traces.append(1)
        return predict(p, x)

    cadences = {"kfac": {"inverse_every": 2}, "ekfac": {"factor_every": 2, "inverse_every": 4}}
    made = preset(name, counted, **cadences[name], lam_kwargs={"every": 2})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    state = made.init(params, batch=shapes)
    assert jax.eval_shape(lambda p: made.init(p, batch=shapes), params) == jax.eval_shape(lambda: state)
    step = quick_jit(made.step, donate_argnums=(0, 2))
    p, s = jax.tree.map(jnp.copy, params), made.init(params, batch=batch)
    middle, traced = None, 0
    for i in range(6):
        p, s, info = step(p, batch, s, KEY)
        traced = traced or len(traces)
        if i == 2:
            middle = jax.tree.map(np.asarray, (p, s))
    assert len(traces) == traced and np.isfinite(info["loss"])
    assert middle is not None
    # A state that was written and read again, into the structure that init gives.
    fresh = jax.tree.structure(made.init(params, batch=shapes))
    q, r = middle[0], jax.tree.unflatten(fresh, jax.tree.leaves(middle[1]))
    q, r = jax.tree.map(jnp.asarray, (q, r))
    for _ in range(3):
        q, r, _ = step(q, batch, r, KEY)
    for x, y in zip(jax.tree.leaves((p, s)), jax.tree.leaves((q, r)), strict=True):
        np.testing.assert_array_equal(x, y)

    def body(carry, _):
        p, s, info = made.step(carry[0], batch, carry[1], KEY)
        return (p, s), info["loss"]

    (scanned, _), _ = quick_jit(lambda c: jax.lax.scan(body, c, length=6))((params, state))
    np.testing.assert_allclose(dense.vector(scanned), dense.vector(p), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_microbatches_and_frozen_leaves(x64, name):
    """Microbatches change nothing; a frozen layer keeps its values and has no factors."""
    predict, params, batch = setting("mlp")
    steps = []
    for options in ({}, {"microbatch_size": 3}):
        made = preset(name, predict, **plain(**options), frozen={"w": False, "b": False, "v": True, "c": True})
        state = made.init(params, batch=batch)
        assert [b.shape for b in state.preconditioner.blocks.kronecker] == [(1, 4, 6)]
        steps.append(quick_jit(made.step)(params, batch, state, KEY)[0])
    np.testing.assert_array_equal(steps[0]["v"], params["v"])
    expected = dense_kfac("mlp", params, batch, name == "ekfac")
    for new in steps:
        np.testing.assert_allclose(params["w"] - new["w"], expected["w"], rtol=1e-7, atol=1e-9)


def test_state_aux_and_rng_models_have_factors():
    predict, params, batch = setting("mlp", jnp.float32)

    def extra(p, x, state, rng):
        scale = 1 + 0 * jax.random.normal(rng, ())
        return predict(p, x) * scale * state["s"], {"s": state["s"]}, {"n": jnp.zeros(())}

    made = preset("kfac", extra, has_state=True, has_aux=True, has_rng=True)
    state = made.init(params, batch=batch, model_state={"s": jnp.ones(())})
    new, state, info = quick_jit(made.step)(params, batch, state, KEY)
    assert np.all(np.isfinite(dense.vector(new))) and "aux" in info


def tokens(p, x):
    return x @ p["w"] + p["b"]


MASKS = {
    "a prefix of each": np.arange(6)[None] < np.asarray([6, 3, 1, 0])[:, None],
    "weights": np.random.default_rng(1).uniform(0.2, 3.0, (4, 6)),
    "one example": np.asarray([1.0, 0.0, 0.0, 0.0])[:, None] * np.ones((4, 6)),
    "per example": np.asarray([1.0, 0.0, 2.0, 0.5]),
}


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("size", [None, 3])
def test_tokens_count_as_much_as_they_weigh(x64, name, size):
    """One layer on each token, squared error: the factors are exact, and the step that of the dense Gauss-Newton."""
    params = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    made = getattr(curvax, name)(
        predict_fn=tokens, loss=SquaredError(), weight_key="m", microbatch_size=size, **plain()
    )
    step = quick_jit(made.step)
    for what, weights in MASKS.items():
        batch = {"x": normal(2, 4, 6, 3), "y": normal(3, 4, 6, 2), "m": jnp.asarray(weights, float)}
        batch["x"] = jnp.where(jnp.expand_dims(batch["m"], (1, 2)[batch["m"].ndim - 1 :]) == 0, 1e3, batch["x"])
        truth = dense.truth(tokens, losses.squared_error, params, batch["x"], batch["y"], batch["m"])
        new, _, info = step(params, batch, made.init(params, batch=batch), KEY)
        assert dense.relative_error(dense.vector(params) - dense.vector(new), truth.direction(LAM)) < 1e-8, what
        assert info["accepted"] and info["loss"] == pytest.approx(truth.loss.value, rel=1e-10), what


def dropped(p, x, rng):
    keep = jax.random.bernoulli(rng, 0.7, x.shape)
    return tokens(p, jnp.where(keep, x / 0.7, 0.0))


@pytest.mark.parametrize("name", ["kfac", "ekfac", "egn", "gauss_newton"])
@pytest.mark.filterwarnings("error:the model's examples interact")
def test_dropout_is_that_of_the_step(x64, name):
    """One linear layer behind dropout, which is exact for Kronecker factors: the dense step for the step's mask."""
    params = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    batch, seen = {"x": normal(2, 6, 3), "y": normal(3, 6, 2)}, []

    def predict(p, x, rng):
        jax.debug.callback(lambda k: seen.append(np.asarray(k)), jax.random.key_data(rng))
        return dropped(p, x, rng)

    factored = name in ("kfac", "ekfac")
    options = plain() if factored else {"lam_policy": "const", "lam0": LAM}
    made = getattr(curvax, name)(predict_fn=predict, loss=SquaredError(), has_rng=True, **options)
    state = made.init(params, **({"batch": batch} if factored else {}))
    new, _, _ = quick_jit(made.step)(params, batch, state, KEY)
    jax.effects_barrier()
    mask = jax.random.wrap_key_data(jnp.asarray(seen[0]))
    truth = dense.truth(lambda p, x: dropped(p, x, mask), losses.squared_error, params, batch["x"], batch["y"])
    assert dense.relative_error(dense.vector(params) - dense.vector(new), truth.direction(LAM)) < 1e-6


def beside(h):
    return {"mean": jnp.mean(h), "largest": jnp.max(h, axis=0), "correlations": h @ h.T}


@pytest.mark.parametrize("name", ["kfac", "egn", "gauss_newton"])
@pytest.mark.filterwarnings("error")
def test_statistics_beside_the_outputs_mix_no_examples(x64, name):
    """In aux, and in a state that is stored only: the step is that of the model without them, and nothing is said."""
    predict, params, batch = setting("mlp")

    def extra(p, x, state):
        h = jnp.tanh(x @ p["w"] + p["b"])
        mean = 0.9 * state["mean"] + 0.1 * jax.lax.stop_gradient(jnp.mean(h, axis=0))
        return h @ p["v"] + p["c"], {"mean": mean}, beside(h)

    moved = []
    for function, options in ((predict, {}), (extra, {"has_state": True, "has_aux": True})):
        known = plain() if name == "kfac" else {"lam_policy": "const", "lam0": LAM}
        made = preset(name, function, **known, **options)
        state = made.init(
            params,
            **({"batch": batch} if name == "kfac" else {}),
            **({"model_state": {"mean": jnp.zeros(6)}} if options else {}),
        )
        new, state, info = quick_jit(made.step)(params, batch, state, KEY)
        moved.append(dense.vector(params) - dense.vector(new))
    hidden = np.tanh(np.asarray(batch["x"]) @ np.asarray(params["w"]) + np.asarray(params["b"]))
    np.testing.assert_allclose(state.model_state["mean"], 0.1 * hidden.mean(0), rtol=1e-10)
    assert set(info["aux"]) == set(beside(jnp.asarray(hidden)))
    assert dense.relative_error(moved[1], moved[0]) < 1e-9


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_kfac_serves_cg(x64, inverse):
    """As P^-1 inside CG the solution stays the damped Newton direction, in fewer iterations."""
    predict, params, batch = setting("mlp", examples=30)
    curvature = GaussNewton(Model(predict), SoftmaxCrossEntropy())
    factored = KFAC(EXACT) if inverse == "eigen" else KFAC(EXACT, inverse=CholeskyInverse())
    found, iterations, metrics = [], [], curvax.telemetry
    for preconditioner in (None, factored):
        made = curvax.assemble(
            curvature=curvature, solver=CG(1e-10, 200, warm_start=False), damping=Constant(1e-4),
            preconditioner=preconditioner,
            telemetry=metrics.Telemetry((metrics.MetricRecord(metrics.Metric.ITERATIONS),)),
        )  # fmt: skip
        new, _, info = quick_jit(made.step)(params, batch, made.init(params, batch=batch), KEY)
        found.append(dense.vector(params) - dense.vector(new))
        iterations.append(int(info["iterations"]))
    assert dense.relative_error(found[1], found[0]) < 1e-5
    assert iterations[1] < iterations[0]


@pytest.mark.parametrize("preconditioner", [KFAC(EXACT), EKFAC(EXACT)], ids=["kfac", "ekfac"])
def test_the_optax_face(x64, preconditioner):
    predict, params, batch = setting("mlp")
    tx = optax.chain(
        curvax.transforms.scale_by_kfac(predict, SoftmaxCrossEntropy(), batch, LAM, preconditioner=preconditioner),
        optax.scale_by_learning_rate(1.0),
    )

    def loss(p):
        return optax.losses.softmax_cross_entropy_with_integer_labels(predict(p, batch["x"]), batch["y"]).mean()

    update, _ = quick_jit(tx.update)(quick_jit(jax.grad(loss))(params), tx.init(params), params, batch=batch, rng=KEY)
    expected = dense_kfac("mlp", params, batch, isinstance(preconditioner, EKFAC))
    for leaf in params:
        np.testing.assert_allclose(-update[leaf], expected[leaf], rtol=1e-7, atol=1e-9)


def test_the_plan_names_blocks_and_cadences():
    predict, params, batch = setting("cnn", jnp.float32)

    def scaled(p, x):
        return predict({k: v for k, v in p.items() if k != "scale"}, x) * p["scale"]

    params = {**params, "scale": jnp.ones((4,))}
    made = preset("kfac", scaled, factor_every=5, inverse_every=20)
    text = made.plan_for(params, batch).explain()
    for line in (
        "refresh               every 5 steps             KFAC",
        "inverses              every 20 steps            KFAC",
        "block of ['k']: Kronecker factors 9 x 9 and 3 x 3 (convolution)",
        "block of ['b']: within the Kronecker factors of ['k']",
        "block of ['scale']: diagonal: it enters as scale",
    ):
        assert line in text, line


def test_errors_say_what_to_do():
    predict, params, batch = setting("mlp", jnp.float32)
    made = preset("kfac", predict)
    with pytest.raises(ValueError, match=r"call init\(params, batch=batch\)"):
        made.init(params)
    mixing = preset("ekfac", lambda p, x: predict(p, x - jnp.max(x, axis=0)))
    with pytest.raises(ValueError, match="the model mixes examples"):
        mixing.init(params, batch=batch)
    with pytest.raises(ValueError, match="use a GaussNewton curvature"):
        curvax.assemble(
            curvature=curvax.curvature.Hessian(curvax.curvature.LossFunction(lambda p, b: jnp.sum(predict(p, b["x"])))),
            solver=CG(),
            preconditioner=KFAC(),
        )
    with pytest.raises(ValueError, match="multiple of every"):
        preset("kfac", predict, factor_every=4, inverse_every=10)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_sampled_targets_move_as_the_exact_factors_do(name):
    """Many sampled targets per position give the step of the exact factors."""
    predict, params, batch = setting("mlp", jnp.float32)
    moved = []
    for fisher in (EXACT, curvax.curvature.MonteCarloFisher(4000)):
        made = preset(name, predict, **plain(fisher=fisher))
        new, _, _ = quick_jit(made.step)(params, batch, made.init(params, batch=batch), KEY)
        moved.append(dense.vector(params) - dense.vector(new))
    assert dense.relative_error(moved[1], moved[0]) < 0.1


def test_squared_error_of_a_linear_model_is_solved_in_one_step(x64):
    """With exact curvature and next to no damping one full step is the least-squares solution."""
    x, y = normal(0, 12, 3), normal(1, 12, 2)
    params = {"w": normal(2, 3, 2), "b": normal(3, 2)}
    for name in ("kfac", "ekfac"):
        made = getattr(curvax, name)(
            predict_fn=lambda p, x: x @ p["w"] + p["b"], loss=SquaredError(), **{**plain(), "lam0": 1e-10}
        )
        batch = {"x": x, "y": y}
        new, _, _ = quick_jit(made.step)(params, batch, made.init(params, batch=batch), KEY)
        solution = np.linalg.lstsq(np.concatenate([x, np.ones((12, 1))], 1), np.asarray(y), rcond=None)[0]
        np.testing.assert_allclose(np.concatenate([new["w"], new["b"][None]]), solution, rtol=1e-6, atol=1e-7)


def test_a_state_of_another_model_is_another_structure():
    predict, params, batch = setting("mlp", jnp.float32)
    made = preset("kfac", predict)
    twin = preset("kfac", lambda p, x: predict(p, x))
    assert jax.tree.structure(made.init(params, batch=batch)) == jax.tree.structure(twin.init(params, batch=batch))
    other = preset("kfac", lambda p, x: predict(p, x) * p["c"])
    state = dataclasses.replace(other.init(params, batch=batch))
    assert jax.tree.structure(state) != jax.tree.structure(made.init(params, batch=batch))
