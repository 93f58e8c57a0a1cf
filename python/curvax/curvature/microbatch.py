"""Gradient, curvature products and diagonals of a large batch with the memory of a small one.

A batch of 8 examples with `microbatch_size=3`, where `scale` is shared by all examples (`structure.batch_axes` says
so):

    x (8, ...)   [0 1 2][3 4 5][6 7]     two equal pieces in one `lax.scan`, then the shorter rest
    weights (8,) [0 1 2][3 4 5][6 7]     made once for the whole batch, normalizer included, and cut
    scale ()     whole   whole  whole

    loss = l(0 1 2) + l(3 4 5) + l(6 7),  likewise gradient, C v, diagonals and factors: sums of the pieces'

Because the weights hold the normalizer of the whole batch, terms add up without any rescaling. The model state passes
from piece to piece; a random key is folded with the piece's index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature.base import Curvature, Evaluation, JacobianRows, LayerFactors, Linearization, Measure, Needs
from curvax.curvature.differentiate import LinearModel, linear_model, second_derivative, second_order
from curvax.curvature.partition import TrainablePartition
from curvax.kernels import Choice, Op, Request
from curvax.loops import for_loop_body
from curvax.losses.rounding import loss_rounding
from curvax.output_space import FisherType
from curvax.structure.axes import LeafAxes
from curvax.structure.batch_axes import BatchAxes, ExampleAxes
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.report import LeafStructure
from curvax.structure.rows import RowSource
from curvax.tree import PyTree

_Visit = Callable[[Evaluation, jax.Array, Any], tuple[PyTree, PyTree, PyTree]]


def _append(values: jax.Array, last: jax.Array) -> jax.Array:
    if values.shape[1:] != last.shape[1:]:
        raise ValueError(
            "has_aux with microbatch_size needs a batch that microbatch_size divides, or aux without examples."
        )
    return jnp.concatenate([values, last])


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A batch cut along its examples into `count` equal pieces and a shorter last one; shared leaves stay whole.

    Attributes:
      evaluation: of the whole batch.
      axes: which leaves of the batch hold the examples.
      size: examples of a piece.
      examples: of the batch.
    """

    evaluation: Evaluation
    axes: BatchAxes
    size: int
    examples: int

    @property
    def count(self) -> int:
        """Number of equal pieces."""
        return self.examples // self.size

    def _piece(self, batch: Any, weights: jax.Array, index: jax.Array, state: PyTree) -> Evaluation:
        def fold(key: jax.Array | None) -> jax.Array | None:
            return None if key is None else jax.random.fold_in(key, index)

        return dataclasses.replace(
            self.evaluation,
            batch=batch,
            weights=weights,
            model_state=state,
            model_key=fold(self.evaluation.model_key),
            sample_key=fold(self.evaluation.sample_key),
        )

    def sum(self, visit: _Visit, beside: Any = None) -> tuple[PyTree, PyTree, PyTree]:
        """Runs `visit` over the pieces.

        Args:
          visit: (piece, index, the piece's part of `beside`) -> (term, new model state, values with a leading axis).
          beside: arrays with the examples on the first axis, cut along with the batch.

        Returns:
          (sum of terms, last model state, concatenated values).
        """
        # 1. Cut: the examples of the equal pieces along a new leading axis, shared leaves beside them.
        whole, batch = self.count * self.size, self.evaluation.batch
        parts, weighed = self.axes.parts(batch, self.size, self.count), (self.evaluation.weights, beside)
        stacked = jax.tree.map(lambda x: x[:whole].reshape(self.count, self.size, *x.shape[1:]), weighed)

        @for_loop_body
        def run(part: Any, index: jax.Array, state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            batch, (weights, aside) = part
            return visit(self._piece(batch, weights, index, state), index, aside)

        def body(carry: tuple[PyTree, PyTree], xs: tuple[Any, jax.Array]) -> tuple[tuple[PyTree, PyTree], PyTree]:
            (held, weighed), index = xs
            term, state, values = run((parts.part(held), weighed), index, carry[1])
            return (tree.add(carry[0], term), state), values

        # 2. Add up the equal pieces in one scan.
        index = jnp.zeros((), jnp.int32)
        state = self.evaluation.model_state
        held, first = jax.tree.map(lambda x: x[0], (parts.held, stacked))
        term_shape = jax.eval_shape(run, (parts.part(held), first), index, state)[0]
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), term_shape)
        (total, state), values = jax.lax.scan(
            body, (zero, state), ((parts.held, stacked), jnp.arange(self.count, dtype=jnp.int32))
        )
        values = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), values)
        # 3. The shorter rest.
        if whole < self.examples:
            tail = self.axes.slice(batch, whole, self.examples), jax.tree.map(lambda x: x[whole:], weighed)
            term, state, rest = run(tail, index + self.count, state)
            total = tree.add(total, term)
            values = jax.tree.map(_append, values, rest)
        return total, state, values


@dataclasses.dataclass(frozen=True)
class Microbatched(Curvature):
    """Accumulates another operator over pieces of the batch by a scan; each piece's residuals live only while it runs.

    Products repeat the forward pass of each piece: memory of one microbatch against one more forward pass per product.
    Results equal the full batch's up to rounding. A model or a `loss_fn` of which that cannot be shown is refused,
    unless the user says where the examples are (`batch_axes`). The model state passes through the pieces in order, and
    dropout keys are folded with the piece's index. A loss that couples examples sees the outputs of all pieces
    together: these are made first, and a product takes one pass forward and one back.

    Attributes:
      inner: the operator.
      size: examples per piece; need not divide the batch.
    """

    inner: Curvature
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"microbatch_size must be at least 1, not {self.size}.")

    @property
    def name(self) -> str:
        return f"{self.inner.name}, microbatches of {self.size}"

    @property
    def partition(self) -> TrainablePartition:
        return self.inner.partition

    @property
    def has_rows(self) -> bool:
        return self.inner.has_rows

    @property
    def has_sampling(self) -> bool:
        return self.inner.has_sampling

    @property
    def has_factors(self) -> bool:
        return self.inner.has_factors

    @property
    def is_random(self) -> bool:
        return self.inner.is_random

    @property
    def has_state(self) -> bool:
        return self.inner.has_state

    @property
    def needs_model_key(self) -> bool:
        return self.inner.needs_model_key

    @property
    def repeats_forward(self) -> bool:
        return True

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        return self.inner.kernels(params, evaluation)

    def with_kernels(self, choices: Mapping[str, Choice]) -> Microbatched:
        return dataclasses.replace(self, inner=self.inner.with_kernels(choices))

    def traced_once(self) -> Microbatched:
        return dataclasses.replace(self, inner=self.inner.traced_once())

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        self.inner.check(params, evaluation)

    @property
    def judges_steps(self) -> bool:
        return self.inner.judges_steps

    @property
    def couples_examples(self) -> bool:
        return self.inner.couples_examples

    def examples(self, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]) -> ExampleAxes:
        return self.inner.examples(params, evaluation, sizes)

    def prepare(self, params: PyTree, evaluation: Evaluation) -> Evaluation:
        """See `Curvature.prepare`.

        Raises:
          ValueError: the batch does not come apart into pieces; one sentence that says why.
        """
        if evaluation.axes is not None:
            return evaluation
        examples = self.inner.examples(params, evaluation, self._sizes)
        if examples.refused and not (examples.axes.any and examples.axes.count(evaluation.batch) <= self.size):
            raise ValueError(
                f"microbatch_size={self.size} cuts the batch into pieces, and their losses do not make up that of the "
                f"batch: {examples.refused}."
            )
        return self.inner.stand_in(params, evaluation, examples)

    def _sizes(self, examples: int) -> tuple[int, ...]:
        """Numbers of examples of the pieces."""
        if examples <= self.size:
            return ()
        return (self.size,) if examples % self.size == 0 else (self.size, examples % self.size)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        return self.inner.batch_fault(params, evaluation)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.inner.effective_weights(params, evaluation)

    def forward(self, params: PyTree, evaluation: Evaluation) -> Any:
        return self.inner.forward(params, evaluation)

    def pieces(self, params: PyTree, evaluation: Evaluation) -> Pieces | None:
        """The batch in pieces, or `None` if it is no larger than one."""
        evaluation = self.prepare(params, evaluation)
        if evaluation.axes is None:
            raise AssertionError("a prepared evaluation has axes.")
        examples = evaluation.axes.count(evaluation.batch)
        if examples <= self.size:
            return None
        weights = self.inner.effective_weights(params, evaluation)
        pieces = Pieces(dataclasses.replace(evaluation, weights=weights), evaluation.axes, self.size, examples)
        weight = self._total_weight(params, pieces)
        return dataclasses.replace(pieces, evaluation=dataclasses.replace(pieces.evaluation, total_weight=weight))

    def _total_weight(self, params: PyTree, pieces: Pieces) -> jax.Array | None:
        if jax.eval_shape(self.inner.total_weight, params, pieces.evaluation) is None:
            return None

        def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
            return self.inner.total_weight(params, piece), piece.model_state, ()

        return pieces.sum(visit)[0]

    def total_weight(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        return self.inner.total_weight(params, evaluation)

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        pieces = self.pieces(params, evaluation)
        if pieces is None:
            return self.inner.value(params, evaluation)
        if self.couples_examples:
            return self.inner.value_of(self.linear_pieces(params, pieces).outputs, pieces.evaluation)
        return pieces.sum(lambda piece, *_: (self.inner.value(params, piece), piece.model_state, ()))[0]

    def linearize(self, params: PyTree, evaluation: Evaluation, needs: Needs) -> Linearization:
        pieces = self.pieces(params, evaluation)
        if pieces is None:
            return self.inner.linearize(params, evaluation, needs)
        if self.couples_examples:
            # The loss needs the outputs of all examples before the first piece has a gradient.
            at = self.inner.linearize_outputs(params, pieces.evaluation, self.linear_pieces(params, pieces), needs)
            return at if at.rows is None else dataclasses.replace(at, rows=self._pulled(params, at.rows))

        def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
            at = self.inner.linearize(params, piece, Needs(gradient=needs.gradient))
            aux = jax.tree.map(lambda x: x[None], at.aux)
            return (at.loss, at.gradient), at.model_state, (aux, at.output_gradient if needs.rows else None)

        (loss, gradient), model_state, (aux, output_gradient) = pieces.sum(visit)
        rows = self._rows(params, pieces) if needs.rows else None
        product = self._product(params, pieces) if needs.product else None
        return Linearization(
            params_like=jax.eval_shape(tree.upcast, params),
            loss=loss,
            gradient=gradient,
            output_gradient=output_gradient,
            product=rows.product if rows is not None else product,
            quadratic=self._quadratic(params, pieces) if needs.product or needs.rows else None,
            sampled_gradient=self._sampled_gradient(params, pieces) if needs.sampling else None,
            rows=rows,
            layer_factors=self._layer_factors(params, pieces) if needs.factors else None,
            rounding=lambda: self._rounding(params, pieces),
            leaf_axes=lambda: self.leaf_axes(params, evaluation),
            model_state=model_state,
            aux=aux,
            batch_fault=self.inner.batch_fault(params, pieces.evaluation),
        )

    def structure(self, params: PyTree, evaluation: Evaluation) -> tuple[LeafStructure, ...]:
        return self.inner.structure(params, evaluation)

    def leaf_axes(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[LeafAxes, ...], ...]:
        return self.inner.leaf_axes(params, evaluation)

    def blocks(self, params: PyTree, evaluation: Evaluation) -> KroneckerBlocks:
        return self.inner.blocks(params, evaluation)

    def rows(
        self,
        params: PyTree,
        evaluation: Evaluation,
        outputs: jax.Array,
        jvp: Callable[[PyTree], jax.Array],
        vjp: Callable[[jax.Array], PyTree],
    ) -> JacobianRows:
        return self.inner.rows(params, evaluation, outputs, jvp, vjp)

    def _product(self, params: PyTree, pieces: Pieces) -> Callable[[PyTree], PyTree]:
        def product(v: PyTree) -> PyTree:
            def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
                at = self.inner.linearize(params, piece, Needs(product=True))
                if at.product is None:
                    raise AssertionError("a linearization asked for products has them.")
                return at.product(v), at.model_state, ()

            return pieces.sum(visit)[0]

        return product

    def _quadratic(self, params: PyTree, pieces: Pieces) -> Callable[[PyTree], jax.Array]:
        def quadratic(v: PyTree) -> jax.Array:
            def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
                at = self.inner.linearize(params, piece, Needs(product=True))
                return at.bend(v), at.model_state, ()

            return pieces.sum(visit)[0]

        return quadratic

    def _rounding(self, params: PyTree, pieces: Pieces) -> jax.Array:
        def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
            at = self.inner.linearize(params, piece, Needs())
            return loss_rounding(at.loss) if at.rounding is None else at.rounding(), at.model_state, ()

        return pieces.sum(visit)[0]

    def _sampled_gradient(self, params: PyTree, pieces: Pieces) -> Callable[[jax.Array], PyTree] | None:
        if not self.has_sampling:
            return None

        def sampled_gradient(key: jax.Array) -> PyTree:
            def visit(piece: Evaluation, index: jax.Array, _: Any) -> tuple[PyTree, PyTree, PyTree]:
                at = self.inner.linearize(params, piece, Needs(sampling=True))
                if at.sampled_gradient is None:
                    raise AssertionError("an operator that can sample offers sampled gradients.")
                return at.sampled_gradient(jax.random.fold_in(key, index)), at.model_state, ()

            return pieces.sum(visit)[0]

        return sampled_gradient

    def _layer_factors(self, params: PyTree, pieces: Pieces) -> LayerFactors:
        def layer_factors(fisher: FisherType, key: jax.Array) -> Callable[[Measure], PyTree]:
            def total(measure: Measure) -> PyTree:
                def visit(piece: Evaluation, index: jax.Array, _: Any) -> tuple[PyTree, PyTree, PyTree]:
                    at = self.inner.linearize(params, piece, Needs(factors=True))
                    if at.layer_factors is None:
                        raise AssertionError("a linearization asked for factors has them.")
                    term = at.layer_factors(fisher, jax.random.fold_in(key, index))(measure)
                    return term, at.model_state, ()

                return pieces.sum(visit)[0]

            return total

        return layer_factors

    def linear_pieces(self, params: PyTree, pieces: Pieces) -> LinearModel:
        """The model between parameters and the outputs of all pieces, linearized anew wherever it is used."""

        def jvp(v: PyTree) -> jax.Array:
            def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
                at = linear_model(lambda p: self.inner.outputs(p, piece), params, jvp=True)
                return (), at.rest[0], at.jvp(v)

            return pieces.sum(visit)[2]

        def vjp(u: jax.Array) -> PyTree:
            def visit(piece: Evaluation, _: jax.Array, part: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
                at = linear_model(lambda p: self.inner.outputs(p, piece), params, jvp=False)
                return at.vjp(part), at.rest[0], ()

            return pieces.sum(visit, beside=u)[0]

        def bend(v: PyTree, u: jax.Array) -> PyTree:
            def visit(piece: Evaluation, _: jax.Array, part: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
                def along(p: PyTree) -> tuple[jax.Array, PyTree]:
                    outputs, (state, _) = self.inner.outputs(p, piece)
                    return tree.vdot(outputs, part), state

                at = second_order(along, params, product=True)
                return at.hvp(v), at.rest, ()

            return pieces.sum(visit, beside=u)[0]

        def second(v: PyTree) -> jax.Array:
            def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
                state = self.inner.outputs(params, piece)[1][0]
                return (), state, second_derivative(lambda p: self.inner.outputs(p, piece), params, v)

            return pieces.sum(visit)[2]

        def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
            outputs, (state, aux) = self.inner.outputs(params, piece)
            return (), state, (outputs, jax.tree.map(lambda x: x[None], aux))

        _, model_state, (outputs, aux) = pieces.sum(visit)
        return LinearModel(outputs, jvp, vjp, (model_state, aux), bend, second)

    def _rows(self, params: PyTree, pieces: Pieces) -> JacobianRows:
        at = self.linear_pieces(params, pieces)
        rows = self.inner.rows(params, pieces.evaluation, at.outputs, at.jvp, at.vjp)
        return self._pulled(params, dataclasses.replace(rows, second=at.second))

    def _pulled(self, params: PyTree, rows: JacobianRows) -> JacobianRows:
        """The rows, made by J^T where each piece has a key or a state of its own.

        No one function of an example describes such a model.
        """
        if not (self.needs_model_key or self.has_state):
            return rows

        return JacobianRows.of(RowSource(None, params, None, rows.output, rows.vjp), rows.jvp)
