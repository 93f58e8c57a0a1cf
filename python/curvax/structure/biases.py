"""Biases folded into the layer that they follow: leaves added to its output.

With a one appended to every activation, (a, 1)^T d are the gradients of weights and bias alike. That halves the work of
their inner products, and is how Kronecker factors treat a bias. A leaf is folded in if

1. it is added at one place, in the same program (the same iteration of the same scan) as the layer use,
2. nothing but sums, differences, numbers and rearrangements leads from the layer use's output to that place, and nobody
   else reads it there,
3. every output unit has one entry of the leaf, the same at all positions.

    h = a W        (T, 3) positions and units
    y = h + b      b (3,) is repeated over T: entry j is added to unit j at every position, so order = [0, 1, 2]

With numbers on the way, the cotangent of b is that of h times a number, and so is the activation that b has:

    h / 2 - 3 b    u the cotangent of the difference: u / 2 of h, -3 u of b, so b has the activation -6

That number is 1 for those who work leaf by leaf with rows (`scales`): they leave such a bias alone.
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
from curvax.structure.regions import Region
from curvax.structure.uses import Bias, EmbeddingUse, LayerUse
from curvax.structure.views import View, factor, through, unscaled, view_of

_SUMS = frozenset({"add", "add_any", "sub"})
# Following entries of an output costs time and memory at planning.
_MOST_ENTRIES = 1 << 22


def with_biases(
    program: Program, uses: Sequence[LayerUse], biases: Mapping[Region, AddedUse], scales: bool
) -> list[LayerUse]:
    """The layer uses with a bias each where there is one.

    Args:
      program: the model on one example.
      uses: the layer uses.
      biases: the leaves, or parts of leaves, that are added at one place and used nowhere else, and where.
      scales: whether a bias may have another activation than 1.
    """
    free, folded = dict(biases), []
    for use in uses:
        for region, added in free.items():
            bias = _bias_of(program, use, region, added)
            if bias is not None and (scales or bias.scale == 1):
                del free[region]
                use = dataclasses.replace(use, bias=bias)
                break
        folded.append(use)
    return folded


def _bias_of(program: Program, use: LayerUse, region: Region, added: AddedUse) -> Bias | None:
    """The region as a bias of the layer use, if it is one."""
    if isinstance(use, EmbeddingUse) or math.prod(use.perturbation_shape) > _MOST_ENTRIES:
        return None
    if len(added.paths) != len(use.paths):
        return None
    # In every branch the same.
    first, *others = (_bias_at(program, use, region, added, *at) for at in zip(use.paths, added.paths, strict=True))
    if first is None:
        return None
    alike = all(bias == first and bias is not None and np.array_equal(bias.order, first.order) for bias in others)
    return first if alike else None


def _bias_at(program: Program, use: LayerUse, region: Region, added: AddedUse, start: Path, path: Path) -> Bias | None:
    # 1. In the same program.
    entry = added.entry
    if path[:-1] != start[:-1] or entry.stacked != use.stacked or entry.lengths != use.lengths:
        return None
    body = _body(program, path[:-1])
    step = body.steps[path[-1]]
    if step.primitive not in _SUMS:
        return None
    # 2. From the output of the one to the operand of the other, with the numbers on both ways.
    chain = _chain(body, start[-1], path[-1], 1 - added.operand)
    if chain is None:
        return None
    of_output = math.prod(map(_factor, chain)) * _sign(step.primitive, 1 - added.operand)
    of_bias = factor(entry.views) * _sign(step.primitive, added.operand)
    if of_output == 0 or of_bias == 0:
        return None
    # 3. Entry by entry.
    moves = [unscaled(link.views) for link in chain]
    order = _order(use, moves, region, added, step.output_avals[0].shape)
    return None if order is None else Bias(region, order, of_bias / of_output)


@dataclasses.dataclass(frozen=True)
class _Link:
    """A step on the way: what it does to the entries, and the sign that it gives them."""

    views: tuple[View, ...]
    sign: float = 1.0


def _factor(link: _Link) -> float:
    return factor(link.views) * link.sign


def _sign(primitive: str, operand: int) -> float:
    """Of an operand in a sum or difference."""
    return -1.0 if primitive == "sub" and operand == 1 else 1.0


def _body(program: Program, path: Path) -> Program:
    steps = iter(path)
    for index in steps:
        step = program.steps[index]
        body = step.bodies[next(steps)] if step.primitive == COND else step.body
        if body is None:
            raise AssertionError("the path of a step inside another leads through bodies.")
        program = body
    return program


def _chain(program: Program, start: int, end: int, operand: int) -> list[_Link] | None:
    """Views, sums and differences that lead from the output of one step to an operand of another.

    `None` if there are others, or if anybody else reads a value on the way.
    The cotangent of a sum is that of its terms.
    """
    uses, name = _uses(program), program.steps[start].outputs[0]
    chain: list[_Link] = []
    while len(uses[name]) == 1:
        index, position = uses[name][0]
        if (index, position) == (end, operand):
            return chain
        if index < 0:
            return None
        step = program.steps[index]
        if step.primitive in _SUMS and step.input_avals[position].shape == step.output_avals[0].shape:
            chain.append(_Link((), _sign(step.primitive, position)))
        else:
            views = view_of(step.eqn, position)
            if views is None or step.primitive in ("slice", "dynamic_slice"):
                return None
            chain.append(_Link(views))
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
    use: LayerUse, chain: Sequence[tuple[View, ...]], region: Region, added: AddedUse, shape: tuple[int, ...]
) -> np.ndarray | None:
    """(G m,) entry of the region that is added at each output, the same at all positions; `None` if it is not so.

    The numbers of the region's entries, from 1 on, are sent the way that the entries go.
    """
    size, views = region.size, unscaled(region.inside(added.entry.views))
    numbers = through(views, np.arange(1, size + 1, dtype=np.int64).reshape(region.shape))
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
    order = arranged[0].ravel() - 1
    fits = np.all(arranged == arranged[:1]) and order.size == size and np.array_equal(np.sort(order), np.arange(size))
    return order if fits else None
