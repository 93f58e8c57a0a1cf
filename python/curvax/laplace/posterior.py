"""The posterior: evidence, covariance, samples, and predictions of the linearized model.

Predictions are those of f(theta) + J (w - theta), which is the model whose posterior the Gauss-Newton matrix describes
(Khan et al. 2019; Immer, Korzepa and Bauer 2021). Their covariance J Sigma J^T is made example by example:

    Kronecker factors, diagonal   from activations and cotangents in the factors' basis, no Jacobian (`structure`)
    full, low rank                J P^(-1/2) U by a product forward per eigenvector, and what is orthogonal to U from J
    J^T
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Evaluation, Model
from curvax.keys import check_key
from curvax.laplace.forms import DiagonalCurvature, KroneckerCurvature, SpectralCurvature, WeightCurvature
from curvax.laplace.prior import Prior
from curvax.losses import Loss, SigmoidBinaryCrossEntropy, SoftmaxCrossEntropy, SquaredError
from curvax.numbers import Number
from curvax.operators import Factored, LinearOperator
from curvax.operators.base import SymmetricOperator
from curvax.operators.curvature import At
from curvax.structure import jacobian_gram_diagonal
from curvax.structure.batch_rules import Mixed
from curvax.structure.capture import Capture, capture
from curvax.structure.find_blocks import find_blocks
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.structure.outputs import check_outputs
from curvax.structure.weighted_grams import BlockDiagonal, weighted_grams
from curvax.tree import PyTree


class Predictive(NamedTuple):
    """A Gaussian over the outputs of each example.

    Attributes:
      mean: (B, ...), the model's outputs.
      covariance: (B, K, K) with K outputs per example, flattened. Of targets with noise add noise^2 I.
    """

    mean: jax.Array
    covariance: jax.Array

    @property
    def variance(self) -> jax.Array:
        """(B, ...), of each output."""
        return jnp.diagonal(self.covariance, axis1=1, axis2=2).reshape(self.mean.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Covariance(SymmetricOperator):
    """P^(-1/2) g(M) P^(-1/2): the posterior's covariance, as an operator on trees of the parameters with a posterior.

    Attributes:
      inner: g(M).
      prior: P.
    """

    inner: Factored
    prior: Prior

    @property
    def domain(self) -> PyTree:
        return self.inner.domain

    @property
    def is_positive(self) -> bool:
        return True

    def linearized(self) -> Callable[[PyTree], PyTree]:
        prior, product = self.prior, self.inner.linearized()
        return lambda v: prior.scaled(product(prior.scaled(v, -0.5)), -0.5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Laplace:
    """A Gaussian posterior N(theta, (H / noise^2 + P)^-1), as `fit` returns it. It is a pytree, and works under
    `jax.jit`.

    Attributes:
      model, loss: static; the loss is summed.
      at: the parameters theta and what else the model takes.
      curvature: H.
      fit_loss: sum of the losses at theta.
      count: number of target numbers in the data.
      prior: P.
      noise: standard deviation of targets; 1 where there is none.
    """

    model: Model = dataclasses.field(metadata={"static": True})
    loss: Loss = dataclasses.field(metadata={"static": True})
    at: At
    curvature: WeightCurvature
    fit_loss: jax.Array
    count: jax.Array
    prior: Prior
    noise: jax.Array

    @property
    def has_noise(self) -> bool:
        """Whether targets scatter around the outputs by a noise that is a parameter."""
        return isinstance(self.loss, SquaredError)

    @property
    def params(self) -> PyTree:
        """All parameters, at the mean of the posterior."""
        return self.model.extras.partition.merge(self.at.params, self.at.frozen)

    @property
    def prior_precision(self) -> PyTree:
        """The prior's precision of each leaf, a tree of numbers like the parameters that have a posterior."""
        return jax.tree.unflatten(jax.tree.structure(self.at.params), self.prior.leaves)

    def replace(self, *, prior_precision: PyTree = None, noise: Number | None = None) -> Laplace:
        """The same with another prior or noise; nothing is measured anew."""
        prior = self.prior if prior_precision is None else Prior.of(prior_precision, self.at.params)
        changed = dataclasses.replace(self, prior=prior)
        return changed if noise is None else dataclasses.replace(changed, noise=jnp.asarray(noise, self.noise.dtype))

    def log_likelihood(self, noise: Number | None = None) -> jax.Array:
        """Of the data at theta. Of a Poisson loss and one of your own it leaves out what depends on targets alone."""
        if not self.has_noise:
            return -self.fit_loss
        sigma = self.noise if noise is None else jnp.asarray(noise, self.noise.dtype)
        return -self.fit_loss / sigma**2 - self.count * (jnp.log(sigma) + math.log(2 * math.pi) / 2)

    def log_marginal_likelihood(self, prior_precision: PyTree = None, noise: Number | None = None) -> jax.Array:
        """The evidence, log p(data) by Laplace's method; differentiable in both arguments.

            log p(data | theta) - theta.P theta / 2 - log det (I + M) / 2,    M = P^(-1/2) H P^(-1/2) / noise^2

        Args:
          prior_precision: a number, or a tree of numbers that is a prefix of the parameters; by default the
            posterior's.
          noise: by default the posterior's; losses other than `SquaredError` have none, and do not look at it.
        """
        return _evidence(self.replace(prior_precision=prior_precision, noise=noise))

    def covariance(self) -> LinearOperator:
        """The covariance of the parameters that have a posterior, an operator of `curvax.operators`."""
        return Covariance(self._whitened.shifted_inverse(1.0), self.prior)

    def root(self) -> Callable[[PyTree], PyTree]:
        """R with R R^T the covariance: of standard normal vectors it makes deviations from the mean."""
        prior, half = self.prior, self._whitened.inverse_root(1.0)
        return lambda z: prior.scaled(half.multiply(z), -0.5)

    def sample(self, key: jax.Array, n: int = 1) -> PyTree:
        """Parameters drawn from the posterior.

        Args:
          key: random key.
          n: how many.

        Returns:
          Parameters as the model takes them with a leading axis of n on every leaf, in their own dtypes.
        """
        check_key("key", key)
        return _drawn(self, key, n)

    def predict(self, inputs: Any, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Predictive:
        """The outputs of the linearized model, a Gaussian for each example.

        Args:
          inputs: as the model takes them.
          max_bytes: bound on the memory of rows and factors, 2 GiB by default.
        """
        return _predictive(self, inputs, max_bytes)

    def sample_outputs(self, inputs: Any, key: jax.Array, n: int = 1, *, linearized: bool = True) -> jax.Array:
        """Outputs at parameters drawn from the posterior, (n, B, ...); examples of one draw belong together.

        Args:
          inputs: as the model takes them.
          key, n: as in `sample`.
          linearized: f(theta) + J (w - theta), by a product forward (default); else f(w), the model itself.
        """
        check_key("key", key)
        return _drawn_outputs(self, inputs, key, n, linearized)

    def probabilities(self, inputs: Any, key: jax.Array | None = None, n: int = 100) -> jax.Array:
        """Probabilities of classes (or of a one, with `SigmoidBinaryCrossEntropy`), the posterior averaged over.

        Args:
          inputs: as the model takes them.
          key: averages over `n` draws of the linearized model's outputs; by default, `None`, MacKay's approximation of
            a probit (1992): outputs divided by sqrt(1 + pi variance / 8), without draws.
          n: draws, 100 by default.

        Raises:
          TypeError: the loss is not one of classes.
        """
        if not isinstance(self.loss, SoftmaxCrossEntropy | SigmoidBinaryCrossEntropy):
            raise TypeError(f"{self.loss} has no classes: use predict, or fit with SoftmaxCrossEntropy.")
        squash = jax.nn.softmax if isinstance(self.loss, SoftmaxCrossEntropy) else jax.nn.sigmoid
        if key is not None:
            return jnp.mean(squash(self.sample_outputs(inputs, key, n)), axis=0)
        predictive = self.predict(inputs)
        mean = tree.upcast(predictive.mean)
        return squash(mean * jax.lax.rsqrt(1 + jnp.asarray(math.pi / 8, mean.dtype) * predictive.variance))

    @property
    def _scale(self) -> jax.Array:
        return self.noise**-2 if self.has_noise else jnp.ones_like(self.noise)

    @property
    def _whitened(self) -> Factored:
        return self.curvature.whitened(self._scale, self.prior)

    def _deviations(self, key: jax.Array, n: int) -> PyTree:
        like = jax.eval_shape(tree.upcast, self.at.params)
        leaves, structure = jax.tree.flatten(like)
        keys = jax.random.split(key, max(len(leaves), 1))
        noise = [jax.random.normal(k, (n, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=False)]
        return jax.vmap(self.root())(jax.tree.unflatten(structure, noise))

    def _model(self, params: PyTree, inputs: Any) -> jax.Array:
        evaluation = Evaluation(None, self.at.frozen, self.at.model_state, self.at.key)
        return check_outputs(self.model.extras.call(self.model.predict_fn, params, inputs, evaluation)[0])

    def _upcast_model(self, inputs: Any) -> Callable[[PyTree], jax.Array]:
        return lambda p: tree.upcast(self._model(tree.cast_like(p, self.at.params), inputs))


@jax.jit
def _evidence(posterior: Laplace) -> jax.Array:
    theta = tree.upcast(posterior.at.params)
    log_det = posterior.curvature.log_det(posterior._scale, posterior.prior)
    return posterior.log_likelihood() - (posterior.prior.quadratic(theta) + log_det) / 2


@functools.partial(jax.jit, static_argnums=2)
def _drawn(posterior: Laplace, key: jax.Array, n: int) -> PyTree:
    at, partition = posterior.at, posterior.model.extras.partition

    def one(change: PyTree) -> PyTree:
        drawn = tree.cast_like(tree.add(tree.upcast(at.params), change), at.params)
        return partition.merge(drawn, at.frozen)

    return jax.vmap(one)(posterior._deviations(key, n))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _drawn_outputs(posterior: Laplace, inputs: Any, key: jax.Array, n: int, linearized: bool) -> jax.Array:
    at, changes, model = (
        tree.upcast(posterior.at.params),
        posterior._deviations(key, n),
        posterior._upcast_model(inputs),
    )
    if not linearized:
        return jax.vmap(lambda change: model(tree.add(at, change)))(changes)
    outputs, jvp = jax.linearize(model, at)
    return outputs + jax.vmap(jvp)(changes)


@functools.partial(jax.jit, static_argnums=2)
def _predictive(posterior: Laplace, inputs: Any, max_bytes: int) -> Predictive:
    outputs = posterior._model(posterior.at.params, inputs)
    return Predictive(outputs, _functional_covariance(posterior, inputs, tree.upcast(outputs), max_bytes))


def _functional_covariance(posterior: Laplace, inputs: Any, outputs: jax.Array, max_bytes: int) -> jax.Array:
    if isinstance(posterior.curvature, SpectralCurvature):
        return _by_products(posterior, posterior.curvature, inputs, outputs, max_bytes)
    try:
        # Blocks are of parts of leaves, as the curvature's were.
        parts = isinstance(posterior.curvature, KroneckerCurvature)
        captured = capture(posterior._model, posterior.at.params, inputs, approximate=parts)
    except Mixed:
        return _by_rows(posterior, inputs, outputs)
    by = _block_diagonal(posterior, captured)
    return weighted_grams(captured, posterior.at.params, inputs, outputs, by, max_bytes)


def _block_diagonal(posterior: Laplace, captured: Capture) -> BlockDiagonal:
    """The covariance in the form that an example's layers meet it in."""
    prior, scale, curvature = posterior.prior, posterior._scale, posterior.curvature
    if isinstance(curvature, KroneckerCurvature):
        # (I + M)^-1 with P^(-1/2) on both sides, in the blocks' own bases.
        inner, blocks = curvature.whitened(scale, prior).shifted_inverse(1.0), curvature.operator.blocks

        def over(values: jax.Array, leaf: int) -> jax.Array:
            return values / prior.leaves[leaf].astype(values.dtype)

        values = [over(v, block.leaf) for v, block in zip(inner.values, blocks.kronecker, strict=True)]
        diagonal = [over(v, block.leaf) for v, block in zip(inner.diagonal, blocks.diagonal, strict=True)]
        return BlockDiagonal(blocks, list(inner.bases), values, diagonal)
    assert isinstance(curvature, DiagonalCurvature)
    inner = curvature.whitened(scale, prior).shifted_inverse(1.0)
    leaves = jax.tree.leaves(prior.scaled(inner.values, -1.0))
    blocks = find_blocks(captured, [x.shape for x in leaves])
    return BlockDiagonal(
        blocks,
        [(None, None)] * len(blocks.kronecker),
        [block.take(leaves) for block in blocks.kronecker],
        [block.region.take(leaves[block.leaf]) for block in blocks.diagonal],
    )


def _by_products(
    posterior: Laplace, curvature: SpectralCurvature, inputs: Any, outputs: jax.Array, max_bytes: int
) -> jax.Array:
    """J P^(-1/2) (U diag(1 / (1 + m)) U^T + I - U U^T) P^(-1/2) J^T.

    The last two terms are those of a posterior of low rank: a full one has none, and with it nothing cancels.
    """
    prior, inner = posterior.prior, curvature.whitened(posterior._scale, posterior.prior)
    n, rank = inner.basis.shape
    _, unravel = tree.ravel(tree.zeros_like(posterior.at.params))
    _, jvp = jax.linearize(posterior._upcast_model(inputs), tree.upcast(posterior.at.params))

    def along(direction: jax.Array) -> jax.Array:
        return jvp(prior.scaled(unravel(direction), -0.5)).reshape(outputs.shape[0], -1)

    at_once = max(1, min(rank, max_bytes // max(1, 4 * outputs.size * outputs.dtype.itemsize)))
    seen = jax.lax.map(along, inner.basis.T, batch_size=at_once)  # (rank, B, K)
    if rank >= n:
        return jnp.einsum("rbk,r,rbl->bkl", seen, 1 / (1 + inner.values), seen, precision="highest")
    whole = _prior_covariance(posterior, prior, inputs, max_bytes)
    return whole - jnp.einsum("rbk,r,rbl->bkl", seen, inner.values / (1 + inner.values), seen, precision="highest")


def _prior_covariance(posterior: Laplace, prior: Prior, inputs: Any, max_bytes: int) -> jax.Array:
    """J P^-1 J^T of every example."""
    params = posterior.at.params
    if prior.uniform:
        return jacobian_gram_diagonal(posterior._model, params, inputs, max_bytes=max_bytes) / prior.leaves[0]

    def scaled(q: PyTree, x: Any) -> jax.Array:
        return posterior._model(tree.cast_like(tree.add(tree.upcast(params), prior.scaled(q, -0.5)), params), x)

    return jacobian_gram_diagonal(scaled, tree.zeros_like(params), inputs, max_bytes=max_bytes)


def _by_rows(posterior: Laplace, inputs: Any, outputs: jax.Array) -> jax.Array:
    """From the rows of one example after another, of a model whose examples interact."""
    _, vjp = jax.vjp(posterior._upcast_model(inputs), tree.upcast(posterior.at.params))
    product = posterior.covariance().linearized()
    examples, k = outputs.shape[0], math.prod(outputs.shape[1:])

    def one(index: jax.Array) -> jax.Array:
        basis = jnp.zeros((k, examples, k), outputs.dtype).at[:, index].set(jnp.eye(k, dtype=outputs.dtype))
        rows = jax.vmap(lambda u: vjp(u)[0])(basis.reshape(k, *outputs.shape))
        images = jax.vmap(product)(rows)
        return jax.vmap(lambda a: jax.vmap(lambda b: tree.vdot(a, b))(images))(rows)

    return jax.lax.map(one, jnp.arange(examples, dtype=jnp.int32))
