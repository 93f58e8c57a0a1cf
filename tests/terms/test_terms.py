"""A loss of several terms: every lane against the dense float64 sum, weights, microbatches, info, plan and errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import Term, Terms
from curvax.curvature import Evaluation, GeneralizedGaussNewton, Needs, SumOfTerms, term_gradient_norms
from curvax.layerwise import ConjugateGradients
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.solvers import CG
from curvax.structure.kronecker import WeightSharing, factor_sums, projected_squares
from tests.integration.harness import assert_close, moved
from tests.oracle import dense, losses
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import block_diagonal, kronecker_matrix
from tests.terms.problems import SCALES, batch, convolution, normal, parameters, slopes, terms, total, truths

LAM = 0.1
EXACT = GeneralizedGaussNewton()


def stepped(method: Any, params: Any, data: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The direction of one step, and its info."""
    state = method.init(params, batch=data) if method.needs_batch else method.init(params)
    new, _, info = quick_jit(method.step)(params, data, state, jax.random.key(0))
    return moved(params, new), info


def test_linearizations_are_the_dense_sum(x64: None) -> None:
    """Loss, gradient, products, rows, Gram matrix with its blocks of two terms, diagonal."""
    params, data = parameters(), batch()
    curvature = SumOfTerms.gauss_newton(terms(), EXACT)
    v = jax.tree.map(lambda x: normal(11, *x.shape), params)

    def everything(p: Any, b: Any) -> Any:
        at = curvature.linearize(p, Evaluation(b), Needs(gradient=True, product=True, rows=True))
        assert at.rows is not None and at.product is not None and at.losses is not None
        rows = at.rows
        columns = jax.vmap(lambda e: rows.vjp(rows.output.factor(e)))(jnp.eye(rows.output.row_shape[0]))
        # At once, and in blocks of a few examples.
        grams = [rows.gram(1 << 31), rows.gram(9000)]
        return at.loss, at.losses, at.gradient, at.product(v), rows.product(v), columns, grams, rows.diagonal(1 << 31)

    loss, by_name, gradient, product, by_rows, columns, grams, diagonal = quick_jit(everything)(params, data)
    found = truths(params, data)
    ggn = total(found, "ggn")
    for name, truth in found.items():
        np.testing.assert_allclose(by_name[name], SCALES[name] * truth.loss.value, rtol=1e-12)
    np.testing.assert_allclose(loss, sum(by_name.values()), rtol=1e-12)
    assert_close(dense.vector(gradient), total(found, "gradient"), 1e-10, "gradient")
    assert_close(dense.vector(product), ggn @ dense.vector(v), 1e-10, "product")
    assert_close(dense.vector(by_rows), ggn @ dense.vector(v), 1e-10, "product of rows")
    rows = np.concatenate([np.asarray(x).reshape(x.shape[0], -1) for x in jax.tree.leaves(columns)], axis=1)
    assert_close((rows.T @ rows).ravel(), ggn.ravel(), 1e-10, "rows")
    for gram in grams:
        assert_close(np.asarray(gram).ravel(), (rows @ rows.T).ravel(), 1e-10, "Gram matrix")
    assert_close(dense.vector(diagonal), np.diag(ggn), 1e-10, "diagonal")


def test_no_leaf_of_independent_examples_falls_back_because_sets_are_joined(x64: None, monkeypatch: Any) -> None:
    """Blocks of two terms are made of pairs: nothing forms all rows of all leaves."""
    curvature = SumOfTerms.gauss_newton(terms(), EXACT)
    rules = {leaf.path: leaf.rule for leaf in curvature.structure(parameters(), Evaluation(batch()))}
    assert rules["['w'] in labels"] == rules["['w'] in slopes"] == rules["['w'] in images"] == "dense"
    assert "explicit rows" not in rules.values()
    monkeypatch.setattr("curvax.structure.rows.joint_groups", None)
    jax.eval_shape(
        lambda p, b: curvature.linearize(p, Evaluation(b), Needs(rows=True)).rows.gram(1 << 31),  # type: ignore[union-attr]
        parameters(),
        batch(),
    )


@pytest.mark.parametrize("name", ["egn", "sgn", "full_gn", "egn in pieces"])
def test_steps_are_the_dense_direction(x64: None, name: str) -> None:
    params, data = parameters(), batch()
    truth = truths(params, data)
    solver = {"tol": 1e-12, "maxiter": 400}
    inner = ConjugateGradients(CG(**solver), lam=LAM)
    method = {
        "egn": lambda: curvax.egn(loss=terms(), lam0=LAM),
        "egn in pieces": lambda: curvax.egn(loss=terms(), lam0=LAM, microbatch_size=4),
        "sgn": lambda: curvax.sgn(loss=terms(), lam0=LAM, **solver),
        "full_gn": lambda: curvax.full_gn(loss=terms(), inner=inner, inner_steps=1, line_search=None),
    }[name]()
    direction, info = stepped(method, params, data)
    expected = dense.damped_direction(total(truth, "ggn"), total(truth, "gradient"), LAM)
    assert_close(direction, expected, 1e-7, name)
    for term, found in truth.items():
        np.testing.assert_allclose(info[f"loss/{term}"], SCALES[term] * found.loss.value, rtol=1e-9)


def halves(params: Any, data: Any) -> tuple[Terms, dict[str, Any]]:
    """One model and batch of 7 as two terms of 3 and 4 examples."""
    cut = {"first": slice(0, 3), "second": slice(3, 7)}
    parts = {name: jax.tree.map(lambda x, s=s: x[s], data) for name, s in cut.items()}
    weights = {"first": 3 / 7, "second": 4 / 7}
    return Terms(**{name: Term(slopes, SquaredError(), w) for name, w in weights.items()}), parts


def test_a_batch_in_two_terms_has_the_factors_of_the_whole(x64: None) -> None:
    """Factors, diagonals and curvature in another basis add up with their weights."""
    params, data = parameters(), batch()["points"]
    split, parts = halves(params, data)
    whole = Terms(all=Term(slopes))
    found = []
    for one, own in ((split, parts), (whole, {"all": data})):
        curvature = SumOfTerms.gauss_newton(one, EXACT)
        blocks = curvature.blocks(params, Evaluation(own))
        bases = [
            (np.linalg.qr(normal(i, *b.input_shape))[0], np.linalg.qr(normal(i + 9, *b.output_shape))[0])
            for i, b in enumerate(blocks.kronecker)
        ]

        def measured(p: Any, b: Any, curvature: Any = curvature, blocks: Any = blocks, bases: Any = bases) -> Any:
            at = curvature.linearize(p, Evaluation(b), Needs(factors=True))
            measure = at.layer_factors(EXACT, jax.random.key(0))
            sums = measure(lambda examples: factor_sums(blocks, examples, WeightSharing.EXPAND))
            return sums.factors(), sums.diagonal, measure(lambda e: projected_squares(blocks, e, bases))

        found.append(quick_jit(measured)(params, own))
        assert {len(block.uses) for block in blocks.kronecker}
    for mine, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_linear_models_of_several_terms_have_exact_factors(x64: None) -> None:
    """A weight and bias in two terms with different inputs, weights and one masked example; another model's scale."""

    def linear(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["b"]

    params = {"w": normal(0, 4, 3), "b": normal(1, 3), "s": normal(2, 3)}
    both = Terms(one=Term(linear, weight=0.5), two=Term(linear, weight=3.0, weight_key="m"),
                 three=Term(lambda p, x: x * p["s"]))  # fmt: skip
    mask = jnp.asarray([1.0, 0.0, 1.0, 1.0])
    data = {
        "one": {"x": normal(3, 6, 4), "y": normal(4, 6, 3)},
        "two": {"x": normal(5, 4, 4), "y": normal(6, 4, 3), "m": mask},
        "three": {"x": normal(7, 2, 3), "y": normal(8, 2, 3)},
    }
    curvature = SumOfTerms.gauss_newton(both, EXACT)
    blocks = curvature.blocks(params, Evaluation(data))
    assert [(len(b.uses), b.shape) for b in blocks.kronecker] == [(2, (1, 5, 3))]

    def sums(p: Any, b: Any) -> Any:
        at = curvature.linearize(p, Evaluation(b), Needs(factors=True, product=True))
        found = at.layer_factors(EXACT, jax.random.key(0))(lambda e: factor_sums(blocks, e, WeightSharing.EXPAND))  # type: ignore[misc]
        basis = jnp.eye(18)
        products = jax.vmap(lambda v: at.product({"b": v[:3], "s": v[3:6], "w": v[6:].reshape(4, 3)}))(basis)  # type: ignore[misc]
        return found.factors(), found.diagonal, products

    (a, b), diagonal, products = quick_jit(sums)(params, data)
    ggn = np.concatenate([np.asarray(products[k]).reshape(18, -1) for k in ("b", "s", "w")], axis=1)
    expected = block_diagonal(ggn, blocks, params)
    np.testing.assert_allclose(kronecker_matrix(blocks, a, b, params), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(diagonal[0], np.diag(ggn)[3:6], rtol=1e-9)


@pytest.mark.parametrize("name", ["ekfac", "sophia_g", "newton_cg", "layerwise_gn"])
def test_other_presets_take_terms(x64: None, name: str) -> None:
    """A batch in two terms is the batch: steps that are known are the same, and others are taken."""
    params, data = parameters(), batch()["points"]
    split, parts = halves(params, data)
    solver = CG(tol=1e-12, maxiter=200)
    options: dict[str, Any] = {
        "ekfac": {"microbatch_size": 2},
        "sophia_g": {},
        "newton_cg": {"lam0": 10.0, "tol": solver.tol, "maxiter": solver.maxiter},
        "layerwise_gn": {"inner": ConjugateGradients(solver, lam=1.0), "inner_steps": 1, "line_search": None},
    }[name]
    direction, info = stepped(curvax.make(name, loss=split, **options), params, parts)
    assert info["accepted"]
    np.testing.assert_allclose(info["loss/first"] + info["loss/second"], info["loss"], rtol=1e-12)
    if name == "newton_cg":
        alone, _ = stepped(curvax.newton_cg(predict_fn=slopes, loss=SquaredError(), **options), params, data)
        assert_close(direction, alone, 1e-7, name)
    if name == "layerwise_gn":
        truth = dense.truth(slopes, losses.squared_error, params, data["x"], data["y"])
        block = np.concatenate([np.full(x.size, i) for i, x in enumerate(jax.tree.leaves(params))])
        within = np.where(block[:, None] == block[None, :], truth.ggn, 0.0)
        assert_close(direction, dense.damped_direction(within, truth.gradient, 1.0), 1e-7, name)


def test_weights_may_be_traced_and_zero_contributes_nothing(x64: None) -> None:
    """One compilation for all weights; a term of weight zero may hold NaN."""
    params, data = parameters(), batch()
    method = curvax.egn(loss=terms(), lam0=LAM)
    step, state, truth = quick_jit(method.step), method.init(params), truths(params, data)
    broken = {**data, "labels": {**data["labels"], "x": jnp.full_like(data["labels"]["x"], jnp.nan)}}
    for factors, given in (({"labels": 2.0, "images": 0.5}, data), ({"labels": 0.0, "images": 1.0}, broken)):
        scales = {**SCALES, **{name: SCALES[name] * f for name, f in factors.items()}}
        weighted = {**given, "weights": {name: jnp.asarray(f) for name, f in factors.items()}}
        new, _, info = step(params, weighted, state)
        expected = dense.damped_direction(total(truth, "ggn", scales), total(truth, "gradient", scales), LAM)
        assert_close(moved(params, new), expected, 1e-8)
        assert info["loss/labels"] == 0 or factors["labels"] > 0
    assert step._cache_size() == 1
    negative = {**data, "weights": {"labels": jnp.asarray(-1.0), "images": jnp.asarray(1.0)}}
    _, _, info = step(params, negative, state)
    assert not info["accepted"]
    assert info["batch_fault"] == int(curvax.losses.BatchFault.NEGATIVE_WEIGHT)


@pytest.mark.parametrize("traced", [False, True])
def test_an_empty_set_of_weight_zero_contributes_nothing(x64: None, traced: bool) -> None:
    """By the term's own weight or by the batch's; numbers of Python's are traced as arrays are."""
    params, data = parameters(), batch()
    both = terms()
    full, rest = {**data, "weights": {"labels": 0.0}}, {k: v for k, v in data.items() if k != "labels"}
    empty = {**rest, "labels": jax.tree.map(lambda x: x[:0], data["labels"])}
    if traced:
        method, empty = curvax.egn(loss=both, lam0=LAM), {**empty, "weights": {"labels": 0.0}}
    else:
        idle = {name: dataclasses.replace(both[name], weight=0.0) if name == "labels" else both[name] for name in both}
        method = curvax.egn(loss=Terms(idle), lam0=LAM)
    wanted, _, _ = quick_jit(curvax.egn(loss=both, lam0=LAM).step)(params, full, method.init(params))
    new, _, info = quick_jit(method.step)(params, empty, method.init(params))
    assert_close(moved(params, new), moved(params, wanted), 1e-12)
    assert info["loss/labels"] == 0 and info["batch_fault"] == 0


def test_float32_and_bfloat16_terms_run() -> None:
    """Outputs of different dtypes in one system."""
    half = Terms(
        narrow=Term(lambda p, x: jnp.tanh(x @ p["w"]).astype(jnp.bfloat16)[:, :3], SoftmaxCrossEntropy()),
        slopes=Term(slopes),
    )
    data = {"narrow": {"x": normal(0, 3, 4), "y": jnp.zeros(3, jnp.int32)}, "slopes": batch()["points"]}
    _, info = stepped(curvax.egn(loss=half, lam0=LAM), parameters(), data)
    assert info["accepted"] and info["loss"].dtype == jnp.float32


def test_gradient_norms_of_examples(x64: None) -> None:
    params, data = parameters(), batch()
    norms = quick_jit(lambda p, b: term_gradient_norms(terms(), p, b))(params, data)
    for name, truth in truths(params, data).items():
        slope = truth.loss.gradient.reshape(len(norms[name]), -1)
        rows = truth.jacobian.reshape(*slope.shape, -1)
        expected = SCALES[name] * np.linalg.norm(np.einsum("bkn,bk->bn", rows, slope), axis=1)
        np.testing.assert_allclose(norms[name], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("by", [curvax.curvature.GradientNorm(), curvax.curvature.TangentKernelTrace()])
def test_balanced_weights(x64: None, by: Any) -> None:
    params, data = parameters(), batch()
    scales = {
        name: SCALES[name] * (np.linalg.norm(t.gradient) if by == curvax.curvature.GradientNorm() else np.trace(t.ggn))
        for name, t in truths(params, data).items()
    }
    balance = quick_jit(lambda p, b, old: curvax.balanced_weights(terms(), p, b, by=by, previous=old, decay=0.5))
    found = balance(params, data, {name: jnp.asarray(2.0) for name in scales})
    for name, scale in scales.items():
        np.testing.assert_allclose(found[name], 1.0 + 0.5 * sum(scales.values()) / scale, rtol=1e-9)


@pytest.mark.fast
def test_the_plan_lists_each_term() -> None:
    method = curvax.egn(loss=Terms(inside=Term(slopes, weight=2.5, key="points"), images=Term(convolution)))
    assert "term inside" in method.plan.explain()
    data = {key: x for key, x in batch().items() if key != "labels"}
    data["images"]["y"] = normal(1, 6, 3)
    text = method.plan_for(parameters(), data).explain()
    for line in ("term images", "weight 2.5", "batch['points']", "rows of ['w'] in inside: dense"):
        assert line in text, text


def _without(key: str) -> dict[str, Any]:
    return {k: v for k, v in batch().items() if k != key}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda: _without("points"), KeyError, "no 'points' for the term 'slopes'"),
        (lambda: {**batch(), "image": 1}, KeyError, "no term reads the batch's 'image'.* 'images'"),
        (lambda: {**batch(), "weights": {"label": 1.0}}, KeyError, "'label', which is no term.* 'labels'"),
        (lambda: {**batch(), "weights": {"labels": jnp.ones(4)}}, ValueError, "weight of the term 'labels'"),
        (lambda: {**batch(), "weights": 2.0}, TypeError, "mapping from names of terms"),
        (lambda: 3, TypeError, "batch of several terms must be a mapping"),
        (lambda: {**batch(), "points": {"x": jnp.zeros((0, 4)), "y": jnp.zeros((0, 2))}}, ValueError,
         "term 'slopes': the batch is empty"),
        (lambda: {**batch(), "points": {"x": jnp.zeros((3, 4)), "y": jnp.zeros((3, 1))}}, ValueError, "term 'slopes'"),
        (lambda: {**batch(), "points": {"x": jnp.zeros((3, 4))}}, KeyError, "term 'slopes': the batch has no 'y'"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_named_in_a_sentence(change: Any, error: type[Exception], words: str) -> None:
    method = curvax.egn(loss=terms(), lam0=LAM)
    with pytest.raises(error, match=words):
        method.plan_for(parameters(), change())


def test_terms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="each term has its own predict_fn"):
        curvax.egn(predict_fn=convolution, loss=terms())
    with pytest.raises(TypeError, match="egn needs predict_fn"):
        curvax.egn(loss=SquaredError())
    with pytest.raises(TypeError, match="the term 'a' is a SquaredError"):
        Terms(a=SquaredError())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no terms"):
        Terms()
    with pytest.raises(TypeError, match=r"Terms got a Term: pass Terms\(name="):
        Terms(Term(slopes))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write loss=curvax.Terms\(mapping\)"):
        curvax.egn(loss={"a": Term(slopes)})  # type: ignore[arg-type]
    assert Terms({"a": Term(slopes)}).terms == Terms(a=Term(slopes)).terms
    with pytest.raises(ValueError, match="rename it"):
        Terms(weights=Term(slopes))
    with pytest.raises(ValueError, match="not negative"):
        Term(slopes, weight=-1.0)
    with pytest.raises(TypeError, match="batch\\['weights'\\]"):
        Term(slopes, weight=jnp.ones(()))  # type: ignore[arg-type]
    assert dataclasses.replace(Term(slopes), weight=2.0).weight == 2.0


@pytest.mark.parametrize("same", [False, True])
def test_sets_that_are_joined_by_hand_are_told_to_be_terms(same: bool) -> None:
    """Sets of different sizes, and of one size as two parts of one array."""

    def joined(p: Any, x: Any) -> jax.Array:
        inside, outside = (x, x) if same else x
        return jnp.concatenate([slopes(p, inside), jnp.tanh(outside @ p["w"])[:, :2]])

    x = normal(0, 5, 4)
    inputs = x if same else (x, normal(1, 3, 4))
    report = curvax.structure.report(joined, parameters(), inputs)
    assert any("loss=curvax.Terms(name=Term(predict_fn, loss), ...)" in leaf.reason for leaf in report), report
    method = curvax.kfac(predict_fn=joined, loss=SquaredError())
    with pytest.raises(ValueError, match=r"give each set a term of its own, loss=curvax\.Terms"):
        method.init(parameters(), batch={"x": inputs, "y": jnp.zeros((10 if same else 8, 2))})


def test_a_sum_over_points_inside_a_gradient_keeps_the_structure() -> None:
    """grad of a sum over the batch is each point's own gradient."""

    def summed(p: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda z: jnp.sum(jnp.tanh(z @ p["w"] + p["b"]) @ p["q"]))(x)

    found = {leaf.path: leaf.rule for leaf in curvax.structure.report(summed, parameters(), normal(0, 5, 4))}
    assert found["['w']"] == "dense"
    assert found["['b']"] == "bias"


def test_the_memory_bound_holds_for_rows_of_two_models_that_meet_formed() -> None:
    """A weight used forwards in one term and transposed in the other: rows of it are laid out as it is."""
    width, count = 96, 40
    params = {"w": jax.random.normal(jax.random.key(0), (width, width)) / width**0.5}
    curvature = SumOfTerms.gauss_newton(
        Terms(
            forward=Term(lambda p, x: jnp.tanh(x @ p["w"])[:, :4]),
            back=Term(lambda p, x: jnp.tanh(x @ p["w"].T)[:, :4]),
        ),
        GeneralizedGaussNewton(),
    )
    sets = [jax.random.normal(jax.random.key(i), (count, width)) for i in (1, 2)]
    data = {name: {"x": x, "y": jnp.zeros((count, 4))} for name, x in zip(("forward", "back"), sets, strict=True)}

    def gram(max_bytes: int) -> tuple[np.ndarray, int]:
        def made(p: Any, batch: Any) -> jax.Array:
            rows = curvature.linearize(p, Evaluation(batch), Needs(rows=True)).rows
            assert rows is not None
            return rows.gram(max_bytes)

        compiled = jax.jit(made).lower(params, data).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return np.asarray(compiled(params, data)), memory.temp_size_in_bytes

    (whole, unbounded), (bounded, temporary) = gram(1 << 30), gram(4 << 20)
    assert temporary < 4 << 20 < unbounded
    np.testing.assert_allclose(bounded, whole, rtol=1e-5, atol=1e-6)
