"""How each parameter leaf enters a model, read from the program of the model on one example.

A leaf is followed through everything that only moves or scales its entries, into rematerialized calls and scans, to
each place where it is used. Where all of them are layer uses (`curvax.structure.uses`), the rows of its Jacobian are
known as pairs of activations and cotangents, and need not be formed by reverse mode. Any use that is not understood
leaves that leaf, and no other, to generic reverse mode.

Along the program, every value is the entry of one leaf or of none, and depends on parameters alone or not:

1. A step that moves entries (`reshape`, `slice`, `split`, a scan's arguments) gives an entry with one more view.
2. A step that uses them gives a `Use`: `_USES` has one function per primitive. Its outputs are entries of no leaf.
3. At the end each leaf, or each part of one that enters by itself (`curvax.structure.regions`), is judged by all of its
   uses, and biases join the layer that they follow.

Of tanh(a W.T / 2 + b), with leaves W (2, 3) and b (2,):

    step                        entry of            use
    t = transpose W             W, transposed
    s = div t 2.0               W, halved
    h = dot_general a s                             W: dense, activations a
    y = add h b                                     b: added, at operand 1
    tanh y

    W: dense, one layer use; b: a bias of it
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax.jaxprs import BARRIER, COND, REMATERIALIZED, SCAN, Path, Program, Step, forward, scan_counts
from curvax.structure.biases import with_biases
from curvax.structure.branches import joined_branches
from curvax.structure.entries import AddedUse, Entry, ExplicitUse, ScaledUse, Use
from curvax.structure.regions import Region, regions_of
from curvax.structure.uses import ConvolutionUse, DenseUse, EmbeddingUse, LayerUse, PartialUse
from curvax.structure.views import View, beside, pads, pieces, summand, view_of

_Entries: TypeAlias = tuple[Entry, ...]

BIAS, SCALE, NONE, GENERIC = "bias", "scale", "no rows", "explicit rows"


@dataclasses.dataclass(frozen=True)
class Finding:
    """How one leaf enters.

    Attributes:
      rule: "dense", "convolution", "embedding" or several of them; "bias", "scale"; "no rows" (the outputs do not
        depend on it); "explicit rows".
      reason: why, for people.
    """

    rule: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Structure:
    """The layers of a model.

    Attributes:
      findings: one per leaf, in the order of the leaves; of a leaf that enters in parts, the worst of them.
      uses: of the leaves, or parts of leaves, that enter through layer uses alone.
      regions: those whose rows are formed by reverse mode, as some output depends on them and they have no layer use,
        and why.
    """

    findings: tuple[Finding, ...]
    uses: tuple[LayerUse, ...]
    regions: tuple[tuple[Region, Finding], ...]

    @property
    def explicit(self) -> tuple[int, ...]:
        """The leaves of `regions`."""
        return tuple(region.leaf for region, _ in self.regions)


def recognize(program: Program, shapes: Sequence[tuple[int, ...]], parts: bool = False) -> Structure:
    """The structure of a model.

    Args:
      program: the model on one example, with the parameter leaves as first arguments.
      shapes: of the parameter leaves.
      parts: whether leaves are judged in parts, and biases may be scaled. False by default: rows are laid out as
        leaves are. Blocks of curvature are not.
    """
    # 1, 2. Along the program.
    by_leaf = _collected(program, shapes)
    # 3. Region by region.
    judged: dict[Region, Finding] = {}
    layers: list[LayerUse] = []
    biases: dict[Region, AddedUse] = {}
    for leaf, (shape, uses) in enumerate(zip(shapes, by_leaf, strict=True)):
        for region, of in _by_region(leaf, shape, uses, parts).items():
            judged[region] = _judged(region.shape, of)
            if judged[region].rule != NONE:
                layers += _layers_alone(of)
                if len(of) == 1 and isinstance(of[0], AddedUse):
                    biases[region] = of[0]
    layers = with_biases(program, layers, biases, scales=parts)
    served = {region for region in judged if any(_serves(use, region) for use in layers)}
    for use in layers:
        if use.bias is not None:
            judged[use.bias.region] = Finding(BIAS, f"added to the output of a {use.rule} layer")
            served.add(use.bias.region)
    findings = [_worst([f for region, f in judged.items() if region.leaf == leaf]) for leaf in range(len(shapes))]
    explicit = tuple((region, f) for region, f in judged.items() if f.rule != NONE and region not in served)
    return Structure(tuple(findings), tuple(layers), explicit)


def _by_region(leaf: int, shape: tuple[int, ...], uses: Sequence[Use], parts: bool) -> dict[Region, list[Use]]:
    """The uses of each region of a leaf; of the leaf as a whole, if there are none or parts do not matter."""
    if not parts or not uses:
        return {Region.of(leaf, shape): list(uses)}
    by_region: dict[Region, list[Use]] = collections.defaultdict(list)
    for views, use in zip(regions_of([_views_of(use) for use in uses]), uses, strict=True):
        by_region[Region.of(leaf, shape, views)].append(use)
    return dict(by_region)


def _views_of(use: Use) -> tuple[View, ...]:
    return use.views if isinstance(use, LayerUse) else use.entry.views


def _serves(use: LayerUse, region: Region) -> bool:
    """Whether it is a layer use of entries of the region."""
    return use.leaf == region.leaf and use.views[: len(region.views)] == region.views


def _worst(findings: Sequence[Finding]) -> Finding:
    """Of the regions of a leaf."""
    return next((finding for finding in findings if finding.rule == GENERIC), findings[0])


def _layers_alone(uses: Sequence[Use]) -> list[LayerUse]:
    """The uses, if all of them are layer uses."""
    layers = [use for use in uses if isinstance(use, LayerUse)]
    return layers if len(layers) == len(uses) else []


def _judged(shape: tuple[int, ...], uses: Sequence[Use]) -> Finding:
    if math.prod(shape) == 0:
        return Finding(NONE, "it has no entries")
    if not uses:
        return Finding(NONE, "the outputs do not depend on it")
    rules = [_rule(use) for use in uses]
    layers = [use for use in uses if isinstance(use, LayerUse)]
    if len(layers) == len(uses):
        count = "one layer use" if len(layers) == 1 else f"{len(layers)} layer uses"
        return Finding(" and ".join(sorted(set(rules))), f"{count}, {_positions(layers)}")
    others = [use for use in uses if not isinstance(use, LayerUse)]
    if not layers and set(rules) <= {BIAS, SCALE}:
        return Finding(" and ".join(sorted(set(rules))), _reason(others[0]))
    worst = next((use for use in others if isinstance(use, ExplicitUse)), others[0])
    also = f", and used {len(uses) - 1} more times" if len(uses) > 1 else ""
    return Finding(GENERIC, _reason(worst) + also)


def _rule(use: Use) -> str:
    match use:
        case LayerUse():
            return use.rule
        case AddedUse():
            return BIAS
        case ScaledUse():
            return SCALE
        case ExplicitUse():
            return GENERIC


def _reason(use: AddedUse | ScaledUse | ExplicitUse) -> str:
    match use:
        case AddedUse():
            return "added elementwise"
        case ScaledUse():
            return "multiplied elementwise"
        case ExplicitUse():
            return use.reason


def _positions(uses: Sequence[LayerUse]) -> str:
    counts = sorted({use.positions for use in uses})
    if counts == [1]:
        return "one position per example"
    return f"{' and '.join(map(str, counts))} positions per example"


@dataclasses.dataclass(frozen=True)
class _Operand:
    """What a value is to the parameters.

    Attributes:
      entries: the leaf that it is made of, or the leaves that stand beside one another in it; none if it is no such.
      parameters_only: whether it depends on parameters and constants at most, and not on the inputs.
    """

    entries: tuple[Entry, ...] = ()
    parameters_only: bool = True


def _collected(program: Program, shapes: Sequence[tuple[int, ...]]) -> list[list[Use]]:
    """Per leaf its uses, in the order of the program."""
    walk = _Walk(shapes)
    inputs = len(program.arguments) - len(shapes)
    leaves = [_Operand((Entry(leaf),)) for leaf in range(len(shapes))]
    for entries in walk.program(program, [*leaves, *[_Operand((), parameters_only=False)] * inputs], ()):
        walk.explicit(entries, "it is an output itself")
    return [walk.uses[leaf] for leaf in range(len(shapes))]


class _Walk:
    """Collects the uses of every leaf."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.uses: dict[int, list[Use]] = collections.defaultdict(list)

    def program(self, program: Program, arguments: Sequence[_Operand], path: Path) -> list[_Entries]:
        """Follows entries through a program; returns what its results are. A result that has entries is no use.

        Args:
          program: the program.
          arguments: what its arguments are.
          path: of the step that the program is the body of.
        """

        def follow(index: int, step: Step, operands: list[_Operand]) -> list[_Operand]:
            # A use through which no derivative passes leaves no trace in the Jacobian, and is none.
            operands = [
                o if through else _Operand((), o.parameters_only)
                for o, through in zip(operands, step.differentiated, strict=True)
            ]
            outputs: Sequence[_Entries] = ()
            if any(o.entries for o in operands):
                outputs = _followed(self, step, operands, (*path, index))
            fixed = all(o.parameters_only for o in operands)
            rest: list[_Entries] = [()] * (len(step.outputs) - len(outputs))
            return [_Operand(entries, fixed) for entries in (*outputs, *rest)]

        return [operand.entries for operand in forward(program, arguments, follow, lambda *_: _Operand())[0]]

    def explicit(self, entries: _Entries, reason: str) -> None:
        """A use that leaves leaves to reverse mode."""
        for entry in entries:
            self.uses[entry.leaf].append(ExplicitUse(entry, reason))


def _followed(walk: _Walk, step: Step, operands: Sequence[_Operand], path: Path) -> Sequence[_Entries]:
    """What the outputs of a step are; those that are missing at the end are entries of no leaf."""
    if step.primitive in _CONTROL:
        return _CONTROL[step.primitive](walk, step, operands, path)
    having = [(i, o.entries) for i, o in enumerate(operands) if o.entries]
    spread = any(entry.spread is not None for _, entries in having for entry in entries)
    fixed = all(o.parameters_only for o in operands)
    if step.primitive in _BESIDE and fixed and not spread and _floating(step):
        return [tuple(e.through(beside(step.eqn, i)) for i, entries in having for e in entries)]
    if len(having) == 1 and not spread:
        (operand, entries) = having[0]
        views = _views(step, operand, fixed)
        if views is not None:
            return [tuple(entry.through(of_output) for entry in entries) for of_output in views]
        if step.primitive == "broadcast_in_dim":
            return [tuple(dataclasses.replace(entry, spread=step) for entry in entries)]
    for operand, entries in having:
        for entry in entries:
            rule = _USES.get(step.primitive, _unknown)
            walk.uses[entry.leaf].append(rule(_Place(step, operand, entry, path, walk.shapes[entry.leaf])))
    return ()


def _floating(step: Step) -> bool:
    """Whether all operands and results are floating-point numbers."""
    return all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (*step.input_avals, *step.output_avals))


_BESIDE = frozenset({"concatenate", "stack"})


def _views(step: Step, operand: int, parameters_only: bool) -> list[tuple[View, ...]] | None:
    """Per output the views by which it follows from the operand; `None` if the step does otherwise."""
    if step.primitive == "split":
        return pieces(step.eqn)
    views = view_of(step.eqn, operand)
    if views is None and step.primitive in ADDING and parameters_only:
        # The weights are a sum of the leaf and what is no input: their gradient is the leaf's.
        views = summand(step.eqn, operand)
    return None if views is None else [views]


def _barrier(walk: _Walk, step: Step, operands: Sequence[_Operand], path: Path) -> list[_Entries]:
    del walk, step, path
    return [operand.entries for operand in operands]


def _rematerialized(walk: _Walk, step: Step, operands: Sequence[_Operand], path: Path) -> list[_Entries]:
    return walk.program(step.bodies[0], operands, path)


def _scan(walk: _Walk, step: Step, operands: Sequence[_Operand], path: Path) -> list[_Entries]:
    """A constant, a carry that never changes, or one slice of stacked weights per iteration."""
    body, length = step.bodies[0], step.eqn.params["length"]
    consts, carried = scan_counts(step.eqn)

    def changes(i: int) -> bool:
        return consts <= i < consts + carried and body.results[i - consts] != body.arguments[i]

    def inside(i: int, operand: _Operand) -> _Operand:
        entries, stacked = operand.entries, i >= consts + carried
        if changes(i):
            walk.explicit(entries, "a scan changes it")
            return _Operand((), parameters_only=False)
        if stacked and any(entry.spread is not None for entry in entries):
            walk.explicit(entries, "it is repeated before a scan goes through it")
            entries = ()
        return dataclasses.replace(operand, entries=tuple(entry.inside(length, stacked) for entry in entries))

    results = walk.program(body, [inside(i, operand) for i, operand in enumerate(operands)], path)
    for entries in results[carried:]:
        walk.explicit(entries, "a scan stacks it")
    # What was carried unchanged is after the scan what it was before.
    after: list[_Entries] = []
    for i in range(consts, consts + carried):
        if changes(i):
            walk.explicit(results[i - consts], "a scan carries it on")
        after.append(() if changes(i) else operands[i].entries)
    return after


def _branches(walk: _Walk, step: Step, operands: Sequence[_Operand], path: Path) -> list[_Entries]:
    """The predicate is the same for all examples, or this were no branch (`batch_axis`)."""
    walk.explicit(operands[0].entries, "it chooses a branch")
    fixed = operands[0].parameters_only
    inside = [dataclasses.replace(o, parameters_only=o.parameters_only and fixed) for o in operands[1:]]
    walks = [_Walk(walk.shapes) for _ in step.bodies]
    results = [
        own.program(body, inside, (*path, which))
        for which, (own, body) in enumerate(zip(walks, step.bodies, strict=True))
    ]
    for leaf, uses in joined_branches([own.uses for own in walks]).items():
        walk.uses[leaf] += uses
    after: list[_Entries] = []
    for each in zip(*results, strict=True):
        alike = all(entries == each[0] for entries in each)
        after.append(each[0] if alike else ())
        for entries in () if alike else each:
            walk.explicit(entries, "a branch returns it")
    return after


_CONTROL: dict[str, Callable[[_Walk, Step, Sequence[_Operand], Path], list[_Entries]]] = {
    **dict.fromkeys(REMATERIALIZED, _rematerialized),
    SCAN: _scan,
    COND: _branches,
    BARRIER: _barrier,
}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an entry of a leaf is used.

    Attributes:
      step, operand: the step, and which of its operands the entry is.
      entry: the entry.
      path: of the step.
      leaf_shape: of the leaf.
    """

    step: Step
    operand: int
    entry: Entry
    path: Path
    leaf_shape: tuple[int, ...]

    def explicit(self, reason: str) -> ExplicitUse:
        """A use of which no more is known."""
        return ExplicitUse(self.entry, reason)

    @property
    def objection(self) -> str:
        """Why it can be no layer use, whatever multiplies; empty if it can."""
        if not jnp.issubdtype(self.step.input_avals[self.operand].dtype, jnp.floating):
            return "it is no floating-point number where it is used"
        if self.entry.spread is not None:
            return f"it is repeated before it enters through {self.step.primitive}"
        return ""

    @property
    def floating(self) -> bool:
        """Whether all operands and results are floating-point numbers."""
        return _floating(self.step)

    def common(self, activation: int) -> dict[str, Any]:
        """What all layer uses say, with the activations at this operand."""
        step, entry = self.step, self.entry
        return {
            "leaf": entry.leaf,
            "views": entry.views,
            "path": self.path,
            "stacked": entry.stacked,
            "operand": self.operand,
            "operand_shape": step.input_avals[self.operand].shape,
            "activation_shape": step.input_avals[activation].shape,
            "output_shape": step.output_avals[0].shape,
            "output_dtype": step.output_avals[0].dtype,
            "lengths": entry.lengths,
        }


def _added(at: _Place) -> Use:
    spread, operand = at.entry.spread, at.operand
    if spread is None:
        return AddedUse(at.entry, at.path, operand, None, at.step.input_avals[operand].shape)
    dimensions = tuple(spread.eqn.params["broadcast_dimensions"])
    return AddedUse(at.entry, at.path, operand, dimensions, spread.input_avals[0].shape)


def _multiplied(at: _Place) -> Use:
    return ScaledUse(at.entry)


def _divided(at: _Place) -> Use:
    return ScaledUse(at.entry) if at.operand == 0 else _unknown(at)


def _dense(at: _Place) -> Use:
    if at.objection:
        return at.explicit(at.objection)
    if not at.floating:
        return at.explicit("it is not multiplied by floating-point numbers")
    return _part(at, DenseUse(**at.common(1 - at.operand), numbers=at.step.eqn.params["dimension_numbers"]))


def _part(at: _Place, use: DenseUse | ConvolutionUse) -> Use:
    """The layer use, or what the leaf has of it where it is put beside others."""
    if not pads(use.views):
        return use
    part = PartialUse.of(use, at.leaf_shape)
    return at.explicit("it is spread over the weights of a layer") if part is None else part


def _convolution(at: _Place) -> Use:
    if at.objection:
        return at.explicit(at.objection)
    if at.operand != 1:
        return at.explicit("it is what a convolution's kernel moves over")
    if at.step.eqn.params["batch_group_count"] != 1:
        return at.explicit("the convolution has batch groups")
    if not at.floating:
        return at.explicit("it is not multiplied by floating-point numbers")
    return _part(at, ConvolutionUse(**at.common(0), params=at.step.eqn.params))


def _embedding(at: _Place) -> Use:
    if at.objection or pads(at.entry.views):
        return at.explicit(at.objection or "a lookup is in a table that it is a part of")
    params, step = at.step.eqn.params, at.step
    numbers, table, out = params["dimension_numbers"], step.input_avals[0].shape, step.output_avals[0].shape
    whole_rows = (
        at.operand == 0
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(params["slice_sizes"]) == (1, *table[1:])
        and numbers.offset_dims == tuple(range(len(out) - len(table) + 1, len(out)))
        and step.input_avals[1].shape[-1:] == (1,)
    )
    if not whole_rows:
        return at.explicit("a gather takes more or less than whole rows of it")
    if any(at.entry.stacked):
        return at.explicit("each iteration of a scan looks up in a table of its own")
    # What JAX's derivative does: it leaves out an index beyond the table unless the lookup was to clip it.
    return EmbeddingUse(**at.common(1), clips=params["mode"] == jax.lax.GatherScatterMode.CLIP)


def _unknown(at: _Place) -> Use:
    return at.explicit(at.objection or f"it enters through {at.step.primitive}")


ADDING = ("add", "add_any", "sub")

_USES: dict[str, Callable[[_Place], Use]] = {
    **dict.fromkeys(ADDING, _added),
    "mul": _multiplied,
    "div": _divided,
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "gather": _embedding,
}
"""What a use is, by the primitive; any other is unknown."""
