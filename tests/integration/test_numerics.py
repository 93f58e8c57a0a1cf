"""Hard numbers: extreme scales, narrow dtypes, indefinite and singular curvature, zero gradients, NaN in the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests.integration import presets
from tests.integration.harness import (
    all_finite,
    batch_of,
    directions,
    key,
    moved,
    precision,
    same_bits,
    truth_of,
)
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

# Powers of two next to 1e-6 and 1e6, with an even exponent: multiplying by them and taking square roots is exact, so
# that a scale-free algorithm gives the same bits and not only the same answer.
SCALES = (2.0**-20, 2.0**20)


def _scaled_method(name, scale, lam, **options):
    """A method whose loss is multiplied by `scale` (through weights "w", or directly), and lam with it."""
    model, options = models.MLP_TANH, {"lam0": lam * scale, **options}
    if name.startswith("newton"):
        loss_fn = presets.loss_function(model.predict, "mse")
        return getattr(curvax, name)(loss_fn=lambda p, b: loss_fn(p, b) * scale, **options)
    factory = curvax.losses.SquaredError if name == "spring" else curvax.losses.SoftmaxCrossEntropy
    return getattr(curvax, name)(predict_fn=model.predict, loss=factory(reduction="sum"), weight_key="w", **options)


def _scaled_step(name, lam, **options):
    """(params, batch, state or None, scale) -> step, compiled once for all scales."""

    def step(params, batch, state, scale):
        method = _scaled_method(name, scale, lam, **options)
        batch = {**batch, "w": jnp.full(models.MLP_TANH.positions, scale, jnp.float32)}
        return method.step(params, batch, state, key())

    def start(params, scale):
        return _scaled_method(name, scale, lam, **options).init(params)

    return quick_jit(step), start


@pytest.mark.parametrize("name", ["sgn", "egn", "spring", "newton_cg", "newton_direct"])
def test_the_scale_of_the_loss_changes_nothing(name):
    with precision("float32"):
        model = models.MLP_TANH
        params = model.params(jnp.float32)
        batch = batch_of(model, "ce" if name in ("sgn", "egn") else "mse", jnp.float32)
        step, start = _scaled_step(name, 2.0**-7)
        outcomes = {}
        for scale in (1.0, *SCALES):
            scale = jnp.asarray(scale, jnp.float32)
            new, state, first = step(params, batch, start(params, scale), scale)
            again, _, second = step(params, batch, state, scale)
            outcomes[float(scale)] = moved(params, new), moved(params, again), first, second
        want = outcomes[1.0]
        assert np.linalg.norm(want[0]) > 0
        for scale in SCALES:
            got = outcomes[scale]
            for i in (0, 1):
                np.testing.assert_allclose(got[i], want[i], rtol=1e-5, atol=1e-6 * np.abs(want[i]).max())
                for metric in ("iterations", "result"):
                    assert got[2 + i][metric] == want[2 + i][metric], f"{metric} at scale {scale:g}"


def test_trust_region_does_not_depend_on_the_scale_of_the_loss():
    with precision("float32"):
        model = models.MLP_TANH
        batch = batch_of(model, "ce", jnp.float32)
        step, start = _scaled_step("sgn", 2.0**-3, lam_policy="trust_region", record_rho_every_k=1)
        histories = []
        for scale in (1.0, *SCALES):
            params, scale = model.params(jnp.float32), jnp.asarray(scale, jnp.float32)
            state, history = start(params, scale), []
            for _ in range(3):
                params, state, info = step(params, batch, state, scale)
                history.append([float(info["rho"]), float(info["lam"]) / float(scale), float(info["accepted"])])
            histories.append(history)
    assert np.all(np.isfinite(histories))
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-3)
    np.testing.assert_allclose(histories[2], histories[0], rtol=1e-3)


@pytest.mark.parametrize("preset", presets.TABLE, ids=str)
def test_bfloat16_parameters(preset):
    model = models.MLP_TANH
    with precision("bfloat16"):
        params, batch = model.params(jnp.bfloat16), batch_of(model, preset.kind, jnp.bfloat16)
        # A large power of two as learning rate: the update is read off parameters that have 8 bits only.
        rate = 64.0 if preset.damped else 2.0**-6
        method = preset.make(
            model, learning_rate=rate, **({"lam0": 1.0, "lam_policy": "const"} if preset.damped else {})
        )
        state = method.init(params)
        new_params, new_state, info = quick_jit(method.step)(params, batch, state, key())
        assert [leaf.dtype for leaf in jax.tree.leaves(new_params)] == [jnp.bfloat16] * len(jax.tree.leaves(params))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), new_state
        )
        assert all_finite(new_params) and bool(info["finite"])
        assert not same_bits(new_params, params)
        if preset.damped and not preset.name.startswith("newton"):
            want = truth_of(model, preset.kind, params, batch).direction(1.0)
            assert dense.relative_error(moved(params, new_params) / rate, want) < 0.1


@pytest.mark.parametrize("preset", [*presets.ONE_PER_LANE, presets.BY_NAME["gauss_newton"]], ids=str)
def test_double_precision_stays_double(preset):
    model = models.SHARED if preset.kind == "mse" else models.ODD_TREE
    with precision("float64"):
        params, batch = model.params(jnp.float64), batch_of(model, preset.kind, jnp.float64)
        method = preset.make(model, learning_rate=0.1)
        state = method.init(params)
        new_params, new_state, info = quick_jit(method.step)(params, batch, state, key())
        for old, new in ((params, new_params), (state, new_state)):
            assert jax.tree.structure(old) == jax.tree.structure(new)
            assert [x.dtype for x in jax.tree.leaves(old)] == [x.dtype for x in jax.tree.leaves(new)]
        assert info["loss"].dtype == jnp.float64
        assert all_finite(new_params)


def _quadratic(matrix, linear):
    def loss_fn(params, batch):
        dtype = params.dtype
        value = 0.5 * params @ jnp.asarray(matrix, dtype) @ params + jnp.asarray(linear, dtype) @ params
        return value + jnp.zeros((), dtype) * jnp.sum(batch["x"])

    return loss_fn


QUADRATIC_BATCH = {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.float32)}


@pytest.mark.parametrize("name", ["newton_cg", "newton_direct"])
def test_indefinite_hessian_gives_a_finite_descent_direction_and_says_so(name):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    matrix = q @ np.diag(np.concatenate([[-5.0, -2.0], np.linspace(0.5, 4.0, 10)])) @ q.T
    gradient = rng.standard_normal(12)
    loss_fn = _quadratic(matrix, gradient)
    with precision("float32"):
        method = getattr(curvax, name)(loss_fn=loss_fn, lam0=1e-2, learning_rate=1e-3)
        params = jnp.zeros(12, jnp.float32)
        (step,), (info,) = directions(method, params, QUADRATIC_BATCH)
    assert np.all(np.isfinite(step)) and np.linalg.norm(step) > 0
    assert step @ gradient > 0, "not a descent direction"
    result = curvax.solvers.Result
    assert int(info["result"]) in (int(result.NEGATIVE_CURVATURE), int(result.INDEFINITE))
    assert bool(info["finite"]) and bool(info["accepted"])


@pytest.mark.parametrize("preset", presets.DISTINCT, ids=str)
def test_zero_gradient_is_a_fixed_point(preset):
    """At all-zero parameters with matching targets the gradient is exactly zero: no 0/0 anywhere, nothing moves."""
    model = models.MLP_TANH
    with precision("float32"):
        params = jax.tree.map(jnp.zeros_like, model.params(jnp.float32))
        targets = np.full(model.output_shape, 0.25 if preset.kind == "ce" else 0.0, np.float32)
        batch = {"x": model.inputs(jnp.float32), "y": jnp.asarray(targets)}
        method = preset.make(model, learning_rate=0.1)
        step, state = quick_jit(method.step), method.init(params)
        for _ in range(2):
            params, state, info = step(params, batch, state, key())
            assert bool(info["finite"])
        assert all_finite(state)
        assert not np.any(dense.vector(params))
        clean = batch_of(model, preset.kind, jnp.float32)
        moved_params, _, info = step(
            model.params(jnp.float32), {**clean, "y": _like(clean["y"], batch["y"])}, state, key()
        )
        assert all_finite(moved_params) and bool(info["finite"])


def _like(targets, other):
    """Targets in the shape and dtype of `other`, so that nothing is compiled again."""
    if targets.shape == other.shape:
        return targets.astype(other.dtype)
    return jax.nn.one_hot(targets, other.shape[-1], dtype=other.dtype)


@pytest.mark.fast
@pytest.mark.parametrize("preset", presets.DISTINCT, ids=str)
def test_non_finite_batches_are_refused_and_the_next_step_works(preset):
    model = models.LINEAR
    with precision("float32"):
        params, clean = model.params(jnp.float32), batch_of(model, preset.kind, jnp.float32)
        method = preset.make(model, learning_rate=0.1)
        step, state = quick_jit(method.step), method.init(params)
        params, state, _ = step(params, clean, state, key(0))
        for count, bad in enumerate((np.nan, np.inf, -np.inf), start=1):
            dirty = {**clean, "x": clean["x"].at[2, 1].set(bad)}
            kept, state, info = step(params, dirty, state, key(1))
            assert same_bits(params, kept)
            assert not bool(info["finite"]) and not bool(info["accepted"]) and int(info["rejected"]) == count
            assert all_finite(state), "the state keeps a non-finite value"
        new, state, info = step(params, clean, state, key(2))
        assert all_finite(new) and bool(info["finite"]) and bool(info["accepted"]) and int(info["rejected"]) == 3
        assert not same_bits(params, new)


@pytest.mark.parametrize("name", ["sgn_ce", "newton_cg", "egn_ce"])
def test_trust_region_raises_lam_after_a_non_finite_step(name):
    preset, model = presets.BY_NAME[name], models.MLP_TANH
    with precision("float32"):
        params, clean = model.params(jnp.float32), batch_of(model, preset.kind, jnp.float32)
        dirty = {**clean, "x": clean["x"].at[2, 1].set(np.nan)}
        method = preset.make(model, lam_policy="trust_region", lam0=0.5)
        step, state = quick_jit(method.step), method.init(params)
        _, state, _ = step(params, dirty, state, key())
        _, state, info = step(params, clean, state, key())
        assert float(info["lam"]) > 0.5


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce", "egn_mse", "egn_mse_cg", "ggn_direct_mse"])
def test_no_damping_on_a_singular_matrix_stays_finite(name):
    preset = presets.BY_NAME[name]
    # One position twice and more parameters than rows: both the GGN and the Gram matrix are singular.
    model = models.MLP_TANH
    with precision("float32"):
        params, batch = model.params(jnp.float32), batch_of(model, preset.kind, jnp.float32)
        batch = jax.tree.map(lambda x: x.at[1].set(x[0]), batch)
        method = preset.make(model, lam0=0.0, learning_rate=1e-3)
        step, state = quick_jit(method.step), method.init(params)
        for _ in range(2):
            params, state, info = step(params, batch, state, key())
            assert all_finite(params) and all_finite(state)
            assert int(info["result"]) in [int(code) for code in curvax.solvers.Result]


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce", "sophia_g"])
def test_enormous_logits(name):
    preset, model = presets.BY_NAME[name], models.MLP_TANH
    constant = {"lam0": 1.0} if preset.damped else {}
    with precision("float32"):
        params = jax.tree.map(lambda p: p * jnp.float32(1e4), model.params(jnp.float32))
        (step,), (info,) = directions(preset.make(model, **constant), params, batch_of(model, "ce", jnp.float32))
    assert np.all(np.isfinite(step)) and np.isfinite(info["loss"])
    assert bool(info["finite"])


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce", "sophia_g"])
def test_classes_masked_with_minus_infinity(name):
    """A model that forbids a class gives it a logit of -inf: probability zero, no gradient, no NaN."""
    preset, model = presets.BY_NAME[name], models.MLP_TANH
    allowed = np.array([True, True, False, True])

    def predict(params, x):
        logits = model.predict(params, x)
        return jnp.where(allowed, logits, jnp.asarray(-jnp.inf, logits.dtype))

    with precision("float64"):
        params, batch = model.params(), batch_of(model, "ce", "float64")
        batch["y"] = jnp.where(batch["y"] == 2, 0, batch["y"])
        method = preset.make(predict, **({"lam0": 0.1} if preset.damped else {}))
        (step,), (info,) = directions(method, params, batch)
        assert np.all(np.isfinite(step)) and bool(info["finite"])
        if preset.damped:
            rest = np.flatnonzero(allowed)
            labels = jnp.asarray(np.searchsorted(rest, np.asarray(batch["y"])))
            truth = truth_of(_Restricted(model, rest), "ce", params, {"x": batch["x"], "y": labels})
            assert dense.relative_error(step, truth.direction(0.1)) < 1e-3


class _Restricted:
    """The model with only some of its outputs: what masking the others must amount to."""

    def __init__(self, model, keep):
        self.predict = lambda params, x: model.predict(params, x)[..., keep]
