"""Diagonal methods whose step is one pass over the parameters against the same modules taken one after another."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import ffi, kernels
from curvax.plan import Entrywise, entrywise
from curvax.telemetry import Metric, MetricRecord
from tests.integration import presets
from tests.integration.harness import batch_of, key, precision
from tests.oracle import models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
NAMES = ("sophia_g", "sophia_h", "adahessian")


def _matrices_only(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _halving(count):
    """A schedule of exact values: two programs may round the arithmetic of another one in float32 differently."""
    return jnp.asarray([0.5, 0.25, 0.125, 0.0625])[jnp.minimum(count, 3)]


OPTIONS = {
    "defaults": {},
    "every_step": {"eval_every_k": 1},
    "every_3": {"eval_every_k": 3},
    "schedule": {"learning_rate": _halving},
    "array_rate": {"learning_rate": np.asarray(0.02)},
    "no_mean": {"beta1": 0.0},
    "plan_off": {"plan": "off", "eval_every_k": 2},
    "microbatches": {"microbatch_size": 4},
    "frozen": {"frozen": lambda params: jax.tree.map(lambda leaf: leaf.ndim == 1, params)},
    "reference": {"backend": "reference"},
}


def _method(name, **options):
    return presets.BY_NAME[name].make(MODEL.predict, **options)


def _apart(method):
    """The same modules, the transform as a chain that the planner does not know."""
    chain = method.assembly.transform
    plain = optax.GradientTransformationExtraArgs(chain.init, chain.update)
    apart = dataclasses.replace(method, assembly=dataclasses.replace(method.assembly, transform=plain))
    assert isinstance(entrywise(method.assembly), Entrywise)
    assert isinstance(entrywise(apart.assembly), str)
    return apart


def _run(method, kind, dtype, steps=5, spoil=()):
    params, batch = MODEL.params(dtype), batch_of(MODEL, kind, dtype)
    step, state = quick_jit(method.step), method.init(params)
    infos = []
    for i in range(steps):
        used = jax.tree.map(lambda x: x * np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else x, batch)
        params, state, info = step(params, used if i in spoil else batch, state, key())
        info.pop("learning_rate", None)  # the planner does not know that of a chain
        infos.append(info)
    return params, state, infos


def _same(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS)
def test_one_pass_is_the_same_as_several(name, options):
    given = OPTIONS[options]
    if options == "defaults":
        mask = {"weight_decay": 0.1, "weight_decay_mask" if name == "adahessian" else "mask": _matrices_only}
        given = {**given, **mask}
    with precision("float64"):
        method = _method(name, **given)
        kind = presets.BY_NAME[name].kind
        _same(_run(method, kind, jnp.float64), _run(_apart(method), kind, jnp.float64), 1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_parameters(name, dtype):
    with precision("float32"):
        method = _method(name, eval_every_k=1, learning_rate=1e-2)
        kind = presets.BY_NAME[name].kind
        ours, theirs = (_run(m, kind, jnp.dtype(dtype), steps=2) for m in (method, _apart(method)))
        # The quotient of two small numbers magnifies what the gradients' rounding differs in.
        _same(ours, theirs, 2e-2 if dtype == "bfloat16" else 1e-4)
        assert all(leaf.dtype == jnp.dtype(dtype) for leaf in jax.tree.leaves(ours[0]))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_is_rejected_alike(name):
    with precision("float64"):
        method = _method(name, eval_every_k=2, learning_rate=_halving)
        kind = presets.BY_NAME[name].kind
        ours, theirs = (_run(m, kind, jnp.float64, spoil=(1, 2)) for m in (method, _apart(method)))
        _same(ours, theirs, 1e-11)
        assert [bool(info["accepted"]) for info in ours[2]] == [True, False, False, True, True]
        assert int(ours[1].rejected) == 2


def test_a_state_goes_from_one_way_to_the_other():
    with precision("float64"):
        method = _method("sophia_h", eval_every_k=1)
        apart = _apart(method)
        params, batch = MODEL.params(), batch_of(MODEL, presets.BY_NAME["sophia_h"].kind, "float64")
        p, state, _ = quick_jit(method.step)(params, batch, method.init(params), key())
        _same(quick_jit(method.step)(p, batch, state, key()), quick_jit(apart.step)(p, batch, state, key()), 1e-11)


def test_donation_scan_and_vmap():
    with precision("float64"):
        method = _method("adahessian")
        kind = presets.BY_NAME["adahessian"].kind
        params, batch = MODEL.params(), batch_of(MODEL, kind, "float64")
        want, _, _ = _run(method, kind, jnp.float64, steps=4)

        def scanned(params, state):
            def body(carry, _):
                return method.step(carry[0], batch, carry[1], key())[:2], None

            return jax.lax.scan(body, (params, state), None, length=4)[0]

        donated = quick_jit(scanned, donate_argnums=(0, 1))
        got, _ = donated(jax.tree.map(jnp.copy, params), method.init(params))
        _same(got, want, 1e-11)
        many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
        got, _ = quick_jit(jax.vmap(scanned))(many, jax.vmap(method.init)(many))
        _same(jax.tree.map(lambda leaf: leaf[0], got), want, 1e-10)


def test_an_eager_step_tells_the_update_it_applied():
    with precision("float64"):
        method = _method("sophia_h")
        params, batch = MODEL.params(), batch_of(MODEL, presets.BY_NAME["sophia_h"].kind, "float64")
        trainable, frozen = method.assembly.partition.split(params)
        proposal = method.propose(trainable, frozen, batch, method.init(params), key())
        _same(jax.tree.map(jnp.add, trainable, proposal.update), proposal.params, 1e-15)


def test_the_plan_names_the_ops():
    with precision("float32"):
        for name, wanted in {
            "sophia_g": ["diagonal_accumulate", "diagonal_update"],
            "adahessian": ["diagonal_accumulate", "hutchinson_reduce", "diagonal_update"],
        }.items():
            params, batch = MODEL.params(jnp.float32), batch_of(MODEL, presets.BY_NAME[name].kind, jnp.float32)
            plan = _method(name).plan_for(params, batch)
            assert [choice.op for choice in plan.choices] == wanted
            if ffi.native_status().available:
                assert plan.choices[-1].implementation == "native"
            plain = _method(name, backend="reference").plan_for(params, batch)
            assert {choice.implementation for choice in plain.choices} == {"reference"}


def test_the_backend_decides_what_runs():
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, presets.BY_NAME["sophia_g"].kind, jnp.float32)
        method = _method("sophia_g", backend="reference", eval_every_k=1)
        kernels.clear_report()
        jax.eval_shape(method.step, params, batch, method.init(params), key())
        ran = {record.choice.op: record.choice.implementation for record in kernels.report()}
        assert ran == {"diagonal_accumulate": "reference", "diagonal_update": "reference"}
        with curvax.strict_backend(), pytest.raises(kernels.Unsupported, match="diagonal_accumulate has no pallas"):
            method = _method("sophia_g", backend="pallas")
            jax.eval_shape(method.step, params, batch, method.init(params), key())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tx": optax.sgd(0.1)}, "chain of its own"),
        ({"metrics": (MetricRecord(Metric.UPDATE_NORM),)}, "update_norm is recorded"),
        ({"metrics": (MetricRecord(Metric.LOSS_AFTER, 3),)}, "loss_after is recorded"),
        ({"weight_decay": optax.constant_schedule(0.1)}, "weight decay is a schedule"),
    ],
)
def test_what_takes_several_passes_says_why(options, reason):
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, presets.BY_NAME["sophia_g"].kind, jnp.float32)
        method = _method("sophia_g", **options)
        assert reason in method.plan_for(params, batch).explain()
        _, _, info = quick_jit(method.step)(params, batch, method.init(params), key())
        assert bool(info["accepted"])
        assert all(np.isfinite(info[record.metric.value]) for record in options.get("metrics", ()))
