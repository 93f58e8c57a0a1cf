"""The Jacobian of a model's outputs in its parameters, and the tangent kernel J J^T, which multiplies outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from curvax import tree
from curvax.operators.base import LinearOperator, Product, SymmetricOperator
from curvax.structure.outputs import check_outputs
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Jacobian(LinearOperator):
    """J, or its transpose: parameters to outputs, or back.

    Attributes:
      predict_fn: (params, inputs) -> outputs; static.
      params: where it is taken.
      inputs: the model's inputs.
      transposed: whether it is J^T; static.
    """

    predict_fn: Callable[[PyTree, Any], jax.Array] = dataclasses.field(metadata={"static": True})
    params: PyTree
    inputs: Any
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def domain(self) -> PyTree:
        return self._outputs if self.transposed else self._params

    @property
    def codomain(self) -> PyTree:
        return self._params if self.transposed else self._outputs

    @property
    def _params(self) -> PyTree:
        return tree.upcast_shapes(self.params)

    @property
    def _outputs(self) -> PyTree:
        return jax.eval_shape(lambda p, x: tree.upcast(self.predict_fn(p, x)), self.params, self.inputs)

    def transpose(self) -> LinearOperator:
        return dataclasses.replace(self, transposed=not self.transposed)

    def linearized(self) -> Callable[[PyTree], PyTree]:
        def outputs(upcast: PyTree) -> PyTree:
            # The model runs in the parameters' own dtypes; tangents and cotangents are upcast.
            return tree.upcast(self.predict_fn(tree.cast_like(upcast, self.params), self.inputs))

        at = tree.upcast(self.params)
        if self.transposed:
            _, vjp = jax.vjp(outputs, at)
            return lambda u: vjp(u)[0]
        return jax.linearize(outputs, at)[1]


def jacobian(predict_fn: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> Jacobian:
    """The Jacobian of `predict_fn(params, inputs)` in the parameters; `.T` maps outputs back.

    Args:
      predict_fn: (params, inputs) -> one floating-point array of outputs.
      params: parameters, all of them floating point.
      inputs: inputs of one batch.

    Raises:
      TypeError: the model returns something else than one array.
    """
    check_outputs(jax.eval_shape(predict_fn, params, inputs))
    return Jacobian(predict_fn, params, inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TangentKernel(SymmetricOperator):
    """J J^T: outputs to outputs, a pass back and a pass forward for each product.

    Attributes:
      of: J.
    """

    of: Jacobian

    @property
    def domain(self) -> PyTree:
        return self.of.codomain

    @property
    def is_positive(self) -> bool:
        return True

    def linearized(self) -> Callable[[PyTree], PyTree]:
        jvp = self.of.linearized()
        vjp = jax.linear_transpose(jvp, self.of.domain)
        return lambda u: jvp(vjp(u)[0])


def tangent_kernel(
    predict_fn: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any, other: Any = None
) -> TangentKernel | Product:
    """The empirical neural tangent kernel J1 J2^T as an operator on outputs; `structure.jacobian_gram` is its matrix.

    Args:
      predict_fn, params, inputs: see `jacobian`.
      other: inputs of a second batch, whose outputs it multiplies; by default `None`, the first, and the operator is
        symmetric.

    Raises:
      TypeError: the model returns something else than one array.
    """
    first = jacobian(predict_fn, params, inputs)
    return TangentKernel(first) if other is None else first @ jacobian(predict_fn, params, other).T
