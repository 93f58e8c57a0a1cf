"""What a peer library (python-somax 1.0.1, measured) gets wrong, one test per failure."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import curvax
from curvax.solvers import CG, Result, System
from tests.integration.harness import (
    LAMBDAS,
    TOLERANCE,
    Counter,
    CountingEstimator,
    all_finite,
    assert_close,
    batch_of,
    counted,
    directions,
    key,
    lam_sequence,
    moved,
    precision,
    same_bits,
    standard_truth,
    steps_where_more_ran,
    truth_of,
)
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_exact_gauss_newton_solves_the_softmax_system_itself(dtype):
    """Peer: rows S J in place of S^T J; off by .26 at lam 1, 1.29 at .1, 79-fold at 1e-3."""
    truth = standard_truth(models.MLP_RELU, "ce")
    with precision(dtype):
        method = curvax.egn_ce(predict_fn=models.MLP_RELU.predict, **lam_sequence())
        batch = batch_of(models.MLP_RELU, "ce", dtype)
        found, _ = directions(method, models.MLP_RELU.params(dtype), batch, len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, truth.direction(lam), TOLERANCE[dtype], f"lam {lam}")


def _system(size=40, condition=300.0):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    matrix = q @ np.diag(np.geomspace(1.0, condition, size)) @ q.T
    rhs = rng.standard_normal(size)
    return matrix, 7.5 * rhs / np.linalg.norm(rhs)


def test_conjugate_gradients_take_the_same_iterations_for_small_right_hand_sides():
    """Peer: an absolute epsilon in alpha: 37 iterations at |b| 7.5, not done in 200 at 7.5e-2, 73 % off at 7.5e-5."""
    matrix, b = _system()
    with precision("float32"):
        system = System(lambda v: jnp.asarray(matrix, jnp.float32) @ v)
        solver = CG(tol=1e-5, maxiter=200, warm_start=False)
        lam = jnp.asarray(0.0, jnp.float32)
        solve = quick_jit(lambda rhs: solver.solve(system, rhs, (), lam))
        want = np.linalg.solve(matrix, b)
        counts = []
        # Powers of two, so that the scaled systems are the same to the last bit.
        for scale in (1.0, 2.0**-7, 2.0**-13, 2.0**-17, 2.0**-40, 2.0**40):
            solution = solve(jnp.asarray(scale * b, jnp.float32))
            assert int(solution.result) == Result.CONVERGED
            assert dense.relative_error(np.asarray(solution.value, np.float64) / scale, want) < 1e-3
            counts.append(int(solution.iterations))
    assert len(set(counts)) == 1 and counts[0] < 80, counts


def test_newton_on_an_indefinite_hessian_stays_finite_and_reports_it():
    """Peer: NaN parameters at the first step (MLP 784-256-256-10, tanh, random labels, lam 1)."""
    widths = (784, 256, 256, 10)
    rng = np.random.default_rng(0)
    with precision("float32"):
        params = [
            {
                "w": jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32),
                "b": jnp.zeros(shape[1], jnp.float32),
            }
            for shape in itertools.pairwise(widths)
        ]
        batch = {
            "x": jnp.asarray(rng.standard_normal((64, 784)), jnp.float32),
            "y": jnp.asarray(rng.integers(0, 10, 64), jnp.int32),
        }

        def loss_fn(p, data):
            h = jnp.tanh(data["x"] @ p[0]["w"] + p[0]["b"])
            h = jnp.tanh(h @ p[1]["w"] + p[1]["b"])
            log_p = jax.nn.log_softmax(h @ p[2]["w"] + p[2]["b"])
            return -jnp.mean(jnp.take_along_axis(log_p, data["y"][:, None], -1))

        method = curvax.newton_cg(loss_fn=loss_fn, lam0=1e-3, learning_rate=0.3, maxiter=10)
        step, state = quick_jit(method.step), method.init(params)
        losses, results = [], []
        for _ in range(6):
            params, state, info = step(params, batch, state, key())
            losses.append(float(info["loss"]))
            results.append(int(info["result"]))
            assert all_finite(params) and all_finite(state)
    assert losses[-1] < losses[0]
    assert Result.NEGATIVE_CURVATURE in results


def test_a_bad_step_is_not_taken_and_raises_lam():
    """Peer: a step from loss 1.31 to 8.48 kept, lam unchanged."""
    with precision("float32"):
        method = curvax.sgn_ce(
            predict_fn=MODEL.predict, lam_policy="trust_region", lam0=1e-3, learning_rate=500.0, maxiter=50
        )
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        kept, state, info = step(params, batch, state, key())
        assert same_bits(params, kept) and not bool(info["accepted"]) and int(info["rejected"]) == 1
        _, _, following = step(kept, batch, state, key())
    assert float(following["lam"]) > float(info["lam"])


@dataclasses.dataclass(frozen=True)
class _CountingPreconditioner(curvax.preconditioners.Preconditioner):
    """The identity, counting its uses."""

    counter: Counter
    every: int = 1

    @property
    def needs_product(self):
        return False

    @property
    def needs_sampling(self):
        return False

    def init(self, params_like):
        return jnp.zeros((), jnp.int32)

    def refresh(self, state, linearization, key):
        self.counter.tick("refresh")
        return state + 1

    def apply(self, state, lam, v):
        self.counter.tick("apply")
        return v


@pytest.mark.parametrize("adapter", [False, True])
def test_a_preconditioner_reaches_every_solver(adapter):
    """Peer: silently dropped with the lineax backend, by a misspelled option."""
    solver = CG(maxiter=5, tol=1e-8)
    if adapter:
        lineax = pytest.importorskip("lineax")
        solver = curvax.solvers.Lineax(lineax.CG(rtol=1e-6, atol=0.0, max_steps=5))
    counter = Counter()
    with precision("float32"):
        curvature = curvax.curvature.GaussNewton(
            curvax.curvature.Model(MODEL.predict), curvax.losses.SoftmaxCrossEntropy()
        )
        method = curvax.assemble(
            curvature=curvature,
            solver=solver,
            damping=curvax.damping.Constant(0.1),
            preconditioner=_CountingPreconditioner(counter),
        )
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        quick_jit(method.step)(params, batch, method.init(params), key())
        ran = counter.take()
    assert ran.get("apply", 0) >= 3 and ran.get("refresh") == 1, ran


@pytest.mark.parametrize("precond", ["diag_direct", "diag_ema"])
def test_the_estimator_given_is_the_estimator_used(precond):
    """Peer: precond="diag_direct" with an estimator never calls it."""
    counter = Counter()
    with precision("float32"):
        method = curvax.sgn_ce(predict_fn=MODEL.predict, precond=precond, estimator=CountingEstimator(counter))
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        quick_jit(method.step)(params, batch, method.init(params), key())
        assert counter.take() == {"estimate": 1}


def test_different_cadences_do_not_delay_each_other():
    """Peer: with telemetry every 3 and a trust region every 5, lam changes every 15 steps."""
    counter = Counter()
    with precision("float32"):
        method = curvax.sgn_mse(
            predict_fn=counted(MODEL.predict, counter),
            lam_policy="trust_region",
            lam0=10.0,
            lam_kwargs={"every": 5},
            record_rho_every_k=3,
        )
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "mse", jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        counts, lams = [], []
        for _ in range(11):
            params, state, info = step(params, batch, state, key())
            counts.append(counter.take()["run"])
            lams.append(float(info["lam"]))
    assert steps_where_more_ran(counts) == [0, 3, 5, 6, 9, 10]
    assert [i for i in range(1, 11) if lams[i] != lams[i - 1]] == [1, 6]


@pytest.mark.parametrize("name", ["sgn_mse", "egn_mse", "egn_mse_cg", "ggn_direct_mse"])
def test_squared_error_of_several_outputs_has_the_gradient_of_its_own_loss(name):
    """Peer: K outputs give K times the gradient of the reported loss."""
    lam = 1e6
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "mse", "float64")
        (step,), (info,) = directions(getattr(curvax, name)(predict_fn=MODEL.predict, lam0=lam), params, batch)

        def loss(p):
            return 0.5 * jnp.mean(jnp.sum((MODEL.predict(p, batch["x"]) - batch["y"]) ** 2, axis=-1))

        value, gradient = jax.value_and_grad(loss)(params)
    assert float(info["loss"]) == pytest.approx(float(value), rel=1e-12)
    # With a damping that dwarfs the curvature the direction is the gradient over lam.
    assert_close(lam * step, dense.vector(gradient), 1e-4)


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "sophia_g"])
@pytest.mark.parametrize("case", ["one_hot", "soft", "sequence", "masked_sequence"])
def test_label_forms_and_masks(name, case):
    """Peer: one-hot and soft labels and (batch, time, classes) logits are errors, masks do not exist."""
    model = models.SHARED if "sequence" in case else MODEL
    lam = 0.1
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "ce", "float64")
        if case == "one_hot":
            batch["y"] = jax.nn.one_hot(batch["y"], model.outputs, dtype=jnp.float64)
        if case == "soft":
            batch["y"] = model.soft_labels()
        if case == "masked_sequence":
            batch["w"] = jnp.asarray(np.arange(15).reshape(5, 3) % 4 > 0, jnp.float64)
        truth = truth_of(model, "ce", params, batch)
        options = {"lam0": lam} if name != "sophia_g" else {"learning_rate": 0.1}
        options |= {"tol": 1e-12, "maxiter": 500} if name == "sgn_ce" else {}
        weight_key = "w" if "w" in batch else None
        method = getattr(curvax, name)(predict_fn=model.predict, weight_key=weight_key, **options)
        (step,), (info,) = directions(method, params, batch)
    assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-10)
    if name == "sophia_g":
        assert np.all(np.isfinite(step)) and np.any(step)
    else:
        assert_close(step, truth.direction(lam), TOLERANCE["float64"])


def test_row_space_cg_with_warm_start_scans():
    """Peer: TypeError under `lax.scan`, since the state changes its shape with the first batch."""
    with precision("float32"):
        method = curvax.egn_mse_cg(predict_fn=MODEL.predict, warm_start=True, lam0=0.1, learning_rate=0.3)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "mse", jnp.float32)

        def body(carry, k):
            p, s, info = method.step(carry[0], batch, carry[1], k)
            return (p, s), info["loss"]

        start = (params, method.init(params))
        (_, _), losses = quick_jit(lambda c, ks: jax.lax.scan(body, c, ks))(start, jax.random.split(key(), 8))
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sgn_ce", "sophia_g", "egn_ce"])
def test_bfloat16_parameters_train(name):
    """Peer: an error in all three presets."""
    with precision("bfloat16"):
        options = {} if name == "sophia_g" else {"lam0": 0.1}
        rate = 0.05 if name == "sophia_g" else 0.5
        method = getattr(curvax, name)(predict_fn=MODEL.predict, learning_rate=rate, **options)
        params, batch = MODEL.params(jnp.bfloat16), batch_of(MODEL, "ce", jnp.bfloat16)
        step, state = quick_jit(method.step), method.init(params)
        losses = []
        for i in range(12):
            params, state, info = step(params, batch, state, key(i))
            losses.append(float(info["loss"]))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.9 * losses[0]


def test_refreshing_the_residual_does_not_restart_conjugate_gradients():
    """Peer: 435 iterations with "stabilize every 10" against 149 without, on a diagonal of condition 1e3."""
    diagonal = np.geomspace(1.0, 1e3, 300)
    with precision("float64"):
        system = System(lambda v: jnp.asarray(diagonal) * v)
        rhs = jnp.asarray(np.random.default_rng(0).standard_normal(300))
        counts = {}
        for every in (0, 10):
            solver = CG(tol=1e-6, maxiter=1000, warm_start=False, stabilize_every=every)
            solution = quick_jit(lambda b, solver=solver: solver.solve(system, b, (), jnp.asarray(0.0)))(rhs)
            assert int(solution.result) == Result.CONVERGED
            assert dense.relative_error(np.asarray(solution.value), np.asarray(rhs) / diagonal) < 1e-3
            counts[every] = int(solution.iterations)
    assert counts[10] <= 1.05 * counts[0], counts


def test_misspelled_keywords_are_refused():
    """Peer: `sgn_ce(lam=1e-9, max_iter=3)` is swallowed and runs with the defaults."""
    for word, meant in (("lam", "lam0"), ("max_iter", "maxiter")):
        wrong: dict[str, Any] = {word: 3}
        with pytest.raises(TypeError, match=f"'{word}'.*'{meant}'"):
            curvax.sgn_ce(predict_fn=MODEL.predict, **wrong)


def _equations(jaxpr):
    """All equations, those inside calls, loops and branches too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = item.jaxpr if isinstance(item, ClosedJaxpr) else item
                if isinstance(inner, Jaxpr):
                    yield from _equations(inner)


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h", "adahessian"])
def test_residuals_of_a_refresh_live_inside_its_branch_only(name):
    """Peer: with a refresh every 10 steps its activations stay alive in every step, 44.7 MB against AdamW's 2.1 MB."""
    batch_size, width = 19, 37

    def predict(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    def loss_fn(params, batch):
        log_p = jax.nn.log_softmax(predict(params, batch["x"]))
        return -jnp.mean(jnp.take_along_axis(log_p, batch["y"][:, None], -1))

    with precision("float32"):
        taken = {"predict_fn": predict} if name == "sophia_g" else {"loss_fn": loss_fn}
        method = getattr(curvax, name)(eval_every_k=10, **taken)
        params = {"a": jnp.ones((3, width)), "b": jnp.ones((width, width)), "c": jnp.ones((width, 4))}
        batch = {"x": jnp.ones((batch_size, 3)), "y": jnp.zeros(batch_size, jnp.int32)}
        jaxpr = jax.make_jaxpr(method.step)(params, batch, method.init(params), key()).jaxpr
    branches = [equation for equation in _equations(jaxpr) if equation.primitive.name == "cond"]
    assert branches, "the refresh is not inside a branch"
    for equation in branches:
        shapes = [variable.aval.shape for variable in equation.invars]
        captured = [shape for shape in shapes if batch_size in shape and width in shape]
        assert not captured, f"activations enter a branch from outside: {captured}"


def test_transform_state_is_optax_own():
    """The state behind the direction is the chain's, so momentum, schedules and masks keep their meaning."""
    with precision("float32"):
        method = curvax.sgn_ce(predict_fn=MODEL.predict, tx=optax.sgd(0.1, momentum=0.9), lam0=0.1)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        new, state, _ = quick_jit(method.step)(params, batch, method.init(params), key())
        traces = [
            leaf
            for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.TraceState))
            if isinstance(leaf, optax.TraceState)
        ]
    assert len(traces) == 1
    np.testing.assert_allclose(0.1 * dense.vector(traces[0].trace), moved(params, new), rtol=1e-4, atol=1e-6)
