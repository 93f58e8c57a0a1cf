"""A full or layerwise Gauss-Newton method as an Optax transformation."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.layerwise.method import InnerLoopMethod
from curvax.layerwise.state import OuterState
from curvax.tree import PyTree


def as_gradient_transformation(
    method: InnerLoopMethod, *, model_state: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer wrapped in the method's outer loop.

    `update(updates, state, params, *, batch, rng=None)` runs a whole step on `batch` and returns what
    `optax.apply_updates` adds to the parameters, zero for a step that is not taken. The incoming updates are read for
    nothing but their structure: a step takes its gradients itself, one per inner minibatch.

    Args:
      method: from `full_gn` or `layerwise_gn`.
      model_state: first model state, for models with `has_state`.

    Raises (in `update`):
      ValueError: `params` or `batch` is missing, or the parameters are masked.
    """

    def init(params: PyTree) -> OuterState:
        if not jax.tree.leaves(params):
            return method.init_empty(params, model_state=model_state)
        return method.init(params, model_state=model_state)

    def update(
        updates: PyTree,
        state: OuterState,
        params: PyTree | None = None,
        *,
        batch: Any = None,
        rng: jax.Array | None = None,
        **unused: Any,
    ) -> tuple[PyTree, OuterState]:
        del unused  # Optax passes every extra argument to every transformation of a chain.
        if not jax.tree.leaves(updates):
            return updates, dataclasses.replace(state, step=state.step + 1)
        if params is None or batch is None:
            raise ValueError("an inner loop needs parameters and data: call update(grads, state, params, batch=batch).")
        if any(isinstance(x, optax.MaskedNode) for x in jax.tree.leaves(params, is_leaf=_is_hole)):
            raise ValueError(
                "these parameters are masked (optax.masked or optax.partition), and an inner loop needs all of them: "
                "keep parameters from training with frozen= instead."
            )
        after, state, _ = method.step(params, batch, state, rng)
        return jax.tree.map(lambda new, old, like: _difference(new, old, like), after, params, updates), state

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _difference(new: jax.Array, old: jax.Array, like: jax.Array) -> jax.Array:
    if not jnp.issubdtype(new.dtype, jnp.floating):
        return jnp.zeros_like(like)
    # Of two bfloat16 numbers float32 holds the difference exactly, so that apply_updates arrives at the new one.
    return tree.upcast(new) - tree.upcast(old)
