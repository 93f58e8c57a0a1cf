"""Which leaves lost their structure, and why: they take explicit rows, or a diagonal in place of Kronecker factors."""

from __future__ import annotations

import dataclasses

import jax

from curvax import tree
from curvax.curvature import GaussNewton
from curvax.operators import CurvatureOperator
from curvax.structure.recognize import GENERIC


@dataclasses.dataclass(frozen=True)
class LostLeaf:
    """A leaf that no layer was recognized for.

    Attributes:
      path: its place among the parameters.
      size: its entries.
      reason: why.
    """

    path: str
    size: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.size}): {self.reason}"


def lost_leaves(matrix: CurvatureOperator) -> tuple[LostLeaf, ...]:
    """Those of a model, the largest first; leaves of one axis (gains, shifts) have little to lose and are left out."""
    curvature, at = matrix.curvature, matrix.at
    assert isinstance(curvature, GaussNewton)
    evaluation = at.evaluation(matrix.batches[0], 0)
    leaves = jax.tree.leaves(at.params)
    found = [
        LostLeaf(entry.path, leaf.size, entry.reason)
        for entry, leaf in zip(curvature.structure(at.params, evaluation), leaves, strict=True)
        if entry.rule == GENERIC and leaf.ndim > 1
    ]
    try:
        blocks = curvature.blocks(at.params, evaluation).diagonal
    except ValueError:
        blocks = ()
    names, known = tree.places(at.params), {entry.path for entry in found}
    found += [
        LostLeaf(names[b.leaf], leaves[b.leaf].size, b.reason) for b in blocks if b.lost and names[b.leaf] not in known
    ]
    return tuple(sorted(found, key=lambda entry: -entry.size))
