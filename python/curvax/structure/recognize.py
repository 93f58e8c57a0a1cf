"""How each parameter leaf enters a model, read from the program of the model on one example.

A leaf is followed through everything that only moves or scales its entries, into rematerialized calls and scans, to
each place where it is used. Where all of them are layer uses (`curvax.structure.uses`), the rows of its Jacobian are
known as pairs of activations and cotangents, and need not be formed by reverse mode. A leaf that is added or multiplied
elementwise has small rows that reverse mode forms at no loss. Any other use leaves that leaf, and no other, to generic
reverse mode.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax.jaxprs import REMATERIALIZED, SCAN, scan_counts
from curvax.structure.biases import with_biases
from curvax.structure.entries import Added, Entry
from curvax.structure.program import Atom, Name, Path, Program, Step
from curvax.structure.uses import ConvolutionUse, DenseUse, EmbeddingUse, LayerUse
from curvax.structure.views import pieces, summand, view_of

BIAS, SCALE, NONE, GENERIC = "bias", "scale", "no rows", "explicit rows"

_ADDED = frozenset("add add_any sub".split())
_MULTIPLIED = frozenset("mul div".split())
_PASSING = frozenset({"optimization_barrier"})


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
    """What was found.

    Attributes:
      findings: one per leaf, in the order of the leaves.
      uses: of the leaves that enter through layer uses alone.
    """

    findings: tuple[Finding, ...]
    uses: tuple[LayerUse, ...]

    @property
    def explicit(self) -> tuple[int, ...]:
        """Leaves whose rows are formed by reverse mode: those that some output depends on and that have no layer
        use.
        """
        served = {use.leaf for use in self.uses} | {use.bias.leaf for use in self.uses if use.bias is not None}
        return tuple(i for i, f in enumerate(self.findings) if f.rule != NONE and i not in served)


@dataclasses.dataclass(frozen=True)
class Other:
    """A use that is no layer use: `BIAS`, `SCALE` or `GENERIC`, why, and what the leaf is there."""

    rule: str
    reason: str
    entry: Entry


def find_uses(program: Program, shapes: Sequence[tuple[int, ...]]) -> list[list[LayerUse | Other]]:
    """Per leaf its uses, in the order of the program; arguments as for `recognize`."""
    return _walked(program, shapes)[0]


def _walked(
    program: Program, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[list[LayerUse | Other]], dict[int, Added]]:
    walk = _Walk(shapes)
    entries = {name: Entry(i) for i, name in enumerate(program.arguments[: len(shapes)])}
    walk.program(program, entries, entries, ())
    return [walk.uses[leaf] for leaf in range(len(shapes))], walk.added


def recognize(program: Program, shapes: Sequence[tuple[int, ...]]) -> Structure:
    """Finds the structure of a model.

    Args:
      program: the model on one example, with the parameter leaves as first arguments.
      shapes: of the parameter leaves.
    """
    by_leaf, added = _walked(program, shapes)
    findings: list[Finding] = []
    uses: list[LayerUse] = []
    for leaf, shape in enumerate(shapes):
        finding, served = _judge(leaf, shape, by_leaf[leaf])
        findings.append(finding)
        uses += served
    biases = {leaf for leaf, finding in enumerate(findings) if finding.rule == BIAS and len(by_leaf[leaf]) == 1}
    uses = with_biases(program, uses, added, biases)
    for use in uses:
        if use.bias is not None:
            findings[use.bias.leaf] = Finding(BIAS, f"added to the output of a {use.rule} layer")
    return Structure(tuple(findings), tuple(uses))


def _judge(leaf: int, shape: tuple[int, ...], uses: Sequence[LayerUse | Other]) -> tuple[Finding, list[LayerUse]]:
    if math.prod(shape) == 0:
        return Finding(NONE, "it has no entries"), []
    if not uses:
        return Finding(NONE, "the outputs do not depend on it"), []
    layers = [use for use in uses if isinstance(use, LayerUse)]
    others = [use for use in uses if isinstance(use, Other)]
    rules = {use.rule for use in others}
    if not others:
        kinds = sorted({use.rule for use in layers})
        count = "one layer use" if len(layers) == 1 else f"{len(layers)} layer uses"
        return Finding(" and ".join(kinds), f"{count}, {_positions(layers)}"), layers
    if not layers and rules <= {BIAS, SCALE}:
        return Finding(" and ".join(sorted(rules)), others[0].reason), []
    worst = next((use for use in others if use.rule == GENERIC), others[0])
    also = f", and used {len(uses) - 1} more times" if len(uses) > 1 else ""
    return Finding(GENERIC, worst.reason + also), []


def _positions(uses: Sequence[LayerUse]) -> str:
    counts = sorted({use.positions for use in uses})
    if counts == [1]:
        return "one position per example"
    return f"{' and '.join(map(str, counts))} positions per example"


class _Walk:
    """Collects the uses of every leaf."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.uses: dict[int, list[LayerUse | Other]] = collections.defaultdict(list)
        self.added: dict[int, Added] = {}

    def program(
        self, program: Program, entries: Mapping[Name, Entry], fixed: Iterable[Name], path: Path
    ) -> list[Entry | None]:
        """Follows `entries` through a program; returns what its results are. A result that is an entry is no use.

        Args:
          program: the program.
          entries: the arguments that are entries.
          fixed: the arguments that depend on parameters at most, and not on the inputs.
          path: of the step that the program is the body of.
        """
        known, given = dict(entries), {*fixed, *program.constants}

        def read(atom: Atom) -> Entry | None:
            return known.get(atom) if isinstance(atom, int) else None

        for index, step in enumerate(program.steps):
            # A use through which no derivative passes leaves no trace in the Jacobian, and is none.
            found = [
                read(atom) if through else None for atom, through in zip(step.inputs, step.differentiated, strict=True)
            ]
            free = [not isinstance(atom, int) or atom in given for atom in step.inputs]
            if all(free):
                given.update(step.outputs)
            if any(entry is not None for entry in found):
                made = self._step(step, found, free, (*path, index))
                known.update({name: e for name, e in zip(step.outputs, made, strict=False) if e is not None})
        results = [read(atom) for atom in program.results]
        if not path:
            for entry in results:
                if entry is not None:
                    self._other(entry, GENERIC, "it is an output itself")
        return results

    def _other(self, entry: Entry, rule: str, reason: str) -> None:
        self.uses[entry.leaf].append(Other(rule, reason, entry))

    def _step(self, step: Step, found: Sequence[Entry | None], fixed: Sequence[bool], path: Path) -> list[Entry | None]:
        """What the outputs are. `fixed` says of each operand whether it depends on parameters at most."""
        if step.primitive in _PASSING:
            return list(found)
        if step.primitive == SCAN:
            return self._scan(step, found, fixed, path)
        if step.body is not None and step.primitive in REMATERIALIZED:
            return self.program(step.body, _named(step.body, found), _chosen(step.body, fixed), path)
        entries = [(i, entry) for i, entry in enumerate(found) if entry is not None]
        if len(entries) == 1 and entries[0][1].spread is None:
            operand, entry = entries[0]
            if step.primitive == "split":
                return [entry.through(views) for views in pieces(step.eqn)]
            views = view_of(step.eqn, operand)
            if views is None and step.primitive in _ADDED and all(fixed):
                # The weights are a sum of the leaf and what is no input: their gradient is the leaf's.
                views = summand(step.eqn, operand)
            if views is not None:
                return [entry.through(views)]
        if step.primitive == "broadcast_in_dim" and entries[0][1].spread is None:
            return [dataclasses.replace(entries[0][1], spread=step)]
        for operand, entry in entries:
            self._use(step, operand, entry, path)
        return []

    def _use(self, step: Step, operand: int, entry: Entry, path: Path) -> None:
        if step.primitive in _ADDED:
            spread, shape = entry.spread, self._shapes[entry.leaf]
            dimensions = None if spread is None else tuple(spread.eqn.params["broadcast_dimensions"])
            before = (step if spread is None else spread).input_avals[operand if spread is None else 0].shape
            self.added[entry.leaf] = Added(path, operand, entry, shape, dimensions, before)
            self._other(entry, BIAS, "added elementwise")
        elif step.primitive in _MULTIPLIED and not (step.primitive == "div" and operand):
            self._other(entry, SCALE, "multiplied elementwise")
        elif not (jnp.issubdtype(step.input_avals[operand].dtype, jnp.floating)):
            self._other(entry, GENERIC, "it is no floating-point number where it is used")
        elif entry.spread is not None:
            self._other(entry, GENERIC, f"it is repeated before it enters through {step.primitive}")
        else:
            use = _USES.get(step.primitive, _no_use)(step, operand, entry, path)
            if isinstance(use, LayerUse):
                self.uses[entry.leaf].append(use)
            else:
                self._other(entry, GENERIC, use)

    def _scan(self, step: Step, found: Sequence[Entry | None], fixed: Sequence[bool], path: Path) -> list[Entry | None]:
        body, length = step.body, step.eqn.params["length"]
        if body is None:
            raise AssertionError("a scan has a body.")
        consts, carried = scan_counts(step.eqn)
        given: list[Entry | None] = []
        steady = [
            not consts <= i < consts + carried or body.results[i - consts] == name
            for i, name in enumerate(body.arguments)
        ]
        for i, (entry, unchanged) in enumerate(zip(found, steady, strict=True)):
            if entry is not None and not unchanged:
                self._other(entry, GENERIC, "a scan changes it")
            if entry is not None and entry.spread is not None and i >= consts + carried:
                self._other(entry, GENERIC, "it is repeated before a scan goes through it")
                entry = None
            given.append(entry.inside(length, stacked=i >= consts + carried) if entry and unchanged else None)
        free = [a and b for a, b in zip(fixed, steady, strict=True)]
        results = self.program(body, _named(body, given), _chosen(body, free), path)
        for entry, result in zip(results[carried:], body.results[carried:], strict=True):
            if entry is not None and isinstance(result, int):
                self._other(entry, GENERIC, "a scan stacks it")
        # What was carried unchanged is after the scan what it was before.
        return [
            found[consts + i] if body.results[i] == body.arguments[consts + i] else self._carried(results[i])
            for i in range(carried)
        ]

    def _carried(self, entry: Entry | None) -> None:
        if entry is not None:
            self._other(entry, GENERIC, "a scan carries it on")


def _named(body: Program, found: Sequence[Entry | None]) -> dict[Name, Entry]:
    return {name: entry for name, entry in zip(body.arguments, found, strict=True) if entry is not None}


def _chosen(body: Program, chosen: Sequence[bool]) -> list[Name]:
    return [name for name, wanted in zip(body.arguments, chosen, strict=True) if wanted]


def _common(step: Step, operand: int, entry: Entry, path: Path, activation: int) -> dict[str, Any]:
    return {
        "leaf": entry.leaf,
        "views": entry.views,
        "path": path,
        "stacked": entry.stacked,
        "operand": operand,
        "operand_shape": step.input_avals[operand].shape,
        "activation_shape": step.input_avals[activation].shape,
        "output_shape": step.output_avals[0].shape,
        "output_dtype": step.output_avals[0].dtype,
        "lengths": entry.lengths,
    }


def _floating(step: Step) -> bool:
    return all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (*step.input_avals, *step.output_avals))


def _dense(step: Step, operand: int, entry: Entry, path: Path) -> LayerUse | str:
    if not _floating(step):
        return "it is not multiplied by floating-point numbers"
    numbers = step.eqn.params["dimension_numbers"]
    return DenseUse(**_common(step, operand, entry, path, 1 - operand), numbers=numbers)


def _convolution(step: Step, operand: int, entry: Entry, path: Path) -> LayerUse | str:
    if operand != 1:
        return "it is what a convolution's kernel moves over"
    if step.eqn.params["batch_group_count"] != 1:
        return "the convolution has batch groups"
    if not _floating(step):
        return "it is not multiplied by floating-point numbers"
    return ConvolutionUse(**_common(step, operand, entry, path, 0), params=step.eqn.params)


def _embedding(step: Step, operand: int, entry: Entry, path: Path) -> LayerUse | str:
    numbers, sizes = step.eqn.params["dimension_numbers"], step.eqn.params["slice_sizes"]
    table, out = step.input_avals[0].shape, step.output_avals[0].shape
    offsets = tuple(range(len(out) - len(table) + 1, len(out)))
    whole = (
        operand == 0
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(sizes) == (1, *table[1:])
        and numbers.offset_dims == offsets
        and step.input_avals[1].shape[-1:] == (1,)
    )
    if not whole:
        return "a gather takes more or less than whole rows of it"
    if any(entry.stacked):
        return "each iteration of a scan looks up in a table of its own"
    # What JAX's derivative does: it leaves out an index beyond the table unless the lookup was to clip it.
    clips = step.eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    return EmbeddingUse(**_common(step, operand, entry, path, 1), clips=clips)


def _no_use(step: Step, operand: int, entry: Entry, path: Path) -> str:
    del operand, entry, path
    return f"it enters through {step.primitive}"


_USES = {"dot_general": _dense, "conv_general_dilated": _convolution, "gather": _embedding}
