"""Where eigenvalues of a factor are zero to rounding, rounding does not choose the eigenvectors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.curvature import GeneralizedGaussNewton
from curvax.eigenbases import eigenbasis
from curvax.losses import SquaredError
from curvax.structure import WeightSharing
from tests.oracle import dense
from tests.oracle.compiling import quick_jit

PyTree = Any


def _drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _attention(params: PyTree, x: jax.Array) -> jax.Array:
    """Causal: what is behind the last token that counts is seen by none that does."""
    q, k, v = (x @ params[name] for name in "qkv")
    length = x.shape[1]
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), jnp.einsum("btd,bsd->bts", q, k), -jnp.inf)
    return jax.nn.softmax(scores) @ v @ params["o"]


def _convolution(params: PyTree, x: jax.Array) -> jax.Array:
    taps = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(taps).mean((1, 2)) @ params["w"]


def _of_attention() -> tuple[PyTree, PyTree, PyTree]:
    """(parameters, masked batch, the batch without what is masked). The cotangents of keys sum to zero."""
    params = {"q": 0.4 * _drawn(1, 3, 3), "k": 0.4 * _drawn(2, 3, 3), "v": _drawn(3, 3, 3), "o": _drawn(4, 3, 3)}
    x, y = _drawn(5, 24, 6, 3), _drawn(6, 24, 6, 3)
    mask = jnp.asarray(np.tile(np.arange(6) < 3, (24, 1)))
    return params, {"x": x, "y": y, "m": mask}, {"x": x[:, :3], "y": y[:, :3]}


def _of_convolution() -> tuple[PyTree, PyTree, PyTree]:
    """Fewer examples than inputs of the kernel."""
    params = {"k": 0.3 * _drawn(1, 2, 2, 2, 3), "w": _drawn(3, 3, 3)}
    x, y = _drawn(5, 4, 4, 4, 2), _drawn(6, 4, 3)
    mask = jnp.asarray([1.0, 0.0, 1.0, 1.0])
    kept = np.asarray([0, 2, 3])
    return params, {"x": x.at[1].set(jnp.nan), "y": y, "m": mask}, {"x": x[kept], "y": y[kept]}


CASES = {"attention": (_attention, _of_attention), "convolution": (_convolution, _of_convolution)}


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("sharing", list(WeightSharing))
@pytest.mark.parametrize("case", CASES)
def test_a_mask_equals_a_shorter_batch(case: str, sharing: WeightSharing, name: str, x64: None) -> None:
    predict, problem = CASES[case]
    params, masked, cut = problem()
    options: dict[str, Any] = {"fisher": GeneralizedGaussNewton(), "sharing": sharing, "inverse_every": 1}
    options |= {"lam_policy": "const", "lam0": 0.1, "learning_rate": 1.0}

    def direction(batch: PyTree, **more: Any) -> np.ndarray:
        method = curvax.make(name, predict_fn=predict, loss=SquaredError(), **options, **more)
        state = method.init(params, batch=batch)
        new, _, info = quick_jit(method.step)(params, batch, state, jax.random.key(0))
        assert bool(info["accepted"])
        return np.asarray(dense.vector(params)) - np.asarray(dense.vector(new))

    want = direction(cut)
    np.testing.assert_allclose(direction(masked, weight_key="m"), want, atol=1e-10 * float(np.linalg.norm(want)))


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (6, 6), (9, 4), (9, 1), (5, 0)])
def test_the_basis_of_what_has_no_eigenvectors(n: int, rank: int, x64: None) -> None:
    rows = np.array(_drawn(7, rank, n))
    rows[:, 2:3] = 0
    factor = rows.T @ rows
    values, vectors = map(np.asarray, quick_jit(eigenbasis)(jnp.asarray(factor)))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=1e-13)
    np.testing.assert_allclose(vectors * values @ vectors.T, factor, atol=1e-13 * max(1.0, np.abs(factor).max()))
    # A row of zeros keeps to itself.
    if n > 2:
        assert np.sort(np.abs(vectors[2]))[-2] < 1e-12
    # Another rounding of the same factor has the same basis, but for signs.
    turned = np.asarray(quick_jit(eigenbasis)(jnp.asarray(factor * (1 + 1e-15 * np.asarray(_drawn(8, n, n)))))[1])
    np.testing.assert_allclose(np.abs(np.sum(turned * vectors, axis=0)), 1, atol=1e-9)


def test_stacks_and_single_precision() -> None:
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 7)), jnp.float32)
    factors = jnp.einsum("gri,grj->gij", rows, rows, precision="highest")
    values, vectors = quick_jit(eigenbasis)(factors)
    one = [quick_jit(eigenbasis)(factor) for factor in factors]
    np.testing.assert_allclose(values, jnp.stack([v for v, _ in one]), atol=1e-4)
    for got, (_, expected) in zip(vectors, one, strict=True):
        np.testing.assert_allclose(np.abs(np.sum(got * expected, axis=0)), 1, atol=1e-3)
