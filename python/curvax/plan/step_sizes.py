"""How many step sizes a search evaluates at once: all of them, or as many as fit into memory."""

from __future__ import annotations

import jax

from curvax import tree
from curvax.curvature import Curvature, Evaluation
from curvax.plan import cost as costing
from curvax.plan import machine as machines
from curvax.plan.cost import nbytes
from curvax.plan.expense import MEMORY_SHARE
from curvax.plan.plan import bytes_text
from curvax.search import StepSearch
from curvax.tree import PyTree

# A layer's input and output are alive at once in a forward pass.
_ALIVE = 2.0


def planned_search(search: StepSearch, curvature: Curvature, params: PyTree, evaluation: Evaluation) -> StepSearch:
    """The search, with the number of step sizes at once chosen where it leaves that open."""
    if search.chunk is not None or not search.evaluations:
        return search
    forward = costing.trace(curvature.value, jax.eval_shape(lambda: params), evaluation)
    return search.with_chunk(at_once(search, copy_bytes(params, forward.memory))[0])


def copy_bytes(params: PyTree, largest: float) -> float:
    """Bytes of a candidate: its parameters, and what of its forward pass is alive at once.

    Args:
      params: or their shapes.
      largest: bytes of the largest array in the forward pass.
    """
    return nbytes(jax.eval_shape(tree.upcast, params)) + _ALIVE * largest


def at_once(search: StepSearch, each: float) -> tuple[int | None, str]:
    """(step sizes to evaluate at once, `None` for all; why).

    Args:
      each: bytes of one, by `copy_bytes`.
    """
    count, there = search.evaluations, machines.memory()
    if search.chunk is not None:
        return search.chunk, f"{min(search.chunk, count)} of {count} step sizes at once, as asked"
    if there is None or count * each <= MEMORY_SHARE * there:
        return None, f"all {count} step sizes in one batched forward pass, {bytes_text(count * each)}"
    chunk = max(1, int(MEMORY_SHARE * there / each))
    return chunk, f"{chunk} of {count} step sizes at once: all would take {bytes_text(count * each)}"
