"""The inner problem of a Gauss-Newton step: the loss of the model linearised at the parameters.

At theta0, with outputs f0, loss gradient g0 and Hessian H in output space, one minibatch's inner problem is

    full        minimise  g0.v + v.H v / 2,  v = J delta
    layerwise   the same for every block b by itself, v_b = J_b delta_b, the other blocks held at theta0
    prox-linear minimise  L(f0 + v) in the place of its quadratic model

with gradients J_b^T (g0 + H v_b) and J_b^T dL(f0 + v_b).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from curvax import tree
from curvax.curvature import Evaluation, GaussNewton, Microbatched
from curvax.curvature.differentiate import linear_model
from curvax.layerwise.block_maps import block_push
from curvax.layerwise.blocks import BlockPartition, Blocks
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class LinearizedLoss:
    """One minibatch at theta0. All vectors are wide.

    Attributes:
      loss: at theta0.
      start: () -> gradient of the loss at theta0, that of the inner problem where delta is zero.
      gradient: delta -> gradient of the inner problem at theta0 + delta.
      product: delta -> J^T H J delta, of each block with itself if there are blocks.
      model_state: the model's new state.
    """

    loss: jax.Array
    start: Callable[[], PyTree]
    gradient: Callable[[PyTree], PyTree]
    product: Callable[[PyTree], PyTree]
    model_state: PyTree


@dataclasses.dataclass(frozen=True)
class InnerProblem:
    """What is minimised inside a step.

    Attributes:
      curvature: model and loss.
      partition: blocks that are solved apart; `None` for the full problem.
      prox_linear: the loss itself on linearised outputs instead of its quadratic model.
      microbatch_size: examples per accumulated piece of a minibatch, or `None`.
    """

    curvature: GaussNewton
    partition: BlockPartition | None = None
    prox_linear: bool = False
    microbatch_size: int | None = None

    def blocks(self, params: PyTree) -> Blocks:
        """The blocks; a single one for the full problem."""
        if self.partition is None:
            return Blocks(("all",), (0,) * len(jax.tree.leaves(params)))
        return self.partition.blocks(params)

    def linearize(self, params: PyTree, evaluation: Evaluation) -> LinearizedLoss:
        """Evaluates and linearizes the model once; every gradient and product uses that."""
        model, loss = self.curvature.model, self.curvature.loss
        at = linear_model(lambda p: model.outputs(p, evaluation), params, push=True)
        if at.push is None:
            raise AssertionError("a model linearized with push=True has one.")
        targets = model.targets(evaluation.batch)
        omega = self.curvature.effective_weights(params, evaluation)
        residual = loss.gradient(at.outputs, targets, omega)
        push, pull, each = self._maps(params, at.push, at.pull)

        def hessian(v: jax.Array) -> jax.Array:
            return loss.hessian_product(at.outputs, targets, omega, v)

        def slope(v: jax.Array) -> jax.Array:
            if self.prox_linear:
                return loss.gradient(at.outputs.astype(v.dtype) + v, targets, omega)
            return residual + hessian(v)

        return LinearizedLoss(
            loss=loss.value(at.outputs, targets, omega),
            start=lambda: at.pull(residual),
            gradient=lambda delta: pull(each(slope)(push(delta))),
            product=lambda delta: pull(each(hessian)(push(delta))),
            model_state=at.rest[0],
        )

    def _maps(
        self, params: PyTree, push: Callable[[PyTree], jax.Array], pull: Callable[[jax.Array], PyTree]
    ) -> tuple[Callable[[PyTree], jax.Array], Callable[[jax.Array], PyTree], Callable[[Any], Any]]:
        """J and its transpose, with a leading axis of blocks if there are any, and what maps functions over it."""
        if self.partition is None:
            return push, pull, lambda f: f
        like = jax.eval_shape(tree.widen, params)
        by_block = block_push(push, like, self.partition.blocks(params))
        transpose = jax.linear_transpose(by_block, like)
        return by_block, lambda u: transpose(u)[0], jax.vmap

    def gradient(self, params: PyTree, delta: PyTree, evaluation: Evaluation) -> tuple[jax.Array, PyTree, PyTree]:
        """(loss at theta0, gradient of the inner problem at theta0 + delta, new model state) of one minibatch."""

        def visit(piece: Evaluation, *_: Any) -> tuple[Any, PyTree, tuple[()]]:
            at = self.linearize(params, piece)
            return (at.loss, at.gradient(delta)), at.model_state, ()

        (loss, gradient), model_state = self._sum(params, evaluation, visit)
        return loss, gradient, model_state

    def system(self, params: PyTree, evaluation: Evaluation) -> LinearizedLoss:
        """One minibatch for a solver of the quadratic: linearized once, or once a product where there are pieces."""
        if self.microbatch_size is None:
            return self.linearize(params, evaluation)

        def summed(term: Callable[[LinearizedLoss], Any]) -> tuple[Any, PyTree]:
            def visit(piece: Evaluation, *_: Any) -> tuple[Any, PyTree, tuple[()]]:
                at = self.linearize(params, piece)
                return term(at), at.model_state, ()

            return self._sum(params, evaluation, visit)

        loss, model_state = summed(lambda at: at.loss)
        return LinearizedLoss(
            loss=loss,
            start=lambda: summed(lambda at: at.start())[0],
            gradient=lambda delta: summed(lambda at: at.gradient(delta))[0],
            product=lambda delta: summed(lambda at: at.product(delta))[0],
            model_state=model_state,
        )

    def _sum(self, params: PyTree, evaluation: Evaluation, visit: Callable[..., Any]) -> tuple[Any, PyTree]:
        """(sum of the pieces' terms, last model state)."""
        pieces = None
        if self.microbatch_size is not None:
            pieces = Microbatched(self.curvature, self.microbatch_size).pieces(params, evaluation)
        if pieces is None:
            term, model_state, _ = visit(evaluation)
            return term, model_state
        term, model_state, _ = pieces.sum(visit)
        return term, model_state
