"""Outputs that are derivatives with respect to the inputs: rows, Gram matrix, diagonal and Kronecker blocks.

Every way in which users take derivatives has the structure of a plain layer, and no leaf falls back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

from curvax.curvature import Evaluation, GaussNewton, GeneralizedGaussNewton, Model, Needs
from curvax.losses import SquaredError
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.kronecker import WeightSharing, factor_sums, projected_squares
from tests.oracle import dense, losses
from tests.oracle.compiling import quick_jit
from tests.terms.problems import normal

DIMENSION = 3
EXACT = GeneralizedGaussNewton()
Scalar = Callable[[jax.Array], jax.Array]


def parameters() -> dict[str, jax.Array]:
    return {
        "w": normal(0, DIMENSION, 5) / 2,
        "b": normal(1, 5) / 2,
        "v": normal(2, 5, 5) / 2,
        "c": normal(3, 5) / 2,
        "o": normal(4, 5, 1),
    }


def network(p: Any, z: jax.Array) -> jax.Array:
    """u at one point."""
    h = jnp.tanh(z @ p["w"] + p["b"])
    return (jnp.tanh(h @ p["v"] + p["c"]) @ p["o"])[0]


def by_jvp(u: Scalar, z: jax.Array) -> jax.Array:
    total = jnp.zeros((), z.dtype)
    for e in jnp.eye(DIMENSION, dtype=z.dtype):
        total += jax.jvp(lambda y, e=e: jax.jvp(u, (y,), (e,))[1], (z,), (e,))[1]
    return total[None]


def by_vmapped_jvp(u: Scalar, z: jax.Array) -> jax.Array:
    def second(e: jax.Array) -> jax.Array:
        return jax.jvp(lambda y: jax.jvp(u, (y,), (e,))[1], (z,), (e,))[1]

    return jnp.sum(jax.vmap(second)(jnp.eye(DIMENSION, dtype=z.dtype)))[None]


def by_hessian(u: Scalar, z: jax.Array) -> jax.Array:
    return jnp.trace(jax.hessian(u)(z))[None]


def by_forward_over_reverse(u: Scalar, z: jax.Array) -> jax.Array:
    slope = jax.grad(u)
    parts = [jax.jvp(slope, (z,), (e,))[1] @ e for e in jnp.eye(DIMENSION, dtype=z.dtype)]
    return jnp.sum(jnp.stack(parts))[None]


def by_jet(u: Scalar, z: jax.Array) -> jax.Array:
    def second(e: jax.Array) -> jax.Array:
        return jet.jet(u, (z,), ((e, jnp.zeros_like(e)),))[1][1]

    return jnp.sum(jnp.stack([second(e) for e in jnp.eye(DIMENSION, dtype=z.dtype)]))[None]


def by_folx(u: Scalar, z: jax.Array) -> jax.Array:
    folx = pytest.importorskip("folx", reason="folx is an optional extra: pip install 'curvax[physics]'")
    return jnp.atleast_1d(folx.forward_laplacian(u)(z).laplacian)


def with_gradient(u: Scalar, z: jax.Array) -> jax.Array:
    """[u, grad u]: weights forwards, and transposed in the reverse pass."""
    value, slope = jax.value_and_grad(u)(z)
    return jnp.concatenate([value[None], slope])


def first(u: Scalar, z: jax.Array) -> jax.Array:
    return jax.jvp(u, (z,), (jnp.ones_like(z),))[1][None]


WAYS = (by_jvp, by_vmapped_jvp, by_hessian, by_forward_over_reverse, by_jet, by_folx, with_gradient, first)


def identity(blocks: KroneckerBlocks) -> list[tuple[jax.Array, jax.Array]]:
    """Bases in which the curvature along the axes is the diagonal of the Gauss-Newton matrix."""

    def eye(shape: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(jnp.eye(shape[-1]), shape)

    return [(eye(block.input_shape), eye(block.output_shape)) for block in blocks.kronecker]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_rows_diagonal_and_blocks(x64: None, way: Callable[[Scalar, jax.Array], jax.Array]) -> None:
    params, x = parameters(), normal(5, 4, DIMENSION)

    def predict(p: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda z: way(lambda y: network(p, y), z))(x)

    outputs = jax.eval_shape(predict, params, x).shape[1]
    data = {"x": x, "y": normal(6, 4, outputs)}
    curvature = GaussNewton(Model(predict), SquaredError())
    # 1. No leaf falls back, and every leaf has a Kronecker block.
    for leaf in curvature.structure(params, Evaluation(data)):
        assert leaf.rule != "explicit rows", str(leaf)
    blocks = curvature.blocks(params, Evaluation(data))
    assert not blocks.diagonal, blocks.describe(sorted(params))

    def everything(p: Any, b: Any) -> Any:
        at = curvature.linearize(p, Evaluation(b), Needs(rows=True, factors=True))
        assert at.rows is not None and at.layer_factors is not None
        squares = at.layer_factors(EXACT, jax.random.key(0))(lambda e: projected_squares(blocks, e, identity(blocks)))
        return at.rows.gram(1 << 31), at.rows.diagonal(1 << 31), squares

    gram, diagonal, squares = quick_jit(everything)(params, data)
    # 2. Rows and diagonal are the dense ones.
    truth = dense.truth(predict, losses.squared_error, params, data["x"], data["y"])
    rows = truth.jacobian / np.sqrt(len(x))
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dense.vector(diagonal), np.diag(truth.ggn), rtol=1e-8, atol=1e-12)
    # 3. So are the factors' rows.
    for block, square in zip(blocks.kronecker, squares, strict=True):
        for leaf, part in block.put(square):
            name = sorted(params)[leaf]
            np.testing.assert_allclose(part, diagonal[name], rtol=1e-8, atol=1e-12, err_msg=name)


def test_transposed_weights_join_their_block_by_definition(x64: None) -> None:
    """Outputs [u, grad u] of one hidden layer: A and B from activations and cotangents taken by hand."""
    params = {"w": normal(0, DIMENSION, 5) / 2, "o": normal(1, 5)}
    x = normal(2, 4, DIMENSION)

    def perturbed(p: Any, x: jax.Array, e: jax.Array, f: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = jnp.tanh(x @ p["w"] + e)
        g = (1 - h**2) * p["o"]
        return jnp.concatenate([(h @ p["o"])[:, None], g @ p["w"].T + f], axis=1), x, g

    def predict(p: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda z: with_gradient(lambda y: jnp.tanh(y @ p["w"]) @ p["o"], z))(x)

    curvature = GaussNewton(Model(predict), SquaredError())
    data = {"x": x, "y": normal(3, 4, 4)}
    blocks = curvature.blocks(params, Evaluation(data))
    (index,) = [i for i, block in enumerate(blocks.kronecker) if block.shape == (1, DIMENSION, 5)]
    assert len(blocks.kronecker[index].swapped) == 1
    assert any("1 of them transposed" in line for line in blocks.describe(["o", "w"]))
    zeros = jnp.zeros((4, 5)), jnp.zeros((4, DIMENSION))
    d, c = quick_jit(jax.jacrev(lambda e, f: perturbed(params, x, e, f)[0], argnums=(0, 1)))(*zeros)
    d, c = (np.stack([np.asarray(t)[b, :, b] for b in range(4)]) / 2 for t in (d, c))
    _, a, g = perturbed(params, x, *zeros)
    a1, b1 = np.asarray(a.T @ a) / 4, np.einsum("bri,brj->ij", d, d)
    a2, b2 = np.einsum("bri,brj->ij", c, c), np.asarray(g.T @ g) / 4
    t1, t2 = np.trace(a1), np.trace(a2)
    s1, s2 = t1 * np.trace(b1), t2 * np.trace(b2)
    expected = (s1 * a1 + s2 * t1 / t2 * a2) / (s1 + s2), b1 + t2 / t1 * b2

    def sums(p: Any, b: Any) -> Any:
        at = curvature.linearize(p, Evaluation(b), Needs(factors=True))
        assert at.layer_factors is not None
        measure = at.layer_factors(EXACT, jax.random.key(0))
        return measure(lambda e: factor_sums(blocks, e, WeightSharing.EXPAND)).factors()

    found_a, found_b = (x[index][0] for x in quick_jit(sums)(params, data))
    np.testing.assert_allclose(found_a, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found_b, expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.trace(found_a) * np.trace(found_b), s1 + s2, rtol=1e-9)
