"""What an optimizer keeps, in bytes, before anything is made."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from curvax.optimizers.axes import paths
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state.

    Attributes:
      by_leaf: (path, bytes) of what is kept because of each parameter.
      shared: of the rest: counts, rates.
    """

    by_leaf: tuple[tuple[str, int], ...]
    shared: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.shared + sum(own for _, own in self.by_leaf)

    def explain(self) -> str:
        """A line per leaf and one for all."""
        lines = [f"{path}: {own:,} bytes" for path, own in self.by_leaf]
        return "\n".join([*lines, f"state of the optimizer: {self.total:,} bytes"])


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> StateBytes:
    """The bytes of `tx.init(params)` by parameter, of any Optax transformation, without making it.

    Args:
      tx: whose state is a sum over parameters, as of all optimizers here.
      params: arrays or shapes (`jax.eval_shape`, `jax.ShapeDtypeStruct`).
    """
    leaves, structure = jax.tree.flatten(params)

    def kept(only: int | None) -> int:
        # Others without entries, not left out: labels and rules still find them.
        shapes = [jax.ShapeDtypeStruct(x.shape if i == only else (0,), x.dtype) for i, x in enumerate(leaves)]
        return _bytes(jax.eval_shape(tx.init, jax.tree.unflatten(structure, shapes)))

    shared = kept(None)
    by_leaf = tuple((path, kept(i) - shared) for i, path in enumerate(paths(params)))
    return StateBytes(by_leaf, shared)


def total_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """The bytes of `tx.init(params)` together, from arrays or shapes."""
    return _bytes(jax.eval_shape(tx.init, params))


def _bytes(state: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
