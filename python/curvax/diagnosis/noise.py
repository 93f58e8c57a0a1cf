"""The gradient noise scale: the batch size at which noise and signal of a gradient are equal.

With the gradients g_i of single examples of weight w_i, one in sum, and G = sum w_i g_i (McCandlish et al., "An
Empirical Model of Large-Batch Training", 2018, in its simple form)

    tr S   = sum w_i |g_i - G|^2 / (1 - sum w_i^2)         the noise of one example
    |G|^2 - tr S sum w_i^2                                 the signal, without what noise adds to the square
    B      = tr S / signal

An example: g = 0 and g = 2, weights 1/2: G = 1, tr S = 1 / (1/2) = 2, signal 1 - 2/2 = 0: these two say nothing of a
direction, and B is infinite. Norms of single gradients come from the layers (`curvax.structure`). Where examples
interact, batches take the place of examples, and B counts in examples all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import GaussNewton, Needs
from curvax.operators import CurvatureOperator
from curvax.operators.curvature import At
from curvax.structure.exact import gradient_norms
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class GradientNoise:
    """The noise of the gradient of the mean loss.

    Attributes:
      loss: the mean loss.
      gradient_norm: |G|.
      examples: examples in the data.
      batch: examples in the largest batch.
      scale: B, the batch size at which noise and signal are equal; infinite where no signal is seen, NaN where nothing
        can be said (one example, or one batch of examples that interact).
      source: what it was measured on, in words.
    """

    loss: float
    gradient_norm: float
    examples: int
    batch: int
    scale: float
    source: str

    @property
    def suggested_batch(self) -> int | None:
        """The power of two next to B: beyond it more examples in a step buy little; `None` if B is not known."""
        if not math.isfinite(self.scale):
            return None
        return 2 ** max(0, round(math.log2(max(self.scale, 1.0))))

    def __str__(self) -> str:
        if math.isnan(self.scale):
            said = f"noise scale unknown: {self.source}"
        elif math.isinf(self.scale):
            said = f"noise scale infinite: no signal in {self.examples} examples ({self.source})"
        else:
            said = f"noise scale {self.scale:.3g} examples, so batches of about {self.suggested_batch} ({self.source})"
        return f"loss {self.loss:.4g}, gradient norm {self.gradient_norm:.3g}; {said}"


def gradient_noise(matrix: CurvatureOperator) -> GradientNoise:
    """Of a curvature over one batch or several, under a mean."""
    curvature, at = matrix.curvature, matrix.at
    assert isinstance(curvature, GaussNewton)
    keys = [jnp.asarray(i, jnp.int32) for i in range(len(matrix.batches))]
    parts = [_gradient(curvature, at, b, i) for b, i in zip(matrix.batches, keys, strict=True)]
    shares = [float(share) for share in matrix.shares]
    sizes = [int(size) for _, _, size in parts]
    gradient = _weighted([g for _, g, _ in parts], shares)
    loss = sum(share * float(value) for share, (value, _, _) in zip(shares, parts, strict=True))
    squared = float(tree.vdot(gradient, gradient))
    try:
        several = [_examples(curvature, at, b, i) for b, i in zip(matrix.batches, keys, strict=True)]
    except ValueError:
        moments = _between_batches([g for _, g, _ in parts], gradient, shares, sizes)
        source = "from the spread of batches, as examples interact"
    else:
        second = sum(share * float(x) for share, (x, _) in zip(shares, several, strict=True))
        weights = sum(share**2 * float(w) for share, (_, w) in zip(shares, several, strict=True))
        moments = _noise(second - squared, weights)
        source = f"from {sum(sizes)} gradients of single examples"
    if moments is None:
        return GradientNoise(loss, squared**0.5, sum(sizes), max(sizes), math.nan, "pass several examples, or batches")
    noise, weights = moments
    signal = squared - noise * weights
    scale = noise / signal if signal > 0 else math.inf if noise > 0 else math.nan
    return GradientNoise(loss, squared**0.5, sum(sizes), max(sizes), scale, source)


def _noise(spread: float, weights: float) -> tuple[float, float] | None:
    """(tr S, sum of squared weights) from sum w |g|^2 - |G|^2; `None` of one example."""
    if weights >= 1 - 1e-6:  # rounding of shares that add up to one
        return None
    return max(spread, 0.0) / (1 - weights), weights


def _between_batches(
    gradients: Sequence[PyTree], mean: PyTree, shares: Sequence[float], sizes: Sequence[int]
) -> tuple[float, float] | None:
    """The same from gradients of batches, whose noise is that of an example over their size."""
    apart = [jax.tree.map(jnp.subtract, g, mean) for g in gradients]
    spread = sum(share * float(tree.vdot(d, d)) for share, d in zip(shares, apart, strict=True))
    found = _noise(spread, sum(share**2 for share in shares))
    if found is None:
        return None
    size = sum(share * n for share, n in zip(shares, sizes, strict=True))
    return found[0] * size, found[1] / size


def _weighted(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    scaled = [jax.tree.map(lambda x, w=w: w * x, t) for t, w in zip(trees, weights, strict=True)]
    return functools.reduce(tree.add, scaled)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(curvature: GaussNewton, at: At, batch: Any, index: jax.Array) -> tuple[jax.Array, PyTree, jax.Array]:
    """(loss, gradient, examples) of a batch."""
    evaluation = curvature.prepare(at.params, at.evaluation(batch, index))
    found = curvature.linearize(at.params, evaluation, Needs(gradient=True))
    count = jax.eval_shape(curvature.forward, at.params, evaluation).shape[0]
    return found.loss, tree.upcast(found.gradient), jnp.asarray(count)


@functools.partial(jax.jit, static_argnums=0)
def _examples(curvature: GaussNewton, at: At, batch: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of w |g|^2, sum of w^2) over the examples of a batch, whose weights are one in sum.

    Raises:
      ValueError: the examples interact.
    """
    evaluation = curvature.prepare(at.params, at.evaluation(batch, index))
    found = curvature.linearize(at.params, evaluation, Needs(rows=True, gradient=True))
    rows = found.rows
    if rows is None or rows.source is None or found.output_gradient is None or curvature.couples_examples:
        raise ValueError("examples have no gradients of their own.")
    parts = gradient_norms(rows.source, found.output_gradient)
    weights = curvature.effective_weights(at.params, evaluation)
    weights = weights.reshape(weights.shape[0], -1).sum(axis=1)
    weights = weights / jnp.sum(weights)
    some = weights > 0
    squares = jnp.where(some, jnp.square(parts) / jnp.where(some, weights, 1), 0)
    return jnp.sum(squares), jnp.sum(jnp.square(weights))
