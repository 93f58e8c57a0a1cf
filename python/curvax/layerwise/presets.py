"""The presets `full_gn` and `layerwise_gn`: keywords, their checks, and the method that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import optax

from curvax.curvature import Terms
from curvax.layerwise.blocks import BlockPartition, ByGroup
from curvax.layerwise.head import SoftmaxHead
from curvax.layerwise.inner import ConjugateGradients, InnerSolver, Optimizer
from curvax.layerwise.method import InnerLoopMethod
from curvax.layerwise.quadratic import InnerProblem
from curvax.layerwise.search import LineSearch
from curvax.losses import Loss, SoftmaxCrossEntropy
from curvax.methods.options import LossRecordOptions, ModelOptions
from curvax.methods.registry import preset
from curvax.tree import PyTree

Head: TypeAlias = jax.Array | tuple[jax.Array, jax.Array]
"""A matrix (features, classes), or the tuple (matrix, bias)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullGNOptions(LossRecordOptions, ModelOptions):
    """Keywords of `full_gn`. Every minibatch is a mean of its own; what `has_aux` returns is dropped.

    Attributes:
      loss: loss in output space, or the `Terms` of one, each with minibatches of its own set.
      inner: an Optax optimizer (`curvax.optimizers.muon_adamw`, the paper's; `optax.adamw`; ...), whose state is kept
        from step to step; or `ConjugateGradients`, which solves one minibatch's quadratic (`inner_steps=1`).
      inner_steps: minibatches in a step, N.
      head: `head(params)` is the matrix (D, classes), or (matrix, bias), that makes logits of hidden states (..., D),
        which `predict_fn` then returns in the logits' place: with a large vocabulary the logits are most of a step's
        memory, and with `head` they are made and used up in blocks of rows (256 MiB at a time), with the same numbers.
        Tied embeddings are `lambda p: p["embed"].T`. The loss must be `SoftmaxCrossEntropy`, with integer labels.
      line_search: `None` takes the full step whenever it is finite. The paper calls the search indispensable, save for
        `prox_linear`.
      warm_start: the next inner loop starts where this one ended, before the line search shortened the step.
      prox_linear: minimize the loss itself of the linearized outputs, not its quadratic model.
      inner_schedule: index of the minibatch within the step, 0 to N - 1, -> factor on the inner update. `None`, the
        paper's choice for large batches, is a cosine from 1 to 0 in every step; `optax.constant_schedule(1.0)` leaves
        the rate to the inner optimizer's own schedule, whose count runs on from step to step.
      clip_norm: bound on the norm of the inner gradient, of each block by itself where there are blocks; 1 in the
        paper.
      microbatch_size: examples per accumulated piece of a minibatch; `None` takes each minibatch at once.
    """

    loss: Loss | Terms
    inner: optax.GradientTransformation | ConjugateGradients
    inner_steps: int
    head: Callable[[PyTree], Head] | None = None
    line_search: LineSearch | None = LineSearch()
    warm_start: bool = True
    prox_linear: bool = False
    inner_schedule: optax.Schedule | None = None
    clip_norm: float | None = None

    def build(self, partition: BlockPartition | None = None, shares: int = 1) -> InnerLoopMethod:
        """The method with curvature within those blocks, or within all parameters."""
        self._check()
        if shares < 1:
            raise ValueError(f"shares must be at least 1, not {shares}.")
        curvature = self.gauss_newton(self.loss)
        if shares > 1 and not isinstance(self.loss, Terms) and self.loss.couples_examples:
            raise ValueError(
                f"shares={shares} takes curvature on parts of the examples, and {self.loss} couples them: set "
                "shares=1, or use a loss without coupling."
            )
        return InnerLoopMethod(
            problem=InnerProblem(
                curvature, partition, self.prox_linear, shares, self.microbatch_size, self.softmax_head
            ),
            inner=self.inner_solver,
            inner_steps=self.inner_steps,
            search=self.line_search,
            warm_start=self.warm_start,
            backend=self.backend,
            telemetry=self.telemetry,
        )

    def _check(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, not {self.inner_steps}.")
        if self.line_search is not None and not isinstance(self.line_search, LineSearch):
            kind = type(self.line_search).__name__
            raise TypeError(f"line_search is a {kind}: pass LineSearch(), or None to do without.")
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise ValueError(f"microbatch_size must be at least 1, not {self.microbatch_size}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, not {self.clip_norm}.")

    @property
    def inner_solver(self) -> InnerSolver:
        """What minimizes inside."""
        if isinstance(self.inner, ConjugateGradients):
            self._check_linear()
            return self.inner
        if not isinstance(self.inner, optax.GradientTransformation):
            raise TypeError(
                f"inner is a {type(self.inner).__name__}: pass an Optax optimizer such as optax.adamw(1e-3), or "
                "ConjugateGradients()."
            )
        schedule = self.inner_schedule
        if schedule is None:
            schedule = optax.cosine_decay_schedule(1.0, self.inner_steps)
        return Optimizer(optax.with_extra_args_support(self.inner), schedule, self.clip_norm)

    def _check_linear(self) -> None:
        if self.inner_steps != 1:
            raise ValueError(
                f"conjugate gradients solve one quadratic, but inner_steps is {self.inner_steps}: set it to 1, and "
                "bound the memory of the whole batch with microbatch_size."
            )
        if self.prox_linear:
            raise ValueError(
                "conjugate gradients solve a quadratic: set prox_linear=False, or give an Optax optimizer."
            )
        if self.inner_schedule is not None or self.clip_norm is not None:
            raise ValueError(
                "inner_schedule and clip_norm belong to an inner optimizer: conjugate gradients have neither."
            )

    @property
    def softmax_head(self) -> SoftmaxHead | None:
        """What makes logits of hidden states, or `None`."""
        if self.head is None:
            return None
        if not callable(self.head):
            raise TypeError('head must be a function of the parameters, such as lambda p: p["embed"].T.')
        if not isinstance(self.loss, SoftmaxCrossEntropy):
            raise TypeError(
                f"head= goes with SoftmaxCrossEntropy, and the loss is {type(self.loss).__name__}: return its outputs "
                "from predict_fn and leave head= out."
            )
        return SoftmaxHead(self.head, hvp=self.loss.implementation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseGNOptions(FullGNOptions):
    """Keywords of `layerwise_gn`.

    Attributes:
      partition: `ByGroup()`, the top-level entries of the parameter tree (`split=("layers",)` for each layer of a list
        or stack of them); `ByLeaf()`; `ByPath(function)`; `ByPrefix({name: paths})`.
      shares: into how many shares each minibatch (or microbatch) is cut, in the order of its examples, so have them
        shuffled. The blocks are dealt out to the shares in turn, and a block takes its curvature on its own share
        alone, the gradient on all examples. 1 takes all curvature on all examples; more than there are blocks are as
        many as there are blocks. A share whose examples all have weight zero has no curvature.
    """

    partition: BlockPartition = ByGroup()
    shares: int = 1


_INSTEAD = {
    "learning_rate": "the rate is the inner optimizer's: write inner=optax.adamw(1e-3), say.",
    "tx": "write inner= for the optimizer inside; the line search is what comes behind it.",
    "lam0": "damping is that of inner=ConjugateGradients(lam=...); an inner optimizer has none.",
}


@preset(
    "Full Gauss-Newton by an inner optimizer and a line search, for large batches.", FullGNOptions, instead=_INSTEAD
)
def full_gn(options: FullGNOptions) -> InnerLoopMethod:
    """Full Gauss-Newton by an inner optimizer (Abreu et al. 2025, arXiv 2510.09378).

    A step linearizes the model at theta0 on each of `inner_steps` fresh minibatches, takes one update of the inner
    optimizer per minibatch at the gradient J^T (g0 + H J (theta - theta0)) of its quadratic, and goes from theta0
    towards the result by the step size that is best on further data.
    """
    return options.build()


@preset("Layerwise Gauss-Newton: `full_gn` without curvature between blocks.", LayerwiseGNOptions, instead=_INSTEAD)
def layerwise_gn(options: LayerwiseGNOptions) -> InnerLoopMethod:
    """Layerwise Gauss-Newton by an inner optimizer (Abreu et al. 2025): `full_gn` without curvature between blocks.

    Every block minimizes its own quadratic while the others stay at theta0, with gradient J_b^T (g0 + H J_b (theta_b -
    theta0_b)). All blocks share one linearization per minibatch, one run of the inner optimizer and one line search.

    What the blocks cost beyond `full_gn` is in `plan_for(params, batch)`: tangents of the blocks below a layer pass
    through it side by side, so the work grows with the number of blocks on one path (1.7 times full for six equal dense
    layers), most where layers are stacked for `lax.scan`, which runs all blocks through all layers.
    """
    partition = options.partition
    if not isinstance(partition, BlockPartition):
        raise TypeError(f"partition is a {type(partition).__name__}: pass ByGroup(), ByLeaf() or ByPath(function).")
    return options.build(partition, options.shares)
