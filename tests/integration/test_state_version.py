"""States know the version of their form, and a state of another version is refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import state_version
from curvax.losses import SquaredError
from curvax.optimizers import shampoo, soap
from curvax.preconditioners import CholeskyInverse, EigenInverse
from tests.oracle.compiling import quick_jit

PARAMS = {"w": jnp.ones((3, 2)) / 4, "b": jnp.zeros(2)}
BATCH = {"x": jnp.arange(12.0).reshape(4, 3) / 12, "y": jnp.ones((4, 2))}


def predict(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"])


MODEL: dict[str, Any] = {"predict_fn": predict, "loss": SquaredError()}
METHODS = {
    "one system": lambda: curvax.egn(**MODEL),
    "one pass": lambda: curvax.sophia_g(**MODEL),
    "inner loop": lambda: curvax.full_gn(**MODEL, inner=optax.sgd(0.1), inner_steps=1),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
OPTIMIZERS = {"soap": lambda: soap(0.1), "shampoo": lambda: shampoo(0.1)}


@pytest.fixture
def another_release(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this a release whose states have another form."""

    def change() -> None:
        monkeypatch.setattr(state_version, "STATE_VERSION", state_version.STATE_VERSION + 1)

    return change


@every_method
def test_a_step_refuses_a_state_of_another_version(make: Any) -> None:
    method = make()
    state = dataclasses.replace(method.init(PARAMS), version=0)
    for step in (method.step, jax.jit(method.step)):
        with pytest.raises(ValueError, match=r"State is of version 0, and this release of curvax takes version 2:"):
            step(PARAMS, BATCH, state, jax.random.key(0))


@every_method
def test_the_version_is_no_array_and_stays(make: Any) -> None:
    method = make()
    state = method.init(PARAMS)
    after = jax.eval_shape(method.step, PARAMS, BATCH, state, jax.random.key(0))[1]
    assert after.version == state.version == state_version.STATE_VERSION
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    older = dataclasses.replace(state, version=0)
    assert jax.tree.structure(older) != jax.tree.structure(state)
    assert jax.tree.map(lambda x: x, older).version == 0


def states() -> dict[str, Any]:
    made = {name: make().init(PARAMS) for name, make in METHODS.items()}
    return made | {name: make().init(PARAMS) for name, make in OPTIMIZERS.items()}


@pytest.mark.parametrize("name", [*METHODS, *OPTIMIZERS])
def test_pickles_carry_the_version(name: str, another_release: Any) -> None:
    state = jax.device_get(states()[name])
    saved = pickle.dumps(state)
    for restored in (pickle.loads(saved), copy.deepcopy(state), copy.copy(state)):
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
    another_release()
    with pytest.raises(
        ValueError, match=r"State is of version 2, and this release of curvax takes version 3: call init"
    ):
        pickle.loads(saved)


def test_a_pickle_from_before_versions_is_refused() -> None:
    state = curvax.egn(**MODEL).init(PARAMS)
    fields = {name: value for name, value in vars(state).items() if name != "version"}
    with pytest.raises(ValueError, match=r"MethodState is without a version"):
        object.__new__(type(state)).__setstate__(fields)


@pytest.mark.parametrize("name", [*METHODS, *OPTIMIZERS])
def test_orbax_stores_and_restores_a_state(name: str, tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    state = states()[name]
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("name", [*METHODS, *OPTIMIZERS])
def test_flax_serializes_a_state(name: str) -> None:
    serialization = pytest.importorskip("flax.serialization")
    state = states()[name]
    saved = serialization.to_bytes({"nested": state})
    restored = serialization.from_bytes({"nested": state}, saved)["nested"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_flax_bytes_of_another_method_are_refused() -> None:
    serialization = pytest.importorskip("flax.serialization")
    saved = serialization.to_bytes(made("sophia_g")[1])
    with pytest.raises(ValueError, match="made by another method, with the curvature GaussNewton where this one has"):
        serialization.from_bytes(made("sophia_h")[1], saved)
    curvax.register_with_flax()
    params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
    other = curvax.sophia_g(**MODEL).init(params)
    with pytest.raises(ValueError, match="belongs to other parameters"):
        serialization.from_bytes(other, saved)


def test_a_train_state_with_a_direction_goes_through_flax() -> None:
    serialization = pytest.importorskip("flax.serialization")
    train_state = pytest.importorskip("flax.training.train_state")
    tx = optax.chain(curvax.transforms.scale_by_ggn(predict, SquaredError(), lam=0.1), optax.sgd(0.1, momentum=0.9))
    train = train_state.TrainState.create(apply_fn=predict, params=PARAMS, tx=tx)
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    _, moved = quick_jit(lambda state: tx.update(gradients, state, PARAMS, batch=BATCH))(train.opt_state)
    restored = serialization.from_bytes(train, serialization.to_bytes(train.replace(opt_state=moved)))
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, moved)


def gained(params: Any, x: jax.Array) -> jax.Array:
    """`predict` with a gain of the same shape in the place of the bias."""
    return jnp.tanh(x @ params["w"]) * params["b"]


RIVALS: dict[str, Any] = {
    "egn": lambda: curvax.egn(**MODEL),
    "sgn": lambda: curvax.sgn(**MODEL),
    "sgn, cold": lambda: curvax.sgn(**MODEL, warm_start=False),
    "spring": lambda: curvax.spring(**MODEL),
    "kfac": lambda: curvax.kfac(**MODEL),
    "kfac, factored": lambda: curvax.kfac(**MODEL, inverse=EigenInverse(factored=True)),
    "kfac, Cholesky": lambda: curvax.kfac(**MODEL, inverse=CholeskyInverse()),
    "sophia_g": lambda: curvax.sophia_g(**MODEL),
    "sophia_h": lambda: curvax.sophia_h(**MODEL),
}


@functools.cache
def made(name: str) -> tuple[Any, Any]:
    method = RIVALS[name]()
    return method, method.init(PARAMS, batch=BATCH)


PAIRS = [
    ("kfac", "egn", "curvature|solver|preconditioner"),
    ("kfac", "kfac, Cholesky", r"preconditioner KFAC\(.*CholeskyInverse.*where this one has KFAC\(.*EigenInverse"),
    ("kfac", "kfac, factored", "preconditioner.*factored=True.*factored=False"),
    ("sgn", "sgn, cold", "solver CG.*warm_start=False.*warm_start=True"),
    ("sgn", "spring", "solver"),
    ("sophia_g", "sophia_h", "curvature Hessian where this one has GaussNewton"),
]


@pytest.mark.parametrize(("name", "other", "words"), PAIRS)
def test_a_step_refuses_the_state_of_another_method(name: str, other: str, words: str) -> None:
    (method, own), (_, state) = made(name), made(other)
    with pytest.raises(ValueError, match=f"made by another method, with the ({words}).*: call init again"):
        jax.eval_shape(method.step, PARAMS, BATCH, state, jax.random.key(0))
    assert jax.tree.structure(own) != jax.tree.structure(state)
    with pytest.raises(ValueError, match="made by another method"):
        own.check_stamp(json.loads(json.dumps(state.stamp)))
    own.check_stamp(json.loads(json.dumps(own.stamp)))


def test_numbers_may_change_between_steps() -> None:
    _, state = made("kfac")
    other = curvax.kfac(**MODEL, factor_decay=0.5, learning_rate=0.3, lam_kwargs={"inc": 2.0})
    jax.eval_shape(other.step, PARAMS, BATCH, state, jax.random.key(0))


def test_factors_of_another_wiring_are_refused() -> None:
    """A bias and a gain of one shape: the arrays fit, and a direction from them would be off by half."""
    (_, state), other = made("kfac"), curvax.kfac(predict_fn=gained, loss=SquaredError())
    with pytest.raises(ValueError, match="uses its parameters in another way"):
        jax.eval_shape(other.step, PARAMS, BATCH, state, jax.random.key(0))
    with pytest.raises(ValueError, match="made by another method, with the layers"):
        other.init(PARAMS, batch=BATCH).check_stamp(state.stamp)
    more = {"x": jnp.ones((7, 3)), "y": jnp.ones((7, 2))}
    jax.eval_shape(made("kfac")[0].step, PARAMS, more, state, jax.random.key(0))
