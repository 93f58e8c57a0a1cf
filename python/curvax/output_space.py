"""Curvature in output space: Q = S S^T with C = J^T Q J.

The three members of the Gauss-Newton family differ only here. With w_i the weight of position i:

  generalized Gauss-Newton   Q_i = w_i * Hessian of l at the outputs
  Fisher (Monte Carlo)       Q_i = w_i / m * sum over m samples y ~ model of grad l(f_i, y) grad l(f_i, y)^T
  empirical Fisher           Q_i = w_i * grad l(f_i, y_i) grad l(f_i, y_i)^T, y_i the observed target
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvax.losses.base import Loss


class OutputCurvature(abc.ABC):
    """Q of one batch: symmetric positive semidefinite, block diagonal over examples.

    An implementor writes products with Q and with a factor S of it, Q = S S^T, and says what shape a row has.
    """

    @property
    @abc.abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row vector; the leading axis is the example axis."""

    @property
    @abc.abstractmethod
    def couples_examples(self) -> bool:
        """True if S mixes examples, so that rows cannot be formed example by example."""

    @abc.abstractmethod
    def product(self, v: jax.Array) -> jax.Array:
        """Q v, outputs to outputs."""

    @abc.abstractmethod
    def factor(self, rows: jax.Array) -> jax.Array:
        """S u, rows to outputs."""

    @abc.abstractmethod
    def factor_transpose(self, v: jax.Array) -> jax.Array:
        """S^T v, outputs to rows."""

    @abc.abstractmethod
    def cotangents(self, key: jax.Array) -> jax.Array:
        """Output vectors u_r, (R, *outputs), with sum_r u_r u_r^T = Q within each example, exactly or in expectation.

        What happens between examples is left open: to be used example by example, where R of them serve all.
        """

    @abc.abstractmethod
    def gradient_in_rows(self) -> jax.Array | None:
        """t with S t = gradient of the loss in output space, or `None` if it is not in the range of S."""

    @abc.abstractmethod
    def example(self, index: jax.Array) -> OutputCurvature:
        """Q of the single example `index`, keeping an example axis of length one."""


def _take(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=0), tree)


def _columns(output: OutputCurvature) -> jax.Array:
    """S of every example column by column: (columns of one example, *outputs)."""
    examples, rest = output.row_shape[0], output.row_shape[1:]
    columns = math.prod(rest)
    like = jax.eval_shape(output.factor, jax.ShapeDtypeStruct(output.row_shape, jnp.float32))
    basis = jnp.eye(columns, dtype=like.dtype).reshape(columns, 1, *rest)
    return jax.vmap(output.factor)(jnp.broadcast_to(basis, (columns, examples, *rest)))


@dataclasses.dataclass(frozen=True)
class LossHessian(OutputCurvature):
    """Q = weights times the Hessian of the loss."""

    loss: Loss
    outputs: jax.Array
    targets: Any
    weights: jax.Array

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.loss.row_shape(self.outputs))

    @property
    def couples_examples(self) -> bool:
        return self.loss.couples_examples

    def product(self, v: jax.Array) -> jax.Array:
        return self.loss.hessian_product(self.outputs, self.targets, self.weights, v)

    def factor(self, rows: jax.Array) -> jax.Array:
        return self.loss.factor(self.outputs, self.targets, self.weights, rows)

    def factor_transpose(self, v: jax.Array) -> jax.Array:
        return self.loss.factor_transpose(self.outputs, self.targets, self.weights, v)

    def cotangents(self, key: jax.Array) -> jax.Array:
        """All columns of S of one example, the same numbers of all examples together: exact."""
        del key
        return _columns(self)

    def gradient_in_rows(self) -> jax.Array | None:
        return self.loss.gradient_in_rows(self.outputs, self.targets, self.weights)

    def example(self, index: jax.Array) -> LossHessian:
        parts = _take((self.outputs, self.targets, self.weights), index)
        return LossHessian(self.loss, *parts)


@dataclasses.dataclass(frozen=True)
class IdentityCurvature(OutputCurvature):
    """Q = I, whose rows are those of the Jacobian itself.

    Attributes:
      outputs: the outputs, of which shape and dtype are read.
    """

    outputs: jax.Array

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.outputs.shape)

    @property
    def couples_examples(self) -> bool:
        return False

    def product(self, v: jax.Array) -> jax.Array:
        return v

    def factor(self, rows: jax.Array) -> jax.Array:
        return rows

    def factor_transpose(self, v: jax.Array) -> jax.Array:
        return v

    def cotangents(self, key: jax.Array) -> jax.Array:
        """The unit vectors."""
        del key
        return _columns(self)

    def gradient_in_rows(self) -> jax.Array | None:
        return None

    def example(self, index: jax.Array) -> IdentityCurvature:
        return IdentityCurvature(_take(self.outputs, index))


@dataclasses.dataclass(frozen=True)
class GradientOuterProduct(OutputCurvature):
    """Q = sum_m r_m r_m^T per position, from residuals r with the square root of the weight already inside.

    Attributes:
      residuals: (m, *outputs.shape).
      gradient_rows: t of shape `row_shape` if the gradient lies in the range of S (empirical Fisher), else `None`.
      centered: the residuals of different positions are independent with mean zero (sampled targets).
    """

    residuals: jax.Array
    gradient_rows: jax.Array | None = None
    centered: bool = False

    @property
    def _positions(self) -> tuple[int, ...]:
        shape = self.residuals.shape[1:]
        return shape[:-1] if len(shape) > 1 else shape

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self._positions, self.residuals.shape[0])

    @property
    def couples_examples(self) -> bool:
        return False

    def _columns(self) -> jax.Array:
        # (*positions, features, m): a scalar output per example counts as one feature.
        shape = (self.residuals.shape[0], *self._positions, -1)
        return jnp.moveaxis(self.residuals.reshape(shape), 0, -1)

    def product(self, v: jax.Array) -> jax.Array:
        return self.factor(self.factor_transpose(v))

    def factor(self, rows: jax.Array) -> jax.Array:
        columns = self._columns()
        return jnp.einsum("...km,...m->...k", columns, rows.astype(columns.dtype)).reshape(self.residuals.shape[1:])

    def factor_transpose(self, v: jax.Array) -> jax.Array:
        columns = self._columns()
        return jnp.einsum("...km,...k->...m", columns, v.astype(columns.dtype).reshape(columns.shape[:-1]))

    def cotangents(self, key: jax.Array) -> jax.Array:
        """The residuals.

        Those of several positions of one example would mix, so where their mean is not zero each position has a random
        sign, and the products of two positions cancel in expectation.
        """
        if self.centered or len(self._positions) == 1:
            return self.residuals
        signs = jax.random.rademacher(key, (self.residuals.shape[0], *self._positions), self.residuals.dtype)
        return self.residuals * signs[..., None]

    def gradient_in_rows(self) -> jax.Array | None:
        return self.gradient_rows

    def example(self, index: jax.Array) -> GradientOuterProduct:
        return GradientOuterProduct(jax.lax.dynamic_slice_in_dim(self.residuals, index, 1, axis=1))


class FisherType(abc.ABC):
    """Chooses Q: the member of the Gauss-Newton family.

    An implementor is a frozen dataclass; its one job is to make the `OutputCurvature` of a batch (`bind`).
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The operator's name in the plan."""

    @property
    @abc.abstractmethod
    def is_random(self) -> bool:
        """Whether `bind` needs a key."""

    @property
    @abc.abstractmethod
    def uses_loss_hessian(self) -> bool:
        """Whether products with Q are the loss's own `hessian_product`."""

    @abc.abstractmethod
    def bind(
        self, loss: Loss, outputs: jax.Array, targets: Any, weights: jax.Array, key: jax.Array | None
    ) -> OutputCurvature:
        """Q at these outputs."""


@dataclasses.dataclass(frozen=True)
class GeneralizedGaussNewton(FisherType):
    """The Hessian of the loss (Schraudolph 2002)."""

    @property
    def name(self) -> str:
        return "generalized Gauss-Newton"

    @property
    def uses_loss_hessian(self) -> bool:
        return True

    @property
    def is_random(self) -> bool:
        return False

    def bind(
        self, loss: Loss, outputs: jax.Array, targets: Any, weights: jax.Array, key: jax.Array | None
    ) -> OutputCurvature:
        return LossHessian(loss, outputs, targets, weights)


@dataclasses.dataclass(frozen=True)
class MonteCarloFisher(FisherType):
    """Outer products of gradients with targets sampled from the model.

    Attributes:
      n_samples: samples per position; the row lane has that many rows per position.
    """

    n_samples: int = 1

    @property
    def name(self) -> str:
        return f"Fisher ({self.n_samples} sample{'s' if self.n_samples > 1 else ''})"

    @property
    def uses_loss_hessian(self) -> bool:
        return False

    @property
    def is_random(self) -> bool:
        return True

    def bind(
        self, loss: Loss, outputs: jax.Array, targets: Any, weights: jax.Array, key: jax.Array | None
    ) -> OutputCurvature:
        if key is None:
            raise ValueError("the Monte Carlo Fisher samples targets: pass a random key to step.")

        def residual(k: jax.Array) -> jax.Array:
            return loss.sampled_gradient(outputs, targets, weights, k)

        residuals = jax.vmap(residual)(jax.random.split(key, self.n_samples))
        return GradientOuterProduct(residuals * jnp.asarray(self.n_samples**-0.5, residuals.dtype), centered=True)


@dataclasses.dataclass(frozen=True)
class ObservedFisher(FisherType):
    """Outer products of the gradients at the observed targets: the empirical Fisher."""

    @property
    def name(self) -> str:
        return "empirical Fisher"

    @property
    def uses_loss_hessian(self) -> bool:
        return False

    @property
    def is_random(self) -> bool:
        return False

    def bind(
        self, loss: Loss, outputs: jax.Array, targets: Any, weights: jax.Array, key: jax.Array | None
    ) -> OutputCurvature:
        residuals = loss.gradient(outputs, targets, jnp.sqrt(weights))[None]
        positions = outputs.shape[:-1] if outputs.ndim > 1 else outputs.shape
        # w grad l = (sqrt(w) grad l) sqrt(w): the gradient is in the range of S, with t = sqrt(w), as long as one
        # weight serves the whole position.
        rows = jnp.sqrt(weights)[..., None] if weights.shape == positions else None
        return GradientOuterProduct(residuals, rows)
