"""The step as one pure function: scans, compiles once, donates, vmaps, and repeats itself bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.losses import SquaredError
from tests.integration import presets
from tests.integration.harness import batch_of, key, precision, same_bits
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
TRUST_REGION = {"lam_policy": "trust_region", "lam0": 1.0, "record_rho_every_k": 2}
VARIANTS = [(preset, {}) for preset in presets.DISTINCT] + [
    (presets.BY_NAME["sgn_ce"], TRUST_REGION),
    (presets.BY_NAME["egn_mse_cg"], TRUST_REGION),
]
IDS = [f"{preset}{'-trust_region' if options else ''}" for preset, options in VARIANTS]


def _batches(kind, count):
    """`count` batches stacked along a new leading axis."""
    each = [batch_of(MODEL, kind, jnp.float32, seed=i) for i in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@pytest.mark.parametrize(("preset", "options"), VARIANTS, ids=IDS)
def test_scan_equals_calls_and_compiles_once_and_donates(preset, options):
    """One compiled step serves five calls with donated buffers; ten steps under `lax.scan` do what ten calls do."""
    traces = []

    def predict(params, x):
        traces.append(None)
        return MODEL.predict(params, x)

    with precision("float32"):
        method = preset.make(predict, learning_rate=0.1, **options)
        params, batches = MODEL.params(jnp.float32), _batches(preset.kind, 10)
        keys = jax.random.split(key(), 10)
        start = (MODEL.params(jnp.float32), method.init(params))
        step = quick_jit(method.step, donate_argnums=(0, 2))
        called = (params, method.init(params))
        infos = []
        for i in range(10):
            old = called
            p, s, info = step(old[0], jax.tree.map(lambda x, i=i: x[i], batches), old[1], keys[i])
            called = (p, s)
            infos.append(info)
            if i == 0:
                traced = len(traces)
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old[0])), "parameters were not donated"
        assert len(traces) == traced, "the step was traced again"

        def body(carry, x):
            p, s, info = method.step(carry[0], x[0], carry[1], x[1])
            return (p, s), info

        scanned, history = quick_jit(lambda c, xs: jax.lax.scan(body, c, xs))(start, (batches, keys))
    np.testing.assert_allclose(dense.vector(scanned[0]), dense.vector(called[0]), rtol=2e-3, atol=2e-4)
    assert jax.tree.structure(scanned[1]) == jax.tree.structure(called[1])
    assert set(history) == set(infos[0])
    np.testing.assert_array_equal(history["step"], [i["step"] for i in infos])
    np.testing.assert_allclose(history["loss"], [i["loss"] for i in infos], rtol=2e-3)


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_mse", "sophia_g", "adahessian"])
def test_vmap_over_seeds(name):
    preset = presets.BY_NAME[name]
    with precision("float32"):
        method = preset.make(MODEL, learning_rate=0.1)
        params = jax.tree.map(lambda *x: jnp.stack(x), *(MODEL.params(jnp.float32, seed) for seed in range(3)))
        keys = jax.random.split(key(), 3)
        batch = batch_of(MODEL, preset.kind, jnp.float32)

        def run(p, k):
            state = method.init(p)
            for i in range(2):
                p, state, info = method.step(p, batch, state, jax.random.fold_in(k, i))
            return p, info["loss"]

        together, losses = quick_jit(jax.vmap(run))(params, keys)
        alone, loss = quick_jit(run)(jax.tree.map(lambda x: x[1], params), keys[1])
    np.testing.assert_allclose(
        dense.vector(jax.tree.map(lambda x: x[1], together)), dense.vector(alone), rtol=2e-3, atol=2e-4
    )
    np.testing.assert_allclose(losses[1], loss, rtol=1e-3)


@pytest.mark.parametrize("name", ["sgn_ce", "sophia_g", "adahessian"])
def test_the_same_key_and_state_give_the_same_bits_and_another_key_does_not(name):
    preset = presets.BY_NAME[name]
    with precision("float32"):
        method = preset.make(MODEL, learning_rate=0.1)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, preset.kind, jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        first = step(params, batch, state, key(0))
        assert same_bits(first[0], step(params, batch, state, key(0))[0])
        assert same_bits(first[1], step(params, batch, state, key(0))[1])
        if not preset.damped:
            others = [step(params, batch, state, key(seed))[1] for seed in range(1, 9)]
            assert not all(same_bits(first[1], other) for other in others), "the key is not used"


@pytest.mark.parametrize("name", ["sophia_g", "adahessian"])
def test_the_key_is_folded_with_the_step(name):
    """The same key at two steps draws two different probes."""
    preset = presets.BY_NAME[name]
    with precision("float32"):
        options = {"eval_every_k": 1, "beta2": 0.0}
        method = preset.make(MODEL, **options)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, preset.kind, jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        seen = []
        for _ in range(4):
            _, state, _ = step(params, batch, state, key())
            seen.append(state)
        # With beta2 = 0 the curvature part of the state is the last draw alone; parameters and batch do not change.
        leaves = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.preconditioner)]) for s in seen]
        assert any(not np.array_equal(leaves[0], other) for other in leaves[1:])


@pytest.mark.parametrize("name", ["sgn_ce"])
def test_step_works_without_jit(name):
    preset = presets.BY_NAME[name]
    with precision("float32"):
        method = preset.make(MODEL, learning_rate=0.1)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, preset.kind, jnp.float32)
        state = method.init(params)
        eager = method.step(params, batch, state, key())[0]
        compiled = quick_jit(method.step)(params, batch, state, key())[0]
    np.testing.assert_allclose(dense.vector(eager), dense.vector(compiled), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("preset", presets.TABLE, ids=str)
def test_init_is_shapes_only(preset):
    """`init` can be traced and evaluated abstractly, and the step keeps every shape and dtype of the state."""
    with precision("float32"):
        method = preset.make(MODEL)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, preset.kind, jnp.float32)
        abstract = jax.eval_shape(method.init, params)
        _, after, info = jax.eval_shape(method.step, params, batch, abstract, key())
    assert abstract == after
    assert all(value.shape == () for value in info.values()), "info holds scalars only"


def test_every_listed_method_can_be_made_by_name():
    for preset in presets.TABLE:
        assert preset.name in curvax.list_methods()
        assert preset.name in str(curvax.describe(preset.name))
    made = curvax.make("sgn_ce", predict_fn=MODEL.predict, lam0=0.1)
    direct = curvax.sgn_ce(predict_fn=MODEL.predict, lam0=0.1)
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        a = quick_jit(made.step)(params, batch, made.init(params), key())[0]
        b = quick_jit(direct.step)(params, batch, direct.init(params), key())[0]
    assert same_bits(a, b)


def test_weakly_typed_parameters_compile_once_more_and_no_third_time():
    """What a step returns has dtypes of its own: the second call is another program, and the state adds no third."""

    def predict(p, x):
        return jnp.tanh(x @ p["w"]) * p["scale"]

    params = {"w": jnp.full((2, 1), 0.3), "scale": jnp.array(0.1)}
    batch = {"x": jnp.ones((4, 2)), "y": jnp.ones((4, 1))}
    method = curvax.sophia_g(predict_fn=predict, loss=SquaredError())
    step: Any = jax.jit(method.step)
    state = method.init(params)
    for _ in range(3):
        params, state, _ = step(params, batch, state, jax.random.key(0))
    assert step._cache_size() == 2
