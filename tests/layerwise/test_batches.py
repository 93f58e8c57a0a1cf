"""Minibatches, microbatches and shares: coupled losses, leaves that all examples share, axes that are not the first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.curvature import Evaluation, GaussNewton, Model
from curvax.layerwise import ByLeaf, ConjugateGradients, LineSearch, full_gn, layerwise_gn
from curvax.layerwise.quadratic import InnerProblem
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from tests.oracle import dense
from tests.oracle.compiling import quick_jit

PyTree = Any


def _drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _mlp(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def _params() -> PyTree:
    return {"w": _drawn(0, 4, 5) / 2, "v": _drawn(1, 5, 2) / 2}


@pytest.mark.parametrize("prox_linear", [False, True])
@pytest.mark.parametrize("rule", [None, ByLeaf()], ids=["full", "leaves"])
def test_a_centered_loss_in_pieces(rule: Any, prox_linear: bool, x64: None) -> None:
    params, delta = _params(), {"w": _drawn(2, 4, 5) / 10, "v": _drawn(3, 5, 2) / 10}
    batch = {"x": _drawn(4, 7, 4), "y": _drawn(5, 7, 2)}
    outputs, jacobian = dense.outputs_and_jacobian(_mlp, params, batch["x"])
    residual = outputs - np.asarray(batch["y"])
    centered = jacobian.reshape(7, 2, -1)
    centered = (centered - centered.mean(0)).reshape(14, -1)
    residual = (residual - residual.mean(0)).ravel() / 7
    flat = dense.vector(delta)
    block = np.concatenate(
        [np.full(np.size(x), i if rule is not None else 0) for i, x in enumerate(jax.tree.leaves(params))]
    )
    same = block[:, None] == block[None, :]
    # The loss is a quadratic of the outputs, so that prox-linear is the same.
    want = centered.T @ residual + (centered.T @ centered / 7 * same) @ flat
    curvature = GaussNewton(Model(_mlp), SquaredError(centered=True))
    for size in (2, 3):
        inner = InnerProblem(curvature, rule, prox_linear, microbatch_size=size)

        @quick_jit
        def compute(d: PyTree, inner: InnerProblem = inner) -> Any:
            system = inner.system(params, Evaluation(batch))
            loss, gradient, _ = inner.gradient(params, d, Evaluation(batch))
            return loss, gradient, system.loss, system.start(), system.product(d)

        loss, gradient, other, start, product = compute(delta)
        assert float(loss) == pytest.approx(7 * residual @ residual / 2, rel=1e-12) == float(other)
        np.testing.assert_allclose(dense.vector(gradient), want, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(dense.vector(start), centered.T @ residual, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(
            dense.vector(product), (centered.T @ centered / 7 * same) @ flat, rtol=1e-9, atol=1e-13
        )


@pytest.mark.parametrize("kind", ["full", "blocks", "conjugate gradients", "optax"])
def test_a_step_on_a_centered_loss_does_not_see_the_pieces(kind: str, x64: None) -> None:
    options: dict[str, Any] = {"predict_fn": _mlp, "loss": SquaredError(centered=True)}
    options |= {"inner_steps": 2, "inner": optax.sgd(0.05)}
    if kind == "conjugate gradients":
        options |= {"inner_steps": 1, "inner": ConjugateGradients(lam=0.1)}
    batch = {"x": _drawn(4, 12, 4), "y": _drawn(5, 12, 2)}
    found = []
    for size in (None, 3):
        build = layerwise_gn if kind == "blocks" else full_gn
        method = build(microbatch_size=size, **options)
        if kind == "optax":
            tx = curvax.layerwise.as_gradient_transformation(method)
            update, _ = quick_jit(lambda s, tx=tx: tx.update(_params(), s, _params(), batch=batch))(tx.init(_params()))
            found.append(dense.vector(update))
        else:
            new, _, info = quick_jit(method.step)(_params(), batch, method.init(_params()))
            assert bool(info["accepted"])
            found.append(dense.vector(new))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_shares_of_a_coupled_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shares=2 .*couples.*: set shares=1"):
        layerwise_gn(predict_fn=_mlp, loss=SquaredError(centered=True), inner=optax.sgd(0.1), inner_steps=1, shares=2)


def _tokens(params: PyTree, x: PyTree) -> jax.Array:
    hidden = params["embed"][x["tokens"]] + params["place"][x["places"]]
    return jnp.tanh(hidden).mean(1) @ params["v"]


def _token_problem(examples: int, length: int) -> tuple[PyTree, PyTree, PyTree]:
    """Parameters, a batch with one row of position ids per example, and one with a vector that all share."""
    params = {"embed": _drawn(0, 9, 4), "place": _drawn(1, length, 4), "v": _drawn(2, 4, 3)}
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 9, (examples, length)))
    # One label for all, so that a step on some examples improves the others.
    y, places = jnp.ones(examples, jnp.int32), jnp.arange(length)
    each = {"x": {"tokens": tokens, "places": jnp.tile(places, (examples, 1))}, "y": y}
    return params, each, {"x": {"tokens": tokens, "places": places}, "y": y}


@pytest.mark.parametrize("kind", ["plain", "pieces", "shares", "searched twice", "given"])
@pytest.mark.parametrize("length", [4, 12])
def test_position_ids_go_into_every_minibatch(kind: str, length: int, x64: None) -> None:
    """Twelve examples: with sequences of twelve the ids are as long as the batch, with four as a minibatch."""
    params, each, shared = _token_problem(12, length)
    options: dict[str, Any] = {"inner": optax.sgd(0.05), "inner_steps": 2}
    if kind == "pieces":
        options["microbatch_size"] = 2
    if kind == "shares":
        options |= {"partition": ByLeaf(), "shares": 2}
    if kind == "searched twice":
        options |= {"inner_steps": 1, "line_search": LineSearch(minibatches=2)}
    build = layerwise_gn if kind == "shares" else full_gn
    found = []
    for batch in (each, shared):
        axes = {"x": {"tokens": 0, "places": None}, "y": 0} if kind == "given" and batch is shared else None
        method = build(predict_fn=_tokens, loss=SoftmaxCrossEntropy(), batch_axes=axes, **options)
        new, _, info = quick_jit(method.step)(params, batch, method.init(params))
        assert bool(info["accepted"])
        assert "linearize" in method.plan_for(params, batch).explain()
        found.append(dense.vector(new))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_time_first_data(x64: None) -> None:
    def time_first(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.cumsum(_mlp(params, x), 0)

    def batch_first(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.cumsum(_mlp(params, x), 1)

    batch = {"x": _drawn(4, 3, 12, 4), "y": _drawn(5, 3, 12, 2)}
    turned = {name: jnp.swapaxes(leaf, 0, 1) for name, leaf in batch.items()}
    options: dict[str, Any] = {"loss": SquaredError(), "inner": optax.sgd(0.01), "inner_steps": 2, "microbatch_size": 2}
    found = []
    for predict, data, axes in ((time_first, batch, {"x": 1, "y": 1}), (batch_first, turned, None)):
        method = full_gn(predict_fn=predict, batch_axes=axes, **options)
        new, _, info = quick_jit(method.step)(_params(), data, method.init(_params()))
        assert bool(info["accepted"])
        found.append(dense.vector(new))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


def test_what_mixes_examples_is_refused_in_pieces_and_shares_alone(x64: None) -> None:
    def normalized(params: PyTree, x: jax.Array) -> jax.Array:
        hidden = x @ params["w"]
        return jnp.tanh(hidden - hidden.mean(0)) @ params["v"]

    batch = {"x": _drawn(4, 12, 4), "y": _drawn(5, 12, 2)}
    options: dict[str, Any] = {"predict_fn": normalized, "loss": SquaredError(), "inner": optax.sgd(0.01)}
    options["inner_steps"] = 2
    whole = full_gn(**options)
    _, _, info = quick_jit(whole.step)(_params(), batch, whole.init(_params()))
    assert bool(info["accepted"])
    cuts: list[tuple[Any, dict[str, Any]]] = [
        (full_gn, {"microbatch_size": 2}),
        (layerwise_gn, {"shares": 2, "partition": ByLeaf()}),
    ]
    for build, cut in cuts:
        method = build(**options, **cut)
        with pytest.raises(ValueError, match=r"mixes examples .*reduce_sum"):
            quick_jit(method.step)(_params(), batch, method.init(_params()))
        said = build(**options, **cut, batch_axes=0)
        _, _, info = quick_jit(said.step)(_params(), batch, said.init(_params()))
        assert bool(info["finite"])


def test_a_model_that_runs_on_minibatches_alone(x64: None) -> None:
    """It is asked for its examples on the whole batch, where it does not run: the first axes are taken."""

    def predict(params: PyTree, x: jax.Array) -> jax.Array:
        assert x.shape[0] == 4
        return _mlp(params, x)

    batch = {"x": _drawn(4, 12, 4), "y": _drawn(5, 12, 2)}
    method = full_gn(predict_fn=predict, loss=SquaredError(), inner=optax.sgd(0.01), inner_steps=2)
    _, _, info = quick_jit(method.step)(_params(), batch, method.init(_params()))
    assert bool(info["accepted"])
    with pytest.raises(ValueError, match="no first axis in common: say by batch_axes="):
        quick_jit(method.step)(_params(), {**batch, "y": _drawn(5, 11, 2)}, method.init(_params()))
