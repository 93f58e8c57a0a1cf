"""curvax as Optax transformations.

`scale_by_*` turn the incoming updates g into s with (C + lam I) s = g (or the diagonal lane's s), without sign or
learning rate: chain them with `optax.scale_by_learning_rate`. `as_gradient_transformation(method)` is a whole method:
its update includes the method's own transform and rejection. Both take the incoming updates as the gradient, so
clipping before them, or accumulation by `optax.MultiSteps`, is respected, and both need what a gradient alone cannot
tell:

    updates, state = tx.update(grads, state, params, batch=batch, rng=rng)

Inner loops (`full_gn`, `layerwise_gn`) take their gradients themselves, one per minibatch, and read no more than the
structure of the incoming updates.

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
from curvax.kernels._dispatch import Backend
from curvax.keywords import spread
from curvax.losses import Loss, SoftmaxCrossEntropy
from curvax.method import AbstractMethod
from curvax.methods.assemble import assemble
from curvax.numbers import Number, whole
from curvax.preconditioners import EKFAC, KFAC, AdaHessianPower, EmaDiagonal, Preconditioner, SophiaFloor
from curvax.solvers import CG, Cholesky, Diagonal, RowSpace, Solver
from curvax.structure.batch_axes import AxesPrefix
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.telemetry import Telemetry
from curvax.tree import PyTree


def as_gradient_transformation(
    method: AbstractMethod[Any, Any],
    *,
    batch: Any | None = None,
    model_state: PyTree = None,
    full_params: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A method as an Optax transformation.

    `update(updates, state, params, *, batch, rng=None, curvature_batch=None, full_params=None)` returns what
    `optax.apply_updates` adds to the parameters: zero for a step that is not taken.

    Args:
      method: any method.
      batch: the shapes of a batch, for methods whose `init` needs them (`kfac`, `ekfac`).
      model_state: first model state, for models with `has_state`. The state's `model_state` carries it on.
      full_params: all parameters of the model, or their shapes, for such a method within `optax.masked`,
        `optax.partition` and the like: its `init` sees a part of them, and layers are those of the whole model.

    Raises:
      TypeError: that is no method.
      ValueError (in `init` and `update`): `params`, `batch` or `full_params` is missing where it is needed.
    """
    if not isinstance(method, AbstractMethod):
        raise TypeError(
            f"method is a {type(method).__name__}: pass what a preset such as curvax.sgn or curvax.assemble returned."
        )

    def init(params: PyTree) -> Any:
        if not jax.tree.leaves(params):
            return method.init_empty(params, model_state=model_state)
        trainable, frozen = method.partition.split(params)
        if _is_masked(params) and method.needs_batch:
            if full_params is None:
                raise ValueError(
                    "these parameters are masked (optax.masked or optax.partition), and layers are those of the whole "
                    "model: pass full_params=params, or their shapes, where the transformation is made."
                )
            frozen = _filled(params, frozen, full_params)
        return method.init_split(trainable, frozen, batch=batch, model_state=model_state)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        batch: Any = None,
        rng: jax.Array | None = None,
        curvature_batch: Any | None = None,
        full_params: PyTree | None = None,
        **unused: Any,
    ) -> tuple[PyTree, Any]:
        del unused  # Optax passes every extra argument to every transformation of a chain.
        if not jax.tree.leaves(updates):
            return updates, dataclasses.replace(state, step=state.step + 1)
        if params is None:
            raise ValueError("curvature is taken at the parameters: call update(grads, state, params, batch=batch).")
        if batch is None:
            raise ValueError("curvature is taken on a batch: call update(grads, state, params, batch=batch).")
        trainable, frozen = _split(method, params, full_params)
        gradient = None
        if method.takes_gradient:
            gradient = jax.tree.map(lambda t, u: None if t is None else u, trainable, updates, is_leaf=_is_none)
        proposal = method.propose(
            trainable, frozen, batch, state, rng, curvature_batch=curvature_batch, gradient=gradient
        )
        return _fill(proposal.update, trainable, updates, method.narrows_updates), proposal.state

    # Optax's types allow arrays and containers as states; a registered dataclass is a pytree all the same.
    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _is_none(x: Any) -> bool:
    return x is None


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _split(method: AbstractMethod[Any, Any], params: PyTree, full_params: PyTree | None) -> tuple[PyTree, PyTree]:
    """Trainable parameters (holes stay holes) and the rest, from the full parameters where there are holes."""
    trainable, frozen = method.partition.split(params)
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


def _fill(update: PyTree, trainable: PyTree, updates: PyTree, narrow: bool) -> PyTree:
    """Updates, in the dtypes of the parameters if `narrow`; zero for frozen parameters."""

    def one(t: Any, s: Any, g: Any) -> Any:
        if t is None:
            return jnp.zeros_like(g)
        return s.astype(t.dtype) if narrow else s

    return jax.tree.map(one, trainable, update, updates, is_leaf=_is_none)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceOptions:
    """Keywords of every `scale_by_*`.

    Attributes:
      extras: model state, aux, random key, frozen parameters.
      microbatch_size: examples per accumulated piece.
      batch_axes: which axis of each leaf of the batch holds the examples (`curvature.Model`).
      backend: preferred implementation of kernels.
    """

    extras: Extras = Extras()
    microbatch_size: int | None = None
    batch_axes: AxesPrefix | None = None
    backend: Backend = "auto"

    def face(
        self,
        curvature: Curvature,
        solver: Solver,
        *,
        lam: ScalarLike = 0.0,
        preconditioner: Preconditioner | None = None,
        tx: optax.GradientTransformation | None = None,
        shapes: Mapping[str, Any] = MappingProxyType({}),
    ) -> optax.GradientTransformationExtraArgs:
        """The direction alone, without sign, rate or telemetry; `shapes` go to `as_gradient_transformation`."""
        method = assemble(
            curvature=curvature,
            solver=solver,
            damping=Constant(lam),
            preconditioner=preconditioner,
            telemetry=Telemetry(()),
            tx=optax.identity() if tx is None else tx,
            microbatch_size=self.microbatch_size,
            backend=self.backend,
        )
        return as_gradient_transformation(method, **shapes)


@dataclasses.dataclass(frozen=True)
class ModelFaceOptions(FaceOptions):
    """Keywords of transformations on a model with outputs.

    Attributes:
      predict_fn: `predict_fn(params, inputs) -> outputs`.
      loss: loss in output space.
      x_key, y_key, weight_key: keys of the batch.
    """

    predict_fn: Callable[..., Any]
    loss: Loss
    _: dataclasses.KW_ONLY
    x_key: str = "x"
    y_key: str = "y"
    weight_key: str | None = None

    def gauss_newton(self, fisher: FisherType = GeneralizedGaussNewton()) -> GaussNewton:
        """The curvature."""
        model = Model(self.predict_fn, self.x_key, self.y_key, self.weight_key, self.extras, self.batch_axes)
        return GaussNewton(model, self.loss, fisher)


@dataclasses.dataclass(frozen=True)
class HessianFaceOptions(FaceOptions):
    """Keywords of transformations on a loss function.

    Attributes:
      loss_fn: `loss_fn(params, batch) -> scalar`, or a model with a loss: `curvature.ModelLoss(Model(predict), loss)`.
      reduction: how `loss_fn` combines examples, for microbatches.
    """

    loss_fn: Callable[..., Any] | Objective
    _: dataclasses.KW_ONLY
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def hessian(self) -> Hessian:
        """The curvature."""
        if not isinstance(self.loss_fn, Objective):
            return Hessian(LossFunction(self.loss_fn, self.extras, self.reduction, batch_axes=self.batch_axes))
        if self.extras != Extras() or self.reduction != "mean" or self.batch_axes is not None:
            raise ValueError("extras, reduction and batch_axes go into the objective that loss_fn is: drop them here.")
        return Hessian(self.loss_fn)


@dataclasses.dataclass(frozen=True)
class GGNFaceOptions(ModelFaceOptions):
    """Keywords of `scale_by_ggn`.

    Attributes:
      lam: damping; `optax.inject_hyperparams(scale_by_ggn, static_args=("predict_fn",))` can schedule it.
      solver: `CG()`, `RowSpace(Cholesky())`, ...
      preconditioner: of CG; none by default.
      fisher: GGN, Monte Carlo Fisher or empirical Fisher.
    """

    lam: ScalarLike = 1.0
    _: dataclasses.KW_ONLY
    solver: Solver = CG()
    preconditioner: Preconditioner | None = None
    fisher: FisherType = GeneralizedGaussNewton()


@dataclasses.dataclass(frozen=True)
class EGNFaceOptions(ModelFaceOptions):
    """Keywords of `scale_by_egn`.

    Attributes:
      lam: damping, as in `scale_by_ggn`.
      fisher: GGN, Monte Carlo Fisher or empirical Fisher.
      max_bytes: bound on the memory of explicit rows; `None` for 2 GiB.
    """

    lam: ScalarLike = 1.0
    _: dataclasses.KW_ONLY
    fisher: FisherType = GeneralizedGaussNewton()
    max_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class NewtonCGFaceOptions(HessianFaceOptions):
    """Keywords of `scale_by_newton_cg`.

    Attributes:
      lam: damping, as in `scale_by_ggn`.
      solver: `CG()`, `Cholesky()`, ...
      preconditioner: of CG; none by default.
    """

    lam: ScalarLike = 1.0
    _: dataclasses.KW_ONLY
    solver: Solver = CG()
    preconditioner: Preconditioner | None = None


@dataclasses.dataclass(frozen=True)
class KFACFaceOptions(ModelFaceOptions):
    """Keywords of `scale_by_kfac`.

    Attributes:
      batch: a batch, or its shapes: `init` learns the layers from them.
      lam: damping, 1e-3 by default.
      preconditioner: `KFAC(...)` (the default, `KFAC()`) or `EKFAC(...)`, cadences included.
      full_params: all parameters of the model, or their shapes, within `optax.masked` and the like.
    """

    batch: Any
    lam: ScalarLike = 1e-3
    _: dataclasses.KW_ONLY
    preconditioner: KFAC | EKFAC | None = None
    full_params: PyTree | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalFaceOptions(FaceOptions):
    """Keywords of `scale_by_sophia_*` and `scale_by_adahessian`.

    Attributes:
      b1: decay of the gradient mean; it and other numbers can be scheduled by `optax.inject_hyperparams` with
        `predict_fn` or `loss_fn` among its `static_args`.
      b2: decay of the curvature mean.
      eps: floor of the denominator, relative to the mean magnitude of the diagonal.
      every: steps between refreshes of the diagonal; `None` for 10 (Sophia) and 1 (AdaHessian). It shapes what is
        computed, as do counts of samples and probes, so a number in its place goes into `static_args`.
    """

    b1: Number
    b2: Number
    eps: Number
    every: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaFaceOptions(DiagonalFaceOptions):
    """Keywords of both `scale_by_sophia_*`.

    Attributes:
      gamma: scale of the curvature in the denominator; 0.05 for Sophia-G, 0.01 for Sophia-H.
      clip_value: bound on each entry of the direction; 1.
    """

    b1: Number = 0.965
    b2: Number = 0.99
    gamma: Number
    eps: Number = 1e-8
    clip_value: Number = 1.0

    def sophia(
        self, curvature: Curvature, estimator: GaussNewtonBartlett | Hutchinson
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation with that estimator of the diagonal."""
        diagonal = EmaDiagonal(
            estimator,
            beta2=self.b2,
            every=_count("every", self.every, 10),
            denominator=SophiaFloor(self.gamma, self.eps),
        )
        return self.face(curvature, Diagonal(self.b1), preconditioner=diagonal, tx=optax.clip(self.clip_value))


@dataclasses.dataclass(frozen=True)
class SophiaGFaceOptions(SophiaFaceOptions, ModelFaceOptions):
    """Keywords of `scale_by_sophia_g`.

    Attributes:
      n_samples: label samples of each refresh; `None` for 1.
    """

    loss: Loss = SoftmaxCrossEntropy()
    _: dataclasses.KW_ONLY
    gamma: Number = 0.05
    n_samples: int | None = None


@dataclasses.dataclass(frozen=True)
class SophiaHFaceOptions(SophiaFaceOptions, HessianFaceOptions):
    """Keywords of `scale_by_sophia_h`.

    Attributes:
      n_probes: probes of each refresh; `None` for 1.
      use_abs: take the magnitude of each estimate.
    """

    _: dataclasses.KW_ONLY
    gamma: Number = 0.01
    n_probes: int | None = None
    use_abs: bool = False


@dataclasses.dataclass(frozen=True)
class AdaHessianFaceOptions(DiagonalFaceOptions, HessianFaceOptions):
    """Keywords of `scale_by_adahessian`.

    Attributes:
      power: of the root mean square diagonal in the denominator; 1.
      n_probes: probes of each refresh; `None` for 1.
      use_abs: take the magnitude of each estimate before averaging.
      block_average: which entries are averaged; `True`, the default, for `BlockAverage()`, `None` or `False` for none.
    """

    _: dataclasses.KW_ONLY
    b1: Number = 0.9
    b2: Number = 0.999
    power: Number = 1.0
    eps: Number = 1e-4
    n_probes: int | None = None
    use_abs: bool = False
    block_average: BlockAverage | bool | None = True


@spread(GGNFaceOptions)
def scale_by_ggn(options: GGNFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> (C + lam I)^-1 g with C from the Gauss-Newton family."""
    curvature = options.gauss_newton(options.fisher)
    return options.face(curvature, options.solver, lam=options.lam, preconditioner=options.preconditioner)


@spread(EGNFaceOptions)
def scale_by_egn(options: EGNFaceOptions) -> optax.GradientTransformationExtraArgs:
    """`scale_by_ggn` solved exactly in row space."""
    solver = RowSpace(Cholesky(), max_bytes=_count("max_bytes", options.max_bytes, DEFAULT_MAX_BYTES))
    return options.face(options.gauss_newton(options.fisher), solver, lam=options.lam)


@spread(NewtonCGFaceOptions)
def scale_by_newton_cg(options: NewtonCGFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> (H + lam I)^-1 g with H the Hessian of `loss_fn(params, batch)`."""
    return options.face(options.hessian, options.solver, lam=options.lam, preconditioner=options.preconditioner)


@spread(KFACFaceOptions)
def scale_by_kfac(options: KFACFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> (A kron B + lam I)^-1 g, layer by layer; see `curvax.kfac`."""
    return options.face(
        options.gauss_newton(),
        Diagonal(),
        lam=options.lam,
        preconditioner=options.preconditioner or KFAC(),
        shapes={"batch": _shapes(options.batch), "full_params": _shapes(options.full_params)},
    )


@spread(SophiaGFaceOptions)
def scale_by_sophia_g(options: SophiaGFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> clip(mean of g / max(gamma h, floor)) with h from resampled labels."""
    estimator = GaussNewtonBartlett(_count("n_samples", options.n_samples, 1))
    return options.sophia(options.gauss_newton(), estimator)


@spread(SophiaHFaceOptions)
def scale_by_sophia_h(options: SophiaHFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> clip(mean of g / max(gamma h, floor)) with h from Hutchinson probes."""
    return options.sophia(options.hessian, Hutchinson(_count("n_probes", options.n_probes, 1), options.use_abs))


@spread(AdaHessianFaceOptions)
def scale_by_adahessian(options: AdaHessianFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> mean of g / (root mean square diagonal + floor)."""
    average = BlockAverage() if options.block_average is True else options.block_average
    estimator = Hutchinson(_count("n_probes", options.n_probes, 1), options.use_abs, average or None)
    diagonal = EmaDiagonal(
        estimator,
        beta2=options.b2,
        every=_count("every", options.every, 1),
        denominator=AdaHessianPower(options.power, options.eps),
    )
    return options.face(options.hessian, Diagonal(options.b1), preconditioner=diagonal)


def _count(name: str, value: int | None, default: int) -> int:
    """A count; `None`, which unlike a number `optax.inject_hyperparams` does not trace, for the default."""
    return default if value is None else whole(name, value)


def _shapes(arrays: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
