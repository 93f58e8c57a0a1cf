"""How far rounding moves a loss: what a decrease must exceed to mean anything."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.tree import PyTree

MARGIN = 8.0
"""Losses of networks of 2 to 5 layers in float32, at levels from 1 to 1e-12 of where they started, differed from their
float64 values by 0.4 to 5 times what is estimated below (standard deviation over nearby parameters), at most by 13."""


def loss_rounding(loss: jax.Array, outputs: jax.Array | None = None, gradient: jax.Array | None = None) -> jax.Array:
    """What rounding may add to a loss, or take from it.

    The loss is a sum, rounded to its own unit; each output f_i is rounded too, independently of the others, and moves
    the loss by its gradient r_i. Near an optimum the second part is what counts: r_i f_i is not small against a loss
    that is a small difference of large outputs and targets.

    Args:
      loss: scalar.
      outputs: what the loss is taken of; `None` where that is not known, and then the estimate is too low near optima.
      gradient: of the loss in the outputs, shaped like them.

    Returns:
      a scalar in the dtype of the loss, at least 0: 8 times the sum of both parts, the second as a root of squares.
    """
    bound = jnp.abs(loss) * jnp.asarray(jnp.finfo(loss.dtype).eps, loss.dtype)
    if outputs is not None and gradient is not None:
        eps = jnp.asarray(jnp.finfo(outputs.dtype).eps, gradient.dtype)
        # An output of weight zero may hold anything.
        each = jnp.where(gradient == 0, jnp.zeros_like(gradient), gradient * outputs.astype(gradient.dtype))
        bound = bound + (eps * tree.norm(each)).astype(bound.dtype)
    return jnp.asarray(MARGIN, bound.dtype) * bound


def measured_rounding(value: Callable[[PyTree], jax.Array], params: PyTree, loss: jax.Array) -> jax.Array:
    """`loss_rounding` of a function of which nothing is known, by second differences over a rounding unit or two.

    Parameters go up and down by two of their own rounding units, with alternating signs. The slope drops out of the sum
    of both less twice the loss, and the curvature over so short a way is at the level of rounding itself.

    Args:
      value: params -> scalar loss; called four times, one after another.
      params: where. Leaves narrower than the loss stay: their own rounding unit is a long way.
      loss: value(params).

    Returns:
      a scalar, at least `loss_rounding(loss)`: twice the norm of two second differences, each of which varies as six
      rounding errors do.
    """
    eps = float(jnp.finfo(loss.dtype).eps)

    def nudged(p: jax.Array, probe: jax.Array) -> jax.Array:
        if jnp.finfo(p.dtype).bits < jnp.finfo(loss.dtype).bits:
            return p
        position = jnp.arange(p.size, dtype=jnp.int32).reshape(p.shape)
        odd = (jnp.right_shift(position, probe // 2) + probe) % 2
        return p * (1 + (2 * eps) * (1 - 2 * odd).astype(p.dtype))

    values = jax.lax.map(lambda k: value(jax.tree.map(lambda p: nudged(p, k), params)), jnp.arange(4, dtype=jnp.int32))
    differences = (values[0::2] - loss) + (values[1::2] - loss)
    return jnp.maximum(loss_rounding(loss), 2 * tree.norm(differences).astype(loss.dtype))
