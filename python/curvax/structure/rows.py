"""The Gram matrix of the row factors, S^T J J^T S, for any model, in bounded memory.

Where examples do not interact, each example's rows come from a model call on that example. The rows of a dense layer
then stay a pair of activation and cotangents (`curvax.structure.recognise`); those of other parameters are formed by
reverse-mode products. Where examples interact all rows are formed, by products over the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature.output_space import OutputCurvature
from curvax.kernels import Choice, Implementation
from curvax.structure.batch_axis import examples_independent
from curvax.structure.flat import Flat, flat_example, replay
from curvax.structure.gram import Factors, RowGroups, gram
from curvax.structure.recognise import Structure, recognise
from curvax.tree import PyTree

DEFAULT_MAX_BYTES = 2 << 30
"""Memory for explicit rows: 2 GiB holds 1,280 rows of 400,000 float32 parameters at once."""


def row_gram(
    predict: Callable[[PyTree, Any], jax.Array] | None,
    params: PyTree,
    inputs: Any,
    output: OutputCurvature,
    pull: Callable[[jax.Array], PyTree],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """S^T J J^T S as a dense symmetric matrix.

    Args:
      predict: (params, inputs) -> outputs; `None` if one function of the example does not describe the model, and the
        rows must come from `pull`.
      params: trainable parameters.
      inputs: inputs of the whole batch.
      output: Q = S S^T of the whole batch.
      pull: u -> J^T u over the whole batch.
      max_bytes: bound on the memory of rows and factors; more rows are made in blocks, and made again for each block
        that they meet.
      implementation: of the op `gram_accumulate`.

    Returns:
      (rows, rows) matrix in the wide dtype, rows flattened from `output.row_shape`, products at highest precision.

    Raises:
      ValueError: there are no trainable parameters.
    """
    if not jax.tree.leaves(params):
        raise ValueError("there are no trainable parameters: leave at least one leaf of the parameters unfrozen.")
    if predict is not None and not output.couples_examples and examples_independent(predict, params, inputs)[0]:
        return gram(_example_groups(predict, params, inputs, output), max_bytes, implementation)
    return gram(_joint_groups(params, output, pull), max_bytes, implementation)


def _example_groups(
    predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any, output: OutputCurvature
) -> RowGroups:
    """One group per example."""
    rows, dtype = math.prod(output.row_shape[1:]), tree.scalar_dtype(params)
    leaves = jax.tree.leaves(params)
    flat = flat_example(predict, params, inputs)
    structure = recognise(flat, len(leaves))

    def make(index: jax.Array) -> Factors:
        one = [jax.lax.dynamic_slice_in_dim(x, index, 1, axis=0) for x in jax.tree.leaves(inputs)]
        explicit, zeros = [leaves[i] for i in structure.explicit], _zero_perturbations(flat, structure)
        outputs, vjp, activations = jax.vjp(
            lambda p, e: _perturbed(flat, structure, leaves, one, p, e), explicit, zeros, has_aux=True
        )
        local = output.example(index)
        basis = jnp.eye(rows, dtype=tree.wide_dtype(outputs.dtype)).reshape(rows, 1, *output.row_shape[1:])
        formed, cotangents = jax.vmap(lambda e: tree.widen(vjp(local.factor(e).astype(outputs.dtype))))(basis)
        return Factors(formed, [a.astype(dtype) for a in activations], [d.astype(dtype) for d in cotangents])

    return RowGroups(output.row_shape[0], rows, dtype, make)


def _zero_perturbations(flat: Flat, structure: Structure) -> list[jax.Array]:
    """One for the product of each dense layer."""
    products = (flat.steps[layer.step].output_avals[0] for layer in structure.layers)
    return [jnp.zeros(aval.shape, aval.dtype) for aval in products]


def _perturbed(
    flat: Flat,
    structure: Structure,
    leaves: Sequence[jax.Array],
    inputs: Sequence[jax.Array],
    explicit: Sequence[jax.Array],
    perturbations: Sequence[jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    """Outputs and the activation vectors of the dense layers, a one appended for each bias.

    The derivative with respect to a perturbation of h = a W is the cotangent of h.
    """
    replaced = list(leaves)
    for i, leaf in zip(structure.explicit, explicit, strict=True):
        replaced[i] = leaf
    layers = structure.layers
    (outputs,), records = replay(
        flat,
        [*replaced, *inputs],
        {layer.step: e for layer, e in zip(layers, perturbations, strict=True)},
        {layer.step: layer.activation for layer in layers},
    )
    return outputs, [_with_ones(records[layer.step], layer.biases) for layer in layers]


def _with_ones(activation: jax.Array, count: int) -> jax.Array:
    flat = jnp.ravel(activation)
    return jnp.concatenate([flat, jnp.ones((count,), flat.dtype)])


def _joint_groups(params: PyTree, output: OutputCurvature, pull: Callable[[jax.Array], PyTree]) -> RowGroups:
    """One group per row, all parameters explicit."""
    total = math.prod(output.row_shape)
    dtype = jax.eval_shape(output.factor_transpose, _outputs_like(output)).dtype

    def make(index: jax.Array) -> Factors:
        basis = jnp.zeros((total,), dtype).at[index].set(1).reshape(output.row_shape)
        return Factors([x[None] for x in jax.tree.leaves(pull(output.factor(basis)))], [], [])

    return RowGroups(total, 1, tree.scalar_dtype(params), make)


def _outputs_like(output: OutputCurvature) -> jax.ShapeDtypeStruct:
    shape = jax.ShapeDtypeStruct(output.row_shape, jnp.float32)
    return jax.eval_shape(output.factor, shape)
