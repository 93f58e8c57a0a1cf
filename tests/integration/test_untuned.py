"""Defaults that nobody tunes: they do not diverge, and they do not crawl."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.damping import TrustRegion
from curvax.damping.fresh import FreshBatches
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.tree import PyTree
from tests.oracle.compiling import quick_jit


@functools.partial(quick_jit, static_argnums=(1, 2, 3, 4))
def _network(key: jax.Array, *widths: int) -> list[tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(key, len(widths))
    return [
        (jax.random.normal(k, (a, b)) / a**0.5, jnp.zeros(b)) for k, a, b in zip(keys, widths, widths[1:], strict=False)
    ]


def _predict(params: Any, x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def _residuals(params: Any, x: jax.Array) -> jax.Array:
    """u'' + 9 pi^2 sin(3 pi t) inside, 5 u at the ends, of a network u on [0, 1]: small, stiff and far off at first."""

    def u(t: jax.Array) -> jax.Array:
        return _predict(params, t[None])[0]

    inside = jax.vmap(lambda t: jax.grad(jax.grad(u))(t) + 9 * jnp.pi**2 * jnp.sin(3 * jnp.pi * t))(x[:, 0])
    ends = jax.vmap(lambda t: 5.0 * u(jnp.round(t)))(x[:, 0])
    return jnp.where((x[:, 0] < 0.05) | (x[:, 0] > 0.95), ends, inside)[:, None]


def _stiff() -> tuple[PyTree, dict[str, jax.Array]]:
    x = jnp.linspace(0.0, 1.0, 40)[:, None]
    return _network(jax.random.key(0), 1, 12, 12, 1), {"x": x, "y": jnp.zeros_like(x)}


def _run(method: Any, params: PyTree, batches: PyTree, steps: int) -> tuple[PyTree, Any, dict[str, jax.Array]]:
    """(params, state, info of every step); leaves of `batches` have the step on their first axis."""
    start = (params, method.init(params, batch=jax.tree.map(lambda x: x[0], batches)))
    (params, state), infos = _scanned(method)(start, (np.arange(steps), batches))
    return params, state, infos


@functools.lru_cache(maxsize=2)
def _scanned(method: Any) -> Any:
    """((params, state), (numbers of the steps, batches)) -> ((params, state), infos)."""

    def advance(carry: tuple[PyTree, Any], held: tuple[jax.Array, PyTree]) -> tuple[tuple[PyTree, Any], Any]:
        i, batch = held
        params, state, info = method.step(*carry[:1], batch, carry[1], jax.random.fold_in(jax.random.key(1), i))
        return (params, state), info

    return quick_jit(lambda carry, steps: jax.lax.scan(advance, carry, steps))


def _repeated(batch: PyTree, steps: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), batch)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("spring", 1e-3),
        ("egn", 1e-3),
        ("sgn", 0.1),
        ("gauss_newton", 1e-3),
        ("newton_cg", 0.3),
        ("kfac", 0.3),
        ("ekfac", 0.3),
    ],
)
def test_defaults_fall_on_a_stiff_problem_and_never_rise(name: str, share: float, x64: None) -> None:
    params, batch = _stiff()
    method = curvax.make(name, predict_fn=_residuals, loss=SquaredError())
    _, _, infos = _run(method, params, _repeated(batch, 120), 120)
    loss = np.asarray(infos["loss"])
    assert loss.max() <= loss[0] * (1 + 1e-12)
    assert loss[-1] <= share * loss[0], loss[-1] / loss[0]


@pytest.mark.parametrize("seed", range(3))
def test_adahessian_does_not_explode_at_first(seed: int) -> None:
    """A ReLU network, whose diagonal has entries near zero: one probe cannot tell them from zero."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x, y = jax.random.normal(keys[0], (64, 40)), jax.random.randint(keys[1], (64,), 0, 6)

    def predict(params: Any, x: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ params[-1][0] + params[-1][1]

    method = curvax.adahessian(predict_fn=predict, loss=SoftmaxCrossEntropy())
    _, _, infos = _run(method, _network(keys[2], 40, 30, 30, 6), _repeated({"x": x, "y": y}, 100), 100)
    loss = np.asarray(infos["loss"])
    assert loss.max() <= 1.5 * loss[0] and loss[-1] <= 0.1 * loss[0]


@pytest.mark.parametrize("name", ["kfac", "gauss_newton", "spring"])
def test_random_labels_in_minibatches_are_not_learnt_by_heart(name: str) -> None:
    """Nothing can be learnt but that all labels are as likely: the loss of fresh batches must not leave log 3."""
    steps, size = 120, 64
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (steps, size, 8))
    y = jax.random.randint(keys[1], (steps, size), 0, 3)
    method = curvax.make(name, predict_fn=_predict, loss=SoftmaxCrossEntropy())
    _, _, infos = _run(method, _network(keys[2], 8, 32, 3), {"x": x, "y": y}, steps)
    assert bool(jnp.all(infos["finite"]))
    assert float(jnp.mean(infos["loss"][-30:])) <= 1.25 * np.log(3)


def test_the_first_damping_follows_the_units_of_loss_and_parameters(x64: None) -> None:
    x = jax.random.normal(jax.random.key(0), (9, 4))
    y = jnp.sin(x[:, :2])
    params = _network(jax.random.key(1), 4, 5, 2)
    losses, lams, ends = [], [], []
    method = curvax.egn(predict_fn=_predict, loss=SquaredError(reduction="sum"), weight_key="w")
    for scale in (1.0, 1e-9, 1e9):
        batch = {"x": x, "y": y, "w": jnp.full(9, scale)}
        end, _, infos = _run(method, params, _repeated(batch, 4), 4)
        losses.append(np.asarray(infos["loss"]) / scale)
        lams.append(np.asarray(infos["lam"]) / scale)
        ends.append(end)

    def loss(p: PyTree) -> jax.Array:
        return 0.5 * jnp.sum((_predict(p, x) - y) ** 2)

    value, gradient = quick_jit(jax.value_and_grad(loss))(params)
    squared = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient))
    assert lams[0][0] == pytest.approx(squared / (20 * float(value)), rel=1e-12)
    for other in (1, 2):
        np.testing.assert_allclose(lams[other], lams[0], rtol=1e-8)
        np.testing.assert_allclose(losses[other], losses[0], rtol=1e-8)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), ends[other], ends[0])


def test_a_first_batch_without_a_gradient_leaves_the_first_damping_to_the_next(x64: None) -> None:
    x = jax.random.normal(jax.random.key(0), (6, 3))
    params = [(jnp.zeros((3, 2)), jnp.zeros(2))]
    solved, unsolved = {"x": x, "y": jnp.zeros((6, 2))}, {"x": x, "y": jnp.ones((6, 2))}
    method = curvax.egn(predict_fn=_predict, loss=SquaredError())
    step, state = quick_jit(method.step), method.init(params)
    params, state, info = step(params, solved, state, jax.random.key(0))
    assert bool(info["accepted"]) and float(info["lam"]) == 1.0
    assert all(float(jnp.max(jnp.abs(w))) == 0 for w, _ in params)
    _, _, info = step(params, unsolved, state, jax.random.key(0))
    assert 0 < float(info["lam"]) < 1.0 and bool(info["accepted"])


def test_bounds_hold_from_the_first_damping_on(x64: None) -> None:
    """And are no first damping themselves, where the first batch has none to give."""
    x = jax.random.normal(jax.random.key(0), (6, 3))
    solved, unsolved = {"x": x, "y": jnp.zeros((6, 2))}, {"x": x, "y": jnp.ones((6, 2))}
    start = [(jnp.zeros((3, 2)), jnp.zeros(2))]
    free = curvax.egn(predict_fn=_predict, loss=SquaredError())
    _, _, other = quick_jit(free.step)(start, unsolved, free.init(start), jax.random.key(0))
    for bounds, lam in (({"min_lam": 50.0}, 50.0), ({"max_lam": 1e-9}, 1e-9), ({"min_lam": 1e-9}, None)):
        method = curvax.egn(predict_fn=_predict, loss=SquaredError(), lam_kwargs=bounds)
        step = quick_jit(method.step)
        params, state, _ = step(start, solved, method.init(start), jax.random.key(0))
        _, _, info = step(params, unsolved, state, jax.random.key(0))
        assert float(info["lam"]) == pytest.approx(float(other["lam"]) if lam is None else lam, rel=1e-12)


def test_a_number_as_lam0_is_constant_and_a_policy_takes_it_as_its_first() -> None:
    loss = SquaredError()
    assert curvax.egn(predict_fn=_predict, loss=loss, lam0=0.3).assembly.damping == curvax.damping.Constant(0.3)
    assert curvax.egn(predict_fn=_predict, loss=loss).assembly.damping == TrustRegion()
    assert curvax.egn(predict_fn=_predict, loss=loss, lam_policy="const").assembly.damping == curvax.damping.Constant(
        1.0
    )
    assert curvax.gauss_newton(predict_fn=_predict, loss=loss, lam0=0.3).assembly.damping == TrustRegion(0.3)


def test_promises_are_compared_with_what_the_next_batches_see() -> None:
    """The example of the module's docstring, with running means in the place of sums."""
    fresh = FreshBatches.none(jnp.float32)
    assert bool(fresh.kept(0.25, 0.0))
    mean, promised, before = 0.0, 0.0, None
    for loss, promise in ((2.0, 0.9), (1.98, 0.8), (2.01, 0.85), (1.99, 0.0)):
        if before is not None:
            mean, promised = 0.9 * mean + 0.1 * (before[0] - loss), 0.9 * promised + 0.1 * before[1]
        before = (loss, promise)
        fresh = fresh.after(jnp.float32(loss), jnp.float32(promise))
    assert float(fresh.decrease) == pytest.approx(mean, rel=1e-4)
    assert float(fresh.promised) == pytest.approx(promised, rel=1e-5)
    assert not bool(fresh.kept(0.25, 0.0)) and bool(fresh.kept(0.0, 0.0)) and bool(fresh.kept(0.25, 1.0))
    poisoned = fresh.after(jnp.float32(jnp.nan), jnp.float32(jnp.nan))
    assert float(poisoned.loss) == pytest.approx(1.99) and float(poisoned.promised) == float(fresh.promised)


def test_small_systems_are_solved_exactly() -> None:
    """Iterations cut short would be faster a step: 41 unknowns, and 150 rows of a network with 33,000 weights."""
    logistic = curvax.gauss_newton(predict_fn=_predict, loss=SoftmaxCrossEntropy())
    batch = {"x": jnp.zeros((5000, 40)), "y": jnp.zeros(5000, jnp.int32)}
    plan = logistic.plan_for([(jnp.zeros((40, 1)), jnp.zeros(1))], batch)
    assert plan.solver == curvax.solvers.Cholesky()
    wide = _network(jax.random.key(0), 3, 180, 180, 1)
    few = curvax.gauss_newton(predict_fn=_predict, loss=SquaredError())
    rows = few.plan_for(wide, {"x": jnp.zeros((150, 3)), "y": jnp.zeros((150, 1))})
    assert isinstance(rows.solver, curvax.solvers.RowSpace)
    assert isinstance(rows.solver.solver, curvax.solvers.Cholesky)


def test_a_line_search_of_optax_runs_behind_a_direction(x64: None) -> None:
    """Full steps with hardly any damping raise this loss; the search takes the part of them that lowers it."""
    params, batch = _stiff()
    tx = optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(40, decrease_factor=0.5))
    options: dict[str, Any] = {"predict_fn": _residuals, "loss": SquaredError(), "lam0": 1e-6}
    _, _, full = _run(curvax.egn(**options), params, _repeated(batch, 10), 10)
    _, _, found = _run(curvax.egn(**options, tx=tx), params, _repeated(batch, 10), 10)
    assert np.max(full["loss"]) > 10 * full["loss"][0]
    losses = np.asarray(found["loss"])
    assert np.all(np.diff(losses) < 0)


def test_a_transform_sees_the_loss_and_its_gradient(x64: None) -> None:
    """Reduce-on-plateau reads `value`; Polyak's step is value over the squared norm of what it scales."""
    params, batch = _stiff()

    def update(u: PyTree, s: Any, p: PyTree, *, value: jax.Array, grad: PyTree, value_fn: Any, **_: Any) -> Any:
        del u
        again = jax.grad(value_fn)(p)
        matches = [jnp.max(jnp.abs(a - b)) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(grad), strict=True)]
        wrong = jnp.abs(value_fn(p) - value) + sum(matches)
        return jax.tree.map(lambda g: -1e-6 * g, grad), s + wrong

    extra: Any = optax.GradientTransformationExtraArgs
    tx = extra(lambda p: jnp.zeros(()), update)
    method = curvax.egn(predict_fn=_residuals, loss=SquaredError(), lam0=1.0, tx=tx)
    _, state, infos = _run(method, params, _repeated(batch, 3), 3)
    assert float(state.transform) < 1e-8 * float(infos["loss"][0])
    assert infos["loss"][-1] < infos["loss"][0]


def test_a_mean_of_gradients_starts_anew_behind_a_refused_step(x64: None) -> None:
    """Behind a refusal the direction is that of the batch's own gradient, not of the gradients that led there."""
    params, batch = _stiff()
    method = curvax.kfac(predict_fn=_residuals, loss=SquaredError(), lam0=1e-12, lam_kwargs={"every": 1})
    step, state = quick_jit(method.step), method.init(params, batch=batch)
    for i in range(40):
        params, state, info = step(params, batch, state, jax.random.key(i))
        if not bool(info["accepted"]):
            break
    assert not bool(info["accepted"])
    assert int(state.solver.count) == 0
    assert all(float(jnp.max(jnp.abs(m))) == 0 for m in jax.tree.leaves(state.solver.mean))


def test_many_refused_steps_are_an_error_with_a_cause() -> None:
    params = [(jnp.ones((3, 2)), jnp.zeros(2))]
    method = curvax.egn(predict_fn=_predict, loss=SquaredError())
    bad = {"x": jnp.full((4, 3), jnp.nan), "y": jnp.ones((4, 2))}
    good = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
    step, state, check = quick_jit(method.step), method.init(params), curvax.Check(max_skips=2)
    for batch in (bad, bad, good, bad, bad):
        params, state, info = step(params, batch, state, jax.random.key(0))
        check(info)
    _, _, info = step(params, bad, state, jax.random.key(0))
    with pytest.raises(curvax.StepsRefused, match=r"3 steps in a row were refused\. The loss is not finite"):
        check(info)
    with pytest.raises(ValueError, match="at least 1"):
        curvax.Check(0)
    fault = {"accepted": False, "finite": False, "loss": 1.0, "batch_fault": 2}
    unsolved = {"accepted": False, "finite": True, "loss": 1.0, "result": int(curvax.solvers.Result.SINGULAR)}
    refused = {"accepted": False, "finite": True, "loss": 1.0, "result": int(curvax.solvers.Result.CONVERGED)}
    for info, cause in (
        (fault, "A label that counts"),
        (unsolved, "The matrix is singular"),
        (refused, "Every step raised the loss"),
    ):
        check = curvax.Check(1)
        check(info)
        with pytest.raises(curvax.StepsRefused, match=cause):
            check(info)
