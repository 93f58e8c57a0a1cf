"""The state of a method: everything that a step carries beside the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.origin import Origin, check_parts
from curvax.state_version import STATE_VERSION, check_state_version
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Place, shape and dtype of every trainable parameter that a state was made for.

    A state of no parameters stands for any: `optax.tree.map_params` makes one and lays it over the state that it maps.
    """

    leaves: tuple[tuple[str, tuple[int, ...], str], ...]

    @staticmethod
    def of(params: PyTree) -> Layout:
        """The layout of a parameter tree."""
        leaves = zip(tree.places(params), jax.tree.leaves(params), strict=True)
        return Layout(tuple((place, tuple(x.shape), str(x.dtype)) for place, x in leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (not self.leaves or not other.leaves or self.leaves == other.leaves)

    def __hash__(self) -> int:
        return hash(Layout)

    def check(self, params: PyTree) -> None:
        """Raises ValueError if `params` are laid out differently."""
        other = Layout.of(params)
        mine, theirs = ([place for place, *_ in layout.leaves] for layout in (self, other))
        if mine != theirs:
            places = sorted(set(mine) ^ set(theirs)) or mine
            raise ValueError(
                "the parameters have another tree structure than those the state was made for (not in both: "
                f"{', '.join(places[:4])}): call init again, or pass the matching state."
            )
        for (place, shape, dtype), (_, new_shape, new_dtype) in zip(self.leaves, other.leaves, strict=True):
            if (shape, dtype) != (new_shape, new_dtype):
                raise ValueError(
                    f"parameter {place or '(the only leaf)'} is {new_dtype}{list(new_shape)}, but the state was made "
                    f"for {dtype}{list(shape)}: call init again."
                )


class AbstractState:
    """What the states of all methods have in common; each is a registered dataclass with these fields and its own.

    Attributes:
      step: steps so far, int32.
      rejected: steps not taken so far, int32.
      model_state: mutable model state (BatchNorm statistics), or `None`.
      layout: what parameters the state belongs to; static.
      origin: what modules made it; static.
      version: of the form of the state, `curvax.state_version.STATE_VERSION`; static.
    """

    step: jax.Array
    rejected: jax.Array
    model_state: PyTree
    layout: Layout
    origin: Origin
    version: int

    def check(self, params: PyTree, origin: Origin) -> None:
        """Raises ValueError for a state of another version, of other modules, or of other parameters.

        Args:
          params: the trainable parameters of the step.
          origin: its modules.
        """
        check_state_version(type(self).__name__, self.version)
        self.layout.check(params)
        self.origin.check(origin)

    @property
    def stamp(self) -> dict[str, str]:
        """What static fields say, for checkpointers that store leaves alone: texts by name, as JSON takes them."""
        return {"version": str(self.version), **dict(self.origin.parts)}

    def check_stamp(self, stamp: Mapping[str, str]) -> None:
        """Raises ValueError unless `stamp`, stored beside leaves, is that of a state like this one."""
        saved, own = dict(stamp), self.stamp
        version = saved.get("version")
        if version != own["version"]:
            check_state_version(type(self).__name__, version)
        check_parts(saved, own)

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Unpickles; a state of another version may lack fields, so it is refused here already."""
        check_state_version(type(self).__name__, fields.get("version"))
        self.__dict__.update(fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastStep:
    """The last step, as far as it takes to undo it.

    Attributes:
      before: the trainable parameters before it; zeros until there was a step.
      unseen: it was taken without a look at the loss behind it.
    """

    before: PyTree
    unseen: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MethodState(AbstractState):
    """State of a method; a pytree of arrays with fixed shapes and dtypes, so any checkpointer can store it.

    Attributes:
      step, rejected: steps so far, and those of them that were not taken, int32.
      damping, preconditioner, solver, transform: the modules' states.
      scaling: that of the damping's scaling; () without one.
      model_state: mutable model state (BatchNorm statistics), or `None`.
      search: last step size of a search that does not run in every step; `None` without one.
      last: the last step, for methods that take steps without a look at the loss after them; `None` for others.
      layout: what parameters the state belongs to; static.
      origin: what modules made it; static.
      version: of the form of the state; static.
    """

    step: jax.Array
    rejected: jax.Array
    damping: Any
    preconditioner: Any
    solver: Any
    transform: Any
    scaling: Any
    search: jax.Array | None
    model_state: PyTree
    last: LastStep | None
    layout: Layout = dataclasses.field(metadata={"static": True})
    origin: Origin = dataclasses.field(metadata={"static": True})
    version: int = dataclasses.field(default=STATE_VERSION, metadata={"static": True})

    @property
    def stamp(self) -> dict[str, str]:
        """With a digest of the layers that a preconditioner by layers was made for."""
        blocks = getattr(self.preconditioner, "blocks", None)
        layers = {} if blocks is None else {"layers": blocks.digest}
        return super().stamp | layers


def check_part(name: str, state: Any, expected: Any) -> None:
    """Raises ValueError for a module's state that is another module's.

    Args:
      name: of the module, as the user set it.
      state: the state's part.
      expected: what the module's `init` returns, or its shapes.
    """
    if tree.places(state) == tree.places(expected):
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        if all(tuple(jnp.shape(a)) == tuple(b.shape) for a, b in pairs):
            return
    raise ValueError(
        f"the state's {name} part was made by another method: pass what this method's init or its last step returned."
    )


def upcast_shapes(params: PyTree) -> PyTree:
    """Shapes of upcast vectors over `params`."""
    return jax.eval_shape(tree.upcast, params)
