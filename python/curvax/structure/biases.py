"""Biases that a layer use takes along: leaves added to its output, whose rows are its cotangents summed over positions.

With a one appended to every activation, (a, 1)^T d holds the gradients of weights and bias alike. That halves the work
of their inner products, and is how Kronecker factors treat a bias.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from curvax.structure.entries import Added
from curvax.structure.program import Name, Path, Program
from curvax.structure.uses import Bias, EmbeddingUse, LayerUse
from curvax.structure.views import Scale, Stacked, View, through, view_of

_SUMS = frozenset({"add", "add_any"})
# Following entries of an output costs time and memory at planning.
_MOST_ENTRIES = 1 << 22


def with_biases(
    program: Program, uses: Sequence[LayerUse], added: Mapping[int, Added], biases: Iterable[int]
) -> list[LayerUse]:
    """The layer uses with a bias each where there is one.

    Args:
      program: the model on one example.
      uses: the layer uses.
      added: where leaves are added.
      biases: the leaves that are added at one place and used nowhere else.
    """
    free, found = set(biases), []
    for use in uses:
        matches = ((leaf, _match(program, use, added[leaf])) for leaf in sorted(free))
        leaf, order = next(((leaf, order) for leaf, order in matches if order is not None), (None, None))
        if leaf is not None and order is not None:
            free.discard(leaf)
            use = dataclasses.replace(use, bias=Bias(leaf, added[leaf].leaf_shape, order))
        found.append(use)
    return found


def _match(program: Program, use: LayerUse, added: Added) -> np.ndarray | None:
    """(G m,) entry of the leaf for each output, if it is a bias of the layer use; else `None`."""
    entry, path = added.entry, added.path
    inside = path[:-1] == use.path[:-1] and entry.stacked == use.stacked and entry.lengths == use.lengths
    if not inside or isinstance(use, EmbeddingUse) or math.prod(use.perturbation_shape) > _MOST_ENTRIES:
        return None
    body = _body(program, path[:-1])
    # In a difference one of the two has the other's gradient reversed.
    if body.steps[path[-1]].primitive not in _SUMS:
        return None
    chain = _chain(body, use.path[-1], path[-1], 1 - added.operand)
    if chain is None or any(isinstance(_inner(view), Scale) for view in entry.views):
        return None
    return _order(use, chain, added, body.steps[path[-1]].output_avals[0].shape)


def _inner(view: View) -> View:
    return _inner(view.view) if isinstance(view, Stacked) else view


def _body(program: Program, path: Path) -> Program:
    for index in path:
        body = program.steps[index].body
        if body is None:
            raise AssertionError("the path of a step inside another leads through bodies.")
        program = body
    return program


def _chain(program: Program, start: int, end: int, operand: int) -> list[tuple[View, ...]] | None:
    """Views and sums that lead from the output of one step to an operand of another, if nothing else reads on the way.

    The cotangent of a sum is that of its terms.
    """
    uses, name = _uses(program), program.steps[start].outputs[0]
    found: list[tuple[View, ...]] = []
    while len(uses[name]) == 1:
        index, position = uses[name][0]
        if (index, position) == (end, operand):
            return found
        if index < 0:
            return None
        step = program.steps[index]
        if step.primitive in _SUMS and step.input_avals[position].shape == step.output_avals[0].shape:
            pass
        else:
            views = view_of(step.eqn, position)
            if views is None or step.primitive in ("mul", "div", "neg", "slice", "dynamic_slice"):
                return None
            found.append(views)
        name = step.outputs[0]
    return None


def _uses(program: Program) -> dict[Name, list[tuple[int, int]]]:
    """Where each value is read with a derivative: (step, operand), step -1 for the results."""
    uses: dict[Any, list[tuple[int, int]]] = collections.defaultdict(list)
    for index, step in enumerate(program.steps):
        for operand, atom in enumerate(step.inputs):
            if isinstance(atom, int) and step.differentiated[operand]:
                uses[atom].append((index, operand))
    for position, atom in enumerate(program.results):
        if isinstance(atom, int):
            uses[atom].append((-1, position))
    return uses


def _order(use: LayerUse, chain: Sequence[tuple[View, ...]], added: Added, shape: tuple[int, ...]) -> np.ndarray | None:
    """(G m,) entry of the leaf that is added at each output, the same at all positions; `None` if it is not so.

    Found by sending the numbers of the leaf's entries the way that the entries go.
    """
    entry, size = added.entry, math.prod(added.leaf_shape)
    numbers = through(entry.views, np.arange(size, dtype=np.int64).reshape(added.leaf_shape))
    stack = numbers.ndim - len(added.before)
    if added.dimensions is not None:
        fresh = [stack + i for i in range(len(shape)) if i not in added.dimensions]
        numbers = np.expand_dims(numbers, tuple(fresh))
    # A sum repeats the entries along axes of length one by itself.
    numbers = np.broadcast_to(numbers, (*numbers.shape[:stack], *shape))
    # The layer use's output goes through the chain to the sum: which entry of the output stands where in the sum?
    places = np.arange(math.prod(use.output_shape), dtype=np.int64).reshape(use.output_shape)
    for views in chain:
        places = through(views, places)
    if places.shape != shape:
        return None
    at_output = np.empty((*numbers.shape[:stack], places.size), np.int64)
    at_output[..., places.ravel()] = numbers.reshape(*numbers.shape[:stack], -1)
    at_output = at_output.reshape(*numbers.shape[:stack], *use.output_shape)
    repeated = [i for i, stacked in enumerate(use.stacked) if not stacked]
    at_output = np.broadcast_to(np.expand_dims(at_output, tuple(repeated)), use.perturbation_shape)
    arranged = use.cotangents(at_output)
    order = arranged[0].ravel()
    fits = np.all(arranged == arranged[:1]) and order.size == size and np.array_equal(np.sort(order), np.arange(size))
    return order if fits else None
