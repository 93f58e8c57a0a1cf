"""What the eigenvalues of a symmetric operator are, without its matrix.

Extreme ones come from SciPy's restarted Lanczos iteration. Sums of a function over all of them come from stochastic
Lanczos quadrature (Ubaru, Chen and Saad 2017): m steps of Lanczos from a random unit vector z give a tridiagonal T with

    z^T f(C) z  ~  sum_i w_i f(t_i),      t_i the eigenvalues of T, w_i the squared first entries of its eigenvectors

which is exact for polynomials of degree 2m - 1. Over random z the mean of n z^T f(C) z is the trace of f(C), and the
spread of the probes is its error bar. An example: C = diag(1, 3) and z = (1, 1) / sqrt(2) have T = [[2, 1], [1, 2]]
after two steps, so t = 1, 3 and w = 1/2, 1/2: the spectrum itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.estimators import HutchinsonTrace, XTrace
from curvax.estimators.base import TraceEstimate, TraceEstimator
from curvax.kernels.dense_linalg import eigh
from curvax.numbers import check_not_negative
from curvax.operators.base import LinearOperator, check_square
from curvax.operators.convert import as_scipy
from curvax.operators.factored import Factored
from curvax.sketches import columns_product

Ends = Literal["largest", "smallest", "magnitude", "both"]
_SCIPY: dict[str, Literal["LA", "SA", "LM", "BE"]] = {
    "largest": "LA", "smallest": "SA", "magnitude": "LM", "both": "BE"
}  # fmt: skip
_XTRACE = XTrace(64)


class Eigenpairs(NamedTuple):
    """Some eigenvalues and eigenvectors.

    Attributes:
      values: (k,), descending.
      vectors: (n, k), orthonormal columns on flat vectors.
    """

    values: jax.Array
    vectors: jax.Array


class Estimate(NamedTuple):
    """An estimate and its error bar.

    Attributes:
      value: scalar.
      standard_error: its estimated standard deviation; zero where the value is exact.
    """

    value: jax.Array
    standard_error: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadrature:
    """A spectrum as nodes and weights, a set for each probe.

    Attributes:
      nodes: (probes, steps), Ritz values.
      weights: (probes, steps), non-negative, one in sum over each probe.
      size: number n of eigenvalues; static.
    """

    nodes: jax.Array
    weights: jax.Array
    size: int = dataclasses.field(metadata={"static": True})

    def total(self, function: Callable[[jax.Array], jax.Array]) -> Estimate:
        """The sum of a function over all eigenvalues."""
        each = self.size * jnp.sum(jnp.where(self.weights > 0, self.weights * function(self.nodes), 0), axis=1)
        count = len(each)
        spread = jnp.std(each, ddof=1) / count**0.5 if count > 1 else jnp.full((), jnp.inf, each.dtype)
        return Estimate(jnp.mean(each), spread)

    def density(self, at: jax.Array, width: float | jax.Array | None = None) -> jax.Array:
        """The density of eigenvalues at some points, with a Gaussian in the place of each node.

        Args:
          at: (m,) points.
          width: standard deviation of the Gaussian; by default a hundredth of the range of the nodes.

        Returns:
          (m,) densities, one in integral.
        """
        low, high = jnp.min(self.nodes), jnp.max(self.nodes)
        spread = (high - low) / 100 if width is None else jnp.asarray(width)
        spread = jnp.where(spread > 0, spread, jnp.ones_like(spread))
        bells = jnp.exp(-0.5 * jnp.square((at[:, None, None] - self.nodes) / spread))
        return jnp.mean(jnp.sum(bells * self.weights, axis=2), axis=1) / (spread * (2 * np.pi) ** 0.5)


def eigenpairs(operator: LinearOperator, k: int, which: Ends = "largest", *, tol: float = 0.0) -> Eigenpairs:
    """Extreme eigenvalues and their eigenvectors, by `scipy.sparse.linalg.eigsh` on compiled products.

    It runs in Python, outside of `jax.jit`. All eigenvalues, or nearly all, come from the dense matrix.

    Args:
      operator: symmetric.
      k: how many.
      which: "largest" (default) and "smallest" by value, "magnitude" the largest in magnitude, "both" ends.
      tol: relative accuracy of the values; 0 (default) is that of rounding.

    Raises:
      ValueError: k is not between 1 and the number of parameters.
    """
    check_square(operator, "eigenpairs")
    n = operator.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} parameters, got {k}.")
    if which not in _SCIPY:
        raise ValueError(f"which must be one of {', '.join(_SCIPY)}, got {which!r}.")
    # Lanczos needs room beside what it is after; a matrix so small is decomposed at once.
    if n <= max(2 * k + 1, 64):
        values, vectors = np.linalg.eigh(np.asarray(operator.to_dense()))
        chosen = np.argsort(_rank(values, which))[:k]
    else:
        from scipy.sparse.linalg import eigsh

        start = np.random.default_rng(0).normal(size=n).astype(operator.dtype)
        solve: Any = eigsh  # whose stubs take whole numbers for a tolerance
        values, vectors = solve(as_scipy(operator), k=k, which=_SCIPY[which], tol=tol, v0=start)
        chosen = np.arange(k)
    order = chosen[np.argsort(-values[chosen])]
    return Eigenpairs(jnp.asarray(values[order]), jnp.asarray(vectors[:, order]))


def _rank(values: np.ndarray, which: Ends) -> np.ndarray:
    """Lower is wanted sooner."""
    ascending = np.arange(len(values), dtype=float)
    if which == "both":
        return np.minimum(ascending + 0.5, len(values) - 1 - ascending)
    return {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]


def spectrum(operator: LinearOperator, key: jax.Array, *, steps: int = 64, probes: int = 8) -> Quadrature:
    """The whole spectrum by stochastic Lanczos quadrature, `steps * probes` products.

    Args:
      operator: symmetric.
      key: random key.
      steps: of Lanczos; 64 (default) resolve a gap of a thousandth of the range. At most the number of parameters.
      probes: random vectors, 8 by default, all in one batched product; their spread is the error bar.
    """
    check_square(operator, "spectrum")
    n = operator.shape[0]
    if steps < 1 or probes < 1:
        raise ValueError(f"steps and probes must be at least 1, got {steps} and {probes}.")
    nodes, weights = _quadrature(operator, key, min(steps, n), probes)
    return Quadrature(nodes, weights, n)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quadrature(operator: LinearOperator, key: jax.Array, steps: int, probes: int) -> tuple[jax.Array, jax.Array]:
    n, dtype = operator.shape[0], operator.dtype
    product = columns_product(operator.linearized(), operator.domain)
    start = jax.random.normal(key, (n, probes), dtype)
    alphas, betas = _lanczos(product, start / jnp.linalg.norm(start, axis=0), steps)
    # Rows of T that lie beyond a breakdown are zero and apart: their first entries, so their weights, are zero.
    tridiagonal = jax.vmap(jnp.diag)(alphas) + jax.vmap(lambda b: jnp.diag(b, 1) + jnp.diag(b, -1))(betas[:, :-1])
    nodes, vectors = jnp.linalg.eigh(tridiagonal)
    return nodes, jnp.square(vectors[:, 0, :])


def _lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Diagonals and off-diagonals of T, (probes, steps) each, with full reorthogonalization.

    An off-diagonal that is rounding is a breakdown: the Krylov space is complete, and what follows is zero.
    """
    n, probes = start.shape
    eps = jnp.asarray(jnp.finfo(start.dtype).eps, start.dtype)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array], j: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        basis, q, scale = carry
        # 1. One product, and its component along q.
        basis = basis.at[j].set(q)
        image = product(q)
        alpha = jnp.sum(q * image, axis=0)
        # 2. Orthogonal to all before, twice, as once leaves what cancels.
        rest = image
        for _ in range(2):
            rest = rest - jnp.einsum("jnp,jp->np", basis, jnp.einsum("jnp,np->jp", basis, rest, precision="highest"),
                                     precision="highest")  # fmt: skip
        beta = jnp.linalg.norm(rest, axis=0)
        scale = jnp.maximum(scale, jnp.linalg.norm(image, axis=0))
        # 3. The next vector, or none.
        alive = beta > 16 * n**0.5 * eps * scale
        beta = jnp.where(alive, beta, jnp.zeros_like(beta))
        q = jnp.where(alive, rest / jnp.where(alive, beta, jnp.ones_like(beta)), jnp.zeros_like(rest))
        return (basis, q, scale), (alpha, beta)

    basis = jnp.zeros((steps, n, probes), start.dtype)
    carry = (basis, start, jnp.zeros((probes,), start.dtype))
    _, (alphas, betas) = jax.lax.scan(step, carry, jnp.arange(steps))
    return alphas.T, betas.T


SHARPNESS_STEPS = 10
"""Of Lanczos for a largest eigenvalue on the way: from the gradient, which lies along sharp directions, they are within
a few percent."""


def largest_eigenvalue(product: Callable[[Any], Any], start: Any, steps: int = SHARPNESS_STEPS) -> jax.Array:
    """The largest eigenvalue of a symmetric matrix, from below, by some steps of Lanczos; it works under `jax.jit`.

    Args:
      product: v -> C v on trees.
      start: the first vector, a tree; a zero one is taken for ones.
      steps: products; 10 by default. As many vectors are alive.
    """
    flat = tree.ravel(start)[0]
    flat = jnp.where(jnp.any(flat != 0), flat, jnp.ones_like(flat))
    matrix = columns_product(product, start)
    first = (flat / tree.norm(flat))[:, None]
    alphas, betas = _lanczos(matrix, first, min(steps, len(flat)))
    off = jnp.diag(betas[0, :-1], 1)
    # The vectors of a space that is complete are zero: so are their entries, which must not pass for eigenvalues.
    alive = jnp.cumprod(jnp.concatenate([jnp.ones_like(betas[0, :1]), jnp.sign(betas[0, :-1])]))
    values = eigh(jnp.diag(jnp.where(alive > 0, alphas[0], jnp.min(alphas[0]))) + off + off.T).values
    return values[-1]


def trace(operator: LinearOperator, key: jax.Array, *, estimator: TraceEstimator = _XTRACE) -> TraceEstimate:
    """The trace: exact of factored operators, else an unbiased estimate with its error bar.

    Args:
      operator: symmetric.
      key: random key; factored operators do not use it.
      estimator: `XTrace(64)` by default, the most accurate one for its products on spectra that decay.
    """
    check_square(operator, "trace")
    if isinstance(operator, Factored):
        value = operator.summed(lambda s: s)
        return TraceEstimate(value, jnp.zeros_like(value), 0)
    return estimator.trace(operator.linearized(), operator.domain, key)


def frobenius_norm(operator: LinearOperator, key: jax.Array, *, n_probes: int = 64) -> Estimate:
    """sqrt(tr C^2): exact of factored operators, else from |C z|^2 over random signs z, one product each.

    Args:
      operator: symmetric.
      key: random key.
      n_probes: products; the relative error is about sqrt(2 / n_probes) over the square root of the effective rank.
    """
    check_square(operator, "frobenius_norm")
    if isinstance(operator, Factored):
        value = jnp.sqrt(operator.summed(jnp.square))
        return Estimate(value, jnp.zeros_like(value))
    product = operator.linearized()
    found = HutchinsonTrace(n_probes).trace(lambda v: product(product(v)), operator.domain, key)
    value = jnp.sqrt(jnp.maximum(found.value, 0))
    return Estimate(value, found.standard_error / (2 * jnp.where(value > 0, value, jnp.ones_like(value))))


def log_determinant(
    operator: LinearOperator, lam: float | jax.Array, key: jax.Array, *, steps: int = 64, probes: int = 8
) -> Estimate:
    """log det (C + lam I): exact of factored operators, else by quadrature with an error bar.

    Args:
      operator: symmetric and positive semidefinite.
      lam: the shift; positive, unless C is definite.
      key, steps, probes: see `spectrum`.
    """
    check_not_negative("lam", lam)
    shift = jnp.asarray(lam, operator.dtype)
    if isinstance(operator, Factored):
        value = operator.summed(lambda s: jnp.log(s + shift))
        return Estimate(value, jnp.zeros_like(value))
    # What a semidefinite matrix has below zero is rounding.
    floor = 0.0 if operator.is_positive else -jnp.inf
    return spectrum(operator, key, steps=steps, probes=probes).total(lambda t: jnp.log(jnp.maximum(t, floor) + shift))


def effective_dimension(
    operator: LinearOperator, lam: float | jax.Array, key: jax.Array, *, steps: int = 64, probes: int = 8
) -> Estimate:
    """tr C (C + lam I)^-1, the number of directions in which C outweighs lam (MacKay 1992).

    Args:
      operator, lam, key, steps, probes: see `log_determinant`; lam is positive.
    """
    check_not_negative("lam", lam)
    shift = jnp.asarray(lam, operator.dtype)

    def part(t: jax.Array) -> jax.Array:
        return jnp.maximum(t, 0) / (jnp.maximum(t, 0) + shift)

    if isinstance(operator, Factored):
        value = operator.summed(part)
        return Estimate(value, jnp.zeros_like(value))
    return spectrum(operator, key, steps=steps, probes=probes).total(part)


def condition_number(operator: LinearOperator, lam: float | jax.Array = 0.0, *, tol: float = 1e-3) -> jax.Array:
    """The largest magnitude of an eigenvalue of C + lam I over the smallest of one of a semidefinite C.

    Args:
      operator: symmetric and positive semidefinite.
      lam: the shift; without one the answer of a singular matrix is infinite, or as large as rounding allows.
      tol: relative accuracy of the two eigenvalues.
    """
    check_not_negative("lam", lam)
    largest = eigenpairs(operator, 1, "largest", tol=tol).values[0] + lam
    smallest = jnp.maximum(eigenpairs(operator, 1, "smallest", tol=tol).values[0], 0) + lam
    return largest / smallest
