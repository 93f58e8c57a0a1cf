"""Keyword groups that presets share, each with its checks.

A preset's keywords are the fields of a frozen dataclass that inherits the groups it needs, so that a keyword has one
default, one meaning and one check wherever it appears.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import optax

from curvax.chain import ScalarOrSchedule, build_transform
from curvax.curvature import (
    Curvature,
    Extras,
    FisherType,
    GaussNewton,
    GeneralizedGaussNewton,
    Model,
    SumOfTerms,
    Terms,
    TrainablePartition,
    in_pieces,
)
from curvax.curvature.partition import Mask
from curvax.damping import Constant, Damping, Radius, Scaling, Scheduled, TrustRegion
from curvax.damping.base import ScalarLike
from curvax.estimators import DiagonalEstimator
from curvax.kernels._dispatch import Backend
from curvax.losses import Loss
from curvax.method import Method
from curvax.methods.checks import check_fields
from curvax.methods.names import build_damping, build_estimator, build_preconditioner, policy_name
from curvax.numbers import check_fraction, check_not_negative, check_positive
from curvax.plan import Assembly, PlanMode
from curvax.preconditioners import IdentityPreconditioner, Preconditioner
from curvax.search import Backtracking, StepBound, StepSearch
from curvax.solvers import CG, GeodesicAcceleration, MartensStop, Solver
from curvax.spelling import check_instance, described
from curvax.structure.batch_axes import AxesPrefix
from curvax.telemetry import Metric, MetricRecord, Telemetry


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Keywords of every preset.

    Attributes:
      backend: preferred implementation of kernels; "auto" takes the best supported one of each.
      has_state, has_aux, has_rng: what the model takes and returns beside the plain signature (`curvature.Extras`).
      frozen: tree of booleans (or a function to one): True keeps a parameter as it is.
      microbatch_size: accumulate over pieces of so many examples; `None` takes the batch at once.
      batch_axes: which axis of each leaf of the batch holds the examples, `None` for a leaf that all examples share: a
        prefix of the batch, as `in_axes` of `jax.vmap`. By default, `None`, the model says it (docs/structure.md).
    """

    backend: Backend = "auto"
    has_state: bool = False
    has_aux: bool = False
    has_rng: bool = False
    frozen: Mask | None = None
    microbatch_size: int | None = None
    batch_axes: AxesPrefix | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def extras(self) -> Extras:
        return Extras(self.has_state, self.has_aux, self.has_rng, TrainablePartition(self.frozen))


SHORTENED = Backtracking(candidates=6, chunk=1)
"""Halves a step that the trust region would refuse, up to five times, before it is refused.

One forward pass, that of the trust region, where the full step is good. On ten differential equations it lost on none
and was on the hardest, Helmholtz' with two scales, a thousand times further after 40 steps (docs/steps.md).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssemblyOptions(CommonOptions):
    """Keywords of presets that solve one linear system a step.

    Attributes:
      plan: "shared", or "off" to run without sharing and cadences, for comparison.
      search: a search for the step size along the update: `curvax.search.GridSearch()`, `Backtracking()`,
        `QuadraticModel()`. `None` takes the update as it is.
      step_bound: a bound on the update, after the learning rate: `curvax.search.NormBound(c)`, `CurvatureBound(c)`,
        `EntryBound(c)`.
      undo: go back to the parameters before a step whose loss nobody evaluated if it led to where the loss is no finite
        number. It takes a copy of the parameters where the damping does not judge every step.
    """

    plan: Literal["shared", "off"] = "shared"
    search: StepSearch | None = None
    step_bound: StepBound | None = None
    undo: bool = True

    @property
    def correction(self) -> GeodesicAcceleration | None:
        """The second-order correction of the direction, of presets that have the keyword."""
        return None

    def _search(self, damping: Damping | None) -> StepSearch | None:
        """The search, that of the default only where a trust region looks at every step."""
        judged = isinstance(damping, TrustRegion) and damping.every == 1 and not damping.by_step_size
        return self.search if judged or self.search is not SHORTENED else None

    def build(
        self,
        curvature: Curvature,
        solver: Solver,
        *,
        transform: optax.GradientTransformationExtraArgs,
        damping: Damping | None = None,
        scaling: Scaling | None = None,
        preconditioner: Preconditioner | None = None,
        telemetry: Telemetry,
    ) -> Method:
        """The method from its modules and these options."""
        if self.plan not in ("shared", "off"):
            raise ValueError(f'plan must be "shared" or "off", not {self.plan!r}.')
        if self.microbatch_size is not None:
            curvature = in_pieces(curvature, self.microbatch_size)
        return Method(
            Assembly(
                curvature=curvature,
                solver=solver,
                preconditioner=preconditioner or IdentityPreconditioner(),
                damping=damping or Constant(0.0),
                transform=transform,
                telemetry=telemetry,
                acceleration=self.correction,
                step_bound=self.step_bound,
                search=self._search(damping),
                undo=self.undo,
                backend=self.backend,
                mode=PlanMode(self.plan),
                scaling=scaling,
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(CommonOptions):
    """Keywords of presets on a model with outputs.

    Attributes:
      predict_fn: `predict_fn(params, inputs) -> outputs`, acting on each example of the leading axis by itself. With
        `loss=Terms(...)` each term has its own, its own keys and batch axes.
      x_key, y_key: keys of inputs and targets in the batch.
      weight_key: key of per-example weights or a mask; `None` for none.
    """

    predict_fn: Callable[..., Any] | None = None
    x_key: str = "x"
    y_key: str = "y"
    weight_key: str | None = None

    @staticmethod
    def needed(given: Mapping[str, Any]) -> tuple[str, ...]:
        """A model, where no terms have theirs."""
        return () if isinstance(given.get("loss"), Terms | Mapping) else ("predict_fn",)

    @property
    def model(self) -> Model:
        if self.predict_fn is None or not callable(self.predict_fn):
            raise TypeError("predict_fn must be a function predict_fn(params, inputs) -> outputs.")
        return Model(self.predict_fn, self.x_key, self.y_key, self.weight_key, self.extras, self.batch_axes)

    def gauss_newton(
        self, loss: Loss | Terms, fisher: FisherType = GeneralizedGaussNewton()
    ) -> GaussNewton | SumOfTerms:
        """The curvature of the model, or of all terms of a loss."""
        if isinstance(loss, Mapping):
            raise TypeError("loss is a mapping: write loss=curvax.Terms(mapping) with a curvax.Term for each name.")
        if not isinstance(loss, Terms):
            return GaussNewton(self.model, loss, fisher)
        refuse_beside_terms(self)
        return SumOfTerms.gauss_newton(loss, fisher, self.extras)


def refuse_beside_terms(options: Any) -> None:
    """Raises TypeError for keywords that each term has its own of."""
    defaults = {"predict_fn": None, "x_key": "x", "y_key": "y", "weight_key": None, "batch_axes": None}
    given = [name for name, default in defaults.items() if getattr(options, name) != default]
    if given:
        raise TypeError(f"with loss=Terms(...) each term has its own {', '.join(given)}: write it into Term(...).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DampingOptions:
    """Keywords of presets that solve a damped system.

    Attributes:
      lam_policy: a `Damping`, or "const", "schedule", "trust_region" or "radius" to build one from `lam0` and
        `lam_kwargs`; Somax's other names for them will do. By default a trust region that needs no `lam0`, and the
        constant `lam0` (or schedule) for whoever gives one. "radius" (`damping.Radius`) is for CG and Cholesky.
      lam0: damping (first damping of a trust region), in units of the curvature; a schedule with "schedule". `None`
        (default) is 1 for a constant damping; a trust region takes it from the first batch.
      lam_kwargs: further fields of the policy, checked by name; those of `Radius` with "radius".
    """

    lam_policy: Damping | str | None = None
    lam0: ScalarLike | optax.Schedule | None = None
    lam_kwargs: Mapping[str, Any] | None = None

    trust_region: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Fields of the preset's own trust region, for a policy by name."""

    @property
    def damping(self) -> Damping:
        if isinstance(self.lam_policy, type) or not isinstance(self.lam_policy, Damping | str | None):
            check_instance("lam_policy", self.lam_policy, Damping, optional=True)
        if isinstance(self.lam_policy, Damping):
            if self.lam_kwargs:
                raise ValueError("lam_kwargs belong into the damping object that lam_policy is.")
            return self.lam_policy
        named = self.lam_policy or ("trust_region" if self.lam0 is None else "const")
        policy = policy_name(named)
        if callable(self.lam0):
            if self.lam_kwargs:
                raise ValueError("with a schedule as lam0 there is no trust region for lam_kwargs: drop one of them.")
            return Scheduled(self.lam0)
        if policy == "schedule":
            raise TypeError("lam_policy='schedule' needs lam0 to be an Optax schedule.")
        if policy == "trust_region":
            return build_damping(TrustRegion, {**self.trust_region, **(self.lam_kwargs or {}), "lam0": self.lam0})
        if policy == "radius":
            return build_damping(Radius, {"lam0": 0.0 if self.lam0 is None else self.lam0, **(self.lam_kwargs or {})})
        if self.lam_kwargs:
            raise ValueError("lam_kwargs are fields of a trust region: set lam_policy='trust_region', or drop them.")
        return Constant(1.0 if self.lam0 is None else self.lam0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CGOptions:
    """Keywords of presets that iterate.

    Attributes:
      tol: relative residual at which CG stops.
      maxiter: most CG iterations.
      warm_start: start from the previous solution.
      stabilize_every: iterations between recomputed residuals.
      stop: Martens' stopping rule, or `None`.
    """

    tol: float = 1e-5
    maxiter: int = 20
    warm_start: bool = True
    stabilize_every: int = 50
    stop: MartensStop | None = None

    @property
    def cg(self) -> CG:
        check_instance("stop", self.stop, MartensStop, optional=True)
        return CG(self.tol, self.maxiter, self.warm_start, self.stabilize_every, self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecondOptions:
    """Keywords of presets whose CG takes a preconditioner.

    Attributes:
      estimator: a `DiagonalEstimator`, or "hutchinson" or "gnb_ce".
      estimator_kwargs: fields of a named estimator.
      precond: a `Preconditioner`, or "identity", "diag_direct" or "diag_ema", the latter two on `estimator`.
      precond_kwargs: fields of a named preconditioner.
    """

    estimator: DiagonalEstimator | str | None = None
    estimator_kwargs: Mapping[str, Any] | None = None
    precond: Preconditioner | str | None = None
    precond_kwargs: Mapping[str, Any] | None = None

    @property
    def preconditioner(self) -> Preconditioner:
        estimator = build_estimator(self.estimator, self.estimator_kwargs)
        return build_preconditioner(self.precond, self.precond_kwargs, estimator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformOptions:
    """Keywords of the Optax chain behind the direction (`curvax.chain.build_transform`).

    Attributes:
      learning_rate: scalar or schedule.
      clip_norm: bound on the direction's global norm.
      clip_value: bound on each of its entries.
      weight_decay, weight_decay_mask: decoupled weight decay, a number or a schedule, and what it applies to.
      direction_momentum, nesterov: momentum on the direction.
      tx: an Optax chain in place of all of these, which turns the direction into the update, sign included: end it with
        `optax.scale_by_learning_rate`.
    """

    learning_rate: ScalarOrSchedule = 1.0
    clip_norm: float | None = None
    clip_value: float | None = None
    weight_decay: ScalarOrSchedule | None = None
    weight_decay_mask: Any | None = None
    direction_momentum: float | None = None
    nesterov: bool = False
    tx: optax.GradientTransformation | None = None

    @property
    def transform(self) -> optax.GradientTransformationExtraArgs:
        if self.tx is not None:
            _check_transformation(self.tx)
            return whole_transform(self, self.tx, TransformOptions)
        for name, bound in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if bound is not None:
                check_positive(name, bound)
        if self.direction_momentum is not None:
            check_fraction("direction_momentum", self.direction_momentum)
        if self.weight_decay is not None and not callable(self.weight_decay):
            check_not_negative("weight_decay", self.weight_decay)
        return build_transform(
            learning_rate=self.learning_rate,
            clip_norm=self.clip_norm,
            clip_value=self.clip_value,
            weight_decay=self.weight_decay,
            weight_decay_mask=self.weight_decay_mask,
            direction_momentum=self.direction_momentum,
            nesterov=self.nesterov,
        )


def _check_transformation(tx: Any) -> None:
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        made = f", called: {tx.__name__}(...)" if callable(tx) and hasattr(tx, "__name__") else ""
        raise TypeError(f"tx is {described(tx)}: pass an Optax transformation{made}.")


def whole_transform(
    options: Any, tx: optax.GradientTransformation, group: type[Any]
) -> optax.GradientTransformationExtraArgs:
    """`tx`, if the other keywords of its group have their defaults, which may be the preset's own.

    Raises:
      ValueError: `tx` and another keyword of the group are both given.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    changed = [
        field.name
        for field in dataclasses.fields(group)
        if field.name != "tx" and _differs(getattr(options, field.name), defaults[field.name])
    ]
    if changed:
        raise ValueError(f"tx already is the whole transform: drop {', '.join(changed)}, or drop tx.")
    return optax.with_extra_args_support(tx)


def _differs(value: Any, default: Any) -> bool:
    if value is default:
        return False
    return not (isinstance(value, int | float) and isinstance(default, int | float) and value == default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRecordOptions:
    """Telemetry keywords of every preset; a period below 1 leaves the metric out.

    Attributes:
      record_loss_every_k: period of `loss`, which costs nothing beyond the gradient.
      metrics: further `telemetry.MetricRecord`s, or one.
    """

    record_loss_every_k: int = 1
    metrics: Sequence[MetricRecord] | MetricRecord = ()

    @property
    def telemetry(self) -> Telemetry:
        return Telemetry(self.loss_records + self.further_records)

    @property
    def further_records(self) -> tuple[MetricRecord, ...]:
        """`metrics` as a tuple, of which one record by itself is one."""
        return (self.metrics,) if isinstance(self.metrics, MetricRecord) else tuple(self.metrics)

    @property
    def loss_records(self) -> tuple[MetricRecord, ...]:
        return (MetricRecord(Metric.LOSS, self.record_loss_every_k),) if self.record_loss_every_k > 0 else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveRecordOptions(LossRecordOptions):
    """Telemetry keywords of presets that solve a damped system.

    Attributes:
      record_rho_every_k: period of `rho`, `predicted` and `loss_after`: one forward pass and one product.
      record_lam: report `lam`.
      record_cg_stats: report `result`, `iterations` and the true `residual` (one product).
    """

    record_rho_every_k: int = -1
    record_lam: bool = True
    record_cg_stats: bool = True

    @property
    def telemetry(self) -> Telemetry:
        records = self.loss_records
        if self.record_lam:
            records += (MetricRecord(Metric.LAM),)
        if self.record_cg_stats:
            records += (MetricRecord(Metric.RESULT), MetricRecord(Metric.ITERATIONS), MetricRecord(Metric.RESIDUAL))
        if self.record_rho_every_k > 0:
            every = self.record_rho_every_k
            records += (
                MetricRecord(Metric.RHO, every),
                MetricRecord(Metric.PREDICTED, every),
                MetricRecord(Metric.LOSS_AFTER, every),
            )
        return Telemetry(records + self.further_records)
