"""Gradient, curvature products and diagonals of a large batch with the memory of a small one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature.base import Curvature, Evaluation, Linearization, Measure, Needs, Rows, SiteFactors
from curvax.curvature.output_space import Metric
from curvax.curvature.partition import Partition
from curvax.kernels import Choice, Implementation, Op, Request
from curvax.loops import for_loop_body
from curvax.structure.axes import LeafAxes
from curvax.structure.blocks import Blocks
from curvax.structure.report import LeafStructure
from curvax.structure.rows import row_diagonal, row_gram
from curvax.tree import PyTree

_Visit = Callable[[Evaluation, jax.Array, Any], tuple[PyTree, PyTree, PyTree]]


def _examples(batch: Any) -> int:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError("microbatch_size needs every leaf of the batch to have the same leading example axis.")
    return int(sizes.pop() or 0)


def _append(values: jax.Array, last: jax.Array) -> jax.Array:
    if values.shape[1:] != last.shape[1:]:
        raise ValueError(
            "has_aux with microbatch_size needs a batch that microbatch_size divides, or aux without examples."
        )
    return jnp.concatenate([values, last])


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A batch cut along its example axis into `count` equal pieces and a shorter last one."""

    evaluation: Evaluation
    size: int
    examples: int

    @property
    def count(self) -> int:
        return self.examples // self.size

    def _piece(self, batch: Any, omega: jax.Array, index: jax.Array, state: PyTree) -> Evaluation:
        def fold(key: jax.Array | None) -> jax.Array | None:
            return None if key is None else jax.random.fold_in(key, index)

        return dataclasses.replace(
            self.evaluation,
            batch=batch,
            omega=omega,
            model_state=state,
            model_key=fold(self.evaluation.model_key),
            sample_key=fold(self.evaluation.sample_key),
        )

    def sum(self, visit: _Visit, beside: Any = None) -> tuple[PyTree, PyTree, PyTree]:
        """Runs `visit` over the pieces.

        Args:
          visit: (piece, index, the piece's part of `beside`) -> (term, new model state, values with a leading axis).
          beside: arrays with the batch's leading axis, cut along with it.

        Returns:
          (sum of terms, last model state, concatenated values).
        """
        whole = self.count * self.size
        data = (self.evaluation.batch, self.evaluation.omega, beside)
        head = jax.tree.map(lambda x: x[:whole].reshape(self.count, self.size, *x.shape[1:]), data)
        tail = jax.tree.map(lambda x: x[whole:], data)

        @for_loop_body
        def run(part: Any, index: jax.Array, state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            batch, omega, aside = part
            return visit(self._piece(batch, omega, index, state), index, aside)

        def body(carry: tuple[PyTree, PyTree], xs: tuple[Any, jax.Array]) -> tuple[tuple[PyTree, PyTree], PyTree]:
            term, state, values = run(*xs, carry[1])
            return (tree.add(carry[0], term), state), values

        index = jnp.zeros((), jnp.int32)
        state = self.evaluation.model_state
        term_shape = jax.eval_shape(run, jax.tree.map(lambda x: x[0], head), index, state)[0]
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), term_shape)
        (total, state), values = jax.lax.scan(body, (zero, state), (head, jnp.arange(self.count, dtype=jnp.int32)))
        values = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), values)
        if whole < self.examples:
            term, state, rest = run(tail, index + self.count, state)
            total = tree.add(total, term)
            values = jax.tree.map(_append, values, rest)
        return total, state, values


@dataclasses.dataclass(frozen=True)
class Microbatched(Curvature):
    """Accumulates another operator over pieces of the batch by a scan; each piece's residuals live only while it runs.

    Products repeat the forward pass of each piece: memory of one microbatch against one more forward pass per product.
    Results equal the full batch's (up to rounding) for models that treat examples one by one; the model state passes
    through the pieces in order, and dropout keys are folded with the piece's index.

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
    def partition(self) -> Partition:
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

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        return self.inner.kernels(params, evaluation)

    def with_kernels(self, choices: Mapping[str, Choice]) -> Microbatched:
        return dataclasses.replace(self, inner=self.inner.with_kernels(choices))

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        _examples(evaluation.batch)
        self.inner.check(params, evaluation)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.inner.effective_weights(params, evaluation)

    def forward(self, params: PyTree, evaluation: Evaluation) -> Any:
        return self.inner.forward(params, evaluation)

    def pieces(self, params: PyTree, evaluation: Evaluation) -> Pieces | None:
        """The batch in pieces, or `None` if it is no larger than one."""
        examples = _examples(evaluation.batch)
        if examples <= self.size:
            return None
        omega = self.inner.effective_weights(params, evaluation)
        return Pieces(dataclasses.replace(evaluation, omega=omega), self.size, examples)

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        pieces = self.pieces(params, evaluation)
        if pieces is None:
            return self.inner.value(params, evaluation)
        return pieces.sum(lambda piece, *_: (self.inner.value(params, piece), piece.model_state, ()))[0]

    def linearize(self, params: PyTree, evaluation: Evaluation, needs: Needs) -> Linearization:
        pieces = self.pieces(params, evaluation)
        if pieces is None:
            return self.inner.linearize(params, evaluation, needs)

        def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
            at = self.inner.linearize(params, piece, Needs(gradient=needs.gradient))
            aux = jax.tree.map(lambda x: x[None], at.aux)
            return (at.loss, at.gradient), at.model_state, (aux, at.output_gradient if needs.rows else None)

        (loss, gradient), model_state, (aux, output_gradient) = pieces.sum(visit)
        rows = self._rows(params, evaluation, pieces) if needs.rows else None
        product = self._product(params, pieces) if needs.product else None
        return Linearization(
            params_like=jax.eval_shape(tree.widen, params),
            loss=loss,
            gradient=gradient,
            output_gradient=output_gradient,
            product=rows.product if rows is not None else product,
            sampled_gradient=self._sampled_gradient(params, pieces) if needs.sampling else None,
            rows=rows,
            site_factors=self._site_factors(params, pieces) if needs.factors else None,
            leaf_axes=lambda: self.leaf_axes(params, evaluation),
            model_state=model_state,
            aux=aux,
        )

    def structure(self, params: PyTree, evaluation: Evaluation) -> tuple[LeafStructure, ...]:
        return self.inner.structure(params, evaluation)

    def leaf_axes(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[LeafAxes, ...], ...]:
        return self.inner.leaf_axes(params, evaluation)

    def blocks(self, params: PyTree, evaluation: Evaluation) -> Blocks:
        return self.inner.blocks(params, evaluation)

    def rows(
        self,
        params: PyTree,
        evaluation: Evaluation,
        outputs: jax.Array,
        push: Callable[[PyTree], jax.Array],
        pull: Callable[[jax.Array], PyTree],
    ) -> Rows:
        return self.inner.rows(params, evaluation, outputs, push, pull)

    def _product(self, params: PyTree, pieces: Pieces) -> Callable[[PyTree], PyTree]:
        def product(v: PyTree) -> PyTree:
            def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
                at = self.inner.linearize(params, piece, Needs(product=True))
                if at.product is None:
                    raise AssertionError("a linearization asked for products has them.")
                return at.product(v), at.model_state, ()

            return pieces.sum(visit)[0]

        return product

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

    def _site_factors(self, params: PyTree, pieces: Pieces) -> SiteFactors:
        def site_factors(metric: Metric, key: jax.Array) -> Callable[[Measure], PyTree]:
            def total(measure: Measure) -> PyTree:
                def visit(piece: Evaluation, index: jax.Array, _: Any) -> tuple[PyTree, PyTree, PyTree]:
                    at = self.inner.linearize(params, piece, Needs(factors=True))
                    if at.site_factors is None:
                        raise AssertionError("a linearization asked for factors has them.")
                    term = at.site_factors(metric, jax.random.fold_in(key, index))(measure)
                    return term, at.model_state, ()

                return pieces.sum(visit)[0]

            return total

        return site_factors

    def _rows(self, params: PyTree, evaluation: Evaluation, pieces: Pieces) -> Rows:
        def rows_of(piece: Evaluation) -> tuple[Rows, PyTree]:
            at = self.inner.linearize(params, piece, Needs(rows=True))
            if at.rows is None:
                raise AssertionError("a linearization asked for rows has them.")
            return at.rows, at.model_state

        def push(v: PyTree) -> jax.Array:
            def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
                rows, state = rows_of(piece)
                return (), state, rows.push(v)

            return pieces.sum(visit)[2]

        def pull(u: jax.Array) -> PyTree:
            def visit(piece: Evaluation, _: jax.Array, part: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
                rows, state = rows_of(piece)
                return rows.pull(part), state, ()

            return pieces.sum(visit, beside=u)[0]

        outputs = self._outputs(params, pieces)
        rows = self.inner.rows(params, evaluation, outputs, push, pull)
        if not (self.needs_model_key or self.has_state):
            return rows

        # Each piece has a key and a state of its own, so no one function of an example describes the model.
        def gram(max_bytes: int, implementation: Implementation | Choice | None = None) -> jax.Array:
            return row_gram(None, params, None, rows.output, pull, max_bytes=max_bytes, implementation=implementation)

        def diagonal(max_bytes: int) -> PyTree:
            return row_diagonal(None, params, None, rows.output, pull, max_bytes=max_bytes)

        return dataclasses.replace(rows, gram=gram, diagonal=diagonal)

    def _outputs(self, params: PyTree, pieces: Pieces) -> jax.Array:
        def visit(piece: Evaluation, *_: Any) -> tuple[PyTree, PyTree, PyTree]:
            at = self.inner.linearize(params, piece, Needs())
            return (), at.model_state, self.inner.forward(params, piece)

        return pieces.sum(visit)[2]
