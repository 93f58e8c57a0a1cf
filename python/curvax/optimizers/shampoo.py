"""Shampoo (Gupta, Koren and Singer 2018, arXiv 1802.09568) for Optax.

The gradient G of a weight matrix is multiplied from both sides by inverse fourth roots of what earlier gradients add up
to. Directions in which gradients were large so far get smaller steps:

    G (m, n)   --sum of G G^T-->  L (m, m)  --eigenvectors, every so many updates-->  L^(-1/4)
               --sum of G^T G-->  R (n, n)  ---------------------------------------->  R^(-1/4)
    update = L^(-1/4) G R^(-1/4)

Take a single gradient G = U S V^T. Then L^(-1/4) = U S^(-1/2) U^T, R^(-1/4) = V S^(-1/2) V^T, and the update is U V^T,
with all singular values 1: what Muon makes of every gradient. A vector has one side and the exponent -1/2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.chain import check_rates
from curvax.eigenbases import adjoint, rounding, unit_scale
from curvax.kernels.dense_linalg import eigh
from curvax.keywords import spread
from curvax.meshes import on_any_mesh
from curvax.numbers import Count, Number, check_fraction, check_positive, whole
from curvax.optimizers.matrices import (
    Factors,
    corrected,
    decayed,
    multiply,
    outer,
    real_dtype,
    sides,
    upcast,
)
from curvax.state_version import pickled

MAX_DIM = 8192


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      count: updates so far, int32.
      factors: per leaf, in the order of `jax.tree.leaves`, accumulated G G^T and G^T G.
      roots: their inverse roots, as of the last refresh.
      graft: state of the transformation that lends its norms, `()` without one.
    """

    count: jax.Array
    factors: Any
    roots: Any
    graft: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with the version of its form."""
        return pickled(self)


def scale_by_shampoo(
    *,
    b2: Number | None = None,
    eps: Number = 1e-4,
    every: Count = 1,
    max_dim: int | None = None,
    graft: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Shampoo's direction: each matrix of the gradient between inverse roots of its two second-moment factors.

    It is G -> L^(-1/4) G R^(-1/4) with L = sum G G^T and R = sum G^T G, each plus eps I; of a vector, H^(-1/2) g with
    H = sum g g^T.

    Leaves with more than two axes are stacks of matrices over their last two; scalars are vectors of length one.
    Complex leaves have conjugates where these belong. Nothing depends on the scale of the gradients.

    Args:
      b2: decay of L and R as bias-corrected averages; `None` sums them up as the paper does.
      eps: the multiple of the identity, relative to the mean diagonal of the factor. 1e-4 by default, the paper's
        figure, which is an absolute one there.
      every: updates between two refreshes of the roots, which take an eigendecomposition of each factor.
      max_dim: a side longer than this keeps only the diagonal of its factor (the paper's diagonal Shampoo). `None`
        stands for 8192; it shapes the state, so `optax.inject_hyperparams` must not trace a number in its place.
      graft: a transformation such as `optax.scale_by_adam()` that sees the same gradients and lends each matrix's
        update its Frobenius norm, so that a learning rate means what it means for that transformation (Anil et al.
        2020, arXiv 2002.09018). `None` keeps Shampoo's own norms, as the first paper does.

    Raises:
      ValueError: `every` or `eps` is not positive, or `b2` is not in [0, 1).
      TypeError: `max_dim` is traced: name it in the `static_args` of `optax.inject_hyperparams`.
    """
    check_positive("every", every)
    check_positive("eps", eps)
    if b2 is not None:
        check_fraction("b2", b2)

    def init(params: Any) -> ShampooState:
        longest = MAX_DIM if max_dim is None else whole("max_dim", max_dim)
        return ShampooState(
            jnp.zeros((), jnp.int32),
            tree.by_leaf(params, lambda p: _zeros(p, longest)),
            tree.by_leaf(params, lambda p: _zeros(p, longest)),
            () if graft is None else graft.init(params),
        )

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state._replace(count=state.count + 1)
        gradients, count = [jnp.atleast_1d(upcast(g)) for g in leaves], state.count + 1
        # 1. Add the gradient to the factors L and R.
        factors = tuple(_accumulated(g, old, b2) for g, old in zip(gradients, state.factors, strict=True))

        def refresh() -> tuple[Factors, ...]:
            def root(factor: jax.Array, gradient: jax.Array, order: int) -> jax.Array:
                mean = factor if b2 is None else corrected(factor, b2, count)
                return _inverse_root(mean, gradient, order, eps)

            return tuple(tuple(root(f, g, 2 * len(of)) for f in of) for of, g in zip(factors, gradients, strict=True))

        # 2. Their inverse roots: every so many updates, and at once for a matrix that had no gradient until now.
        due = (state.count % every == 0) | _blind(factors, state.roots, gradients)
        roots = jax.lax.cond(due, refresh, lambda: state.roots)
        # 3. The gradient between the roots.
        directions = [_applied(g, of) for g, of in zip(gradients, roots, strict=True)]
        # 4. Grafting: each matrix gets the length of the update that another transformation makes.
        lender = state.graft
        if graft is not None:
            lent, lender = graft.update(updates, state.graft, params)
            directions = [
                _with_norm(m, jnp.atleast_1d(upcast(x))) for m, x in zip(directions, jax.tree.leaves(lent), strict=True)
            ]
        narrow = [m.reshape(x.shape).astype(x.dtype) for m, x in zip(directions, leaves, strict=True)]
        return jax.tree.unflatten(structure, narrow), ShampooState(count, factors, roots, lender)

    # Optax's types allow arrays and containers as states; a named tuple of tuples of arrays is a pytree all the same.
    return on_any_mesh(optax.GradientTransformation(cast(Any, init), cast(Any, update)))


@dataclasses.dataclass(frozen=True)
class ShampooOptions:
    """The keywords of `shampoo`.

    Attributes:
      learning_rate: scalar or schedule. `optax.inject_hyperparams` can carry it and every other number but `max_dim`.
      momentum: decay of an exponential average of the preconditioned gradients; 0.9 as in the paper's experiments.
      weight_decay: times the learning rate.
      b2, eps, every, max_dim, graft: as in `scale_by_shampoo`.
    """

    learning_rate: optax.ScalarOrSchedule
    _: dataclasses.KW_ONLY
    momentum: Number = 0.9
    b2: Number | None = None
    eps: Number = 1e-4
    every: Count = 1
    max_dim: int | None = None
    graft: optax.GradientTransformation | None = None
    weight_decay: Number = 0.0


@spread(ShampooOptions)
def shampoo(options: ShampooOptions) -> optax.GradientTransformation:
    """`scale_by_shampoo` with momentum on the preconditioned gradient, decoupled weight decay and a learning rate.

    Raises:
      TypeError, ValueError: a rate of another kind or out of its range, and those of `scale_by_shampoo`.
    """
    check_rates(options.learning_rate, options.weight_decay, momentum=options.momentum)
    scaling = scale_by_shampoo(
        b2=options.b2, eps=options.eps, every=options.every, max_dim=options.max_dim, graft=options.graft
    )
    return optax.chain(
        scaling,
        optax.ema(cast(float, options.momentum), debias=False),
        optax.add_decayed_weights(options.weight_decay),
        optax.scale_by_learning_rate(options.learning_rate),
    )


def _zeros(leaf: Any, max_dim: int) -> Factors:
    shape, dtype = leaf.shape or (1,), tree.accumulation_dtype(leaf.dtype)
    return tuple(
        jnp.zeros((*shape[:-2], d, d), dtype) if dense else jnp.zeros((*shape[:-2], d), real_dtype(dtype))
        for d, dense in sides(shape, max_dim)
    )


def _is_dense(factor: jax.Array, gradient: jax.Array) -> bool:
    return factor.ndim == max(gradient.ndim, 2)


def _accumulated(gradient: jax.Array, factors: Factors, b2: Number | None) -> Factors:
    terms = [outer(gradient, side, _is_dense(old, gradient)) for side, old in enumerate(factors)]
    if b2 is None:
        return tuple(old + term for old, term in zip(factors, terms, strict=True))
    return tuple(decayed(old, term, b2) for old, term in zip(factors, terms, strict=True))


def _blind(factors: tuple[Factors, ...], roots: tuple[Factors, ...], gradients: list[jax.Array]) -> jax.Array:
    """Whether a matrix has the roots of no gradient at all while it has seen one by now: they would not let it move."""

    def seen(factor: jax.Array, gradient: jax.Array) -> jax.Array:
        diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1) if _is_dense(factor, gradient) else factor
        return jnp.any(diagonal != 0, axis=-1)

    blind = [jnp.any(seen(f[0], g) & ~seen(r[0], g)) for f, r, g in zip(factors, roots, gradients, strict=True)]
    return jnp.any(jnp.stack(blind))


def _inverse_root(factor: jax.Array, gradient: jax.Array, order: int, eps: Number) -> jax.Array:
    """(factor + eps mean I)^(-1/order), mean that of its diagonal; zero of a zero factor."""
    if not factor.size:
        return factor
    if not _is_dense(factor, gradient):
        return _damped_power(factor, order, eps)
    scale = unit_scale(factor)
    pairs = eigh(factor / scale.astype(factor.dtype))
    values, vectors = pairs.values, pairs.vectors
    # Alike where they are rounding, so that the root there is a multiple of the identity on what has no gradient.
    values = jnp.where(values > rounding(values), values, jnp.zeros_like(values))
    powers = _damped_power(values, order, eps) * scale[..., 0] ** (-1 / order)
    scaled = vectors * powers[..., None, :].astype(vectors.dtype)
    return jnp.matmul(scaled, adjoint(vectors), precision=jax.lax.Precision.HIGHEST)


def _damped_power(values: jax.Array, order: int, eps: Number) -> jax.Array:
    """(value + eps mean)^(-1/order) of the eigenvalues of each factor, in the last axis."""
    least = jnp.finfo(values.dtype).eps * jnp.max(values, axis=-1, keepdims=True)
    damping = jnp.asarray(eps, values.dtype) * jnp.mean(values, axis=-1, keepdims=True)
    # No eigenvalue is known better than to the rounding of the largest.
    damped = jnp.maximum(values + damping, least)
    return jnp.where(damped > 0, jnp.where(damped > 0, damped, jnp.ones_like(damped)) ** (-1 / order), 0)


def _applied(gradient: jax.Array, roots: Factors) -> jax.Array:
    for side, root in enumerate(roots):
        gradient = multiply(root, gradient, side)
    return gradient


def _with_norm(update: jax.Array, like: jax.Array) -> jax.Array:
    """Each matrix of `update` (a vector as a whole) as long as that of `like`, zero where it is zero."""
    axes = tuple(range(max(update.ndim - 2, 0), update.ndim))

    def length(x: jax.Array) -> jax.Array:
        top = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
        unit = jnp.abs(x) / jnp.where(top > 0, top, jnp.ones_like(top))
        return top * jnp.sqrt(jnp.sum(unit * unit, axis=axes, keepdims=True))

    own = length(update)
    return update * (length(like) / jnp.where(own > 0, own, jnp.ones_like(own))).astype(update.dtype)
