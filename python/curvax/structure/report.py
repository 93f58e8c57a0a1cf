"""Which rule serves which parameter leaf, for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from curvax.structure.batch_axes import AxesPrefix, BatchAxes, leading_axes
from curvax.structure.batch_rules import Mixed
from curvax.structure.capture import capture
from curvax.structure.outputs import check_model
from curvax.structure.recognize import GENERIC, Finding
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class LeafStructure:
    """How one parameter leaf enters the Gram matrix of the rows.

    Attributes:
      path: the leaf's place in the parameter tree, as `jax.tree_util.keystr` writes it.
      rule: "dense" and "bias" form no rows of the Jacobian, "no rows" has none to form, "explicit rows" does.
      reason: why.
    """

    path: str
    rule: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}" + (f": {self.reason}" if self.reason else "")


def report(
    predict_fn: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: Any,
    *,
    batch_axes: AxesPrefix | BatchAxes | None = None,
) -> tuple[LeafStructure, ...]:
    """The structure that the Gram matrix of the rows makes use of, one entry per parameter leaf.

    Nothing is computed. A loss that couples examples (`Loss.couples_examples`) takes explicit rows whatever is said
    here.

    Args:
      predict_fn: (params, inputs) -> outputs.
      params: parameters (arrays or shapes).
      inputs: inputs (arrays or shapes).
      batch_axes: as in `jacobian_gram`.

    Returns:
      One entry per leaf of `params`, in the order of `jax.tree.leaves`. Printing an entry gives a line.
    """
    check_model(predict_fn, params, inputs)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    try:
        findings = capture(predict_fn, params, inputs, leading_axes(batch_axes, inputs)).structure.findings
    except Mixed as mixed:
        findings = (Finding(GENERIC, str(mixed)),) * len(leaves)
    return tuple(
        LeafStructure(jax.tree_util.keystr(path), finding.rule, finding.reason)
        for (path, _), finding in zip(leaves, findings, strict=True)
    )
