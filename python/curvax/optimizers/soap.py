"""SOAP (Vyas et al. 2024, arXiv 2409.11321) for Optax: Adam in the eigenbasis of Shampoo's factors.

Adam divides each entry of the gradient by the root of its own second moment, which is good where entries vary
independently. SOAP first turns the gradient of a matrix into the basis in which they do so most, runs Adam there and
turns the update back:

    G (m, n)  --Q_L^T G Q_R-->  G' (m, n)  --Adam-->  N' (m, n)  --Q_L N' Q_R^T-->  update (m, n)

    Q_L, Q_R: eigenvectors of the averages of G G^T (m, m) and G^T G (n, n); a refresh is one step of orthogonal
    iteration, Q <- QR(P Q), from the Q of before.

The average gradient stays in the parameters' basis, so that a refresh leaves it as it is. Second moments are of the
eigenbasis; a refresh permutes them as it permutes the columns of Q.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.chain import check_rates
from curvax.eigenbases import adjoint, eigenbasis, rounding, unit_scale, with_fixed_rest
from curvax.kernels.dense_linalg import qr
from curvax.meshes import on_any_mesh
from curvax.numbers import Count, Number, check_fraction, check_positive, whole
from curvax.optimizers.matrices import (
    corrected,
    decayed,
    multiply,
    outer,
    real_dtype,
    sides,
    upcast,
)
from curvax.state_version import pickled

Bases: TypeAlias = dict[int, jax.Array]
"""Of one leaf, by side: (..., d, d), for the sides that have a basis."""

MAX_DIM = 10000


class SoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      count: updates so far, int32.
      mean: average gradients, in the parameters' basis; a tree like the parameters.
      square: average squared gradients, in the eigenbasis; a tree like the parameters.
      factors: per leaf, in the order of `jax.tree.leaves`, averages of G G^T and G^T G, for sides that have a basis.
      bases: their eigenvectors in columns, by falling eigenvalue, as of the last refresh.
    """

    count: jax.Array
    mean: Any
    square: Any
    factors: Any
    bases: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with the version of its form."""
        return pickled(self)


def scale_by_soap(
    *,
    b1: Number = 0.95,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    every: Count = 10,
    max_dim: int | None = None,
) -> optax.GradientTransformation:
    """SOAP's direction: Adam's, taken in the eigenbases of each matrix's two second-moment factors.

    It is G -> Q_L N Q_R^T with N Adam's update of Q_L^T G Q_R, and Q_L and Q_R the eigenvectors of the averages of
    G G^T and G^T G.

    The bases come from eigendecompositions at the first update and from one step of orthogonal iteration at every
    `every`-th one, as in the paper; between them the columns are kept in the order of falling eigenvalues, the second
    moments along with them, as in the authors' code. Unlike the authors' code the first update is not left out.

    Leaves with more than two axes are stacks of matrices over their last two; vectors and scalars get plain Adam.
    Complex leaves have conjugates where these belong.

    Nothing depends on the scale of the gradients. Adam divides by the root of a second moment however small it is;
    where that moment is nothing but rounding, below the precision of its row's or column's sum, the quotient would be a
    random sign, and the update is zero.

    Args:
      b1, b2: decay of first and second moments; b2 also of the factors. 0.95 both, as in the paper.
      eps: added to the root of the second moment, times the root mean square of that matrix's (or vector's) second
        moments; 1e-8.
      every: updates between refreshes of the bases; 10 in the paper.
      max_dim: a side longer than this keeps the standard basis (the paper's one-sided SOAP). `None` stands for 10,000
        as in the paper; it shapes the state, so `optax.inject_hyperparams` must not trace a number in its place.

    Raises:
      ValueError: `every` is not positive, or `b1` or `b2` is not in [0, 1).
      TypeError: `max_dim` is traced: name it in the `static_args` of `optax.inject_hyperparams`.
    """
    check_positive("every", every)
    check_fraction("b1", b1)
    check_fraction("b2", b2)

    def init(params: Any) -> SoapState:
        longest = MAX_DIM if max_dim is None else whole("max_dim", max_dim)
        magnitudes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, real_dtype(p.dtype)), params)
        return SoapState(
            jnp.zeros((), jnp.int32),
            tree.zeros_like(params),
            tree.zeros_like(magnitudes),
            tree.by_leaf(params, lambda p: _no_bases(p, longest)),
            tree.by_leaf(params, lambda p: _no_bases(p, longest)),
        )

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state._replace(count=state.count + 1)
        gradients, count = [upcast(g) for g in leaves], state.count + 1
        # 1. Add the gradient to the averages of G G^T and G^T G.
        factors = tuple(_accumulated(g, of, b2) for g, of in zip(gradients, state.factors, strict=True))
        # 2. The first update needs a basis before there is one; afterwards the basis follows the update.
        bases = jax.lax.cond(state.count == 0, lambda: jax.tree.map(_eigenvectors, factors), lambda: state.bases)
        # 3. Adam's moments: the mean in the parameters' basis, the squares in the eigenbasis.
        means, moments = jax.tree.leaves(state.mean), jax.tree.leaves(state.square)
        mean = [decayed(m, g, b1) for m, g in zip(means, gradients, strict=True)]
        square = [
            decayed(v, jnp.square(jnp.abs(_into(g, of))), b2)
            for v, g, of in zip(moments, gradients, bases, strict=True)
        ]
        # 4. Adam's quotient in the eigenbasis, turned back.
        directions = [
            _out_of(_adam(_into(corrected(m, b1, count), of), corrected(v, b2, count), of, eps), of)
            for m, v, of in zip(mean, square, bases, strict=True)
        ]
        # 5. Every so many updates a step of orthogonal iteration, for the next update.
        bases, square = jax.lax.cond(
            count % every == 0, lambda: _refreshed(factors, bases, square), lambda: (bases, square)
        )
        narrow = [m.astype(g.dtype) for m, g in zip(directions, leaves, strict=True)]
        new_state = SoapState(
            count,
            jax.tree.unflatten(jax.tree.structure(state.mean), mean),
            jax.tree.unflatten(jax.tree.structure(state.square), square),
            factors,
            bases,
        )
        return jax.tree.unflatten(structure, narrow), new_state

    # Optax's types allow arrays and containers as states; a named tuple of tuples of arrays is a pytree all the same.
    return on_any_mesh(optax.GradientTransformation(cast(Any, init), cast(Any, update)))


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Number = 0.95,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    every: Count = 10,
    max_dim: int | None = None,
    weight_decay: Number = 0.0,
) -> optax.GradientTransformation:
    """`scale_by_soap` with decoupled weight decay and a learning rate.

    Args:
      learning_rate: scalar or schedule. `optax.inject_hyperparams` can carry it and every other number but `max_dim`.
      weight_decay: times the learning rate.
      b1, b2, eps, every, max_dim: as in `scale_by_soap`.

    Raises:
      TypeError, ValueError: a rate of another kind or out of its range, and those of `scale_by_soap`.
    """
    check_rates(learning_rate, weight_decay)
    return optax.chain(
        scale_by_soap(b1=b1, b2=b2, eps=eps, every=every, max_dim=max_dim),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _no_bases(leaf: Any, max_dim: int) -> Bases:
    if len(leaf.shape) < 2:
        return {}
    dtype = tree.accumulation_dtype(leaf.dtype)
    pairs = enumerate(sides(leaf.shape, max_dim))
    return {i: jnp.zeros((*leaf.shape[:-2], d, d), dtype) for i, (d, dense) in pairs if dense}


def _accumulated(gradient: jax.Array, factors: Bases, b2: Number) -> Bases:
    return {side: decayed(f, outer(gradient, side, dense=True), b2) for side, f in factors.items()}


def _into(x: jax.Array, bases: Bases) -> jax.Array:
    """Q_L^H X conj(Q_R)."""
    for side, basis in bases.items():
        x = multiply(adjoint(basis), x, side)
    return x


def _out_of(x: jax.Array, bases: Bases) -> jax.Array:
    """Back: Q_L X Q_R^T."""
    for side, basis in bases.items():
        x = multiply(basis, x, side)
    return x


def _adam(mean: jax.Array, square: jax.Array, bases: Bases, eps: Number) -> jax.Array:
    """Mean over the root of the square, both of one leaf, in its bases and corrected; zero where that is rounding."""
    if not square.size:
        return mean
    axes = tuple(range(max(square.ndim - 2, 0), square.ndim))
    scale = jnp.sqrt(jnp.mean(square, axis=axes, keepdims=True))
    divisor = jnp.sqrt(square) + jnp.asarray(eps, square.dtype) * scale
    still = square <= _unresolved(square, bases)  # false of NaN, which must stay visible
    quotient = mean / jnp.where(still, jnp.ones_like(divisor), divisor).astype(mean.dtype)
    return jnp.where(still, jnp.zeros_like(quotient), quotient)


def _unresolved(square: jax.Array, bases: Bases) -> jax.Array:
    """What second moments hold by rounding alone.

    A basis of G G^H mixes the rows of a column, and is itself known to the precision of the factor's largest
    eigenvalue: what is below that precision, as a part of the column's sum of squares, is not known. Likewise of
    the other side. Where both sides turn, what one of them leaves is spread over all entries by the other.
    """
    if not bases:
        return jnp.zeros_like(square)
    over = [-2 if side == 0 else -1 for side in bases]
    sums = [jnp.sum(square, axis=axis, keepdims=True) for axis in over]
    if len(over) == 2:
        sums.append(jnp.sum(square, axis=(-2, -1), keepdims=True) / min(square.shape[-2:]))
    return jnp.finfo(square.dtype).eps * sum(sums[1:], start=sums[0])


def _eigenvectors(factor: jax.Array) -> jax.Array:
    """Orthonormal eigenvectors in columns, largest eigenvalue first; see `eigenbases`."""
    return eigenbasis(factor / unit_scale(factor).astype(factor.dtype))[1][..., ::-1]


def _refreshed(
    factors: tuple[Bases, ...], bases: tuple[Bases, ...], squares: list[jax.Array]
) -> tuple[tuple[Bases, ...], list[jax.Array]]:
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
    return tuple(new_bases), new_squares


def _iterated(factor: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(QR of P Q with the columns of Q by falling q.P q, their order).

    What QR makes of columns that the others before them span is rounding: those get a fixed basis (`eigenbases`).
    """
    scaled = factor / unit_scale(factor).astype(factor.dtype)
    product = jnp.matmul(scaled, basis, precision=jax.lax.Precision.HIGHEST)
    values = jnp.sum((basis.conj() * product).real, axis=-2)
    least = rounding(values)
    order = jnp.argsort(-jnp.where(values > least, values, jnp.zeros_like(values)), axis=-1)
    # Householder's reflector of column k is made at row k, and rounds there as at the largest: rows without gradients,
    # which have nothing but zeros until then, come last.
    rows = jnp.argsort(-jnp.diagonal(scaled, axis1=-2, axis2=-1).real, axis=-1)
    product = jnp.take_along_axis(product, rows[..., :, None], axis=-2)
    factors = qr(jnp.take_along_axis(product, order[..., None, :], axis=-1))
    turned = jnp.take_along_axis(factors.q, jnp.argsort(rows, axis=-1)[..., :, None], axis=-2)
    unknown = jnp.abs(jnp.diagonal(factors.r, axis1=-2, axis2=-1)) <= least
    return with_fixed_rest(turned, unknown), order
