"""Row-space methods without structure: every leaf's rows by vmapped reverse mode, what any model falls back to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import curvax
from bench.workloads import PyTree
from curvax.curvature import Evaluation, GaussNewton, JacobianRows
from curvax.kernels import Choice, Implementation
from curvax.structure.capture import Capture, capture
from curvax.structure.diagonal import example_diagonal
from curvax.structure.gram import gram
from curvax.structure.regions import Region
from curvax.structure.rows import example_groups


def generic_capture(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> Capture:
    """The capture of a model of which nothing is recognized."""
    layers = capture(predict, params, inputs)
    findings, shapes = layers.structure.findings, [leaf.shape for leaf in jax.tree.leaves(params)]
    regions = tuple((Region.of(i, shape), findings[i]) for i, shape in enumerate(shapes))
    return dataclasses.replace(layers, structure=dataclasses.replace(layers.structure, uses=(), regions=regions))


@dataclasses.dataclass(frozen=True)
class GenericGaussNewton(GaussNewton):
    """A Gauss-Newton matrix whose rows are all formed, for models whose examples do not interact."""

    def rows(self, params: PyTree, evaluation: Evaluation, *rest: Any) -> JacobianRows:
        known = super().rows(params, evaluation, *rest)
        inputs = self.model.inputs(evaluation.batch)
        layers = generic_capture(lambda p, x: self._predict(p, x, evaluation), params, inputs)

        def whole(max_bytes: int, implementation: Implementation | Choice | None = None) -> jax.Array:
            return gram(example_groups(layers, params, inputs, known.output), max_bytes, implementation)

        def diagonal(max_bytes: int) -> PyTree:
            return example_diagonal(layers, params, inputs, known.output, max_bytes)

        return dataclasses.replace(known, gram=whole, diagonal=diagonal)


def without_structure(method: curvax.Method) -> curvax.Method:
    """The same Gauss-Newton method on the generic route."""
    curvature = method.assembly.curvature
    if not isinstance(curvature, GaussNewton):
        raise TypeError(f"only a Gauss-Newton matrix has rows, and this is a {curvature.name}.")
    generic = GenericGaussNewton(**{f.name: getattr(curvature, f.name) for f in dataclasses.fields(curvature)})
    return curvax.Method(dataclasses.replace(method.assembly, curvature=generic))
