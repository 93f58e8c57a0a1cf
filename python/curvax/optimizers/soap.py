"""SOAP (Vyas et al. 2024, arXiv 2409.11321) for Optax: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.kernels.dense_linalg import eigh, qr
from curvax.optimizers.matrices import multiply, outer, sides


class SoapState(NamedTuple):
    """State of `scale_by_soap`, one entry per leaf of the parameters in the order of `jax.tree.leaves`.

    Attributes:
      count: updates so far, int32.
      mean: average gradients, in the parameters' basis.
      square: average squared gradients, in the eigenbasis.
      factors: averages of G G^T and G^T G, for sides that have a basis.
      bases: their eigenvectors in columns, by falling eigenvalue, as of the last refresh.
    """

    count: jax.Array
    mean: tuple[jax.Array, ...]
    square: tuple[jax.Array, ...]
    factors: tuple[dict[int, jax.Array], ...]
    bases: tuple[dict[int, jax.Array], ...]


def scale_by_soap(
    *, beta1: float = 0.95, beta2: float = 0.95, eps: float = 1e-8, every: int = 10, max_dim: int = 10000
) -> optax.GradientTransformation:
    """G -> Q_L N Q_R^T with N Adam's update of Q_L^T G Q_R, Q_L and Q_R the eigenvectors of averaged G G^T and G^T G.

    The bases come from eigendecompositions at the first update and from one step of orthogonal iteration at every
    `every`-th one, as in the paper; between them the columns are kept in the order of falling eigenvalues, the second
    moments along with them, as in the authors' code. Unlike the authors' code the first update is not left out.

    Leaves with more than two axes are stacks of matrices over their last two; vectors and scalars get plain Adam.

    Args:
      beta1, beta2: decay of first and second moments; beta2 also of the factors.
      eps: added to the root of the second moment.
      every: updates between refreshes of the bases; 10 in the paper.
      max_dim: a side longer than this keeps the standard basis (the paper's one-sided SOAP).

    Raises:
      ValueError: `every` is below 1, or a beta is not in [0, 1).
    """
    if every < 1 or not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError("scale_by_soap takes every >= 1 and beta1, beta2 in [0, 1).")

    def init(params: Any) -> SoapState:
        leaves = [_wide(p) for p in jax.tree.leaves(params)]
        factors = tuple(_empty(x, max_dim) for x in leaves)

        def zeros() -> tuple[jax.Array, ...]:  # made twice: an array may not be donated twice
            return tuple(jnp.zeros_like(x) for x in leaves)

        return SoapState(jnp.zeros((), jnp.int32), zeros(), zeros(), factors, jax.tree.map(jnp.zeros_like, factors))

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        wide = [_wide(g) for g in leaves]
        old, count = state.factors, state.count + 1
        factors = tuple(
            {side: beta2 * f + (1 - beta2) * outer(g, side, dense=True) for side, f in of.items()}
            for g, of in zip(wide, old, strict=True)
        )
        # The first update needs a basis before there is one; afterwards the basis follows the update.
        bases = jax.lax.cond(state.count == 0, lambda: jax.tree.map(_eigenvectors, factors), lambda: state.bases)
        mean = tuple(beta1 * m + (1 - beta1) * g for m, g in zip(state.mean, wide, strict=True))
        square = tuple(
            beta2 * v + (1 - beta2) * jnp.square(_rotated(g, of, transpose=True))
            for v, g, of in zip(state.square, wide, bases, strict=True)
        )

        def corrected(x: jax.Array, beta: float) -> jax.Array:
            return x / (1 - jnp.asarray(beta, x.dtype) ** count.astype(x.dtype))

        moved = [
            _rotated(
                _rotated(corrected(m, beta1), of, transpose=True) / (jnp.sqrt(corrected(v, beta2)) + eps),
                of,
                transpose=False,
            )
            for m, v, of in zip(mean, square, bases, strict=True)
        ]
        bases, square = jax.lax.cond(
            count % every == 0, lambda: _refreshed(factors, bases, square), lambda: (bases, square)
        )
        narrow = [m.reshape(x.shape).astype(x.dtype) for m, x in zip(moved, leaves, strict=True)]
        return jax.tree.unflatten(structure, narrow), SoapState(count, mean, square, factors, bases)

    # Optax's types allow arrays and containers as states; a named tuple of tuples of arrays is a pytree all the same.
    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta1: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    max_dim: int = 10000,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """`scale_by_soap` with decoupled weight decay and a learning rate.

    Args:
      learning_rate: scalar or schedule. `optax.inject_hyperparams` can carry it, with every other number as
        `static_args=`: what shapes the state cannot be traced.
      weight_decay: times the learning rate.
      beta1, beta2, eps, every, max_dim: as in `scale_by_soap`.
    """
    return optax.chain(
        scale_by_soap(beta1=beta1, beta2=beta2, eps=eps, every=every, max_dim=max_dim),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(tree.wide_dtype(x.dtype))


def _empty(leaf: jax.Array, max_dim: int) -> dict[int, jax.Array]:
    if leaf.ndim < 2:
        return {}
    found = sides(leaf, max_dim)
    return {i: jnp.zeros((*leaf.shape[:-2], d, d), leaf.dtype) for i, (d, dense) in enumerate(found) if dense}


def _eigenvectors(factor: jax.Array) -> jax.Array:
    """Orthonormal eigenvectors in columns, largest eigenvalue first."""
    return eigh(factor).vectors[..., ::-1]


def _rotated(x: jax.Array, bases: dict[int, jax.Array], *, transpose: bool) -> jax.Array:
    """Q_L^T X Q_R, or back: Q_L X Q_R^T."""
    for side, basis in bases.items():
        x = multiply(basis, x, side, transpose=transpose)
    return x


def _refreshed(
    factors: tuple[dict[int, jax.Array], ...], bases: tuple[dict[int, jax.Array], ...], squares: tuple[jax.Array, ...]
) -> tuple[tuple[dict[int, jax.Array], ...], tuple[jax.Array, ...]]:
    """Bases after one step of orthogonal iteration, and the second moments in the order of their new columns."""
    new_bases, new_squares = [], []
    for of, old, square in zip(factors, bases, squares, strict=True):
        turned = {}
        for side, basis in old.items():
            turned[side], order = _iterated(of[side], basis)
            axis = square.ndim - 2 + side
            shape = [1] * square.ndim
            shape[: square.ndim - 2] = square.shape[:-2]
            shape[axis] = square.shape[axis]
            square = jnp.take_along_axis(square, order.reshape(shape), axis=axis)
        new_bases.append(turned)
        new_squares.append(square)
    return tuple(new_bases), tuple(new_squares)


def _iterated(factor: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(QR of P Q with the columns of Q by falling q.P q, their order)."""
    product = jnp.matmul(factor, basis, precision=jax.lax.Precision.HIGHEST)
    order = jnp.argsort(-jnp.sum(basis * product, axis=-2), axis=-1)
    return qr(jnp.take_along_axis(product, order[..., None, :], axis=-1)).q, order
