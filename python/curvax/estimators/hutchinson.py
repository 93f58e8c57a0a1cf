"""Hutchinson's estimators of the diagonal and of the trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.estimators._columns import mean_and_error
from curvax.estimators.base import DiagonalEstimator, Product, TraceEstimate, TraceEstimator, check_count
from curvax.estimators.block_average import BlockAverage
from curvax.kernels._dispatch import Choice, Implementation, Op, Request
from curvax.kernels.diagonal_update import DiagonalEstimate
from curvax.kernels.hutchinson_reduce import HUTCHINSON_REDUCE, hutchinson_reduce
from curvax.tree import PyTree
from curvax.work import Cost, StepWork


@dataclasses.dataclass(frozen=True)
class Hutchinson(DiagonalEstimator):
    """mean of z * C z over Rademacher z: unbiased for diag(C).

    The variance of entry i is the sum of the squared off-diagonal entries of row i, divided by `n_probes`: a diagonal
    matrix is recovered exactly by one probe. See Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a
    matrix" (2007).

    Attributes:
      n_probes: probes, one curvature product each, taken as one batched product (so with `n_probes` times the memory of
        one). The default, 1, is what AdaHessian and Sophia use: the average over steps does the rest.
      use_abs: take magnitudes of the mean over the probes, before any averaging over blocks, as AdaHessian does.
        Biased.
      block_average: AdaHessian's averaging over blocks, or `None` (default) for none. Biased unless the diagonal is
        constant over each block.
      reduce: implementation of `hutchinson_reduce`, by name or as the planner's choice; `None` takes the best one.
    """

    n_probes: int = 1
    use_abs: bool = False
    block_average: BlockAverage | None = None
    reduce: Implementation | Choice | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("n_probes", self.n_probes)

    @property
    def needs_product(self) -> bool:
        return True

    @property
    def needs_sampling(self) -> bool:
        return False

    def cost(self, work: StepWork) -> Cost:
        return work.product.times(self.n_probes)

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        plain = self.n_probes == 1 and self.block_average is None
        return () if plain else ((HUTCHINSON_REDUCE, Request.of(upcast)),)

    def with_kernels(self, choices: Mapping[str, Choice]) -> Hutchinson:
        return dataclasses.replace(self, reduce=choices.get(HUTCHINSON_REDUCE.name, self.reduce))

    def diagonal(self, linearization: Linearization, key: jax.Array) -> PyTree:
        estimate = self.estimate(linearization, key).value()
        return jax.tree.map(lambda d, like: jnp.broadcast_to(d, like.shape), estimate, linearization.params_like)

    def estimate(self, linearization: Linearization, key: jax.Array) -> DiagonalEstimate:
        like = linearization.params_like
        product = linearization.product
        if product is None:
            raise ValueError("Hutchinson needs curvature products; linearize with `Needs(product=True)`.")
        if not tree.size(like):
            return DiagonalEstimate((tree.zeros_like(like),))
        if self.n_probes == 1:
            z = _rademacher(key, like)
            cz = product(z)
            if self.block_average is None:
                return DiagonalEstimate((z, cz), "magnitude" if self.use_abs else "product")
            zs, czs = jax.tree.map(lambda x: x[None], (z, cz))
        else:
            zs = jax.vmap(lambda k: _rademacher(k, like))(jax.random.split(key, self.n_probes))
            czs = jax.vmap(product)(zs)
        axes = None
        if self.block_average is not None:
            uses = None if linearization.leaf_axes is None else linearization.leaf_axes()
            axes = self.block_average.axes_of(like, uses)
        means = hutchinson_reduce(zs, czs, axes, use_abs=self.use_abs, implementation=self.reduce)
        return DiagonalEstimate((means,))


@dataclasses.dataclass(frozen=True)
class HutchinsonTrace(TraceEstimator):
    """Mean of z^T C z over Rademacher z: unbiased, standard deviation falling as 1/sqrt(n_probes).

    See Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines"
    (1989).

    Attributes:
      n_probes: probes, one product each, taken as one batched product. The default, 1, is the cheapest and has no error
        estimate (`standard_error` is infinite).
    """

    n_probes: int = 1

    def __post_init__(self) -> None:
        check_count("n_probes", self.n_probes)

    def trace(self, product: Product, like: PyTree, key: jax.Array) -> TraceEstimate:
        if not tree.size(like):
            zero = jnp.zeros((), tree.scalar_dtype(like))
            return TraceEstimate(zero, zero, 0)
        zs = jax.vmap(lambda k: _rademacher(k, like))(jax.random.split(key, self.n_probes))
        value, error = mean_and_error(jax.vmap(tree.vdot)(zs, jax.vmap(product)(zs)))
        return TraceEstimate(value, error, self.n_probes)


def _rademacher(key: jax.Array, like: PyTree) -> PyTree:
    """Independent random signs in the accumulation dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(k, x.shape, tree.accumulation_dtype(x.dtype)) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, signs)
