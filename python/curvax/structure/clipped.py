"""The sum of clipped gradients of single examples, in two passes back and without forming one of them.

    1. norms      n_b = |g_b|, from activations and cotangents (`exact.per_example_gradient_norms`)
    2. factors    c_b = min(1, C / n_b)
    3. sum        the gradient of sum_b c_b l_b: one more pass back with the residuals of example b times c_b

An example of two: g_0 = (3, 4) and g_1 = (0.6, 0.8) have norms 5 and 1. With C = 1 the factors are 1/5 and 1, and the
sum is (1.2, 1.6).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import meshes
from curvax.keywords import spread
from curvax.numbers import Number, is_known
from curvax.structure.exact import RowArguments, examples_of, norms_of, pull
from curvax.structure.positions import fill_idle_inputs
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class ClippedArguments(RowArguments):
    """The same, and where examples are clipped.

    Attributes:
      max_norm: C, the largest norm that an example contributes; positive, may be traced. It has the scale of what
        examples add to the gradient: with `reduction="sum"` of their own gradients, with "mean" of those over B.
    """

    _: dataclasses.KW_ONLY
    max_norm: Number

    def __post_init__(self) -> None:
        if is_known(self.max_norm) and not self.max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {self.max_norm}.")


class Clipped(NamedTuple):
    """What `clipped_gradient` returns.

    Attributes:
      gradient: the sum over examples of their gradients, none of them longer than `max_norm`; an upcast tree.
      norms: (B,) norms before clipping.
    """

    gradient: PyTree
    norms: jax.Array


@spread(ClippedArguments)
def clipped_gradient(arguments: ClippedArguments) -> Clipped:
    """The gradient with every example's part clipped to a norm, as DP-SGD sums it before it adds noise.

    See Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1, and Li et al., "Large Language
    Models Can Be Strong Differentially Private Learners" (2022) for two passes in the place of B. Noise is yours to
    add: with `reduction="sum"` it has the standard deviation `noise_multiplier * max_norm`. `predict_fn` must treat
    each example by itself.

    Raises:
      ValueError: the examples interact, so that no example has a gradient of its own; `max_norm` is not positive.
    """
    # The gradient is sharded like the parameters, the norms like the examples.
    like = (arguments.params, meshes.by_examples(arguments.inputs))
    return Clipped(*arguments.parts_on_any_mesh(_clipped, like))


def _clipped(arguments: ClippedArguments) -> tuple[PyTree, jax.Array]:
    at, captured = examples_of(arguments)
    # 1.
    norms = norms_of(at, captured)
    # 2.
    bound = jnp.asarray(arguments.max_norm).astype(norms.dtype)
    factors = jnp.minimum(1, bound / jnp.where(norms > 0, norms, bound))
    # 3. On inputs in which what weighs nothing holds numbers that do.
    filled = jax.tree.unflatten(
        jax.tree.structure(at.inputs), fill_idle_inputs(captured, jax.tree.leaves(at.inputs), at.weights)
    )
    outputs, vjp = jax.vjp(lambda p: at.predict(p, filled), at.params)
    residual = at.loss.gradient(outputs, at.targets, at.weights.values)
    residual = residual * factors.astype(residual.dtype).reshape(-1, *[1] * (residual.ndim - 1))
    return pull(vjp, outputs)(residual), norms
