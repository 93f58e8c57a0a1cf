"""The inner problem of a Gauss-Newton step: the loss of the model linearized at the parameters.

At theta0, with outputs f0, loss gradient g0 and Hessian H in output space, one minibatch's inner problem is

    full        minimize  g0.v + v.H v / 2,  v = J delta
    layerwise   the same for every block b by itself, v_b = J_b delta_b, the other blocks at theta0
    prox-linear minimize  L(f0 + v) in the place of its quadratic model

with gradients J_b^T (g0 + H v_b) and J_b^T dL(f0 + v_b).

In the layerwise problem with L blocks, L tangents and L cotangents pass through the model in parallel. This is most of
the work, and shares reduce it. The examples of a minibatch are divided into S shares and the blocks into S sets. The
curvature of set s is computed on share s only, so each example carries the tangents of about L / S blocks (L = 12 and
S = 3: 4 instead of 12). The gradient J^T g0 needs one cotangent for all blocks and is computed on all examples. Let w_s
be the fraction of the minibatch's weight that is in share s. The gradient of the inner problem for a block of set s is

    J_b^T g0 + J_b^T (dL(f0 + v_b) - g0) / w_s    (second term: share s only)

which is unbiased where examples are drawn independently (subsampled curvature, Byrd et al. 2011).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Curvature, Evaluation, GaussNewton, Microbatched, SumOfTerms
from curvax.curvature.microbatch import Pieces
from curvax.kernels import Choice
from curvax.layerwise.block_maps import block_jvp
from curvax.layerwise.blocks import BlockPartition, ParameterBlocks
from curvax.layerwise.head import HeadOutputs, SoftmaxHead
from curvax.layerwise.outputs import ArrayOutputs, Outputs, TermOutputs
from curvax.layerwise.shares import Shares, share_bounds
from curvax.structure.batch_axes import BatchAxes
from curvax.tree import PyTree

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class LinearizedLoss:
    """One minibatch at theta0. All vectors are upcast.

    Attributes:
      value: () -> loss at theta0.
      start: () -> gradient of the loss at theta0, that of the inner problem where delta is zero.
      slope: delta -> (loss at theta0, gradient of the inner problem at theta0 + delta), which share a pass over the
        outputs.
      product: delta -> J^T H J delta, of each block with itself if there are blocks.
      model_state: the model's new state.
    """

    value: Callable[[], jax.Array]
    start: Callable[[], PyTree]
    slope: Callable[[PyTree], tuple[jax.Array, PyTree]]
    product: Callable[[PyTree], PyTree]
    model_state: PyTree

    @property
    def loss(self) -> jax.Array:
        """The loss at theta0."""
        return self.value()

    def gradient(self, delta: PyTree) -> PyTree:
        """The gradient of the inner problem at theta0 + delta."""
        return self.slope(delta)[1]


@dataclasses.dataclass(frozen=True)
class InnerProblem:
    """What is minimized inside a step.

    Attributes:
      curvature: model and loss, or the terms of one, whose inner problems add up.
      partition: blocks, each solved by itself; `None` for the full problem.
      prox_linear: the loss itself on linearized outputs instead of its quadratic model.
      shares: of a minibatch, each with the curvature of a set of blocks; 1 takes all curvature on all examples.
      microbatch_size: examples per accumulated piece of a minibatch, or `None`.
      head: what makes logits of the model's outputs, or `None` if the outputs are what the loss takes.
    """

    curvature: GaussNewton | SumOfTerms
    partition: BlockPartition | None = None
    prox_linear: bool = False
    shares: int = 1
    microbatch_size: int | None = None
    head: SoftmaxHead | None = None

    @property
    def outputs(self) -> Outputs:
        """What is between parameters and loss."""
        if isinstance(self.curvature, SumOfTerms):
            return TermOutputs(self.curvature)
        return ArrayOutputs(self.curvature) if self.head is None else HeadOutputs(self.curvature, self.head)

    @property
    def _terms(self) -> list[InnerProblem]:
        """The inner problem of each term; none of a loss without terms."""
        if not isinstance(self.curvature, SumOfTerms):
            return []
        return [dataclasses.replace(self, curvature=term.curvature) for term in self.curvature.terms]

    def _each(
        self,
        params: PyTree,
        evaluation: Evaluation,
        visit: Callable[[InnerProblem, Evaluation], tuple[_T, PyTree]],
    ) -> tuple[list[_T], PyTree]:
        """(what `visit` makes of the inner problem of each term, last model state); the state passes through them."""
        if not isinstance(self.curvature, SumOfTerms):
            raise AssertionError("a loss without terms is one problem.")
        own = self.curvature.evaluations(params, self.prepare(params, evaluation))
        made, state = [], evaluation.model_state
        for problem, one in zip(self._terms, own, strict=True):
            result, state = visit(problem, dataclasses.replace(one, model_state=state))
            made.append(result)
        return made, state

    def _sum_of_terms(
        self, params: PyTree, evaluation: Evaluation, linearize: Callable[[InnerProblem, Evaluation], LinearizedLoss]
    ) -> LinearizedLoss:
        def visit(problem: InnerProblem, own: Evaluation) -> tuple[LinearizedLoss, PyTree]:
            at = linearize(problem, own)
            return at, at.model_state

        return _summed(self._each(params, evaluation, visit)[0])

    def with_kernels(self, choices: Mapping[str, Choice]) -> InnerProblem:
        """The same problem with the implementations of its ops chosen."""
        head = None if self.head is None else self.head.with_kernels(choices)
        return dataclasses.replace(self, curvature=self.curvature.with_kernels(choices), head=head)

    def traced_once(self) -> InnerProblem:
        """The same problem, which runs the model's Python once for each set of shapes."""
        return dataclasses.replace(self, curvature=self.curvature.traced_once())

    def blocks(self, params: PyTree) -> ParameterBlocks:
        """The blocks; a single one for the full problem."""
        if self.partition is None:
            return ParameterBlocks(("all",), (0,) * len(jax.tree.leaves(params)))
        return self.partition.blocks(params)

    def axes(self, params: PyTree, evaluation: Evaluation) -> BatchAxes:
        """Which leaves of a batch of several minibatches hold the examples; they may interact within a minibatch."""
        try:
            return self.curvature.examples(params, evaluation, lambda _: ()).axes
        except Exception:  # A model need not run on more than a minibatch, and may say so in whatever way it likes.
            examples = Curvature.examples(self.curvature, params, evaluation, lambda _: ())
        if examples.refused:
            raise ValueError(
                f"{examples.refused}: say by batch_axes= which of them hold the examples, and which are shared."
            )
        return examples.axes

    def prepare(self, params: PyTree, evaluation: Evaluation) -> Evaluation:
        """See `Curvature.prepare`.

        Raises:
          ValueError: the minibatch cannot be cut into microbatches or shares.
        """
        if isinstance(self.curvature, SumOfTerms):
            return self.curvature.prepare_by([problem.prepare for problem in self._terms], params, evaluation)
        if evaluation.axes is not None:
            return evaluation
        if self.microbatch_size is not None:
            evaluation = Microbatched(self.curvature, self.microbatch_size).prepare(params, evaluation)
        if evaluation.axes is not None or self.partition is None or self.shares == 1:
            return self.curvature.prepare(params, evaluation)
        count = min(self.shares, self.blocks(params).count)

        def sizes(examples: int) -> tuple[int, ...]:
            bounds = share_bounds(count, examples)
            return tuple({b - a for a, b in itertools.pairwise(bounds)} - {examples, 0})

        examples = self.curvature.examples(params, evaluation, sizes)
        if examples.refused:
            raise ValueError(f"shares={self.shares} takes curvature on parts of the examples: {examples.refused}.")
        return self.curvature.stand_in(params, evaluation, examples)

    def linearize(self, params: PyTree, evaluation: Evaluation) -> LinearizedLoss:
        """Evaluates and linearizes the model once; every gradient and product uses that.

        Raises:
          ValueError: there are fewer examples than shares.
        """
        if self._terms:
            return self._sum_of_terms(params, evaluation, lambda problem, own: problem.linearize(params, own))
        blocks = self.blocks(params)
        if self.partition is None or self.shares == 1:
            return self._linearize(params, evaluation, blocks, tuple(range(blocks.count)))
        evaluation = self.prepare(params, evaluation)
        if evaluation.axes is None:
            raise AssertionError("what is cut into shares knows where its examples are.")
        shares, parts = Shares.of(self.shares, blocks, evaluation.axes.count(evaluation.batch)), []
        weights, model_state = self.curvature.effective_weights(params, evaluation), evaluation.model_state
        for index, chosen in enumerate(shares.blocks):
            piece = shares.evaluation(index, evaluation, weights, model_state)
            weight = jnp.sum(shares.cut(index, weights))
            # A share without weight has no curvature either, whatever it is multiplied by.
            scale = jnp.sum(weights) / jnp.where(weight > 0, weight, jnp.ones_like(weight))
            parts.append(self._linearize(params, piece, blocks, chosen, scale))
            model_state = parts[-1].model_state
        return _summed(parts)

    def _linearize(
        self,
        params: PyTree,
        evaluation: Evaluation,
        blocks: ParameterBlocks,
        chosen: tuple[int, ...],
        scale: jax.Array | None = None,
    ) -> LinearizedLoss:
        """The whole minibatch or a share: gradient of all blocks, curvature of the chosen ones times `scale`."""
        at = self.outputs.linearize(params, evaluation, self.prox_linear, scale)
        jvp, vjp, slope, product = at.jvp, at.vjp, at.loss.slope, at.loss.product
        if self.partition is not None:
            jvp, vjp = _by_block(jvp, params, blocks, chosen)
            slope, product = at.loss.slopes, at.loss.products

        def start() -> PyTree:
            return at.vjp(at.loss.residual())

        def inner(delta: PyTree) -> tuple[jax.Array, PyTree]:
            loss, cotangents = slope(jvp(delta))
            inside = vjp(cotangents)
            return loss, inside if scale is None else blocks.choose(chosen, inside, start())

        return LinearizedLoss(
            value=at.loss.value,
            start=start,
            slope=inner,
            product=lambda delta: vjp(product(jvp(delta))),
            model_state=at.model_state,
        )

    def gradient(self, params: PyTree, delta: PyTree, evaluation: Evaluation) -> tuple[jax.Array, PyTree, PyTree]:
        """(loss at theta0, gradient of the inner problem at theta0 + delta, new model state) of one minibatch."""

        def visit(piece: Evaluation, *_: Any) -> tuple[Any, PyTree, tuple[()]]:
            at = self.linearize(params, piece)
            return at.slope(delta), at.model_state, ()

        if self._terms:
            return self._gradient_of_terms(params, delta, evaluation)
        coupled = self._coupled(params, evaluation)
        if coupled is not None:
            return *coupled.slope(delta), coupled.model_state
        (loss, gradient), model_state = self._sum(params, evaluation, visit)
        return loss, gradient, model_state

    def _gradient_of_terms(
        self, params: PyTree, delta: PyTree, evaluation: Evaluation
    ) -> tuple[jax.Array, PyTree, PyTree]:
        def term(problem: InnerProblem, own: Evaluation) -> tuple[tuple[jax.Array, PyTree], PyTree]:
            loss, gradient, state = problem.gradient(params, delta, own)
            return (loss, gradient), state

        parts, state = self._each(params, evaluation, term)
        loss, gradient = functools.reduce(tree.add, parts)
        return loss, gradient, state

    def system(self, params: PyTree, evaluation: Evaluation) -> LinearizedLoss:
        """One minibatch for a solver of the quadratic: linearized once, or once a product where there are pieces."""
        if self._terms:
            return self._sum_of_terms(params, evaluation, lambda problem, own: problem.system(params, own))
        if self.microbatch_size is None:
            return self.linearize(params, evaluation)
        coupled = self._coupled(params, evaluation)
        if coupled is not None:
            return coupled

        def summed(term: Callable[[LinearizedLoss], Any]) -> tuple[Any, PyTree]:
            def visit(piece: Evaluation, *_: Any) -> tuple[Any, PyTree, tuple[()]]:
                at = self.linearize(params, piece)
                return term(at), at.model_state, ()

            return self._sum(params, evaluation, visit)

        loss, model_state = summed(lambda at: at.loss)
        return LinearizedLoss(
            value=lambda: loss,
            start=lambda: summed(lambda at: at.start())[0],
            slope=lambda delta: summed(lambda at: at.slope(delta))[0],
            product=lambda delta: summed(lambda at: at.product(delta))[0],
            model_state=model_state,
        )

    def _sum(self, params: PyTree, evaluation: Evaluation, visit: Callable[..., Any]) -> tuple[Any, PyTree]:
        """(sum of the pieces' terms, last model state)."""
        pieces = self._pieces(params, evaluation)
        if pieces is None:
            term, model_state, _ = visit(evaluation)
            return term, model_state
        term, model_state, _ = pieces.sum(visit)
        return term, model_state

    def _pieces(self, params: PyTree, evaluation: Evaluation) -> Pieces | None:
        if self.microbatch_size is None:
            return None
        return Microbatched(self.curvature, self.microbatch_size).pieces(params, evaluation)

    def _coupled(self, params: PyTree, evaluation: Evaluation) -> LinearizedLoss | None:
        """One minibatch in pieces whose loss takes the outputs of all of them together; `None` for other losses."""
        if isinstance(self.curvature, SumOfTerms) or not self.curvature.couples_examples:
            return None
        pieces = self._pieces(params, evaluation)
        if pieces is None:
            return None
        blocks, axis = self.blocks(params), 0 if self.partition is None else 1

        def maps(piece: Evaluation) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree], PyTree]:
            at = self.outputs.linearize(params, piece, self.prox_linear, None)
            if self.partition is None:
                return at.jvp, at.vjp, at.model_state
            return *_by_block(at.jvp, params, blocks, tuple(range(blocks.count))), at.model_state

        def jvp(delta: PyTree) -> PyTree:
            def visit(piece: Evaluation, *_: Any) -> tuple[Any, PyTree, PyTree]:
                forward, _back, state = maps(piece)
                return (), state, jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), forward(delta))

            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), pieces.sum(visit)[2])

        def vjp(u: PyTree) -> PyTree:
            def visit(piece: Evaluation, _: jax.Array, part: PyTree) -> tuple[Any, PyTree, tuple[()]]:
                _forward, back, state = maps(piece)
                return back(jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), part)), state, ()

            return pieces.sum(visit, beside=jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), u))[0]

        whole = Microbatched(self.curvature, pieces.size).linear_pieces(params, pieces)
        loss = ArrayOutputs(self.curvature).loss(whole.outputs, pieces.evaluation, self.prox_linear, None)
        slope, product = (loss.slope, loss.product) if self.partition is None else (loss.slopes, loss.products)

        def inner(delta: PyTree) -> tuple[jax.Array, PyTree]:
            value, cotangents = slope(jvp(delta))
            return value, vjp(cotangents)

        return LinearizedLoss(
            value=loss.value,
            start=lambda: whole.vjp(loss.residual()),
            slope=inner,
            product=lambda delta: vjp(product(jvp(delta))),
            model_state=whole.rest[0],
        )


def _summed(parts: Sequence[LinearizedLoss]) -> LinearizedLoss:
    def total(term: Callable[[LinearizedLoss], PyTree]) -> PyTree:
        return functools.reduce(tree.add, [term(part) for part in parts])

    return LinearizedLoss(
        value=lambda: total(lambda part: part.value()),
        start=lambda: total(lambda part: part.start()),
        slope=lambda delta: total(lambda part: part.slope(delta)),
        product=lambda delta: total(lambda part: part.product(delta)),
        model_state=parts[-1].model_state,
    )


def _by_block(
    jvp: Callable[[PyTree], PyTree], params: PyTree, blocks: ParameterBlocks, chosen: tuple[int, ...]
) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """J and its transpose, block by block, of the chosen ones."""
    like = jax.eval_shape(tree.upcast, params)
    by_block = block_jvp(jvp, like, blocks, chosen)
    transpose = jax.linear_transpose(by_block, like)
    return by_block, lambda u: transpose(u)[0]
