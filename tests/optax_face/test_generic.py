"""What Optax asks of all of its optimizers, asked of ours: every optimizer, method and `scale_by_*`.

Optax's own suites of `contrib` and `alias` walk a state with `optax.tree.map_params`, make one from shapes, put the
optimizer into `inject_hyperparams`, and look whether an update keeps shapes and dtypes of parameters and state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import curvax
from curvax import layerwise
from curvax.layerwise import full_gn, layerwise_gn
from curvax.losses import SquaredError
from curvax.optimizers import muon_adamw, scale_by_shampoo, scale_by_soap, shampoo, soap
from curvax.preconditioners import KFAC, NystromPreconditioner
from tests.oracle.compiling import quick_jit

PARAMS = {"w": jnp.ones((3, 4)) / 4, "b": jnp.zeros(4), "v": jnp.eye(4, 2)}
BATCH = {"x": jnp.arange(12.0).reshape(4, 3) / 12, "y": jnp.ones((4, 2))}
LOSS = SquaredError()


def predict(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.square(predict(params, batch["x"]) - batch["y"]))


def method(name: str, **keywords: Any) -> Any:
    known = curvax.describe(name).signature.parameters
    keywords |= {"loss": LOSS} if "loss" in known else {}
    made = curvax.make(name, predict_fn=predict, **keywords)
    return curvax.as_gradient_transformation(made, batch=BATCH)


def inner_loop(make: Any) -> Any:
    inner = make(predict_fn=predict, loss=LOSS, inner=optax.adam(0.1), inner_steps=3)
    return layerwise.as_gradient_transformation(inner)


GRADIENT = quick_jit(jax.grad(loss))
CHAIN = {"clip_norm": 1.0, "direction_momentum": 0.9, "weight_decay": 0.1}
# The trees like the parameters that a state holds.
TREES = {"sgn": 1, "newton_cg": 0, "egn": 0, "spring": 1, "kfac": 1, "ekfac": 1, "sophia_g": 3, "adahessian": 3}
MAKERS: dict[str, tuple[Any, int | None]] = {
    **{name: (lambda name=name: method(name), TREES.get(name)) for name in curvax.list_methods() if name != "vmc"},
    "sgn, chain": (lambda: method("sgn", **CHAIN, weight_decay_mask={"w": True, "b": False, "v": True}), 2),
    "sgn, frozen": (lambda: method("sgn", frozen={"w": True, "b": False, "v": False}), None),
    "sgn, kfac": (lambda: method("sgn", precond=KFAC()), 1),
    "sgn, nystrom": (lambda: method("sgn", precond=NystromPreconditioner(rank=2)), 1),
    "full_gn": (lambda: inner_loop(full_gn), 3),
    "layerwise_gn": (lambda: inner_loop(layerwise_gn), 3),
    "scale_by_ggn": (lambda: curvax.transforms.scale_by_ggn(predict, LOSS), 1),
    "scale_by_egn": (lambda: curvax.transforms.scale_by_egn(predict, LOSS), 0),
    "scale_by_newton_cg": (lambda: curvax.transforms.scale_by_newton_cg(loss), 1),
    "scale_by_kfac": (lambda: curvax.transforms.scale_by_kfac(predict, LOSS, BATCH), 0),
    "scale_by_sophia_g": (lambda: curvax.transforms.scale_by_sophia_g(predict, LOSS), 2),
    "scale_by_sophia_h": (lambda: curvax.transforms.scale_by_sophia_h(loss), 2),
    "scale_by_adahessian": (lambda: curvax.transforms.scale_by_adahessian(loss), 2),
    "soap": (lambda: soap(0.1), 2),
    "shampoo": (lambda: shampoo(0.1), 1),
    "shampoo, graft": (lambda: shampoo(0.1, graft=optax.scale_by_adam()), 3),
    "muon_adamw": (lambda: muon_adamw(0.1, others=()), None),
}
every_one = pytest.mark.parametrize(("make", "trees"), MAKERS.values(), ids=MAKERS)


def assert_alike(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.fast
@every_one
def test_a_state_is_walked_by_map_params(make: Any, trees: int | None) -> None:
    tx = make()
    state = tx.init(PARAMS)
    assert_alike(optax.tree.map_params(tx, lambda x: x, state), state)
    if trees is None:
        return
    specs = {name: PartitionSpec(name) for name in PARAMS}

    def spec(moment: jax.Array, spec: PartitionSpec) -> PartitionSpec:
        assert moment.shape == PARAMS[spec[0]].shape
        return spec

    found = optax.tree.map_params(tx, spec, state, specs, transform_non_params=lambda _: PartitionSpec())
    leaves = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, PartitionSpec))
    assert sorted(map(str, leaves)) == sorted(
        [*map(str, specs.values())] * trees + [str(PartitionSpec())] * (len(leaves) - trees * len(specs))
    )
    # The specs are a prefix of the state, as `jax.jit` and `jax.device_put` take shardings.
    jax.tree.map(lambda *_: None, found, state, is_leaf=lambda x: isinstance(x, PartitionSpec))


@every_one
def test_a_state_is_made_from_shapes(make: Any, trees: int | None) -> None:
    del trees
    tx = make()
    shapes = jax.eval_shape(lambda: PARAMS)
    made, expected = tx.init(shapes), tx.init(PARAMS)
    assert_alike(made, expected)
    assert_alike(jax.eval_shape(tx.init, PARAMS), expected)
    jax.tree.map(np.testing.assert_array_equal, made, expected)


@pytest.mark.parametrize(
    "make",
    # Row-space CG takes no gradient from outside, and says so.
    [make for name, (make, _) in MAKERS.items() if name != "egn_mse_cg"],
    ids=[name for name in MAKERS if name != "egn_mse_cg"],
)
def test_an_update_keeps_shapes_and_dtypes(make: Any) -> None:
    tx = optax.with_extra_args_support(make())
    state = tx.init(PARAMS)

    def update(grads: Any, state: Any) -> Any:
        return tx.update(grads, state, PARAMS, batch=BATCH, rng=jax.random.key(0), something_else=1)

    with jax.numpy_dtype_promotion("standard"):
        updates, following = jax.eval_shape(update, PARAMS, state)
    assert_alike(updates, PARAMS)
    assert_alike(following, state)


INJECTED: dict[str, tuple[Any, tuple[Any, ...], tuple[str, ...]]] = {
    "soap": (soap, (0.1,), ()),
    "scale_by_soap": (scale_by_soap, (), ()),
    "shampoo": (shampoo, (0.1,), ()),
    "scale_by_shampoo": (scale_by_shampoo, (), ()),
    "scale_by_ggn": (curvax.transforms.scale_by_ggn, (predict, LOSS), ("predict_fn",)),
    "scale_by_egn": (curvax.transforms.scale_by_egn, (predict, LOSS), ("predict_fn",)),
    "scale_by_newton_cg": (curvax.transforms.scale_by_newton_cg, (loss, 50.0), ("loss_fn",)),
    "scale_by_kfac": (curvax.transforms.scale_by_kfac, (predict, LOSS, BATCH), ("predict_fn",)),
    "scale_by_sophia_g": (curvax.transforms.scale_by_sophia_g, (predict, LOSS), ("predict_fn",)),
    "scale_by_sophia_h": (curvax.transforms.scale_by_sophia_h, (loss,), ("loss_fn",)),
    "scale_by_adahessian": (curvax.transforms.scale_by_adahessian, (loss,), ("loss_fn",)),
}


@jax.numpy_dtype_promotion("standard")  # Optax's schedules and weight decay rely on promotion
@pytest.mark.parametrize(("factory", "arguments", "static"), INJECTED.values(), ids=INJECTED)
def test_every_number_can_be_traced(factory: Any, arguments: Any, static: Any) -> None:
    """`inject_hyperparams` traces every number that is not named, in `init` as well."""
    grads = GRADIENT(PARAMS, BATCH)

    def two_updates(tx: Any) -> Any:
        tx = optax.with_extra_args_support(tx)

        def run() -> Any:
            def update(carry: Any, _: Any) -> Any:
                return tx.update(grads, carry[1], PARAMS, batch=BATCH, rng=jax.random.key(0)), None

            return jax.lax.scan(update, (grads, tx.init(PARAMS)), length=2)[0][0]

        return quick_jit(run)()

    expected = two_updates(factory(*arguments))
    injected = optax.inject_hyperparams(factory, static_args=static)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), two_updates(injected), expected)
    optax.tree.map_params(injected, lambda x: x, injected.init(PARAMS))


@pytest.mark.parametrize(
    ("factory", "arguments", "static", "number"),
    [
        (soap, {"learning_rate": 0.1, "max_dim": 64}, (), "max_dim"),
        (shampoo, {"learning_rate": 0.1, "max_dim": 64}, (), "max_dim"),
        (curvax.transforms.scale_by_sophia_g, {"predict_fn": predict, "n_samples": 2}, ("predict_fn",), "n_samples"),
        (curvax.transforms.scale_by_sophia_g, {"predict_fn": predict, "every": 2}, ("predict_fn",), "every"),
        (curvax.transforms.scale_by_adahessian, {"loss_fn": loss, "n_probes": 2}, ("loss_fn",), "n_probes"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_numbers_that_shape_what_is_computed_are_named(factory: Any, arguments: Any, static: Any, number: str) -> None:
    injected = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    with pytest.raises(TypeError, match=rf"{number} is traced.*static_args=\('{number}',\)"):
        jax.eval_shape(injected.init, PARAMS)
    known = optax.inject_hyperparams(factory, static_args=(*static, number))(**arguments)
    jax.eval_shape(known.init, PARAMS)


def test_numbers_that_are_known_are_checked() -> None:
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1.5"):
        optax.inject_hyperparams(soap)(0.1, b2=1.5).init(PARAMS)
    with pytest.raises(ValueError, match="gamma must be positive"):
        curvax.transforms.scale_by_sophia_g(predict, gamma=-1.0)


def test_a_group_without_parameters_is_nothing() -> None:
    face = curvax.transforms.scale_by_kfac(predict, LOSS, BATCH)
    tx = optax.partition({"kfac": face, "sgd": optax.sgd(1.0)}, dict.fromkeys(PARAMS, "sgd"))
    update = quick_jit(lambda g, s: tx.update(g, s, PARAMS, batch=BATCH))
    updates, _ = update(PARAMS, tx.init(PARAMS))
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -g), updates, PARAMS)
