"""How each parameter leaf enters a model, read from the jaxpr of the model on one example.

A leaf W that enters once, as an operand of the product h = a W with one vector a per example, has the gradient
a_i d_r^T in row r of example i, where d_r is the row's cotangent of h. Rows then meet without being formed,

    <a_i d_r^T, a_j d_s^T> = (a_i . a_j) (d_r . d_s),

and a bias added to h, whose gradient is d_r itself, adds one to the first factor. On the way from the leaf to the
product, anything that only moves entries about leaves these inner products as they are. A leaf that is not surely of
this kind keeps its explicit rows; so does one shared by several positions of an example.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from curvax.structure.flat import Flat, Name, Step

# Equations that map the entries of one array one to one, as long as they keep their number.
_VIEWS = frozenset(
    "broadcast_in_dim convert_element_type copy copy_p expand_dims name reshape rev squeeze transpose".split()
)
# Equations that hand the cotangent of the result to either operand, up to its sign.
_SUMS = frozenset("add add_any sub".split())

DENSE, BIAS, NONE, EXPLICIT = "dense", "bias", "no rows", "explicit rows"


@dataclasses.dataclass(frozen=True)
class Finding:
    """How one leaf enters.

    Attributes:
      rule: `DENSE`, `BIAS`, `NONE` (the outputs do not depend on it) or `EXPLICIT`.
      reason: why, for people.
    """

    rule: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """A product h = a W in which a leaf W enters for the only time.

    Attributes:
      step: index of the product among the steps.
      activation: which of its operands is a.
      biases: number of leaves that enter for the only time by being added to h.
    """

    step: int
    activation: int
    biases: int


@dataclasses.dataclass(frozen=True)
class Structure:
    """What was found: one `Finding` per leaf, in the order of the leaves, and the dense layers."""

    findings: tuple[Finding, ...]
    layers: tuple[DenseLayer, ...]

    @property
    def explicit(self) -> tuple[int, ...]:
        """Indices of the leaves whose rows have to be formed."""
        return tuple(i for i, finding in enumerate(self.findings) if finding.rule == EXPLICIT)


def recognise(flat: Flat, leaves: int) -> Structure:
    """Finds the structure of a model.

    Args:
      flat: the model on one example, with the parameter leaves as first arguments.
      leaves: how many arguments are parameter leaves.
    """
    return _Search(flat, leaves).run()


@dataclasses.dataclass(frozen=True)
class _Use:
    """A place where a value is read: operand `operand` of step `step`, or a result of the program (step -1)."""

    step: int
    operand: int


class _Search:
    def __init__(self, flat: Flat, leaves: int) -> None:
        self._flat = flat
        self._uses = _uses(flat)
        self._shapes = _shapes(flat)
        # Where each leaf arrives after being moved about only.
        self._arrivals = [self._follow(name) for name in flat.arguments[:leaves]]

    def run(self) -> Structure:
        findings = [self._finding(name, end) for name, end in zip(self._flat.arguments, self._arrivals, strict=False)]
        layers = []
        for leaf, finding in enumerate(findings):
            if finding.rule == DENSE:
                use = self._uses[self._arrivals[leaf]][0]
                biases = self._biases(use.step, findings)
                for bias in biases:
                    findings[bias] = Finding(BIAS, "added to the output of a dense layer")
                layers.append(DenseLayer(use.step, 1 - use.operand, len(biases)))
        return Structure(tuple(findings), tuple(layers))

    def _finding(self, leaf: Name, arrival: Name) -> Finding:
        if math.prod(self._shapes.get(leaf, (1,))) == 0:
            return Finding(NONE, "it has no entries")
        uses = self._uses[arrival]
        if not uses:
            return Finding(NONE, "the outputs do not depend on it")
        if len(uses) > 1:
            return Finding(EXPLICIT, f"it is used {len(uses)} times")
        if uses[0].step < 0:
            return Finding(EXPLICIT, "it is an output itself")
        return self._entry(uses[0])

    def _entry(self, use: _Use) -> Finding:
        step = self._flat.steps[use.step]
        if step.primitive in _SUMS:
            return Finding(EXPLICIT, "it is added to something other than the output of one dense layer")
        if step.primitive != "dot_general":
            return Finding(EXPLICIT, f"it enters through {step.primitive}")
        why_not = _why_not_dense(step, use.operand)
        if not why_not and 1 - use.operand in self._leaf_operands(use.step):
            why_not = "it is multiplied by another parameter"
        return Finding(EXPLICIT, why_not) if why_not else Finding(DENSE, "one product with one vector per example")

    def _leaf_operands(self, step: int) -> set[int]:
        arrivals = set(self._arrivals)
        return {i for i, atom in enumerate(self._flat.steps[step].inputs) if atom in arrivals}

    def _follow(self, name: Name) -> Name:
        """The last of the values that hold the entries of `name` in some order and are made of each other only."""
        while len(uses := self._uses[name]) == 1 and uses[0].step >= 0 and _is_view(self._flat.steps[uses[0].step]):
            name = self._flat.steps[uses[0].step].outputs[0]
        return name

    def _biases(self, step: int, findings: Sequence[Finding]) -> list[int]:
        """Leaves added to the product `step` while its cotangent is still that of the sum."""
        found, name = [], self._follow(self._flat.steps[step].outputs[0])
        while len(uses := self._uses[name]) == 1 and uses[0].step >= 0:
            total = self._flat.steps[uses[0].step]
            if total.primitive not in _SUMS or len(set(_sizes(total))) != 1:
                break
            other = total.inputs[1 - uses[0].operand]
            if isinstance(other, int) and len(self._uses[other]) == 1:
                found += [i for i, end in enumerate(self._arrivals) if end == other and findings[i].rule == EXPLICIT]
            name = self._follow(total.outputs[0])
        return found


def _uses(flat: Flat) -> dict[Name, list[_Use]]:
    uses: dict[Any, list[_Use]] = collections.defaultdict(list)
    for index, step in enumerate(flat.steps):
        for operand, atom in enumerate(step.inputs):
            if isinstance(atom, int):
                uses[atom].append(_Use(index, operand))
    for position, atom in enumerate(flat.results):
        if isinstance(atom, int):
            uses[atom].append(_Use(-1, position))
    return uses


def _shapes(flat: Flat) -> dict[Name, tuple[int, ...]]:
    """Shapes of all values that are read."""
    return {
        atom: aval.shape
        for step in flat.steps
        for atom, aval in zip(step.inputs, step.input_avals, strict=True)
        if isinstance(atom, int)
    }


def _sizes(step: Step) -> list[int]:
    return [math.prod(aval.shape) for aval in (*step.input_avals, *step.output_avals)]


def _all_floating(avals: Sequence[Any]) -> bool:
    return all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)


def _is_view(step: Step) -> bool:
    """Whether the step maps the entries of its only operand one to one, cast at most between floating dtypes."""
    if step.primitive not in _VIEWS or len(step.inputs) != 1:
        return False
    before, after = _sizes(step)
    return before == after and _all_floating([*step.input_avals, *step.output_avals])


def _why_not_dense(step: Step, kernel: int) -> str:
    """Why the product is not that of operand `kernel` with one vector, or "" if it is."""
    contracted, batched = step.eqn.params["dimension_numbers"]
    activation = 1 - kernel
    shape = step.input_avals[activation].shape
    if batched[kernel]:
        return "it enters through a batch of products"
    if not _all_floating(step.input_avals):
        return "it is not multiplied by floating-point numbers"
    positions = math.prod(d for axis, d in enumerate(shape) if axis not in contracted[activation])
    return "" if positions == 1 else f"it is shared by {positions} positions of an example"
