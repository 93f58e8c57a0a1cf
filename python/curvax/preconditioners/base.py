"""What a preconditioner is."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax

from curvax import tree
from curvax.curvature import Curvature, Evaluation, Linearization
from curvax.kernels._dispatch import Choice, Op, Request, caller_level
from curvax.preconditioners.denominators import Denominator
from curvax.requirements import Cadence, Part, Requirement
from curvax.structure.block_rules import BlockRule, ruled
from curvax.structure.blocks import KroneckerBlocks
from curvax.tree import PyTree
from curvax.work import Cost, StepWork

State = TypeVar("State")


class EntrywiseInverse(Protocol):
    """P^-1 v = v / denominator(average * correction), entry by entry, as the op `diagonal_update` computes it.

    Its state has the fields of an `EmaDiagonalState`.
    """

    @property
    def denominator(self) -> Denominator:
        """How the diagonal becomes a denominator."""
        ...

    def correction(self, count: jax.Array) -> jax.Array:
        """The factor from the average of `count` estimates to their mean."""
        ...


class Preconditioner(abc.ABC):
    """P^-1, an approximate inverse of C + lam I for a symmetric curvature C.

    `refresh` looks at C and is what a cadence gates; `apply` is what solvers and the diagonal lane call, and is
    linear in `v`, symmetric and positive definite for every state that `init` and `refresh` give. A state is a
    registered dataclass of fixed shapes and (upcast) dtypes, so it can be carried through `jax.lax.scan`; its
    `rejected` counts the refreshes that came out non-finite and left the rest of the state as it was. Rescaling C and
    lam by one factor rescales P^-1 by a constant at most.

    An implementor is a frozen dataclass. It must say what `refresh` reads of a linearization (`needs_product`,
    `needs_sampling`; `needs_rows` and `needs_factors` where it does) and write `init`, `refresh` and `apply`. The rest
    is what the planner asks, with defaults: `refresh_cost` counts a trace of `refresh` unless a formula is given,
    `requirements` is one refresh every `every` steps, `kernels` and `with_kernels` are for those that call ops.

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

    @property
    def needs_factors(self) -> bool:
        """Whether `refresh` calls `linearization.layer_factors`."""
        return False

    @property
    def is_identity(self) -> bool:
        """Whether P^-1 v = v whatever happens, so that it may be left out."""
        return False

    @property
    def entrywise(self) -> EntrywiseInverse | None:
        """The quotient that it is, for the op `diagonal_update`; `None` (default) if it is of another kind."""
        return None

    def requirements(self) -> tuple[Requirement, ...]:
        """The parts of a step that it asks for, with their cadences: a refresh every `every` steps."""
        return (Requirement(Part.REFRESH, Cadence((self.every,)), type(self).__name__),)

    def refresh_cost(self, work: StepWork) -> Cost:
        """Predicted work of one refresh in a step of which so much is counted; by default its own trace is counted."""
        return work.refresh

    def init_on(self, curvature: Curvature, params: PyTree, evaluation: Evaluation) -> Any:
        """`init` for who has a batch; only shapes enter."""
        del curvature, evaluation
        return self.init(jax.eval_shape(tree.upcast, params))

    def expected(self, state: Any, params_like: PyTree) -> Any:
        """The shapes of a state of this preconditioner; `None` if `state` is none that could be one."""
        del state
        return jax.eval_shape(self.init, params_like)

    def describe(self, state: Any, names: Sequence[str]) -> tuple[str, ...]:
        """Lines for the plan that follow from a state's shapes; `names` are those of the parameter leaves."""
        del state, names
        return ()

    def warn(self, state: Any, names: Sequence[str]) -> None:
        """Warns of what a first state shows to be worse than it might be; `names` as for `describe`."""
        del state, names

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
    before = dataclasses.replace(state, rejected=state.rejected + 1)  # type: ignore[type-var]
    return tree.where(tree.all_finite(refreshed), refreshed, before)


class BlockPreconditioner(Preconditioner):
    """A preconditioner whose state follows the blocks of a model (`curvax.structure.blocks`).

    Which blocks there are depends on how the parameters enter the model, which shapes of parameters alone do not tell:
    the state is made by `init_blocks` from what `Curvature.blocks` returns for the shapes of one batch. `refresh` calls
    `linearization.layer_factors`. An implementor writes `init_blocks`, `refresh` and `apply`.
    """

    @property
    def needs_product(self) -> bool:
        """False."""
        return False

    @property
    def needs_sampling(self) -> bool:
        """False: targets are sampled by `layer_factors`."""
        return False

    @property
    def needs_factors(self) -> bool:
        """True."""
        return True

    @property
    def blocks(self) -> tuple[BlockRule, ...]:
        """Rules for the kinds of blocks; none, unless a field of that name has some."""
        return ()

    def init_on(self, curvature: Curvature, params: PyTree, evaluation: Evaluation) -> Any:
        """`init_blocks` on the blocks of the curvature, of the kinds that the rules say."""
        return self.init_blocks(ruled(curvature.blocks(params, evaluation), self.blocks, tree.places(params)))

    def expected(self, state: Any, params_like: PyTree) -> Any:
        """Of the blocks that the state says it serves."""
        del params_like
        return jax.eval_shape(lambda: self.init_blocks(state.blocks)) if hasattr(state, "blocks") else None

    def describe(self, state: Any, names: Sequence[str]) -> tuple[str, ...]:
        """A line per block, and what factors leave out."""
        lines = tuple(f"block of {line}" for line in state.blocks.describe(names))
        count = state.blocks.statistics
        if not count:
            return lines
        many = "a statistic" if count == 1 else f"{count} statistics"
        return (*lines, f"factors take {many} over the examples as constants: sums that the model makes of its batch")

    def warn(self, state: Any, names: Sequence[str]) -> None:
        """Of weights that keep a diagonal because of how the model uses them."""
        lost = [f"{names[block.leaf]} ({block.reason})" for block in state.blocks.diagonal if block.lost]
        if lost:
            # Python shows a warning with the same words once.
            warnings.warn(
                f"no Kronecker factors, but a diagonal, for {', '.join(lost)}: use each in one way that "
                "docs/structure.md lists, in all branches alike, if it is the weight of a layer.",
                UserWarning,
                stacklevel=caller_level(),
            )

    def init(self, params_like: PyTree) -> Any:
        """Raises: the blocks are not known here."""
        raise ValueError(f"{type(self).__name__} keeps a state per block of the model: make it with init_blocks, as "
                         "method.init(params, batch=batch) does.")  # fmt: skip

    @abc.abstractmethod
    def init_blocks(self, blocks: KroneckerBlocks) -> Any:
        """The state before any refresh; its field `blocks` has those that it serves."""

    @abc.abstractmethod
    def refresh(self, state: Any, linearization: Linearization, key: jax.Array, lam: jax.Array | float = 0.0) -> Any:
        """The state after another look at C; `lam` is the damping of the step, for inverses that are made at one."""
