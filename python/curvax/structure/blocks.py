"""Curvature by blocks: which entries of which leaves share a Kronecker-factored block, and which keep a diagonal.

At a layer use a block W (G, n, m) acts as h = a W, so the curvature of each group is a sum over examples of
(sum_t a_t d_t^T)(sum_t a_t d_t^T)^T, which Kronecker factors A (n, n) and B (m, m) approximate by A kron B. A bias of
the layer use's output is one more row of W, whose activation is always one. A leaf that is used at several layer uses
has one block per layer use where these see different entries of it (a fused projection, cut up), one block for all
layer uses where they see the same entries in the same order (weights used twice: their positions join), and a diagonal
where they see them in different orders (an embedding whose transpose is the output layer), as has a leaf without any
layer use.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax.structure.recognize import NONE, Structure
from curvax.structure.uses import Bias, EmbeddingUse, LayerUse
from curvax.structure.views import disjoint


@dataclasses.dataclass(frozen=True)
class KroneckerBlock:
    """Entries of a leaf, and of a bias beside it, whose curvature is A kron B per group.

    Attributes:
      leaf: index of the leaf.
      uses: indices of the layer uses that see these entries, all in the order of the first one.
      use: the first one, which says how the leaf is laid out.
      bias: the leaf that makes the last row of the block, or `None`.
    """

    leaf: int
    uses: tuple[int, ...]
    use: LayerUse
    bias: Bias | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, inputs with the bias, outputs)."""
        groups, n, m = self.use.block
        return groups, n + (self.bias is not None), m

    @property
    def size(self) -> int:
        """Entries of the block, those of the bias included."""
        return math.prod(self.shape)

    @property
    def embedding(self) -> bool:
        """Whether activations are one-hot, so that A is a diagonal and kept as a vector."""
        return isinstance(self.use, EmbeddingUse)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of A over all groups: (G, n, n); of an embedding (G, n)."""
        groups, n, _ = self.shape
        return (groups, n) if self.embedding else (groups, n, n)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Shape of B over all groups."""
        groups, _, m = self.shape
        return groups, m, m

    @property
    def scale(self) -> float:
        """The number that the leaf is multiplied with on its way to the layer use; the activations take it over."""
        return self.use.factor

    def take(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The block's entries (G, n, m) of a vector given by its leaves."""
        # `from_leaf` scales, as the leaf is scaled; here entries only move.
        block = _unscaled(self.use.from_leaf(leaves[self.leaf]), self.scale)
        if self.bias is None:
            return block
        groups, _, m = self.shape
        row = self.bias.from_leaf(leaves[self.bias.leaf]).reshape(groups, 1, m)
        return jnp.concatenate([block, row.astype(block.dtype)], axis=1)

    def put(self, block: jax.Array) -> list[tuple[int, jax.Array]]:
        """The block's entries at their places in its leaves, zero elsewhere: (leaf, array) pairs."""
        if self.bias is None:
            return [(self.leaf, self._weights(block))]
        return [(self.leaf, self._weights(block[:, :-1])), (self.bias.leaf, self.bias.to_leaf(block[:, -1]))]

    def _weights(self, block: jax.Array) -> jax.Array:
        return _unscaled(self.use.to_leaf(block), self.scale)


@dataclasses.dataclass(frozen=True)
class DiagonalBlock:
    """A leaf whose curvature is a diagonal: mean squares of the rows of its Jacobian.

    Attributes:
      leaf: index of the leaf.
      shape: its shape.
      uses: the layer uses at which it is used, if it is a leaf of layer uses.
      bias_of: the layer uses whose bias it is.
      explicit: its place among the leaves with explicit rows, or `None`.
      reason: why it has no Kronecker factors.
    """

    leaf: int
    shape: tuple[int, ...]
    uses: tuple[int, ...] = ()
    bias_of: tuple[int, ...] = ()
    explicit: int | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class KroneckerBlocks:
    """The blocks of a model.

    Equality is that of what a state's arrays mean: blocks, and the orders in which biases and kernels are laid out.

    Attributes:
      kronecker, diagonal: the blocks.
      uses: all layer uses of the model.
      shapes: of the leaves.
      dtype: of factors.
    """

    kronecker: tuple[KroneckerBlock, ...]
    diagonal: tuple[DiagonalBlock, ...]
    uses: tuple[LayerUse, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        biases = tuple(tuple(b.bias.order.tolist()) for b in self.kronecker if b.bias is not None)
        layouts = tuple(use.entry_order for use in self.uses)
        identity = (self.kronecker, self.diagonal, self.uses, self.shapes, str(self.dtype), biases, layouts)
        object.__setattr__(self, "_identity", identity)
        object.__setattr__(self, "_hash", hash(identity))

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, KroneckerBlocks) and vars(self)["_identity"] == vars(other)["_identity"]
        )

    def __hash__(self) -> int:
        return vars(self)["_hash"]

    def partial(self) -> frozenset[int]:
        """Leaves with entries that belong to no block: those of slices that are not used."""
        covered: dict[int, int] = collections.defaultdict(int)
        for block in self.kronecker:
            covered[block.leaf] += math.prod(block.use.block)
        return frozenset(leaf for leaf, count in covered.items() if count < math.prod(self.shapes[leaf]))

    def narrowed(self, max_width: int) -> KroneckerBlocks:
        """The same with a diagonal for every leaf that has a factor of more than `max_width` rows."""
        wide: dict[int, int] = {}
        for block in self.kronecker:
            _, n, m = block.shape
            width = m if block.embedding else max(n, m)
            if width > max_width:
                wide[block.leaf] = max(width, wide.get(block.leaf, 0))
        diagonal = list(self.diagonal)
        for leaf, width in wide.items():
            reason = f"a factor would have {width} rows, and max_width is {max_width}"
            indices = tuple(i for block in self.kronecker if block.leaf == leaf for i in block.uses)
            diagonal.append(DiagonalBlock(leaf, self.shapes[leaf], uses=indices, reason=reason))
        for block in self.kronecker:
            if block.leaf in wide and block.bias is not None:
                reason = "it is the bias of weights without factors"
                bias = block.bias
                diagonal.append(DiagonalBlock(bias.leaf, bias.shape, bias_of=block.uses, reason=reason))
        kept = tuple(block for block in self.kronecker if block.leaf not in wide)
        return dataclasses.replace(self, kronecker=kept, diagonal=tuple(diagonal))

    def describe(self, names: Sequence[str]) -> tuple[str, ...]:
        """One line per leaf: the block that it has, and why it has no better one."""
        lines: dict[int, list[str]] = collections.defaultdict(list)
        for block in self.kronecker:
            groups, n, m = block.shape
            many = f"{groups} x " if groups > 1 else ""
            shared = f", joined over {len(block.uses)} uses" if len(block.uses) > 1 else ""
            factors = f"diagonal {n} and {m} x {m}" if block.embedding else f"{n} x {n} and {m} x {m}"
            lines[block.leaf].append(f"Kronecker factors {many}{factors} ({block.use.rule}{shared})")
            if block.bias is not None:
                lines[block.bias.leaf].append(f"within the Kronecker factors of {names[block.leaf]}")
        for block in self.diagonal:
            lines[block.leaf].append(f"diagonal: {block.reason}")
        return tuple(f"{names[leaf]}: {'; '.join(lines[leaf])}" for leaf in sorted(lines))


def find_blocks(structure: Structure, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> KroneckerBlocks:
    """The blocks of a model's structure.

    Args:
      structure: the structure.
      shapes: of the parameter leaves.
      dtype: of factors.
    """
    by_leaf: dict[int, list[int]] = collections.defaultdict(list)
    for index, use in enumerate(structure.uses):
        by_leaf[use.leaf].append(index)
    kronecker: list[KroneckerBlock] = []
    diagonal = [
        DiagonalBlock(leaf, tuple(shapes[leaf]), explicit=place, reason=_why(structure, leaf))
        for place, leaf in enumerate(structure.explicit)
    ]
    for leaf, indices in by_leaf.items():
        uses = [structure.uses[i] for i in indices]
        own = _of_leaf(leaf, indices, uses)
        kronecker += own
        if not own:
            reason = "it is used in several orders of its entries"
            diagonal.append(DiagonalBlock(leaf, tuple(shapes[leaf]), uses=tuple(indices), reason=reason))
        joined = {block.bias.leaf for block in own if block.bias is not None}
        for index, use in zip(indices, uses, strict=True):
            if use.bias is not None and use.bias.leaf not in joined:
                reason = "it is the bias of weights that are used several times"
                bias = use.bias
                diagonal.append(DiagonalBlock(bias.leaf, bias.shape, bias_of=(index,), reason=reason))
    idle = [i for i, finding in enumerate(structure.findings) if finding.rule == NONE]
    diagonal += [DiagonalBlock(i, tuple(shapes[i]), reason="the outputs do not depend on it") for i in idle]
    return KroneckerBlocks(
        tuple(kronecker), tuple(diagonal), structure.uses, tuple(map(tuple, shapes)), np.dtype(dtype)
    )


def _why(structure: Structure, leaf: int) -> str:
    finding = structure.findings[leaf]
    return f"it enters as {finding.rule}" + (f" ({finding.reason})" if finding.reason else "")


def _of_leaf(leaf: int, indices: Sequence[int], uses: Sequence[LayerUse]) -> list[KroneckerBlock]:
    if any(use.factor == 0 for use in uses):
        return []
    first = uses[0]
    if len(uses) == 1:
        return [KroneckerBlock(leaf, tuple(indices), first, first.bias)]
    if all(type(s) is type(first) and s.views == first.views and s.same_layout(first) for s in uses[1:]):
        return [KroneckerBlock(leaf, tuple(indices), first, None)]
    if all(disjoint(a.views, b.views) for a, b in itertools.combinations(uses, 2)):
        return [KroneckerBlock(leaf, (i,), s, s.bias) for i, s in zip(indices, uses, strict=True)]
    return []


def _unscaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else x * jnp.asarray(1 / scale, x.dtype)
