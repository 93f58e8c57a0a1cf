"""What minimizes the inner problem: an Optax optimizer, one update per minibatch, or conjugate gradients."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.curvature import Evaluation
from curvax.layerwise.blocks import ParameterBlocks
from curvax.layerwise.quadratic import InnerProblem
from curvax.result import Result, code
from curvax.solvers import CG
from curvax.solvers.base import System, TreeSpace
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InnerUpdate:
    """What one minibatch changes.

    Attributes:
      delta: theta - theta0, in the accumulation dtype.
      state: the inner solver's state.
      loss: at theta0, on the minibatch.
      model_state: the model's new state.
      result, iterations, residual: how a linear solve ended; CONVERGED, 1 and 0 for an optimizer's update.
    """

    delta: PyTree
    state: Any
    loss: jax.Array
    model_state: PyTree
    result: jax.Array
    iterations: jax.Array
    residual: jax.Array


class InnerSolver(abc.ABC):
    """Turns one minibatch into a better delta.

    An implementor is a frozen dataclass that writes every abstract member below; its state has fixed shapes.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The solver's name in the plan."""

    @property
    @abc.abstractmethod
    def reports(self) -> bool:
        """Whether result, iterations and residual of its updates mean something."""

    @abc.abstractmethod
    def init(self, params: PyTree) -> Any:
        """State for these upcast parameters."""

    @abc.abstractmethod
    def update(
        self,
        problem: InnerProblem,
        params: PyTree,
        delta: PyTree,
        state: Any,
        index: jax.Array,
        evaluation: Evaluation,
    ) -> InnerUpdate:
        """One minibatch.

        Args:
          problem: the inner problem.
          params: theta0, trainable, in its own dtypes.
          delta: theta - theta0, in the accumulation dtype.
          state: own state.
          index: of the minibatch within the step, int32.
          evaluation: the minibatch.
        """


@dataclasses.dataclass(frozen=True)
class Optimizer(InnerSolver):
    """An Optax optimizer: one update per minibatch, at the gradient of that minibatch's inner problem.

    Attributes:
      transform: the optimizer. It sees upcast parameters theta = theta0 + delta and its state is never reset.
      schedule: index of the minibatch within the step -> factor on the update.
      clip_norm: bound on the Euclidean norm of each block's gradient (of the whole gradient if there is one block), or
        `None`.
    """

    transform: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    clip_norm: float | None = None

    @property
    def name(self) -> str:
        return "optax" + ("" if self.clip_norm is None else f", blocks clipped to norm {self.clip_norm:g}")

    @property
    def reports(self) -> bool:
        return False

    def init(self, params: PyTree) -> Any:
        return self.transform.init(params)

    def update(
        self,
        problem: InnerProblem,
        params: PyTree,
        delta: PyTree,
        state: Any,
        index: jax.Array,
        evaluation: Evaluation,
    ) -> InnerUpdate:
        loss, gradient, model_state = problem.gradient(params, delta, evaluation)
        if self.clip_norm is not None:
            gradient = clip_blocks(problem.blocks(params), gradient, self.clip_norm)
        theta = jax.tree.map(lambda p, d: p.astype(d.dtype) + d, params, delta)
        # Optax's Adam raises a float to an integer count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = self.transform.update(gradient, state, theta)
            factor = jnp.asarray(self.schedule(index))
        delta = jax.tree.map(lambda d, u: d + factor.astype(d.dtype) * u.astype(d.dtype), delta, updates)
        # Not NaN: a carry of the streaming form has to pass jax_debug_nans.
        unsolved = jnp.zeros((), loss.dtype)
        return InnerUpdate(delta, state, loss, model_state, code(Result.CONVERGED), jnp.asarray(1, jnp.int32), unsolved)


def clip_blocks(blocks: ParameterBlocks, gradient: PyTree, bound: float) -> PyTree:
    """`gradient` with every block whose norm is above `bound` scaled back to it."""
    norms = blocks.norms(gradient)
    limit = jnp.asarray(bound, norms.dtype)
    return blocks.scale(jnp.where(norms > limit, limit / jnp.where(norms > limit, norms, limit), 1), gradient)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamSquares:
    """Adam's second moment: average of squared gradients and its number of terms."""

    average: PyTree
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class ConjugateGradients(InnerSolver):
    """Solves the minibatch's quadratic by conjugate gradients: one linearization serves all iterations.

    The system is (mix G + (1 - mix) / eta D + lam I) delta = -g with D = sqrt(v) + eps, v Adam's bias-corrected second
    moment, and D^-1 is its preconditioner: mix 0 is an Adam step of rate eta, mix 1 the Gauss-Newton step. With blocks
    G is block diagonal, and one iteration runs on all blocks together.

    Attributes:
      solver: tolerance 1e-5 and at most 100 iterations. Its `warm_start` is not used: the previous step's solution is
        the start where the method has `warm_start`.
      mix: weight of the curvature, in [0, 1].
      eta: learning rate of the Adam step that `mix` blends with.
      lam: damping in units of the curvature.
      beta2: decay of v.
      eps: D's floor, relative to the mean of sqrt(v), so that the scale of the loss does not matter.

    Raises:
      ValueError: a number out of range.
    """

    solver: CG = CG(tol=1e-5, maxiter=100)
    mix: float = 1.0
    eta: float = 1e-3
    lam: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must be between 0 and 1, not {self.mix}.")
        if not self.eta > 0:
            raise ValueError(f"eta must be positive, not {self.eta}.")
        if not self.lam >= 0:
            raise ValueError(f"lam must not be negative, but is {self.lam}.")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be in [0, 1), not {self.beta2}.")

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def reports(self) -> bool:
        return True

    def init(self, params: PyTree) -> AdamSquares | tuple[()]:
        if self.mix == 1:
            return ()
        return AdamSquares(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(
        self,
        problem: InnerProblem,
        params: PyTree,
        delta: PyTree,
        state: Any,
        index: jax.Array,
        evaluation: Evaluation,
    ) -> InnerUpdate:
        at = problem.system(params, evaluation)
        gradient = at.start()
        system = System(at.product)
        if isinstance(state, AdamSquares):
            state = self._averaged(state, gradient)
            system = self._blended(at.product, self._diagonal(state))
        minus = jax.tree.map(jnp.negative, gradient)
        solution = self.solver.iterate(system, minus, delta, jnp.asarray(self.lam, at.loss.dtype))
        how = solution.result, solution.iterations, solution.residual
        return InnerUpdate(solution.value, state, at.loss, at.model_state, *how)

    def _averaged(self, state: AdamSquares, gradient: PyTree) -> AdamSquares:
        average = jax.tree.map(lambda v, g: self.beta2 * v + (1 - self.beta2) * g * g, state.average, gradient)
        return AdamSquares(average, state.count + 1)

    def _diagonal(self, state: AdamSquares) -> PyTree:
        """D, positive everywhere: where no gradient has come yet at all it is 1."""
        dtype = tree.scalar_dtype(state.average)
        correction = 1 - jnp.asarray(self.beta2, dtype) ** state.count.astype(dtype)
        roots = jax.tree.map(lambda v: jnp.sqrt(v / correction.astype(v.dtype)), state.average)
        mean = sum((jnp.sum(r).astype(dtype) for r in jax.tree.leaves(roots)), jnp.zeros((), dtype)) / tree.size(roots)
        floor = jnp.where(mean > 0, self.eps * mean, jnp.ones_like(mean))
        return jax.tree.map(lambda r: r + floor.astype(r.dtype), roots)

    def _blended(self, product: Any, diagonal: PyTree) -> System:
        weight = (1 - self.mix) / self.eta

        def apply(v: PyTree) -> PyTree:
            return jax.tree.map(lambda c, d, x: self.mix * c + weight * d * x, product(v), diagonal, v)

        def precondition(v: PyTree) -> PyTree:
            return jax.tree.map(jnp.divide, v, diagonal)

        return System(apply, TreeSpace(), precondition)
