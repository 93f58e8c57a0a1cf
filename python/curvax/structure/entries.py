"""What a value that is made of one parameter leaf has of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from curvax.structure.program import Path, Step
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
class Added:
    """A leaf that is added.

    Attributes:
      path, operand: where.
      entry: what it is there, but for a repetition of entries.
      leaf_shape: of the leaf.
      dimensions: of the `broadcast_in_dim` that repeated the entries; `None` if nothing did.
      before: shape of one iteration's entries before that.
    """

    path: Path
    operand: int
    entry: Entry
    leaf_shape: tuple[int, ...]
    dimensions: tuple[int, ...] | None
    before: tuple[int, ...]
