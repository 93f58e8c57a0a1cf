"""The prior and the noise that make the data most probable: MacKay's evidence framework, by L-BFGS on logarithms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.laplace.posterior import Laplace
from curvax.laplace.prior import Prior


def tune_prior(posterior: Laplace, *, per_leaf: bool = False, noise: bool = False, max_steps: int = 100) -> Laplace:
    """The posterior with the prior precision, and the noise, that maximize `log_marginal_likelihood`.

    Parameters and curvature stay what they are. The prior of parameters that are zero and that no output depends on has
    no best precision: it grows as long as steps last.

    Args:
      posterior: where the search starts.
      per_leaf: a precision for each leaf (of Kronecker factors for each block); by default, False, one number.
      noise: whether the noise is tuned too, of a `SquaredError`; by default, False, it stays.
      max_steps: bound on the steps of L-BFGS; it stops when the gradient in the logarithms is as small as rounding.

    Raises:
      ValueError: the loss has no noise to tune, or `max_steps` is not positive.
    """
    if noise and not posterior.has_noise:
        raise ValueError(f"{posterior.loss} has no noise to tune: leave out noise=True.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
    start = posterior.prior
    groups = posterior.curvature.groups(len(start.sizes)) if per_leaf else (0,) * len(start.sizes)
    names = sorted(set(groups))

    def precision(logs: dict[str, jax.Array]) -> Prior:
        return Prior(tuple(jnp.exp(logs["precision"])), tuple(map(names.index, groups)), start.sizes)

    def cost(logs: dict[str, jax.Array]) -> jax.Array:
        return -posterior.log_marginal_likelihood(precision(logs), jnp.exp(logs["noise"]) if noise else None)

    logs = {"precision": jnp.log(jnp.stack([start.leaves[group] for group in names]))}
    if noise:
        logs["noise"] = jnp.log(posterior.noise)
    # The gradient in log p is half of (effective parameters - p |theta|^2): it has the scale of their number.
    size = tree.size(posterior.at.params)
    best = _minimized(cost, logs, max_steps, float(jnp.finfo(posterior.noise.dtype).eps) ** 0.5 * size)
    return posterior.replace(prior_precision=precision(best), noise=jnp.exp(best["noise"]) if noise else None)


def _minimized(cost: Any, start: Any, max_steps: int, tol: float) -> Any:
    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(cost)

    @jax.jit
    def run(start: Any) -> Any:
        def step(carry: tuple[Any, Any, jax.Array, jax.Array]) -> tuple[Any, Any, jax.Array, jax.Array]:
            x, state, count, _ = carry
            value, gradient = value_and_grad(x, state=state)
            updates, state = tx.update(gradient, state, x, value=value, grad=gradient, value_fn=cost)
            new = optax.apply_updates(x, updates)
            finite = tree.all_finite(new)
            return tree.where(finite, new, x), state, count + 1, finite & (tree.max_abs(gradient) > tol)

        def going(carry: tuple[Any, Any, jax.Array, jax.Array]) -> jax.Array:
            return (carry[2] < max_steps) & carry[3]

        first = (start, tx.init(start), jnp.zeros((), jnp.int32), jnp.asarray(True))
        return jax.lax.while_loop(going, step, first)[0]

    # Optax mixes the integers of its history.
    with jax.numpy_dtype_promotion("standard"):
        return run(start)
