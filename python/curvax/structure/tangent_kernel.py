"""J1 J2^T of a model on two batches, its empirical neural tangent kernel, without the Jacobians.

    K(x, x') = J(x) J(x')^T           K x K outputs for each pair of examples

An example: f(w, x) = w . x has J(x) = x, so K(x, x') = x . x', the linear kernel. Of a dense layer h = a W the part of
the kernel is (a . a') times the inner products of cotangents (`structure.joint`), so that rows as long as the
parameters are never made. See Novak, Sohl-Dickstein and Schoenholz, "Fast Finite Width Neural Tangent Kernel" (2022).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import meshes
from curvax.explicit_models import on_automatic_axes
from curvax.kernels import Choice, Implementation
from curvax.keywords import spread
from curvax.output_space import IdentityCurvature
from curvax.structure.batch_axes import AxesPrefix, leading_axes
from curvax.structure.capture import Capture
from curvax.structure.exact import pull
from curvax.structure.gram import RowGroups
from curvax.structure.joint import cross_gram
from curvax.structure.layers import Layer
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.structure.outputs import check_outputs
from curvax.structure.rows import RowSource, example_groups, row_gram
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class KernelArguments:
    """A model and a batch.

    Attributes:
      predict_fn: (params, inputs) -> outputs (B, ...).
      params: parameters, at least one.
      inputs: inputs, with B examples on the first axis of some leaves; leaves that all examples share (a grid, position
        ids) keep their shape.
      traced: sums over the outputs of an example, K(x, x') -> tr K(x, x'), for the price of one output and in the
        memory of it. By default, False, all pairs of outputs.
      batch_axes: a prefix tree of the inputs, 0 for leaves that hold examples and `None` for those that are shared, as
        `in_axes` of `jax.vmap`; by default `None`, the model says it (docs/structure.md).
      max_bytes: bound on the memory of factors and formed rows, beside the result. The default is 2 GiB; less makes
        factors anew for each pair of blocks of examples that meet.
    """

    predict_fn: Callable[[PyTree, Any], jax.Array]
    params: PyTree
    inputs: Any
    _: dataclasses.KW_ONLY
    traced: bool = False
    batch_axes: AxesPrefix | None = None
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        if not jax.tree.leaves(self.params):
            raise ValueError("there are no trainable parameters: leave at least one leaf of the parameters unfrozen.")

    def source(self, params: PyTree, inputs: Any) -> RowSource:
        """The rows of J on a batch."""
        predict = on_automatic_axes(self.predict_fn)
        outputs, vjp = jax.vjp(lambda p: predict(p, inputs), params)
        check_outputs(outputs)
        axes = leading_axes(self.batch_axes, inputs)
        return RowSource(predict, params, inputs, IdentityCurvature(outputs), pull(vjp, outputs), axes)


@dataclasses.dataclass(frozen=True)
class PairArguments(KernelArguments):
    """The same, and what it meets.

    Attributes:
      other: inputs of a second batch, of any number of examples; by default `None`, the first meets itself.
      implementation: of the op `gram_accumulate`; `None` for the best supported one.
    """

    other: Any = None
    implementation: Implementation | Choice | None = None


@spread(PairArguments)
def jacobian_gram(arguments: PairArguments) -> jax.Array:
    """J1 J2^T of a model, the empirical neural tangent kernel (Jacot, Gabriel and Hongler 2018).

    Returns:
      (B1, K, B2, K) with K outputs per example, flattened, or (B1, B2) if `traced`; of one batch symmetric; in the
      widest dtype of the parameters and at least float32, products at highest precision.

    Raises:
      ValueError: there are no parameters, or the batches have outputs of different sizes where they are traced.
    """

    def gram(params: PyTree, inputs: Any, other: Any) -> tuple[jax.Array]:
        first = arguments.source(params, inputs)
        (b, *shape), max_bytes, implementation = first.output.row_shape, arguments.max_bytes, arguments.implementation
        k = math.prod(shape)
        if other is None and not arguments.traced:
            return (row_gram(first, max_bytes, implementation).reshape(b, k, b, k),)
        second = first if other is None else arguments.source(params, other)
        c, *others = second.output.row_shape
        if arguments.traced and math.prod(others) != k:
            raise ValueError(
                f"outputs of shapes {tuple(shape)} and {tuple(others)} have no trace: leave out traced=True."
            )
        kernel = cross_gram(first, second, max_bytes, implementation, traced=arguments.traced)
        return (kernel if arguments.traced else kernel.reshape(b, k, c, math.prod(others)),)

    arrays = (arguments.params, arguments.inputs, arguments.other)
    return meshes.automatic(gram, arrays, (meshes.by_examples(arguments.inputs),))[0]


@spread(KernelArguments)
def jacobian_gram_diagonal(arguments: KernelArguments) -> jax.Array:
    """The blocks J_b J_b^T of single examples, on the diagonal of `jacobian_gram`, and nothing beside them.

    Returns:
      (B, K, K), or if `traced` (B,), the squared norms of the examples' Jacobians; dtype as in `jacobian_gram`.

    Raises:
      ValueError: there are no parameters.
    """

    def diagonal(params: PyTree, inputs: Any) -> tuple[jax.Array]:
        source = arguments.source(params, inputs)
        return (_own_grams(source, arguments.traced, arguments.max_bytes),)

    arrays = (arguments.params, arguments.inputs)
    return meshes.automatic(diagonal, arrays, (meshes.by_examples(arguments.inputs),))[0]


def _own_grams(source: RowSource, traced: bool, max_bytes: int) -> jax.Array:
    captured = source.captured()
    groups = _by_reverse_mode(source) if captured is None else _by_layers(source, captured)

    def one(index: jax.Array) -> jax.Array:
        parts = groups.make(index)
        rows = 1 if traced else groups.rows
        grams = [(part.joined() if traced else part).own_gram().astype(groups.dtype) for part in parts]
        return sum(grams, start=jnp.zeros((rows, rows), groups.dtype))

    indices = jnp.arange(groups.groups, dtype=jnp.int32)
    at_once = max(1, min(groups.groups, max_bytes // max(groups.bytes, 1)))
    blocks = jax.lax.map(one, indices, batch_size=at_once)
    return blocks[:, 0, 0] if traced else blocks


def _by_layers(source: RowSource, captured: Capture) -> RowGroups:
    return example_groups(captured, source.params, source.filled_inputs(captured), source.output)


def _by_reverse_mode(source: RowSource) -> RowGroups:
    """Rows of an example that interacts with others: one reverse pass over the batch for each."""
    (b, *rest) = source.output.row_shape
    k = math.prod(rest)
    like = jax.eval_shape(source.vjp, jax.ShapeDtypeStruct(source.output.row_shape, jnp.float32))
    dtype = jnp.result_type(*jax.tree.leaves(like))

    def make(index: jax.Array) -> list[Layer]:
        basis = jnp.zeros((k, b, k), dtype).at[:, index].set(jnp.eye(k, dtype=dtype))
        rows = jax.vmap(source.vjp)(basis.reshape(k, b, *rest))
        return [Layer(None, x.reshape(1, k, -1)) for x in jax.tree.leaves(rows)]

    return RowGroups(b, k, dtype, make)
