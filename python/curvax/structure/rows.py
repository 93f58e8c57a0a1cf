"""The Gram matrix of the row factors, S^T J J^T S, for any model, in bounded memory.

Where examples do not interact, each example's rows come from a model call on that example. The rows of a dense layer
then stay a pair of activation and cotangents (`curvax.structure.recognize`); those of other parameters are formed by
reverse-mode products. Where examples interact all rows are formed, by products over the whole batch.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Choice, Implementation
from curvax.kernels.gram_accumulate.whole import mirror
from curvax.output_space import IdentityCurvature, OutputCurvature
from curvax.structure.batch_axes import BatchAxes
from curvax.structure.batch_rules import Mixed
from curvax.structure.capture import Capture, Factors, capture
from curvax.structure.diagonal import example_diagonal, joint_diagonal
from curvax.structure.gram import RowGroups, gram
from curvax.structure.layers import Layer, layers
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.structure.positions import LossWeights, fill_idle_inputs
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class RowSource:
    """What the rows of S^T J are made from: a model on a batch, and the curvature of its outputs.

    Attributes:
      predict: (params, inputs) -> outputs; `None` if one function of the example does not describe the model, and the
        rows must come from `vjp`.
      params: trainable parameters.
      inputs: inputs of the whole batch.
      output: Q = S S^T of the whole batch.
      vjp: u -> J^T u over the whole batch.
      axes: which leaves of the inputs hold the examples, if that is known; by default `None`, the model says it.
      weights: of the loss that `output` belongs to, if it has any: inputs are not looked at where they are zero and the
        model's examples (positions) do not interact. `None` by default: every example counts.
    """

    predict: Callable[[PyTree, Any], jax.Array] | None
    params: PyTree
    inputs: Any
    output: OutputCurvature
    vjp: Callable[[jax.Array], PyTree]
    axes: BatchAxes | None = None
    weights: LossWeights | None = None

    def captured(self) -> Capture | None:
        """The model by example, or `None` if it mixes examples; warns if it does, for that is seldom meant."""
        if self.predict is None:
            return None
        try:
            return capture(self.predict, self.params, self.inputs, self.axes)
        except Mixed as mixed:
            # Python shows a warning with the same words once.
            warnings.warn(
                f"the model's examples interact ({mixed}), and a row of its Jacobian takes a reverse pass over the "
                "batch: make predict_fn act on each example by itself if it should (BatchNorm with running "
                "statistics).",
                UserWarning,
                stacklevel=2,
            )
        return None

    def filled_inputs(self, captured: Capture) -> list[jax.Array]:
        """Leaves of the inputs in which nothing is left of what weighs nothing."""
        return fill_idle_inputs(captured, jax.tree.leaves(self.inputs), self.weights)


def row_gram(
    source: RowSource,
    max_bytes: int = DEFAULT_MAX_BYTES,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """S^T J J^T S as a dense symmetric matrix.

    Args:
      source: what the rows are made from.
      max_bytes: bound on the memory of rows and factors; more rows are made in blocks, and made again for each block
        that they meet. 2 GiB by default.
      implementation: of the op `gram_accumulate`; `None` for the best supported one.

    Returns:
      (rows, rows) matrix in the accumulation dtype, rows flattened from `output.row_shape`, products at highest
      precision.

    Raises:
      ValueError: there are no trainable parameters.

    Warns:
      UserWarning: the model's examples interact.
    """
    rows, coupled = _row_groups(source, max_bytes)
    matrix = gram(rows, max_bytes, implementation)
    return _coupled(matrix, source.output) if coupled else matrix


def row_groups(source: RowSource, max_bytes: int = DEFAULT_MAX_BYTES) -> RowGroups:
    """The rows that `row_gram` makes its matrix of; arguments, errors and warnings as there.

    Where S couples the examples these are the rows of J, example by example.
    """
    return _row_groups(source, max_bytes)[0]


def _row_groups(source: RowSource, max_bytes: int) -> tuple[RowGroups, bool]:
    """(rows, whether S is still to come)."""
    if not jax.tree.leaves(source.params):
        raise ValueError("there are no trainable parameters: leave at least one leaf of the parameters unfrozen.")
    captured = source.captured()
    if captured is None:
        return joint_groups(source.params, source.output, source.vjp), False
    coupled = source.output.couples_examples
    if coupled:
        like = outputs_like(source.output)
        output: OutputCurvature = IdentityCurvature(jnp.zeros(like.shape, like.dtype))
        inputs = jax.tree.leaves(source.inputs)
    else:
        output, inputs = source.output, source.filled_inputs(captured)

    def groups(parts: int) -> RowGroups:
        return example_groups(captured, source.params, inputs, output, parts)

    return _fitting(groups, max_bytes), coupled


def _fitting(groups: Callable[[int], RowGroups], max_bytes: int) -> RowGroups:
    """Groups of which two fit into memory, if any do: those of all rows of an example, or of an equal part of them.

    Args:
      groups: parts of an example -> groups.
      max_bytes: bound.
    """
    whole = groups(1)
    if whole.rows < 2 or whole.pieces(max_bytes).bytes <= max_bytes:
        return whole
    least = groups(whole.rows)
    each = (whole.bytes - least.bytes) / (whole.rows - 1)
    for parts in range(2, whole.rows):
        if whole.rows % parts == 0 and 2 * (least.bytes + (whole.rows // parts - 1) * each) <= max_bytes:
            return groups(parts)
    return least


def row_diagonal(source: RowSource, max_bytes: int = DEFAULT_MAX_BYTES) -> PyTree:
    """The diagonal of J^T S S^T J, the sum of the squared rows; arguments as in `row_gram`.

    Returns:
      An upcast tree with the structure of `params`.
    """
    captured = None if source.output.couples_examples else source.captured()
    if captured is None:
        return joint_diagonal(source.output, source.vjp, max_bytes)
    return example_diagonal(captured, source.params, source.filled_inputs(captured), source.output, max_bytes)


def example_groups(
    captured: Capture, params: PyTree, inputs: Any, output: OutputCurvature, parts: int = 1
) -> RowGroups:
    """One group per example, of a model whose examples do not interact; or several, with equal parts of its rows."""
    factors = example_factors(captured, params, inputs, output, parts)
    rows = math.prod(output.row_shape[1:]) // parts
    return RowGroups(output.row_shape[0] * parts, rows, captured.dtype, lambda index: layers(captured, factors(index)))


def example_factors(
    captured: Capture, params: PyTree, inputs: Any, output: OutputCurvature, parts: int = 1
) -> Callable[[jax.Array], Factors]:
    """Index of a group of `example_groups` -> the factors of its rows; arguments as there."""
    total = math.prod(output.row_shape[1:])
    rows = total // parts
    leaves = jax.tree.leaves(params)
    own = captured.inputs(leaves, jax.tree.leaves(inputs))

    def make(index: jax.Array) -> Factors:
        example, part = (index, jnp.zeros_like(index)) if parts == 1 else (index // parts, index % parts)
        one = captured.one(own, example)
        local = output.example(example)

        def cotangents(outputs: jax.Array) -> jax.Array:
            basis = jnp.eye(rows, total, dtype=tree.accumulation_dtype(outputs.dtype))
            if parts > 1:
                basis = jnp.roll(basis, part * rows, axis=1)
            return jax.vmap(local.factor)(basis.reshape(rows, 1, *output.row_shape[1:]))

        return captured.example(leaves, one, cotangents)

    return make


def _coupled(matrix: jax.Array, output: OutputCurvature) -> jax.Array:
    """S^T K S where S couples the examples and the model does not: K = J J^T is made example by example as ever."""
    like = outputs_like(output)

    def each_row(matrix: jax.Array) -> jax.Array:
        """S^T times every row of a matrix."""
        return jax.vmap(lambda row: output.factor_transpose(row.reshape(like.shape)).reshape(-1))(matrix)

    return mirror(each_row(each_row(matrix).T))


def joint_groups(params: PyTree, output: OutputCurvature, vjp: Callable[[jax.Array], PyTree]) -> RowGroups:
    """One group per row of a model whose examples interact, with explicit rows of all leaves."""
    total = math.prod(output.row_shape)
    dtype = jax.eval_shape(output.factor_transpose, outputs_like(output)).dtype

    def make(index: jax.Array) -> list[Layer]:
        basis = jnp.zeros((total,), dtype).at[index].set(1).reshape(output.row_shape)
        return [Layer(None, x.reshape(1, 1, -1)) for x in jax.tree.leaves(vjp(output.factor(basis)))]

    return RowGroups(total, 1, tree.scalar_dtype(params), make)


def outputs_like(output: OutputCurvature) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the outputs."""
    shape = jax.ShapeDtypeStruct(output.row_shape, jnp.float32)
    return jax.eval_shape(output.factor, shape)
