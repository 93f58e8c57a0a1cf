"""The factors of a model's rows: activations and cotangents at every site, explicit rows of the other leaves.

The model on one example is evaluated once, with the activations recorded, and linearized in perturbations of the
outputs of all sites and in the leaves that have none. One reverse pass per row then gives the cotangents of all sites:
the products that would form the gradients of the weights are never made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.structure.program import Program, example_program, replay
from curvax.structure.recognise import Structure, recognise
from curvax.structure.sites import EmbeddingSite, Site
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """Factors of the rows of one example; of several, with one more leading axis.

    Attributes:
      activations: per site (T, G, n); of an embedding (T,) indices.
      cotangents: per site (R, T, G, m).
      explicit: per leaf of `Structure.explicit` its rows, (R, *leaf).
    """

    activations: list[jax.Array]
    cotangents: list[jax.Array]
    explicit: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Capture:
    """A model on one example, and what is known of it.

    Attributes:
      program: the model; its arguments are the leaves of (params, inputs).
      structure: its sites.
      dtype: of the factors: the widest of the parameters, at least float32.
    """

    program: Program
    structure: Structure
    dtype: np.dtype

    def example(
        self, leaves: Sequence[jax.Array], inputs: Sequence[jax.Array], rows: Callable[[jax.Array], jax.Array]
    ) -> Factors:
        """The factors of one example.

        Args:
          leaves: of the parameters.
          inputs: leaves of the inputs, with an example axis of length one.
          rows: outputs (1, ...) -> the output cotangents that make the rows, (R, 1, ...).
        """
        sites, taken = self.structure.sites, self.structure.explicit
        zeros = [jnp.zeros(site.perturbation_shape, site.output_dtype) for site in sites]
        outputs, vjp, activations = jax.vjp(
            lambda e, p: self._perturbed(leaves, inputs, e, p), zeros, [leaves[i] for i in taken], has_aux=True
        )
        cotangents, explicit = jax.vmap(lambda u: vjp(u.astype(outputs.dtype)))(rows(outputs))
        arranged = [jax.vmap(site.cotangents)(d.astype(self.dtype)) for site, d in zip(sites, cotangents, strict=True)]
        return Factors(activations, arranged, [tree.widen(x) for x in explicit])

    def batch(self, leaves: Sequence[jax.Array], inputs: Sequence[jax.Array], cotangents: jax.Array) -> Factors:
        """The factors of all examples, for output cotangents (R, B, ...): one more leading axis B."""

        def one(x: Sequence[jax.Array], u: jax.Array) -> Factors:
            return self.example(leaves, [leaf[None] for leaf in x], lambda _: u[:, None])

        return jax.vmap(one, in_axes=(0, 1))(list(inputs), cotangents)

    def _perturbed(
        self,
        leaves: Sequence[jax.Array],
        inputs: Sequence[jax.Array],
        perturbations: Sequence[jax.Array],
        explicit: Sequence[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Outputs and activations. The derivative with respect to a perturbation of h = a W is the cotangent of h."""
        replaced, sites = list(leaves), self.structure.sites
        for i, leaf in zip(self.structure.explicit, explicit, strict=True):
            replaced[i] = leaf
        # Two leaves may be used by one step: they share its output, and so its perturbation.
        (outputs,), records = replay(
            self.program,
            [*replaced, *inputs],
            _summed([site.path for site in sites], perturbations),
            frozenset((site.path, site.activation) for site in sites),
        )
        return outputs, [self._activations(site, records[site.path, site.activation]) for site in sites]

    def _activations(self, site: Site, recorded: jax.Array) -> jax.Array:
        arranged = site.activations(recorded)
        return arranged if isinstance(site, EmbeddingSite) else arranged.astype(self.dtype)


def _summed(paths: Sequence[Any], perturbations: Sequence[jax.Array]) -> dict[Any, jax.Array]:
    found: dict[Any, jax.Array] = {}
    for path, e in zip(paths, perturbations, strict=True):
        found[path] = found[path] + e if path in found else e
    return found


def capture(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> Capture:
    """The capture of a model whose examples do not interact (`examples_independent`), from shapes alone."""
    program = example_program(predict, params, inputs)
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    return Capture(program, recognise(program, shapes), tree.scalar_dtype(params))
