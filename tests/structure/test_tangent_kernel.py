"""Kernels of two batches of unequal sizes against explicit Jacobians, formed or as products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import operators
from curvax.structure import jacobian_gram, jacobian_gram_diagonal
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.oracle.models import ATTENTION, CNN, EMBEDDING, MLP_TANH

pytestmark = pytest.mark.usefixtures("x64", "quick_programs")
MODELS = (CNN, ATTENTION, EMBEDDING)


def batches(model, dtype=jnp.float64):
    params, rng = model.init(jax.random.key(1), dtype), np.random.default_rng(2)
    shape = (model.input_shape[0] + 2, *model.input_shape[1:])
    x = rng.integers(0, model.vocabulary, shape) if model.vocabulary else rng.normal(size=shape).astype(dtype)
    return params, x[:3], x[3:]


def jacobian(predict, params, x):
    """(B, K, n)."""
    rows = quick_jit(jax.jacrev(predict))(params, x)
    outputs = jax.eval_shape(predict, params, x).shape
    flat = [np.reshape(leaf, (*outputs, -1)) for leaf in jax.tree.leaves(rows)]
    return np.concatenate(flat, axis=-1).reshape(outputs[0], -1, sum(x.shape[-1] for x in flat))


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_two_batches(model):
    params, x1, x2 = batches(model)
    j1, j2 = (jacobian(model.predict, params, x) for x in (x1, x2))

    def all_of_it(p, x, y):
        one = jacobian_gram(model.predict, p, x, other=y)
        traced = jacobian_gram(model.predict, p, x, other=y, traced=True)
        blocks = jacobian_gram_diagonal(model.predict, p, y)
        if model is not CNN:
            return one, traced, blocks
        small = jacobian_gram(model.predict, p, x, other=y, max_bytes=1)
        alone = jacobian_gram(model.predict, p, x, traced=True, max_bytes=1)
        norms = jacobian_gram_diagonal(model.predict, p, y, traced=True, max_bytes=1)
        return one, traced, blocks, small, alone, norms

    got = quick_jit(all_of_it)(params, x1, x2)
    want = np.einsum("bkn,cln->bkcl", j1, j2)
    own = np.einsum("bkn,bln->bkl", j2, j2)
    truths = (want, np.einsum("bkck->bc", want), own)
    truths += (want, np.einsum("bkn,ckn->bc", j1, j1), np.einsum("bkk->b", own)) if model is CNN else ()
    for found, truth in zip(got, truths, strict=True):
        np.testing.assert_allclose(found, truth, atol=1e-12 * np.abs(truth).max())


def test_operator_multiplies_like_the_kernel():
    params, x1, x2 = batches(MLP_TANH)
    kernel = np.asarray(jacobian_gram(MLP_TANH.predict, params, x1, other=x2))
    rows, columns = kernel.shape[0] * kernel.shape[1], kernel.shape[2] * kernel.shape[3]
    across = operators.tangent_kernel(MLP_TANH.predict, params, x1, x2)
    np.testing.assert_allclose(across.to_dense(), kernel.reshape(rows, columns), atol=1e-12)
    np.testing.assert_allclose(across.T.to_dense(), kernel.reshape(rows, columns).T, atol=1e-12)
    own = operators.tangent_kernel(MLP_TANH.predict, params, x1)
    assert own.is_positive
    size = own.shape[0]
    truth = np.asarray(jacobian_gram(MLP_TANH.predict, params, x1)).reshape(size, size)
    np.testing.assert_allclose(own.to_dense(), truth, atol=1e-12)
    solved = operators.inverse(own, 0.1) @ np.ones(size)
    np.testing.assert_allclose(solved, np.linalg.solve(truth + 0.1 * np.eye(size), np.ones(size)), rtol=1e-9)


def test_examples_that_interact():
    params, x1, x2 = batches(MLP_TANH)

    def predict(p, x):
        return MLP_TANH.predict(p, x) - jnp.mean(MLP_TANH.predict(p, x), axis=0)

    j1, j2 = (jacobian(predict, params, x) for x in (x1, x2))
    with pytest.warns(UserWarning, match="examples interact"):
        traced = jacobian_gram(predict, params, x1, other=x2, traced=True)
        blocks = jacobian_gram_diagonal(predict, params, x1)
    np.testing.assert_allclose(traced, np.einsum("bkn,ckn->bc", j1, j2), atol=1e-12)
    np.testing.assert_allclose(blocks, np.einsum("bkn,bln->bkl", j1, j1), atol=1e-12)


def test_bfloat16_and_arguments():
    params, x1, x2 = batches(MLP_TANH, jnp.bfloat16)
    kernel = jacobian_gram(MLP_TANH.predict, params, x1, other=x2)
    assert (
        kernel.dtype == np.float32
        and dense.relative_error(
            np.asarray(kernel),
            np.asarray(
                jacobian_gram(MLP_TANH.predict, dense.to_double(params), x1.astype(float), other=x2.astype(float))
            ),
        )
        < 0.05
    )
    with pytest.raises(ValueError, match="no trainable parameters"):
        jacobian_gram_diagonal(lambda p, x: x, {}, x1)
    with pytest.raises(TypeError, match="trace"):
        jacobian_gram(MLP_TANH.predict, params, x1, trace=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
