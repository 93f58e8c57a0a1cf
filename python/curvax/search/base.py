"""What a search along an update is: it chooses a step size, and 0 refuses the step.

    update d --search--> step size a --> parameters + a d

A search knows nothing of models: it gets a `Line`, the loss as a function of the step size.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax.loops import for_loop_body
from curvax.requirements import Cadence, Part, Requirement


@dataclasses.dataclass(frozen=True)
class Line:
    """An update d as seen from the parameters.

    Attributes:
      loss_at: step size -> loss there, scalars; may be vmapped. On the data of the search.
      loss: the loss at step size 0 on the same data, or `None` where nobody has evaluated it yet.
      dtype: of losses and step sizes.
      slope: () -> g.d with the gradient g of the step's batch; negative where d descends. An inner loop has none.
      bend: () -> d.Cd + lam d.d, the damped curvature along d; only for a search with `needs_product`.
      rounding: () -> how far rounding alone may move a difference of two losses, or `None` to call any rise a rise.
    """

    loss_at: Callable[[jax.Array], jax.Array]
    loss: jax.Array | None
    dtype: jax.typing.DTypeLike
    slope: Callable[[], jax.Array] | None = None
    bend: Callable[[], jax.Array] | None = None
    rounding: Callable[[], jax.Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Searched:
    """What a search found. All scalars.

    Attributes:
      step_size: 0 where no step size will do.
      before: loss at step size 0 on the data of the search; NaN for a search that evaluates none.
      after: loss at `step_size`, at the largest step size tried if none will do; NaN likewise.
    """

    step_size: jax.Array
    before: jax.Array
    after: jax.Array


class StepSearch(abc.ABC):
    """How far to go along an update, and whether to go at all.

    An implementor is a frozen dataclass. It must say `name` and `evaluations` and write `find`, a pure function.

    Attributes:
      every: every how many steps it searches; steps between take the last step size that it found.
      chunk: step sizes evaluated at once, each with its own copy of the parameters and of the activations; `None` lets
        the planner take as many as fit into memory.
      needs_product: whether it reads `Line.bend`, one curvature product.
      takes_first: whether it begins with the full step and takes the first step size that will do, so that a smaller
        one says that the full step would not.
    """

    every: int = 1
    chunk: int | None = None
    needs_product: bool = False
    takes_first: bool = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The search's name in the plan."""

    @property
    @abc.abstractmethod
    def evaluations(self) -> int:
        """Most losses that one search evaluates; 0 for one that looks at no loss."""

    @abc.abstractmethod
    def find(self, line: Line) -> Searched:
        """The step size along this line."""

    def with_chunk(self, chunk: int | None) -> StepSearch:
        """The same search with so many step sizes at once, for one that evaluates losses."""
        del chunk
        return self

    def requirements(self) -> tuple[Requirement, ...]:
        """The parts of a step that it asks for."""
        return (Requirement(Part.SEARCH, Cadence((self.every,)), self.name),)


def check_counts(owner: str, **counts: int | None) -> None:
    """Raises ValueError for a count below 1; `None` is none."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} of a {owner} must be at least 1, not {value}.")


def losses_at(loss_at: Callable[[jax.Array], jax.Array], sizes: jax.Array, chunk: int | None) -> jax.Array:
    """The loss at each step size (n,), `chunk` of them at once; infinite where it is no finite number.

    A loss of minus infinity is no better than one of plus infinity or NaN.
    """
    if chunk is None or chunk >= sizes.size:
        losses = jax.vmap(loss_at)(sizes)
    else:
        losses = jax.lax.map(for_loop_body(loss_at), sizes, batch_size=chunk if chunk > 1 else None)
    return jnp.where(jnp.isfinite(losses), losses, jnp.inf)


def slope_of(line: Line, owner: str) -> jax.Array:
    """g.d. Raises ValueError for a line without."""
    if line.slope is None:
        raise ValueError(f"{owner} needs the slope of the loss along the update, and this line has none.")
    return line.slope()


def at_its_floor(line: Line, before: jax.Array, full: jax.Array) -> jax.Array:
    """Whether the full step changes the loss by no more than rounding: then it is no reason to refuse a step."""
    if line.rounding is None:
        return jnp.asarray(False)
    return jnp.isfinite(before) & (full - before <= line.rounding())
