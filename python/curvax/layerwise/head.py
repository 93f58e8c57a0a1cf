"""Outputs that are logits of a linear head: hidden states, matrix and bias, so that all logits never exist at once.

J maps parameters to the triple (H, W, b) of hidden states, matrix and bias, and the head's own linearization

    V = dH W + H dW + db

takes a tangent of that triple to one of the logits: the composition is the Jacobian of the model that returns logits,
so inner problem and Gauss-Newton matrix are the same. What follows J, with its transpose, is in the ops
linear_softmax_residual and linear_softmax_hvp, which make and use up logits in blocks of rows.

With blocks of parameters most do not move the matrix: they have no tangent dW, and need no cotangent of W. Blocks that
move the same of the three go through the head side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np

from curvax.curvature import Evaluation, GaussNewton
from curvax.curvature.differentiate import linear_model
from curvax.kernels import Choice, Implementation, Op, Request
from curvax.kernels.linear_softmax_hvp import LINEAR_SOFTMAX_HVP, Cotangents, Tangent, linear_softmax_hvp
from curvax.kernels.linear_softmax_hvp.operands import MAX_BYTES, block_request
from curvax.kernels.linear_softmax_residual import (
    LINEAR_SOFTMAX_RESIDUAL,
    linear_softmax_loss,
    linear_softmax_residual,
)
from curvax.layerwise.block_maps import Tangents
from curvax.layerwise.outputs import LinearizedOutputs, OutputLoss, Outputs
from curvax.losses import SoftmaxCrossEntropy
from curvax.tree import PyTree

Parts: TypeAlias = tuple[Any, ...]
"""Hidden states (..., D), matrix (D, C), and bias (C,) or None: arrays, or tangents or cotangents of them."""

_PerBlock: TypeAlias = Callable[[Tangent, int], tuple[jax.Array | None, Cotangents]]
"""(tangent of one block, bytes) -> (loss at theta0, the same for all blocks, or None; cotangents)."""


@final
@dataclasses.dataclass(frozen=True)
class SoftmaxHead:
    """The last linear map of a model, and how its ops run.

    Attributes:
      of: params -> matrix (D, C), or (matrix, bias), in the dtype of the hidden states.
      hvp, residual: implementations of linear_softmax_hvp and linear_softmax_residual.
    """

    of: Callable[[PyTree], Any]
    hvp: Implementation | Choice | None = None
    residual: Implementation | Choice | None = None

    def with_kernels(self, choices: Mapping[str, Choice]) -> SoftmaxHead:
        """The same with the implementations of its ops chosen."""
        return dataclasses.replace(
            self,
            hvp=choices.get(LINEAR_SOFTMAX_HVP.name, self.hvp),
            residual=choices.get(LINEAR_SOFTMAX_RESIDUAL.name, self.residual),
        )


@final
@dataclasses.dataclass(frozen=True)
class HeadOutputs(Outputs):
    """The model returns hidden states, and the loss takes the logits that a head makes of them.

    Attributes:
      curvature: model, of hidden states, and loss.
      head: the head.
    """

    curvature: GaussNewton
    head: SoftmaxHead

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        hidden, matrix, bias = jax.eval_shape(lambda p, e: self._parts(p, e)[0], params, evaluation)
        if matrix.ndim != 2 or matrix.shape[0] != hidden.shape[-1] or matrix.dtype != hidden.dtype:
            raise ValueError(
                f"head(params) is {matrix.dtype}{matrix.shape} and the hidden states {hidden.dtype}{hidden.shape}: "
                "return a matrix (features, classes) of their dtype, and let predict_fn return hidden states (..., "
                "features)."
            )
        if bias is not None and (bias.shape != matrix.shape[1:] or bias.dtype != matrix.dtype):
            raise ValueError(
                f"the head's bias is {bias.dtype}{bias.shape} and its matrix {matrix.dtype}{matrix.shape}: return one "
                "entry per class in the same dtype."
            )
        batch, model = evaluation.batch, self.curvature.model
        if hidden.shape[0] == 0:
            raise ValueError("the batch is empty: give it at least one example.")
        logits, targets = _logits(hidden, matrix), model.targets(batch)
        self.curvature.loss.check(logits, targets, model.weights(batch))
        if len(targets.shape) == len(logits.shape):
            raise ValueError(
                f"with head= the targets are integer labels, and these are rows of shape {tuple(targets.shape)}: pass "
                "labels, or return logits from predict_fn and leave head= out."
            )
        model.check(self.curvature.loss, logits, batch, signed=False)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        hidden, matrix, _ = jax.eval_shape(lambda p, e: self._parts(p, e)[0], params, evaluation)
        loss, model = self.curvature.loss, self.curvature.model
        return model.batch_fault(loss, _logits(hidden, matrix), evaluation.batch, signed=False)

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        hidden, matrix, _ = jax.eval_shape(lambda p, e: self._parts(p, e)[0], params, evaluation)
        request = block_request(math.prod(hidden.shape[:-1]), matrix)
        wanted = ((LINEAR_SOFTMAX_RESIDUAL, self.head.residual), (LINEAR_SOFTMAX_HVP, self.head.hvp))
        return tuple((op, request) for op, named in wanted if named is None)

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self._loss(self._parts(params, evaluation)[0], params, evaluation).value()

    def gradient(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, PyTree]:
        at = linear_model(lambda p: self._parts(p, evaluation), params, jvp=False)
        loss, residual = self._loss(at.outputs, params, evaluation).gradient()
        return loss, at.vjp(residual)

    def linearize(
        self, params: PyTree, evaluation: Evaluation, prox_linear: bool, scale: jax.Array | None
    ) -> LinearizedOutputs:
        at = linear_model(lambda p: self._parts(p, evaluation), params, jvp=True)
        if at.jvp is None:
            raise AssertionError("a model linearized with jvp=True has one.")
        loss = self._loss(at.outputs, params, evaluation, prox_linear, scale)
        return LinearizedOutputs(loss, at.jvp, at.vjp, at.rest[0])

    def _parts(self, params: PyTree, evaluation: Evaluation) -> tuple[Parts, tuple[PyTree, Any]]:
        """(hidden states, matrix, bias), (new model state, aux)."""
        hidden, rest = self.curvature.model.outputs(params, evaluation)
        matrices = self.head.of(self.curvature.partition.merge(params, evaluation.frozen))
        parts = matrices if isinstance(matrices, tuple) else (matrices, None)
        if len(parts) != 2 or not all(x is None or _is_floating(x) for x in parts) or parts[0] is None:
            raise TypeError(
                f"head(params) returned a {type(matrices).__name__}: return one floating-point matrix (features, "
                "classes), or the tuple (matrix, bias)."
            )
        return (hidden, *parts), rest

    def _loss(
        self,
        at: Parts,
        params: PyTree,
        evaluation: Evaluation,
        prox_linear: bool = False,
        scale: jax.Array | None = None,
    ) -> HeadLoss:
        loss = self.curvature.loss
        if not isinstance(loss, SoftmaxCrossEntropy):
            raise AssertionError("a head is built for the softmax cross entropy alone.")
        # Positions and dtype are those of the logits; nothing else is read.
        weights = self.curvature.effective_weights(params, evaluation)
        labels = self.curvature.model.targets(evaluation.batch)
        return HeadLoss(self.head, at, labels, weights, loss.label_smoothing, prox_linear, scale)


def _logits(hidden: Any, matrix: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*hidden.shape[:-1], matrix.shape[1]), hidden.dtype)


def _is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


@final
@dataclasses.dataclass(frozen=True)
class HeadLoss(OutputLoss):
    """The softmax cross entropy of one minibatch at a head.

    Attributes:
      head: implementations.
      at: hidden states, matrix, bias.
      labels: integers, one per position.
      weights: effective weights.
      label_smoothing: of the loss.
      prox_linear: whether slopes are those of the loss at theta0's logits plus the tangent.
      scale: see `OutputLoss`; `None` is 1.
    """

    head: SoftmaxHead
    at: Parts
    labels: jax.Array
    weights: jax.Array
    label_smoothing: float
    prox_linear: bool = False
    scale: jax.Array | None = None

    def value(self) -> jax.Array:
        hidden, matrix, bias = self.at
        return linear_softmax_loss(
            hidden, matrix, self.labels, bias=bias, weights=self.weights, label_smoothing=self.label_smoothing,
            implementation=self.head.residual,
        )  # fmt: skip

    def residual(self) -> Parts:
        return self.gradient()[1]

    def gradient(self) -> tuple[jax.Array, Parts]:
        """The loss at theta0 and its gradient."""
        loss, residual = self._residual(None, MAX_BYTES)
        return loss, tuple(residual)

    def slope(self, v: Parts) -> tuple[jax.Array, Parts]:
        loss, function = self._slope_of()
        own, u = function(Tangent(*v), MAX_BYTES)
        return self._one(loss, own), tuple(u)

    def product(self, v: Parts) -> Parts:
        return tuple(self._product(Tangent(*v), MAX_BYTES)[1])

    def slopes(self, v: Parts) -> tuple[jax.Array, Parts]:
        loss, function = self._slope_of()
        own, u = _each(function, v)
        return self._one(loss, own), u

    def products(self, v: Parts) -> Parts:
        return _each(self._product, v)[1]

    def _one(self, *losses: jax.Array | None) -> jax.Array:
        """The loss at theta0, from a pass that made it on the side if there is one."""
        known = [loss for loss in losses if loss is not None]
        return known[0] if known else self.value()

    def _slope_of(self) -> tuple[jax.Array | None, _PerBlock]:
        """(loss at theta0 if it is known already, slope of one tangent)."""
        if not self.prox_linear:
            # The quadratic model is linear in what the tangent adds, and its pass sees the logits of theta0.
            return None, lambda v, max_bytes: self._residual(self._scaled(v), max_bytes)
        if self.scale is None:
            return None, lambda v, max_bytes: (None, self._residual(v, max_bytes)[1])
        scale, (loss, residual) = self.scale, self.gradient()

        def scaled(v: Tangent, max_bytes: int) -> tuple[None, Cotangents]:
            def one(there: jax.Array | None, here: jax.Array) -> jax.Array | None:
                return None if there is None else here + scale.astype(here.dtype) * (there - here)

            return None, Cotangents(*map(one, self._residual(v, max_bytes)[1], residual))

        return loss, scaled

    def _scaled(self, v: Tangent) -> Tangent:
        scale = self.scale
        return v if scale is None else jax.tree.map(lambda x: scale.astype(x.dtype) * x, v)

    def _residual(self, v: Tangent | None, max_bytes: int) -> tuple[jax.Array, Cotangents]:
        hidden, matrix, bias = self.at
        return linear_softmax_residual(
            hidden, matrix, self.labels, bias=bias, weights=self.weights, label_smoothing=self.label_smoothing,
            tangent=None if v is None else self._narrow(v), quadratic=v is not None and not self.prox_linear,
            max_bytes=max_bytes, implementation=self.head.residual,
        )  # fmt: skip

    def _product(self, v: Tangent, max_bytes: int) -> tuple[None, Cotangents]:
        hidden, matrix, bias = self.at
        d_hidden, d_matrix, d_bias = self._narrow(self._scaled(v))
        return None, linear_softmax_hvp(
            hidden, matrix, d_hidden, d_matrix, bias=bias, d_bias=d_bias, weights=self.weights, max_bytes=max_bytes,
            implementation=self.head.hvp,
        )  # fmt: skip

    def _narrow(self, v: Tangent) -> Tangent:
        """Tangents in the outputs' dtypes: exactly what they were before `linear_model` upcast them."""
        return Tangent(*(None if x is None else x.astype(a.dtype) for x, a in zip(v, self.at, strict=True)))


def _each(function: _PerBlock, v: Parts) -> tuple[jax.Array | None, Parts]:
    """`function` of each block's tangent: those that move the same parts side by side, on logits made once."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for block in sorted({b for part in v if part is not None for b in part.blocks}):
        moves = tuple(part is not None and block in part.blocks for part in v)
        groups.setdefault(moves, []).append(block)
    loss: jax.Array | None = None
    by_part: list[list[jax.Array]] = [[] for _ in v]
    order: list[list[int]] = [[] for _ in v]
    for moves, blocks in groups.items():
        share = max(MAX_BYTES // len(blocks), 1)
        stacked = Tangent(*(_select(x, blocks) if m else None for x, m in zip(v, moves, strict=True)))
        loss, cotangents = jax.vmap(lambda t, share=share: function(t, share), out_axes=(None, 0))(stacked)
        for k, u in enumerate(cotangents):
            if u is not None:
                by_part[k].append(u)
                order[k].extend(blocks)
    return loss, tuple(map(_gather, v, by_part, order))


def _select(part: Tangents, blocks: list[int]) -> jax.Array:
    rows = [part.blocks.index(block) for block in blocks]
    return part.value if rows == list(range(len(part.blocks))) else part.value[np.asarray(rows)]


def _gather(part: Tangents | None, pieces: list[jax.Array], order: list[int]) -> Tangents | None:
    """The cotangents of all groups in the order of the tangents."""
    if part is None or not part.blocks:
        return part
    value = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
    if tuple(order) != part.blocks:
        value = value[np.asarray([order.index(block) for block in part.blocks])]
    return Tangents(part.blocks, value)
