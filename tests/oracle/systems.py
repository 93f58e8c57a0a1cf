"""Linear systems for the tests of the ops on many of them, and their oracle in float64 NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import ffi
from curvax.kernels import Implementation, Op, Request

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "native")
SIZES = (1, 2, 3, 31, 33, 64, 100, 256)


def skip_unless_supported(implementation: Implementation, op: Op | None = None, *operands: Any) -> None:
    """Skips a test where the implementation is not built, or on a GPU cannot take these operands of `op`."""
    if implementation == "native" and not ffi.native_status().available:
        pytest.skip(ffi.native_status().reason)
    variant = None if op is None or jax.default_backend() == "cpu" else op.variant(implementation)
    reason = None if variant is None else variant.cannot(Request.of(*operands))
    if reason is not None:
        pytest.skip(reason)


def positive(batch: tuple[int, ...], n: int, condition: float = 100.0, seed: int = 0) -> np.ndarray:
    """Symmetric positive definite matrices with eigenvalues from 1 down to 1 / condition, float64."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((*batch, n, n)))
    a = np.einsum("...ij,j,...kj->...ik", q, np.geomspace(1, 1 / condition, n), q)
    return (a + np.swapaxes(a, -1, -2)) / 2


def vectors(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The solutions, by LU in float64."""
    shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-1])
    a, b = np.broadcast_to(a, shape + a.shape[-2:]), np.broadcast_to(b, shape + b.shape[-1:])
    return np.linalg.solve(a.astype(np.float64), b.astype(np.float64)[..., None])[..., 0]


def relative_residual(a: Any, b: Any, x: Any) -> np.ndarray:
    a, b, x = (np.asarray(v, np.float64) for v in (a, b, x))
    return np.linalg.norm(b - np.einsum("...ij,...j->...i", a, x), axis=-1) / np.linalg.norm(b, axis=-1)


def eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


@dataclasses.dataclass
class Textbook:
    """What conjugate gradients as the textbook has them find for one system."""

    value: np.ndarray
    iterations: int


def textbook(
    a: np.ndarray,
    b: np.ndarray,
    rtol: float,
    maxiter: int,
    start: np.ndarray | None = None,
    m: np.ndarray | None = None,
) -> Textbook:
    x = np.zeros_like(b) if start is None else start.copy()
    r = b - a @ x
    z = r if m is None else r / m
    p, rz = z, r @ z
    for i in range(maxiter):
        if np.linalg.norm(r) <= rtol * np.linalg.norm(b):
            return Textbook(x, i)
        q = a @ p
        alpha = rz / (p @ q)
        x, r = x + alpha * p, r - alpha * q
        z = r if m is None else r / m
        rz, before = r @ z, rz
        p = z + rz / before * p
    return Textbook(x, maxiter)
