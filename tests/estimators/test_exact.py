"""The exact diagonal against dense Gauss-Newton matrices, on every model, through every operator that has rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.curvature import Evaluation, GaussNewton, Microbatched, Model, MonteCarloFisher, Needs, ObservedFisher
from curvax.estimators import ExactDiagonal
from curvax.losses import SquaredError
from tests.oracle import dense, losses
from tests.oracle.compiling import quick_jit
from tests.oracle.models import ALL, ATTENTION, CNN, MIXING, MLP_TANH

KEY = jax.random.key(0)


def problem(model: Any, dtype: Any) -> tuple[Any, dict[str, jax.Array]]:
    batch = {"x": model.inputs(dtype), "y": model.targets(dtype), "w": model.weights(dtype)}
    return model.params(dtype), batch


@functools.cache
def truth(model: Any) -> dense.Truth:
    with jax.enable_x64(True):
        params, batch = problem(model, jnp.float64)
        return dense.truth(model.predict, losses.squared_error, params, batch["x"], batch["y"], batch["w"])


def diagonal(operator: Any, params: Any, batch: Any, max_bytes: int = 1 << 30, key: Any = None) -> np.ndarray:
    @quick_jit
    def exact(params: Any, batch: Any, key: Any) -> Any:
        at = operator.linearize(params, Evaluation(batch, sample_key=key), Needs(rows=True))
        return ExactDiagonal(max_bytes).diagonal(at, KEY)

    found = exact(params, batch, key)
    jax.tree.map(lambda x, p: None if x.shape == p.shape else pytest.fail("shape"), found, params)
    return dense.vector(found)


def operator_of(model: Any, *metric: Any) -> GaussNewton:
    return GaussNewton(Model(model.predict, weight_key="w"), SquaredError(), *metric)


@pytest.mark.filterwarnings("ignore:.*examples.*")
@pytest.mark.parametrize("model", ALL, ids=str)
def test_it_is_the_diagonal_of_the_gauss_newton_matrix(model: Any) -> None:
    wanted = np.diag(truth(model).ggn)
    with jax.enable_x64(True):
        found = diagonal(operator_of(model), *problem(model, jnp.float64))
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12 * wanted.max())


@pytest.mark.filterwarnings("ignore:.*examples.*")
@pytest.mark.parametrize("max_bytes", [1, 700, 5_000])
@pytest.mark.parametrize("model", [MLP_TANH, CNN, ATTENTION, MIXING[0]], ids=str)
def test_less_memory_changes_nothing(model: Any, max_bytes: int) -> None:
    wanted = np.diag(truth(model).ggn)
    with jax.enable_x64(True):
        found = diagonal(operator_of(model), *problem(model, jnp.float64), max_bytes=max_bytes)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12 * wanted.max())


def test_other_metrics_have_their_own_diagonal() -> None:
    with jax.enable_x64(True):
        params, batch = problem(MLP_TANH, jnp.float64)
        found = diagonal(operator_of(MLP_TANH, ObservedFisher()), params, batch)
        np.testing.assert_allclose(found, np.diag(truth(MLP_TANH).empirical_fisher), rtol=1e-10, atol=1e-14)
        sampled, key = operator_of(MLP_TANH, MonteCarloFisher(2)), jax.random.key(3)

        @quick_jit
        def columns(params: Any, batch: Any) -> jax.Array:
            product = sampled.linearize(params, Evaluation(batch, sample_key=key), Needs(product=True)).product
            assert product is not None
            flat, unravel = jax.flatten_util.ravel_pytree(params)
            columns = jax.vmap(lambda e: jax.flatten_util.ravel_pytree(product(unravel(e)))[0])(jnp.eye(flat.size))
            return columns

        np.testing.assert_allclose(
            diagonal(sampled, params, batch, key=key), np.diag(columns(params, batch)), rtol=1e-9, atol=1e-13
        )


def test_microbatches_have_the_diagonal_of_their_batch() -> None:
    with jax.enable_x64(True):
        params, batch = problem(MLP_TANH, jnp.float64)
        found = diagonal(Microbatched(operator_of(MLP_TANH), 4), params, batch)
    np.testing.assert_allclose(found, np.diag(truth(MLP_TANH).ggn), rtol=1e-10, atol=1e-14)


def test_narrow_parameters_give_a_wide_diagonal() -> None:
    params, batch = problem(MLP_TANH, jnp.bfloat16)
    exact = quick_jit(
        lambda p, b: ExactDiagonal().diagonal(operator_of(MLP_TANH).linearize(p, Evaluation(b), Needs(rows=True)), KEY)
    )(params, batch)
    assert {x.dtype for x in jax.tree.leaves(exact)} == {jnp.dtype(jnp.float32)}
    wanted = np.diag(truth(MLP_TANH).ggn)
    np.testing.assert_allclose(dense.vector(exact), wanted, rtol=0.1, atol=0.02 * wanted.max())


def test_a_preset_takes_it_by_name() -> None:
    """One diagonal step divides the gradient by the exact diagonal."""
    params, batch = problem(MLP_TANH, jnp.float32)
    method = curvax.sgn_mse(
        predict_fn=MLP_TANH.predict, weight_key="w", precond="diag_direct", estimator="exact", lam0=1e-3, maxiter=50
    )
    assert "ExactDiagonal" in method.plan.explain()
    _, _, info = quick_jit(method.step)(params, batch, method.init(params), KEY)
    assert bool(info["accepted"]) and float(info["residual"]) < 1e-2


def test_a_hessian_has_no_factors() -> None:
    with pytest.raises(ValueError, match="has none: use a Gauss-Newton curvature"):
        curvax.newton_cg(loss_fn=lambda p, b: jnp.sum(p**2), precond="diag_direct", estimator="exact")
