"""What stands beside a step on eight devices with explicit axes; test_sharding runs it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.layerwise import full_gn
from curvax.losses import SoftmaxCrossEntropy
from curvax.structure import jacobian_gram, per_example_gradient_norms

jax.config.update("jax_enable_x64", True)
LOSS = SoftmaxCrossEntropy()
SPECS = {"w1": P(None, "model"), "layers": P(None, None, None), "w2": P("model", None)}
Params = dict[str, jax.Array]


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    return 2 * x


doubled.defvjp(lambda x: (2 * x, x), lambda x, g: (2 * g + 0 * x,))


def model(named: bool, reverse_only: bool) -> Callable[[Params, jax.Array], jax.Array]:
    """A network with everything that a program may hold, which names axes or does not."""

    def dot(a: jax.Array, b: jax.Array, spec: P) -> jax.Array:
        return jnp.dot(a, b, out_sharding=spec) if named else a @ b

    def moved(a: jax.Array, spec: P) -> jax.Array:
        return jax.sharding.reshard(a, spec) if named else a

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return x + jax.nn.relu(dot(x, w, P("data", None))), None

    def predict(params: Params, x: jax.Array) -> jax.Array:
        h = moved(jnp.tanh(dot(x, params["w1"], P("data", "model"))), P("data", None))
        h, _ = jax.lax.scan(jax.checkpoint(layer), h, params["layers"])
        return dot(doubled(h) if reverse_only else 2 * h, params["w2"], P("data", None))

    return predict


k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "w1": jax.random.normal(k1, (6, 8)),
    "layers": jax.random.normal(k2, (2, 8, 8)) / 4,
    "w2": jax.random.normal(k3, (8, 4)),
}
BATCH = {"x": jax.random.normal(k4, (16, 6)), "y": jnp.arange(16) % 4}
MESH = jax.make_mesh((4, 2), ("data", "model"))
SPREAD = {name: jax.device_put(x, NamedSharding(MESH, SPECS[name])) for name, x in PARAMS.items()}
DATA = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(MESH, P("data"))), BATCH)


def close(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-12)


def stepped(method: Any, params: Params, batch: Any) -> Params:
    """Two steps, in a scan that carries what `init` returned."""
    state = method.init(params, batch=batch)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        return method.step(carry[0], batch, carry[1], key)[:2], None

    return jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))(
        (params, state), jax.random.split(jax.random.key(1))
    )[0][0]


def models_may_name_axes() -> None:
    for reverse_only in (False, True):
        own = {"maxiter": 3, "lam0": 1.0}
        alone = stepped(curvax.sgn_ce(predict_fn=model(False, reverse_only), **own), PARAMS, BATCH)
        assert float(jnp.max(jnp.abs(alone["w1"] - PARAMS["w1"]))) > 1e-3
        with jax.set_mesh(MESH):
            spread = stepped(curvax.sgn_ce(predict_fn=model(True, reverse_only), **own), SPREAD, DATA)
        close(spread, alone)
        assert all(jax.typeof(x) == jax.typeof(SPREAD[name]) for name, x in spread.items())


def structure_follows() -> None:
    plain, named = model(False, False), model(True, False)
    alone = per_example_gradient_norms(plain, LOSS, PARAMS, BATCH["x"], BATCH["y"])
    gram = jacobian_gram(plain, PARAMS, BATCH["x"])
    with jax.set_mesh(MESH):
        close(jax.jit(lambda p, b: per_example_gradient_norms(named, LOSS, p, b["x"], b["y"]))(SPREAD, DATA), alone)
        spread = jax.jit(lambda p, b: jacobian_gram(named, p, b["x"]))(SPREAD, DATA)
    close(spread, gram)
    assert jax.typeof(spread).sharding.spec[0] == "data"


def states_are_sharded_like_parameters() -> None:
    method = full_gn(predict_fn=model(False, False), loss=LOSS, inner_steps=3, inner=optax.adam(1e-2))
    shapes = {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, SPECS[n])) for n, x in PARAMS.items()
    }
    automatic = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    elsewhere = {name: jax.device_put(x, NamedSharding(automatic, SPECS[name])) for name, x in PARAMS.items()}
    for params in (SPREAD, shapes, elsewhere):
        state = method.init(params)
        for moments in (state.inner[0].mu, state.inner[0].nu):
            assert all(x.sharding.is_equivalent_to(params[name].sharding, x.ndim) for name, x in moments.items())
        assert len(state.step.sharding.device_set) == 8


def manual_axes_are_refused() -> None:
    method = curvax.sgn_ce(predict_fn=model(False, False))
    state = method.init(PARAMS)

    def step(params: Any, batch: Any) -> Any:
        return method.step(params, batch, state)[0]

    for check in (True, False):
        mapped = jax.shard_map(step, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), check_vma=check)
        try:
            jax.jit(mapped)(PARAMS, DATA)
        except ValueError as error:
            assert "jax.jit" in str(error) and "'data'" in str(error), error
        else:
            raise AssertionError("a step on one device's part of a batch was taken")


if __name__ == "__main__":
    manual_axes_are_refused()
    states_are_sharded_like_parameters()
    structure_follows()
    models_may_name_axes()
