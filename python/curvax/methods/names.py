"""The names under which Somax users know estimators and preconditioners, and errors that suggest the nearest name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from curvax.damping import Damping
from curvax.estimators import BlockAverage, DiagonalEstimator, ExactDiagonal, GaussNewtonBartlett, Hutchinson
from curvax.preconditioners import (
    AdaHessianPower,
    Damped,
    EmaDiagonal,
    IdentityPreconditioner,
    Jacobi,
    Preconditioner,
    SophiaFloor,
)
from curvax.spelling import check_instance, check_keywords, nearest, respelled

T = TypeVar("T")
DampingT = TypeVar("DampingT", bound=Damping)


_POLICIES = {
    "const": ("const", "constant", "fixed"),
    "schedule": ("schedule",),
    "trust_region": ("trust_region", "tr", "lm", "levenberg_marquardt"),
    "radius": ("radius", "steihaug"),
}
_POLICY_OF = {name: policy for policy, names in _POLICIES.items() for name in names}
_ESTIMATORS: dict[str, type[DiagonalEstimator]] = {
    "hutchinson": Hutchinson,
    "hutch": Hutchinson,
    "gnb_ce": GaussNewtonBartlett,
    "gnb": GaussNewtonBartlett,
    "gaussnewtonbartlett": GaussNewtonBartlett,
    "exact": ExactDiagonal,
}
_PRECONDITIONERS = {
    "identity": "identity",
    "none": "identity",
    "diag_direct": "diag_direct",
    "direct": "diag_direct",
    "diag_ema": "diag_ema",
    "ema": "diag_ema",
}

# Somax's spellings of keywords that curvax has.
SPELLINGS = {"stabilise_every": "stabilize_every"}
_DAMPING_SPELLINGS = {"every_k": "every"}

# What Somax takes and curvax does not: nothing is dropped in silence.
_DAMPING_INSTEAD = {
    "rho_clip": "a bound on rho beyond lower and upper decides nothing: drop it.",
    "dtype": "lam has JAX's default float dtype: drop it.",
}
_ESTIMATOR_INSTEAD = {"dtype": "probes have the dtypes of the parameters: drop it."}
_JACOBI_INSTEAD = {
    "eps": "a denominator of zero is replaced by the mean curvature, so none is needed: drop it.",
    "clip_nonneg": "negative estimates always count as zero: drop it.",
}
_EMA_INSTEAD = {
    "beta1": "in front of CG there is no mean of gradients: drop it, or take sophia_g, sophia_h or adahessian.",
    "add_lambda": "lam is added unless gamma or hessian_power ask for Sophia's or AdaHessian's denominator: drop it.",
    "diag_fn": "pass a curvax.estimators.DiagonalEstimator as estimator=.",
}


def policy_name(policy: str) -> str:
    """The name of a damping policy, for any that Somax has for it, in any case."""
    known = _POLICY_OF.get(policy.lower().replace("-", "_"))
    if known is None:
        raise ValueError(
            'lam_policy must be a Damping, "const", "schedule" (with lam0 a schedule), "trust_region" or "radius", '
            f"not {policy!r}."
        )
    return known


def build_damping(kind: type[DampingT], fields: Mapping[str, Any]) -> DampingT:
    """A damping policy from its fields."""
    fields = respelled("lam_kwargs", fields, _DAMPING_SPELLINGS)
    return _from_mapping(kind, fields, "lam_kwargs", _DAMPING_INSTEAD)


def _from_mapping(kind: type[T], fields: Mapping[str, Any], owner: str, instead: Mapping[str, str]) -> T:
    """Builds a dataclass from a mapping, checking the names first."""
    check_keywords(owner, fields, inspect.signature(kind).parameters, instead)
    return kind(**fields)


def build_estimator(
    estimator: DiagonalEstimator | str | None, fields: Mapping[str, Any] | None
) -> DiagonalEstimator | None:
    """A diagonal estimator from an object or its Somax name."""
    if estimator is None or isinstance(estimator, DiagonalEstimator):
        if fields:
            raise ValueError("estimator_kwargs go with a named estimator: put them into the estimator object.")
        return estimator
    if not isinstance(estimator, str):
        check_instance("estimator", estimator, DiagonalEstimator, optional=True)
    kind = _ESTIMATORS.get(estimator.lower())
    if kind is None:
        raise ValueError(f"there is no estimator {estimator!r}.{nearest(estimator.lower(), _ESTIMATORS)}")
    return _from_mapping(kind, fields or {}, "estimator_kwargs", _ESTIMATOR_INSTEAD)


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
    if isinstance(precond, type) or not isinstance(precond, str | None):
        check_instance("precond", precond, Preconditioner, optional=True)
    kind = "identity" if precond is None else _PRECONDITIONERS.get(precond.lower())
    if kind is None:
        raise ValueError(f"there is no preconditioner {precond!r}.{nearest(str(precond).lower(), _PRECONDITIONERS)}")
    if kind == "identity":
        if options or estimator is not None:
            raise ValueError('estimator and precond_kwargs need a preconditioner to serve: set precond="diag_direct".')
        return IdentityPreconditioner()
    chosen = estimator or Hutchinson()
    return _jacobi(chosen, options) if kind == "diag_direct" else _ema_diagonal(chosen, options)


def _jacobi(estimator: DiagonalEstimator, options: dict[str, Any]) -> Jacobi:
    """A diagonal as it was last estimated."""
    if "add_lambda" in options and "add_lam" not in options:
        options["add_lam"] = options.pop("add_lambda")
    check_keywords("precond_kwargs", options, ("every", "add_lam"), _JACOBI_INSTEAD)
    return Jacobi(estimator, **options)


def _ema_diagonal(estimator: DiagonalEstimator, options: dict[str, Any]) -> EmaDiagonal:
    """EMA of a diagonal as preconditioner of CG: plain, or with AdaHessian's or Sophia's denominator."""
    known = ("beta2", "hessian_power", "eps", "spatial_averaging", "eval_every_k", "gamma")
    check_keywords("precond_kwargs", options, known, _EMA_INSTEAD)
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
