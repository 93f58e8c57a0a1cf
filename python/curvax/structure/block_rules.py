"""Which kind of block a leaf gets, by rules on its place in the parameter tree.

The first rule that fits a leaf, or a part of one, decides; where none fits, structure does:

    blocks=(BlockRule(BlockKind.DIAGONAL, r"embedding"), BlockRule(BlockKind.FULL, largest=64))

    leaf                      Kronecker factors by structure      what it gets
    ['embedding'] (1000, 32)  yes                                 a diagonal
    ['dense']['w'] (32, 32)   yes                                 Kronecker factors: 1024 entries are too many
    ['norm']['scale'] (32,)   no                                  all of its 32 x 32 curvature

A bias inside its layer's block is asked for by its own name: a rule that fits it takes it out of the block.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Sequence

from curvax.spelling import check_instance
from curvax.structure.blocks import DiagonalBlock, FullBlock, KroneckerBlock, KroneckerBlocks
from curvax.structure.regions import Region


class BlockKind(enum.Enum):
    """What the curvature of a leaf is approximated by.

    Attributes:
      KRONECKER: Kronecker factors, where structure has them; otherwise a diagonal.
      DIAGONAL: the exact diagonal.
      FULL: the exact matrix: its size squared to store, cubed to invert.
      SCALED_IDENTITY: the mean of the diagonal times the identity.
    """

    KRONECKER = "Kronecker factors"
    DIAGONAL = "diagonal"
    FULL = "full"
    SCALED_IDENTITY = "scaled identity"


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """A kind of block for some leaves.

    Attributes:
      kind: the kind.
      path: regular expression that is searched for in the leaf's place as `jax.tree_util.keystr` writes it,
        `['dense']['w']`, followed by the slice of a part of a leaf, `[0:12]`. All leaves by default.
      largest: entries at most; any number by default, `None`.

    Raises:
      TypeError, ValueError: a kind that is none, an expression that does not compile, a number below 1.
    """

    kind: BlockKind
    path: str = ""
    largest: int | None = None

    def __post_init__(self) -> None:
        check_instance("kind", self.kind, BlockKind)
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"path of a BlockRule must be a regular expression, not {self.path!r} ({error})."
            ) from None
        if self.largest is not None and self.largest < 1:
            raise ValueError(f"largest of a BlockRule must be 1 or more entries, got {self.largest}.")

    def fits(self, region: Region, names: Sequence[str]) -> bool:
        """Whether it is for a leaf, or for a part of one."""
        small = self.largest is None or region.size <= self.largest
        return small and re.search(self.path, names[region.leaf] + region.label()) is not None

    @property
    def reason(self) -> str:
        """Words for the plan."""
        leaves = f" for leaves like {self.path!r}" if self.path else ""
        return f"a rule{leaves}{'' if self.largest is None else f' of at most {self.largest} entries'}"


def ruled(blocks: KroneckerBlocks, rules: Sequence[BlockRule], names: Sequence[str]) -> KroneckerBlocks:
    """The blocks with the kinds that the rules give them; `names` are those of the leaves.

    Raises:
      ValueError: a rule fits no leaf.
    """

    def rule_of(region: Region) -> BlockRule | None:
        return next((rule for rule in rules if rule.fits(region, names)), None)

    _check_used(blocks, rules, names)
    for block in blocks.kronecker:
        if isinstance(block, KroneckerBlock) and block.bias is not None:
            rule = rule_of(block.bias.region)
            if rule is not None and rule.kind is not BlockKind.KRONECKER:
                blocks = blocks.without_bias(block, rule.reason)
    weights = {block.region: rule for block in blocks.kronecker if (rule := rule_of(block.region)) is not None}
    others = {region: rule.reason for region, rule in weights.items() if rule.kind is not BlockKind.KRONECKER}
    blocks = blocks.with_diagonal(others)
    return blocks.with_kinds(*_kinds(blocks, rule_of))


def _kinds(
    blocks: KroneckerBlocks, rule_of: Callable[[Region], BlockRule | None]
) -> tuple[list[FullBlock], list[DiagonalBlock]]:
    """What the diagonal blocks are by the rules: (full ones, diagonal ones)."""
    full: list[FullBlock] = []
    diagonal: list[DiagonalBlock] = []
    for block in blocks.diagonal:
        rule = rule_of(block.region)
        if rule is None or rule.kind is BlockKind.KRONECKER:
            diagonal.append(block)
        elif rule.kind is BlockKind.FULL:
            full.append(FullBlock(dataclasses.replace(block, reason=rule.reason, lost=False)))
        else:
            scaled = rule.kind is BlockKind.SCALED_IDENTITY
            diagonal.append(dataclasses.replace(block, scaled=scaled, reason=rule.reason, lost=False))
    return full, diagonal


def _check_used(blocks: KroneckerBlocks, rules: Sequence[BlockRule], names: Sequence[str]) -> None:
    regions = [block.region for block in (*blocks.kronecker, *blocks.diagonal)]
    regions += [b.bias.region for b in blocks.kronecker if isinstance(b, KroneckerBlock) and b.bias is not None]
    for rule in rules:
        if rule.path and not any(rule.fits(region, names) for region in regions):
            raise ValueError(
                f"no leaf fits the rule {rule!r}: the leaves are {', '.join(names)}; mend its path or leave it out."
            )
