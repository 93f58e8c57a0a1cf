"""What a value that is made of one parameter leaf has of it, and where such a value enters the model by itself.

The uses of a leaf are a sum type, `Use`: a `LayerUse` (`curvax.structure.uses`), whose rows are pairs of activations
and cotangents, or one of the three here. A leaf whose uses are all `AddedUse` or `ScaledUse` has small rows that
reverse mode forms at no loss; an `ExplicitUse` leaves the leaf to generic reverse mode, and says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from curvax.jaxprs import Path, Step
from curvax.structure.uses import LayerUse
from curvax.structure.views import Stacked, View


@dataclasses.dataclass(frozen=True)
class Entry:
    """A value made of a leaf alone, by views.

    Attributes:
      leaf: its index.
      views: from the leaf, axes of stacked weights in front.
      stacked: for each scan around, outermost first, whether the value is one slice of stacked ones.
      lengths: of those scans.
      spread: the `broadcast_in_dim` that repeated its entries, or `None`; then only elementwise uses are understood.
    """

    leaf: int
    views: tuple[View, ...] = ()
    stacked: tuple[bool, ...] = ()
    lengths: tuple[int, ...] = ()
    spread: Step | None = None

    def through(self, views: Sequence[View]) -> Entry:
        """The entry after further views, each within one iteration."""
        wrapped = list(views)
        for _ in range(sum(self.stacked)):
            wrapped = [Stacked(view) for view in wrapped]
        return dataclasses.replace(self, views=(*self.views, *wrapped))

    def inside(self, length: int, stacked: bool) -> Entry:
        """The entry as the body of a scan sees it."""
        return dataclasses.replace(self, stacked=(*self.stacked, stacked), lengths=(*self.lengths, length))


@dataclasses.dataclass(frozen=True)
class AddedUse:
    """A leaf that is added elementwise: a bias.

    Attributes:
      entry: what it is there, but for a repetition of entries.
      path, operand: where.
      twins: the steps that add it in further branches (`curvax.structure.branches`).
      dimensions: of the `broadcast_in_dim` that repeated the entries; `None` if nothing did.
      before: shape of one iteration's entries before that.
    """

    entry: Entry
    path: Path
    operand: int
    dimensions: tuple[int, ...] | None
    before: tuple[int, ...]
    twins: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The steps that add, of which one is evaluated."""
        return (self.path, *self.twins)


@dataclasses.dataclass(frozen=True)
class ScaledUse:
    """A leaf that is multiplied elementwise: the gain of a normalization.

    Attributes:
      entry: what it is there.
    """

    entry: Entry


@dataclasses.dataclass(frozen=True)
class ExplicitUse:
    """A use of any other kind, of which nothing better is known than its rows.

    Attributes:
      entry: what the leaf is there.
      reason: why, for people.
    """

    entry: Entry
    reason: str


Use: TypeAlias = LayerUse | AddedUse | ScaledUse | ExplicitUse
"""One use of a leaf."""
