"""SOAP (Vyas et al. 2024, arXiv 2409.11321) for Optax: Adam in the eigenbasis of Shampoo's factors.

Adam divides each entry of the gradient by the root of its own second moment, which is good where entries vary
independently. SOAP first turns the gradient of a matrix into the basis in which they do so most, runs Adam there and
turns the update back:

    G (m, n)  --Q_L^T G Q_R-->  G' (m, n)  --Adam-->  N' (m, n)  --Q_L N' Q_R^T-->  update (m, n)

    Q_L, Q_R: eigenvectors of the averages of G G^T (m, m) and G^T G (n, n); a refresh is one step of orthogonal
    iteration, Q <- QR(P Q), from the Q of before.

The average gradient stays in the parameters' basis, so that a refresh leaves it as it is. Second moments are of the
eigenbasis; a refresh permutes them as it permutes the columns of Q. With b1=0 this is eigenvalue-corrected Shampoo
(Eschenhagen et al. 2025, arXiv 2506.03595), with the factors of `FactorTerms.KULLBACK_LEIBLER` it is KL-SOAP.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.chain import check_rates
from curvax.eigenbases import adjoint, eigenbasis, rounding, unit_scale, with_fixed_rest
from curvax.kernels.dense_linalg import qr
from curvax.keywords import spread
from curvax.meshes import on_any_mesh
from curvax.numbers import Count, Number, check_fraction, check_not_negative, check_positive, is_known
from curvax.optimizers.choices import BasisMethod, FactorTerms
from curvax.optimizers.matrices import (
    BySide,
    corrected,
    decayed,
    finite_parts,
    multiply,
    nonzero,
    outer,
    over_root_scale,
    real_dtype,
)
from curvax.optimizers.scaling import MatrixScaling, Update
from curvax.optimizers.views import Stack
from curvax.state_version import pickled

# Relative to the mean eigenvalue, where a factor is seen through the inverse of the other; Shampoo's default.
_INVERSE_DAMPING = 1e-4


class SoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      count: updates so far, int32.
      skipped: gradients that were not finite, int32; they left everything else as it was.
      mean: average gradients, in the parameters' basis; a tree like the parameters.
      square: average squared gradients, in the eigenbasis; a tree like the parameters.
      factors: per stack of matrices (`MatrixViews`), averages of G G^T and G^T G, for sides that have a basis.
      bases: their eigenvectors in columns, by falling eigenvalue, as of the last refresh; the identity before one.
    """

    count: jax.Array
    skipped: jax.Array
    mean: Any
    square: Any
    factors: Any
    bases: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with the version of its form."""
        return pickled(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoapScaling(MatrixScaling):
    """The keywords of `scale_by_soap`.

    Attributes:
      b1, b2: decay of first and second moments; b2 also of the factors. 0.95 both, as in the paper. With b1=0 it is
        eigenvalue-corrected Shampoo.
      eps: added to the root of the second moment, times the root mean square of that matrix's (or vector's) second
        moments; 1e-8.
      every: updates between refreshes of the bases; 10 in the paper.
      start: updates that are Adam's, in the parameters' basis, before the first bases. 0 by default; the authors'
        code leaves the first update out.
      basis: how bases are refreshed; by a step of orthogonal iteration, as in the paper.
    """

    b1: Number = 0.95
    b2: Number = 0.95
    eps: Number = 1e-8
    every: Count = 10
    start: Count = 0
    basis: BasisMethod = BasisMethod.POWER_ITERATION

    default_max_dim = 10_000

    def with_basis(self, stack: Stack) -> tuple[int, ...]:
        """The sides of a stack that have a basis."""
        if not stack.is_matrix:
            return ()
        return tuple(side for side in self.sides.of(stack.shape) if stack.shape[side - 2] <= self.longest)


@spread(SoapScaling)
def scale_by_soap(options: SoapScaling) -> optax.GradientTransformation:
    """SOAP's direction: Adam's, taken in the eigenbases of each matrix's two second-moment factors.

    It is G -> Q_L N Q_R^T with N Adam's update of Q_L^T G Q_R, and Q_L and Q_R the eigenvectors of the averages of
    G G^T and G^T G.

    The bases come from eigendecompositions at the first gradient of each matrix that is not zero, and from one step of
    orthogonal iteration at every `every`-th update, as in the paper; between them the columns are kept in the order of
    falling eigenvalues, the second moments along with them, as in the authors' code. Unlike the authors' code the first
    update is not left out.

    Leaves with more than two axes are stacks of matrices over their last two, unless `matrices` says something else;
    vectors and scalars get plain Adam. Complex leaves have conjugates where these belong.

    Nothing depends on the scale of the gradients. Adam divides by the root of a second moment however small it is;
    where that moment is nothing but rounding, below the precision of its row's or column's sum, the quotient would be a
    random sign, and the update is zero.

    Gradients with an entry that is not finite are skipped as a whole: the update is zero, the state stays as it was,
    and its `skipped` counts them.

    Raises:
      ValueError: `every` or `eps` is not positive, or `b1` or `b2` is not in [0, 1).
      TypeError: `max_dim` or `block_dim` is traced: name it in the `static_args` of `optax.inject_hyperparams`.
    """
    check_positive("every", options.every)
    check_not_negative("start", options.start)
    check_fraction("b1", options.b1)
    check_fraction("b2", options.b2)

    def init(params: Any) -> SoapState:
        stacks = options.views(params).like(jax.tree.leaves(params))
        magnitudes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, real_dtype(p.dtype)), params)
        return SoapState(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            tree.zeros_like(params),
            tree.zeros_like(magnitudes),
            tree.by_leaf(stacks, lambda stack: _no_factors(stack, options)),
            tree.by_leaf(stacks, lambda stack: jax.tree.map(_identities, _no_factors(stack, options))),
        )

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state._replace(count=state.count + 1)
        views, (finite, clean) = options.views(updates), finite_parts(updates)
        step = _Step(state.count, finite, options, tuple(stack.is_matrix for stack in views.like(leaves)))
        gradients = views.split(clean)
        means, moments = (views.split(jax.tree.leaves(of)) for of in (state.mean, state.square))
        # 1. Add the gradient to the averages of G G^T and G^T G.
        factors = step.accumulated(gradients, state.factors, state.bases)
        # 2. A matrix needs a basis before there is one; afterwards the basis follows the update.
        bases, moments = step.begun(factors, state.factors, state.bases, moments)
        # 3. Adam's moments and quotient, turned back.
        directions, mean, square = step.adam(gradients, means, moments, bases)
        # 4. Every so many updates a step of orthogonal iteration, for the next update.
        due = finite & (step.after % options.every == 0) & (step.after > options.start)
        bases, square = jax.lax.cond(due, lambda: _refreshed(factors, bases, square, options), lambda: (bases, square))
        narrow = [m.astype(g.dtype) for m, g in zip(views.join(directions), leaves, strict=True)]
        new_state = SoapState(
            step.after,
            state.skipped + (~finite).astype(jnp.int32),
            jax.tree.unflatten(jax.tree.structure(state.mean), views.join(mean)),
            jax.tree.unflatten(jax.tree.structure(state.square), views.join(square)),
            factors,
            bases,
        )
        return jax.tree.unflatten(structure, narrow), new_state

    # Optax's types allow arrays and containers as states; a named tuple of tuples of arrays is a pytree all the same.
    return on_any_mesh(optax.GradientTransformation(cast(Any, init), cast(Any, update)))


@dataclasses.dataclass(frozen=True)
class SoapOptions(SoapScaling):
    """The keywords of `soap`.

    Attributes:
      learning_rate: scalar or schedule. `optax.inject_hyperparams` can carry it and every other number but `max_dim`
        and `block_dim`.
      weight_decay: times the learning rate.
    """

    learning_rate: optax.ScalarOrSchedule
    _: dataclasses.KW_ONLY
    weight_decay: Number = 0.0


@spread(SoapOptions)
def soap(options: SoapOptions) -> optax.GradientTransformation:
    """`scale_by_soap` with decoupled weight decay and a learning rate.

    Raises:
      TypeError, ValueError: a rate of another kind or out of its range, and those of `scale_by_soap`.
    """
    check_rates(options.learning_rate, options.weight_decay)
    scaling = {field.name: getattr(options, field.name) for field in dataclasses.fields(SoapScaling)}
    return optax.chain(
        scale_by_soap(**scaling),
        optax.add_decayed_weights(options.weight_decay),
        optax.scale_by_learning_rate(options.learning_rate),
    )


@dataclasses.dataclass(frozen=True)
class _Step(Update):
    """The parts of an update.

    Attributes:
      options: the keywords.
      is_matrix: of each stack.
    """

    options: SoapScaling
    is_matrix: tuple[bool, ...]

    def accumulated(
        self, gradients: list[jax.Array], factors: tuple[BySide, ...], bases: tuple[BySide, ...]
    ) -> tuple[BySide, ...]:
        """The averages with these gradients in them."""
        return tuple(
            {side: decayed(old, self._term(g, side, of, q), self.options.b2, self.finite) for side, old in of.items()}
            for g, of, q in zip(gradients, factors, bases, strict=True)
        )

    def _term(self, gradient: jax.Array, side: int, factors: BySide, bases: BySide) -> jax.Array:
        """What a gradient adds to one factor of its stack."""
        other = 1 - side
        if self.options.terms is FactorTerms.GRADIENT:
            return outer(gradient, side, dense=True)
        seen = over_root_scale(gradient)
        if other in factors:
            # G R^-1 G^H is X X^H with X = G conj(Q) / root of R's eigenvalues: X need not be turned back.
            mean = corrected(factors[other], self.options.b2, jnp.maximum(self.count, 1))
            values = jnp.maximum(_rayleigh(mean, bases[other]), 0)
            damped = values + _INVERSE_DAMPING * jnp.mean(values, axis=-1, keepdims=True)
            root = jax.lax.rsqrt(jnp.where(damped > 0, damped, jnp.ones_like(damped)))
            turned = multiply(root, multiply(adjoint(bases[other]), gradient, other), other)
            known = nonzero(factors[other], dense=True)[..., None, None]
            seen = jnp.where(known, turned, seen)
        return outer(seen, side, dense=True) / gradient.shape[other - 2]

    def begun(
        self,
        factors: tuple[BySide, ...],
        before: tuple[BySide, ...],
        bases: tuple[BySide, ...],
        moments: list[jax.Array],
    ) -> tuple[tuple[BySide, ...], list[jax.Array]]:
        """Bases for matrices that have none yet, and the second moments in them.

        A matrix has none before `start`, nor before its first gradient: an arbitrary basis of a factor of zeros would
        take many steps of orthogonal iteration to turn.
        """
        first = [
            {side: nonzero(f, dense=True) & (~nonzero(old[side], dense=True) | (self.count == self.options.start))
             for side, f in of.items()}
            for of, old in zip(factors, before, strict=True)
        ]  # fmt: skip
        known = [jnp.any(x) for x in jax.tree.leaves(first)]
        if not known:
            return bases, moments

        # Without any updates before the first bases the moments are zero, in whatever basis.
        turned = moments if not is_known(self.options.start) or self.options.start > 0 else []

        def begin() -> tuple[tuple[BySide, ...], list[jax.Array]]:
            new = tuple(_begun(*of) for of in zip(factors, bases, first, strict=True))
            return new, [_turned(v, *of) for v, *of in zip(turned, new, first, strict=bool(turned))]

        due = self.finite & (self.count >= self.options.start) & jnp.any(jnp.stack(known))
        bases, turned = jax.lax.cond(due, begin, lambda: (bases, turned))
        return bases, turned or moments

    def adam(
        self,
        gradients: list[jax.Array],
        means: list[jax.Array],
        moments: list[jax.Array],
        bases: tuple[BySide, ...],
    ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """(directions, means, second moments): the mean in the parameters' basis, the squares in the eigenbasis."""
        o, taken = self.options, self.finite
        mean = [decayed(m, g, o.b1, taken) for m, g in zip(means, gradients, strict=True)]
        square = [
            decayed(v, jnp.square(jnp.abs(_into(g, of))), o.b2, taken)
            for v, g, of in zip(moments, gradients, bases, strict=True)
        ]
        # Before the first finite gradient everything is zero, and stays so at any positive count.
        count = jnp.maximum(self.after, 1)
        directions = []
        for m, v, of, matrix in zip(mean, square, bases, self.is_matrix, strict=True):
            axes = (-2, -1) if matrix else tuple(range(m.ndim))
            quotient = _quotient(_into(corrected(m, o.b1, count), of), corrected(v, o.b2, count), of, (o.eps, axes))
            directions.append(jnp.where(taken, _out_of(quotient, of), jnp.zeros_like(m)))
        return directions, mean, square


def _no_factors(stack: Stack, options: SoapScaling) -> BySide:
    shape = stack.shape
    return {i: jnp.zeros((*shape[:-2], shape[i - 2], shape[i - 2]), stack.dtype) for i in options.with_basis(stack)}


def _identities(factor: jax.Array) -> jax.Array:
    return factor + jnp.eye(factor.shape[-1], dtype=factor.dtype)


def _begun(factors: BySide, bases: BySide, first: dict[int, jax.Array]) -> BySide:
    """First bases where `first` says so."""
    return {
        side: jnp.where(first[side][..., None, None], _eigenvectors(factor), bases[side])
        for side, factor in factors.items()
    }


def _turned(square: jax.Array, bases: BySide, first: dict[int, jax.Array]) -> jax.Array:
    """Second moments of the parameters' basis in first bases: |Q_L^H|^2 V |conj(Q_R)|^2, of independent entries."""
    for side, basis in bases.items():
        turned = multiply(jnp.square(jnp.abs(adjoint(basis))), square, side)
        square = jnp.where(first[side][..., None, None], turned, square)
    return square


def _into(x: jax.Array, bases: BySide) -> jax.Array:
    """Q_L^H X conj(Q_R)."""
    for side, basis in bases.items():
        x = multiply(adjoint(basis), x, side)
    return x


def _out_of(x: jax.Array, bases: BySide) -> jax.Array:
    """Back: Q_L X Q_R^T."""
    for side, basis in bases.items():
        x = multiply(basis, x, side)
    return x


def _quotient(mean: jax.Array, square: jax.Array, bases: BySide, relative: tuple[Number, tuple[int, ...]]) -> jax.Array:
    """Mean over the root of the square, both of one stack, in its bases and corrected; zero where that is rounding.

    `relative` is eps and the axes of whose root mean square it is a multiple.
    """
    if not square.size:
        return mean
    eps, axes = relative
    scale = jnp.sqrt(jnp.mean(square, axis=axes, keepdims=True))
    divisor = jnp.sqrt(square) + jnp.asarray(eps, square.dtype) * scale
    still = square <= _unresolved(square, bases)
    quotient = mean / jnp.where(still, jnp.ones_like(divisor), divisor).astype(mean.dtype)
    return jnp.where(still, jnp.zeros_like(quotient), quotient)


def _unresolved(square: jax.Array, bases: BySide) -> jax.Array:
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


def _rayleigh(factor: jax.Array, basis: jax.Array) -> jax.Array:
    """The diagonal of Q^H P Q, (..., d)."""
    product = jnp.matmul(factor, basis, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum((basis.conj() * product).real, axis=-2)


def _refreshed(
    factors: tuple[BySide, ...], bases: tuple[BySide, ...], squares: list[jax.Array], options: SoapScaling
) -> tuple[tuple[BySide, ...], list[jax.Array]]:
    """Bases after a refresh, and the second moments in the order of their new columns."""
    new_bases, new_squares = [], []
    for of, old, square in zip(factors, bases, squares, strict=True):
        turned = {}
        for side, basis in old.items():
            turned[side], order = _next_basis(of[side], basis, options.basis)
            axis = square.ndim - 2 + side
            shape = [1] * square.ndim
            shape[: square.ndim - 2] = square.shape[:-2]
            shape[axis] = square.shape[axis]
            square = jnp.take_along_axis(square, order.reshape(shape), axis=axis)
        new_bases.append(turned)
        new_squares.append(square)
    return tuple(new_bases), new_squares


def _next_basis(factor: jax.Array, basis: jax.Array, method: BasisMethod) -> tuple[jax.Array, jax.Array]:
    """(the next basis, the order of the columns of Q by falling q.P q that its columns go on from).

    What QR makes of columns that the others before them span is rounding: those get a fixed basis (`eigenbases`).
    """
    scaled = factor / unit_scale(factor).astype(factor.dtype)
    product = jnp.matmul(scaled, basis, precision=jax.lax.Precision.HIGHEST)
    values = jnp.sum((basis.conj() * product).real, axis=-2)
    least = rounding(values)
    order = jnp.argsort(-jnp.where(values > least, values, jnp.zeros_like(values)), axis=-1)
    if method is BasisMethod.EIGENDECOMPOSITION:
        return _eigenvectors(factor), order
    # Householder's reflector of column k is made at row k, and rounds there as at the largest: rows without gradients,
    # which have nothing but zeros until then, come last.
    rows = jnp.argsort(-jnp.diagonal(scaled, axis1=-2, axis2=-1).real, axis=-1)
    product = jnp.take_along_axis(product, rows[..., :, None], axis=-2)
    factors = qr(jnp.take_along_axis(product, order[..., None, :], axis=-1))
    turned = jnp.take_along_axis(factors.q, jnp.argsort(rows, axis=-1)[..., :, None], axis=-2)
    unknown = jnp.abs(jnp.diagonal(factors.r, axis1=-2, axis2=-1)) <= least
    return with_fixed_rest(turned, unknown), order
