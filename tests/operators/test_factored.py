"""Factored operators against dense blocks, and functions of them against functions of dense eigenvalues."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import operators
from curvax.curvature import Evaluation, GaussNewton, GeneralizedGaussNewton, Needs
from curvax.preconditioners import EKFAC, KFAC
from tests.operators.problem import LOSS, problem
from tests.oracle import dense
from tests.oracle.models import LINEAR, MLP_TANH, SHARED

pytestmark = pytest.mark.usefixtures("x64", "quick_programs")
LAM = 0.3


@pytest.mark.parametrize(
    ("make", "preconditioner"), [(operators.kfac, KFAC), (operators.ekfac, EKFAC)], ids=["kfac", "ekfac"]
)
@pytest.mark.parametrize("model", [MLP_TANH, SHARED], ids=str)
def test_factors_of_pieces_are_those_of_the_whole(model, make, preconditioner):
    """The inverse is that of the preconditioner which saw one batch of all examples."""
    p = problem(model)
    exact = GeneralizedGaussNewton()
    operator = make(p.model, LOSS, p.params, p.batches)
    curvature, module = GaussNewton(p.model, LOSS), preconditioner(fisher=exact, decay=0.0, inverse_every=1)

    def inverse(v):
        state = module.init_on(curvature, p.params, Evaluation(p.batch))
        at = curvature.linearize(p.params, Evaluation(p.batch), Needs(factors=True))
        return module.apply(module.refresh(state, at, jax.random.key(0)), LAM, v)

    v = dense.like(np.random.default_rng(0).normal(size=operator.shape[0]), p.params)
    want = dense.vector(jax.jit(inverse)(v))
    np.testing.assert_allclose(dense.vector(operators.inverse(operator, LAM) @ v), want, atol=1e-10)


def test_kfac_of_one_linear_layer_and_one_position_is_exact():
    """With cross entropy A kron B is the whole Gauss-Newton matrix where all examples share their outputs' Hessian."""
    p = problem(LINEAR)
    batch = {k: np.repeat(v[:1], 3, axis=0) for k, v in p.batch.items()}
    operator = operators.kfac(p.predict, LOSS, p.params, batch)
    full = operators.ggn(p.predict, LOSS, p.params, batch)
    np.testing.assert_allclose(operator.to_dense(), full.to_dense(), atol=1e-12)


def test_ekfac_is_closer_than_kfac_and_has_the_trace():
    p = problem(MLP_TANH)
    first = operators.kfac(p.model, LOSS, p.params, p.batches).to_dense()
    second = operators.ekfac(p.model, LOSS, p.params, p.batches).to_dense()
    truth = p.truth.ggn
    assert np.linalg.norm(second - truth) < np.linalg.norm(first - truth)
    assert np.trace(second) == pytest.approx(np.trace(truth), rel=1e-10)


def test_diagonal_of_pieces():
    p = problem(SHARED)
    operator = operators.diagonal(p.model, LOSS, p.params, p.batches)
    np.testing.assert_allclose(operator.to_dense(), np.diag(np.diag(p.truth.ggn)), atol=1e-13)


def factored(kind, p):
    if kind == "low rank":
        values, vectors = np.linalg.eigh(p.truth.ggn)
        return operators.low_rank(jnp.asarray(vectors[:, -5:]), jnp.asarray(values[-5:]), p.params, rest=0.01)
    if kind == "nystrom":
        return operators.nystrom(operators.ggn(p.model, LOSS, p.params, p.batch), 30, jax.random.key(0))
    return getattr(operators, kind)(p.model, LOSS, p.params, p.batch)


@pytest.mark.parametrize("kind", ["kfac", "diagonal", "low rank", "nystrom"])
def test_functions_are_those_of_the_dense_matrix(kind):
    p = problem(MLP_TANH)
    operator = factored(kind, p)
    c = np.asarray(operator.to_dense())
    shifted = c + LAM * np.eye(len(c))
    np.testing.assert_allclose(operator.shift(LAM).to_dense(), shifted, atol=1e-12)
    np.testing.assert_allclose(operators.inverse(operator, LAM).to_dense(), np.linalg.inv(shifted), atol=1e-10)
    root = np.asarray(operator.inverse_root(LAM).to_dense())
    np.testing.assert_allclose(root @ root, np.linalg.inv(shifted), atol=1e-10)
    key = jax.random.key(0)
    assert float(operators.trace(operator, key).value) == pytest.approx(np.trace(c), rel=1e-10)
    assert float(operators.frobenius_norm(operator, key).value) == pytest.approx(np.linalg.norm(c), rel=1e-10)
    log_det = operators.log_determinant(operator, LAM, key)
    assert float(log_det.value) == pytest.approx(np.linalg.slogdet(shifted)[1], rel=1e-10)
    assert float(log_det.standard_error) == 0


def test_nystrom_of_full_rank_is_the_matrix():
    p = problem(MLP_TANH)
    ggn = operators.ggn(p.model, LOSS, p.params, p.batches)
    approximation = operators.nystrom(ggn, ggn.shape[0], jax.random.key(0))
    np.testing.assert_allclose(approximation.to_dense(), p.truth.ggn, atol=1e-10)


def test_low_rank_that_does_not_fit():
    with pytest.raises(ValueError, match=r"do not fit 4 parameters: pass \(4, rank\)"):
        operators.low_rank(jnp.ones((3, 1)), jnp.ones(1), jnp.zeros(4))
