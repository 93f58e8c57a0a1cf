"""Blocks of parts of leaves, scaled biases and rearranged weights: as those of leaves that stand by themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.curvature import GeneralizedGaussNewton
from curvax.losses import SquaredError
from curvax.structure.blocks import KroneckerBlock
from curvax.structure.kronecker import WeightSharing, projected_squares
from curvax.structure.regions import Region, regions_of
from curvax.structure.views import Reshape, Slice
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import Problem, block_diagonal, kronecker_matrix, normal

pytestmark = pytest.mark.usefixtures("x64")
EXACT = {
    "fisher": GeneralizedGaussNewton(),
    "beta1": 0.0,
    "factor_decay": 0.0,
    "inverse_every": 1,
    "lam_policy": "const",
    "lam0": 0.1,
    "learning_rate": 1.0,
}


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] * p["gain"] + p["c"]


def mlp_params():
    shapes = {"b": (4,), "c": (3,), "gain": (3,), "v": (4, 3), "w": (5, 4)}
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def regression(predict, params, *inputs, outputs=(3,), examples=6):
    return Problem(predict, params, {"x": normal(7, examples, *inputs), "y": normal(8, examples, *outputs)})


def direction(preset, predict, params, batch, **keywords):
    """The first step of a preset with exact factors, raveled."""
    method = preset(predict_fn=predict, loss=SquaredError(), **EXACT, **keywords)
    state = method.init(params, batch=batch)
    new, _, info = quick_jit(method.step)(params, batch, state, jax.random.key(0))
    assert bool(info["accepted"])
    return np.asarray(ravel_pytree(params)[0] - ravel_pytree(new)[0])


def assert_blocks_exact(problem, *shapes):
    """The Kronecker blocks have these shapes, and are those of the dense GGN."""
    blocks = problem.blocks
    assert sorted(block.shape for block in blocks.kronecker) == sorted(shapes), blocks.describe("abcdefgh")
    inputs, outputs = problem.factors()
    found = kronecker_matrix(blocks, inputs, outputs, problem.params)
    expected = block_diagonal(problem.truth().ggn, blocks, problem.params)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.fast
def test_one_flat_vector_steps_as_the_tree_that_it_holds():
    """Weights, folded biases and a gain that keeps its diagonal; a part that nothing reads stays where it is."""
    params = mlp_params()
    flat, unravel = ravel_pytree(params)
    batch = {"x": normal(7, 6, 5), "y": normal(8, 6, 3)}
    expected = direction(curvax.ekfac, mlp, params, batch)
    longer = jnp.concatenate([flat, jnp.ones(2)])
    found = direction(curvax.ekfac, lambda p, x: mlp(unravel(p[:-2]), x), longer, batch)
    np.testing.assert_allclose(found, np.concatenate([expected, [0, 0]]), rtol=1e-8, atol=1e-12)


def test_the_plan_says_what_each_part_has():
    params = mlp_params()
    flat, unravel = ravel_pytree(params)
    problem = regression(lambda p, x: mlp(unravel(p), x), flat, 5)
    (line,) = problem.blocks.describe(["flat"])
    assert "[0:4] within the Kronecker factors of flat[22:42]" in line
    assert "[7:10] diagonal: it enters as scale" in line
    np.testing.assert_allclose(
        problem.sums().diagonal[0], np.diag(problem.truth().ggn)[7:10], rtol=1e-9
    )  # fmt: skip


def test_the_last_row_of_a_matrix_may_be_the_bias():
    problem = regression(lambda p, x: x @ p[:-1] + p[-1], normal(0, 5, 3), 4)
    assert_blocks_exact(problem, (1, 5, 3))
    assert not problem.blocks.diagonal and not problem.blocks.partial()


def test_parts_are_found_over_several_models():
    """Two terms that read one vector: each slice is one block, whose layer uses are of both."""
    flat, unravel = ravel_pytree({"b": normal(0, 3), "w": normal(1, 4, 3)})

    def linear(p, x):
        p = unravel(p)
        return x @ p["w"] + p["b"]

    def whole(p, x):
        return x @ p.reshape(3, 5)

    terms = curvax.Terms(one=curvax.Term(linear, SquaredError()), other=curvax.Term(linear, SquaredError(), weight=2.0))
    batch = {name: {"x": normal(i, 5, 4), "y": normal(i + 1, 5, 3)} for i, name in enumerate(("one", "other"))}
    method = curvax.kfac(loss=terms, **EXACT)
    state = method.init(flat, batch=batch)
    new, _, _ = quick_jit(method.step)(flat, batch, state, jax.random.key(0))

    def loss(p):
        return sum(
            weight * 0.5 * jnp.mean(jnp.sum((linear(p, batch[n]["x"]) - batch[n]["y"]) ** 2, -1))
            for n, weight in (("one", 1.0), ("other", 2.0))
        )

    expected = np.linalg.solve(np.asarray(jax.hessian(loss)(flat)) + 0.1 * np.eye(15), np.asarray(jax.grad(loss)(flat)))
    np.testing.assert_allclose(flat - new, expected, rtol=1e-8)
    torn = curvax.Terms(one=curvax.Term(linear, SquaredError()), other=curvax.Term(whole, SquaredError()))
    batch = {"one": batch["one"], "other": {"x": normal(9, 5, 3), "y": normal(8, 5, 5)}}
    with pytest.warns(UserWarning, match="no Kronecker factors"):
        blocks = curvax.kfac(loss=torn, **EXACT).init(flat, batch=batch).preconditioner.blocks
    assert not blocks.kronecker and [block.shape for block in blocks.diagonal] == [(15,)]


@pytest.mark.parametrize(
    ("name", "predict", "scale"),
    [
        ("subtracted", lambda h, b: h - b, -1.0),
        ("the layer is subtracted", lambda h, b: b - h, -1.0),
        ("scaled", lambda h, b: h + 2 * b, 2.0),
        ("halved and negated layer", lambda h, b: -(h / 2) + b / 4, -0.5),
        ("behind a sum", lambda h, b: (1.0 - h) * 2 - 3 * b[None], 1.5),
    ],
)
def test_a_scaled_bias_is_in_the_block_of_its_layer(name, predict, scale):
    params = {"b": normal(1, 3), "w": normal(0, 4, 3)}
    problem = regression(lambda p, x: predict(x @ p["w"], p["b"]), params, 4)
    assert_blocks_exact(problem, (1, 5, 3))
    (block,) = problem.blocks.kronecker
    assert isinstance(block, KroneckerBlock)
    ((_, found),) = block.biased
    assert found == scale, name


def test_a_scaled_bias_leaves_rows_as_they_are():
    def scaled(p, x):
        return jnp.tanh(x @ (p["w"] / 3) - 2 * p["b"]) @ p["v"]

    params = {"b": normal(1, 4), "v": normal(2, 4, 3), "w": normal(0, 5, 4)}
    x, (flat, unravel) = normal(7, 4, 5), ravel_pytree(params)
    jacobian = quick_jit(jax.jacrev(lambda p: scaled(unravel(p), x).reshape(12)))(flat)
    gram = quick_jit(lambda p: curvax.structure.jacobian_gram(scaled, p, x))(params)
    np.testing.assert_allclose(gram.reshape(12, 12), jacobian @ jacobian.T, rtol=1e-9)


def test_regions_are_slices_that_do_not_meet():
    def cut(start, limit):
        return (Slice((20,), (start,), (limit,), (1,)),)

    chains = [cut(0, 6), (*cut(6, 12), Reshape((6,), (2, 3))), cut(0, 6), cut(12, 20), cut(15, 20)]
    assert regions_of(chains) == [(), (), (), (), ()]
    assert regions_of(chains[:4]) == [cut(0, 6), cut(6, 12), cut(0, 6), cut(12, 20)]
    assert regions_of([cut(0, 6), cut(0, 6)]) == [(), ()]
    odd, even = ((Slice((8,), (start,), (8,), (2,)),) for start in (1, 0))
    assert regions_of([odd, even]) == [odd, even]
    region = Region.of(0, (20,), cut(6, 12))
    assert region.shape == (6,) and region.label() == "[6:12]"
    np.testing.assert_array_equal(region.replaced(jnp.zeros(20), jnp.ones(6)), np.eye(20)[6:12].sum(0))


def normalized(p, x, constants=None):
    """Two layers with BatchNorm in training mode, by the statistics of the batch or by given ones; and these."""
    statistics = []
    for i in (1, 2):
        h = x @ p[f"w{i}"] + p[f"b{i}"]
        mean, var = (jnp.mean(h, axis=0), jnp.var(h, axis=0)) if constants is None else constants[i - 1]
        statistics.append((mean, var))
        x = jnp.tanh((h - mean) / jnp.sqrt(var + 1e-3) * p[f"g{i}"])
    return x, statistics


@pytest.mark.parametrize("rematerialized", [False, True])
def test_statistics_over_the_examples_are_constants(rematerialized):
    """The factors are those of the model that is given its statistics, and the plan says so."""
    shapes = {"w1": (4, 5), "b1": (5,), "g1": (5,), "w2": (5, 3), "b2": (3,), "g2": (3,)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    batch = {"x": normal(7, 6, 4), "y": normal(8, 6, 3)}
    constants = normalized(params, batch["x"])[1]

    def training(p, x):
        return normalized(p, x)[0]

    predict = jax.checkpoint(training) if rematerialized else training
    mixed = Problem(predict, params, batch)
    given = Problem(lambda p, x: normalized(p, x, constants)[0], params, batch)
    names = sorted(shapes)
    assert mixed.blocks.describe(names) == given.blocks.describe(names) and mixed.blocks.statistics
    for x, y in zip(jax.tree.leaves(mixed.sums()), jax.tree.leaves(given.sums()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    if not rematerialized:
        method = curvax.kfac(predict_fn=predict, loss=SquaredError())
        method.init(params, batch=batch)
        assert "statistics over the examples as constants" in method.plan_for(params, batch).explain()


@pytest.mark.parametrize(
    ("name", "predict"),
    [
        ("pairs", lambda p, x: (x @ p) @ (x @ p).T),
        ("largest", lambda p, x: x @ p - jnp.max(x @ p, axis=0)),
        ("a branch", lambda p, x: jax.lax.cond(jnp.mean(x) > 0, jnp.sin, jnp.cos, x @ p)),
        ("the output is one", lambda p, x: jnp.broadcast_to(jnp.mean(x @ p, axis=0), (6, 3))[:, ::-1] + 0 * x[:1, :3]),
    ],
)
def test_other_mixtures_of_examples_are_refused(name, predict):
    problem = Problem(predict, normal(0, 4, 3), {"x": normal(7, 6, 4), "y": normal(8, 6, 6 if name == "pairs" else 3)})
    with pytest.raises(ValueError, match="the model mixes examples"):
        _ = problem.blocks


@pytest.mark.parametrize("sharing", list(WeightSharing))
def test_a_tied_table_has_one_block_of_both_uses(sharing):
    """A diagonal and B by the definitions, from one-hot activations and cotangents of the logits."""
    table, x = normal(0, 6, 3), jnp.asarray([[0, 1], [2, 1], [3, 3], [0, 5]], jnp.int32)

    def predict(e, x, first=0.0, second=0.0):
        return jnp.tanh(e[x] + first) @ e.T + second

    problem = Problem(lambda e, x: predict(e, x), table, {"x": x, "y": normal(1, 4, 2, 6)})
    (block,) = problem.blocks.kronecker
    assert (
        isinstance(block, KroneckerBlock) and block.embedding and block.shape == (1, 6, 3) and len(block.swapped) == 1
    )
    a, b = (f[0] for f in problem.sums(sharing).factors())

    zeros = (jnp.zeros((4, 2, 3)), jnp.zeros((4, 2, 6)))
    d, c = (
        np.stack([np.asarray(j)[i, :, :, i] for i in range(4)]).reshape(4, 12, 2, -1) / np.sqrt(8)
        for j in jax.jacrev(lambda e: predict(table, x, *e))(zeros)
    )
    hot, g = np.eye(6)[np.asarray(x)], np.tanh(np.asarray(table)[np.asarray(x)])
    if sharing is WeightSharing.REDUCE:
        d, c = (z.sum(2, keepdims=True) for z in (d, c))
        hot, g = (z.mean(1, keepdims=True) for z in (hot, g))
    a1, b1 = np.mean(hot**2, (0, 1)), np.einsum("brti,brtj->ij", d, d)
    a2, b2 = np.sum(c**2, (0, 1, 2)), np.einsum("bti,btj->ij", g, g) / g[..., 0].size
    s1, s2 = a1.sum() * np.trace(b1), a2.sum() * np.trace(b2)
    np.testing.assert_allclose(a[0], (s1 * a1 + s2 * a1.sum() / a2.sum() * a2) / (s1 + s2), rtol=1e-9)
    np.testing.assert_allclose(b[0], b1 + a2.sum() / a1.sum() * b2, rtol=1e-9)
    v = jnp.linalg.qr(normal(3, 1, 3, 3))[0]
    (squares,) = problem.measure(lambda examples: projected_squares(problem.blocks, examples, [(None, v)]))
    ggn = problem.truth().ggn.reshape(6, 3, 6, 3)
    own = np.einsum("kikj->kij", ggn)
    np.testing.assert_allclose(squares[0], np.einsum("kij,il,jl->kl", own, v[0], v[0]), rtol=1e-8)


def _kernels(p, x):
    dims = ("NHC", "HIO", "NHC")
    kernel = jnp.pad(jnp.concatenate([p["a"], p["b"]], axis=-1), ((1, 0), (0, 0), (0, 0)))
    return jax.lax.conv_general_dilated(x[:, :, None], kernel, (1,), "VALID", dimension_numbers=dims)


@pytest.mark.parametrize(
    ("name", "predict", "shapes", "blocks"),
    [
        (
            "outputs side by side, biases too",
            lambda p, x: x @ jnp.concatenate([p["a"], 2 * p["b"]], axis=1) + jnp.concatenate([p["c"], -p["d"]]),
            {"a": (4, 2), "b": (4, 1), "c": (2,), "d": (1,)},
            [(1, 5, 1), (1, 5, 2)],
        ),
        (
            "inputs side by side",
            lambda p, x: x @ jnp.concatenate([p["a"], jnp.ones((1, 3)), p["b"]]),
            {"a": (2, 3), "b": (1, 3)},
            [(1, 1, 3), (1, 2, 3)],
        ),
        (
            "zeros around and between",
            lambda p, x: x @ jax.lax.pad(p["a"], 0.0, ((1, 0, 1), (0, 1, 0))),
            {"a": (2, 3)},
            [(1, 2, 3)],
        ),
        (
            "rolled",
            lambda p, x: x @ jnp.roll(p["a"], 1, axis=0) + p["b"],
            {"a": (4, 3), "b": (3,)},
            [(1, 2, 3), (1, 3, 3)],
        ),
        (
            "layers stacked for a scan",
            lambda p, x: jax.lax.scan(lambda h, w: (h, x @ w), 0.0, jnp.stack([p["a"], p["b"].T]))[1].sum(0),
            {"a": (4, 3), "b": (3, 4)},
            [(1, 4, 3), (1, 4, 3)],
        ),
        ("kernels", _kernels, {"a": (2, 1, 2), "b": (2, 1, 1)}, [(1, 2, 1), (1, 2, 2)]),
    ],
)
def test_rearranged_weights_have_blocks(name, predict, shapes, blocks):
    """Exact ones, as these models are linear; and the rows of all of them together are exact, too."""
    params = {key: normal(i, *shape) for i, (key, shape) in enumerate(shapes.items())}
    outputs = predict(params, normal(7, 1, 4)).shape[1:]
    problem = regression(predict, params, 4, outputs=outputs, examples=4)
    assert_blocks_exact(problem, *blocks)
    flat, unravel = ravel_pytree(params)
    x = problem.batch["x"]
    jacobian = quick_jit(jax.jacrev(lambda p: predict(unravel(p), x).reshape(-1)))(flat)
    gram = quick_jit(lambda p: curvax.structure.jacobian_gram(lambda p, x: predict(p, x).reshape(len(x), -1), p, x))(
        params
    )
    np.testing.assert_allclose(gram.reshape(jacobian.shape[:1] * 2), jacobian @ jacobian.T, rtol=1e-9, atol=1e-12)


def test_weights_that_meet_themselves_keep_their_rows():
    """Twice in one operand: no block of a product; and a row of a table beside another one is looked up."""

    def predict(p, x):
        doubled = jnp.concatenate([p["a"], p["a"]], axis=1)
        return jnp.tanh(x @ doubled) @ p["v"] + jnp.concatenate([p["e"], p["f"]])[jnp.int32(x[:, 0] > 0)]

    shapes = {"a": (4, 2), "e": (1, 3), "f": (2, 3), "v": (4, 3)}
    params = {key: normal(i, *shape) for i, (key, shape) in enumerate(shapes.items())}
    problem = regression(predict, params, 4)
    names = sorted(shapes)
    assert {names[b.leaf] for b in problem.blocks.diagonal} == {"a", "e", "f"}
    ggn = np.diag(problem.truth().ggn)
    places = dict(zip(names, np.split(ggn, np.cumsum([p.size for p in jax.tree.leaves(params)])[:-1]), strict=True))
    for block, found in zip(problem.blocks.diagonal, problem.sums().diagonal, strict=True):
        np.testing.assert_allclose(found.ravel(), places[names[block.leaf]], rtol=1e-9, atol=1e-12)
