"""Estimators: relative error against curvature products, on spectra that decay slowly and fast.

The matrices are C = Q diag(s) Q^T with a random rotation Q, so that no estimator profits from coordinates:

    slow   s_i = i^-1/2          a flat tail: no subspace of a few dozen dimensions holds the trace
    fast   s_i = i^-2            what spectra of networks look like beyond their first eigenvalues
    steep  s_i = 10^(-i/10)      all but 1e-6 of the trace in 60 dimensions

Every estimate is drawn with many keys in float64; the percentiles of a row are those of the error over the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.schema import Row
from bench.workloads import SMALL
from curvax import tree
from curvax.curvature import Evaluation, GaussNewton, Model, Needs
from curvax.estimators import (
    DiagonalEstimator,
    ExactDiagonal,
    GaussNewtonBartlett,
    Hutchinson,
    HutchinsonTrace,
    HutchPlusPlus,
    RandomizedNystrom,
    TraceEstimator,
    XTrace,
)
from curvax.losses import SoftmaxCrossEntropy

SUITE = "estimators"
BEST = "best approximation of that rank"
_SPECTRA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "slow, i^-1/2": lambda i: i**-0.5,
    "fast, i^-2": lambda i: i**-2.0,
    "steep, 10^(-i/10)": lambda i: 10.0 ** (-i / 10),
}
_PRODUCTS = (6, 12, 24, 48, 96, 192)
_TRACES: dict[str, Callable[[int], TraceEstimator]] = {
    "HutchinsonTrace": HutchinsonTrace,
    "HutchPlusPlus": HutchPlusPlus,
    "XTrace": XTrace,
}


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Traces, low-rank approximations, then diagonals of a Gauss-Newton matrix.

    Args:
      quick: small matrices, few keys.
      only: substring of the case names to run.
    """
    n, draws, counts = (200, 20, _PRODUCTS[:2]) if quick else (1000, 200, _PRODUCTS)
    with jax.enable_x64(True):
        for name, decay in _SPECTRA.items():
            spectrum = decay(np.arange(1.0, n + 1))
            if only in f"trace, {name}":
                yield from (_traces(name, spectrum, count, draws) for count in counts)
            if only in f"low rank, {name}":
                yield from (_low_rank(name, spectrum, count, draws) for count in counts)
        if only in _DIAGONAL:
            yield from (_diagonals(count, draws) for count in counts)


def _traces(name: str, spectrum: np.ndarray, count: int, draws: int) -> list[Row]:
    product, like = _operator(spectrum)

    def errors(make: Callable[[int], TraceEstimator]) -> np.ndarray:
        values = _each_key(lambda key: make(count).trace(product, like, key).value, draws)
        return np.abs(values / spectrum.sum() - 1)

    # What estimates the trace of a smooth spectrum costs, over the plainest.
    return _rows(f"trace, {name}", count, {label: errors(make) for label, make in _TRACES.items()}, "HutchinsonTrace")


def _low_rank(name: str, spectrum: np.ndarray, count: int, draws: int) -> list[Row]:
    """Frobenius norm of what is left of C, over that of C; no approximation of that rank leaves less than the tail."""
    product, like = _operator(spectrum)
    matrix = jax.vmap(product)(jnp.eye(len(spectrum)))

    def left(key: jax.Array) -> jax.Array:
        pairs = RandomizedNystrom(count).low_rank(product, like, key)
        return jnp.linalg.norm(matrix - (pairs.basis * pairs.values) @ pairs.basis.T)

    total = np.linalg.norm(spectrum)
    results = {BEST: np.full(1, np.linalg.norm(spectrum[count:])) / total}
    results["RandomizedNystrom"] = _each_key(left, min(draws, 20)) / total
    return _rows(f"low rank, {name}", count, results, BEST)


_DIAGONAL = "diagonal of the Gauss-Newton matrix, 8-16-5 network, cross entropy"


def _diagonals(count: int, draws: int) -> list[Row]:
    """Norm of the error over that of the diagonal; a Bartlett draw costs one gradient, a probe one product."""
    curvature = GaussNewton(Model(SMALL.predict), SoftmaxCrossEntropy())
    params, batch = SMALL.params(), SMALL.batch(32)
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, (params, batch))

    def diagonal(estimator: DiagonalEstimator, key: jax.Array) -> jax.Array:
        needs = Needs(product=True, rows=True, sampling=True)
        return tree.ravel(estimator.diagonal(curvature.linearize(params, Evaluation(batch), needs), key))[0]

    exact = jax.jit(lambda: diagonal(ExactDiagonal(), jax.random.key(0)))()

    def error(estimator: DiagonalEstimator) -> np.ndarray:
        return _each_key(lambda key: jnp.linalg.norm(diagonal(estimator, key) - exact), draws) / jnp.linalg.norm(exact)

    estimators = {"Hutchinson": Hutchinson(count), "GaussNewtonBartlett": GaussNewtonBartlett(count)}
    return _rows(_DIAGONAL, count, {name: error(each) for name, each in estimators.items()}, "Hutchinson")


def _operator(spectrum: np.ndarray) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    n = len(spectrum)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    matrix = jnp.asarray((rotation * spectrum) @ rotation.T)
    return lambda v: matrix @ v, jnp.zeros(n)


def _each_key(function: Callable[[jax.Array], jax.Array], draws: int) -> np.ndarray:
    """The function's value for every key, a few at a time: a draw has a matrix of n rows."""
    keys = jax.random.split(jax.random.key(0), draws)
    return np.asarray(jax.jit(lambda k: jax.lax.map(function, k, batch_size=10))(keys))


def _rows(case: str, count: int, errors: dict[str, np.ndarray], baseline: str) -> list[Row]:
    base = float(np.median(errors[baseline]))
    return [
        Row(
            SUITE,
            case,
            provider,
            "relative error",
            f"{count} products",
            *run.percentiles(values),
            ratio=None if provider == baseline or base == 0 else float(np.median(values)) / base,
            baseline=None if provider == baseline else baseline,
            rounds=len(values),
        )
        for provider, values in errors.items()
    ]
