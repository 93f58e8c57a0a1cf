"""Uses of a leaf in the branches of a `cond` or `switch` as one use each: one branch runs, for all examples of a batch.

The k-th layer use of a branch is the k-th of every other branch if these are of one kind: the same entries of the leaf,
in the same layout, over as many positions. One is evaluated and recorded, the others have rows of zeros.

    cond p (h -> tanh(h W + b), h -> h W + b) h       one layer use of W, with the bias b, at two steps
    cond p (h -> tanh(h W), h -> h)                   one layer use of W, whose rows are zero in the second branch
    cond p (h -> h W, h -> h W W)                     no layer use: W is used once here, and twice there
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from curvax.structure.entries import AddedUse, Entry, ExplicitUse, Use
from curvax.structure.uses import ConvolutionUse, LayerUse

UNLIKE = "the branches of a cond use it in different ways"


def joined_branches(branches: Sequence[Mapping[int, Sequence[Use]]]) -> dict[int, list[Use]]:
    """Per leaf its uses in all branches together.

    Args:
      branches: per branch the uses of every leaf, in the order of its program.
    """
    leaves = sorted({leaf for uses in branches for leaf in uses})
    return {leaf: _joined([own for uses in branches if (own := uses.get(leaf))]) for leaf in leaves}


def _joined(branches: Sequence[Sequence[Use]]) -> list[Use]:
    """Of one leaf, over the branches that use it."""
    everything = [use for uses in branches for use in uses]
    layers = [use for use in everything if isinstance(use, LayerUse)]
    if len({len(uses) for uses in branches}) == 1:
        places = [_one_use(place) for place in zip(*branches, strict=True)]
        if None not in places:
            return [use for use in places if use is not None]
    # Small rows, or a use that gives a reason of its own.
    if not layers or any(isinstance(use, ExplicitUse) for use in everything):
        return everything
    return [ExplicitUse(Entry(layers[0].leaf), UNLIKE)]


def _one_use(place: Sequence[Use]) -> Use | None:
    """The uses at the same place of every branch as one; `None` if they are not of one kind."""
    first, *others = place
    if any(_kind(use) != _kind(first) for use in others):
        return None
    if isinstance(first, LayerUse | AddedUse):
        twins = (path for use in others if isinstance(use, LayerUse | AddedUse) for path in use.paths)
        return dataclasses.replace(first, twins=(*first.twins, *twins))
    return first


def _kind(use: Use) -> Any:
    """Equal for uses that differ in their places alone."""
    window = use.params if isinstance(use, ConvolutionUse) else None
    return (dataclasses.replace(use, path=(), twins=()) if isinstance(use, LayerUse | AddedUse) else use), window
