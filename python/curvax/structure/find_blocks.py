"""Which blocks the layer uses of a model make: regions of leaves, judged by all that happens to them.

    layer uses, biases, explicit rows --> members of each region --> 1. blocks of weights that agree
                                                                     2. with the bias that is theirs alone
                                                                     3. diagonals for all others, with the reason

An example: W used as x @ W and, transposed, as h @ W.T is one region with two layer uses that see the same entries with
their sides exchanged: one block. Used as x @ W and x @ W[::-1] it is seen in two orders, and keeps a diagonal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from curvax.structure.blocks import DiagonalBlock, ExplicitRegion, KroneckerBlock, KroneckerBlocks
from curvax.structure.capture import Capture
from curvax.structure.recognize import GENERIC, Finding
from curvax.structure.regions import Region, regions_of
from curvax.structure.uses import DenseUse, EmbeddingUse, LayerUse, same_entries
from curvax.structure.views import View, disjoint, through, unscaled


def find_blocks(capture: Capture, shapes: Sequence[tuple[int, ...]]) -> KroneckerBlocks:
    """The blocks of a model.

    Args:
      capture: the model, by parts of leaves (`approximate`).
      shapes: of the parameter leaves.
    """
    structure, dtype = capture.structure, np.dtype(capture.dtype)
    explicit = [
        ExplicitRegion(region, _why(finding), finding.rule == GENERIC and _wide(region.shape))
        for region, finding in structure.regions
    ]
    blocks = _blocks(structure.uses, explicit, tuple(map(tuple, shapes)), dtype)
    return dataclasses.replace(blocks, statistics=capture.model.statistics)


def join_blocks(parts: Sequence[KroneckerBlocks]) -> KroneckerBlocks:
    """The blocks of several models of the same parameters together.

    Layer uses and regions with explicit rows are numbered model by model (`kronecker.Examples.placed`).
    """
    uses = tuple(use for part in parts for use in part.uses)
    explicit = [entry for part in parts for entry in part.explicit_regions]
    blocks = _blocks(uses, explicit, parts[0].shapes, parts[0].dtype)
    return dataclasses.replace(blocks, statistics=sum(part.statistics for part in parts))


def _blocks(
    uses: tuple[LayerUse, ...],
    explicit: Sequence[ExplicitRegion],
    shapes: tuple[tuple[int, ...], ...],
    dtype: np.dtype,
) -> KroneckerBlocks:
    """The blocks of layer uses and of what has explicit rows, each with the reason for these."""
    members = [of for leaf, shape in enumerate(shapes) for of in _members(leaf, shape, uses, explicit)]
    # 1. What is weights and nothing else.
    kronecker = [
        block
        for of in members
        if of.uses and not of.explicit and not of.bias_of
        for block in _of_region(of.region, {i: uses[i] for i in of.uses})
    ]
    # 2. Biases that all belong to one block.
    alone = {of.region: of.bias_of for of in members if of.bias_of and not of.explicit and not of.uses}
    kronecker = [_with_bias(block, uses, alone) for block in kronecker]
    served = {block.region for block in kronecker} | {b.bias.region for b in kronecker if b.bias is not None}
    # 3. All others.
    diagonal = tuple(of.diagonal() for of in members if of.region not in served)
    return KroneckerBlocks(tuple(kronecker), diagonal, uses, shapes, dtype)


@dataclasses.dataclass(frozen=True)
class _Members:
    """What is known of a region.

    Attributes:
      region: the region.
      uses: the layer uses of its entries.
      bias_of: the layer uses whose bias it has.
      explicit: what has explicit rows within it, by their places.
      matrix: whether a layer use has a matrix of them.
    """

    region: Region
    uses: tuple[int, ...] = ()
    bias_of: tuple[int, ...] = ()
    explicit: tuple[tuple[int, ExplicitRegion], ...] = ()
    matrix: bool = False

    def diagonal(self) -> DiagonalBlock:
        """The region without Kronecker factors, and why it has none."""
        reason = next((entry.reason for _, entry in self.explicit), "")
        if not reason:
            reason = _ORDERS if self.uses else _SEVERAL if self.bias_of else _IDLE
        lost = any(entry.lost for _, entry in self.explicit) or self.matrix
        return DiagonalBlock(self.region, self.uses, self.bias_of, self.explicit, reason, lost)


def _members(
    leaf: int, shape: tuple[int, ...], uses: Sequence[LayerUse], explicit: Sequence[ExplicitRegion]
) -> list[_Members]:
    """The regions of a leaf: those of all models that enter here. The entries of none are in no block, unless none of
    the leaf's are.
    """
    weights = [(i, use.views) for i, use in enumerate(uses) if use.leaf == leaf]
    biases = [
        (i, use.bias.region.views) for i, use in enumerate(uses) if use.bias is not None and use.bias.leaf == leaf
    ]
    rows = [(i, entry.region.views) for i, entry in enumerate(explicit) if entry.region.leaf == leaf]
    entries = [*weights, *biases, *rows]
    if not entries:
        return [_Members(Region.of(leaf, shape))]
    kinds = ["uses"] * len(weights) + ["bias_of"] * len(biases) + ["explicit"] * len(rows)
    own = regions_of([views for _, views in entries])

    def some(kind: str, views: Sequence[View]) -> tuple[int, ...]:
        return tuple(i for (i, _), k, v in zip(entries, kinds, own, strict=True) if k == kind and v == views)

    return [
        _Members(
            Region.of(leaf, shape, views),
            some("uses", views),
            some("bias_of", views),
            tuple((i, explicit[i]) for i in some("explicit", views)),
            any(_wide(uses[i].block) for i in some("uses", views)),
        )
        for views in dict.fromkeys(own)
    ]


_IDLE = "the outputs do not depend on it"
_SEVERAL = "it is the bias of weights that are used several times"
_ORDERS = "it is used in several orders of its entries"


def _wide(shape: tuple[int, ...]) -> bool:
    """Whether it can be a matrix."""
    return sum(size > 1 for size in shape) > 1


def _with_bias(
    block: KroneckerBlock, uses: Sequence[LayerUse], alone: Mapping[Region, Sequence[int]]
) -> KroneckerBlock:
    """The block with the bias of its outputs, if that is added to no others and everywhere in one order."""
    biases = {i: bias for i in block.uses if (bias := uses[i].bias) is not None}
    for bias in biases.values():
        same = all(b.region == bias.region and np.array_equal(b.order, bias.order) for b in biases.values())
        if same and bias.region in alone and set(alone[bias.region]) == set(biases):
            biased = tuple((i, b.scale) for i, b in biases.items())
            return dataclasses.replace(block, bias=bias, biased=biased)
        break
    return block


def _why(finding: Finding) -> str:
    return f"it enters as {finding.rule}" + (f" ({finding.reason})" if finding.reason else "")


def _of_region(region: Region, uses: Mapping[int, LayerUse]) -> list[KroneckerBlock]:
    """The blocks of a region, of its layer uses by their indices; none if these disagree."""
    if any(use.factor == 0 for use in uses.values()):
        return []
    # Layer uses that see the same entries in the same order.
    alike: list[list[int]] = []
    for i, use in uses.items():
        group = next((g for g in alike if same_entries(uses[g[0]], use)), None)
        if group is None:
            alike.append([i])
        else:
            group.append(i)
    firsts = [uses[group[0]] for group in alike]
    if all(disjoint(a.views, b.views) for a, b in itertools.combinations(firsts, 2)):
        return [KroneckerBlock(use.leaf, tuple(g), use, region) for g, use in zip(alike, firsts, strict=True)]
    if len(alike) == 2:
        # An embedding says how its table is laid out, whichever comes first.
        one, other = (1, 0) if isinstance(firsts[1], EmbeddingUse) else (0, 1)
        if _swapped(firsts[one], firsts[other], region):
            return [KroneckerBlock(region.leaf, tuple(alike[one]), firsts[one], region, swapped=tuple(alike[other]))]
    return []


# Numbering the entries of a leaf costs time and memory at planning.
_MOST_ENTRIES = 1 << 24


def _swapped(a: LayerUse, b: LayerUse, region: Region) -> bool:
    """Whether a block (G, n, m) at one layer use means the entries of (G, m, n) at the other."""
    groups, n, m = a.block
    dense = isinstance(a, DenseUse | EmbeddingUse) and isinstance(b, DenseUse)
    if not dense or b.block != (groups, m, n) or a.factor != b.factor or groups * n * m > _MOST_ENTRIES:
        return False
    numbers = np.arange(region.size, dtype=np.int64).reshape(region.shape)
    mine, theirs = (
        np.asarray(use.from_operand(through(unscaled(region.inside(use.views)), numbers))) for use in (a, b)
    )
    return np.array_equal(mine, np.swapaxes(theirs, 1, 2))
