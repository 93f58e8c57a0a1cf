"""curvax as Optax transformations.

`scale_by_*` turn the incoming updates g into s with (C + lam I) s = g (or the diagonal lane's s), without sign or
learning rate: chain them with `optax.scale_by_learning_rate`. `as_gradient_transformation(method)` is a whole method:
its update includes the method's own transform and rejection. Both take the incoming updates as the gradient, so
clipping before them, or accumulation by `optax.MultiSteps`, is respected, and both need what a gradient alone cannot
tell:

    updates, state = tx.update(grads, state, params, batch=batch, rng=rng)

Inside `optax.masked`, `optax.partition` and the like, parameters arrive with holes (`optax.MaskedNode`); the model
still needs all of them: pass `full_params=params` to `update`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from curvax.curvature import (
    Curvature,
    Extras,
    FisherType,
    GaussNewton,
    GeneralizedGaussNewton,
    Hessian,
    LossFunction,
    Model,
    Objective,
)
from curvax.damping import Constant
from curvax.damping.base import ScalarLike
from curvax.estimators import BlockAverage, GaussNewtonBartlett, Hutchinson
from curvax.execute import MethodState
from curvax.kernels._dispatch import Backend
from curvax.losses import Loss, SoftmaxCrossEntropy
from curvax.method import Method
from curvax.methods.assemble import assemble
from curvax.numbers import Number, whole
from curvax.preconditioners import EKFAC, KFAC, AdaHessianPower, EmaDiagonal, Preconditioner, SophiaFloor
from curvax.solvers import CG, Cholesky, Diagonal, RowSpace, Solver
from curvax.structure.batch_axes import AxesPrefix
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.telemetry import Telemetry
from curvax.tree import PyTree


def as_gradient_transformation(
    method: Method, *, batch: Any | None = None, model_state: PyTree = None, full_params: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """A method as an Optax transformation.

    `update(updates, state, params, *, batch, rng=None, curvature_batch=None, full_params=None)` returns what
    `optax.apply_updates` adds to the parameters: zero for a step that is not taken.

    Args:
      method: any method.
      batch: the shapes of a batch, for methods whose `init` needs them (`kfac`, `ekfac`).
      model_state: first model state, for models with `has_state`. The state's `model_state` carries it on.
      full_params: all parameters of the model, or their shapes, for such a method within `optax.masked`,
        `optax.partition` and the like: its `init` sees a part of them, and layers are found in the whole model.

    Raises:
      TypeError: the method is none of these; those of `curvax.layerwise` have a function of their own.
      ValueError (in `init` and `update`): `params`, `batch` or `full_params` is missing where it is needed.
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"method is a {type(method).__name__}: pass what a preset or curvax.assemble returned; full_gn and "
            "layerwise_gn go through curvax.layerwise.as_gradient_transformation."
        )

    def init(params: PyTree) -> MethodState:
        if not jax.tree.leaves(params):
            return method.init_empty(params, model_state=model_state)
        trainable, frozen = method.assembly.partition.split(params)
        if _is_masked(params) and method.needs_batch:
            if full_params is None:
                raise ValueError(
                    "these parameters are masked (optax.masked or optax.partition), and layers are found in the whole "
                    "model: pass full_params=params, or their shapes, where the transformation is made."
                )
            frozen = _filled(params, frozen, full_params)
        return method.init_split(trainable, frozen, batch=batch, model_state=model_state)

    def update(
        updates: PyTree,
        state: MethodState,
        params: PyTree | None = None,
        *,
        batch: Any = None,
        rng: jax.Array | None = None,
        curvature_batch: Any | None = None,
        full_params: PyTree | None = None,
        **unused: Any,
    ) -> tuple[PyTree, MethodState]:
        del unused  # Optax passes every extra argument to every transformation of a chain.
        if not jax.tree.leaves(updates):
            return updates, dataclasses.replace(state, step=state.step + 1)
        if params is None:
            raise ValueError("curvature is taken at the parameters: call update(grads, state, params, batch=batch).")
        if batch is None:
            raise ValueError("curvature is taken on a batch: call update(grads, state, params, batch=batch).")
        trainable, frozen = _split(method, params, full_params)
        gradient = jax.tree.map(lambda t, u: None if t is None else u, trainable, updates, is_leaf=_is_none)
        proposal = method.propose(
            trainable, frozen, batch, state, rng, curvature_batch=curvature_batch, gradient=gradient
        )
        return _fill(proposal.update, trainable, updates), proposal.state

    # Optax's types allow arrays and containers as states; a registered dataclass is a pytree all the same.
    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _is_none(x: Any) -> bool:
    return x is None


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _split(method: Method, params: PyTree, full_params: PyTree | None) -> tuple[PyTree, PyTree]:
    """Trainable parameters (holes stay holes) and the rest, from the full parameters where there are holes."""
    trainable, frozen = method.assembly.partition.split(params)
    if not _is_masked(params):
        return trainable, frozen
    if full_params is None:
        raise ValueError(
            "these parameters are masked (optax.masked or optax.partition), and the model needs all of them: "
            "pass full_params=params to update."
        )
    return trainable, _filled(params, frozen, full_params)


def _is_masked(params: PyTree) -> bool:
    return any(_is_hole(x) for x in jax.tree.leaves(params, is_leaf=_is_hole))


def _filled(params: PyTree, frozen: PyTree, full_params: PyTree) -> PyTree:
    """The frozen parameters with those that `params` has holes for."""

    def choose(p: Any, own: Any, full: Any) -> Any:
        return full if _is_hole(p) else own

    return jax.tree.map(choose, params, frozen, full_params, is_leaf=_is_hole)


def _fill(update: PyTree, trainable: PyTree, updates: PyTree) -> PyTree:
    """Updates in the dtypes of the parameters, zero for frozen ones."""
    return jax.tree.map(
        lambda t, s, g: jnp.zeros_like(g) if t is None else s.astype(t.dtype),
        trainable, update, updates, is_leaf=_is_none,
    )  # fmt: skip


def scale_by_ggn(
    predict_fn: Callable[..., Any],
    loss: Loss,
    lam: ScalarLike = 1.0,
    *,
    solver: Solver = CG(),
    preconditioner: Preconditioner | None = None,
    fisher: FisherType = GeneralizedGaussNewton(),
    x_key: str = "x",
    y_key: str = "y",
    weight_key: str | None = None,
    extras: Extras = Extras(),
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """g -> (C + lam I)^-1 g with C from the Gauss-Newton family.

    Args:
      predict_fn: `predict_fn(params, inputs) -> outputs`.
      loss: loss in output space.
      lam: damping; `optax.inject_hyperparams(scale_by_ggn, static_args=("predict_fn",))` can schedule it.
      solver: `CG()`, `RowSpace(Cholesky())`, ...
      preconditioner: of CG; none by default.
      fisher: GGN, Monte Carlo Fisher or empirical Fisher.
      x_key, y_key, weight_key: keys of the batch.
      extras: model state, aux, random key, frozen parameters.
      microbatch_size: examples per accumulated piece.
      batch_axes: which axis of each leaf of the batch holds the examples (`curvature.Model`).
      backend: preferred implementation of kernels.
    """
    model = Model(predict_fn, x_key, y_key, weight_key, extras, batch_axes)
    return _face(
        GaussNewton(model, loss, fisher), solver, lam, preconditioner, microbatch_size=microbatch_size, backend=backend
    )


def scale_by_egn(
    predict_fn: Callable[..., Any],
    loss: Loss,
    lam: ScalarLike = 1.0,
    *,
    fisher: FisherType = GeneralizedGaussNewton(),
    max_bytes: int | None = None,
    x_key: str = "x",
    y_key: str = "y",
    weight_key: str | None = None,
    extras: Extras = Extras(),
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_ggn` solved exactly in row space.

    Args:
      predict_fn, loss, lam, metric: as in `scale_by_ggn`.
      max_bytes: bound on the memory of explicit rows; `None` for 2 GiB.
      x_key, y_key, weight_key, extras, microbatch_size, batch_axes, backend: as in `scale_by_ggn`.
    """
    return scale_by_ggn(
        predict_fn,
        loss,
        lam,
        solver=RowSpace(Cholesky(), max_bytes=_count("max_bytes", max_bytes, DEFAULT_MAX_BYTES)),
        fisher=fisher,
        x_key=x_key,
        y_key=y_key,
        weight_key=weight_key,
        extras=extras,
        microbatch_size=microbatch_size,
        batch_axes=batch_axes,
        backend=backend,
    )


def scale_by_newton_cg(
    loss_fn: Callable[..., Any] | Objective,
    lam: ScalarLike = 1.0,
    *,
    solver: Solver = CG(),
    preconditioner: Preconditioner | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    extras: Extras = Extras(),
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """g -> (H + lam I)^-1 g with H the Hessian of `loss_fn(params, batch)`.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, or a model with a loss: `curvature.ModelLoss(Model(predict), loss)`.
      reduction: how `loss_fn` combines examples, for microbatches.
      lam, solver, preconditioner, extras, microbatch_size, batch_axes, backend: as in `scale_by_ggn`.
    """
    curvature = _hessian(loss_fn, extras, reduction, batch_axes)
    return _face(curvature, solver, lam, preconditioner, microbatch_size=microbatch_size, backend=backend)


def scale_by_kfac(
    predict_fn: Callable[..., Any],
    loss: Loss,
    batch: Any,
    lam: ScalarLike = 1e-3,
    *,
    preconditioner: KFAC | EKFAC | None = None,
    x_key: str = "x",
    y_key: str = "y",
    weight_key: str | None = None,
    extras: Extras = Extras(),
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
    full_params: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """g -> (A kron B + lam I)^-1 g, layer by layer; see `curvax.kfac`.

    Args:
      predict_fn: `predict_fn(params, inputs) -> outputs`.
      loss: loss in output space.
      batch: a batch, or its shapes: `init` finds the layers with them.
      lam: damping, 1e-3 by default.
      preconditioner: `KFAC(...)` (the default, `KFAC()`) or `EKFAC(...)`, cadences included.
      x_key, y_key, weight_key: keys of the batch.
      extras: model state, aux, random key, frozen parameters.
      microbatch_size: examples per accumulated piece.
      batch_axes: which axis of each leaf of the batch holds the examples (`curvature.Model`).
      backend: preferred implementation of kernels.
      full_params: all parameters of the model, or their shapes, within `optax.masked` and the like.
    """
    return _face(
        GaussNewton(Model(predict_fn, x_key, y_key, weight_key, extras, batch_axes), loss),
        Diagonal(),
        lam,
        preconditioner or KFAC(),
        microbatch_size=microbatch_size,
        backend=backend,
        shapes={"batch": _shapes(batch), "full_params": _shapes(full_params)},
    )


def scale_by_sophia_g(
    predict_fn: Callable[..., Any],
    loss: Loss = SoftmaxCrossEntropy(),
    *,
    b1: Number = 0.965,
    b2: Number = 0.99,
    gamma: Number = 0.05,
    eps: Number = 1e-8,
    every: int | None = None,
    clip_value: Number = 1.0,
    n_samples: int | None = None,
    x_key: str = "x",
    y_key: str = "y",
    weight_key: str | None = None,
    extras: Extras = Extras(),
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """g -> clip(mean of g / max(gamma h, floor)) with h from resampled labels.

    Args:
      predict_fn, loss: the model.
      b1, b2, gamma, eps, clip_value: as in `curvax.sophia_g`; `optax.inject_hyperparams(scale_by_sophia_g,
        static_args=("predict_fn",))` can schedule them.
      every, n_samples: steps between refreshes of h, and label samples of each; `None` for 10 and 1. They shape what is
        computed, so numbers in their place go into `static_args`.
      x_key, y_key, weight_key, extras, microbatch_size, batch_axes, backend: as in `scale_by_ggn`.
    """
    return _face(
        GaussNewton(Model(predict_fn, x_key, y_key, weight_key, extras, batch_axes), loss),
        Diagonal(b1),
        preconditioner=EmaDiagonal(
            GaussNewtonBartlett(_count("n_samples", n_samples, 1)),
            beta2=b2,
            every=_count("every", every, 10),
            denominator=SophiaFloor(gamma, eps),
        ),
        tx=optax.clip(clip_value),
        microbatch_size=microbatch_size,
        backend=backend,
    )


def scale_by_sophia_h(
    loss_fn: Callable[..., Any] | Objective,
    *,
    b1: Number = 0.965,
    b2: Number = 0.99,
    gamma: Number = 0.01,
    eps: Number = 1e-8,
    every: int | None = None,
    clip_value: Number = 1.0,
    n_probes: int | None = None,
    use_abs: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    extras: Extras = Extras(),
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """g -> clip(mean of g / max(gamma h, floor)) with h from Hutchinson probes.

    Args:
      loss_fn: as in `scale_by_newton_cg`.
      b1, b2, gamma, eps, clip_value: as in `curvax.sophia_h`; they can be scheduled as in `scale_by_sophia_g`.
      every, n_probes: steps between refreshes of h, and probes of each; `None` for 10 and 1.
      use_abs: take the magnitude of each estimate.
      reduction: how `loss_fn` combines examples, for microbatches.
      extras, microbatch_size, batch_axes, backend: as in `scale_by_ggn`.
    """
    return _face(
        _hessian(loss_fn, extras, reduction, batch_axes),
        Diagonal(b1),
        preconditioner=EmaDiagonal(
            Hutchinson(_count("n_probes", n_probes, 1), use_abs),
            beta2=b2,
            every=_count("every", every, 10),
            denominator=SophiaFloor(gamma, eps),
        ),
        tx=optax.clip(clip_value),
        microbatch_size=microbatch_size,
        backend=backend,
    )


def scale_by_adahessian(
    loss_fn: Callable[..., Any] | Objective,
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    power: Number = 1.0,
    eps: Number = 1e-4,
    every: int | None = None,
    n_probes: int | None = None,
    use_abs: bool = False,
    block_average: BlockAverage | bool | None = True,
    reduction: Literal["mean", "sum"] = "mean",
    extras: Extras = Extras(),
    microbatch_size: int | None = None,
    batch_axes: AxesPrefix | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """g -> mean of g / (root mean square diagonal + floor).

    Args:
      loss_fn: as in `scale_by_newton_cg`.
      b1, b2, power, eps: as in `curvax.adahessian`; they can be scheduled as in `scale_by_sophia_g`.
      every, n_probes: steps between refreshes of the diagonal, and probes of each; `None` for 1 both.
      use_abs: take the magnitude of each estimate before averaging.
      block_average: which entries are averaged; `True`, the default, for `BlockAverage()`, `None` or `False` for none.
      reduction: how `loss_fn` combines examples, for microbatches.
      extras, microbatch_size, batch_axes, backend: as in `scale_by_ggn`.
    """
    average = BlockAverage() if block_average is True else block_average
    return _face(
        _hessian(loss_fn, extras, reduction, batch_axes),
        Diagonal(b1),
        preconditioner=EmaDiagonal(
            Hutchinson(_count("n_probes", n_probes, 1), use_abs, average or None),
            beta2=b2,
            every=_count("every", every, 1),
            denominator=AdaHessianPower(power, eps),
        ),
        microbatch_size=microbatch_size,
        backend=backend,
    )


def _face(
    curvature: Curvature,
    solver: Solver,
    lam: ScalarLike = 0.0,
    preconditioner: Preconditioner | None = None,
    *,
    tx: optax.GradientTransformation | None = None,
    microbatch_size: int | None,
    backend: Backend,
    shapes: Mapping[str, Any] = MappingProxyType({}),
) -> optax.GradientTransformationExtraArgs:
    """The direction alone, without sign, learning rate or telemetry; `shapes` go to `as_gradient_transformation`."""
    method = assemble(
        curvature=curvature,
        solver=solver,
        damping=Constant(lam),
        preconditioner=preconditioner,
        telemetry=Telemetry(()),
        tx=optax.identity() if tx is None else tx,
        microbatch_size=microbatch_size,
        backend=backend,
    )
    return as_gradient_transformation(method, **shapes)


def _hessian(
    loss_fn: Callable[..., Any] | Objective,
    extras: Extras,
    reduction: Literal["mean", "sum"],
    batch_axes: AxesPrefix | None,
) -> Hessian:
    if not isinstance(loss_fn, Objective):
        return Hessian(LossFunction(loss_fn, extras, reduction, batch_axes=batch_axes))
    if extras != Extras() or reduction != "mean" or batch_axes is not None:
        raise ValueError("extras, reduction and batch_axes go into the objective that loss_fn is: drop them here.")
    return Hessian(loss_fn)


def _count(name: str, value: int | None, default: int) -> int:
    """A count; `None`, which unlike a number `optax.inject_hyperparams` does not trace, for the default."""
    return default if value is None else whole(name, value)


def _shapes(arrays: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
