"""Searches along the update: the step size is the one that dense losses say, on whatever data, at whatever cadence."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.damping import Outcome
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.search import Backtracking, CurvatureBound, EntryBound, GridSearch, NormBound, QuadraticModel
from curvax.search.base import Line
from tests.integration.harness import Counter, key, same_bits
from tests.oracle import dense
from tests.oracle.compiling import quick_jit

PyTree = Any
FAR: dict[str, Any] = {"lam0": 1e-4, "learning_rate": 3.0}
"""Options under which whole steps go too far."""
SIZES = [0.5**k for k in range(8)]


def _predict(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


@functools.partial(quick_jit, static_argnums=0)
def _problem(dtype: Any = jnp.float64) -> tuple[PyTree, dict, dict]:
    """(parameters, batch, another batch)."""
    k = jax.random.split(jax.random.key(4), 6)
    params = {"w": jax.random.normal(k[0], (3, 5)), "b": jnp.zeros(5), "v": jax.random.normal(k[1], (5, 2))}
    batches = ({"x": jax.random.normal(a, (9, 3)), "y": jax.random.normal(b, (9, 2))} for a, b in (k[2:4], k[4:6]))
    return jax.tree.map(lambda p: p.astype(dtype), (params, *batches))


def _loss(params: PyTree, batch: dict) -> float:
    """Half the mean squared residual, in NumPy."""
    p, x, y = (jax.tree.map(np.asarray, part) for part in (params, batch["x"], batch["y"]))
    return 0.5 * float(np.mean(np.sum((np.tanh(x @ p["w"] + p["b"]) @ p["v"] - y) ** 2, -1)))


def _make(name: str, **options: Any) -> Any:
    return curvax.make(name, predict_fn=_predict, loss=SquaredError(), **options)


def _one_step(method: Any, params: PyTree, batch: dict, **extra: Any) -> tuple[PyTree, Any, dict]:
    return quick_jit(method.step)(params, batch, method.init(params, batch=batch), key(), **extra)


def _dense(params: PyTree, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """(J, residuals)."""
    leaves, structure = jax.tree.flatten(params)
    by_leaf = _jacobian(params, batch["x"])
    rows = [np.asarray(j).reshape(-1, p.size) for j, p in zip(structure.flatten_up_to(by_leaf), leaves, strict=True)]
    return np.concatenate(rows, 1), np.asarray(_predict(params, batch["x"]) - batch["y"]).ravel()


_jacobian = quick_jit(jax.jacobian(lambda p, x: _predict(p, x).ravel()))


def _along(params: PyTree, update: PyTree, size: float) -> PyTree:
    return jax.tree.map(lambda p, u: p + size * u, params, update)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgn", FAR),
        ("kfac", {"lam_policy": "const", "lam0": 1e-3, "learning_rate": 9.0}),
        ("adahessian", {"learning_rate": 40.0}),
    ],
)
def test_a_grid_takes_the_smallest_dense_loss(name: str, options: dict, x64: None) -> None:
    """On the step's own batch and on fresh points alike; both are one program here."""
    params, batch, fresh = _problem()
    method = _make(name, search=GridSearch(8), **options)
    step, state = quick_jit(method.step), method.init(params, batch=batch)
    assert state.search is None
    for seen in (batch, fresh):
        after, _, info = step(params, batch, state, key(), search_batch=seen)
        size = float(info["step_size"])
        update = jax.tree.map(lambda a, p: (a - p) / size, after, params)  # noqa: B023
        losses = [_loss(_along(params, update, a), seen) for a in SIZES]
        assert losses[0] > _loss(params, seen), "a whole step was to go too far"
        assert size == SIZES[int(np.argmin(losses))] and bool(info["accepted"])
        np.testing.assert_allclose(float(info["search_loss"]), _loss(params, seen), rtol=1e-9)
        np.testing.assert_allclose(float(info["search_loss_after"]), min(losses), rtol=1e-9)
        if seen is batch and name == "sgn":
            without, _, again = quick_jit(method.step)(params, batch, state, key())
            assert float(again["step_size"]) == size
            np.testing.assert_allclose(dense.vector(without), dense.vector(after), rtol=1e-12)


@pytest.mark.parametrize("preset", ["egn", "gauss_newton"])
def test_by_default_a_step_that_would_be_refused_is_halved(preset, x64):
    """r = atan(w), w = 3: the step to 3 - 1.25 * 10 / 1.1 = -8.4 raises |r| from 1.25 to 1.45, half of it lowers it."""
    params = {"w": jnp.full((1, 1), 3.0)}
    batch = {"x": jnp.ones((1, 1)), "y": jnp.zeros((1, 1))}

    def step(**rest: Any) -> tuple[float, dict[str, Any]]:
        make = curvax.make(preset, predict_fn=lambda p, x: jnp.arctan(x @ p["w"]), loss=SquaredError(), **rest)
        new, _, info = quick_jit(make.step)(params, batch, make.init(params))
        return float(new["w"][0, 0]), info

    alone = {"lam_kwargs": {"factors": (1.0,)}}
    size = 10 * np.arctan(3.0) / 1.1
    halved, info = step(**alone)
    assert bool(info["accepted"]) and float(info["step_size"]) == 0.5
    np.testing.assert_allclose(halved, 3 - size / 2, rtol=1e-12)
    refused, info = step(search=None, **alone)
    assert not info["accepted"] and refused == 3
    # Nobody judges the steps of a constant lam, nor every one at a cadence.
    for rest in ({"lam_policy": "const", "lam0": 1e-2}, {"lam_kwargs": {"every": 2}}):
        assert "step_size" not in step(**rest)[1]


def test_lam_does_not_fall_after_a_step_that_was_shortened():
    policy, yes, no = curvax.damping.TrustRegion(lam0=1.0), jnp.asarray(True), jnp.asarray(False)
    one = jnp.ones(())
    for shortened, after in ((yes, 1.0), (no, 0.5)):
        good = Outcome(yes, yes, 2 * one, one, one, curvature=one, step_size=0.5, shortened=shortened)
        assert float(policy.lam(policy.update(policy.init(), good, yes))) == after
    assert Backtracking().takes_first and not GridSearch().takes_first


def _line(at: float, slope: float, counter: Counter | None = None) -> Line:
    """(a - at)^2, with a slope at 0 that is claimed."""

    def loss_at(size: jax.Array) -> jax.Array:
        if counter is not None:
            counter.tick()
        return (size - at) ** 2

    return Line(loss_at, jnp.asarray(at * at), jnp.float32, slope=lambda: jnp.asarray(slope))


@pytest.mark.fast
def test_backtracking_takes_the_first_that_satisfies_armijo() -> None:
    for at, sufficient in ((0.3, 1e-4), (0.05, 0.9), (-1.0, 1e-4)):
        slope = -2 * at
        enough = (a for a in SIZES if (a - at) ** 2 <= at**2 + sufficient * a * min(slope, 0) and (a - at) ** 2 < at**2)
        want = next(enough, 0.0)
        for chunk in (None, 3):
            found = Backtracking(8, sufficient=sufficient, chunk=chunk).find(_line(at, slope))
            assert float(found.step_size) == want, (at, sufficient, chunk)


@pytest.mark.fast
def test_chunks_see_the_same_losses_and_end_early() -> None:
    """A textbook's loop evaluates no step size behind the first that will do."""
    found, counter = {}, Counter()
    for search in (GridSearch(9), GridSearch(9, chunk=2), Backtracking(9), Backtracking(9, chunk=1)):
        result = jax.jit(lambda s=search: s.find(_line(0.2, -0.4, counter)))()
        found[search] = float(result.step_size), sum(counter.take().values())
    assert {size for size, _ in found.values()} == {0.25}
    assert found[Backtracking(9, chunk=1)][1] == 3


def test_a_trust_region_judges_the_step_that_is_taken(x64: None) -> None:
    params, batch, _ = _problem()
    far = {"lam_policy": "trust_region", **FAR, "record_rho_every_k": 1}
    after, _, info = _one_step(_make("sgn", search=GridSearch(8), **far), params, batch)
    assert bool(info["accepted"]) and float(info["step_size"]) < 1
    change = dense.vector(after) - dense.vector(params)
    jacobian, residual = _dense(params, batch)
    moved = jacobian @ change
    predicted = -(residual @ moved + 0.5 * moved @ moved) / 9
    np.testing.assert_allclose(float(info["predicted"]), predicted, rtol=1e-8)
    np.testing.assert_allclose(float(info["rho"]), (_loss(params, batch) - _loss(after, batch)) / predicted, rtol=1e-8)


def test_a_line_that_leads_uphill_is_refused_and_raises_lam(x64: None) -> None:
    """And is searched again in the next step, although it is not due."""
    params, batch, _ = _problem()
    method = _make("sgn", search=GridSearch(3, every=5), tx=optax.scale(1.0), lam_policy="trust_region", lam0=1.0)
    step, state = quick_jit(method.step), method.init(params)
    lams = []
    for _ in range(3):
        same, state, info = step(params, batch, state, key())
        assert same_bits(same, params) and not bool(info["accepted"]) and float(info["step_size"]) == 0
        assert float(info["search_loss"]) == float(info["search_loss_after"])
        lams.append(float(info["lam"]))
    np.testing.assert_allclose(np.diff(np.log(lams)), np.log(1.5) * np.array([1, 2]), rtol=1e-12)
    check = curvax.Check(1)
    check(info)
    with pytest.raises(curvax.StepsRefused, match="found no step size"):
        check(info)


def test_steps_between_searches_take_the_last_step_size(x64: None) -> None:
    params, batch, _ = _problem()
    method = _make("sgn", search=GridSearch(8, every=3), **FAR)
    step, state = quick_jit(method.step), method.init(params)
    assert "every 3 steps" in method.plan.explain()
    sizes, searched = [], []
    for _ in range(7):
        before = params
        params, state, info = step(params, batch, state, key())
        assert not same_bits(before, params)
        sizes.append(float(info["step_size"]))
        searched.append(bool(np.isfinite(info["search_loss"])))
    assert searched == [True, False, False, True, False, False, True]
    assert sizes[0] == sizes[1] == sizes[2] < 1 and sizes[3] == sizes[4] == sizes[5]


def test_a_loss_at_its_floor_is_no_refusal() -> None:
    """In float32 a solved problem's loss falls for no step size."""
    x = jax.random.normal(jax.random.key(0), (12, 3))
    batch = {"x": x, "y": 100 + jnp.sin(x[:, :1])}
    params = {"w": jnp.zeros((3, 1)), "c": jnp.zeros(1)}
    for search in (GridSearch(4), Backtracking(4)):
        method = curvax.sgn(predict_fn=lambda p, x: x @ p["w"] + p["c"], loss=SquaredError(), lam0=1e-3, search=search)
        step, p, state = quick_jit(method.step), params, method.init(params)
        accepted = []
        for _ in range(30):
            p, state, info = step(p, batch, state, key())
            accepted.append(bool(info["accepted"]))
        assert all(accepted)


def test_the_quadratic_model_gives_the_step_size_of_the_exact_curvature(x64: None) -> None:
    params, batch, _ = _problem()
    jacobian, residual = _dense(params, batch)

    def run(longest: Any) -> tuple[float, np.ndarray]:
        method = _make("kfac", search=QuadraticModel(longest), lam_policy="const", lam0=1e-3, learning_rate=9.0)
        after, _, info = method.step(params, batch, method.init(params, batch=batch), key())
        return info["step_size"], jax.tree.map(lambda a, p: (a - p) / info["step_size"], after, params)

    bounded = quick_jit(run)
    _, update = bounded(1e-6)
    d = dense.vector(update)
    least = -(residual @ jacobian @ d / 9) / (d @ jacobian.T @ jacobian @ d / 9 + 1e-3 * d @ d)
    assert 1e-4 < least < 1
    for longest, size in ((1.0, least), (1e-4, 1e-4)):
        np.testing.assert_allclose(float(bounded(longest)[0]), size, rtol=1e-8)


@pytest.mark.parametrize("name", ["sgn", "adahessian"])
def test_bounds_are_on_the_update_behind_the_learning_rate(name: str, x64: None) -> None:
    params, batch, _ = _problem()
    options: dict[str, Any] = {"learning_rate": 3.0, **({} if name == "adahessian" else {"lam0": 1e-2})}
    kinds = (CurvatureBound,) if name == "adahessian" else (CurvatureBound, NormBound, EntryBound)
    programs = {}
    for kind in kinds:

        def run(bound: Any, kind: Any = kind) -> PyTree:
            method = _make(name, step_bound=kind(bound), **options)
            return method.step(params, batch, method.init(params), key())[0]

        programs[kind] = quick_jit(run)

    def moved(kind: Any, bound: float) -> np.ndarray:
        return dense.vector(programs[kind](bound)) - dense.vector(params)

    whole = moved(CurvatureBound, 1e9)
    hessian = np.asarray(quick_jit(jax.hessian(lambda v: _flat_loss(params, batch, v)))(jnp.zeros(whole.size)))
    jacobian, _ = _dense(params, batch)
    curvature = hessian if name == "adahessian" else jacobian.T @ jacobian / 9
    norm, squared, entry = np.linalg.norm(whole), abs(whole @ curvature @ whole), np.abs(whole).max()
    wanted = {
        CurvatureBound: (squared / 9, whole / 3),
        NormBound: (norm / 4, whole / 4),
        EntryBound: (entry / 2, np.clip(whole, -entry / 2, entry / 2)),
    }
    for kind in kinds:
        bound, want = wanted[kind]
        np.testing.assert_allclose(moved(kind, bound), want, rtol=1e-7, atol=1e-12)


def _flat_loss(params: PyTree, batch: dict, v: jax.Array) -> jax.Array:
    leaves, structure = jax.tree.flatten(params)
    parts = jnp.split(v, np.cumsum([p.size for p in leaves])[:-1])
    moved = structure.unflatten([p + u.reshape(p.shape) for p, u in zip(leaves, parts, strict=True)])
    return 0.5 * jnp.mean(jnp.sum((_predict(moved, batch["x"]) - batch["y"]) ** 2, -1))


def test_searches_run_inside_scan_with_narrow_parameters_and_beside_a_search_of_optax() -> None:
    params, batch, fresh = _problem(jnp.bfloat16)
    tx = optax.chain(optax.scale(-3.0), optax.scale_by_backtracking_linesearch(4))
    method = _make("sgn", search=GridSearch(4, chunk=2), step_bound=NormBound(5.0), lam0=1e-2, tx=tx)

    @quick_jit
    def train(params: PyTree, state: Any) -> Any:
        def advance(carry: Any, _: None) -> Any:
            params, state, info = method.step(*carry[:1], batch, carry[1], key(), search_batch=fresh)
            return (params, state), info["search_loss_after"]

        return jax.lax.scan(advance, (params, state), None, length=6)

    (end, _), losses = train(params, method.init(params))
    assert end["w"].dtype == jnp.bfloat16 and losses[-1] < losses[0]


def test_what_does_not_fit_is_told_in_a_sentence() -> None:
    params, batch, fresh = _problem(jnp.float32)
    for call, words in (
        (lambda: _make("sgn", search=True), "search is a bool: pass a curvax.search.StepSearch"),
        (lambda: _make("sgn", step_bound=1.0), "step_bound is a float: pass a curvax.search.StepBound"),
        (lambda: _one_step(_make("sgn"), params, batch, search_batch=fresh), "drop search_batch, or set search="),
        (lambda: GridSearch(candidates=0), "candidates of a grid search must be at least 1"),
        (lambda: Backtracking(ratio=1.0), "ratio of a backtracking search must be between 0 and 1"),
        (lambda: NormBound(0.0), "norm must be positive"),
        (
            lambda: _make("sgn", metrics=(curvax.telemetry.MetricRecord(curvax.telemetry.Metric.STEP_SIZE),)),
            "has no step_size to record",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_memory_decides_how_many_step_sizes_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params, batch, _ = _problem(jnp.float32)
    method = curvax.sgn(predict_fn=_predict, loss=SoftmaxCrossEntropy(), search=GridSearch())
    labelled = {"x": batch["x"], "y": jnp.zeros(9, jnp.int32)}
    assert "all 11 step sizes in one batched forward pass" in method.plan_for(params, labelled).explain()
    monkeypatch.setattr("curvax.plan.machine.memory", lambda: 4000)
    assert "of 11 step sizes at once: all would take" in method.plan_for(params, labelled).explain()
    step = jax.make_jaxpr(method.step)(params, labelled, method.init(params))
    assert "scan" in str(step) or "while" in str(step)
