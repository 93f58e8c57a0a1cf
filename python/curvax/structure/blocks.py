"""Curvature by blocks: which entries of which leaves share a Kronecker-factored block, and which keep a diagonal.

At a layer use a block W (G, n, m) acts as h = a W, so the curvature of each group is a sum over examples of
(sum_t a_t d_t^T)(sum_t a_t d_t^T)^T, which Kronecker factors A (n, n) and B (m, m) approximate by A kron B. A bias of
the layer use's output is one more row of W, whose activation is always one. A leaf that is used at several layer uses
has one block per layer use where these see different entries of it (a fused projection, cut up), one block for all
layer uses where they see the same entries in the same order (weights used twice: their positions join) or transposed
(an embedding whose transpose is the output layer), and a diagonal where they see them in other orders, as has a leaf
without any layer use. Parts of a leaf that enter by themselves (`curvax.structure.regions`) are as so many leaves: of a
vector that holds all parameters, each slice has the block that it would have as a leaf.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax.structure.regions import Region
from curvax.structure.uses import Bias, EmbeddingUse, LayerUse
from curvax.structure.views import back
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class KroneckerBlock:
    """Entries of a leaf, and of a bias beside it, whose curvature is A kron B per group.

    Attributes:
      leaf: index of the leaf.
      uses: indices of the layer uses that see these entries in the order of the first one.
      use: the first one, which says how the leaf is laid out.
      region: the leaf, or the part of it, that the layer uses are of.
      bias: the leaf, or the part of one, that makes the last row of the block, or `None`.
      biased: those of `uses` to whose outputs the bias is added, each with the activation of the bias there.
      swapped: indices of further layer uses, whose inputs are the block's outputs and whose outputs its inputs.
    """

    leaf: int
    uses: tuple[int, ...]
    use: LayerUse
    region: Region
    bias: Bias | None = None
    biased: tuple[tuple[int, float], ...] = ()
    swapped: tuple[int, ...] = ()

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

    def bias_alone(self, reason: str) -> list[DiagonalBlock]:
        """A diagonal for the bias, if there is one."""
        biased = tuple(i for i, _ in self.biased)
        return [] if self.bias is None else [DiagonalBlock(self.bias.region, bias_of=biased, reason=reason)]

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
        return _leaves(self.parts(block))

    def parts(self, block: jax.Array) -> list[tuple[Region, jax.Array]]:
        """The block's entries at their places in its regions, zero elsewhere: (region, array) pairs."""
        if self.bias is None:
            return [(self.region, self._weights(block))]
        return [
            (self.region, self._weights(block[:, :-1])),
            (self.bias.region, self.bias.to_region(block[:, -1])),
        ]

    def _weights(self, block: jax.Array) -> jax.Array:
        return _unscaled(back(self.region.inside(self.use.views), self.use.to_operand(block)), self.scale)


def _leaves(parts: Sequence[tuple[Region, jax.Array]]) -> list[tuple[int, jax.Array]]:
    return [(region.leaf, region.put(x)) for region, x in parts]


@dataclasses.dataclass(frozen=True)
class DiagonalBlock:
    """A leaf, or a part of one, whose curvature is a diagonal: mean squares of the rows of its Jacobian.

    Attributes:
      region: the entries.
      uses: the layer uses at which they are used, if they are weights.
      bias_of: the layer uses whose bias they are.
      explicit: the regions with explicit rows among them, by their places.
      reason: why it has no Kronecker factors.
      lost: whether it would have them if it were used in another way: it is neither a bias nor a gain, is used, and has
        two axes at least.
      scaled: whether the mean of the diagonal stands for all of it.
    """

    region: Region
    uses: tuple[int, ...] = ()
    bias_of: tuple[int, ...] = ()
    explicit: tuple[tuple[int, ExplicitRegion], ...] = ()
    reason: str = ""
    lost: bool = False
    scaled: bool = False

    @property
    def leaf(self) -> int:
        """Index of the leaf."""
        return self.region.leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the region."""
        return self.region.shape


@dataclasses.dataclass(frozen=True)
class FullBlock:
    """A leaf, or a part of one, whose curvature is kept as a matrix: A is the number 1 and B the matrix.

    Attributes:
      of: the entries, where their rows come from and why they have this block.
    """

    of: DiagonalBlock
    bias: None = None

    @property
    def uses(self) -> tuple[int, ...]:
        """The layer uses at which they are used, if they are weights."""
        return self.of.uses

    @property
    def swapped(self) -> tuple[int, ...]:
        """None: formed rows know no sides."""
        return ()

    @property
    def region(self) -> Region:
        """The entries."""
        return self.of.region

    @property
    def leaf(self) -> int:
        """Index of the leaf."""
        return self.of.leaf

    @property
    def size(self) -> int:
        """Entries of the block."""
        return self.region.size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, inputs, outputs): all entries are outputs."""
        return 1, 1, self.size

    @property
    def embedding(self) -> bool:
        """False: A is a matrix."""
        return False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of A."""
        return 1, 1, 1

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Shape of B."""
        return 1, self.size, self.size

    def take(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The block's entries (1, 1, size) of a vector given by its leaves."""
        return self.region.take(leaves[self.leaf]).reshape(self.shape)

    def put(self, block: jax.Array) -> list[tuple[int, jax.Array]]:
        """The block's entries at their places in the leaf, zero elsewhere: one (leaf, array) pair."""
        return _leaves(self.parts(block))

    def parts(self, block: jax.Array) -> list[tuple[Region, jax.Array]]:
        """The block's entries as its region."""
        return [(self.region, block.reshape(self.region.shape))]


FactoredBlock: TypeAlias = KroneckerBlock | FullBlock
"""A block with factors A and B."""


class ExplicitRegion(NamedTuple):
    """What has explicit rows: why it has these, and whether it might have been a layer (`DiagonalBlock.lost`)."""

    region: Region
    reason: str
    lost: bool


@dataclasses.dataclass(frozen=True, eq=False)
class KroneckerBlocks:
    """The blocks of a model.

    Equality is that of what a state's arrays mean: blocks, and the orders in which biases and kernels are laid out.

    Attributes:
      kronecker, diagonal: the blocks; the full ones are among those with Kronecker factors.
      uses: all layer uses of the model.
      shapes: of the leaves.
      dtype: of factors.
      statistics: how many statistics over the examples, as those of BatchNorm, the model's factors take as constants.
    """

    kronecker: tuple[FactoredBlock, ...]
    diagonal: tuple[DiagonalBlock, ...]
    uses: tuple[LayerUse, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype
    statistics: int = 0

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

    @property
    def wiring(self) -> Wiring:
        """How the parameters enter."""
        return Wiring.of(self.uses, [entry.region for entry in self.explicit_regions])

    @property
    def digest(self) -> str:
        """Of the wiring and of which leaves have factors; the same in every process."""
        factored = [(block.region, block.shape) for block in self.kronecker]
        factored += [(block.region, ()) for block in self.diagonal if block.scaled]
        return hashlib.sha256(repr((self.wiring, factored)).encode()).hexdigest()[:16]

    @property
    def explicit_regions(self) -> list[ExplicitRegion]:
        """What has explicit rows, by their places."""
        formed = [*self.diagonal, *(block.of for block in self.kronecker if isinstance(block, FullBlock))]
        placed = dict(entry for block in formed for entry in block.explicit)
        return [placed[place] for place in sorted(placed)]

    def partial(self) -> frozenset[int]:
        """Leaves with entries that belong to no block: those of slices that are not used."""
        covered: dict[int, int] = collections.defaultdict(int)
        for block in self.kronecker:
            of_bias = 0 if block.bias is None else block.bias.region.size
            covered[block.leaf] += block.size - of_bias
            if block.bias is not None:
                covered[block.bias.leaf] += of_bias
        for block in self.diagonal:
            covered[block.leaf] += block.region.size
        return frozenset(leaf for leaf, count in covered.items() if count < math.prod(self.shapes[leaf]))

    def map_entries(
        self,
        v: PyTree,
        kronecker: Callable[[int, jax.Array], jax.Array],
        diagonal: Callable[[int, jax.Array], jax.Array],
        idle: Callable[[jax.Array], jax.Array],
    ) -> PyTree:
        """A block diagonal matrix times a vector, in the vector's dtypes.

        Args:
          v: the vector.
          kronecker: (index of a Kronecker block, its entries (G, n, m)) -> the product's.
          diagonal: (index of a diagonal block, its entries) -> the product's.
          idle: entries that belong to no block, zero elsewhere -> the product's.
        """
        leaves, structure = jax.tree.flatten(v)
        upcast = [x.astype(self.dtype) for x in leaves]
        product, seen = _Sums(), _Sums()
        for index, block in enumerate(self.kronecker):
            entries = block.take(upcast)
            product.add(block.parts(kronecker(index, entries)))
            seen.add(block.parts(entries))
        for index, block in enumerate(self.diagonal):
            entries = block.region.take(upcast[block.leaf])
            product.add([(block.region, diagonal(index, entries))])
            seen.add([(block.region, entries)])
        whole = [product.placed(leaf, jnp.zeros_like(x)) for leaf, x in enumerate(upcast)]
        for leaf in self.partial():
            rest = upcast[leaf]
            for region, entries in seen.of(leaf):
                rest = region.replaced(rest, region.take(rest) - entries)
            whole[leaf] = whole[leaf] + idle(rest)
        cast = [y.astype(x.dtype) for x, y in zip(leaves, whole, strict=True)]
        return jax.tree.unflatten(structure, cast)

    def narrowed(self, max_width: int) -> KroneckerBlocks:
        """The same with a diagonal for every leaf, or part of one, that has a factor of more than `max_width` rows."""
        wide: dict[Region, int] = {}
        for block in self.kronecker:
            _, n, m = block.shape
            width = m if block.embedding else max(n, m)
            if width > max_width:
                wide[block.region] = max(width, wide.get(block.region, 0))
        return self.with_diagonal(
            {
                region: f"a factor would have {width} rows, and max_width is {max_width}"
                for region, width in wide.items()
            }
        )

    def with_diagonal(self, regions: Mapping[Region, str]) -> KroneckerBlocks:
        """The same with a diagonal for these regions of Kronecker blocks, and for their biases; with the reasons."""
        diagonal = list(self.diagonal)
        for region, reason in regions.items():
            blocks = [block for block in self.kronecker if block.region == region]
            full = [block.of for block in blocks if isinstance(block, FullBlock)]
            indices = tuple(i for b in blocks if isinstance(b, KroneckerBlock) for i in (*b.uses, *b.swapped))
            diagonal += [dataclasses.replace(of, reason=reason) for of in full]
            diagonal += [] if full else [DiagonalBlock(region, uses=indices, reason=reason)]
        for block in self.kronecker:
            if block.region in regions and isinstance(block, KroneckerBlock):
                diagonal += block.bias_alone("it is the bias of weights without factors")
        kept = tuple(block for block in self.kronecker if block.region not in regions)
        return dataclasses.replace(self, kronecker=kept, diagonal=tuple(diagonal))

    def without_bias(self, block: KroneckerBlock, reason: str) -> KroneckerBlocks:
        """The same with a block whose bias keeps a diagonal, and why."""
        alone = dataclasses.replace(block, bias=None, biased=())
        kronecker = tuple(alone if b is block else b for b in self.kronecker)
        return dataclasses.replace(self, kronecker=kronecker, diagonal=(*self.diagonal, *block.bias_alone(reason)))

    def with_kinds(self, full: Sequence[FullBlock], diagonal: Sequence[DiagonalBlock]) -> KroneckerBlocks:
        """The same with these full blocks more, and these diagonal ones in place of its own."""
        return dataclasses.replace(self, kronecker=(*self.kronecker, *full), diagonal=tuple(diagonal))

    def describe(self, names: Sequence[str]) -> tuple[str, ...]:
        """One line per leaf: the block that it has, and why it has no better one."""
        lines: dict[int, list[str]] = collections.defaultdict(list)
        for block in self.kronecker:
            if isinstance(block, FullBlock):
                own = block.region.label()
                shown = f"full {block.size} x {block.size}: {block.of.reason}"
                lines[block.leaf].append(f"{own}{' ' if own else ''}{shown}")
                continue
            groups, n, m = block.shape
            many = f"{groups} x " if groups > 1 else ""
            several = len(block.uses) + len(block.swapped)
            shared = f", joined over {several} uses" if several > 1 else ""
            shared += f", {len(block.swapped)} of them transposed" if block.swapped else ""
            factors = f"diagonal {n} and {m} x {m}" if block.embedding else f"{n} x {n} and {m} x {m}"
            lines[block.leaf].append(f"Kronecker factors {many}{factors} ({block.use.rule}{shared})")
            if block.bias is not None:
                own, of = block.bias.region.label(), f"{names[block.leaf]}{block.region.label()}"
                lines[block.bias.leaf].append(f"{own}{' ' if own else ''}within the Kronecker factors of {of}")
        for block in self.diagonal:
            own = block.region.label()
            kind = "scaled identity" if block.scaled else "diagonal"
            lines[block.leaf].append(f"{own}{' ' if own else ''}{kind}: {block.reason}")
        return tuple(f"{names[leaf]}: {'; '.join(lines[leaf])}" for leaf in sorted(lines))


class _Sums:
    """Sums of arrays by region."""

    def __init__(self) -> None:
        self._by_region: dict[Region, jax.Array] = {}

    def add(self, parts: Sequence[tuple[Region, jax.Array]]) -> None:
        """Of further (region, array) pairs."""
        for region, x in parts:
            self._by_region[region] = self._by_region[region] + x if region in self._by_region else x

    def of(self, leaf: int) -> list[tuple[Region, jax.Array]]:
        """Those of the regions of a leaf."""
        return [(region, x) for region, x in self._by_region.items() if region.leaf == leaf]

    def placed(self, leaf: int, x: jax.Array) -> jax.Array:
        """The leaf with all of its sums in their places."""
        for region, part in self.of(leaf):
            x = region.replaced(x, part)
        return x


@dataclasses.dataclass(frozen=True)
class Wiring:
    """How parameters enter a model, whatever the number of positions.

    Attributes:
      uses: per layer use its leaf, and what the entries of its block mean.
      explicit: what has explicit rows.
    """

    uses: tuple[tuple[Any, ...], ...]
    explicit: tuple[Region, ...]

    @staticmethod
    def of(uses: Sequence[LayerUse], explicit: Sequence[Region]) -> Wiring:
        """Of layer uses and regions with explicit rows, in their order."""
        return Wiring(tuple(map(_meaning, uses)), tuple(explicit))

    def part(self, uses: tuple[int, int], explicit: tuple[int, int]) -> Wiring:
        """Without so many at both ends: what one of several models has of it."""
        return Wiring(self.uses[uses[0] : len(self.uses) - uses[1]],
                      self.explicit[explicit[0] : len(self.explicit) - explicit[1]])  # fmt: skip


def _meaning(use: LayerUse) -> tuple[Any, ...]:
    bias = None if use.bias is None else (use.bias.region, tuple(use.bias.order.tolist()), use.bias.scale)
    return use.leaf, use.rule, use.block, use.views, use.entry_order, bias


def _unscaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else x * jnp.asarray(1 / scale, x.dtype)
