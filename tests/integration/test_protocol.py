"""One protocol serves every method: presets of one linear system a step, and inner loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.layerwise import ByLeaf, InnerLoopMethod, LineSearch
from curvax.losses import SoftmaxCrossEntropy
from curvax.telemetry import Metric, MetricRecord
from tests.integration.harness import batch_of, key, precision
from tests.oracle import models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
COMMON: dict[str, Any] = {"predict_fn": MODEL.predict, "loss": SoftmaxCrossEntropy()}
INNER: dict[str, Any] = {**COMMON, "inner": optax.sgd(0.3, momentum=0.5), "inner_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "sgn": {**COMMON, "lam0": 1.0},  # of a smaller lam, iterations in float32 differ by more than is compared
    "egn": COMMON,
    "sophia_g": COMMON,
    "kfac": COMMON,
    "full_gn": INNER,
    "layerwise_gn": {**INNER, "partition": ByLeaf()},
}
by_name = pytest.mark.parametrize(("name", "options"), METHODS.items(), ids=METHODS)


def _data(dtype: Any = jnp.float32) -> tuple[Any, Any]:
    return MODEL.params(dtype), batch_of(MODEL, "ce", dtype)


@by_name
def test_one_protocol(name: str, options: dict[str, Any]) -> None:
    with precision("float32"):
        params, batch = _data()
        method = curvax.make(name, **options)
        assert isinstance(method, curvax.AbstractMethod)
        assert method.explain().startswith("plan: lane")
        assert "step, on average" in method.plan_for(params, batch).explain()
        assert method.plan_for(params, batch).cost.flops > 0
        state = method.init(params, batch=batch)
        assert (int(state.step), int(state.rejected)) == (0, 0) and state.model_state is None
        after, state, info = quick_jit(method.step)(params, batch, state, key())
        assert set(info) <= {metric.value for metric in Metric}
        assert {"step", "loss", "accepted", "finite", "rejected", "batch_fault"} <= set(info)
        assert all(value.shape == () for value in info.values()) and int(state.step) == 1
        # The same step through the parts that the Optax face calls, and through the face.
        trainable, frozen = method.partition.split(params)
        fresh = method.init_split(trainable, frozen, batch=batch)
        proposal = method.propose(trainable, frozen, batch, fresh, key())
        tx = curvax.as_gradient_transformation(method, batch=batch)
        grads = jax.grad(lambda p: SoftmaxCrossEntropy().value(MODEL.predict(p, batch["x"]), batch["y"], _mean(batch)))
        update = quick_jit(lambda p, s: tx.update(grads(p), s, p, batch=batch, rng=key()))
        updates, _ = update(params, tx.init(params))
        for other in (proposal.params, optax.apply_updates(params, updates)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after, other)


def _mean(batch: Any) -> jax.Array:
    examples = batch["y"].shape[0]
    return jnp.full((examples,), 1 / examples, jnp.float32)


@by_name
def test_the_same_sentences(name: str, options: dict[str, Any]) -> None:
    with precision("float32"):
        params, batch = _data()
        method = curvax.make(name, **options)
        for call, error, sentence in (
            (lambda: curvax.make(name, **options, lerning_rate=1), TypeError, f"{name} has no keyword 'lerning_rate'"),
            (lambda: curvax.make(name), TypeError, f"{name} needs predict_fn"),
            (lambda: getattr(curvax, name)(MODEL.predict), TypeError, f"{name} takes keywords only"),
            (lambda: method.step(params, batch, ()), TypeError, "pass what init or the last step returned"),
            (lambda: method.step(params, batch, method.init(params, batch=batch), 3), TypeError, "random key"),
            (lambda: method.step(params[0], batch, method.init(params, batch=batch)), ValueError, "tree structure"),
            (lambda: method.init(params, batch=batch, model_state=1), ValueError, "has_state=True"),
            (lambda: curvax.make(name, **options, frozen=True).init(params), ValueError, "no trainable parameters"),
        ):
            with pytest.raises(error, match=sentence):
                call()


def test_inner_loops_are_presets() -> None:
    assert {"full_gn", "layerwise_gn"} <= set(curvax.list_methods())
    assert curvax.full_gn is curvax.layerwise.full_gn and isinstance(curvax.full_gn(**INNER), InnerLoopMethod)
    assert "shares" in curvax.describe("layerwise_gn").keywords
    with pytest.raises(ValueError, match="Did you mean 'layerwise_gn'"):
        curvax.make("layer_wise_gn", **INNER)
    with pytest.raises(TypeError, match="Did you mean 'inner_steps'"):
        curvax.make("full_gn", **INNER, inner_step=3)
    with pytest.raises(TypeError, match="'learning_rate': the rate is the inner optimizer's"):
        curvax.make("full_gn", **INNER, learning_rate=0.1)
    with pytest.raises(TypeError, match="full_gn needs inner, inner_steps"):
        curvax.full_gn(**COMMON)


def test_a_batch_for_the_curvature_where_it_makes_sense() -> None:
    with precision("float32"):
        params, batch = _data()
        for name in ("sgn", "full_gn"):
            method = curvax.make(name, **METHODS[name])
            state = method.init(params)
            if method.takes_curvature_batch:
                method.step(params, batch, state, curvature_batch=batch)
                continue
            with pytest.raises(ValueError, match="drop curvature_batch"):
                method.step(params, batch, state, curvature_batch=batch)


def test_metrics_of_an_inner_loop() -> None:
    with precision("float32"):
        params, batch = _data()
        every_other = (MetricRecord(Metric.SEARCH_LOSS, 2),)
        method = curvax.full_gn(**INNER, record_loss_every_k=2, metrics=every_other)
        state, step = method.init(params), quick_jit(method.step)
        due = []
        for _ in range(3):
            params, state, info = step(params, batch, state)
            due.append((bool(jnp.isfinite(info["loss"])), bool(jnp.isfinite(info["search_loss"]))))
        assert due == [(True, True), (False, False), (True, True)]
    for build, metric in (
        (lambda record: curvax.full_gn(**INNER, metrics=(record,)), Metric.LAM),
        (lambda record: curvax.full_gn(**INNER, metrics=(record,), line_search=None), Metric.SEARCH_LOSS),
        (lambda record: curvax.full_gn(**INNER, metrics=(record,)), Metric.ITERATIONS),
        (lambda record: curvax.sgn(**COMMON, metrics=(record,)), Metric.STEP_SIZE),
    ):
        with pytest.raises(ValueError, match=f"has no {metric.value} to record"):
            build(MetricRecord(metric))


def test_an_inner_loop_on_a_part_of_the_parameters() -> None:
    """Within `optax.masked` it trains what is not masked, as it does with the rest frozen."""
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        mask = [False, True]
        tx = optax.masked(curvax.as_gradient_transformation(curvax.full_gn(**INNER)), mask)
        grads = jax.tree.map(jnp.ones_like, params)

        @quick_jit
        def update(params: Any, state: Any) -> Any:
            updates, state = tx.update(grads, state, params, batch=batch, full_params=params)
            return updates, state

        updates, _ = update(params, tx.init(params))
        frozen = curvax.full_gn(**INNER, frozen=[not m for m in mask])
        after, _, info = quick_jit(frozen.step)(params, batch, frozen.init(params))
        assert bool(info["accepted"])
        own = jax.tree.map(jnp.subtract, after[1], params[1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), updates[1], own)
        jax.tree.map(np.testing.assert_array_equal, updates[0], grads[0])
        with pytest.raises(ValueError, match=r"masked.*full_params=params"):
            tx.update(grads, tx.init(params), params, batch=batch)


def test_narrow_parameters_arrive_where_the_step_does() -> None:
    """An inner loop's next start is relative to its own parameters, so the face gives exact differences."""
    params, batch = MODEL.params(jnp.bfloat16), batch_of(MODEL, "ce", "bfloat16")
    method = curvax.full_gn(**INNER, line_search=LineSearch(2, 0.6))
    after, _, _ = quick_jit(method.step)(params, batch, method.init(params))
    tx = curvax.as_gradient_transformation(method)
    updates, _ = quick_jit(lambda p, s: tx.update(p, s, p, batch=batch))(params, tx.init(params))
    with jax.numpy_dtype_promotion("standard"):
        jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), after)
