"""States know the version of their form, and a state of another version is refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
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
        with pytest.raises(
            ValueError, match=r"State is of version 0, and this release of curvax takes version 1: call"
        ):
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
        ValueError, match=r"State is of version 1, and this release of curvax takes version 2: call init"
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


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_flax_serializes_an_optimizer_state(name: str) -> None:
    serialization = pytest.importorskip("flax.serialization")
    state = states()[name]
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
