"""AdaHessian's averaging against NumPy means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.estimators import BlockAverage


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((5,), ()),
        ((3, 4), (1,)),
        ((2, 3, 4), (2,)),
        ((3, 3, 4, 5), (0, 1)),
        ((2, 3, 3, 4, 5), (0, 1, 2)),
        ((2, 2, 2, 2, 3, 4), (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_default_axes(x64, shape, axes):
    leaf = np.random.default_rng(0).normal(size=shape)
    got = BlockAverage()({"p": jnp.asarray(leaf)})["p"]
    np.testing.assert_allclose(got, np.broadcast_to(leaf.mean(axis=axes, keepdims=True) if axes else leaf, shape))
    assert got.dtype == jnp.float64


def test_a_callable_replaces_the_rule():
    seen = []

    def rule(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        seen.append((path, shape))
        return (0,) if "embedding" in path else ()

    diagonal = {"embedding": jnp.arange(6.0).reshape(2, 3), "rest": jnp.arange(4.0).reshape(2, 2)}
    got = jax.jit(BlockAverage(rule))(diagonal)
    np.testing.assert_allclose(got["embedding"], [[1.5, 2.5, 3.5]] * 2)
    np.testing.assert_allclose(got["rest"], diagonal["rest"])
    assert seen == [("['embedding']", (2, 3)), ("['rest']", (2, 2))]


def test_empty_leaves_stay():
    assert BlockAverage()({}) == {}
    assert BlockAverage()([jnp.zeros((0, 3))])[0].shape == (0, 3)
    assert BlockAverage()([jnp.zeros((3, 0))])[0].shape == (3, 0)
