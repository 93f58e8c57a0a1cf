"""What the parts of a step pass to one another: the context, the point, the attempt, the proposal.

    StepContext   settled before the step: modules, plan, parameters, batches, state
        |  linearize, refresh
    Point         known at the parameters: loss, gradient, products, lam, preconditioner
        |  solve, transform, evaluate; or all of it in one pass
    Attempt       what the step comes to, and whether it is taken
        |  bookkeeping
    Proposal      parameters, update, next state and info

Proposals and their `StepInputs` are those of every method; the others belong to the step of one linear system.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from curvax.curvature import Evaluation, Linearization
from curvax.damping import Outcome
from curvax.execute.state import AbstractState, LastStep, MethodState
from curvax.kernels import Choice
from curvax.plan import Assembly, Plan, kernel_choices
from curvax.search import Searched
from curvax.solvers import Solution
from curvax.tree import PyTree

StateT = TypeVar("StateT", bound=AbstractState)


@dataclasses.dataclass(frozen=True)
class StepInputs(Generic[StateT]):
    """The arguments of a step of any method, checked.

    Attributes:
      trainable, frozen: the parameters, split by the method's partition.
      batch: the batch of loss and gradient.
      state: the state before the step.
      rng: random key, or `None`.
      curvature_batch: the batch of the curvature, or `None` for the same one.
      search_batch: the batch that a search for the step size looks at, or `None` for the same one.
      gradient: a gradient from outside, or `None` to take the batch's own.
    """

    trainable: PyTree
    frozen: PyTree
    batch: Any
    state: StateT
    rng: jax.Array | None = None
    curvature_batch: Any = None
    search_batch: Any = None
    gradient: PyTree | None = None


@dataclasses.dataclass(frozen=True)
class Proposal(Generic[StateT]):
    """What a step comes to.

    Attributes:
      params: trainable parameters after the step: the old ones if it was not taken, and those before the last step
        where that one is undone.
      update: the update that was applied, in the accumulation dtype; zero if the step was not taken.
      state: the next state.
      info: the chosen metrics, and "aux" if the model returns one.
    """

    params: PyTree
    update: PyTree
    state: StateT
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a step works on.

    Attributes:
      evaluation: the batch of gradient and loss, with everything the model needs.
      curvature_evaluation: the batch of the curvature, or `None` for the same one.
      search_evaluation: the batch of the search for the step size, or `None` for the same one.
      gradient: a gradient from outside, or `None` to take the batch's own.
      key: makes the random key of this step's estimators; `None` where there is no randomness.
    """

    evaluation: Evaluation
    curvature_evaluation: Evaluation | None = None
    search_evaluation: Evaluation | None = None
    gradient: PyTree | None = None
    key: Callable[[], jax.Array] | None = None

    @property
    def curvature_batch(self) -> Evaluation:
        """The batch that the curvature is taken on."""
        return self.curvature_evaluation or self.evaluation


@dataclasses.dataclass(frozen=True)
class StepContext:
    """Everything that is settled before a step begins.

    Attributes:
      assembly: the modules, with the implementations of their ops chosen.
      plan: the plan for these shapes.
      choices: implementation of each op.
      params: trainable parameters.
      problem: what the step works on.
      state: the state before the step.
    """

    assembly: Assembly
    plan: Plan
    choices: dict[str, Choice]
    params: PyTree
    problem: Problem
    state: MethodState

    @staticmethod
    def of(assembly: Assembly, plan: Plan, params: PyTree, problem: Problem, state: MethodState) -> StepContext:
        """With the implementations of all ops chosen."""
        choices = {c.op: c for c in kernel_choices(assembly, plan, params, problem.curvature_batch)}
        chosen = dataclasses.replace(
            assembly,
            curvature=assembly.curvature.with_kernels(choices),
            preconditioner=assembly.preconditioner.with_kernels(choices),
        )
        return StepContext(chosen, plan, choices, params, problem, state)


class Start(NamedTuple):
    """Where a step begins, with the last one judged.

    Attributes:
      params: the trainable parameters, or those before the last step if that one is undone.
      before: the parameters to which the next step may go back; `None` where nothing is kept for that.
      undone: whether the last step is taken back.
      undecided: whether it led astray as far as anyone knows, on a batch that cannot tell.
    """

    params: PyTree
    before: PyTree | None
    undone: jax.Array
    undecided: jax.Array

    def last(self, unseen: jax.Array) -> LastStep | None:
        """The next state.

        Args:
          unseen: whether this step is taken without a look at the loss behind it.
        """
        return None if self.before is None else LastStep(self.before, unseen | self.undecided)


@dataclasses.dataclass(frozen=True)
class Point:
    """What is known at the parameters of a step.

    Attributes:
      at, curved: linearizations on the batches of the gradient and of the curvature; one and the same if the batches
        are.
      gradient: upcast.
      lam: damping.
      damping: state of its policy, begun if this is the first step.
      scaling: state of its scaling, refreshed where that was due.
      root: D^(1/2) of the damping lam D; `None` for the identity.
      preconditioner: its state, refreshed where that was due.
      start: where the step begins: at the parameters, or back at those before the last step.
    """

    at: Linearization
    curved: Linearization
    gradient: PyTree
    lam: jax.Array
    damping: Any
    scaling: Any
    root: PyTree | None
    preconditioner: Any
    start: Start


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What a step comes to, before its bookkeeping.

    Attributes:
      params: trainable parameters after the step, the old ones if it was not taken.
      applied: what was added to the parameters, upcast.
      proposed: what the transform made of the direction, taken or not; `None` where the step ran in one pass, which
        shows neither direction nor update.
      lam: the damping of the step.
      solution: how the linear solve went.
      outcome: what the damping gets to see.
      accepted: whether the step is taken.
      damping, solver, transform, search, last: next states of the modules.
      length: how far the search went; `None` without one.
    """

    params: PyTree
    applied: PyTree
    proposed: PyTree | None
    lam: jax.Array
    solution: Solution
    outcome: Outcome
    accepted: jax.Array
    damping: Any
    solver: Any
    transform: Any
    search: jax.Array | None
    last: LastStep | None
    length: Searched | None
