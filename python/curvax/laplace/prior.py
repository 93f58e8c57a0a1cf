"""The precision of the prior: one number, or one for each leaf of the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.numbers import check_positive, is_known
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prior:
    """P, a multiple of the identity on each leaf.

    Attributes:
      values: the numbers that differ, scalars.
      index: for each leaf which of them it has; static.
      sizes: of the leaves; static.
    """

    values: tuple[jax.Array, ...]
    index: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(precision: Prior | PyTree, params: PyTree) -> Prior:
        """From a number, or a tree of numbers that is a prefix of the parameters, in which an entry stays one number.

        Raises:
          ValueError: the tree fits no parameters, or a precision that is known is not positive.
        """
        if isinstance(precision, Prior):
            return precision
        given, structure = jax.tree.flatten(precision)
        if any(np.ndim(value) for value in given):
            raise ValueError("prior_precision has an entry that is no number: give each leaf of the parameters one.")
        for value in given:
            check_positive("prior_precision", value)
        like = jax.eval_shape(tree.upcast, params)
        try:
            places = jax.tree.unflatten(structure, list(range(len(given))))
            index = jax.tree.leaves(jax.tree.map(lambda i, part: jax.tree.map(lambda _: i, part), places, like))
        except ValueError as error:
            raise ValueError(
                "prior_precision must be a number, or a tree of numbers like the parameters or a prefix of these."
            ) from error
        dtype = tree.scalar_dtype(params)
        used = sorted(set(index))
        values = tuple(jnp.asarray(given[i], dtype) for i in used)
        return Prior(values, tuple(used.index(i) for i in index), tuple(tree.size(x) for x in jax.tree.leaves(like)))

    @property
    def leaves(self) -> tuple[jax.Array, ...]:
        """The precision of each leaf."""
        return tuple(self.values[i] for i in self.index)

    @property
    def uniform(self) -> bool:
        """Whether all leaves have one number, which makes some posteriors cheaper."""
        return len(self.values) == 1

    def shared(self, leaves: Sequence[int], names: Sequence[str]) -> jax.Array:
        """The one precision of some leaves.

        Raises:
          ValueError: they have several.
        """
        first, *others = leaves
        for i in others:
            mine, other = self.values[self.index[first]], self.values[self.index[i]]
            if other is not mine and not (is_known(mine, other) and float(other) == float(mine)):
                raise ValueError(
                    f"{names[first]} and {names[i]} share Kronecker factors and cannot have precisions of their own: "
                    "give their common parent one number, or take another form."
                )
        return self.values[self.index[first]]

    def scaled(self, v: PyTree, power: float) -> PyTree:
        """P^power v."""
        leaves, structure = jax.tree.flatten(v)
        each = [p.astype(x.dtype) ** power * x for p, x in zip(self.leaves, leaves, strict=True)]
        return jax.tree.unflatten(structure, each)

    def quadratic(self, v: PyTree) -> jax.Array:
        """v.Pv."""
        return tree.vdot(v, self.scaled(v, 1.0))

    def flat(self) -> jax.Array:
        """The diagonal of P, (n,)."""
        return jnp.concatenate([jnp.full((n,), p) for n, p in zip(self.sizes, self.leaves, strict=True)])
