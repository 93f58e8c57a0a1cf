"""Inverses, conversions and spectra against numpy on dense matrices."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from curvax import operators
from curvax.operators import SymmetricOperator
from curvax.solvers import CG, MINRES, Cholesky, Eigen, PseudoInverse, Result, RowSpace
from tests.operators.problem import LOSS, problem
from tests.oracle.models import MLP_TANH

pytestmark = pytest.mark.usefixtures("x64", "quick_programs")
KEY = jax.random.key(7)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(SymmetricOperator):
    """A symmetric matrix as somebody's own operator."""

    matrix: jax.Array
    positive: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def domain(self):
        return jax.ShapeDtypeStruct(self.matrix.shape[1:], self.matrix.dtype)

    @property
    def is_positive(self):
        return self.positive

    def linearized(self):
        return lambda v: self.matrix @ v


def of(values, positive=True):
    values = np.asarray(values, float)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(values), len(values))))
    return Dense(jnp.asarray((rotation * values) @ rotation.T), positive)


DECAYING = 10.0 ** -np.linspace(0, 4, 120)


@pytest.mark.parametrize(
    "solver", [None, Cholesky(), CG(tol=1e-12, maxiter=500), MINRES(tol=1e-12, maxiter=500), Eigen()]
)
def test_inverse(solver):
    p = problem(MLP_TANH)
    ggn = operators.ggn(p.model, LOSS, p.params, p.batches)
    inverse = operators.inverse(ggn, 0.1, solver=solver)
    assert isinstance(inverse, operators.Inverse)
    want = np.linalg.inv(p.truth.ggn + 0.1 * np.eye(ggn.shape[0]))
    rhs = np.random.default_rng(0).normal(size=(ggn.shape[0], 3))
    found = inverse.solve_columns(jnp.asarray(rhs))
    np.testing.assert_allclose(found.value, want @ rhs, atol=1e-8)
    assert found.result.shape == (3,) and (np.asarray(found.result) == Result.CONVERGED).all()
    np.testing.assert_allclose(inverse @ rhs[:, 0], want @ rhs[:, 0], atol=1e-8)


def test_inverse_says_how_it_ended():
    operator = of(DECAYING)
    inverse = operators.inverse(operator, 0.0, solver=CG(tol=1e-12, maxiter=3))
    assert isinstance(inverse, operators.Inverse)
    found = inverse.solve(jnp.ones(120))
    assert Result(int(found.result)) is Result.MAX_ITERATIONS and float(found.residual) > 1e-6
    singular = of([1.0, 2.0, 0.0, 0.0])
    pseudo = operators.inverse(singular, solver=PseudoInverse()) @ jnp.ones(4)
    np.testing.assert_allclose(pseudo, np.linalg.pinv(np.asarray(singular.matrix)) @ np.ones(4), atol=1e-8)


def test_scipy_and_lineax_take_operators():
    p = problem(MLP_TANH)
    ggn = operators.ggn(p.model, LOSS, p.params, p.batches)
    n = ggn.shape[0]
    shifted = ggn.shift(0.1)
    rhs = np.random.default_rng(0).normal(size=n)
    want = np.linalg.solve(p.truth.ggn + 0.1 * np.eye(n), rhs)
    got, info = scipy.sparse.linalg.cg(operators.as_scipy(shifted), rhs, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(got, want, atol=1e-8)
    np.testing.assert_allclose(operators.as_scipy(shifted) @ np.eye(n), shifted.to_dense(), atol=1e-12)
    lx = pytest.importorskip("lineax")
    _, unravel = ravel_pytree(p.params)
    solution = lx.linear_solve(
        operators.as_lineax(shifted), unravel(jnp.asarray(rhs)), lx.CG(rtol=1e-12, atol=1e-12)
    ).value
    np.testing.assert_allclose(ravel_pytree(solution)[0], want, atol=1e-8)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude", "both"])
@pytest.mark.parametrize("n", [12, 120])
def test_extreme_eigenpairs(which, n):
    values = np.concatenate([[5.0, 3.0, -4.0, -6.0], np.linspace(-0.5, 0.5, n - 4)])
    operator = of(values, positive=False)
    pairs = operators.eigenpairs(operator, 2, which)
    want = {"largest": [5, 3], "smallest": [-4, -6], "magnitude": [5, -6], "both": [5, -6]}[which]
    np.testing.assert_allclose(pairs.values, want, atol=1e-10)
    np.testing.assert_allclose(operator.matrix @ pairs.vectors, pairs.vectors * pairs.values, atol=1e-9)
    np.testing.assert_allclose(pairs.vectors.T @ pairs.vectors, np.eye(2), atol=1e-10)


def test_quadrature():
    operator = of(DECAYING)
    spectrum = operators.spectrum(operator, KEY, steps=60, probes=16)
    np.testing.assert_allclose(jnp.sum(spectrum.weights, axis=1), 1, atol=1e-10)
    for function, true in ((lambda t: t, DECAYING.sum()), (jnp.square, np.square(DECAYING).sum())):
        found = spectrum.total(function)
        assert abs(found.value - true) < 4 * found.standard_error
    at = jnp.linspace(-0.5, 1.5, 2001)
    density = spectrum.density(at, 0.05)
    assert float(jnp.sum(density) * (at[1] - at[0])) == pytest.approx(1, abs=1e-3)
    exact = np.mean(np.exp(-0.5 * ((np.asarray(at)[:, None] - DECAYING) / 0.05) ** 2), 1) / (0.05 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(density, exact, atol=0.05 * exact.max())


@pytest.mark.fast
def test_quadrature_ends_with_the_krylov_space():
    """Three different eigenvalues are found in three steps; the rest of sixty adds nothing, not even rounding."""
    operator = of([1.0] * 40 + [2.0] * 40 + [7.0] * 20)
    spectrum = operators.spectrum(operator, KEY, steps=60, probes=4)
    kept = np.asarray(spectrum.weights) > 1e-8
    assert kept.sum() == 4 * 3
    nodes = np.sort(np.asarray(spectrum.nodes)[kept].reshape(4, 3))
    np.testing.assert_allclose(nodes, [[1, 2, 7]] * 4, atol=1e-8)


def test_sums_over_the_spectrum_within_their_error_bars():
    operator, lam = of(DECAYING), 1e-2
    log_det = operators.log_determinant(operator, lam, KEY, probes=16)
    assert abs(log_det.value - np.log(DECAYING + lam).sum()) < 4 * log_det.standard_error
    effective = operators.effective_dimension(operator, lam, KEY, probes=16)
    assert abs(effective.value - (DECAYING / (DECAYING + lam)).sum()) < 4 * effective.standard_error
    norm = operators.frobenius_norm(operator, KEY)
    assert abs(norm.value - np.linalg.norm(DECAYING)) < 4 * norm.standard_error
    trace = operators.trace(operator, KEY)
    assert abs(trace.value - DECAYING.sum()) < 4 * trace.standard_error
    assert float(operators.condition_number(operator, lam)) == pytest.approx((1 + lam) / (1e-4 + lam), rel=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: operators.inverse(c, -1.0), "lam must be non-negative and finite, got -1"),
        (lambda c: operators.inverse(c, 0.1, solver=RowSpace(Cholesky())), "does not solve for parameters"),
        (lambda c: operators.eigenpairs(c, 0), "k must be between 1 and the 4 parameters"),
        (lambda c: operators.eigenpairs(c, 2, cast("Any", "top")), "which must be one of largest"),
        (lambda c: operators.spectrum(cast("Any", np.eye(3)), KEY), "takes an operator of curvax.operators"),
        (lambda c: operators.spectrum(c, KEY, steps=0), "must be at least 1"),
        (
            lambda c: operators.Inverse(c, jnp.ones(()), Cholesky()).solve_columns(jnp.ones(4)),
            "right-hand sides in columns",
        ),
        (lambda c: c + of(np.ones(3)), "do not add up"),
        (lambda c: c @ of(np.ones(3)), "do not multiply"),
    ],
)
def test_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(of([1.0, 2.0, 3.0, 4.0]))
