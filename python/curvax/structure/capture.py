"""The factors of a model's rows: activations and cotangents at every layer use, explicit rows of the other leaves.

The model on one example is evaluated once, with the activations recorded, and linearized in perturbations of the
outputs of all layer uses and in the leaves that have none. One reverse pass per row then gives the cotangents of all
layer uses: the products that would form the gradients of the weights are never made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.jaxprs import Path, without_repeats
from curvax.structure.batch_axes import BatchAxes
from curvax.structure.batch_axis import ByExample, by_example
from curvax.structure.recognize import Structure, recognize
from curvax.structure.replay import RESULT, Hooks, Records, replay, traced_program
from curvax.structure.uses import EmbeddingUse, LayerUse
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """Factors of the rows of one example; of several, with one more leading axis.

    Attributes:
      activations: per layer use (T, G, n); of an embedding (T,) indices.
      cotangents: per layer use (R, T, G, m).
      explicit: per region of `Structure.regions` its rows, (R, *region).
    """

    activations: list[jax.Array]
    cotangents: list[jax.Array]
    explicit: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Capture:
    """A model on one example, and what is known of it.

    Attributes:
      model: the model by example.
      structure: its layer uses.
      dtype: of the factors: the widest of the parameters, at least float32.
    """

    model: ByExample
    structure: Structure
    dtype: np.dtype

    def inputs(self, leaves: Sequence[jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """The inputs, then what was drawn for each example, with the example axis first.

        Args:
          leaves: of the parameters.
          inputs: leaves of the inputs of the whole batch.
        """
        model = self.model
        if not model.draws:
            return list(inputs)
        places = [(draw.whole, RESULT) for draw in model.draws]

        def draw(leaves: Sequence[jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
            _, records = replay(model.whole, [*leaves, *inputs], Hooks(recorded=frozenset(places)))
            return [records[place] for place in places]

        # A program of its own, so that nothing of the model is evaluated that the draws do not depend on.
        drawn, _ = replay(traced_program(draw, list(leaves), list(inputs)), [*leaves, *inputs], Hooks())
        return [*inputs, *(self._by_example(x, d.axis) for x, d in zip(drawn, model.draws, strict=True))]

    def _by_example(self, x: jax.Array, axis: int | None) -> jax.Array:
        """A value for the whole batch with the examples in front, and what was flattened with them in their place."""
        if axis is None:
            return x
        shape = (*x.shape[:axis], self.model.examples, x.shape[axis] // self.model.examples, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def one(self, own: Sequence[jax.Array], index: jax.Array) -> list[jax.Array]:
        """What an example has of `inputs`, its axis kept with length one; what is shared stays whole."""
        return self._axes.example(own, index)

    @property
    def _axes(self) -> BatchAxes:
        """Of `inputs`: what is drawn has the examples in front, statistics are shared."""
        return BatchAxes((*self.model.axes.axes, *(None if d.axis is None else 0 for d in self.model.draws)))

    def example(
        self, leaves: Sequence[jax.Array], inputs: Sequence[jax.Array], rows: Callable[[jax.Array], jax.Array]
    ) -> Factors:
        """The factors of one example.

        Args:
          leaves: of the parameters.
          inputs: what `Capture.one` has of the example.
          rows: outputs (1, ...) -> the output cotangents that make the rows, (R, 1, ...).
        """
        uses, others = self.structure.uses, [region for region, _ in self.structure.regions]
        zeros = [jnp.zeros(use.perturbation_shape, use.output_dtype) for use in uses]
        outputs, vjp, activations = jax.vjp(
            lambda e, p: self._perturbed(leaves, inputs, e, p),
            zeros,
            [region.take(leaves[region.leaf]) for region in others],
            has_aux=True,
        )
        cotangents, explicit = jax.vmap(lambda u: vjp(u.astype(outputs.dtype)))(rows(outputs))
        arranged = [jax.vmap(use.cotangents)(d.astype(self.dtype)) for use, d in zip(uses, cotangents, strict=True)]
        return Factors(activations, arranged, [tree.upcast(x) for x in explicit])

    def batch(self, leaves: Sequence[jax.Array], inputs: Sequence[jax.Array], cotangents: jax.Array) -> Factors:
        """The factors of all examples, for output cotangents (R, B, ...) and leaves of the inputs: one more axis B."""

        def one(x: Sequence[jax.Array], u: jax.Array) -> Factors:
            return self.example(leaves, self._axes.expanded(x), lambda _: u[:, None])

        return jax.vmap(one, in_axes=(list(self._axes.axes), 1))(self.inputs(leaves, inputs), cotangents)

    def _perturbed(
        self,
        leaves: Sequence[jax.Array],
        inputs: Sequence[jax.Array],
        perturbations: Sequence[jax.Array],
        explicit: Sequence[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Outputs and activations. The derivative with respect to a perturbation of h = a W is the cotangent of h."""
        replaced, uses = list(leaves), self.structure.uses
        for (region, _), entries in zip(self.structure.regions, explicit, strict=True):
            replaced[region.leaf] = entries if region.whole else region.replaced(replaced[region.leaf], entries)
        cut = {region.leaf for region, _ in self.structure.regions if not region.whole}
        own = len(inputs) - len(self.model.draws)
        hooks = Hooks(
            # Two leaves may be used by one step: they share its output, and so its perturbation.
            added=_summed([use.paths for use in uses], perturbations),
            given={
                draw.single: x if draw.axis is None else x[0]
                for draw, x in zip(self.model.draws, inputs[own:], strict=True)
            },
            recorded=frozenset((path, use.activation) for use in uses for path in use.paths),
            # A part that is weights has its factors, and no derivative beside them.
            constant=frozenset((path, use.operand) for use in uses if use.leaf in cut for path in use.paths),
        )
        (outputs,), records = replay(self.model.program, [*replaced, *inputs[:own]], hooks)
        return outputs, [self._activations(use, records) for use in uses]

    def _activations(self, use: LayerUse, records: Records) -> jax.Array:
        # Of several branches, those that are not taken have recorded zeros.
        first, *others = (records[path, use.activation] for path in use.paths)
        arranged = use.activations(sum(others, start=first))
        return arranged if isinstance(use, EmbeddingUse) else arranged.astype(self.dtype)


def _summed(paths: Sequence[Sequence[Path]], perturbations: Sequence[jax.Array]) -> dict[Path, jax.Array]:
    sums: dict[Path, jax.Array] = {}
    for places, e in zip(paths, perturbations, strict=True):
        for path in places:
            sums[path] = sums[path] + e if path in sums else e
    return sums


def capture(
    predict: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: Any,
    axes: BatchAxes | None = None,
    *,
    approximate: bool = False,
) -> Capture:
    """The capture of a model whose examples do not interact, from shapes alone.

    Args:
      predict, params, inputs, axes: as for `by_example`.
      approximate: for blocks of curvature, which are so anyway: leaves are judged in parts (`recognize`), and
        statistics over the examples are constants (`by_example`).

    Raises:
      Mixed: the examples interact.
    """
    model = by_example(predict, params, inputs, axes, statistics=approximate)
    if not model.draws:
        # Draws have places in the program as it was traced.
        model = dataclasses.replace(model, program=without_repeats(model.program))
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    return Capture(model, recognize(model.program, shapes, parts=approximate), tree.scalar_dtype(params))
