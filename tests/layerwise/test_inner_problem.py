"""Inner gradients and products of full and layerwise Gauss-Newton against dense float64 ones with masks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.curvature import Evaluation, GaussNewton, Model
from curvax.layerwise import BlockPartition, ByGroup, ByLeaf, ByPath, ParameterBlocks
from curvax.layerwise.quadratic import InnerProblem
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from tests.oracle import dense, losses, models
from tests.oracle.compiling import quick_jit

MODELS = (
    models.MLP_TANH,
    models.ATTENTION,
    models.EMBEDDING,
    models.ODD_TREE,
    models.REUSED,
    models.CUSTOM_VJP,
)


def owners(params: Any, partition: Any) -> list[np.ndarray]:
    """The block of every parameter, leaf by leaf, from paths and shapes alone."""
    named: list[np.ndarray] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        key = jax.tree_util.keystr(path if isinstance(partition, ByLeaf) else path[:1])
        named.append(np.full(np.shape(leaf), key, dtype=object))
    return named


def flat_owners(params: Any, partition: Any) -> np.ndarray:
    return np.concatenate([x.ravel() for x in owners(params, partition)])


def dense_gradient(truth: dense.Truth, delta: np.ndarray, block: np.ndarray) -> np.ndarray:
    """J_b^T (g0 + H J_b delta_b) for every block b, one after another."""
    found = np.zeros_like(delta)
    for name in set(block):
        inside = block == name
        v = (truth.jacobian[:, inside] @ delta[inside]).reshape(truth.loss.gradient.shape)
        slope = truth.loss.gradient + np.einsum("pkl,pl->pk", truth.loss.hessian, v)
        found[inside] = truth.jacobian[:, inside].T @ slope.ravel()
    return found


def masked(matrix: np.ndarray, block: np.ndarray) -> np.ndarray:
    return matrix * (block[:, None] == block[None, :])


def problem(model: models.Model, **options: Any) -> InnerProblem:
    return InnerProblem(GaussNewton(Model(model.predict), SoftmaxCrossEntropy()), **options)


def setting(model: models.Model, dtype: Any = jnp.float64, seed: int = 0) -> tuple[Any, Any, np.ndarray, Any]:
    params, batch = model.params(dtype), {"x": model.inputs(dtype), "y": model.labels()}
    delta = np.random.default_rng(seed).standard_normal(dense.vector(params).size) * 0.1
    return params, batch, delta, jax.tree.map(lambda d: jnp.asarray(d, dtype), dense.like(delta, params))


@pytest.mark.fast
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_gradient_and_product_are_the_dense_ones(model: models.Model, x64: None) -> None:
    params, batch, flat, delta = setting(model)
    truth = dense.truth(model.predict, losses.softmax_cross_entropy, params, batch["x"], batch["y"])
    everything = np.zeros(flat.size, dtype=object)
    rules = [(None, everything), (ByLeaf(), flat_owners(params, ByLeaf()))]

    @quick_jit
    def compute(delta: Any) -> Any:
        found = [problem(model, partition=rule).linearize(params, Evaluation(batch)) for rule, _ in rules]
        return [(at.loss, at.start(), at.gradient(delta), at.product(delta)) for at in found]

    for (_, block), (loss, start, gradient, product) in zip(rules, compute(delta), strict=True):
        np.testing.assert_allclose(loss, truth.loss.value, rtol=1e-12)
        np.testing.assert_allclose(dense.vector(start), truth.gradient, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(dense.vector(gradient), dense_gradient(truth, flat, block), rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(dense.vector(product), masked(truth.ggn, block) @ flat, rtol=1e-9, atol=1e-13)


def shared_gradient(predict: Any, params: Any, batch: Any, delta: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Two shares, halves of the examples: blocks 0, 2, ... have curvature on the first, the others on the second."""
    weights, half = np.asarray(batch["weight"]), len(batch["weight"]) // 2
    found = np.zeros_like(delta)
    order = list(dict.fromkeys(block))
    for share, examples in enumerate((slice(0, half), slice(half, None))):
        x, y, w = (np.asarray(batch[k])[examples] for k in ("x", "y", "weight"))
        truth = dense.truth(predict, losses.softmax_cross_entropy, params, x, y, w)
        found += truth.gradient * np.sum(w) / np.sum(weights)
        for name in order[share::2]:
            inside = block == name
            found[inside] += truth.ggn[np.ix_(inside, inside)] @ delta[inside]
    return found


def test_shares_of_a_prox_linear_problem_scale_what_the_tangent_adds(x64: None) -> None:
    """Shares with the same examples are each like the whole, so the exact gradient comes back."""
    params, batch, _, delta = setting(models.MLP_TANH)
    half = {"x": batch["x"][:3], "y": batch["y"][:3]}
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), half)
    exact, shared = quick_jit(
        lambda d: [
            problem(models.MLP_TANH, partition=ByLeaf(), prox_linear=True, shares=n)
            .linearize(params, Evaluation(data))
            .gradient(d)
            for n, data in ((1, half), (2, twice))
        ]
    )(delta)
    np.testing.assert_allclose(dense.vector(shared), dense.vector(exact), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("model", [models.MLP_TANH, models.ATTENTION, models.REUSED], ids=str)
def test_shares_take_the_curvature_of_each_block_on_their_own_examples(model: models.Model, x64: None) -> None:
    params, batch, flat, delta = setting(model)
    batch["weight"] = jnp.linspace(0.5, 2.0, len(batch["x"]))
    block = flat_owners(params, ByLeaf())
    operator = GaussNewton(Model(model.predict, weight_key="weight"), SoftmaxCrossEntropy())
    start, gradient, product = quick_jit(
        lambda d: (lambda at: (at.start(), at.gradient(d), at.product(d)))(
            InnerProblem(operator, ByLeaf(), shares=2).linearize(params, Evaluation(batch))
        )
    )(delta)
    truth = shared_gradient(model.predict, params, batch, flat, block)
    plain = shared_gradient(model.predict, params, batch, 0 * flat, block)
    np.testing.assert_allclose(dense.vector(start), plain, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(dense.vector(gradient), truth, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(dense.vector(product), truth - plain, rtol=1e-9, atol=1e-12)


def scanned(params: Any, x: jax.Array) -> jax.Array:
    hidden, _ = jax.lax.scan(
        lambda h, layer: (h + jnp.tanh(h @ layer["w"] + layer["b"]), None), x @ params["embed"], params["layers"]
    )
    return hidden @ params["head"]


@quick_jit
def scanned_params() -> Any:
    k = jax.random.split(jax.random.key(3), 4)
    return {
        "embed": jax.random.normal(k[0], (3, 4)),
        "layers": {"w": 0.5 * jax.random.normal(k[1], (3, 4, 4)), "b": 0.1 * jax.random.normal(k[2], (3, 4))},
        "head": jax.random.normal(k[3], (4, 3)),
    }


def scanned_setting() -> tuple[Any, jax.Array, jax.Array, dense.Truth, np.ndarray, Any]:
    """(parameters, inputs, labels, dense truth, delta as a vector, delta)."""
    params = scanned_params()
    x, y = jax.random.normal(jax.random.key(4), (6, 3)), jnp.asarray([0, 1, 2, 0, 1, 2])
    truth = dense.truth(scanned, losses.softmax_cross_entropy, params, x, y)
    flat = np.random.default_rng(0).standard_normal(truth.gradient.size)
    delta = jax.tree.map(jnp.asarray, dense.like(flat, params))
    return params, x, y, truth, flat, delta


def test_stacked_layers_are_blocks_of_their_own(x64: None) -> None:
    params, x, y, truth, flat, delta = scanned_setting()
    # Leaves in order: embed (12), head (12), layers/b (3 x 4), layers/w (3 x 16).
    block = np.concatenate([np.full(12, 10), np.full(12, 11), np.repeat(np.arange(3), 4), np.repeat(np.arange(3), 16)])
    rule = ByGroup(split=("layers",))
    curvature = GaussNewton(Model(scanned), SoftmaxCrossEntropy())

    @quick_jit
    def compute(delta: Any) -> Any:
        at = InnerProblem(curvature, rule).linearize(params, Evaluation({"x": x, "y": y}))
        shares = InnerProblem(curvature, rule, shares=2).linearize(params, Evaluation({"x": x, "y": y}))
        return at.gradient(delta), at.product(delta), shares.gradient(delta)

    gradient, product, shared = compute(delta)
    assert rule.blocks(params).names == ("embed", "head", "layers/0", "layers/1", "layers/2")
    np.testing.assert_allclose(dense.vector(gradient), dense_gradient(truth, flat, block), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(dense.vector(product), masked(truth.ggn, block) @ flat, rtol=1e-10, atol=1e-13)
    expected = shared_gradient(scanned, params, {"x": x, "y": y, "weight": np.ones(6)}, flat, block)
    np.testing.assert_allclose(dense.vector(shared), expected, rtol=1e-10, atol=1e-13)


class Interleaved(BlockPartition):
    """Layers 0 and 2 of a stack are one block, layer 1 and everything else another."""

    @property
    def name(self) -> str:
        return "interleaved"

    def blocks(self, params: Any) -> ParameterBlocks:
        return ParameterBlocks(("rest", "ends"), (0, 0, (1, 0, 1), (1, 0, 1)))


def test_several_layers_of_a_stack_are_one_block(x64: None) -> None:
    params, x, y, truth, flat, delta = scanned_setting()
    block = np.concatenate([np.zeros(24), np.repeat([1, 0, 1], 4), np.repeat([1, 0, 1], 16)])
    inside = InnerProblem(GaussNewton(Model(scanned), SoftmaxCrossEntropy()), Interleaved())
    found = quick_jit(lambda d: inside.linearize(params, Evaluation({"x": x, "y": y})).gradient(d))(delta)
    np.testing.assert_allclose(dense.vector(found), dense_gradient(truth, flat, block), rtol=1e-10, atol=1e-13)


def test_prox_linear_takes_the_loss_of_linearized_outputs(x64: None) -> None:
    model = models.ATTENTION
    params, batch, flat, delta = setting(model)
    truth = dense.truth(model.predict, losses.softmax_cross_entropy, params, batch["x"], batch["y"])
    block = flat_owners(params, ByLeaf())
    for rule, kinds in ((None, {0: np.ones(flat.size, bool)}), (ByLeaf(), {b: block == b for b in set(block)})):
        inner = problem(model, partition=rule, prox_linear=True)
        gradient = quick_jit(lambda d, inner=inner: inner.linearize(params, Evaluation(batch)).gradient(d))(delta)
        expected = np.zeros_like(flat)
        for inside in kinds.values():
            v = (truth.jacobian[:, inside] @ flat[inside]).reshape(truth.outputs.shape)
            slope = losses.softmax_cross_entropy(truth.outputs + v, batch["y"]).gradient
            expected[inside] = truth.jacobian[:, inside].T @ slope.ravel()
        np.testing.assert_allclose(dense.vector(gradient), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("rule", [None, ByLeaf()], ids=["full", "leaves"])
def test_microbatches_and_weights_add_up(rule: Any, x64: None) -> None:
    model = models.MLP_TANH
    params, batch, flat, delta = setting(model)
    batch |= {"w": model.weights()}
    curvature = GaussNewton(Model(model.predict, weight_key="w"), SoftmaxCrossEntropy())
    truth = dense.truth(model.predict, losses.softmax_cross_entropy, params, batch["x"], batch["y"], batch["w"])
    block = np.zeros(flat.size) if rule is None else flat_owners(params, rule)
    inner = InnerProblem(curvature, rule, microbatch_size=4)

    @quick_jit
    def compute(delta: Any) -> Any:
        system = inner.system(params, Evaluation(batch))
        return *inner.gradient(params, delta, Evaluation(batch))[:2], system.start(), system.product(delta)

    loss, gradient, start, product = compute(delta)
    np.testing.assert_allclose(loss, truth.loss.value, rtol=1e-12)
    np.testing.assert_allclose(dense.vector(gradient), dense_gradient(truth, flat, block), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(dense.vector(start), truth.gradient, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(dense.vector(product), masked(truth.ggn, block) @ flat, rtol=1e-9, atol=1e-13)


def test_every_block_is_independent_of_the_others(x64: None) -> None:
    model = models.ATTENTION
    params, batch, _, delta = setting(model)
    inner = problem(model, partition=ByPath(lambda path: "head" if path == "head" else "body"))
    moved = {**delta, "head": 2.0 * delta["head"]}
    gradient = quick_jit(lambda d: inner.linearize(params, Evaluation(batch)).gradient(d))
    before, after = gradient(delta), gradient(moved)
    assert np.max(np.abs(before["head"] - after["head"])) > 1e-3
    for name in set(params) - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])


def test_bfloat16_products_stay_near_float64() -> None:
    model = models.ATTENTION
    params, batch, flat, delta = setting(model, jnp.float32)
    truth = dense.truth(model.predict, losses.softmax_cross_entropy, params, batch["x"], batch["y"])
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    evaluation = Evaluation({"x": batch["x"].astype(jnp.bfloat16), "y": batch["y"]})
    inner = problem(model, partition=ByLeaf())
    gradient = quick_jit(lambda d: inner.linearize(narrow, evaluation).gradient(d))(delta)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    expected = dense_gradient(truth, flat, flat_owners(params, ByLeaf()))
    assert dense.relative_error(dense.vector(gradient), expected) < 0.05


def test_squared_error_uses_its_own_hessian(x64: None) -> None:
    model = models.SCALAR
    params, _, flat, delta = setting(models.SCALAR)
    batch = {"x": model.inputs(), "y": model.targets()}
    truth = dense.truth(model.predict, losses.squared_error, params, batch["x"], batch["y"])
    inner = InnerProblem(GaussNewton(Model(model.predict), SquaredError()), ByLeaf())
    product = quick_jit(lambda d: inner.linearize(params, Evaluation(batch)).product(d))(delta)
    block = flat_owners(params, ByLeaf())
    np.testing.assert_allclose(dense.vector(product), masked(truth.ggn, block) @ flat, rtol=1e-9, atol=1e-13)
