"""Curvature operators column by column: matrix-free products of all unit vectors are the dense matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from curvax import curvature, losses, tree
from tests.integration.harness import TOLERANCE, assert_close, batch_of, key, precision, standard_truth, truth_of
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

GRAM_BYTES = 2**20


def _loss(kind, reduction: Any = "mean"):
    return losses.SoftmaxCrossEntropy(reduction=reduction) if kind == "ce" else losses.SquaredError(reduction=reduction)


def _stacked_units(params):
    """All unit vectors of the parameter space as a pytree with a leading axis."""
    flat, unravel = ravel_pytree(params)
    return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))


def _materialize(operator, params, batch, *, rows=False, shared=True):
    """(loss, gradient, matrix, gram) of an operator as NumPy float64."""
    trainable, frozen = curvature.TrainablePartition().split(params)
    units = _stacked_units(trainable)

    @quick_jit
    def run(p, data):
        evaluation = curvature.Evaluation(data, frozen=frozen, sample_key=key())
        needs = curvature.Needs(gradient=True, product=True, rows=rows, shared=shared)
        at = operator.linearize(p, evaluation, needs)
        gram = at.rows.gram(GRAM_BYTES) if rows else None
        return at.loss, at.gradient, jax.vmap(at.product)(units), gram, at.bend(tree.upcast(p))

    loss, gradient, columns, gram, bend = run(trainable, batch)
    n = dense.vector(params).size
    matrix = np.concatenate([np.asarray(c, np.float64).reshape(n, -1) for c in jax.tree.leaves(columns)], axis=1)
    v = dense.vector(params)
    # Rows of bfloat16 parameters are made in bfloat16, and J v along v rounds elsewhere than J column by column.
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))
    rtol = 1e-10 if np.asarray(bend).dtype == np.float64 else max(1e-3, 4 * rounding)
    np.testing.assert_allclose(bend, v @ matrix @ v, rtol=rtol, atol=rtol * np.abs(matrix).max() * (v @ v))
    return float(loss), dense.vector(gradient), matrix, None if gram is None else np.asarray(gram, np.float64)


def _case(model, kind, dtype, **kw):
    return model.params(dtype), batch_of(model, kind, dtype, **kw)


def _weight_key(batch):
    return "w" if "w" in batch else None


GGN_CASES = [(m, "ce") for m in models.CLASSIFIERS] + [(m, "mse") for m in models.REGRESSORS]


@pytest.mark.parametrize(("model", "kind"), GGN_CASES, ids=lambda v: str(v))
def test_ggn_columns_gradient_and_loss(model, kind):
    truth = standard_truth(model, kind)
    with precision(jnp.float64):
        params, batch = _case(model, kind, jnp.float64)
        operator = curvature.GaussNewton(curvature.Model(model.predict), _loss(kind))
        loss, gradient, matrix, gram = _materialize(operator, params, batch, rows=True)
    np.testing.assert_allclose(loss, truth.loss.value, rtol=1e-12)
    assert_close(gradient, truth.gradient, 1e-10, "gradient")
    assert_close(matrix, truth.ggn, 1e-10, "GGN")
    # S^T J J^T S and J^T S S^T J share their non-zero eigenvalues.
    assert gram is not None
    ours, theirs = np.linalg.eigvalsh(gram), np.linalg.eigvalsh(truth.ggn)
    size = max(len(ours), len(theirs))
    pad = [np.sort(np.pad(e, (0, size - len(e)))) for e in (ours, theirs)]
    np.testing.assert_allclose(pad[0], pad[1], atol=1e-10 * theirs.max(), err_msg="Gram matrix")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model", "kind"), [(models.CNN, "ce"), (models.SHARED, "ce"), (models.SCALAR, "mse")], ids=lambda v: str(v)
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_ggn(model, kind, reduction):
    with precision(jnp.float64):
        params, batch = _case(model, kind, jnp.float64, weighted=True)
        truth = truth_of(model, kind, params, batch, reduction)
        operator = curvature.GaussNewton(curvature.Model(model.predict, weight_key="w"), _loss(kind, reduction))
        loss, gradient, matrix, _ = _materialize(operator, params, batch)
    np.testing.assert_allclose(loss, truth.loss.value, rtol=1e-12)
    assert_close(gradient, truth.gradient, 1e-10, "gradient")
    assert_close(matrix, truth.ggn, 1e-10, "GGN")


def test_ggn_of_soft_labels_whose_rows_do_not_sum_to_one():
    model = models.MLP_TANH
    with precision(jnp.float64):
        params, batch = _case(model, "ce", jnp.float64, soft=True)
        batch["y"] = batch["y"] * jnp.asarray([[0.5], [2.0], [1.0], [0.0], [3.0], [1.0]])
        truth = truth_of(model, "ce", params, batch)
        operator = curvature.GaussNewton(curvature.Model(model.predict), _loss("ce"))
        loss, gradient, matrix, _ = _materialize(operator, params, batch)
    np.testing.assert_allclose(loss, truth.loss.value, rtol=1e-12)
    assert_close(gradient, truth.gradient, 1e-10, "gradient")
    assert_close(matrix, truth.ggn, 1e-10, "GGN")


@pytest.mark.parametrize(
    ("model", "kind"), [(models.MLP_TANH, "ce"), (models.SHARED, "ce"), (models.SCALAR, "mse")], ids=lambda v: str(v)
)
def test_empirical_fisher_columns(model, kind):
    truth = standard_truth(model, kind, weighted=True)
    with precision(jnp.float64):
        params, batch = _case(model, kind, jnp.float64, weighted=True)
        model_of = curvature.Model(model.predict, weight_key="w")
        operator = curvature.GaussNewton(model_of, _loss(kind), curvature.ObservedFisher())
        _, gradient, matrix, _ = _materialize(operator, params, batch)
    assert_close(gradient, truth.gradient, 1e-10, "gradient")
    assert_close(matrix, truth.empirical_fisher, 1e-10, "empirical Fisher")


def test_monte_carlo_fisher_is_the_ggn_on_average():
    model, samples, draws = models.MLP_TANH, 8, 256
    truth = standard_truth(model, "ce")
    with precision(jnp.float64):
        params, batch = _case(model, "ce", jnp.float64)
        units = _stacked_units(params)
        operator = curvature.GaussNewton(
            curvature.Model(model.predict), _loss("ce"), curvature.MonteCarloFisher(n_samples=samples)
        )

        @quick_jit
        @jax.vmap
        def run(sample_key):
            at = operator.linearize(
                params, curvature.Evaluation(batch, sample_key=sample_key), curvature.Needs(product=True)
            )
            assert at.product is not None
            columns = jax.tree.leaves(jax.vmap(at.product)(units))
            return jnp.concatenate([c.reshape(c.shape[0], -1) for c in columns], 1)

        drawn = np.asarray(run(jax.random.split(key(), draws)))
    error = drawn.mean(0) - truth.ggn
    standard_error = drawn.std(0) / np.sqrt(draws)
    # 5.5 standard errors for each of some thousand entries: a false alarm in one of 10^4 seeds, and the seed is fixed.
    assert np.all(np.abs(error) <= 5.5 * standard_error + 1e-12)
    assert standard_error.max() < 0.1 * np.abs(truth.ggn).max()


HESSIAN_MODELS = [models.MLP_TANH, models.CNN, models.RECURRENT, models.ATTENTION, models.ODD_TREE, models.CUSTOM_VJP]


@pytest.mark.parametrize("model", HESSIAN_MODELS, ids=str)
def test_hessian_columns(model):
    with precision(jnp.float64):
        params, batch = _case(model, "ce", jnp.float64)

        def loss_fn(p, data):
            log_p = jax.nn.log_softmax(model.predict(p, data["x"]))
            return -jnp.mean(jnp.take_along_axis(log_p, data["y"][..., None], -1))

        want = dense.hessian(lambda p: loss_fn(p, batch), params)
        by_function = curvature.Hessian(curvature.LossFunction(loss_fn))
        loss, gradient, matrix, _ = _materialize(by_function, params, batch)
    truth = standard_truth(model, "ce")
    np.testing.assert_allclose(loss, truth.loss.value, rtol=1e-12)
    assert_close(gradient, truth.gradient, 1e-10, "gradient")
    assert_close(matrix, want, 1e-10, "Hessian")


def test_hessian_of_a_model_and_a_loss_object():
    model = models.MLP_TANH
    with precision(jnp.float64):
        params, batch = _case(model, "mse", jnp.float64)

        def loss_fn(p):
            return 0.5 * jnp.mean(jnp.sum((model.predict(p, batch["x"]) - batch["y"]) ** 2, -1))

        want = dense.hessian(loss_fn, params)
        operator = curvature.Hessian(curvature.ModelLoss(curvature.Model(model.predict), _loss("mse")))
        _, _, matrix, _ = _materialize(operator, params, batch)
    assert_close(matrix, want, 1e-10, "Hessian")


@pytest.mark.parametrize("size", [2, 4, 50])
def test_microbatches_accumulate_the_full_operator(size):
    model = models.MLP_TANH
    truth = standard_truth(model, "ce", weighted=True)
    with precision(jnp.float64):
        params, batch = _case(model, "ce", jnp.float64, weighted=True)
        inner = curvature.GaussNewton(curvature.Model(model.predict, weight_key="w"), _loss("ce"))
        loss, gradient, matrix, _ = _materialize(curvature.Microbatched(inner, size), params, batch)
    np.testing.assert_allclose(loss, truth.loss.value, rtol=1e-12)
    assert_close(gradient, truth.gradient, 1e-10, "gradient")
    assert_close(matrix, truth.ggn, 1e-10, "GGN")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("model", [models.ATTENTION, models.CUSTOM_VJP], ids=str)
def test_products_do_not_depend_on_sharing(model, shared):
    truth = standard_truth(model, "ce")
    with precision(jnp.float32):
        params, batch = _case(model, "ce", jnp.float32)
        operator = curvature.GaussNewton(curvature.Model(model.predict), _loss("ce"))
        _, gradient, matrix, _ = _materialize(operator, params, batch, shared=shared)
    assert_close(gradient, truth.gradient, TOLERANCE["float32"], "gradient")
    assert_close(matrix, truth.ggn, TOLERANCE["float32"], "GGN")


def test_bfloat16_products_are_those_of_the_rounded_model():
    model = models.MLP_TANH
    with precision(jnp.bfloat16):
        params, batch = _case(model, "ce", jnp.bfloat16)
        truth = truth_of(model, "ce", params, batch)
        operator = curvature.GaussNewton(curvature.Model(model.predict), _loss("ce"))
        loss, gradient, matrix, _ = _materialize(operator, params, batch)
    np.testing.assert_allclose(loss, truth.loss.value, rtol=2e-2)
    assert_close(gradient, truth.gradient, 5e-2, "gradient")
    assert_close(matrix, truth.ggn, 5e-2, "GGN")
