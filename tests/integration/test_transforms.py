"""What happens to the direction after the solve: learning rate, clipping, decay, momentum, a chain of one's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.losses import SoftmaxCrossEntropy
from tests.integration.harness import batch_of, key, precision, standard_truth, truth_of
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
LAM = 0.1


def _matrices_only(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


CASES = {
    "learning_rate": ({"learning_rate": 0.25}, lambda: optax.scale(-0.25)),
    "schedule": (
        {"learning_rate": optax.linear_schedule(0.5, 0.1, 3)},
        lambda: optax.scale_by_learning_rate(optax.linear_schedule(0.5, 0.1, 3)),
    ),
    "decay_mask": (
        {"learning_rate": 0.5, "weight_decay": 0.1, "weight_decay_mask": _matrices_only},
        lambda: optax.chain(optax.add_decayed_weights(0.1, mask=_matrices_only), optax.scale(-0.5)),
    ),
    "nesterov": (
        {"learning_rate": 0.5, "direction_momentum": 0.8, "nesterov": True},
        lambda: optax.chain(optax.trace(0.8, nesterov=True), optax.scale(-0.5)),
    ),
    "everything": (
        {"learning_rate": 0.5, "direction_momentum": 0.8, "clip_norm": 0.3, "weight_decay": 0.1},
        lambda: optax.chain(
            optax.trace(0.8), optax.clip_by_global_norm(0.3), optax.add_decayed_weights(0.1), optax.scale(-0.5)
        ),
    ),
    "own_chain": (
        {"tx": optax.chain(optax.scale_by_sign(), optax.scale(-0.01))},
        lambda: optax.chain(optax.scale_by_sign(), optax.scale(-0.01)),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_three_steps_are_the_dense_directions_through_the_same_chain(name):
    options, chain = CASES[name]
    with precision("float64"):
        method = curvax.ggn_direct_ce(predict_fn=MODEL.predict, lam0=LAM, **options)
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        step, state = quick_jit(method.step), method.init(params)
        tx = chain()
        ours, theirs, theirs_state = params, params, tx.init(params)
        for _ in range(3):
            ours, state, _ = step(ours, batch, state, key())
            flat = truth_of(MODEL, "ce", theirs, batch).direction(LAM)
            direction = jax.tree.map(jnp.asarray, dense.like(flat, theirs))
            update, theirs_state = tx.update(direction, theirs_state, theirs)
            theirs = optax.apply_updates(theirs, update)
        # Optax evaluates schedules in float32, compiled a little differently from op by op.
        tolerance = 1e-6 if name == "schedule" else 1e-8
        np.testing.assert_allclose(dense.vector(ours), dense.vector(theirs), rtol=tolerance, atol=1e-2 * tolerance)


@pytest.mark.fast
def test_the_default_transform_subtracts_the_direction():
    with precision("float64"):
        method = curvax.egn_ce(predict_fn=MODEL.predict, lam0=LAM)
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        new, _, _ = quick_jit(method.step)(params, batch, method.init(params), key())
        want = dense.vector(params) - standard_truth(MODEL, "ce").direction(LAM)
        np.testing.assert_allclose(dense.vector(new), want, rtol=1e-9, atol=1e-11)


# Inner loops have no chain of their own behind the step: their optimizer is inside.
@pytest.mark.parametrize("name", sorted(set(curvax.list_methods()) - {"full_gn", "layerwise_gn"}))
def test_every_preset_takes_a_chain_in_place_of_its_own(name):
    """Whatever the defaults of the preset are; only a keyword that was given stands against it."""
    known = curvax.describe(name).signature.parameters
    options = {"predict_fn": MODEL.predict} | ({"loss": SoftmaxCrossEntropy()} if "loss" in known else {})
    chain = optax.sgd(0.1)
    assert curvax.make(name, **options, tx=chain).assembly.transform.init == chain.init
    given = {"learning_rate": 0.123, "weight_decay": 0.123, "clip_norm": 0.123, "clip_value": 0.123}
    for word in set(given) & set(known):
        with pytest.raises(ValueError, match=f"tx already is the whole transform: drop {word}, or drop tx"):
            curvax.make(name, **options, tx=chain, **{word: given[word]})


def test_a_chain_and_the_knobs_it_would_replace_exclude_each_other():
    with pytest.raises((TypeError, ValueError), match="tx"):
        curvax.sgn_ce(predict_fn=MODEL.predict, tx=optax.sgd(0.1), learning_rate=0.1)
