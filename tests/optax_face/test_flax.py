"""`nnx.Optimizer`: it makes a state of parameters in their boxes, and updates it with bare arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import curvax
from curvax import layerwise
from curvax.losses import SquaredError
from tests.oracle.compiling import quick_jit

pytestmark = pytest.mark.usefixtures("quick_programs")  # nnx.jit takes no options of the compiler
LOSS = SquaredError()
BATCH = {
    name: jnp.array(np.random.default_rng(width).standard_normal((12, width)).astype(np.float32))
    for name, width in (("x", 4), ("y", 2))
}


class Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.norm(self.first(x))))


class Case:
    """A network, and the functions that curvax takes of it."""

    def __init__(self) -> None:
        self.network = Network()
        self.graph, self.params, self.statistics = nnx.split(self.network, nnx.Param, nnx.BatchStat)

    def predict(self, params: Any, x: jax.Array) -> jax.Array:
        """With the running statistics of the start."""
        network = nnx.merge(self.graph, params, self.statistics)
        network.eval()
        return network(x)

    def predict_in_training(self, params: Any, x: jax.Array, statistics: Any) -> Any:
        network = nnx.merge(self.graph, params, statistics, copy=True)
        outputs = network(x)
        return outputs, nnx.state(network, nnx.BatchStat)

    def loss(self, params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.square(self.predict(params, batch["x"]) - batch["y"]))


def whole(method: Any, **keywords: Any) -> Any:
    return curvax.as_gradient_transformation(method, **keywords)


def scaled(face: Any, rate: float) -> Any:
    return optax.chain(face, optax.scale(-rate))


def inner(case: Case, predict: Any, make: Any = layerwise.full_gn, **keywords: Any) -> Any:
    state = {"model_state": case.statistics} if keywords else {}
    method = make(predict_fn=predict, loss=LOSS, inner=optax.adam(0.1), inner_steps=3, line_search=None, **keywords)
    return layerwise.as_gradient_transformation(method, **state)


MAKERS: dict[str, Any] = {
    # The gradient is that of the network in training mode, and no descent for the trust region of the other mode.
    "sgn": lambda c: whole(curvax.sgn_mse(predict_fn=c.predict, lam0=1.0)),
    "kfac": lambda c: whole(curvax.kfac(predict_fn=c.predict, loss=LOSS), batch=BATCH),
    "adahessian": lambda c: whole(curvax.adahessian(loss_fn=c.loss)),
    "sgn, BatchNorm": lambda c: whole(
        curvax.sgn_mse(predict_fn=c.predict_in_training, has_state=True), model_state=c.statistics
    ),
    "full_gn": lambda c: inner(c, c.predict),
    "layerwise_gn": lambda c: inner(c, c.predict, layerwise.layerwise_gn),
    "full_gn, BatchNorm": lambda c: inner(c, c.predict_in_training, has_state=True),
    "scale_by_kfac": lambda c: scaled(curvax.transforms.scale_by_kfac(c.predict, LOSS, BATCH, 1.0), 0.5),
    "scale_by_sophia_g": lambda c: scaled(curvax.transforms.scale_by_sophia_g(c.predict, LOSS), 0.01),
    "soap": lambda c: curvax.optimizers.soap(0.02),
    "muon_adamw": lambda c: curvax.optimizers.muon_adamw(0.02, others=("last",)),
}


@jax.numpy_dtype_promotion("standard")  # Flax and Optax rely on promotion
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_optimizer_of_flax_trains(make: Any) -> None:
    case = Case()
    optimizer = nnx.Optimizer(case.network, make(case), wrt=nnx.Param)

    def loss(network: Any) -> jax.Array:
        return jnp.mean(jnp.square(network(BATCH["x"]) - BATCH["y"]))

    @nnx.jit
    def step(network: Any, optimizer: Any, key: jax.Array) -> jax.Array:
        value, gradient = nnx.value_and_grad(loss)(network)
        optimizer.update(network, gradient, batch=BATCH, rng=key)
        return value

    losses = [float(step(case.network, optimizer, jax.random.key(0))) for _ in range(6)]
    assert losses[-1] < 0.99 * losses[0]


@jax.numpy_dtype_promotion("standard")
def test_it_steps_as_the_method_and_carries_the_statistics() -> None:
    case = Case()
    method = curvax.sgn_mse(predict_fn=case.predict_in_training, has_state=True)
    params, state = case.params, method.init(case.params, model_state=case.statistics)
    optimizer = nnx.Optimizer(case.network, whole(method, model_state=case.statistics), wrt=nnx.Param)
    gradient = nnx.grad(lambda network: jnp.mean(jnp.sum(jnp.square(network(BATCH["x"]) - BATCH["y"]), -1)) / 2)

    @nnx.jit
    def update(network: Any, optimizer: Any) -> None:
        optimizer.update(network, gradient(network), batch=BATCH)

    step = quick_jit(method.step)
    for _ in range(3):
        params, state, _ = step(params, BATCH, state)
        update(case.network, optimizer)
    found = nnx.state(case.network, nnx.Param)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), found, params)
    carried = jax.tree.leaves(nnx.as_pure(optimizer.opt_state).model_state)
    for a, b in zip(carried, jax.tree.leaves(state.model_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_state_of_other_parameters_is_told_by_the_place() -> None:
    method = curvax.sgn_mse(predict_fn=lambda p, x: x @ p["w"])
    params = {"w": jnp.zeros((4, 2))}
    state = method.init(params)
    with pytest.raises(ValueError, match=r"another tree structure.*\['bias'\]"):
        method.step({**params, "bias": jnp.zeros(2)}, BATCH, state)
    with pytest.raises(ValueError, match=r"parameter \['w'\] is float32\[4, 3\]"):
        method.step({"w": jnp.zeros((4, 3))}, BATCH, state)


def test_a_model_state_that_lost_a_part_is_told() -> None:
    def predict(params: Any, x: jax.Array, state: Any) -> Any:
        return x @ params["w"], {"mean": state["mean"]}

    method = curvax.sgn_mse(predict_fn=predict, has_state=True)
    params, before = {"w": jnp.zeros((4, 2))}, {"mean": jnp.zeros(()), "var": jnp.ones(())}
    with pytest.raises(TypeError, match=r"a state unlike the one that it took \(not in both: \['var'\]\)"):
        method.step(params, BATCH, method.init(params, model_state=before))
