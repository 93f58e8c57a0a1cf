"""The names under which Somax users know estimators and preconditioners, and errors that suggest the nearest name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from curvax.estimators import BlockAverage, DiagonalEstimator, ExactDiagonal, GaussNewtonBartlett, Hutchinson
from curvax.preconditioners import AdaHessianPower, Damped, EmaDiagonal, Identity, Jacobi, Preconditioner, SophiaFloor
from curvax.spelling import check_keywords, nearest

T = TypeVar("T")


def from_mapping(kind: type[T], fields: Mapping[str, Any], owner: str) -> T:
    """Builds a dataclass from a mapping, checking the names first."""
    check_keywords(owner, fields, inspect.signature(kind).parameters)
    return kind(**fields)


def build_estimator(
    estimator: DiagonalEstimator | str | None, fields: Mapping[str, Any] | None
) -> DiagonalEstimator | None:
    """A diagonal estimator from an object or its Somax name."""
    if estimator is None or isinstance(estimator, DiagonalEstimator):
        if fields:
            raise ValueError("estimator_kwargs go with a named estimator: put them into the estimator object.")
        return estimator
    kinds: dict[str, type[DiagonalEstimator]] = {
        "hutchinson": Hutchinson,
        "gnb_ce": GaussNewtonBartlett,
        "gnb": GaussNewtonBartlett,
        "exact": ExactDiagonal,
    }
    if estimator not in kinds:
        raise ValueError(f"there is no estimator {estimator!r}.{nearest(str(estimator), kinds)}")
    return from_mapping(kinds[estimator], fields or {}, "estimator_kwargs")


def build_preconditioner(
    precond: Preconditioner | str | None, fields: Mapping[str, Any] | None, estimator: DiagonalEstimator | None
) -> Preconditioner:
    """A preconditioner from an object or its Somax name and an estimator."""
    options = dict(fields or {})
    if isinstance(precond, Preconditioner):
        if options or estimator is not None:
            raise ValueError(
                "precond already is a preconditioner: drop estimator, estimator_kwargs and precond_kwargs."
            )
        return precond
    if precond is None or precond == "identity":
        if options or estimator is not None:
            raise ValueError('estimator and precond_kwargs need a preconditioner to serve: set precond="diag_direct".')
        return Identity()
    if precond not in ("diag_direct", "diag_ema"):
        raise ValueError(
            f"there is no preconditioner {precond!r}.{nearest(str(precond), ('identity', 'diag_direct', 'diag_ema'))}"
        )
    chosen = estimator or Hutchinson()
    if precond == "diag_direct":
        check_keywords("precond_kwargs", options, ("every", "add_lam"))
        return Jacobi(chosen, **options)
    return _ema_diagonal(chosen, options)


def _ema_diagonal(estimator: DiagonalEstimator, options: dict[str, Any]) -> EmaDiagonal:
    """EMA of a diagonal as preconditioner of CG: plain, or with AdaHessian's or Sophia's denominator."""
    known = ("beta2", "hessian_power", "eps", "spatial_averaging", "eval_every_k", "gamma")
    check_keywords("precond_kwargs", options, known)
    beta2, every = options.get("beta2", 0.999), options.get("eval_every_k", 1)
    if options.get("spatial_averaging") and isinstance(estimator, Hutchinson):
        estimator = dataclasses.replace(estimator, block_average=BlockAverage())
    if options.get("gamma") is not None:
        denominator = SophiaFloor(options["gamma"], options.get("eps", 1e-8))
    elif "hessian_power" in options:
        denominator = AdaHessianPower(options["hessian_power"], options.get("eps", 1e-8))
    else:
        denominator = Damped()
    return EmaDiagonal(estimator, beta2=beta2, every=every, denominator=denominator)
