"""Stand-ins for a linearization whose curvature is a known dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree

SHAPES = {"b": (4,), "s": (), "w": (3, 4)}
SIZE = 17


def like(dtype: Any = jnp.float32) -> Any:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}


def flat_like(n: int, dtype: Any = jnp.float32) -> Any:
    return {"a": jax.ShapeDtypeStruct((n - 7,), dtype), "b": jax.ShapeDtypeStruct((7,), dtype)}


@dataclass(frozen=True)
class Dense:
    """Curvature `matrix` on trees like `params_like`; a factor F with F F^T = matrix serves sampled gradients."""

    matrix: jax.Array
    params_like: Any
    factor: jax.Array | None = None
    leaf_axes: None = None  # there is no model

    def product(self, v: Any) -> Any:
        flat, unravel = tree.ravel(v)
        return unravel(self.matrix.astype(flat.dtype) @ flat)

    @property
    def has_sampling(self) -> bool:
        return self.factor is not None

    @property
    def sampled_gradient(self) -> Callable[[jax.Array], Any] | None:
        factor = self.factor
        if factor is None:
            return None
        _, unravel = tree.ravel(tree.zeros_like(self.params_like))
        return lambda key: unravel(factor @ jax.random.rademacher(key, factor.shape[1:], factor.dtype))


def dense(matrix: np.ndarray, dtype: Any = jnp.float64, factor: np.ndarray | None = None) -> Any:
    """`matrix` on `like` if it has that size, else on `flat_like`."""
    n = len(matrix)
    shapes = like(dtype) if n == SIZE else flat_like(n, dtype)
    wide = tree.accumulation_dtype(dtype)
    return Dense(jnp.asarray(matrix, wide), shapes, None if factor is None else jnp.asarray(factor, wide))


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    """A dense symmetric matrix with these eigenvalues and a random eigenbasis."""
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    matrix = (q * eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def decaying(n: int, rate: float = 0.7) -> np.ndarray:
    return symmetric(rate ** np.arange(n))


def low_rank(n: int, rank: int) -> np.ndarray:
    return symmetric(np.concatenate([np.linspace(5, 1, rank), np.zeros(n - rank)]))


def indefinite(n: int) -> np.ndarray:
    return symmetric(np.linspace(-1, 3, n))


def flat(x: Any) -> np.ndarray:
    """One float64 NumPy vector of all leaves."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


def flat_rows(x: Any) -> np.ndarray:
    """As `flat`, for trees stacked along a leading axis: (m, n)."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(x)], axis=1)


def keys(m: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), m)


def assert_mean(samples: np.ndarray, exact: Any, sigmas: float = 5.0) -> None:
    """The mean of samples (m, ...) is `exact` to within `sigmas` standard errors."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - exact) <= sigmas * error + 1e-10 * np.max(np.abs(exact)))
