"""The quantities: curvax, and the same as one writes it with `jax.jvp`, `jax.vjp` and `jax.vmap`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.workloads import PyTree, Workload
from curvax import laplace, operators, structure, tree
from curvax.losses import SoftmaxCrossEntropy

HAND = "jax.jvp and jax.vjp"
CURVAX = "curvax"
_LOSS = SoftmaxCrossEntropy()
_Batch = dict[str, jax.Array]
_Functions = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A quantity.

    Attributes:
      name: what it is.
      make: (params, batch, workload) -> functions that compute it, by who does.
      baseline: who the others are compared with.
    """

    name: str
    make: Callable[[PyTree, _Batch, Workload], _Functions]
    baseline: str = HAND


def _product_by_hand(work: Workload, params: PyTree, batch: _Batch) -> Callable[[PyTree], PyTree]:
    """v -> C v, C the Gauss-Newton matrix of the mean cross entropy."""

    def outputs(p: PyTree) -> jax.Array:
        return work.predict(p, batch["x"])

    def product(v: PyTree) -> PyTree:
        f, tangent = jax.jvp(outputs, (params,), (v,))
        p = jax.nn.softmax(f)
        inner = p * (tangent - jnp.sum(p * tangent, axis=-1, keepdims=True)) / f.shape[0]
        return jax.vjp(outputs, params)[1](inner)[0]

    return product


def _flat_product(work: Workload, params: PyTree, batch: _Batch) -> Callable[[jax.Array], jax.Array]:
    _, unravel = tree.ravel(params)
    product = _product_by_hand(work, params, batch)
    return jax.jit(lambda v: tree.ravel(product(unravel(v)))[0])


def _ggn(params: PyTree, batch: _Batch, work: Workload) -> Any:
    return operators.ggn(work.predict, _LOSS, params, batch)


def _product(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    v = jax.tree.map(jnp.ones_like, params)
    by_hand = jax.jit(lambda p, v: _product_by_hand(work, p, batch)(v))
    matrix = _ggn(params, batch, work)
    return {HAND: lambda: by_hand(params, v), CURVAX: lambda: matrix @ v}


def _columns(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    columns = jnp.asarray(np.random.default_rng(0).normal(size=(work.size, 8)), jnp.float32)
    by_hand = jax.jit(jax.vmap(_flat_product(work, params, batch), in_axes=1, out_axes=1))
    matrix = _ggn(params, batch, work)
    return {HAND: lambda: by_hand(columns), CURVAX: lambda: matrix @ columns}


def _diagonal(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    """By hand: rows S_b^T J_b of every example by vmapped reverse passes, squared."""

    def example(p: PyTree, x: jax.Array) -> PyTree:
        f, vjp = jax.vjp(lambda q: work.predict(q, x[None])[0], p)
        probabilities = jax.nn.softmax(f)
        root = jnp.diag(jnp.sqrt(probabilities)) - jnp.outer(probabilities, jnp.sqrt(probabilities))
        rows = jax.vmap(vjp, in_axes=1)(root)[0]
        return jax.tree.map(lambda r: jnp.sum(jnp.square(r), axis=0), rows)

    @jax.jit
    def by_hand(p: PyTree, x: jax.Array) -> PyTree:
        def add(total: PyTree, one: jax.Array) -> tuple[PyTree, None]:
            return tree.add(total, example(p, one)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, p), x)
        return jax.tree.map(lambda d: d / len(x), total)

    structured = jax.jit(lambda p: structure.ggn_diagonal(work.predict, _LOSS, p, batch["x"], batch["y"]))
    return {HAND: lambda: by_hand(params, batch["x"]), CURVAX: lambda: structured(params)}


def _kfac(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    """Factors and their eigenvectors, from the data."""
    return {
        CURVAX: lambda: operators.kfac(work.predict, _LOSS, params, batch).values,
        "curvax, EKFAC": lambda: operators.ekfac(work.predict, _LOSS, params, batch).values,
    }


def _trace(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    """To one percent: XTrace with 48 products, and signs with as many as its error takes."""
    product, matrix, key = _flat_product(work, params, batch), _ggn(params, batch, work), jax.random.key(0)
    probes = 256

    @jax.jit
    def by_hand(key: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(key, (probes, work.size), jnp.float32)
        return jnp.mean(jax.lax.map(lambda z: jnp.dot(z, product(z)), signs, batch_size=16))

    own = jax.jit(lambda m, k: operators.trace(m, k).value)
    return {HAND: lambda: by_hand(key), CURVAX: lambda: own(matrix, key)}


def _eigenpairs(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    """By hand: SciPy's Lanczos on a compiled product."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    product, matrix = _flat_product(work, params, batch), _ggn(params, batch, work)
    start: Any = LinearOperator((work.size,) * 2, matvec=lambda v: np.asarray(product(v.reshape(-1))), dtype=np.float32)
    first = np.random.default_rng(0).normal(size=work.size).astype(np.float32)
    by_hand: Any = eigsh
    return {
        HAND: lambda: by_hand(start, k=10, which="LA", tol=1e-3, v0=first)[0],
        CURVAX: lambda: operators.eigenpairs(matrix, 10, tol=1e-3).values,
    }


def _laplace_fit(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    def fit(form: laplace.Form) -> Callable[[], Any]:
        return lambda: laplace.fit(work.predict, _LOSS, params, batch, form=form).log_marginal_likelihood()

    return {CURVAX: fit(laplace.KFAC()), "curvax, diagonal": fit(laplace.Diagonal())}


def _laplace_predictive(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    """By hand: Jacobians of the examples, multiplied with the Kronecker factors' inverse root."""
    posterior, x = laplace.fit(work.predict, _LOSS, params, batch), batch["x"][:32]
    covariance = posterior.covariance()

    @jax.jit
    def by_hand(p: PyTree, operator: Any, x: jax.Array) -> jax.Array:
        product = operator.linearized()

        def one(example: jax.Array) -> jax.Array:
            rows = jax.jacrev(lambda q: work.predict(q, example[None])[0])(p)
            images = jax.vmap(product)(rows)
            return jax.vmap(lambda a: jax.vmap(lambda b: tree.vdot(a, b))(images))(rows)

        return jax.lax.map(one, x)

    return {HAND: lambda: by_hand(params, covariance, x), CURVAX: lambda: posterior.predict(x).covariance}


def _tangent_kernel(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    """By hand: both Jacobians by vmapped reverse passes, and their product."""
    half = max(1, min(16, len(batch["x"]) // 2))
    x, other = batch["x"][:half], batch["x"][half : 2 * half]

    @jax.jit
    def by_hand(p: PyTree, x: jax.Array, other: jax.Array) -> jax.Array:
        def rows(x: jax.Array) -> jax.Array:
            each = jax.vmap(lambda e: jax.jacrev(lambda q: work.predict(q, e[None])[0])(p))(x)
            return jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(each)], axis=-1)

        return jnp.einsum("bkn,cln->bkcl", rows(x), rows(other))

    own = jax.jit(lambda p, x, y: structure.jacobian_gram(work.predict, p, x, other=y))
    traced = jax.jit(lambda p, x, y: structure.jacobian_gram(work.predict, p, x, other=y, traced=True))
    return {
        HAND: lambda: by_hand(params, x, other),
        CURVAX: lambda: own(params, x, other),
        "curvax, traced over outputs": lambda: traced(params, x, other),
    }


def _clipped(params: PyTree, batch: _Batch, work: Workload) -> _Functions:
    """By hand: a gradient of every example, clipped, and their sum."""
    bound = 1e-2

    @jax.jit
    def by_hand(p: PyTree, batch: _Batch) -> PyTree:
        def one(x: jax.Array, y: jax.Array) -> PyTree:
            gradient = jax.grad(work.cross_entropy)(p, {"x": x[None], "y": y[None]})
            norm = tree.norm(gradient) / len(batch["y"])
            return jax.tree.map(lambda g: g / len(batch["y"]) * jnp.minimum(1, bound / norm), gradient)

        return jax.tree.map(lambda g: g.sum(axis=0), jax.vmap(one)(batch["x"], batch["y"]))

    own = jax.jit(
        lambda p, b: structure.clipped_gradient(work.predict, _LOSS, p, b["x"], b["y"], max_norm=bound).gradient
    )
    return {HAND: lambda: by_hand(params, batch), CURVAX: lambda: own(params, batch)}


CASES = (
    Case("Gauss-Newton product", _product),
    Case("8 Gauss-Newton products", _columns),
    Case("exact diagonal", _diagonal),
    Case("K-FAC fit", _kfac, CURVAX),
    Case("trace to 1 %", _trace),
    Case("top 10 eigenpairs", _eigenpairs),
    Case("Laplace fit and evidence, K-FAC", _laplace_fit, CURVAX),
    Case("Laplace predictive, K-FAC, 32 points", _laplace_predictive),
    Case("tangent kernel of two batches of 16", _tangent_kernel),
    Case("sum of clipped gradients", _clipped),
)
