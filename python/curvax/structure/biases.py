"""Biases folded into the layer that they follow: leaves added to its output.

With a one appended to every activation, (a, 1)^T d are the gradients of weights and bias alike. That halves the work of
their inner products, and is how Kronecker factors treat a bias. A leaf is folded in if

1. it is added at one place, in the same program (the same iteration of the same scan) as the layer use,
2. nothing but sums and rearrangements leads from the layer use's output to that place, and nobody else reads it there,
3. every output unit has one entry of the leaf, the same at all positions.

    h = a W        (T, 3) positions and units
    y = h + b      b (3,) is repeated over T: entry j is added to unit j at every position, so order = [0, 1, 2]
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curvax.jaxprs import COND, Name, Path, Program
from curvax.structure.entries import AddedUse
from curvax.structure.uses import Bias, EmbeddingUse, LayerUse
from curvax.structure.views import Scale, Stacked, View, through, view_of

_SUMS = frozenset({"add", "add_any"})
# Following entries of an output costs time and memory at planning.
_MOST_ENTRIES = 1 << 22


def with_biases(program: Program, uses: Sequence[LayerUse], biases: Mapping[int, AddedUse]) -> list[LayerUse]:
    """The layer uses with a bias each where there is one.

    Args:
      program: the model on one example.
      uses: the layer uses.
      biases: the leaves that are added at one place and used nowhere else, and where.
    """
    free, folded = dict(sorted(biases.items())), []
    for use in uses:
        for leaf, added in free.items():
            order = _order_of(program, use, added)
            if order is not None:
                del free[leaf]
                use = dataclasses.replace(use, bias=Bias(leaf, added.leaf_shape, order))
                break
        folded.append(use)
    return folded


def _order_of(program: Program, use: LayerUse, added: AddedUse) -> np.ndarray | None:
    """(G m,) entry of the leaf for each output, if it is a bias of the layer use; else `None`."""
    if isinstance(use, EmbeddingUse) or math.prod(use.perturbation_shape) > _MOST_ENTRIES:
        return None
    if len(added.paths) != len(use.paths):
        return None
    # In every branch the same.
    places = zip(use.paths, added.paths, strict=True)
    orders = [_order_at(program, use, added, *paths) for paths in places]
    alike = all(x is not None and orders[0] is not None and np.array_equal(x, orders[0]) for x in orders)
    return orders[0] if alike else None


def _order_at(program: Program, use: LayerUse, added: AddedUse, start: Path, path: Path) -> np.ndarray | None:
    # 1. In the same program.
    entry = added.entry
    if path[:-1] != start[:-1] or entry.stacked != use.stacked or entry.lengths != use.lengths:
        return None
    body = _body(program, path[:-1])
    # In a difference one of the two has the other's gradient reversed.
    if body.steps[path[-1]].primitive not in _SUMS or any(isinstance(_inner(v), Scale) for v in entry.views):
        return None
    # 2. From the output of the one to the operand of the other.
    chain = _chain(body, start[-1], path[-1], 1 - added.operand)
    if chain is None:
        return None
    # 3. Entry by entry.
    return _order(use, chain, added, body.steps[path[-1]].output_avals[0].shape)


def _inner(view: View) -> View:
    return _inner(view.view) if isinstance(view, Stacked) else view


def _body(program: Program, path: Path) -> Program:
    steps = iter(path)
    for index in steps:
        step = program.steps[index]
        body = step.bodies[next(steps)] if step.primitive == COND else step.body
        if body is None:
            raise AssertionError("the path of a step inside another leads through bodies.")
        program = body
    return program


def _chain(program: Program, start: int, end: int, operand: int) -> list[tuple[View, ...]] | None:
    """Views and sums that lead from the output of one step to an operand of another, if nothing else reads on the way.

    The cotangent of a sum is that of its terms.
    """
    uses, name = _uses(program), program.steps[start].outputs[0]
    chain: list[tuple[View, ...]] = []
    while len(uses[name]) == 1:
        index, position = uses[name][0]
        if (index, position) == (end, operand):
            return chain
        if index < 0:
            return None
        step = program.steps[index]
        if step.primitive in _SUMS and step.input_avals[position].shape == step.output_avals[0].shape:
            pass
        else:
            views = view_of(step.eqn, position)
            if views is None or step.primitive in ("mul", "div", "neg", "slice", "dynamic_slice"):
                return None
            chain.append(views)
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


def _order(
    use: LayerUse, chain: Sequence[tuple[View, ...]], added: AddedUse, shape: tuple[int, ...]
) -> np.ndarray | None:
    """(G m,) entry of the leaf that is added at each output, the same at all positions; `None` if it is not so.

    The numbers of the leaf's entries are sent the way that the entries go.
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
