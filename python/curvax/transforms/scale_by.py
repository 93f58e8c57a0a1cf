"""Directions as Optax transformations, without sign or learning rate."""

from __future__ import annotations

import jax
import optax

from curvax.estimators import BlockAverage, GaussNewtonBartlett, Hutchinson
from curvax.keywords import spread
from curvax.preconditioners import KFAC, AdaHessianPower, EmaDiagonal
from curvax.solvers import Cholesky, Diagonal, RowSpace
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.transforms.options import (
    AdaHessianFaceOptions,
    EGNFaceOptions,
    GGNFaceOptions,
    KFACFaceOptions,
    NewtonCGFaceOptions,
    SophiaGFaceOptions,
    SophiaHFaceOptions,
    count,
)
from curvax.tree import PyTree


@spread(GGNFaceOptions)
def scale_by_ggn(options: GGNFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> (C + lam I)^-1 g with C from the Gauss-Newton family."""
    curvature = options.gauss_newton(options.fisher)
    return options.face(curvature, options.solver, lam=options.lam, preconditioner=options.preconditioner)


@spread(EGNFaceOptions)
def scale_by_egn(options: EGNFaceOptions) -> optax.GradientTransformationExtraArgs:
    """`scale_by_ggn` solved exactly in row space."""
    solver = RowSpace(Cholesky(), max_bytes=count("max_bytes", options.max_bytes, DEFAULT_MAX_BYTES))
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
    estimator = GaussNewtonBartlett(count("n_samples", options.n_samples, 1))
    return options.sophia(options.gauss_newton(), estimator)


@spread(SophiaHFaceOptions)
def scale_by_sophia_h(options: SophiaHFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> clip(mean of g / max(gamma h, floor)) with h from Hutchinson probes."""
    return options.sophia(options.hessian, Hutchinson(count("n_probes", options.n_probes, 1), options.use_abs))


@spread(AdaHessianFaceOptions)
def scale_by_adahessian(options: AdaHessianFaceOptions) -> optax.GradientTransformationExtraArgs:
    """g -> mean of g / (root mean square diagonal + floor)."""
    average = BlockAverage() if options.block_average is True else options.block_average
    estimator = Hutchinson(count("n_probes", options.n_probes, 1), options.use_abs, average or None)
    diagonal = EmaDiagonal(
        estimator,
        beta2=options.b2,
        every=count("every", options.every, 1),
        denominator=AdaHessianPower(options.power, options.eps),
    )
    return options.face(options.hessian, Diagonal(options.b1), preconditioner=diagonal)


def _shapes(arrays: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
