"""Which parameters train: the split of a parameter tree by a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import tree
from curvax.complex_parts import is_parts, join_complex, split_complex
from curvax.tree import PyTree

Mask = PyTree | Callable[[PyTree], PyTree]


def _is_gap(x: Any) -> bool:
    # Optax's masking wrappers hand over parameters with MaskedNode where another transformation is responsible.
    return x is None or isinstance(x, optax.MaskedNode)


def is_function(mask: Any) -> TypeGuard[Callable[[PyTree], PyTree]]:
    """Whether a mask is a function from parameters to one; a module with `__call__` is a tree all the same."""
    return callable(mask) and jax.tree_util.all_leaves([mask])


def _flag(mask: Any) -> bool:
    if not isinstance(mask, bool | np.bool_):
        raise TypeError("an entry of the mask is not a boolean")
    return bool(mask)


@dataclasses.dataclass(frozen=True)
class TrainablePartition:
    """Splits parameters into a trainable and a frozen tree, each with `None` where the other has the leaf.

    A complex leaf trains as its two real parts (`curvax.complex_parts`); `merge` makes it complex again.

    Attributes:
      frozen: tree of booleans like the parameters (a prefix will do), or a function from the parameters to one; True
        keeps a leaf as it is. Leaves that are neither floating point nor complex (counters, keys) are always frozen:
        nothing can be differentiated there.
    """

    frozen: Mask | None = None

    def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Returns (trainable, frozen)."""
        self._check(params)
        mask = self._mask(params)
        # With dtypes of their own, as what a step returns: a state of weakly typed leaves would compile it anew.
        trainable = tree.fixed(split_complex(jax.tree.map(lambda p, m: None if m else p, params, mask)))
        frozen = jax.tree.map(lambda p, m: p if m else None, params, mask)
        return trainable, frozen

    def merge(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """Inverse of `split`; fills the gaps of `trainable` from `frozen`."""
        if frozen is not None:
            trainable = jax.tree.map(
                lambda t, f: f if _is_gap(t) else t, trainable, frozen, is_leaf=lambda x: _is_gap(x) or is_parts(x)
            )
        return join_complex(trainable)

    def _mask(self, params: PyTree) -> PyTree:
        chosen = self.frozen(params) if is_function(self.frozen) else self.frozen
        if chosen is None:
            chosen = False
        try:
            full = jax.tree.map(lambda m, p: jax.tree.map(lambda _: _flag(m), p), chosen, params)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "`frozen` must be a tree of booleans with the structure of the parameters, or a prefix of it."
            ) from error
        return jax.tree.map(lambda m, p: m or not jnp.issubdtype(p.dtype, jnp.inexact), full, params)

    def _check(self, params: PyTree) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct | np.generic):
                name = jax.tree_util.keystr(path) or "the parameters"
                raise TypeError(
                    f"{name} is a {type(leaf).__name__}, not an array: keep static parts out of the parameters "
                    "(nnx.split or equinox.partition separate them) or wrap numbers with jnp.asarray."
                )
