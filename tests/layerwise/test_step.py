"""Steps of full and layerwise Gauss-Newton: against loops by hand, dense solves, and their own streaming form."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.layerwise import ByGroup, ByLeaf, ConjugateGradients, LineSearch, as_gradient_transformation
from curvax.layerwise import full_gn as make_full
from curvax.layerwise import layerwise_gn as make_layerwise
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.solvers import CG
from tests.oracle import dense, losses, models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
BATCH = MODEL.input_shape[0]
RATE = 0.1  # of the inner optimizer: some steps are taken whole, some shortened, some not at all
RULES = {"full": None, "leaves": ByLeaf()}


def build(rule: Any = None, **options: Any) -> Any:
    options = {
        "predict_fn": MODEL.predict,
        "loss": SoftmaxCrossEntropy(),
        "inner": optax.adamw(0.05, weight_decay=0.01),
        "inner_steps": 3,
        **options,
    }
    return make_full(**options) if rule is None else make_layerwise(partition=rule, **options)


def data(parts: int, seed: int = 0, dtype: Any = jnp.float64) -> dict[str, jax.Array]:
    """`parts` minibatches of the model's own size, one after another."""
    x = [MODEL.inputs(dtype, seed * 100 + i) for i in range(parts)]
    y = [MODEL.labels(seed * 100 + i) for i in range(parts)]
    return {"x": jnp.concatenate(x), "y": jnp.concatenate(y)}


def part(batch: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i * BATCH : (i + 1) * BATCH], batch)


def inner_gradient(params: Any, delta: Any, batch: Any, rule: Any) -> Any:
    """J_b^T (g0 + H J_b delta_b), block after block, from JAX's own derivatives."""
    f = lambda p: MODEL.predict(p, batch["x"])  # noqa: E731
    f0, vjp = jax.vjp(f, params)
    loss = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()  # noqa: E731

    def for_delta(d: Any) -> Any:
        v = jax.jvp(f, (params,), (d,))[1]
        slope, curved = jax.jvp(jax.grad(loss), (f0,), (v,))
        return vjp(slope + curved)[0]

    if rule is None:
        return for_delta(delta)
    leaves, structure = jax.tree.flatten(delta)
    own = []
    for i in range(len(leaves)):
        alone = [x if i == j else jnp.zeros_like(x) for j, x in enumerate(leaves)]
        own.append(jax.tree.leaves(for_delta(jax.tree.unflatten(structure, alone)))[i])
    return jax.tree.unflatten(structure, own)


@quick_jit
def _loss(params: Any, batch: Any) -> jax.Array:
    logits = MODEL.predict(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def loss_at(params: Any, batch: Any) -> float:
    return float(_loss(params, batch))


def by_hand(rule: Any, params: Any, batches: list[Any], steps: int, clip: float, candidates: int) -> list[Any]:
    """The paper's loop in plain Python."""
    tx = optax.adamw(RATE, weight_decay=0.01)
    gradient_of = quick_jit(lambda p, d, b: inner_gradient(p, d, b, rule))
    with jax.numpy_dtype_promotion("standard"):
        state, start, found = tx.init(params), jax.tree.map(jnp.zeros_like, params), []
        for batch in batches:
            theta, before = jax.tree.map(jnp.add, params, start), state
            for i in range(steps):
                delta = jax.tree.map(jnp.subtract, theta, params)
                gradient = gradient_of(params, delta, part(batch, i))
                whole = optax.tree.norm(gradient)
                norms = jax.tree.map(lambda g: whole if rule is None else jnp.linalg.norm(g), gradient)  # noqa: B023
                gradient = jax.tree.map(lambda g, n: g * min(1.0, clip / float(n)), gradient, norms)
                updates, state = tx.update(gradient, state, theta)
                factor = 0.5 * (1 + np.cos(np.pi * i / steps))
                theta = jax.tree.map(lambda t, u: t + factor * u, theta, updates)  # noqa: B023
            tried = [0.0, *(0.5 ** (0.5 * i) for i in range(candidates))]
            step = jax.tree.map(jnp.subtract, theta, params)
            scores = [
                loss_at(jax.tree.map(lambda p, s: p + a * s, params, step), part(batch, steps))  # noqa: B023
                for a in tried
            ]
            alpha = tried[int(np.argmin(scores))]
            if alpha == 0:  # nothing is taken, and the next loop starts afresh
                theta, state = params, before
            params = jax.tree.map(lambda p, s: p + alpha * s, params, step)  # noqa: B023
            start = jax.tree.map(jnp.subtract, theta, params)
            found.append((params, alpha, scores))
    return found


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_step_is_the_loop_written_by_hand(rule: Any, x64: None) -> None:
    params, batches = MODEL.params(), [data(4, seed) for seed in range(4)]
    inner = optax.adamw(RATE, weight_decay=0.01)
    method = build(rule, inner=inner, clip_norm=0.05, line_search=LineSearch(candidates=4))
    state, step = method.init(params), quick_jit(method.step)
    loop = by_hand(rule, params, batches, 3, 0.05, 4)
    kinds = {float(np.ceil(alpha) + (alpha == 1)) for _, alpha, _ in loop}
    assert kinds == {0.0, 1.0, 2.0}, "one step is taken whole, one shortened (the warm start matters), one not at all"
    for batch, (expected, alpha, scores) in zip(batches, loop, strict=True):
        params, state, info = step(params, batch, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), params, expected)
        np.testing.assert_allclose(float(info["step_size"]), alpha, rtol=1e-12)
        np.testing.assert_allclose(float(info["search_loss"]), scores[0], rtol=1e-9)
        np.testing.assert_allclose(float(info["search_loss_after"]), min(scores), rtol=1e-9)


def test_streaming_is_the_step(x64: None) -> None:
    params = MODEL.params()
    method = build(ByLeaf(), shares=2, line_search=LineSearch(2, minibatches=2, chunk=2))
    whole, parts = quick_jit(method.step), quick_jit(method.accumulate, donate_argnums=0)
    finish = quick_jit(method.finish)
    a = b = (params, method.init(params))
    for seed in range(2):
        batch = data(method.parts, seed)
        a = whole(a[0], batch, a[1])
        carry = method.start(*b[:2])
        for i in range(3):
            carry = parts(carry, part(batch, i))
        b = finish(carry, jax.tree.map(lambda x: x[3 * BATCH :], batch))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), a, b)
    assert parts._cache_size() == 1


@pytest.mark.fast
def test_search_picks_the_best_candidate_and_rejects_what_is_worse(x64: None) -> None:
    params, batch = MODEL.params(), data(4)
    tried: dict[float, float] = {}
    for rate in (0.3, -0.3):  # a negative rate climbs
        tx = optax.sgd(rate, momentum=0.5)
        method = build(inner=tx, line_search=LineSearch(5, 0.5))
        before = method.init(params)
        after, state, info = quick_jit(method.step)(params, batch, before)
        whole = build(inner=tx, line_search=None)
        inside = jax.tree.map(lambda x: x[: 3 * BATCH], batch)
        full, _, _ = quick_jit(whole.step)(params, inside, whole.init(params))
        for i in range(5):
            moved = jax.tree.map(lambda p, f: p + 0.5**i * (f - p), params, full)  # noqa: B023
            tried[0.5**i] = loss_at(moved, part(batch, 3))
        tried[0.0] = loss_at(params, part(batch, 3))
        assert float(info["step_size"]) == min(tried, key=tried.__getitem__)
        assert int(info["rejected"]) == int(state.rejected) == (rate < 0) and int(state.step) == 1
        assert bool(info["accepted"]) == (rate > 0)
        if rate < 0:
            kept = (params, before.inner, before.offset)
            jax.tree.map(np.testing.assert_array_equal, (after, state.inner, state.offset), kept)


def _near_a_pole(at: float) -> Any:
    """One parameter that an inner step takes from 1 to 2; log|f - at| is minus infinity where the search meets `at`."""

    def pole(f: jax.Array, y: jax.Array) -> jax.Array:
        near = jnp.log(jnp.abs(f[0] - at)) * y[0]
        return 0.5 * (f[0] - 2) ** 2 + near

    return make_full(
        predict_fn=lambda p, x: x * p["w"], loss=curvax.losses.CustomLoss(pole), inner=optax.sgd(1.0), inner_steps=1,
        inner_schedule=optax.constant_schedule(1.0), line_search=LineSearch(3, 0.5), warm_start=False,
    )  # fmt: skip


@pytest.mark.parametrize(("pole", "taken"), [(2.0, 0.5), (1.5, 1.0), (1.25, 1.0)])
def test_a_candidate_of_loss_minus_infinity_does_not_win(pole: float, taken: float, x64: None) -> None:
    method = _near_a_pole(pole)
    params = {"w": jnp.ones(())}
    # The inner minibatch has no pole (its target is 0), the search's has.
    batch = {"x": jnp.ones((2, 1)), "y": jnp.asarray([[0.0], [1e-3]])}
    after, _, info = quick_jit(method.step)(params, batch, method.init(params))
    assert np.isfinite(float(info["search_loss_after"])) and float(info["step_size"]) == taken
    assert float(after["w"]) == 1 + taken and bool(info["accepted"])


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    params = MODEL.params(jnp.float32)
    method = build()
    batch = data(method.parts, dtype=jnp.float32)
    batch["x"] = batch["x"].at[2 * BATCH].set(jnp.nan)
    before = method.init(params)
    after, state, info = quick_jit(method.step)(params, batch, before)
    assert not bool(info["accepted"]) and not bool(info["finite"]) and int(info["rejected"]) == 1
    jax.tree.map(np.testing.assert_array_equal, (after, state.inner), (params, before.inner))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.offset))


def test_an_inner_state_that_overflows_is_not_kept() -> None:
    """The square of such a gradient is infinite, and Adam's update with it zero, now and for ever."""
    params = MODEL.params(jnp.float32)
    method = build(
        inner=optax.adam(1e-2), line_search=None, loss=SoftmaxCrossEntropy(reduction="sum"), weight_key="w"
    )  # fmt: skip
    batch = data(method.parts, dtype=jnp.float32)
    before = method.init(params)
    step = quick_jit(method.step)
    for weight in (1.0, 1e25):
        weighted = {**batch, "w": jnp.full(batch["x"].shape[0], weight, jnp.float32)}
        _, state, info = step(params, weighted, before)
        assert np.isfinite(float(info["loss"])) and bool(info["accepted"]) == bool(info["finite"]) == (weight == 1.0)
    jax.tree.map(np.testing.assert_array_equal, state.inner, before.inner)


LAM = 0.05
EXACT = ConjugateGradients(CG(tol=1e-13, maxiter=400), lam=LAM)


def test_conjugate_gradients_on_one_minibatch_are_egn(x64: None) -> None:
    params, batch = MODEL.params(), data(1)
    method = build(inner=EXACT, inner_steps=1, line_search=None)
    after, _, info = quick_jit(method.step)(params, batch, method.init(params))
    egn = curvax.egn_ce(predict_fn=MODEL.predict, lam0=LAM, learning_rate=1.0)
    expected, _, _ = quick_jit(egn.step)(params, batch, egn.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), after, expected)
    assert float(info["residual"]) < 1e-11 and int(info["iterations"]) > 3


def test_conjugate_gradients_solve_every_block(x64: None) -> None:
    params, batch = MODEL.params(), data(1)
    method = build(ByLeaf(), inner=EXACT, inner_steps=1, line_search=None)
    after, _, _ = quick_jit(method.step)(params, batch, method.init(params))
    truth = dense.truth(MODEL.predict, losses.softmax_cross_entropy, params, batch["x"], batch["y"])
    block = np.repeat(np.arange(len(jax.tree.leaves(params))), [x.size for x in jax.tree.leaves(params)])
    curvature = truth.ggn * (block[:, None] == block[None, :])
    expected = dense.vector(params) - dense.damped_direction(curvature, truth.gradient, LAM)
    np.testing.assert_allclose(dense.vector(after), expected, rtol=1e-7, atol=1e-9)


def test_undamped_conjugate_gradients_take_the_least_squares_step(x64: None) -> None:
    """A linear model with squared error: one full Gauss-Newton step is the solution of the normal equations."""
    x = jax.random.normal(jax.random.key(0), (12, 4))
    y = jax.random.normal(jax.random.key(1), (12, 3))
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    method = make_full(
        predict_fn=lambda p, x: x @ p["w"] + p["b"],
        loss=SquaredError(),
        inner=ConjugateGradients(CG(tol=1e-14, maxiter=50)),
        inner_steps=1,
        line_search=None,
    )
    after, _, _ = quick_jit(method.step)(params, {"x": x, "y": y}, method.init(params))
    expected = np.linalg.lstsq(np.c_[x, np.ones(12)], np.asarray(y), rcond=None)[0]
    np.testing.assert_allclose(np.r_[after["w"], after["b"][None]], expected, rtol=1e-9)


def test_blend_with_adam_is_the_dense_system(x64: None) -> None:
    params, mix, eta, beta2 = MODEL.params(), 0.6, 0.02, 0.9
    solver = ConjugateGradients(CG(tol=1e-13, maxiter=400), mix=mix, eta=eta, beta2=beta2, eps=1e-3)
    method = build(inner=solver, inner_steps=1, line_search=None)
    state, step = method.init(params), quick_jit(method.step)
    square = 0.0
    for i in range(2):
        batch = data(1, i)
        truth = dense.truth(MODEL.predict, losses.softmax_cross_entropy, params, batch["x"], batch["y"])
        square = beta2 * square + (1 - beta2) * truth.gradient**2
        root = np.sqrt(square / (1 - beta2 ** (i + 1)))
        matrix = mix * truth.ggn + np.diag((1 - mix) / eta * (root + 1e-3 * root.mean()))
        expected = dense.vector(params) - np.linalg.solve(matrix, truth.gradient)
        params, state, _ = step(params, batch, state)
        np.testing.assert_allclose(dense.vector(params), expected, rtol=1e-7, atol=1e-9)


def test_scale_of_the_loss_changes_nothing(x64: None) -> None:
    params, batch = MODEL.params(), data(2)
    method = build(
        inner=ConjugateGradients(CG(tol=1e-12, maxiter=300), mix=0.5, eta=0.1),
        inner_steps=1,
        loss=SoftmaxCrossEntropy(reduction="sum"),
        weight_key="w",
    )
    step = quick_jit(method.step)

    def run(factor: float) -> Any:
        weighted = {**batch, "w": jnp.full(batch["x"].shape[0], factor)}
        return step(params, weighted, method.init(params))[0]

    for scale in (1e-6, 1e6):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), run(1.0), run(scale))


def test_narrow_parameters_keep_their_dtype_and_lose_no_step() -> None:
    dtype = jnp.bfloat16
    params = MODEL.params(dtype)
    method = build(ByLeaf(), inner=optax.adam(1e-2), line_search=None)
    state, step = method.init(params), quick_jit(method.step)
    start = dense.vector(params)
    after, state, _ = step(params, data(3, dtype=dtype), state)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state.offset)} == {jnp.dtype(jnp.float32)}
    exact = build(ByLeaf(), inner=optax.adam(1e-2), line_search=None)
    wide = MODEL.params(jnp.float32)
    reference = dense.vector(
        quick_jit(exact.step)(wide, data(3, dtype=jnp.float32), exact.init(wide))[0]
    ) - dense.vector(wide)
    # What rounding of the parameters took away stands in the offset: the two together are the float32 step.
    moved = dense.vector(after) + dense.vector(state.offset) - start
    assert dense.relative_error(moved, reference) < 0.2


def test_steps_scan_and_never_retrace(x64: None) -> None:
    params, traces = MODEL.params(), []

    def predict(p: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return MODEL.predict(p, x)

    method = build(ByLeaf(), predict_fn=predict)
    step = quick_jit(method.step)
    batches = [data(4, seed) for seed in range(3)]
    a = (params, method.init(params))
    a = step(a[0], batches[0], a[1])
    count = len(traces)
    for batch in batches[1:]:
        a = step(a[0], batch, a[1])
    assert len(traces) == count and step._cache_size() == 1
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    scan = quick_jit(lambda p, s: jax.lax.scan(lambda c, b: (method.step(c[0], b, c[1])[:2], None), (p, s), stacked)[0])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), scan(params, method.init(params)), a[:2]
    )


def test_optax_face_wraps_the_inner_optimizer(x64: None) -> None:
    params, batch = MODEL.params(), data(4)
    method = build(frozen=[True, False])
    tx = optax.chain(as_gradient_transformation(method), optax.scale(0.5))

    @quick_jit
    def update(p: Any, s: Any) -> Any:
        updates, s = tx.update(jax.tree.map(jnp.zeros_like, p), s, p, batch=batch, rng=jax.random.key(0))
        return optax.apply_updates(p, updates), s

    found, _ = update(params, tx.init(params))
    whole, _, _ = quick_jit(method.step)(params, batch, method.init(params))
    jax.tree.map(np.testing.assert_array_equal, found[0], params[0])
    jax.tree.map(lambda a, p, w: np.testing.assert_allclose(a, p + 0.5 * (w - p), rtol=1e-9), found, params, whole)
    with pytest.raises(ValueError, match=r"call update\(grads, state, params, batch=batch\)"):
        tx.update(params, tx.init(params), params)


def test_dropout_keys_and_model_state_pass_through(x64: None) -> None:
    """The model counts its calls and gets another key for every minibatch and step."""
    params = {"w": jnp.ones((3, 2))}

    def predict(p: Any, x: jax.Array, count: jax.Array, rng: jax.Array) -> Any:
        keep = jax.random.bernoulli(rng, 0.5, x.shape).astype(x.dtype)
        return (x * keep) @ p["w"], count + 1

    method = make_full(
        predict_fn=predict, loss=SoftmaxCrossEntropy(), inner=optax.sgd(0.1), inner_steps=3, has_state=True,
        has_rng=True, line_search=None, inner_schedule=optax.constant_schedule(1.0),
    )  # fmt: skip
    x, y = jnp.tile(jnp.arange(1.0, 13.0).reshape(4, 3), (3, 1)), jnp.tile(jnp.asarray([0, 1, 1, 0]), 3)
    step = quick_jit(method.step)
    state = method.init(params, model_state=jnp.zeros((), jnp.int32))
    first, later, _ = step(params, {"x": x, "y": y}, state, jax.random.key(0))
    again, _, _ = step(params, {"x": x, "y": y}, state, jax.random.key(0))
    other, _, _ = step(params, {"x": x, "y": y}, state, jax.random.key(1))
    assert int(later.model_state) == 3
    np.testing.assert_array_equal(first["w"], again["w"])
    assert np.max(np.abs(first["w"] - other["w"])) > 1e-3


def test_plan_counts_blocks_and_work() -> None:
    width, layers = 64, 6

    def predict(p: Any, x: jax.Array) -> jax.Array:
        for w in p["layers"]:
            x = jnp.tanh(x @ w)
        return x @ p["head"]

    params = {"layers": [jnp.zeros((width, width))] * layers, "head": jnp.zeros((width, 4))}
    batch = {"x": jnp.zeros((400, width)), "y": jnp.zeros((400,), jnp.int32)}
    method = make_layerwise(
        predict_fn=predict, loss=SoftmaxCrossEntropy(), inner=optax.sgd(0.1), inner_steps=3,
        partition=ByGroup(split=("layers",)),
    )  # fmt: skip
    plan = method.plan_for(params, batch)
    assert plan.blocks == (("head", 4 * width), *((f"layers/{i}", width**2) for i in range(layers)))
    # In products per layer: forward 1; own tangents 1 and passing ones (L - 1) / 2, twice; full: 1 + 2 + 2, of which
    # the first layer passes nothing on.
    forms = (layers + 2 * (layers + layers * (layers - 1) / 2)) / (layers + 2 * (2 * layers - 1))
    assert plan.over_full == pytest.approx(forms, rel=0.1)
    shared = dataclasses.replace(method, problem=dataclasses.replace(method.problem, shares=7)).plan_for(params, batch)
    # Of each example one block, L out of L + 1 times a hidden one: forward and gradient, own tangent 1 and passing ones
    # (L - 1) / 2, twice.
    carried = 2 * (1 + (layers - 1) / 2) * layers / (layers + 1)
    forms = (layers + 2 * layers - 1 + carried) / (layers + 2 * (2 * layers - 1))
    assert shared.over_full == pytest.approx(forms, rel=0.1)
    assert "7 shares" in shared.explain()
    text = plan.explain()
    assert "layers/5" in text and "blocks' inner gradient" in text and "3 inner steps" in text
    assert "softmax_hvp" in text and method.plan.over_full is None
    assert "needs shapes" in method.plan.explain()
    full = make_full(predict_fn=predict, loss=SoftmaxCrossEntropy(), inner=optax.sgd(0.1), inner_steps=3)
    assert full.plan_for(params, batch).over_full == 1.0


CHILD = """
    import os, pickle, signal, sys
    sys.path.insert(0, sys.argv[2])
    import jax
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    from tests.layerwise.test_step import resumable
    method, params, batches, step = resumable()
    state = method.init(params)
    for i, batch in enumerate(batches):
        params, state, _ = step(params, batch, state)
        with open(sys.argv[1] + ".new", "wb") as file:
            pickle.dump(jax.device_get(jax.tree.leaves((params, state))), file)
        os.replace(sys.argv[1] + ".new", sys.argv[1])
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def resumable() -> Any:
    """A method, parameters, batches and a compiled step; used by this process and by the one that is killed."""
    method = build(ByLeaf(), clip_norm=1.0)
    batches = [data(4, seed, jnp.float32) for seed in range(4)]
    return method, MODEL.params(jnp.float32), batches, quick_jit(method.step)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    import pickle

    saved = tmp_path / "state"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(saved), str(Path(__file__).parents[2])],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -9, done.stderr[-2000:]
    method, params, batches, step = resumable()
    whole = (params, method.init(params))
    structure = jax.tree.structure(whole)
    for batch in batches:
        whole = step(whole[0], batch, whole[1])[:2]
    resumed = jax.tree.unflatten(structure, pickle.loads(saved.read_bytes()))
    assert int(resumed[1].step) == 2
    for batch in batches[2:]:
        resumed = step(resumed[0], batch, resumed[1])[:2]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_errors_name_the_mend() -> None:
    params, batch = MODEL.params(jnp.float32), data(4, dtype=jnp.float32)
    method = build()
    state = method.init(params)
    short, few = (jax.tree.map(lambda a, n=n: a[:n], batch) for n in (-1, 4))
    crowded = build(ByLeaf(), shares=4)
    for call, message in (
        (lambda: method.step(params, short, state), r"a multiple of 4 \(3 inner minibatches and 1 of the line search"),
        (lambda: method.step(params, batch, build(inner=optax.sgd(0.1)).init(params)), "with another inner solver"),
        (lambda: method.step(params, batch, ()), "pass what init or the last step returned"),
        (lambda: method.step(params[0], batch, state), "another tree structure"),
        (lambda: build(warm_start=False).step(params, batch, state), "warm_start is False here"),
        (lambda: method.step(params, {"x": batch["x"]}, state), "the batch has no 'y'"),
        (lambda: method.finish(method.start(params, state)), "pass search_batch"),
        (lambda: build(line_search=None).finish(method.start(params, state), batch), "there is no line search"),
        (lambda: build(inner_steps=0), "inner_steps must be at least 1"),
        (lambda: build(inner="adam"), "pass an Optax optimizer"),
        (lambda: build(inner=EXACT), "set it to 1"),
        (lambda: build(inner=EXACT, inner_steps=1, prox_linear=True), "set prox_linear=False"),
        (lambda: build(inner=EXACT, inner_steps=1, clip_norm=1.0), "belong to an inner optimizer"),
        (lambda: build(clip_norm=0.0), "clip_norm must be positive"),
        (lambda: build(line_search=False), r"line_search is a bool: pass LineSearch\(\), or None"),
        (lambda: curvax.as_gradient_transformation(method.problem), "method is a InnerProblem: pass what a preset"),
        (lambda: build(rule="blocks"), r"pass ByGroup\(\)"),
        (lambda: build(rule=ByLeaf(), shares=0), "shares must be at least 1"),
        (lambda: crowded.step(params, few, crowded.init(params)), "make minibatches larger"),
        (lambda: build(microbatch_size=0), "microbatch_size must be at least 1"),
        (lambda: build(predict_fn=None), "predict_fn must be a function"),
        (lambda: build(loss=SoftmaxCrossEntropy), "pass an instance"),
        (lambda: LineSearch(ratio=1.0), "between 0 and 1"),
        (lambda: LineSearch(candidates=0), "candidates of a line search must be at least 1"),
        (lambda: ConjugateGradients(mix=2.0), "mix must be between 0 and 1"),
        (lambda: build(frozen=True).init(params), "there are no trainable parameters"),
        (
            lambda: build(has_state=True, predict_fn=lambda p, x, s: (MODEL.predict(p, x), s)).init(params),
            "pass model_",
        ),
    ):
        with pytest.raises((ValueError, TypeError, KeyError), match=message):
            call()
