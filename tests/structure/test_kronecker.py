"""Kronecker factors: exact where the papers say so, and elsewhere what the papers define."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import structure
from curvax.curvature import (
    Evaluation,
    GaussNewton,
    GeneralizedGaussNewton,
    Hessian,
    LossFunction,
    Microbatched,
    Model,
    MonteCarloFisher,
    Needs,
    ObservedFisher,
)
from curvax.losses import Loss, SoftmaxCrossEntropy, SquaredError
from curvax.structure import kronecker
from curvax.structure.blocks import KroneckerBlock
from curvax.structure.kronecker import WeightSharing, factor_sums, projected_squares, second_moment
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import Problem, block_diagonal, kronecker_matrix, normal

EXPAND, REDUCE = WeightSharing.EXPAND, WeightSharing.REDUCE
both = pytest.mark.parametrize("sharing", [EXPAND, REDUCE])
pytestmark = pytest.mark.usefixtures("x64")


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


def mlp_params(seed=0):
    return {"w": normal(seed, 3, 4), "b": normal(seed + 1, 4), "v": normal(seed + 2, 4, 3), "c": normal(seed + 3, 3)}


def regression(predict, params, *inputs, outputs=(3,), examples=5, **rest):
    x = normal(7, examples, *inputs)
    return Problem(predict, params, {"x": x, "y": normal(8, examples, *outputs), **rest})


def assert_blocks_exact(problem, sharing=EXPAND, kind="mse"):
    """All A kron B together are the blocks of the dense GGN."""
    blocks = problem.blocks
    inputs, outputs = problem.factors(sharing)
    found = kronecker_matrix(blocks, inputs, outputs, problem.params)
    expected = block_diagonal(problem.truth(kind).ggn, blocks, problem.params)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.fast
@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_linear_layer_with_squared_error_is_exact(sharing, reduction):
    params = {"w": normal(0, 4, 3), "b": normal(1, 3)}
    problem = regression(lambda p, x: x @ p["w"] + p["b"], params, 4)
    assert_blocks_exact(problem, sharing)
    scaled = dataclasses.replace(problem, loss=SquaredError(reduction=reduction))
    a, b = scaled.factors()
    np.testing.assert_allclose(a[0][0][-1, -1], 1.0)
    np.testing.assert_allclose(b[0][0], np.eye(3) * (5 if reduction == "sum" else 1), atol=1e-12)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5, 3.0, 0.25], [1.0, 0.0, 2.0, 0.0, 1.0]])
def test_weights_and_masks_count_as_in_the_loss(weights):
    params = {"w": normal(0, 4, 3), "b": normal(1, 3)}
    problem = regression(lambda p, x: x @ p["w"] + p["b"], params, 4, w=jnp.asarray(weights))
    assert_blocks_exact(problem)
    dead = np.asarray(weights) == 0
    if dead.any():
        broken = {**problem.batch, "x": problem.batch["x"].at[np.flatnonzero(dead)].set(jnp.nan)}
        for mine, theirs in zip(
            jax.tree.leaves(problem.sums()),
            jax.tree.leaves(dataclasses.replace(problem, batch=broken).sums()),
            strict=True,
        ):
            np.testing.assert_array_equal(mine, theirs)


def test_no_weight_at_all_gives_zeros():
    problem = regression(mlp, mlp_params(), 3, w=jnp.zeros(5))
    a, b = problem.factors()
    assert all(np.all(x == 0) for x in (*a, *b))


@pytest.mark.fast
@both
@pytest.mark.parametrize("kind", ["mse", "ce"])
def test_one_example_is_exact(sharing, kind):
    """With one example and one position A has rank one, and any network's blocks factor."""
    problem = regression(mlp, mlp_params(), 3, examples=1)
    if kind == "ce":
        batch = {"x": problem.batch["x"], "y": jnp.asarray([1], jnp.int32)}
        problem = dataclasses.replace(problem, loss=SoftmaxCrossEntropy(), batch=batch)
    assert_blocks_exact(problem, sharing, kind)


def test_a_deep_linear_network_with_squared_error_is_exact():
    """Its cotangents do not depend on the example (Bernacchia et al. 2018), so A and B are independent."""
    problem = regression(lambda p, x: (x @ p["w"] + p["b"]) @ p["v"] + p["c"], mlp_params(), 3)
    assert_blocks_exact(problem)


def test_a_deep_linear_network_over_positions_is_exact_in_both_settings():
    """Expand where the loss is a sum over positions, reduce where positions are averaged before the loss."""

    def linear(p, x):
        return (x @ p["w"] + p["b"]) @ p["v"] + p["c"]

    each = regression(linear, mlp_params(), 6, 3, outputs=(6, 3))
    assert_blocks_exact(each, EXPAND)
    pooled = regression(lambda p, x: jnp.mean(linear(p, x), axis=1), mlp_params(), 6, 3)
    assert_blocks_exact(pooled, REDUCE)


@pytest.mark.parametrize("flag", [0, 1])
def test_a_layer_in_every_branch_has_factors_of_the_branch_that_is_taken(flag):
    """The predicate comes with the inputs, and all examples share it."""

    def predict(p, inputs):
        def layer(f):
            return lambda x: f(x @ p["w"] + p["b"])

        return jax.lax.cond(inputs["flag"] > 0, layer(jnp.sin), layer(lambda h: h), inputs["x"])

    batch = {"x": {"x": normal(7, 1 if flag else 5, 4), "flag": jnp.asarray(flag)}, "y": normal(8, 1 if flag else 5, 3)}
    problem = Problem(predict, {"w": normal(0, 4, 3), "b": normal(1, 3)}, batch)
    assert len(problem.blocks.kronecker) == 1 and not problem.blocks.diagonal
    assert_blocks_exact(problem)


def test_layers_that_differ_between_branches_keep_a_diagonal_and_say_so():
    def predict(p, x):
        once, twice = (lambda h: h @ p["w"]), (lambda h: h @ p["w"] @ p["w"])
        return jax.lax.cond(jnp.sum(p["v"]) > 0, once, twice, x) @ p["v"]

    method = curvax.kfac(predict_fn=predict, loss=SquaredError())
    params, batch = {"v": normal(0, 3, 2), "w": normal(1, 3, 3)}, {"x": normal(2, 4, 3), "y": normal(3, 4, 2)}
    with pytest.warns(UserWarning, match=r"diagonal, for \['w'\] \(.*the branches of a cond use it in different ways"):
        method.init(params, batch=batch)
    assert "the branches of a cond use it in different ways" in method.plan_for(params, batch).explain()


def test_complex_layers_in_a_scan_have_factors():
    """A deep linear network of complex weights, by a scan: exact as a real one, parts by themselves."""

    def predict(p, x):
        h, _ = jax.lax.scan(lambda h, w: (h @ w, None), jax.lax.complex(x, 0 * x), jax.lax.complex(p["re"], p["im"]))
        return jnp.real(h)

    problem = regression(predict, {"re": normal(0, 2, 3, 3), "im": normal(1, 2, 3, 3)}, 3, examples=1)
    assert [b.use.rule for b in problem.blocks.kronecker if isinstance(b, KroneckerBlock)] == ["dense", "dense"]
    assert not problem.blocks.diagonal


def test_sampled_targets_have_the_exact_factors_as_mean():
    problem = regression(mlp, mlp_params(), 3)
    batch = {"x": problem.batch["x"], "y": jnp.asarray([0, 1, 2, 1, 0], jnp.int32)}
    problem = dataclasses.replace(problem, batch=batch, loss=SoftmaxCrossEntropy())
    exact = problem.sums()
    many = problem.samples(MonteCarloFisher(2), 4000)
    for k, b in enumerate(exact.outputs):
        samples = np.asarray(many.outputs[k])
        error = samples.std(0, ddof=1) / np.sqrt(len(samples))
        assert np.all(np.abs(samples.mean(0) - b) <= 5 * error + 1e-12)
        np.testing.assert_allclose(many.inputs[k][0], exact.inputs[k], rtol=1e-12)


def test_observed_targets_give_the_empirical_fisher_of_a_single_example():
    problem = regression(mlp, mlp_params(), 3, examples=1)
    sums = problem.sums(metric=ObservedFisher())
    found = kronecker_matrix(problem.blocks, sums.means(), sums.outputs, problem.params)
    expected = block_diagonal(problem.truth().empirical_fisher, problem.blocks, problem.params)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_observed_targets_at_several_positions_are_unbiased():
    """Random signs: the mean of the outer products is Q of the curvature's own definition."""
    problem = regression(lambda p, x: x @ p["w"], {"w": normal(0, 2, 2)}, 3, 2, outputs=(3, 2), examples=2)
    output = ObservedFisher().bind(
        problem.loss,
        problem.predict(problem.params, problem.batch["x"]),
        problem.batch["y"],
        jnp.full((2, 3), 1 / 6),
        None,
    )
    draw = quick_jit(lambda: jax.vmap(output.cotangents)(jax.random.split(jax.random.key(0), 4000)))
    u = np.asarray(draw())[:, 0].reshape(4000, 2, 6)
    outer = np.einsum("sbi,sbj->sbij", u, u)
    product = quick_jit(jax.vmap(output.product))
    q = np.stack([np.asarray(product(_unit(b)))[:, b].reshape(6, 6) for b in range(2)])
    error = outer.std(0) / np.sqrt(4000)
    assert np.all(np.abs(outer.mean(0) - q) <= 5 * error + 1e-12)


def _unit(example):
    return jnp.zeros((6, 2, 6)).at[:, example].set(jnp.eye(6)).reshape(6, 2, 3, 2)


def _kernel_patches(x, size, groups):
    """(B, T, G, C / G * size * size) of a valid convolution of (B, H, W, C), in (channel, row, column) order."""
    b, h, w, c = x.shape
    found = [
        x[:, i : i + size, j : j + size, :].reshape(b, size, size, groups, c // groups)
        for i in range(h - size + 1)
        for j in range(w - size + 1)
    ]
    return np.stack([p.transpose(0, 3, 4, 1, 2).reshape(b, groups, -1) for p in found], axis=1)


@both
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_follow_the_definitions(sharing, groups):
    """Plain, grouped and depthwise, with a bias; A and B from patches and cotangents cut out by hand."""
    channels, out = 4, 8

    def convolve(p, x, e):
        h = jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )
        return jnp.tanh(h + p["b"] + e).reshape(x.shape[0], -1) @ p["v"]

    x = normal(7, 3, 4, 4, channels)
    params = {"k": normal(0, 2, 2, channels // groups, out), "b": normal(1, out), "v": normal(2, 72, 2)}
    problem = Problem(lambda p, x: convolve(p, x, 0.0), params, {"x": x, "y": normal(3, 3, 2)})
    cotangents = quick_jit(jax.jacrev(lambda e: convolve(params, x, e)))(jnp.zeros((3, 3, 3, out)))
    d = np.stack([np.asarray(cotangents)[b, :, b] for b in range(3)]).reshape(3, 2, 9, groups, out // groups) / np.sqrt(
        3
    )
    a = _kernel_patches(np.asarray(x), 2, groups)
    a = np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)
    if sharing is REDUCE:
        a, d = a.mean(1, keepdims=True), d.sum(2, keepdims=True)
    expected_a = np.einsum("btgi,btgj->gij", a, a) / (3 * a.shape[1])
    expected_b = np.einsum("brtgi,brtgj->gij", d, d)
    blocks = problem.blocks
    index = next(i for i, block in enumerate(blocks.kronecker) if block.bias is not None)
    found_a, found_b = (x[index] for x in problem.factors(sharing))
    assert blocks.kronecker[index].shape == (groups, channels // groups * 4 + 1, out // groups)
    np.testing.assert_allclose(found_a, expected_a, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found_b, expected_b, rtol=1e-9, atol=1e-12)


@both
def test_a_layer_over_a_sequence_follows_the_definitions(sharing):
    params = mlp_params()
    x = normal(7, 4, 6, 3)

    def predict(p, x, e=0.0):
        return jnp.sum(jnp.tanh(x @ p["w"] + p["b"] + e) @ p["v"] + p["c"], axis=1)

    problem = Problem(lambda p, x: predict(p, x), params, {"x": x, "y": normal(3, 4, 3)})
    d = np.asarray(quick_jit(jax.jacrev(lambda e: predict(params, x, e)))(jnp.zeros((4, 6, 4))))
    d = np.stack([d[b, :, b] for b in range(4)]) / 2
    a = np.concatenate([np.asarray(x), np.ones((4, 6, 1))], axis=-1)
    if sharing is REDUCE:
        a, d = a.mean(1, keepdims=True), d.sum(2, keepdims=True)
    blocks = problem.blocks
    index = next(i for i, block in enumerate(blocks.kronecker) if block.shape == (1, 4, 4))
    found_a, found_b = (f[index][0] for f in problem.factors(sharing))
    np.testing.assert_allclose(found_a, np.einsum("bti,btj->ij", a, a) / (4 * a.shape[1]), rtol=1e-9)
    np.testing.assert_allclose(found_b, np.einsum("brti,brtj->ij", d, d), rtol=1e-9)


def test_an_embedding_has_counts():
    table = normal(0, 5, 3)
    x = jnp.asarray([[0, 1, 1, 4], [2, 2, 2, 7], [4, 0, 1, 3]], jnp.int32)  # 7 is clipped to 4 by the model's mode

    def predict(p, x):
        return jnp.take(p, x, axis=0, mode="clip").sum(axis=1)

    problem = Problem(predict, table, {"x": x, "y": normal(1, 3, 3)})
    (a,), (b,) = problem.factors()
    np.testing.assert_allclose(a, np.asarray([[2, 3, 3, 1, 3]]) / 12)
    np.testing.assert_allclose(b[0], np.eye(3) * 4, atol=1e-12)
    (a,), (b,) = problem.factors(REDUCE)
    frequencies = np.asarray([[1, 2, 0, 0, 1], [0, 0, 3, 0, 1], [1, 1, 0, 1, 1]]) / 4
    np.testing.assert_allclose(a[0], np.mean(frequencies**2, axis=0))
    np.testing.assert_allclose(b[0], np.eye(3) * 16, atol=1e-12)
    single = Problem(lambda p, x: p[x], table, {"x": x[:, 0], "y": normal(1, 3, 3)})
    assert_blocks_exact(single)


def test_a_scaled_leaf_and_one_cut_into_slices_are_exact():
    def scaled(p, x):
        return x @ (p["w"] * 3.0) + p["b"]

    assert_blocks_exact(regression(scaled, {"w": normal(0, 4, 3), "b": normal(1, 3)}, 4))

    def fused(p, x):
        first, second = p["w"][:, :3], p["w"][:, 3:6]  # the last columns are not used
        return x @ first + p["b"] - 2 * (x @ second)

    problem = regression(fused, {"w": normal(0, 4, 8), "b": normal(1, 3)}, 4)
    assert [block.shape for block in problem.blocks.kronecker] == [(1, 5, 3), (1, 4, 3)]
    assert problem.blocks.partial() == {1}
    assert_blocks_exact(problem)


def test_weights_used_twice_join_their_positions():
    """Two uses in the same order are one layer over twice the positions."""
    params = {"w": normal(0, 3, 3), "v": normal(1, 3, 2)}

    def twice(p, x):
        return (x[:, 0] @ p["w"] + x[:, 1] @ p["w"]) @ p["v"]

    def over_positions(p, x):
        return jnp.sum(x @ p["w"], axis=1) @ p["v"]

    one, other = (regression(f, params, 2, 3, outputs=(2,)) for f in (twice, over_positions))
    for sharing in (EXPAND, REDUCE):
        for mine, theirs in zip(
            jax.tree.leaves(one.factors(sharing)), jax.tree.leaves(other.factors(sharing)), strict=True
        ):
            np.testing.assert_allclose(np.sort(mine.ravel()), np.sort(theirs.ravel()), rtol=1e-9, atol=1e-12)
    assert any(isinstance(b, KroneckerBlock) and len(b.uses) == 2 for b in one.blocks.kronecker)
    assert any("joined over 2 uses" in line for line in one.blocks.describe(["v", "w"]))


def test_what_has_no_factors_keeps_the_exact_diagonal(monkeypatch):
    """A scale, a free bias, a generic leaf, a table in two layouts, a bias of weights used twice."""

    def predict(p, x):
        h = p["table"][x] * p["scale"] + p["shift"] * p["shift"]
        h = jnp.tanh(h @ p["w"] + p["b"]) @ p["w"]
        return (h + p["free"]) @ p["table"].T[:, ::-1] + jnp.sum(jnp.sin(p["odd"]))

    shapes = {
        "table": (4, 3),
        "scale": (3,),
        "shift": (3,),
        "w": (3, 3),
        "b": (3,),
        "free": (3,),
        "odd": (2,),
        "no": (2,),
    }
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x = jnp.asarray([0, 1, 3, 1, 2], jnp.int32)
    problem = Problem(predict, params, {"x": x, "y": normal(9, 5, 4)})
    blocks, names = problem.blocks, sorted(shapes)
    assert [names[b.leaf] for b in blocks.kronecker] == ["w"]
    assert sorted(names[b.leaf] for b in blocks.diagonal) == sorted(set(names) - {"w"})
    described = dict(line.split(": ", 1) for line in blocks.describe(names))
    assert set(described) == set(names)
    assert described["table"] == "diagonal: it is used in several orders of its entries"
    assert described["b"] == "diagonal: it is the bias of weights that are used several times"
    assert described["no"] == "diagonal: the outputs do not depend on it"
    assert "scale" in described["scale"]
    offsets = np.cumsum([0, *(np.prod(shapes[name]) for name in names)])
    exact = np.diag(problem.truth().ggn)
    for limit in (1 << 24, 1):
        monkeypatch.setattr(kronecker, "_ENTRIES_AT_ONCE", limit)
        for block, found in zip(blocks.diagonal, problem.sums().diagonal, strict=True):
            expected = exact[offsets[block.leaf] : offsets[block.leaf + 1]].reshape(block.shape)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_leaves_with_wide_factors_keep_the_exact_diagonal(monkeypatch):
    """Also in chunks of examples; a slice that is too wide takes its whole leaf along."""

    def predict(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return h @ p["v"] + p["c"] + x @ p["u"][:, :2] @ p["u"][:2, 2:]

    shapes = {"w": (3, 6), "b": (6,), "v": (6, 3), "c": (3,), "u": (3, 5)}
    problem = regression(predict, {k: normal(i, *s) for i, (k, s) in enumerate(shapes.items())}, 3)
    blocks, names = problem.blocks.narrowed(4), sorted(shapes)
    assert blocks.kronecker and {names[b.leaf] for b in blocks.kronecker} == {"u"}
    assert "a factor would have 7 rows, and max_width is 4" in blocks.describe(names)[3]
    assert problem.blocks.narrowed(7) == problem.blocks
    offsets = np.cumsum([0, *(np.prod(shapes[name]) for name in names)])
    exact = np.diag(problem.truth().ggn)
    for limit in (1 << 24, 1):
        monkeypatch.setattr(kronecker, "_ENTRIES_AT_ONCE", limit)
        sums = problem.measure(lambda examples: factor_sums(blocks, examples, EXPAND))
        for block, found in zip(blocks.diagonal, sums.diagonal, strict=True):
            expected = exact[offsets[block.leaf] : offsets[block.leaf + 1]].reshape(block.shape)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def _attention_free(p, x):
    h = p["e"][x]  # (B, T, 3)
    h = jnp.tanh(h @ p["w"] + p["b"])
    h = jax.lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), h, p["s"])[0]
    return jnp.sum(h, axis=1) @ p["v"]


def test_projected_squares_are_the_diagonal_in_any_basis(monkeypatch):
    """Embedding with repeated entries, positions, stacked layers (groups): against explicit rows of each example."""
    params = {
        "e": normal(0, 5, 3),
        "w": normal(1, 3, 4),
        "b": normal(2, 4),
        "s": normal(3, 2, 4, 4),
        "v": normal(4, 4, 2),
    }
    x = jnp.asarray([[0, 1, 1], [2, 2, 2], [4, 0, 1]], jnp.int32)
    problem = Problem(_attention_free, params, {"x": x, "y": normal(5, 3, 2)})
    blocks = problem.blocks
    assert sorted(b.shape for b in blocks.kronecker) == [(1, 4, 2), (1, 4, 4), (1, 5, 3), (2, 4, 4)]
    bases = []
    for i, block in enumerate(blocks.kronecker):
        groups, n, m = block.shape
        u, v = jnp.linalg.qr(normal(20 + i, groups, n, n))[0], jnp.linalg.qr(normal(40 + i, groups, m, m))[0]
        bases.append((None if block.embedding else u, v))
    ggn = problem.truth().ggn
    n = len(ggn)
    for limit in (1 << 24, 1, 100):
        monkeypatch.setattr(kronecker, "_ENTRIES_AT_ONCE", limit)
        found = problem.measure(lambda examples: projected_squares(blocks, examples, bases))
        for i, block in enumerate(blocks.kronecker):
            groups, rows, m = block.shape
            u = np.eye(rows)[None] if block.embedding else bases[i][0]
            expected = np.zeros(block.shape)

            @quick_jit
            def put(entries, block=block):
                leaves = [jnp.zeros(p.shape) for p in jax.tree.leaves(params)]
                for leaf, part in block.put(entries):
                    leaves[leaf] = leaves[leaf] + part
                return jnp.concatenate([leaf.ravel() for leaf in leaves])

            for g in range(groups):
                for k in range(rows):
                    for j in range(m):
                        entries = np.zeros(block.shape)
                        entries[g] = np.outer(u[g][:, k], bases[i][1][g][:, j])
                        w = np.asarray(put(entries))
                        expected[g, k, j] = w @ ggn @ w
            np.testing.assert_allclose(found[i], expected, rtol=1e-8, atol=1e-10)
    assert n == sum(p.size for p in jax.tree.leaves(params))


def test_take_and_put_are_adjoint_permutations():
    params = {
        "e": normal(0, 5, 3),
        "w": normal(1, 3, 4),
        "b": normal(2, 4),
        "s": normal(3, 2, 4, 4),
        "v": normal(4, 4, 2),
    }
    problem = Problem(_attention_free, params, {"x": jnp.zeros((3, 3), jnp.int32), "y": normal(5, 3, 2)})
    leaves = jax.tree.leaves(params)
    restored = [jnp.zeros_like(x) for x in leaves]
    for block in problem.blocks.kronecker:
        for leaf, part in block.put(block.take(leaves)):
            restored[leaf] = restored[leaf] + part
    for x, y in zip(leaves, restored, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("shape", [(1, 7, 5), (2, 3, 4), (1, 20, 513), (2, 600, 513), (1, 1, 1), (1, 0, 3), (3, 4, 0)])
def test_second_moments(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    np.testing.assert_allclose(quick_jit(second_moment)(x), np.swapaxes(x, 1, 2) @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_microbatches_add_up(size):
    problem = regression(mlp, mlp_params(), 3, w=jnp.asarray([1.0, 0.0, 2.0, 1.0, 0.5]))
    whole, blocks = problem.sums(), problem.blocks
    split = Microbatched(problem.curvature, size)
    assert split.blocks(problem.params, problem.evaluation) == blocks

    @quick_jit
    def sums(params):
        at = split.linearize(params, problem.evaluation, Needs(factors=True))
        assert at.layer_factors is not None
        return at.layer_factors(GeneralizedGaussNewton(), jax.random.key(0))(lambda e: factor_sums(blocks, e, EXPAND))

    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(sums(problem.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13)


def test_what_has_no_factors_is_refused():
    batch = {"x": normal(0, 5, 3), "y": normal(1, 5, 3)}
    params = mlp_params()
    mixing = GaussNewton(Model(lambda p, x: mlp(p, x - jnp.max(x, axis=0))), SquaredError())
    with pytest.raises(
        ValueError, match=r"the model mixes examples \(reduce_max works across examples\).* batch_axes="
    ):
        mixing.blocks(params, Evaluation(batch))
    coupling = type("Coupling", (SquaredError,), {"couples_examples": True, "by_example": Loss.by_example})
    coupled = GaussNewton(Model(mlp), coupling())
    with pytest.raises(ValueError, match="couples examples"):
        coupled.blocks(params, Evaluation(batch))
    centered = GaussNewton(Model(mlp), SquaredError(centered=True))
    assert centered.blocks(params, Evaluation(batch)) == GaussNewton(Model(mlp), SquaredError()).blocks(
        params, Evaluation(batch)
    )
    hessian = Hessian(LossFunction(lambda p, b: jnp.sum(mlp(p, b["x"]))))
    with pytest.raises(ValueError, match="use a GaussNewton curvature"):
        hessian.blocks(params, Evaluation(batch))
    assert not hessian.has_factors and mixing.has_factors and Microbatched(mixing, 2).has_factors


def test_blocks_are_equal_when_they_mean_the_same():
    def model(order):
        def predict(p, x):
            dims = ("NHWC", order, "NHWC")
            return jnp.sum(jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=dims), (1, 2))

        return Problem(predict, {"k": normal(0, 2, 2, 2, 2)}, {"x": normal(1, 3, 4, 4, 2), "y": normal(2, 3, 2)}).blocks

    assert model("HWIO") == model("HWIO") and hash(model("HWIO")) == hash(model("HWIO"))
    assert model("HWIO") != model("HWOI")
    assert isinstance(model("HWIO"), structure.KroneckerBlocks)
