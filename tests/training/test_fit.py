"""`curvax.fit` against the loop that one writes by hand: the same bits for all chunks, batches and interruptions."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.telemetry import Metric, MetricRecord
from curvax.training import Checkpoints, Evaluate, FitFailed, Minibatches, Progress, Reason, Sampler, Stop


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax's optimizers rely on promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


RNG = jax.random.key(7)
FIT = functools.partial(curvax.fit, progress=False)


def predict(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def start() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    return {"w": jax.random.normal(keys[0], (3, 5)), "b": jnp.zeros(5), "v": jax.random.normal(keys[1], (5, 2))}


def data(seed: int = 0, examples: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(examples, 3)).astype(np.float32), "y": rng.integers(0, 2, examples).astype(np.int32)}


BATCHES = [data(seed) for seed in range(5)]
CE = curvax.losses.SoftmaxCrossEntropy()
# Sampled labels and probes, so that keys matter.
SOPHIA = curvax.sophia_g(predict_fn=predict, eval_every_k=2, learning_rate=1e-2)
ADAM = curvax.first_order(optax.adam(3e-2), predict_fn=predict, loss=CE, metrics=(MetricRecord(Metric.GRADIENT_NORM),))


@functools.cache
def step(method: Any) -> Callable[..., Any]:
    return jax.jit(method.step)


def by_hand(method: Any, batches: list[Any], steps: int) -> tuple[Any, np.ndarray]:
    params, losses = start(), []
    state = method.init(params, batch=batches[0])
    for i in range(steps):
        params, state, info = step(method)(params, batches[i % len(batches)], state, RNG)
        losses.append(info["loss"])
    return params, np.asarray(losses)


def assert_same(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.fast
@pytest.mark.parametrize("method", [SOPHIA, ADAM], ids=["sophia_g", "adam"])
def test_the_numbers_are_those_of_the_loop_by_hand_whatever_the_chunk(method: Any) -> None:
    params, losses = by_hand(method, BATCHES[:1], 23)
    mine = start()
    whole = FIT(method, mine, BATCHES[0], 23, rng=RNG)
    assert_same(mine, start())  # still there: a copy was donated
    for result in (whole, FIT(method, mine, BATCHES[0], 23, rng=RNG, chunk=4)):
        assert_same(result.params, params)
        np.testing.assert_array_equal(result.history["loss"], losses)
        assert result.reason is Reason.STEPS and len(result.history) == 23
        assert int(result.state.step) == 23 and np.all(np.diff(result.history.seconds) > 0)


def test_another_run_of_a_method_compiles_nothing() -> None:
    def counted(params: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return predict(params, x)

    traces: list[int] = []
    method = curvax.first_order(optax.sgd(0.1), predict_fn=counted, loss=CE)
    FIT(method, start(), BATCHES[0], 3)
    before = len(traces)
    FIT(method, jax.tree.map(jnp.zeros_like, start()), BATCHES[1], 7, chunk=4096)
    assert before > 0 and len(traces) == before


def test_kfac_gets_the_batch_that_its_init_needs() -> None:
    result = FIT(curvax.kfac(predict_fn=predict, loss=CE), start(), BATCHES[:2], 3, rng=RNG)
    assert result.history["accepted"].all() and result.history["loss"][-1] < result.history["loss"][0]


class Loader:
    """Begins anew in every epoch."""

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


def test_all_kinds_of_batches_give_the_same_run() -> None:
    params, losses = by_hand(ADAM, BATCHES, 13)
    on_device = [jax.tree.map(jnp.asarray, batch) for batch in BATCHES]
    sources = (BATCHES, on_device, Loader(), itertools.cycle(BATCHES), lambda i: BATCHES[i % 5])
    for source in sources:
        result = FIT(ADAM, start(), source, 13, rng=RNG)
        assert_same(result.params, params)
        np.testing.assert_array_equal(result.history["loss"], losses)


def test_minibatches_are_epochs_without_repetition() -> None:
    everything = data(examples=11)
    batches = Minibatches(everything, 4, seed=3)
    rows = batches.rows(0, 6)
    assert all(len(np.unique(rows[i : i + 2])) == 8 for i in (0, 2, 4))
    np.testing.assert_array_equal(batches.rows(3, 2), rows[3:5])
    params, _ = by_hand(ADAM, [jax.tree.map(lambda x, r=r: x[r], everything) for r in rows], 6)
    assert_same(FIT(ADAM, start(), batches, 6, chunk=5).params, params)


def test_a_shorter_last_batch_is_a_chunk_of_its_own() -> None:
    batches = [data(0), data(1), data(2, examples=3)]
    params, losses = by_hand(ADAM, batches, 7)
    result = FIT(ADAM, start(), batches, 7)
    assert_same(result.params, params)
    np.testing.assert_array_equal(result.history["loss"], losses)


def test_two_runs_are_one() -> None:
    params, _ = by_hand(ADAM, BATCHES, 9)
    first = FIT(ADAM, start(), BATCHES, 4)
    second = FIT(ADAM, first.params, BATCHES, 5, state=first.state)
    assert_same(second.params, params)
    np.testing.assert_array_equal(second.history["step"], range(4, 9))


def interrupted_after(steps: int) -> Evaluate:
    evaluations = iter(range(100))

    def measure(params: Any) -> float:
        if next(evaluations) * 4 == steps:
            raise KeyboardInterrupt
        return float(jnp.sum(params["w"] ** 2))

    return Evaluate(measure, every=4, jit=False)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Any) -> None:
    whole = FIT(SOPHIA, start(), BATCHES, 21, rng=RNG, evaluate=interrupted_after(-1))
    saved = functools.partial(FIT, SOPHIA, start(), BATCHES, 21, checkpoints=Checkpoints(tmp_path, every=5))
    first = saved(rng=RNG, evaluate=interrupted_after(12))
    assert first.reason is Reason.INTERRUPTED and len(first.history) == 12
    # The key is that of the checkpoint.
    second = saved(rng=jax.random.split(RNG)[0], evaluate=interrupted_after(-1))
    assert second.reason is Reason.STEPS
    assert_same((second.params, second.state, second.best_params), (whole.params, whole.state, whole.best_params))
    assert_same(dict(second.history.columns), dict(whole.history.columns))
    assert_same(*({k: v for k, v in r.history.evaluations.items() if k != "seconds"} for r in (second, whole)))
    assert saved(rng=RNG, evaluate=interrupted_after(-1)).reason is Reason.STEPS  # nothing left to do


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Any) -> None:
    FIT(ADAM, start(), BATCHES, 2, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(ValueError, match="of another method or of other parameters"):
        FIT(SOPHIA, start(), BATCHES, 3, rng=RNG, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(ValueError, match="has checkpoints already"):
        FIT(ADAM, start(), BATCHES, 3, checkpoints=Checkpoints(tmp_path, resume=False))


def test_an_iterator_is_read_past_what_the_checkpoint_has_seen(tmp_path: Any) -> None:
    params, _ = by_hand(ADAM, BATCHES, 9)
    for steps in (4, 9):
        result = FIT(ADAM, start(), itertools.cycle(BATCHES), steps, checkpoints=Checkpoints(tmp_path))
    assert_same(result.params, params)


def test_control_c_ends_the_run_behind_the_chunk() -> None:
    def measure(params: Any) -> float:
        if sent:
            os.kill(os.getpid(), signal.SIGINT)
        sent.append(True)
        return 0.0

    sent: list[bool] = []
    before = signal.getsignal(signal.SIGINT)  # a process in the background of a shell ignores it
    result = FIT(ADAM, start(), BATCHES, 100, evaluate=Evaluate(measure, every=5, jit=False))
    assert result.reason is Reason.INTERRUPTED and len(result.history) == 5
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.fast
def test_stop_rules() -> None:
    _, losses = by_hand(ADAM, BATCHES[:1], 40)
    run = functools.partial(FIT, ADAM, start(), BATCHES[0])
    done = run(10_000, stop=Stop(loss=losses[30]), chunk=64)
    assert done.reason is Reason.LOSS and len(done.history) == 31
    norms = done.history["gradient_norm"]
    done = run(10_000, stop=Stop(gradient=norms[:20].min()))
    assert done.reason is Reason.GRADIENT and len(done.history) == int(norms[:20].argmin()) + 1
    done = run(10**9, stop=Stop(seconds=0.02))
    assert done.reason is Reason.SECONDS and done.history.seconds[-1] >= 0.0198
    values = iter([5.0, 3.0, 4.0, 4.0, 4.0, 4.0])
    evaluate = Evaluate(lambda params: next(values), every=3, jit=False, name="error")
    done = run(1000, stop=Stop(patience=6), evaluate=evaluate)
    assert done.reason is Reason.PATIENCE and done.history.evaluations["error"].tolist() == [5.0, 3.0, 4.0, 4.0]
    assert_same(done.best_params, by_hand(ADAM, BATCHES[:1], 3)[0])
    with pytest.raises(ValueError, match="reads gradient_norm"):
        FIT(SOPHIA, start(), BATCHES[0], 3, rng=RNG, stop=Stop(gradient=1.0))


def test_the_best_parameters_are_those_of_the_least_loss() -> None:
    method = curvax.first_order(optax.sgd(8.0), predict_fn=predict, loss=CE)
    result = FIT(method, start(), BATCHES[0], 30, chunk=7)
    best = int(np.argmin(result.history["loss"]))
    assert 0 < best < 29
    assert_same(result.best_params, by_hand(method, BATCHES[:1], best)[0])


def test_batches_that_end() -> None:
    result = FIT(ADAM, start(), iter(BATCHES), 20)
    assert result.reason is Reason.BATCHES and len(result.history) == 5
    assert "the batches came to their end" in repr(result)
    for empty in (iter([]), [], set()):
        with pytest.raises(ValueError, match="there are no batches"):
            FIT(ADAM, start(), empty, 2)


@pytest.mark.fast
def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(KeyError, match="'y'"):
        FIT(ADAM, start(), {"x": BATCHES[0]["x"]}, 2)
    with pytest.raises(TypeError, match=r"pass a batch, a list of batches"):
        FIT(ADAM, start(), 3, 2)
    with pytest.raises(TypeError, match=r"first_order"):
        FIT(optax.adam(1e-3), start(), BATCHES, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Did you mean 'evaluate'"):
        FIT(ADAM, start(), BATCHES, 2, evaluat=None)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="pass rng"):
        FIT(ADAM, start(), Sampler(lambda key, params, carried: (BATCHES[0], ())), 2)


def test_a_loss_that_is_no_number() -> None:
    broken = BATCHES[0] | {"x": BATCHES[0]["x"] * np.nan}
    with pytest.raises(FitFailed, match=r"the loss of the first step is nan\. The loss is not finite"):
        FIT(ADAM, start(), broken, 50)
    with pytest.raises(FitFailed, match=r"4 steps in a row were refused") as error:
        FIT(ADAM, start(), lambda i: BATCHES[0] if i < 6 else broken, 50, check=curvax.Check(3))
    assert len(error.value.result.history) >= 10


def test_a_sampler_sees_the_parameters_and_carries_its_walkers(tmp_path: Any) -> None:
    """The variational energy of a harmonic trap, whose ground state is exp(-x^2 / 2)."""

    def log_psi(params: Any, x: jax.Array) -> jax.Array:
        return -params["a"] * jnp.sum(x**2, -1)

    def energies(params: Any, x: jax.Array) -> jax.Array:
        return params["a"] + jnp.float32(0.5 - 2 * params["a"] ** 2) * jnp.sum(x**2, -1)

    def draw(key: jax.Array, params: Any, walkers: jax.Array) -> Any:
        def move(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            first, second = jax.random.split(key)
            new = x + jax.random.normal(first, x.shape)
            taken = jnp.log(jax.random.uniform(second, x.shape[:1])) < 2 * (log_psi(params, new) - log_psi(params, x))
            return jnp.where(taken[:, None], new, x), None

        walkers, _ = jax.lax.scan(move, walkers, jax.random.split(key, 5))
        return {"x": walkers, "y": energies(params, walkers)}, walkers

    method = curvax.vmc(predict_fn=log_psi, learning_rate=0.2)
    walkers = jax.random.normal(jax.random.key(1), (64, 1))
    run = functools.partial(FIT, method, {"a": jnp.asarray(1.0)}, Sampler(draw, walkers), rng=RNG)
    whole = run(30)
    assert abs(float(whole.params["a"]) - 0.5) < 0.02
    assert_same(run(30, chunk=3).params, whole.params)
    run(11, checkpoints=Checkpoints(tmp_path))
    assert_same(run(30, checkpoints=Checkpoints(tmp_path)).params, whole.params)


def test_models_with_a_state_and_narrow_parameters() -> None:
    def running(params: Any, x: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = jnp.float32(0.9) * mean + jnp.float32(0.1) * x.mean(0)
        return predict(params, (x - jax.lax.stop_gradient(new)).astype(params["w"].dtype)), new

    method = curvax.first_order(
        optax.sgd(0.1), predict_fn=running, has_state=True, loss=CE, frozen={"b": True} | dict.fromkeys("wv", False)
    )
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start())
    with pytest.raises(ValueError, match="model_state=model_state"):
        FIT(method, params, BATCHES, 2)
    state = method.init(params, model_state=jnp.zeros(3))
    result = FIT(method, params, BATCHES, 4, state=state, evaluate=Evaluate(lambda p, mean: jnp.sum(mean)))
    assert result.params["w"].dtype == jnp.bfloat16 and not (result.params["w"] == params["w"]).all()
    np.testing.assert_array_equal(result.params["b"], params["b"])
    assert result.best_model_state.shape == (3,)


def test_history_plots_and_turns_into_lists() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    history = FIT(ADAM, start(), BATCHES, 6, evaluate=Evaluate(lambda p: p["b"][0])).history
    steps, seconds = history.plot(label="adam")
    history.plot((steps, seconds))
    assert [len(line.get_xdata()) for line in (*steps.lines, *seconds.lines)] == [6] * 4
    assert history.to_dict()["columns"]["loss"] == history["loss"].tolist()
    with pytest.raises(KeyError, match="no column 'lam'"):
        history["lam"]


@pytest.mark.fast
def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    curvax.fit(ADAM, start(), BATCHES[0], 3, progress=Progress("adam"))
    line = capsys.readouterr().out
    assert line.startswith("adam  step 3 of 3") and "accepted 100%" in line
