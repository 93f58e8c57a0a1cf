"""XTrace."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.estimators._columns import exact_trace, mean_and_error
from curvax.estimators.base import Product, TraceEstimate, TraceEstimator, check_count
from curvax.kernels.dense_linalg import triangular_solve
from curvax.sketches import columns_product, matmul, orthonormal
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class XTrace(TraceEstimator):
    """The exchangeable Hutch++: every test vector serves both the sketch and the remainder; unbiased.

    From k = n_products // 2 test vectors w_i take k estimates: the i-th leaves w_i out of the sketch, so that w_i is
    independent of its range, and spends it on the remainder. Their mean is the value, usually the most accurate one
    here for its products, and their spread estimates the error. C of rank below k is exact. See Epperly, Tropp and
    Webber, "XTrace: Making the Most of Every Sample in Stochastic Trace Estimation" (2024).

    Attributes:
      n_products: curvature products, at least 4; of an odd number one is not used. Where half of it reaches the
        number n of parameters, the n diagonal entries are computed instead, exactly.
    """

    n_products: int

    def __post_init__(self) -> None:
        check_count("n_products", self.n_products, least=4)

    def trace(self, product: Product, like: PyTree, key: jax.Array) -> TraceEstimate:
        n, dtype = tree.size(like), tree.scalar_dtype(like)
        k = self.n_products // 2
        if n <= k:
            return exact_trace(product, like)
        multiply = columns_product(product, like)
        weights = jax.random.normal(key, (n, k), dtype)
        y = multiply(weights)
        q = orthonormal(y)
        value, error = mean_and_error(_leave_one_out(weights, y, q, multiply(q)))
        return TraceEstimate(value, error, 2 * k)


def _leave_one_out(weights: jax.Array, y: jax.Array, q: jax.Array, z: jax.Array) -> jax.Array:
    """The k estimates, from Y = C Omega = Q R and Z = C Q.

    The range of Y without column i is that of Q (I - s_i s_i^T), with s_i the unit vector orthogonal to all columns
    of R but the i-th. So with H = Q^T Z and x_i = (I - s_i s_i^T) Q^T w_i, the part of w_i outside of that range is
    u_i = w_i - Q x_i, its image C u_i = y_i - Z x_i costs no product, and

        t_i = tr H - s_i^T H s_i + (n - k + 1) u_i^T C u_i / |u_i|^2.

    Given the range, u_i / |u_i| is uniform on the unit sphere of its complement, of dimension n - k + 1: the last
    term is unbiased for the trace there, and dividing by |u_i|^2 takes out the variance that the length of w_i would
    bring.
    """
    n, k = weights.shape
    s = _left_out_directions(matmul(q.T, y))
    w, h = matmul(q.T, weights), matmul(q.T, z)
    x = w - s * jnp.sum(s * w, axis=0)
    u = weights - matmul(q, x)
    cu = y - matmul(z, x)
    dimension = jnp.asarray(n - k + 1, weights.dtype)
    remainder = dimension * jnp.sum(u * cu, axis=0) / jnp.sum(u * u, axis=0)
    return jnp.trace(h) - jnp.sum(s * matmul(h, s), axis=0) + remainder


def _left_out_directions(r: jax.Array) -> jax.Array:
    """Unit s_i (columns) orthogonal to every column of R but the i-th: the normalized columns of R^-T.

    Substitution makes each of them so to rounding of R, however small the diagonal of R is. Where that is below
    rounding itself (C of low rank) it is raised to it, which changes R by no more.
    """
    largest = jnp.max(jnp.abs(r))
    unit = r / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    diagonal = jnp.diagonal(unit)
    least = jnp.where(largest > 0, float(jnp.finfo(r.dtype).eps), jnp.ones_like(largest))
    raised = jnp.where(jnp.abs(diagonal) < least, least, diagonal)
    s = triangular_solve(unit.T + jnp.diag(raised - diagonal), jnp.eye(r.shape[0], dtype=r.dtype))
    s = s / jnp.max(jnp.abs(s), axis=0)
    return s / jnp.sqrt(jnp.sum(s * s, axis=0))
