"""A method: modules, planned and executed as one pure step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Evaluation
from curvax.execute import LastStep, Layout, MethodState, Problem, Proposal, check_part, propose, upcast_shapes
from curvax.keys import check_key
from curvax.plan import Assembly, Plan, choose_solver, plan_for_shapes, plan_method, warn_of_expense
from curvax.preconditioners import BlockPreconditioner
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Method:
    """A second-order method assembled from modules.

        state = method.init(params)
        params, state, info = jax.jit(method.step)(params, batch, state, rng)

    Attributes:
      assembly: the modules.
      plan: the static plan. Costs and automatic choices need shapes: see `plan_for`.
    """

    assembly: Assembly
    plan: Plan = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", plan_method(self.assembly))

    def __repr__(self) -> str:
        return f"<curvax.Method, {self.plan.explain().splitlines()[0]}>"

    @property
    def needs_batch(self) -> bool:
        """Whether `init` needs a batch, or its shapes."""
        return isinstance(self.assembly.preconditioner, BlockPreconditioner)

    def init(self, params: PyTree, *, batch: Any | None = None, model_state: PyTree = None) -> MethodState:
        """The state before the first step.

        Args:
          params: the parameters, or `jax.ShapeDtypeStruct`s: nothing of them but shapes and dtypes enters, save what
            the transform keeps.
          batch: a batch (arrays or `jax.ShapeDtypeStruct`s), of which shapes alone enter. Needed by methods with a
            state per layer (`kfac`, `ekfac`): parameters alone do not tell the layers. Others do without it.
          model_state: mutable model state (BatchNorm statistics), for models with `has_state`.

        Raises:
          TypeError: a leaf of the parameters is not a real array.
          ValueError: nothing trains, or `batch` or `model_state` is missing.
        """
        trainable, frozen = self.assembly.partition.split(params)
        return self.init_split(trainable, frozen, batch=batch, model_state=model_state)

    def init_split(
        self, trainable: PyTree, frozen: PyTree, *, batch: Any | None = None, model_state: PyTree = None
    ) -> MethodState:
        """`init` of parameters as split by the method's partition, as for `propose`."""
        if not jax.tree.leaves(trainable):
            raise ValueError("there are no trainable parameters: every leaf is frozen or not floating point.")
        if self.assembly.curvature.has_state != (model_state is not None):
            raise ValueError(
                "has_state=True and init(params, model_state=...) go together: "
                + ("pass model_state." if model_state is None else "set has_state=True.")
            )
        preconditioner = self._preconditioner(trainable, frozen, batch, model_state)
        return self._state(trainable, preconditioner, model_state)

    def init_empty(self, params: PyTree, *, model_state: PyTree = None) -> MethodState:
        """The state of a tree without leaves: what is like the parameters in it is `params`.

        `optax.tree.map_params` asks for one to tell which parts of a state are parameters. A state that follows the
        blocks of a model is one scalar here, so that all of it counts as one part that is no parameters.
        """
        preconditioner = jnp.zeros(()) if self.needs_batch else self.assembly.preconditioner.init(params)
        return self._state(params, preconditioner, model_state)

    def _state(self, trainable: PyTree, preconditioner: Any, model_state: PyTree) -> MethodState:
        first = LastStep(jax.tree.map(jnp.zeros_like, trainable), jnp.asarray(False))
        return MethodState(
            step=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            damping=self.assembly.damping.init(),
            preconditioner=preconditioner,
            solver=self.assembly.solver.init(upcast_shapes(trainable)),
            transform=self.assembly.transform.init(tree.upcast(trainable)),
            model_state=tree.fixed(model_state),
            last=first if self._takes_unseen_steps else None,
            layout=Layout.of(trainable),
        )

    @property
    def _takes_unseen_steps(self) -> bool:
        return self.assembly.damping.evaluate_every not in (None, 1)

    def _preconditioner(self, trainable: PyTree, frozen: PyTree, batch: Any | None, model_state: PyTree) -> Any:
        preconditioner, curvature = self.assembly.preconditioner, self.assembly.curvature
        if not isinstance(preconditioner, BlockPreconditioner):
            return preconditioner.init(upcast_shapes(trainable))
        if batch is None:
            raise ValueError(
                f"{type(preconditioner).__name__} keeps a state per layer, and layers are found from the shapes of a "
                "batch: call init(params, batch=batch)."
            )
        keys = _Keys.of(jax.random.key(0), jnp.zeros((), jnp.int32))
        evaluation = self._evaluation(batch, tree.hollow(frozen), tree.hollow(model_state), keys)
        curvature.check(trainable, evaluation)
        evaluation = curvature.prepare(trainable, dataclasses.replace(evaluation, batch=_shapes(batch)))
        return preconditioner.init_blocks(curvature.blocks(trainable, evaluation))

    def step(
        self,
        params: PyTree,
        batch: Any,
        state: MethodState,
        rng: jax.Array | None = None,
        *,
        curvature_batch: Any | None = None,
    ) -> tuple[PyTree, MethodState, dict[str, Any]]:
        """One step. Pure: jit it, scan it, donate `params` and `state`.

        Args:
          params: parameters, laid out as for `init`.
          batch: mapping with the model's inputs and targets (for `loss_fn` methods whatever that takes).
          state: from `init` or the last step.
          rng: random key, raw or typed; the step number is folded in, so the same key may be passed every time. `None`
            is enough for methods that draw nothing.
          curvature_batch: a batch for the curvature, where it is to differ from that of loss and gradient.

        Returns:
          (params, state, info). A step that would leave non-finite parameters, or that the damping rejects, returns the
          parameters as they were.

        Raises:
          ValueError, TypeError, KeyError: batch, state or parameters do not fit; one sentence with the mend.
        """
        trainable, frozen = self.assembly.partition.split(params)
        proposal = self.propose(trainable, frozen, batch, state, rng, curvature_batch=curvature_batch)
        return self.assembly.partition.merge(proposal.params, frozen), proposal.state, proposal.info

    def propose(
        self,
        trainable: PyTree,
        frozen: PyTree,
        batch: Any,
        state: MethodState,
        rng: jax.Array | None = None,
        *,
        curvature_batch: Any | None = None,
        gradient: PyTree | None = None,
    ) -> Proposal:
        """The step on trainable parameters alone, optionally with a gradient from outside.

        Args:
          trainable, frozen: the parameters as split by the method's partition.
          batch, state, rng, curvature_batch: as in `step`.
          gradient: used in place of the batch's own gradient (accumulated over many batches, say).
        """
        if not isinstance(state, MethodState):
            raise TypeError(
                f"step takes (params, batch, state, rng), and the state is a {type(state).__name__}: pass what init or "
                "the last step returned."
            )
        state.layout.check(trainable)
        self._check_state(state, upcast_shapes(trainable))
        keys = _Keys.of(rng, state.step)
        evaluation = self._evaluation(batch, frozen, state.model_state, keys)
        curvature = self.assembly.curvature
        curvature.check(trainable, evaluation)
        evaluation, apart = curvature.prepare(trainable, evaluation), None
        if curvature_batch is not None:
            apart = self._evaluation(curvature_batch, frozen, state.model_state, keys)
            curvature.check(trainable, apart)
            apart = curvature.prepare(trainable, apart)
        own = apart is None and gradient is None
        plan = choose_solver(self.assembly, trainable, apart or evaluation, own_gradient=own)
        warn_of_expense(self.assembly, plan, trainable, apart or evaluation)
        return propose(self.assembly, plan, trainable, Problem(evaluation, apart, gradient, keys.estimator), state)

    def _check_state(self, state: MethodState, like: PyTree) -> None:
        """Raises ValueError for a state of another method, or of one whose transform, solver, ... were exchanged.

        Args:
          state: what is looked at.
          like: shapes of upcast vectors over the trainable parameters.
        """
        assembly = self.assembly
        check_part("damping", state.damping, jax.eval_shape(assembly.damping.init))
        check_part("solver", state.solver, jax.eval_shape(assembly.solver.init, like))
        check_part("transform", state.transform, jax.eval_shape(assembly.transform.init, like))
        preconditioner = assembly.preconditioner
        if not isinstance(preconditioner, BlockPreconditioner):
            expected = jax.eval_shape(preconditioner.init, like)
        elif hasattr(state.preconditioner, "blocks"):
            expected = jax.eval_shape(lambda: preconditioner.init_blocks(state.preconditioner.blocks))
        else:
            expected = None
        check_part("preconditioner", state.preconditioner, expected)
        if (state.last is not None) != self._takes_unseen_steps or (state.model_state is None) == (
            assembly.curvature.has_state
        ):
            raise ValueError(
                "the state was made by another method: pass what this method's init or its last step returned."
            )

    def plan_for(self, params: PyTree, batch: Any, *, model_state: PyTree = None) -> Plan:
        """The plan for these shapes, with costs; nothing is computed.

        Args:
          params, batch: arrays or `jax.ShapeDtypeStruct`s.
          model_state: as for `init`.
        """
        trainable, frozen = self.assembly.partition.split(params)
        keys = _Keys.of(jax.random.key(0), jnp.zeros((), jnp.int32))
        evaluation = self._evaluation(batch, frozen, model_state, keys)
        self.assembly.curvature.check(trainable, evaluation)
        evaluation = dataclasses.replace(evaluation, batch=_shapes(batch))
        evaluation = self.assembly.curvature.prepare(trainable, evaluation)
        return plan_for_shapes(self.assembly, trainable, evaluation)

    def _evaluation(self, batch: Any, frozen: PyTree, model_state: PyTree, keys: _Keys) -> Evaluation:
        curvature = self.assembly.curvature
        return Evaluation(
            batch=batch,
            frozen=frozen,
            model_state=model_state,
            model_key=keys.model if curvature.needs_model_key else None,
            sample_key=keys.sample if curvature.is_random else None,
        )


def _shapes(batch: Any) -> Any:
    return jax.eval_shape(lambda: batch)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The independent keys of one step.

    The estimator's is made where it is called for: inside the branch of a refresh, so that no other step spends some
    thirty small operations on it.
    """

    model: jax.Array | None
    sample: jax.Array | None
    estimator: Callable[[], jax.Array] | None

    @staticmethod
    def of(rng: jax.Array | None, step: jax.Array) -> _Keys:
        if rng is None:
            return _Keys(None, None, None)
        check_key("rng", rng)
        model, sample, _ = jax.random.split(jax.random.fold_in(rng, step), 3)
        return _Keys(model, sample, lambda: jax.random.split(jax.random.fold_in(rng, step), 3)[2])
