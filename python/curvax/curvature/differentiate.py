"""Linear maps of a model at a point: one forward pass, products in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.jaxprs import uses_custom_vjp
from curvax.loops import for_loop_body
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """A model at a point.

    Attributes:
      outputs: model outputs, an array or a tree of them.
      tangents: v -> J v, of a parameter vector, in the accumulation dtype as its result; `None` unless asked for.
      vjp: u -> J^T u, a parameter vector in the accumulation dtype.
      rest: (new model state, aux).
      second: v -> d^2/dt^2 f(theta + t v) at t = 0, in the accumulation dtype.
      bend: (v, u) -> sum_i u_i H_i v with H_i the Hessian of output i; `None` unless somebody needs it.
    """

    outputs: PyTree
    tangents: Callable[[PyTree], PyTree] | None
    vjp: Callable[[PyTree], PyTree]
    rest: tuple[PyTree, Any]
    bend: Callable[[PyTree, PyTree], PyTree] | None = None
    second: Callable[[PyTree], PyTree] | None = None

    def jvp(self, v: PyTree) -> PyTree:
        """J v, of a model linearized with `jvp=True`."""
        if self.tangents is None:
            raise AssertionError("J v is asked of a model that was linearized for J^T u alone.")
        return self.tangents(v)


def linear_model(
    function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree, *, jvp: bool, shared: bool = True
) -> LinearModel:
    """Linearizes `function: params -> (outputs, rest)`.

    Args:
      jvp: whether J v is wanted; without it only the reverse pass is built.
      shared: False builds maps that repeat the forward pass at each use.

    With a `jax.custom_vjp` inside, J v is taken as the transpose of u -> J^T u (reverse over reverse).
    """
    if jvp and uses_custom_vjp(function, params):
        return _reverse_model(function, params)
    if jvp:
        model = _linearized_model(function, params) if shared else _repeated_model(function, params)
        return dataclasses.replace(model, second=lambda v: second_derivative(function, params, v))
    outputs, vjp, rest = jax.vjp(function, params, has_aux=True)
    return LinearModel(outputs, None, _upcast_vjp(lambda u: vjp(u)[0], outputs), rest)


def second_derivative(function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree, v: PyTree) -> PyTree:
    """d^2/dt^2 of the outputs of `function: params -> (outputs, rest)` at params + t v, t = 0, upcast."""
    tangent = tree.cast_like(v, params)

    def slope(p: PyTree) -> PyTree:
        return jax.jvp(lambda q: function(q)[0], (p,), (tangent,))[1]

    return tree.upcast(jax.jvp(slope, (params,), (tangent,))[1])


def _upcast_vjp(vjp: Callable[[PyTree], PyTree], outputs: PyTree) -> Callable[[PyTree], PyTree]:
    vjp = for_loop_body(vjp)
    return lambda u: tree.upcast(vjp(tree.cast_like(u, outputs)))


def _upcast_jvp(jvp: Callable[[PyTree], PyTree], params: PyTree) -> Callable[[PyTree], PyTree]:
    jvp = for_loop_body(jvp)
    return lambda v: tree.upcast(jvp(tree.cast_like(v, params)))


def _linearized_model(function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree) -> LinearModel:
    outputs, jvp, rest = jax.linearize(function, params, has_aux=True)
    transpose = jax.linear_transpose(jvp, params)
    return LinearModel(outputs, _upcast_jvp(jvp, params), _upcast_vjp(lambda u: transpose(u)[0], outputs), rest)


def _reverse_model(function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree) -> LinearModel:
    outputs, vjp, rest = jax.vjp(function, params, has_aux=True)
    # u -> J^T u is linear, so its own pullback at any point is v -> J v.
    _, jvp = jax.vjp(lambda u: vjp(u)[0], jax.tree.map(jnp.zeros_like, outputs))
    return LinearModel(
        outputs,
        _upcast_jvp(lambda v: jvp(v)[0], params),
        _upcast_vjp(lambda u: vjp(u)[0], outputs),
        rest,
    )


def _repeated_model(function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree) -> LinearModel:
    outputs, rest = function(params)

    def jvp(v: PyTree) -> PyTree:
        return jax.jvp(lambda p: function(p)[0], (params,), (v,))[1]

    def vjp(u: PyTree) -> PyTree:
        return jax.vjp(lambda p: function(p)[0], params)[1](u)[0]

    return LinearModel(outputs, _upcast_jvp(jvp, params), _upcast_vjp(vjp, outputs), rest)


@dataclasses.dataclass(frozen=True)
class SecondOrder:
    """A scalar function at a point: value, gradient, Hessian products, rest."""

    value: jax.Array
    gradient: PyTree
    product: Callable[[PyTree], PyTree] | None
    rest: Any

    def hvp(self, v: PyTree) -> PyTree:
        """H v, of a function differentiated with `product=True`."""
        if self.product is None:
            raise AssertionError("H v is asked of a function that was differentiated once.")
        return self.product(v)


def second_order(
    function: Callable[[PyTree], tuple[jax.Array, Any]], params: PyTree, *, product: bool, shared: bool = True
) -> SecondOrder:
    """Value, gradient and, if asked for, Hessian products of `function: params -> (scalar, rest)`.

    Products run forward over reverse: one linearization of the gradient serves value, gradient and all products. With
    a `jax.custom_vjp` inside they run reverse over reverse, using that the Hessian is symmetric.
    """

    def gradient_fn(p: PyTree) -> tuple[PyTree, tuple[jax.Array, Any]]:
        (value, rest), gradient = jax.value_and_grad(function, has_aux=True)(p)
        return gradient, (value, rest)

    if not product:
        gradient, (value, rest) = gradient_fn(params)
        return SecondOrder(value, tree.upcast(gradient), None, rest)
    if uses_custom_vjp(function, params):
        gradient, vjp, (value, rest) = jax.vjp(gradient_fn, params, has_aux=True)
        return SecondOrder(value, tree.upcast(gradient), _wide_hvp(lambda v: vjp(v)[0], params), rest)
    if shared:
        gradient, jvp, (value, rest) = jax.linearize(gradient_fn, params, has_aux=True)
        return SecondOrder(value, tree.upcast(gradient), _wide_hvp(jvp, params), rest)
    gradient, (value, rest) = gradient_fn(params)

    def repeated(v: PyTree) -> PyTree:
        return jax.jvp(lambda p: gradient_fn(p)[0], (params,), (v,))[1]

    return SecondOrder(value, tree.upcast(gradient), _wide_hvp(repeated, params), rest)


def _wide_hvp(product: Callable[[PyTree], PyTree], params: PyTree) -> Callable[[PyTree], PyTree]:
    product = for_loop_body(product)
    return lambda v: tree.upcast(product(tree.cast_like(v, params)))
