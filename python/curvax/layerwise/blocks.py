"""Blocks of parameters: which leaf, or which layer of a stacked leaf, belongs to which block."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath, SequenceKey, keystr

from curvax import tree
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class ParameterBlocks:
    """A partition of the parameters.

    Attributes:
      names: of the blocks.
      of_leaf: for each leaf, in the order of `jax.tree.leaves`, the block it belongs to; or one block for each entry of
        its leading axis, where layers are stacked.
    """

    names: tuple[str, ...]
    of_leaf: tuple[int | tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.names)

    def norms(self, vector: PyTree) -> jax.Array:
        """Euclidean norm of each block of an upcast vector, safe against overflow and underflow of the squares."""
        top = tree.max_abs(vector)
        scale = jnp.where((top > 0) & jnp.isfinite(top), top, jnp.ones_like(top))
        squares = jnp.zeros((self.count,), scale.dtype)
        for leaf, owner in zip(jax.tree.leaves(vector), self.of_leaf, strict=True):
            square = jnp.square(leaf.astype(scale.dtype) / scale)
            if isinstance(owner, int):
                squares = squares.at[owner].add(jnp.sum(square))
            else:
                squares = squares.at[jnp.asarray(owner)].add(jnp.sum(square.reshape(len(owner), -1), axis=1))
        return scale * jnp.sqrt(squares)

    def choose(self, chosen: tuple[int, ...], inside: PyTree, outside: PyTree) -> PyTree:
        """`inside` in the chosen blocks, `outside` in all others."""

        def one(owner: int | tuple[int, ...], a: jax.Array, b: jax.Array) -> jax.Array:
            if isinstance(owner, int):
                return a if owner in chosen else b
            layers = np.asarray([block in chosen for block in owner])
            return jnp.where(layers.reshape(layers.shape + (1,) * (a.ndim - 1)), a, b)

        leaves, structure = jax.tree.flatten(inside)
        mixed = [one(o, a, b) for o, a, b in zip(self.of_leaf, leaves, jax.tree.leaves(outside), strict=True)]
        return jax.tree.unflatten(structure, mixed)

    def scale(self, factors: jax.Array, vector: PyTree) -> PyTree:
        """Each block of `vector` times its entry of `factors` (count,)."""

        def scaled(leaf: jax.Array, owner: int | tuple[int, ...]) -> jax.Array:
            factor = factors[jnp.asarray(owner)].astype(leaf.dtype)
            return leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))

        leaves, structure = jax.tree.flatten(vector)
        return jax.tree.unflatten(structure, [scaled(x, o) for x, o in zip(leaves, self.of_leaf, strict=True)])


class BlockPartition(abc.ABC):
    """A rule that makes blocks from a parameter tree."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The rule as the plan prints it."""

    @abc.abstractmethod
    def blocks(self, params: PyTree) -> ParameterBlocks:
        """The blocks of these parameters (arrays or shapes), every leaf in exactly one of them.

        Raises:
          ValueError: a leaf is left out, or the rule does not fit the parameters; the message says which.
        """


@dataclasses.dataclass(frozen=True)
class ByGroup(BlockPartition):
    """One block for each top-level entry of the parameter tree.

    Attributes:
      split: names of entries that hold several layers, each a block of its own: a sequence is split into its members,
        any other subtree along the leading axis of its leaves (layers stacked for `jax.lax.scan`). A mapping from
        names to layers is no sequence: `ByPath` or `ByPrefix` split it.

    Raises:
      TypeError: `split` is a single string.
    """

    split: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.split, str):
            raise TypeError(f"split is the string {self.split!r}: pass a tuple of names, ({self.split!r},).")

    @property
    def name(self) -> str:
        return "top-level groups" + (f", layers of {', '.join(self.split)} apart" if self.split else "")

    def blocks(self, params: PyTree) -> ParameterBlocks:
        paths = jax.tree_util.tree_leaves_with_path(params)
        groups = [_text(path[:1]) for path, _ in paths]
        for wanted in self.split:
            if wanted not in groups:
                raise ValueError(f"split names {wanted!r}, but the parameters have {', '.join(sorted(set(groups)))}.")
        depth = {group: self._stack_depth(group, groups, paths) for group in self.split}
        owners: list[str | tuple[str, ...]] = []
        for (path, _), group in zip(paths, groups, strict=True):
            if group not in depth:
                owners.append(group)
            elif depth[group] is None:
                owners.append(_text(path[:2]))
            else:
                owners.append(tuple(f"{group}/{i}" for i in range(depth[group] or 0)))
        return _numbered(owners)

    def _stack_depth(self, group: str, groups: list[str], paths: list[tuple[KeyPath, Any]]) -> int | None:
        """Number of stacked layers; `None` for a sequence of layers."""
        members = [(path, leaf) for (path, leaf), name in zip(paths, groups, strict=True) if name == group]
        if all(len(path) > 1 and isinstance(path[1], SequenceKey) for path, _ in members):
            return None
        depths = {leaf.shape[0] if leaf.ndim else None for _, leaf in members}
        if len(depths) != 1 or None in depths:
            raise ValueError(
                f"{group!r} is to be split into layers, but its leaves have leading axes of {depths}: stack every leaf "
                "along a first axis of layers, or hold the layers in a list."
            )
        return depths.pop()


@dataclasses.dataclass(frozen=True)
class ByLeaf(BlockPartition):
    """Every leaf is a block."""

    @property
    def name(self) -> str:
        return "leaves"

    def blocks(self, params: PyTree) -> ParameterBlocks:
        # By position: two paths may read alike, {"a/b": x} and {"a": {"b": x}}.
        names = tuple(_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
        return ParameterBlocks(names, tuple(range(len(names))))


@dataclasses.dataclass(frozen=True)
class ByPath(BlockPartition):
    """Blocks by a function of a leaf's path.

    Attributes:
      block: path such as "layers/0/attention/query" -> name of the block.
    """

    block: Callable[[str], str]

    @property
    def name(self) -> str:
        return f"by {getattr(self.block, '__name__', 'path')}"

    def blocks(self, params: PyTree) -> ParameterBlocks:
        owners: list[str | tuple[str, ...]] = []
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            block = self.block(_text(path))
            if not isinstance(block, str):
                raise ValueError(
                    f"the partition gives no block for {_text(path)!r} (it returned {block!r}): return a name for "
                    "every leaf, and keep a leaf from training with frozen=."
                )
            owners.append(block)
        return _numbered(owners)


@dataclasses.dataclass(frozen=True)
class ByPrefix(BlockPartition):
    """Blocks by the beginnings of paths.

    Attributes:
      prefixes: name of a block -> beginnings of the paths of its leaves, at whole components: "layers/1" is not
        "layers/10".

    Raises:
      TypeError: a block has a single string in the place of a tuple of them.
    """

    prefixes: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for block, starts in self.prefixes.items():
            if isinstance(starts, str):
                raise TypeError(f"block {block!r} has the string {starts!r}: pass a tuple of paths, ({starts!r},).")

    @property
    def name(self) -> str:
        return "by prefixes of paths"

    def blocks(self, params: PyTree) -> ParameterBlocks:
        owners: list[str | tuple[str, ...]] = []
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            text = _text(path)
            blocks = [b for b, starts in self.prefixes.items() if any(_begins(text, start) for start in starts)]
            if len(blocks) != 1:
                what = f"is in the blocks {', '.join(blocks)}" if blocks else "is in no block"
                raise ValueError(f"parameter {text!r} {what}: give every leaf exactly one block.")
            owners.append(blocks[0])
        missing = set(self.prefixes) - {name for name in owners if isinstance(name, str)}
        if missing:
            raise ValueError(
                f"no parameter that trains belongs to {', '.join(sorted(missing))}: drop the block, mend its paths, or "
                "do not freeze its parameters."
            )
        return _numbered(owners)


def _begins(text: str, start: str) -> bool:
    return text == start or text.startswith(start + "/")


def _text(path: KeyPath) -> str:
    return keystr(path, simple=True, separator="/") or "all"


def _numbered(owners: list[str | tuple[str, ...]]) -> ParameterBlocks:
    """Blocks in the order in which their names come up."""
    names: dict[str, int] = {}
    for owner in owners:
        for name in (owner,) if isinstance(owner, str) else owner:
            names.setdefault(name, len(names))
    of_leaf = tuple(names[o] if isinstance(o, str) else tuple(names[name] for name in o) for o in owners)
    return ParameterBlocks(tuple(names), of_leaf)
