"""`full_gn` and `layerwise_gn`: keywords to a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from curvax.curvature import Extras, GaussNewton, Model
from curvax.curvature import TrainablePartition as TrainablePartition
from curvax.curvature.partition import Mask
from curvax.kernels._dispatch import Backend
from curvax.layerwise.blocks import BlockPartition, ByGroup
from curvax.layerwise.head import SoftmaxHead
from curvax.layerwise.inner import ConjugateGradients, InnerSolver, Optimizer
from curvax.layerwise.method import InnerLoopMethod
from curvax.layerwise.quadratic import InnerProblem
from curvax.layerwise.search import LineSearch
from curvax.losses import Loss, SoftmaxCrossEntropy
from curvax.structure.batch_axes import AxesPrefix
from curvax.tree import PyTree

Head: TypeAlias = jax.Array | tuple[jax.Array, jax.Array]
"""A matrix (features, classes), or the tuple (matrix, bias)."""


def full_gn(
    *,
    predict_fn: Callable[..., Any],
    loss: Loss,
    head: Callable[[PyTree], Head] | None = None,
    inner: optax.GradientTransformation | ConjugateGradients,
    inner_steps: int,
    line_search: LineSearch | None = LineSearch(),
    warm_start: bool = True,
    prox_linear: bool = False,
    inner_schedule: optax.Schedule | None = None,
    clip_norm: float | None = None,
    x_key: str = "x",
    y_key: str = "y",
    weight_key: str | None = None,
    has_state: bool = False,
    has_aux: bool = False,
    has_rng: bool = False,
    frozen: Mask | None = None,
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> InnerLoopMethod:
    """Full Gauss-Newton by an inner optimizer (Abreu et al. 2025, arXiv 2510.09378).

    A step linearizes the model at theta0 on each of `inner_steps` fresh minibatches, takes one update of the inner
    optimizer per minibatch at the gradient J^T (g0 + H J (theta - theta0)) of its quadratic, and goes from theta0
    towards the result by the step size that is best on further data.

    Args:
      predict_fn: `predict_fn(params, inputs) -> outputs`, acting on each example of the leading axis by itself.
      loss: loss in output space.
      head: `head(params)` is the matrix (D, classes), or (matrix, bias), that makes logits of hidden states (..., D),
        which `predict_fn` then returns in the logits' place: with a large vocabulary the logits are most of a step's
        memory, and with `head` they are made and used up in blocks of rows (256 MiB at a time), with the same numbers.
        Tied embeddings are `lambda p: p["embed"].T`. The loss must be `SoftmaxCrossEntropy`, with integer labels.
      inner: an Optax optimizer (`curvax.optimizers.muon_adamw`, the paper's; `optax.adamw`; ...), whose state is kept
        from step to step; or `ConjugateGradients`, which solves one minibatch's quadratic (`inner_steps=1`).
      inner_steps: minibatches in a step, N.
      line_search: `None` takes the full step whenever it is finite. The paper calls the search indispensable, save for
        `prox_linear`.
      warm_start: the next inner loop starts where this one ended, before the line search shortened the step.
      prox_linear: minimize the loss itself of the linearized outputs, not its quadratic model.
      inner_schedule: index of the minibatch within the step, 0 to N - 1, -> factor on the inner update. `None`, the
        paper's choice for large batches, is a cosine from 1 to 0 in every step; `optax.constant_schedule(1.0)` leaves
        the rate to the inner optimizer's own schedule, whose count runs on from step to step.
      clip_norm: bound on the norm of the inner gradient, of each block apart where there are blocks; 1 in the paper.
      x_key, y_key, weight_key: keys of inputs, targets and example weights in the batch. Every minibatch is a mean of
        its own.
      has_state, has_aux, has_rng, frozen: what the model takes and returns beside the plain signature, and parameters
        that stay as they are (`curvax.curvature.Extras`). What `has_aux` returns is dropped: there is one of it per
        minibatch.
      microbatch_size: examples per accumulated piece of a minibatch; `None` takes each minibatch at once.
      batch_axes: which axis of each leaf of the batch holds the examples, `None` for a leaf that all examples share: a
        prefix of the batch, as `in_axes` of `jax.vmap`. By default, `None`, it is found (docs/structure.md).
      backend: preferred implementation of kernels.

    Raises:
      TypeError, ValueError: arguments that do not go together; one sentence with the mend.
    """
    extras = Extras(has_state, has_aux, has_rng, TrainablePartition(frozen))
    model = Model(predict_fn, x_key, y_key, weight_key, extras, batch_axes)
    return _method(
        model, loss, head, None, 1, inner, inner_steps, line_search, warm_start, prox_linear, inner_schedule,
        clip_norm, microbatch_size, backend,
    )  # fmt: skip


def layerwise_gn(
    *,
    predict_fn: Callable[..., Any],
    loss: Loss,
    head: Callable[[PyTree], Head] | None = None,
    inner: optax.GradientTransformation | ConjugateGradients,
    inner_steps: int,
    partition: BlockPartition = ByGroup(),
    shares: int = 1,
    line_search: LineSearch | None = LineSearch(),
    warm_start: bool = True,
    prox_linear: bool = False,
    inner_schedule: optax.Schedule | None = None,
    clip_norm: float | None = None,
    x_key: str = "x",
    y_key: str = "y",
    weight_key: str | None = None,
    has_state: bool = False,
    has_aux: bool = False,
    has_rng: bool = False,
    frozen: Mask | None = None,
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> InnerLoopMethod:
    """Layerwise Gauss-Newton by an inner optimizer (Abreu et al. 2025): `full_gn` without curvature between blocks.

    Every block minimizes its own quadratic with the others held at theta0, gradient J_b^T (g0 + H J_b (theta_b -
    theta0_b)). All blocks share one linearization per minibatch, one run of the inner optimizer and one line search.

    Args:
      partition: `ByGroup()`, the top-level entries of the parameter tree (`split=("layers",)` for each layer of a list
        or stack of them); `ByLeaf()`; `ByPath(function)`; `ByPrefix({name: paths})`.
      shares: into how many shares each minibatch (or microbatch) is cut, in the order of its examples, so have them
        shuffled. The blocks are dealt out to the shares in turn, and a block takes its curvature on its own share
        alone, the gradient on all examples. 1 takes all curvature on all examples; more than there are blocks are as
        many as there are blocks. A share whose examples all have weight zero has no curvature.

    The other arguments are those of `full_gn`. What the blocks cost beyond it stands in `plan_for(params, batch)`:
    tangents of the blocks below a layer pass through it side by side, so the work grows with the number of blocks on
    one path (1.7 times full for six equal dense layers), most where layers are stacked for `lax.scan`, which runs all
    blocks through all layers.
    """
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition is a {type(partition).__name__}: pass ByGroup(), ByLeaf() or ByPath(function).")
    extras = Extras(has_state, has_aux, has_rng, TrainablePartition(frozen))
    model = Model(predict_fn, x_key, y_key, weight_key, extras, batch_axes)
    return _method(
        model, loss, head, partition, shares, inner, inner_steps, line_search, warm_start, prox_linear,
        inner_schedule, clip_norm, microbatch_size, backend,
    )  # fmt: skip


def _method(
    model: Model,
    loss: Loss,
    head: Callable[[PyTree], Head] | None,
    partition: BlockPartition | None,
    shares: int,
    inner: optax.GradientTransformation | ConjugateGradients,
    inner_steps: int,
    line_search: LineSearch | None,
    warm_start: bool,
    prox_linear: bool,
    inner_schedule: optax.Schedule | None,
    clip_norm: float | None,
    microbatch_size: int | None,
    backend: Backend,
) -> InnerLoopMethod:
    if not callable(model.predict_fn):
        raise TypeError("predict_fn must be a function predict_fn(params, inputs) -> outputs.")
    if inner_steps < 1:
        raise ValueError(f"inner_steps must be at least 1, not {inner_steps}.")
    if shares < 1:
        raise ValueError(f"shares must be at least 1, not {shares}.")
    if line_search is not None and not isinstance(line_search, LineSearch):
        raise TypeError(f"line_search is a {type(line_search).__name__}: pass LineSearch(), or None to do without.")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1, not {microbatch_size}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, not {clip_norm}.")
    curvature = GaussNewton(model, loss)
    if shares > 1 and loss.couples_examples:
        raise ValueError(
            f"shares={shares} takes curvature on parts of the examples, and {loss} couples them: set shares=1, or use "
            "a loss without coupling."
        )
    if isinstance(inner, ConjugateGradients):
        _check_linear(inner_steps, prox_linear, inner_schedule, clip_norm)
        solver: InnerSolver = inner
    else:
        if not isinstance(inner, optax.GradientTransformation):
            raise TypeError(
                f"inner is a {type(inner).__name__}: pass an Optax optimizer such as optax.adamw(1e-3), or "
                "ConjugateGradients()."
            )
        schedule = optax.cosine_decay_schedule(1.0, inner_steps) if inner_schedule is None else inner_schedule
        solver = Optimizer(optax.with_extra_args_support(inner), schedule, clip_norm)
    problem = InnerProblem(curvature, partition, prox_linear, shares, microbatch_size, _softmax_head(head, loss))
    return InnerLoopMethod(problem, solver, inner_steps, line_search, warm_start, backend)


def _check_linear(
    inner_steps: int, prox_linear: bool, inner_schedule: optax.Schedule | None, clip_norm: float | None
) -> None:
    if inner_steps != 1:
        raise ValueError(
            f"conjugate gradients solve one quadratic, but inner_steps is {inner_steps}: set it to 1, and bound the "
            "memory of the whole batch with microbatch_size."
        )
    if prox_linear:
        raise ValueError("conjugate gradients solve a quadratic: set prox_linear=False, or give an Optax optimizer.")
    if inner_schedule is not None or clip_norm is not None:
        raise ValueError("inner_schedule and clip_norm belong to an inner optimizer: conjugate gradients have neither.")


def _softmax_head(head: Callable[[PyTree], Head] | None, loss: Loss) -> SoftmaxHead | None:
    if head is None:
        return None
    if not callable(head):
        raise TypeError('head must be a function of the parameters, such as lambda p: p["embed"].T.')
    if not isinstance(loss, SoftmaxCrossEntropy):
        raise TypeError(
            f"head= goes with SoftmaxCrossEntropy, and the loss is {type(loss).__name__}: return its outputs from "
            "predict_fn and leave head= out."
        )
    return SoftmaxHead(head, hvp=loss.implementation)
