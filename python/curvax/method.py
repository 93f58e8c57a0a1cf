"""Methods: one protocol for all of them, and the method that solves one linear system a step.

`AbstractMethod` is what every method does: `init`, `step`, `plan_for`, `explain`, and what the Optax face calls. It
splits the parameters, checks state, key and model state, and leaves the step itself to a strategy. There are two:

    Method                     one linear system a step: linearize, refresh, solve, transform, accept
    layerwise.InnerLoopMethod  an inner optimization on the linearized model, then a line search
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, final

import jax
import jax.numpy as jnp

from curvax import meshes, tree
from curvax.curvature import Curvature, Evaluation, TrainablePartition
from curvax.execute import (
    AbstractState,
    LastStep,
    Layout,
    MethodState,
    Problem,
    Proposal,
    StepContext,
    StepInputs,
    check_part,
    propose,
    register_if_imported,
    upcast_shapes,
)
from curvax.keys import check_key
from curvax.origin import Origin
from curvax.plan import Assembly, Plan, choose_solver, plan_for_shapes, plan_method, warn_of_expense
from curvax.tree import PyTree

StateT = TypeVar("StateT", bound=AbstractState)


class ExplainsItself(Protocol):
    """A plan: whatever can say as text what a step does."""

    def explain(self) -> str: ...


PlanT = TypeVar("PlanT", bound=ExplainsItself)


class AbstractMethod(abc.ABC, Generic[StateT, PlanT]):
    """What every second-order method does.

        state = method.init(params)
        params, state, info = jax.jit(method.step)(params, batch, state, rng)

    A strategy is a final subclass that implements the abstract members; it gets trainable parameters alone, a checked
    state and a checked key.

    Attributes:
      plan: the static plan. Costs and automatic choices need shapes: see `plan_for`.
      state_type: class of the method's state.
      needs_batch: whether `init` needs a batch, or its shapes.
      takes_curvature_batch: whether the curvature may have a batch of its own.
      takes_search_batch: whether a search for the step size may have a batch of its own.
      takes_gradient: whether the step can use a gradient from outside in place of its own.
      narrows_updates: whether the Optax face gives updates in the dtypes of the parameters, as Optax does; the
        alternative is upcast differences from which `optax.apply_updates` arrives at the method's own parameters.
    """

    plan: PlanT
    state_type: ClassVar[type[AbstractState]]
    takes_curvature_batch: ClassVar[bool] = True
    takes_gradient: ClassVar[bool] = True
    narrows_updates: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def curvature(self) -> Curvature:
        """The curvature operator, which knows model, loss and trainable parameters."""

    @property
    def takes_search_batch(self) -> bool:
        return False

    @property
    def needs_batch(self) -> bool:
        return False

    @property
    def partition(self) -> TrainablePartition:
        """Which parameters train."""
        return self.curvature.partition

    @property
    @abc.abstractmethod
    def origin(self) -> Origin:
        """What a state says of the modules that made it, so that a step of others refuses it."""

    @abc.abstractmethod
    def _traced_once(self) -> Self:
        """The same method, which runs the user's functions once for each set of shapes (`curvax.traced_once`)."""

    @abc.abstractmethod
    def _first_state(self, trainable: PyTree, frozen: PyTree, batch: Any, model_state: PyTree) -> StateT:
        """The state before the first step of these parameters; `batch` as for `init`."""

    @abc.abstractmethod
    def init_empty(self, params: PyTree, *, model_state: PyTree = None) -> StateT:
        """The state of a tree without leaves: what is like the parameters in it is `params`.

        `optax.tree.map_params` asks for one to tell which parts of a state are parameters. A state that follows the
        blocks of a model is one scalar here, so that all of it counts as one part that is no parameters.
        """

    @abc.abstractmethod
    def _check_parts(self, state: StateT, trainable: PyTree) -> None:
        """Raises ValueError for a state of another method, or of one whose transform, solver, ... were exchanged."""

    @abc.abstractmethod
    def _propose(self, inputs: StepInputs[StateT]) -> Proposal[StateT]:
        """One step, from checked arguments."""

    @abc.abstractmethod
    def _plan_for(self, trainable: PyTree, evaluation: Evaluation) -> PlanT:
        """The plan for these shapes."""

    def __repr__(self) -> str:
        return f"<curvax.{type(self).__name__}, {self.plan.explain().splitlines()[0]}>"

    def explain(self) -> str:
        """The plan without shapes as text; `plan_for(params, batch).explain()` adds sizes and costs."""
        return self.plan.explain()

    @final
    def init(self, params: PyTree, *, batch: Any | None = None, model_state: PyTree = None) -> StateT:
        """The state before the first step.

        Args:
          params: the parameters, or `jax.ShapeDtypeStruct`s: nothing of them but shapes and dtypes enters, save what
            the transform keeps.
          batch: a batch (arrays or `jax.ShapeDtypeStruct`s), of which shapes alone enter. Needed by methods with a
            state per layer (`kfac`, `ekfac`): parameters alone do not tell the layers. Others do without it.
          model_state: mutable model state (BatchNorm statistics), for models with `has_state`.

        Raises:
          TypeError: a leaf of the parameters is not a real array.
          ValueError: nothing trains, or `batch` or `model_state` is missing, or the parameters do not fit the method.
        """
        trainable, frozen = self.partition.split(params)
        return self.init_split(trainable, frozen, batch=batch, model_state=model_state)

    @final
    def init_split(
        self, trainable: PyTree, frozen: PyTree, *, batch: Any | None = None, model_state: PyTree = None
    ) -> StateT:
        """`init` of parameters as split by the method's partition, as for `propose`."""
        if not jax.tree.leaves(trainable):
            raise ValueError("there are no trainable parameters: every leaf is frozen or not floating point.")
        if self.curvature.has_state != (model_state is not None):
            raise ValueError(
                "has_state=True and init(params, model_state=...) go together: "
                + ("pass model_state." if model_state is None else "set has_state=True.")
            )
        register_if_imported(self.state_type)
        make = self._traced_once()._first_state
        return meshes.placed(
            lambda trainable, frozen, model_state: make(trainable, frozen, batch, model_state),
            trainable, frozen, model_state,
        )  # fmt: skip

    @final
    def step(
        self,
        params: PyTree,
        batch: Any,
        state: StateT,
        rng: jax.Array | None = None,
        *,
        curvature_batch: Any | None = None,
        search_batch: Any | None = None,
    ) -> tuple[PyTree, StateT, dict[str, Any]]:
        """One step. Pure: jit it, scan it, donate `params` and `state`.

        Args:
          params: parameters, laid out as for `init`.
          batch: mapping with the model's inputs and targets (for `loss_fn` methods whatever that takes). An inner loop
            cuts its examples into equal parts, one for each minibatch.
          state: from `init` or the last step.
          rng: random key, raw or typed; the step number is folded in, so the same key may be passed every time. `None`
            is enough for methods that draw nothing.
          curvature_batch: a batch for the curvature, where it is to differ from that of loss and gradient; inner loops
            take none.
          search_batch: a batch for the search of the step size (`search=`), where it is to see fresh examples; inner
            loops cut theirs off the batch.

        Returns:
          (params, state, info). A step that would leave non-finite parameters, or that the damping or the line search
          rejects, returns the parameters as they were. Info has metrics of `curvax.telemetry`, and "aux" if the model
          returns one.

        Raises:
          ValueError, TypeError, KeyError: batch, state or parameters do not fit; one sentence with the mend.
        """
        trainable, frozen = self.partition.split(params)
        inputs = StepInputs(trainable, frozen, batch, state, rng, curvature_batch, search_batch)
        proposal = self.propose_step(inputs)
        return self.partition.merge(proposal.params, frozen), proposal.state, proposal.info

    @final
    def propose(
        self,
        trainable: PyTree,
        frozen: PyTree,
        batch: Any,
        state: StateT,
        rng: jax.Array | None = None,
        *,
        curvature_batch: Any | None = None,
        gradient: PyTree | None = None,
    ) -> Proposal[StateT]:
        """The step on trainable parameters alone, optionally with a gradient from outside.

        Args:
          trainable, frozen: the parameters as split by the method's partition.
          batch, state, rng, curvature_batch: as in `step`.
          gradient: used in place of the batch's own gradient (accumulated over many batches, say).
        """
        return self.propose_step(StepInputs(trainable, frozen, batch, state, rng, curvature_batch, None, gradient))

    @final
    def propose_step(self, inputs: StepInputs[StateT]) -> Proposal[StateT]:
        """`propose` of arguments in one object, the search's batch included."""
        if inputs.curvature_batch is not None and not self.takes_curvature_batch:
            raise ValueError("this method takes gradient and curvature of the same examples: drop curvature_batch.")
        if inputs.search_batch is not None and not self.takes_search_batch:
            raise ValueError("this method looks for a step size on no batch: drop search_batch, or set search=.")
        if inputs.gradient is not None and not self.takes_gradient:
            raise ValueError("this method takes its gradients itself: drop gradient.")
        meshes.refuse_manual_axes(inputs.trainable, inputs.batch)
        args = tuple(getattr(inputs, field.name) for field in dataclasses.fields(inputs))

        def propose(*args: Any) -> tuple[PyTree, PyTree, StateT, dict[str, Any]]:
            made = self._traced_once()._propose(self._checked(StepInputs(*args)))
            return made.params, made.update, made.state, made.info

        return Proposal(*meshes.automatic(propose, args, (inputs.trainable, inputs.trainable, inputs.state, None)))

    @final
    def _checked(self, inputs: StepInputs[StateT]) -> StepInputs[StateT]:
        """Raises TypeError or ValueError for a state of another method or other parameters, and for what is no key."""
        if not isinstance(inputs.state, self.state_type):
            raise TypeError(
                f"step takes (params, batch, state, rng), and the state is a {type(inputs.state).__name__}: pass what "
                "init or the last step returned."
            )
        inputs.state.check(inputs.trainable, self.origin)
        self._check_parts(inputs.state, inputs.trainable)
        if inputs.rng is not None:
            check_key("rng", inputs.rng)
        return inputs

    @final
    def plan_for(self, params: PyTree, batch: Any, *, model_state: PyTree = None) -> PlanT:
        """The plan for these shapes, with costs; nothing is computed.

        Args:
          params, batch: arrays or `jax.ShapeDtypeStruct`s, the batch as for `step`.
          model_state: as for `init`.
        """

        def plan(params: PyTree, batch: Any, model_state: PyTree) -> tuple[PlanT]:
            trainable, frozen = self.partition.split(params)
            evaluation = self.evaluation(batch, frozen, model_state, StepKeys.of_a_plan())
            return (self._traced_once()._plan_for(trainable, evaluation),)

        return meshes.automatic(plan, (params, batch, model_state), (None,))[0]

    @final
    def evaluation(self, batch: Any, frozen: PyTree, model_state: PyTree, keys: StepKeys) -> Evaluation:
        """What the curvature operator takes beside the trainable parameters."""
        return Evaluation(
            batch=batch,
            frozen=frozen,
            model_state=model_state,
            model_key=keys.model if self.curvature.needs_model_key else None,
            sample_key=keys.sample if self.curvature.is_random else None,
        )


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Method(AbstractMethod[MethodState, Plan]):
    """A method of modules, planned and executed as one pure step; `assemble` and the presets make it.

    Attributes:
      assembly: the modules.
      plan: the static plan.
    """

    state_type = MethodState

    assembly: Assembly
    plan: Plan = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.assembly.telemetry.check(self.assembly.offered, "this method")
        object.__setattr__(self, "plan", plan_method(self.assembly))

    @property
    def curvature(self) -> Curvature:
        return self.assembly.curvature

    @property
    def takes_search_batch(self) -> bool:
        return self.assembly.search is not None and self.assembly.search.evaluations > 0

    @property
    def needs_batch(self) -> bool:
        return self.assembly.preconditioner.needs_factors

    def _traced_once(self) -> Method:
        return dataclasses.replace(self, assembly=self.assembly.traced_once())

    def init_empty(self, params: PyTree, *, model_state: PyTree = None) -> MethodState:
        preconditioner = jnp.zeros(()) if self.needs_batch else self.assembly.preconditioner.init(params)
        return self._state(params, preconditioner, model_state)

    def _first_state(self, trainable: PyTree, frozen: PyTree, batch: Any, model_state: PyTree) -> MethodState:
        preconditioner = self._first_preconditioner(trainable, frozen, batch, model_state)
        return self._state(trainable, preconditioner, model_state)

    def _state(self, trainable: PyTree, preconditioner: Any, model_state: PyTree) -> MethodState:
        last = None
        if self.assembly.may_undo:
            last = LastStep(jax.tree.map(jnp.zeros_like, trainable), jnp.asarray(False))
        return MethodState(
            step=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            damping=self.assembly.damping.init(),
            preconditioner=preconditioner,
            solver=self.assembly.solver.init(upcast_shapes(trainable)),
            transform=self.assembly.transform.init(tree.upcast(trainable)),
            scaling=self._first_scaling(upcast_shapes(trainable)),
            search=jnp.ones((), jnp.result_type(float)) if self._keeps_step_size else None,
            model_state=tree.fixed(model_state),
            last=last,
            layout=Layout.of(trainable),
            origin=self.origin,
        )

    @property
    def origin(self) -> Origin:
        assembly = self.assembly
        return Origin.of(
            curvature=assembly.curvature.kind,
            solver=assembly.solver,
            preconditioner=assembly.preconditioner,
            damping=assembly.damping,
            scaling=assembly.scaling,
        )

    def _first_scaling(self, like: PyTree) -> Any:
        return () if self.assembly.scaling is None else self.assembly.scaling.init(like)

    @property
    def _keeps_step_size(self) -> bool:
        return self.assembly.search is not None and self.assembly.search.every > 1

    def _first_preconditioner(self, trainable: PyTree, frozen: PyTree, batch: Any, model_state: PyTree) -> Any:
        preconditioner, curvature = self.assembly.preconditioner, self.assembly.curvature
        if not self.needs_batch:
            return preconditioner.init(upcast_shapes(trainable))
        if batch is None:
            raise ValueError(
                f"{type(preconditioner).__name__} keeps a state per layer, and the layers are known from the shapes of "
                "a batch: call init(params, batch=batch)."
            )
        # Its values are looked at where they can be; behind the door of a mesh they are another type's.
        seen = _shapes(batch) if meshes.entered() is not None else batch
        evaluation = self.evaluation(seen, tree.hollow(frozen), tree.hollow(model_state), StepKeys.of_a_plan())
        curvature.check(trainable, evaluation)
        evaluation = curvature.prepare(trainable, dataclasses.replace(evaluation, batch=_shapes(batch)))
        state = preconditioner.init_on(curvature, trainable, evaluation)
        preconditioner.warn(state, tree.places(trainable))
        return state

    def _propose(self, inputs: StepInputs[MethodState]) -> Proposal[MethodState]:
        trainable, state = inputs.trainable, inputs.state
        # 1. What the operator is given, for the batch of the gradient and for that of the curvature.
        keys = StepKeys.of(inputs.rng, state.step)
        evaluation = self._prepared(trainable, self.evaluation(inputs.batch, inputs.frozen, state.model_state, keys))
        curved = None
        if inputs.curvature_batch is not None:
            curved = self.evaluation(inputs.curvature_batch, inputs.frozen, state.model_state, keys)
            curved = self._prepared(trainable, curved)
        searched = None
        if inputs.search_batch is not None:
            searched = self.evaluation(inputs.search_batch, inputs.frozen, state.model_state, keys)
            searched = self._prepared(trainable, searched)
        # 2. The plan for these shapes.
        own_gradient = curved is None and inputs.gradient is None
        plan = choose_solver(self.assembly, trainable, curved or evaluation, own_gradient=own_gradient)
        warn_of_expense(self.assembly, plan, trainable, curved or evaluation)
        # 3. The planned step.
        problem = Problem(evaluation, curved, searched, inputs.gradient, keys.estimator)
        return propose(StepContext.of(self.assembly, plan, trainable, problem, state))

    def _prepared(self, trainable: PyTree, evaluation: Evaluation) -> Evaluation:
        self.assembly.curvature.check(trainable, evaluation)
        return self.assembly.curvature.prepare(trainable, evaluation)

    def _check_parts(self, state: MethodState, trainable: PyTree) -> None:
        assembly, like = self.assembly, upcast_shapes(trainable)
        check_part("damping", state.damping, jax.eval_shape(assembly.damping.init))
        check_part("solver", state.solver, jax.eval_shape(assembly.solver.init, like))
        check_part("scaling", state.scaling, jax.eval_shape(self._first_scaling, like))
        check_part("transform", state.transform, jax.eval_shape(assembly.transform.init, like))
        own = state.preconditioner
        check_part("preconditioner", own, assembly.preconditioner.expected(own, like))
        kept = (state.last, assembly.may_undo), (state.search, self._keeps_step_size)
        kept += ((state.model_state, assembly.curvature.has_state),)
        if any((part is not None) != wanted for part, wanted in kept):
            raise ValueError(
                "the state was made by another method: pass what this method's init or its last step returned."
            )

    def _plan_for(self, trainable: PyTree, evaluation: Evaluation) -> Plan:
        self.assembly.curvature.check(trainable, evaluation)
        evaluation = dataclasses.replace(evaluation, batch=_shapes(evaluation.batch))
        evaluation = self.assembly.curvature.prepare(trainable, evaluation)
        return plan_for_shapes(self.assembly, trainable, evaluation)


def _shapes(batch: Any) -> Any:
    """Shapes and dtypes alone: what a plan or a state is made for may come on any mesh."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda: batch))


@dataclasses.dataclass(frozen=True)
class StepKeys:
    """The independent random keys of one step.

    The estimator's is made where it is called for: inside the branch of a refresh, so that no other step spends some
    thirty small operations on it.

    Attributes:
      model: of models that draw at random.
      sample: of a curvature that samples targets.
      estimator: makes the key of the preconditioner's estimator.
    """

    model: jax.Array | None
    sample: jax.Array | None
    estimator: Callable[[], jax.Array] | None

    @staticmethod
    def of(rng: jax.Array | None, step: jax.Array) -> StepKeys:
        """The keys of step number `step`; none of no key."""
        if rng is None:
            return StepKeys(None, None, None)
        model, sample, _ = jax.random.split(jax.random.fold_in(rng, step), 3)
        return StepKeys(model, sample, lambda: jax.random.split(jax.random.fold_in(rng, step), 3)[2])

    @staticmethod
    def of_a_plan() -> StepKeys:
        """Keys of the right form, where nothing is drawn."""
        return StepKeys.of(jax.random.key(0), jnp.zeros((), jnp.int32))
