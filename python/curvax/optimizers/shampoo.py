"""Shampoo (Gupta, Koren and Singer 2018, arXiv 1802.09568) for Optax.

The gradient G of a weight matrix is multiplied from both sides by inverse fourth roots of what earlier gradients add up
to. Directions in which gradients were large so far get smaller steps:

    G (m, n)   --sum of G G^T-->  L (m, m)  --eigenvectors, every so many updates-->  L^(-1/4)
               --sum of G^T G-->  R (n, n)  ---------------------------------------->  R^(-1/4)
    update = L^(-1/4) G R^(-1/4)

Take a single gradient G = U S V^T. Then L^(-1/4) = U S^(-1/2) U^T, R^(-1/4) = V S^(-1/2) V^T, and the update is U V^T,
with all singular values 1: what Muon makes of every gradient. A vector has one side and the exponent -1/2, and so have
the sides of one-sided and of KL-Shampoo (`Sides`, `FactorTerms`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.chain import check_rates
from curvax.eigenbases import adjoint, rounding, unit_of, unit_scale
from curvax.kernels.dense_linalg import eigh
from curvax.keywords import spread
from curvax.meshes import on_any_mesh
from curvax.numbers import Count, Number, check_fraction, check_not_negative, check_positive, is_known
from curvax.optimizers.choices import FactorTerms
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


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      count: updates so far, int32.
      skipped: gradients that were not finite, int32; they left everything else as it was.
      factors: per stack of matrices (`MatrixViews`), accumulated G G^T and G^T G by side.
      roots: their inverse roots, as of the last refresh.
      graft: state of the transformation that lends its norms, `()` without one.
    """

    count: jax.Array
    skipped: jax.Array
    factors: Any
    roots: Any
    graft: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with the version of its form."""
        return pickled(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShampooScaling(MatrixScaling):
    """The keywords of `scale_by_shampoo`.

    Attributes:
      b2: decay of L and R as bias-corrected averages; `None` sums them up as the paper does.
      eps: the multiple of the identity, relative to the mean diagonal of the factor. 1e-4 by default, the paper's
        figure, which is an absolute one there.
      every: updates between two refreshes of the roots, which take an eigendecomposition of each factor.
      start: updates that are those of `graft` before the first roots (Anil et al. 2020). 0 by default.
      graft: a transformation such as `optax.scale_by_adam()` that sees the same gradients and lends each matrix's
        update its Frobenius norm, so that a learning rate means what it means for that transformation (Anil et al.
        2020, arXiv 2002.09018). `None` keeps Shampoo's own norms, as the first paper does.
    """

    b2: Number | None = None
    eps: Number = 1e-4
    every: Count = 1
    start: Count = 0
    graft: optax.GradientTransformation | None = None

    default_max_dim = 8192

    def check(self) -> None:
        """Raises for numbers out of range and for choices that do not go together."""
        check_positive("every", self.every)
        check_positive("eps", self.eps)
        check_not_negative("start", self.start)
        if self.b2 is not None:
            check_fraction("b2", self.b2)
        elif self.terms is FactorTerms.KULLBACK_LEIBLER:
            raise ValueError("FactorTerms.KULLBACK_LEIBLER averages its terms: pass b2=0.95, say, too.")
        if self.graft is None and is_known(self.start) and self.start > 0:
            raise ValueError("start needs graft=, the transformation whose updates come first.")

    def empty(self, stack: Stack) -> BySide:
        """Zero factors of a stack."""
        shape = stack.shape if stack.is_matrix else (math.prod(stack.shape),)
        factors: BySide = {}
        for side in self.sides.of(shape) if stack.is_matrix else (0,):
            length = shape[side - 2] if stack.is_matrix else shape[0]
            dense = length <= self.longest
            own = (*shape[:-2], length, length) if dense else (*shape[:-2], length)
            factors[side] = jnp.zeros(own, stack.dtype if dense else real_dtype(stack.dtype))
        return factors


@spread(ShampooScaling)
def scale_by_shampoo(options: ShampooScaling) -> optax.GradientTransformation:
    """Shampoo's direction: each matrix of the gradient between inverse roots of its two second-moment factors.

    It is G -> L^(-1/4) G R^(-1/4) with L = sum G G^T and R = sum G^T G, each plus eps I; of a vector, H^(-1/2) g with
    H = sum g g^T.

    Leaves with more than two axes are stacks of matrices over their last two, unless `matrices` says something else;
    scalars are vectors of length one. Complex leaves have conjugates where these belong. Nothing depends on the scale
    of the gradients.

    Gradients with an entry that is not finite are skipped as a whole: the update is zero, the state stays as it was,
    and its `skipped` counts them.

    Raises:
      ValueError: `every` or `eps` is not positive, `b2` is not in [0, 1), `start` has no `graft`, or the terms no `b2`.
      TypeError: `max_dim` or `block_dim` is traced: name it in the `static_args` of `optax.inject_hyperparams`.
    """
    options.check()
    graft = options.graft

    def init(params: Any) -> ShampooState:
        stacks = options.views(params).like(jax.tree.leaves(params))
        return ShampooState(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            tree.by_leaf(stacks, options.empty),
            tree.by_leaf(stacks, options.empty),
            () if graft is None else graft.init(params),
        )

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state._replace(count=state.count + 1)
        views, (finite, clean) = options.views(updates), finite_parts(updates)
        stacks = views.like(leaves)
        gradients = _as_matrices(views.split(clean), stacks)
        step = _Step(state.count, finite, options)
        # 1. Add the gradient to the factors L and R.
        factors = step.accumulated(gradients, state.factors, state.roots)
        # 2. Their inverse roots: every so many updates, and at once for a matrix that had no gradient until now.
        due = (state.count % options.every == 0) | _blind(factors, state.roots, gradients)
        roots = jax.lax.cond(
            due & finite & (state.count >= options.start), lambda: step.roots(factors, gradients), lambda: state.roots
        )
        # 3. The gradient between the roots.
        directions = [_applied(g, of) for g, of in zip(gradients, roots, strict=True)]
        # 4. Grafting: each matrix gets the length of the update that another transformation makes.
        lender = state.graft
        if graft is not None:
            lent, lender = graft.update(jax.tree.unflatten(structure, clean), state.graft, params)
            lender = tree.where(finite, lender, state.graft)
            loans = _as_matrices(views.split([x.astype(g.dtype) for x, g in _pairs(lent, clean)]), stacks)
            early = state.count < options.start
            directions = [jnp.where(early, x, _with_norm(m, x)) for m, x in zip(directions, loans, strict=True)]
        joined = views.join([m.reshape(stack.shape) for m, stack in zip(directions, stacks, strict=True)])
        narrow = [jnp.where(finite, m, jnp.zeros_like(m)).astype(x.dtype) for m, x in zip(joined, leaves, strict=True)]
        skipped = state.skipped + (~finite).astype(jnp.int32)
        return jax.tree.unflatten(structure, narrow), ShampooState(step.after, skipped, factors, roots, lender)

    # Optax's types allow arrays and containers as states; a named tuple of tuples of arrays is a pytree all the same.
    return on_any_mesh(optax.GradientTransformation(cast(Any, init), cast(Any, update)))


@dataclasses.dataclass(frozen=True)
class ShampooOptions(ShampooScaling):
    """The keywords of `shampoo`.

    Attributes:
      learning_rate: scalar or schedule. `optax.inject_hyperparams` can carry it and every other number but `max_dim`
        and `block_dim`.
      momentum: decay of an exponential average of the preconditioned gradients; 0.9 as in the paper's experiments.
      weight_decay: times the learning rate.
    """

    learning_rate: optax.ScalarOrSchedule
    _: dataclasses.KW_ONLY
    momentum: Number = 0.9
    weight_decay: Number = 0.0


@spread(ShampooOptions)
def shampoo(options: ShampooOptions) -> optax.GradientTransformation:
    """`scale_by_shampoo` with momentum on the preconditioned gradient, decoupled weight decay and a learning rate.

    Raises:
      TypeError, ValueError: a rate of another kind or out of its range, and those of `scale_by_shampoo`.
    """
    check_rates(options.learning_rate, options.weight_decay, momentum=options.momentum)
    scaling = {field.name: getattr(options, field.name) for field in dataclasses.fields(ShampooScaling)}
    return optax.chain(
        scale_by_shampoo(**scaling),
        optax.ema(cast(float, options.momentum), debias=False),
        optax.add_decayed_weights(options.weight_decay),
        optax.scale_by_learning_rate(options.learning_rate),
    )


@dataclasses.dataclass(frozen=True)
class _Step(Update):
    """The parts of an update.

    Attributes:
      options: the keywords.
    """

    options: ShampooScaling

    def accumulated(
        self, gradients: list[jax.Array], factors: tuple[BySide, ...], roots: tuple[BySide, ...]
    ) -> tuple[BySide, ...]:
        """The sums or averages with these gradients, which are zero where they are not finite."""
        b2 = self.options.b2

        def one(old: jax.Array, term: jax.Array) -> jax.Array:
            return old + term if b2 is None else decayed(old, term, b2, self.finite)

        return tuple(
            {side: one(old, self._term(g, side, old, root)) for side, old in of.items()}
            for g, of, root in zip(gradients, factors, roots, strict=True)
        )

    def _term(self, gradient: jax.Array, side: int, factor: jax.Array, roots: BySide) -> jax.Array:
        dense = _is_dense(factor, gradient)
        if self.options.terms is FactorTerms.GRADIENT or gradient.ndim == 1:
            return outer(gradient, side, dense)
        other = 1 - side
        seen = over_root_scale(gradient)
        if other in roots:
            # G R^-1 G^H is X X^H with X = G R^(-1/2), the root as of the last refresh.
            known = nonzero(roots[other], _is_dense(roots[other], gradient))[..., None, None]
            seen = jnp.where(known, multiply(roots[other], gradient, other), seen)
        return outer(seen, side, dense) / gradient.shape[other - 2]

    def roots(self, factors: tuple[BySide, ...], gradients: list[jax.Array]) -> tuple[BySide, ...]:
        """The inverse roots of all factors."""
        b2, eps, kl = self.options.b2, self.options.eps, self.options.terms is FactorTerms.KULLBACK_LEIBLER
        count = jnp.maximum(self.after, 1)

        def root(factor: jax.Array, gradient: jax.Array, order: int) -> jax.Array:
            mean = factor if b2 is None else corrected(factor, b2, count)
            return _inverse_root(mean, gradient, order, eps)

        return tuple(
            {side: root(f, g, 2 if kl else 2 * len(of)) for side, f in of.items()}
            for of, g in zip(factors, gradients, strict=True)
        )


def _as_matrices(stacks: list[jax.Array], like: list[Stack]) -> list[jax.Array]:
    """The stacks, and as one vector each what is no matrix."""
    return [x if of.is_matrix else x.reshape(-1) for x, of in zip(stacks, like, strict=True)]


def _pairs(lent: Any, leaves: list[jax.Array]) -> zip[tuple[Any, jax.Array]]:
    return zip(jax.tree.leaves(lent), leaves, strict=True)


def _is_dense(factor: jax.Array, gradient: jax.Array) -> bool:
    return factor.ndim == max(gradient.ndim, 2)


def _blind(factors: tuple[BySide, ...], roots: tuple[BySide, ...], gradients: list[jax.Array]) -> jax.Array:
    """Whether a matrix has the roots of no gradient at all while it has seen one by now: they would not let it move."""
    blind = [
        jnp.any(nonzero(f, _is_dense(f, g)) & ~nonzero(root[side], _is_dense(f, g)))
        for of, root, g in zip(factors, roots, gradients, strict=True)
        for side, f in of.items()
    ]
    return jnp.any(jnp.stack(blind))


def _inverse_root(factor: jax.Array, gradient: jax.Array, order: int, eps: Number) -> jax.Array:
    """(factor + eps mean I)^(-1/order), mean that of its diagonal; zero of a zero factor."""
    if not factor.size:
        return factor
    if not _is_dense(factor, gradient):
        unit = unit_of(jnp.mean(factor, axis=-1, keepdims=True))
        return _damped_power(factor / unit, order, eps) * _inverse_root_of_unit(unit, order)
    scale = unit_scale(factor)
    pairs = eigh(factor / scale.astype(factor.dtype))
    values, vectors = pairs.values, pairs.vectors
    # Alike where they are rounding, so that the root there is a multiple of the identity on what has no gradient.
    values = jnp.where(values > rounding(values), values, jnp.zeros_like(values))
    powers = _damped_power(values, order, eps) * _inverse_root_of_unit(scale[..., 0], order)
    scaled = vectors * powers[..., None, :].astype(vectors.dtype)
    return jnp.matmul(scaled, adjoint(vectors), precision=jax.lax.Precision.HIGHEST)


def _inverse_root_of_unit(unit: jax.Array, order: int) -> jax.Array:
    """unit^(-1/order) of a power of two, whose whole part is exact: 2^k and 2^(k + order) have the same digits."""
    _, above = jnp.frexp(unit)
    whole_part, rest = jnp.divmod(above - 1, order)
    return jnp.ldexp(jnp.exp2(-rest.astype(unit.dtype) / order), -whole_part)


def _damped_power(values: jax.Array, order: int, eps: Number) -> jax.Array:
    """(value + eps mean)^(-1/order) of the eigenvalues of each factor, in the last axis."""
    least = jnp.finfo(values.dtype).eps * jnp.max(values, axis=-1, keepdims=True)
    damping = jnp.asarray(eps, values.dtype) * jnp.mean(values, axis=-1, keepdims=True)
    # No eigenvalue is known better than to the rounding of the largest.
    damped = jnp.maximum(values + damping, least)
    return jnp.where(damped > 0, jnp.where(damped > 0, damped, jnp.ones_like(damped)) ** (-1 / order), 0)


def _applied(gradient: jax.Array, roots: BySide) -> jax.Array:
    for side, root in roots.items():
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
