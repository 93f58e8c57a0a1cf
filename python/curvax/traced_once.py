"""A user's function whose Python runs once for all that is made of it.

A step evaluates the model's loss, linearizes it, looks for its layers and counts what each of these costs: a dozen
calls with arguments of the same shapes. Behind `jax.jit` the first of them traces the function. All others, those
under `jax.vmap` and derivatives too, take the program that it left:

    predict(p, x)              traced
    jax.vjp(predict, p, x)     the derivative of that program, made once as well
    predict(p, x[:1])          other shapes: traced

A function made here knows the programs as long as it lives, and makes its own: one that is made for a step forgets them
with it, and so sees whatever the user's function has closed over by the next one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    """A result that is no array."""

    value: Any


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run once for each set of shapes and dtypes of its arguments.

    Args:
      function: a pure function of trees of arrays. Results that are no arrays are returned as they were at that run.
    """

    @jax.jit
    def traced(*args: Any, **keyword: Any) -> Any:
        return jax.tree.map(lambda x: x if hasattr(x, "dtype") else _Kept(x), function(*args, **keyword))

    @functools.wraps(function, assigned=("__doc__",), updated=())
    def call(*args: Any, **keyword: Any) -> Any:
        results = traced(*args, **keyword)
        return jax.tree.map(lambda x: x.value if isinstance(x, _Kept) else x, results, is_leaf=_is_kept)

    return call


def _is_kept(x: Any) -> bool:
    return isinstance(x, _Kept)
