"""What a preconditioner is."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from curvax import tree
from curvax.curvature import Linearization
from curvax.kernels._dispatch import Choice, Op, Request
from curvax.structure.blocks import KroneckerBlocks
from curvax.tree import PyTree

State = TypeVar("State")


class Preconditioner(abc.ABC):
    """P^-1, an approximate inverse of C + lam I for a symmetric curvature C.

    `refresh` looks at C and is what a cadence gates; `apply` is what solvers and the diagonal lane call, and is
    linear in `v`, symmetric and positive definite for every state that `init` and `refresh` give. A state is a
    registered dataclass of fixed shapes and (upcast) dtypes, so it can be carried through `jax.lax.scan`; its
    `rejected` counts the refreshes that came out non-finite and left the rest of the state as it was. Rescaling C and
    lam by one factor rescales P^-1 by a constant at most.

    Attributes:
      every: number of steps from one refresh to the next; 1 refreshes on each step.
    """

    every: int

    @property
    @abc.abstractmethod
    def needs_product(self) -> bool:
        """Whether `refresh` calls `linearization.product`."""

    @property
    @abc.abstractmethod
    def needs_sampling(self) -> bool:
        """Whether `refresh` calls `linearization.sampled_gradient`."""

    @property
    def needs_rows(self) -> bool:
        """Whether `refresh` reads `linearization.rows`."""
        return False

    @abc.abstractmethod
    def init(self, params_like: PyTree) -> Any:
        """The state before any refresh, for parameters (arrays or `jax.ShapeDtypeStruct`s) of any floating dtypes."""

    @abc.abstractmethod
    def refresh(self, state: Any, linearization: Linearization, key: jax.Array) -> Any:
        """The state after another look at C; `key` is the only source of randomness."""

    @abc.abstractmethod
    def apply(self, state: Any, lam: jax.Array | float, v: PyTree) -> PyTree:
        """P^-1 v, with the shapes and dtypes of `v`; `lam` is a non-negative scalar."""

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The ops that a refresh calls for upcast parameters of these shapes, and what it asks of them."""
        del upcast
        return ()

    def with_kernels(self, choices: Mapping[str, Choice]) -> Preconditioner:
        """The same preconditioner with the planner's choices for its ops, by name."""
        del choices
        return self


def accept_finite(state: State, refreshed: State) -> State:
    """`refreshed` if all of it is finite, else `state` with one more in its count `rejected`, leaf by leaf."""
    kept = dataclasses.replace(state, rejected=state.rejected + 1)  # type: ignore[type-var]
    return tree.where(tree.all_finite(refreshed), refreshed, kept)


class BlockPreconditioner(Preconditioner):
    """A preconditioner whose state follows the blocks of a model (`curvax.structure.blocks`).

    Which blocks there are depends on how the parameters enter the model, which shapes of parameters alone do not tell:
    the state is made by `init_blocks` from what `Curvature.blocks` finds with the shapes of one batch. `refresh` calls
    `linearization.layer_factors`.
    """

    @property
    def needs_product(self) -> bool:
        """False."""
        return False

    @property
    def needs_sampling(self) -> bool:
        """False: targets are sampled by `layer_factors`."""
        return False

    def init(self, params_like: PyTree) -> Any:
        """Raises: the blocks are not known here."""
        raise ValueError(f"{type(self).__name__} keeps a state per block of the model: make it with init_blocks, as "
                         "method.init(params, batch=batch) does.")  # fmt: skip

    @abc.abstractmethod
    def init_blocks(self, blocks: KroneckerBlocks) -> Any:
        """The state before any refresh; its `blocks` are those that it holds."""

    @abc.abstractmethod
    def refresh(self, state: Any, linearization: Linearization, key: jax.Array, lam: jax.Array | float = 0.0) -> Any:
        """The state after another look at C; `lam` is the damping of the step, for inverses that hold it fixed."""
