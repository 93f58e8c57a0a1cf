"""Shampoo (Gupta, Koren and Singer 2018, arXiv 1802.09568) for Optax."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.kernels.dense_linalg import eigh
from curvax.optimizers.matrices import Factors, multiply, outer, sides


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`, one entry per leaf of the parameters in the order of `jax.tree.leaves`.

    Attributes:
      count: updates so far, int32.
      factors: accumulated G G^T and G^T G.
      roots: their inverse roots, as of the last refresh.
      graft: state of the transformation that lends its norms, `()` without one.
    """

    count: jax.Array
    factors: tuple[Factors, ...]
    roots: tuple[Factors, ...]
    graft: Any


def scale_by_shampoo(
    *,
    beta2: float | None = None,
    eps: float = 1e-4,
    every: int = 1,
    max_dim: int = 8192,
    graft: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """G -> L^(-1/4) G R^(-1/4) with L = eps I + sum G G^T and R = eps I + sum G^T G; of a vector H^(-1/2) g.

    Leaves with more than two axes are stacks of matrices over their last two; scalars are vectors of length one.

    Args:
      beta2: decay of L and R as bias-corrected averages; `None` sums them up as the paper does.
      eps: the multiple of the identity that L and R start from, in units of squared gradients; 1e-4 in the paper.
      every: updates between two refreshes of the roots, which take an eigendecomposition of each factor.
      max_dim: a side longer than this keeps only the diagonal of its factor (the paper's diagonal Shampoo).
      graft: a transformation such as `optax.scale_by_adam()` that sees the same gradients and lends each matrix's
        update its Frobenius norm, so that a learning rate means what it means for that transformation (Anil et al.
        2020, arXiv 2002.09018). `None` keeps Shampoo's own norms, as the first paper does.

    Raises:
      ValueError: `every` or `eps` is not positive, or `beta2` is not in [0, 1).
    """
    if every < 1 or eps <= 0 or (beta2 is not None and not 0 <= beta2 < 1):
        raise ValueError("scale_by_shampoo takes every >= 1, eps > 0 and beta2 in [0, 1) or None.")

    def init(params: Any) -> ShampooState:
        leaves = [_wide(p) for p in jax.tree.leaves(params)]
        shapes = [
            [(x.shape[:-2] + (d,) * (2 if dense else 1), dense) for d, dense in sides(x, max_dim)] for x in leaves
        ]
        zeros = tuple(tuple(jnp.zeros(s, x.dtype) for s, _ in of) for of, x in zip(shapes, leaves, strict=True))
        lender = () if graft is None else graft.init(params)
        return ShampooState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, zeros), lender)

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        leaves, structure = jax.tree.flatten(updates)
        wide = [_wide(g) for g in leaves]
        count = state.count + 1
        factors = tuple(_accumulated(g, old, beta2) for g, old in zip(wide, state.factors, strict=True))

        def refresh() -> tuple[Factors, ...]:
            return tuple(
                tuple(_inverse_root(_shifted(f, count, g, beta2, eps), g, 2 * len(of)) for f in of)
                for of, g in zip(factors, wide, strict=True)
            )

        roots = jax.lax.cond(state.count % every == 0, refresh, lambda: state.roots)
        moved = [_applied(g, of) for g, of in zip(wide, roots, strict=True)]
        lender = state.graft
        if graft is not None:
            lent, lender = graft.update(updates, state.graft, params)
            moved = [_with_norm(m, _wide(x)) for m, x in zip(moved, jax.tree.leaves(lent), strict=True)]
        narrow = [m.reshape(x.shape).astype(x.dtype) for m, x in zip(moved, leaves, strict=True)]
        return jax.tree.unflatten(structure, narrow), ShampooState(count, factors, roots, lender)

    # Optax's types allow arrays and containers as states; a named tuple of tuples of arrays is a pytree all the same.
    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    beta2: float | None = None,
    eps: float = 1e-4,
    every: int = 1,
    max_dim: int = 8192,
    graft: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """`scale_by_shampoo` with momentum on the preconditioned gradient, decoupled weight decay and a learning rate.

    Args:
      learning_rate: scalar or schedule. `optax.inject_hyperparams` can carry it, with every other number as
        `static_args=`: what shapes the state cannot be traced.
      momentum: decay of an exponential average of the preconditioned gradients; 0.9 as in the paper's experiments.
      weight_decay: times the learning rate.
      beta2, eps, every, max_dim, graft: as in `scale_by_shampoo`.
    """
    return optax.chain(
        scale_by_shampoo(beta2=beta2, eps=eps, every=every, max_dim=max_dim, graft=graft),
        optax.ema(momentum, debias=False),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _wide(x: jax.Array) -> jax.Array:
    return jnp.atleast_1d(x).astype(tree.wide_dtype(x.dtype))


def _accumulated(gradient: jax.Array, factors: Factors, beta2: float | None) -> Factors:
    new = []
    for side, old in enumerate(factors):
        term = outer(gradient, side, dense=old.ndim == max(gradient.ndim, 2))
        new.append(old + term if beta2 is None else beta2 * old + (1 - beta2) * term)
    return tuple(new)


def _shifted(factor: jax.Array, count: jax.Array, gradient: jax.Array, beta2: float | None, eps: float) -> jax.Array:
    """The factor with its bias corrected, plus eps times the identity."""
    if beta2 is not None:
        factor = factor / (1 - jnp.asarray(beta2, factor.dtype) ** count.astype(factor.dtype))
    dense = factor.ndim == max(gradient.ndim, 2)
    return factor + (eps * jnp.eye(factor.shape[-1], dtype=factor.dtype) if dense else eps)


def _inverse_root(factor: jax.Array, gradient: jax.Array, order: int) -> jax.Array:
    """factor^(-1/order)."""
    if factor.ndim < max(gradient.ndim, 2):
        return factor ** (-1 / order)
    pairs = eigh(factor)
    values, vectors = pairs.values, pairs.vectors
    # Rounding may leave an eigenvalue below the eps that was added: no eigenvalue is known better than to this.
    least = jnp.finfo(values.dtype).eps * values[..., -1:]
    scaled = vectors * (jnp.maximum(values, least) ** (-1 / order))[..., None, :]
    return jnp.matmul(scaled, jnp.swapaxes(vectors, -1, -2), precision=jax.lax.Precision.HIGHEST)


def _applied(gradient: jax.Array, roots: Factors) -> jax.Array:
    for side, root in enumerate(roots):
        gradient = multiply(root, gradient, side)
    return gradient


def _with_norm(update: jax.Array, like: jax.Array) -> jax.Array:
    """Each matrix of `update` (a vector as a whole) as long as that of `like`, zero where it is zero."""
    axes = tuple(range(max(update.ndim - 2, 0), update.ndim))

    def length(x: jax.Array) -> jax.Array:
        top = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        unit = x / jnp.where(top > 0, top, jnp.ones_like(top))
        return top * jnp.sqrt(jnp.sum(unit * unit, axis=axes, keepdims=True))

    own = length(update)
    return update * (length(like) / jnp.where(own > 0, own, jnp.ones_like(own)))
