"""Equations that only rearrange or scale the entries of an array: how they act, and their adjoints.

On its way from the parameter tree to the product that multiplies with it, a leaf is reshaped, transposed, sliced, cast,
scaled, or put beside others: of `concatenate [W V]` each is an array with zeros in the place of the other. The gradient
of the leaf is that of the product's operand, sent back through the adjoints of these maps in reverse order. Casts
between floating dtypes are left out: gradients stay in the accumulation dtype that they are made in.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

_RESHAPING = frozenset("reshape squeeze expand_dims broadcast_in_dim".split())
_NOTHING = frozenset("convert_element_type copy copy_p name reduce_precision pvary".split())


class View(abc.ABC):
    """A linear map of arrays that moves, leaves out or scales entries."""

    @abc.abstractmethod
    def __call__(self, x: Any) -> Any:
        """The map, for NumPy and JAX arrays alike."""

    @abc.abstractmethod
    def adjoint(self, x: jax.Array) -> jax.Array:
        """Its adjoint."""

    @property
    def box(self) -> tuple[tuple[int, int, int], ...] | None:
        """(start, limit, stride) per axis of the entries that it keeps; `None` for all of them."""
        return None


@dataclasses.dataclass(frozen=True)
class Reshape(View):
    """A change of shape."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __call__(self, x: Any) -> Any:
        return x.reshape(self.after)

    def adjoint(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.before)


@dataclasses.dataclass(frozen=True)
class Transpose(View):
    """A permutation of axes."""

    permutation: tuple[int, ...]

    def __call__(self, x: Any) -> Any:
        return x.transpose(self.permutation)

    def adjoint(self, x: jax.Array) -> jax.Array:
        return x.transpose(tuple(int(i) for i in np.argsort(self.permutation)))


@dataclasses.dataclass(frozen=True)
class Reverse(View):
    """Axes run backwards."""

    axes: tuple[int, ...]

    def __call__(self, x: Any) -> Any:
        return x[tuple(slice(None, None, -1) if i in self.axes else slice(None) for i in range(x.ndim))]

    def adjoint(self, x: jax.Array) -> jax.Array:
        return self(x)


@dataclasses.dataclass(frozen=True)
class Slice(View):
    """A part of every axis."""

    before: tuple[int, ...]
    starts: tuple[int, ...]
    limits: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, x: Any) -> Any:
        return x[self._index]

    def adjoint(self, x: jax.Array) -> jax.Array:
        return self.replaced(jnp.zeros(self.before, x.dtype), x)

    def replaced(self, x: jax.Array, part: jax.Array) -> jax.Array:
        """An array with another part in its place."""
        if all(stride == 1 for stride in self.strides):
            return jax.lax.dynamic_update_slice(x, part, self.starts)
        return x.at[self._index].set(part)

    @property
    def box(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(zip(self.starts, self.limits, self.strides, strict=True))

    @property
    def _index(self) -> tuple[slice, ...]:
        return tuple(slice(*bounds) for bounds in self.box)


@dataclasses.dataclass(frozen=True)
class Pad(View):
    """Entries with zeros around and between them.

    Attributes:
      before, after: shapes.
      starts, strides: per axis the place of the first entry, and from one to the next.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    starts: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, x: Any) -> Any:
        if isinstance(x, np.ndarray):
            padded = np.zeros(self.after, x.dtype)
            padded[self._index] = x
            return padded
        return jnp.zeros(self.after, x.dtype).at[self._index].set(x)

    def adjoint(self, x: jax.Array) -> jax.Array:
        return x[self._index]

    @property
    def _index(self) -> tuple[slice, ...]:
        places = zip(self.starts, self.before, self.strides, strict=True)
        return tuple(slice(start, start + (size - 1) * stride + 1, stride) for start, size, stride in places)


@dataclasses.dataclass(frozen=True)
class Scale(View):
    """Multiplication with a number."""

    factor: float

    def __call__(self, x: Any) -> Any:
        return x * self.factor

    def adjoint(self, x: jax.Array) -> jax.Array:
        return x * jnp.asarray(self.factor, x.dtype)


@dataclasses.dataclass(frozen=True)
class Stacked(View):
    """A view of every slice of the leading axis: what a view in the body of a scan is for all that it scans over."""

    view: View

    def __call__(self, x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return np.stack([self.view(part) for part in x]) if len(x) else x
        return jax.vmap(self.view)(x)

    def adjoint(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.view.adjoint)(x)


def view_of(eqn: Any, operand: int) -> tuple[View, ...] | None:
    """The views by which an equation's first output follows from its operand; `None` if it does otherwise."""
    name, shape = eqn.primitive.name, eqn.invars[operand].aval.shape
    out = eqn.outvars[0].aval
    if len(eqn.outvars) != 1 or not all(_floating(aval) for aval in (eqn.invars[operand].aval, out)):
        return None
    if name in _NOTHING:
        return ()
    if name in _RESHAPING and math.prod(shape) == math.prod(out.shape):
        order = eqn.params.get("dimensions") if name == "reshape" else None
        if order is None:
            return (Reshape(shape, out.shape),)
        # A reshape may permute the axes before.
        return Transpose(tuple(order)), Reshape(tuple(shape[i] for i in order), out.shape)
    if name == "transpose":
        return (Transpose(tuple(eqn.params["permutation"])),)
    if name == "rev":
        return (Reverse(tuple(eqn.params["dimensions"])),)
    if name == "neg":
        return (Scale(-1.0),)
    if name in ("slice", "dynamic_slice"):
        return _slice(eqn, operand)
    if name == "pad":
        return _pad(eqn, operand)
    if name in ("mul", "div"):
        return _scale(eqn, operand)
    return None


def pieces(eqn: Any) -> list[tuple[View, ...]]:
    """The views by which the outputs of a `split` follow from its operand."""
    shape, axis, start, parts = eqn.invars[0].aval.shape, eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        starts = tuple(start if i == axis else 0 for i in range(len(shape)))
        limits = tuple(start + size if i == axis else d for i, d in enumerate(shape))
        parts.append((Slice(shape, starts, limits, (1,) * len(shape)),))
        start += size
    return parts


def beside(eqn: Any, operand: int) -> tuple[View, ...]:
    """The views by which a `concatenate` or `stack` follows from one of its operands, all others being zero."""
    before, after = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == "stack":
        axis, start = eqn.params["axis"] % len(after), operand
        one = (*before[:axis], 1, *before[axis:])
        views, before = (Reshape(before, one),), one
    else:
        axis = eqn.params["dimension"]
        start, views = sum(v.aval.shape[axis] for v in eqn.invars[:operand]), ()
    starts = tuple(start if i == axis else 0 for i in range(len(after)))
    return (*views, Pad(before, after, starts, (1,) * len(after)))


def summand(eqn: Any, operand: int) -> tuple[View, ...] | None:
    """The views by which a sum follows from one of its terms, up to a constant; `None` if it repeats the term."""
    if eqn.invars[operand].aval.shape != eqn.outvars[0].aval.shape:
        return None
    return (Scale(-1.0),) if eqn.primitive.name == "sub" and operand else ()


def through(views: Sequence[View], x: Any) -> Any:
    """`x` after all views."""
    for view in views:
        x = view(x)
    return x


def back(views: Sequence[View], x: jax.Array) -> jax.Array:
    """The adjoint of `through`."""
    for view in reversed(views):
        x = view.adjoint(x)
    return x


def squared(views: Sequence[View]) -> tuple[View, ...]:
    """The views of squared entries: factors are squared."""
    return tuple(map(_squared, views))


def _squared(view: View) -> View:
    if isinstance(view, Scale):
        return Scale(view.factor**2)
    return Stacked(_squared(view.view)) if isinstance(view, Stacked) else view


def factor(views: Sequence[View]) -> float:
    """The product of all scales."""
    return math.prod(_factor(view) for view in views)


def pads(views: Sequence[View]) -> bool:
    """Whether there is more in the result than entries of the array."""
    return any(pads([view.view]) if isinstance(view, Stacked) else isinstance(view, Pad) for view in views)


def _factor(view: View) -> float:
    if isinstance(view, Stacked):
        return _factor(view.view)
    return view.factor if isinstance(view, Scale) else 1.0


def unscaled(views: Sequence[View]) -> tuple[View, ...]:
    """The views without scales, which leave entries where they are."""
    return tuple(view for view in views if not _is_scale(view))


def _is_scale(view: View) -> bool:
    return _is_scale(view.view) if isinstance(view, Stacked) else isinstance(view, Scale)


def disjoint(first: Sequence[View], second: Sequence[View]) -> bool:
    """Whether two chains of views surely see different entries of one array: they start with slices that do not meet.

    Slices that follow one another, as indexing writes them, are looked at one by one while the chains agree.
    """
    for a, b in zip(first, second, strict=False):
        if a == b:
            continue
        if a.box is None or b.box is None:
            return False
        return any(_apart(*axis) for axis in zip(a.box, b.box, strict=True))
    return False


def _apart(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
    """Whether two (start, limit, stride) have no number in common, as far as ranges and equal strides tell."""
    (start, end, stride), (low, limit, other) = first, second
    return low >= end or start >= limit or (stride == other and (start - low) % stride != 0)


def _floating(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _slice(eqn: Any, operand: int) -> tuple[View, ...] | None:
    shape, out = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    if operand != 0:
        return None
    if eqn.primitive.name == "slice":
        strides = eqn.params["strides"] or (1,) * len(shape)
        starts, limits = tuple(eqn.params["start_indices"]), tuple(eqn.params["limit_indices"])
        return (Slice(shape, starts, limits, tuple(strides)),)
    if not all(isinstance(v, Literal) for v in eqn.invars[1:]):
        return None
    # As XLA does, a start that does not fit is moved until it does.
    starts = tuple(min(max(int(v.val), 0), d - size) for v, d, size in zip(eqn.invars[1:], shape, out, strict=True))
    limits = tuple(start + size for start, size in zip(starts, out, strict=True))
    return (Slice(shape, starts, limits, (1,) * len(shape)),)


def _pad(eqn: Any, operand: int) -> tuple[View, ...] | None:
    """Around an array; what the rest is filled with is a constant."""
    config, shape = eqn.params["padding_config"], eqn.invars[0].aval.shape
    if operand != 0 or not math.prod(shape) or any(low < 0 or high < 0 for low, high, _ in config):
        return None
    starts, strides = tuple(int(low) for low, _, _ in config), tuple(int(inner) + 1 for _, _, inner in config)
    return (Pad(shape, eqn.outvars[0].aval.shape, starts, strides),)


def _scale(eqn: Any, operand: int) -> tuple[View, ...] | None:
    other = eqn.invars[1 - operand]
    if not isinstance(other, Literal) or (eqn.primitive.name == "div" and operand != 0):
        return None
    value = float(np.asarray(other.val))
    if eqn.primitive.name == "div":
        value = 1.0 / value if value else math.inf
    return (Scale(value),) if math.isfinite(value) else None
