"""Parts of a leaf that enter a model by themselves: slices of it that do not meet.

Parameters in one flat vector are cut into the weights and biases of all layers; the last row of a matrix may be a bias.
Each part is then judged by its own uses, as if it were a leaf:

    flat (20,)     w = flat[:15].reshape(5, 3)      b = flat[15:18]      y = tanh(x w + b) + flat[18:]

    region                 its uses          what it is
    [0:15]                 x w               weights of a layer
    [15:18]                + b               the bias of that layer
    [18:20]                + flat[18:]       a leaf with rows of its own

The views of all uses of a region start with those of the region. Where two slices meet, both belong to the region that
they were cut from: the whole leaf, if nothing smaller has both. A leaf of which one slice is used, as so many
rows of a table of positions as there are tokens, is one region: its entries keep their places whatever the length.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from curvax.structure.views import Reshape, Reverse, Slice, Transpose, View, back, disjoint, through

_MOVES = (Reshape, Transpose, Reverse, Slice)


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a leaf.

    Attributes:
      leaf: its index.
      shape: of the region.
      views: from the leaf to the region, the last one a slice; none for a leaf as a whole.
    """

    leaf: int
    shape: tuple[int, ...]
    views: tuple[View, ...] = ()

    @staticmethod
    def of(leaf: int, shape: tuple[int, ...], views: Sequence[View] = ()) -> Region:
        """The region to which these views lead, of a leaf of that shape."""
        if not views:
            return Region(leaf, shape)
        like = jax.eval_shape(lambda x: through(views, x), jax.ShapeDtypeStruct(shape, np.float32))
        return Region(leaf, like.shape, tuple(views))

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether it is all of its leaf."""
        return not self.views

    def take(self, leaf: Any) -> Any:
        """Its entries, of an array or of shapes laid out as the leaf."""
        return through(self.views, leaf)

    def put(self, x: jax.Array) -> jax.Array:
        """Its entries at their places in the leaf, zero elsewhere."""
        return back(self.views, x)

    def replaced(self, leaf: jax.Array, entries: jax.Array) -> jax.Array:
        """The leaf with other entries in the region."""
        return _replaced(self.views, leaf, entries)

    def inside(self, views: Sequence[View]) -> tuple[View, ...]:
        """What views from the leaf do after they have led to the region."""
        return tuple(views[len(self.views) :])

    def label(self) -> str:
        """As indexing writes it, `[0:12]`; empty for a leaf as a whole, or where other views come first."""
        if self.whole or not isinstance(self.views[0], Slice):
            return ""
        first = self.views[0]
        parts = [
            ":" if (start, limit) == (0, size) else f"{start}:{limit}"
            for start, limit, size in zip(first.starts, first.limits, first.before, strict=True)
        ]
        return f"[{', '.join(parts)}]"


def _replaced(views: Sequence[View], x: jax.Array, entries: jax.Array) -> jax.Array:
    """An array with other entries where the views lead: written in place, which a sum over regions would not be."""
    if not views:
        return entries
    inner = _replaced(views[1:], views[0](x), entries)
    return views[0].replaced(x, inner) if isinstance(views[0], Slice) else views[0].adjoint(inner)


def regions_of(chains: Sequence[Sequence[View]]) -> list[tuple[View, ...]]:
    """Per chain of views from one leaf those of its region: equal ones for chains of one region, disjoint ones else."""
    own = [_cut(chain) for chain in chains]
    while True:
        distinct = list(dict.fromkeys(own))
        meeting = next((pair for pair in itertools.combinations(distinct, 2) if not disjoint(*pair)), None)
        if meeting is None:
            return own if len(distinct) > 1 else [()] * len(own)
        common = _cut(_common(*meeting))
        own = [common if views in meeting else views for views in own]


def _cut(views: Sequence[View]) -> tuple[View, ...]:
    """The views up to the last slice of those that move entries of the leaf before anything else happens to them."""
    moves = tuple(itertools.takewhile(lambda view: isinstance(view, _MOVES), views))
    last = max((i for i, view in enumerate(moves) if isinstance(view, Slice)), default=-1)
    return moves[: last + 1]


def _common(first: Sequence[View], second: Sequence[View]) -> tuple[View, ...]:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return tuple(a for a, _ in pairs)
