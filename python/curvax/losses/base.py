"""What a loss is: value, gradient, Hessian, square root of the Hessian and target sampling, all in output space."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.kernels._dispatch import Choice, Op, Request
from curvax.losses.batch_fault import BatchFault, at_hand, refuse
from curvax.losses.rounding import loss_rounding

Reduction: TypeAlias = Literal["mean", "sum"]


class Shaped(Protocol):
    """Anything with a shape and a dtype: an array, a tracer, a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis lengths."""
        ...

    @property
    def dtype(self) -> Any:
        """Element type."""
        ...


@dataclasses.dataclass(frozen=True)
class Loss(abc.ABC):
    """L = sum_i w_i l(f_i, y_i) over the positions i of a batch, as a function of the outputs f.

    Positions are all axes of the outputs but the last, which holds the K outputs of one position; outputs of shape
    (B,) are one scalar output for each of B positions. `effective_weights` makes w once for a whole batch; every other
    method takes such weights, so a microbatch is the same slice along axis 0 of outputs, targets and weights.

    Outputs may have any floating dtype. Results have the *accumulation* dtype of the outputs: float32 for narrower
    ones, their own otherwise. A position of zero weight contributes exactly zero whatever its outputs and targets
    hold, infinities and NaN included. All methods but `check` work under `jit`, `vmap` and differentiation.

    An implementor is a frozen dataclass that writes every abstract method; of a sum of scalar losses with a canonical
    link `losses.elementwise.DiagonalLoss` asks for four functions of numbers and `sample_targets` (docs/extending.md).

    Attributes:
      reduction: "mean" (default, as in most training code) divides by the sum of the weights, so all-ones weights
        change nothing and a 0/1 mask acts like dropping positions; "sum" divides by nothing.

    Raises:
      ValueError: `reduction` is neither of the two.
    """

    reduction: Reduction = dataclasses.field(default="mean", kw_only=True)

    # Whether outputs may be complex: the loss then sees their real and imaginary parts, side by side on the last axis.
    takes_complex: ClassVar[bool] = False
    # Whether the batch's loss at other parameters is `value`: what a trust region or a search needs to judge a step.
    judges_steps: ClassVar[bool] = True

    # Whether a weight may differ between the outputs of one position (sums of scalar losses can say what that means).
    _weights_each_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {self.reduction!r}: pass 'mean' or 'sum'.")

    @property
    def couples_examples(self) -> bool:
        """True if examples enter each other's terms; microbatches then take it of the outputs of all pieces."""
        return False

    @property
    def by_example(self) -> Loss:
        """The loss whose curvature Kronecker factors take, example by example: itself if it couples none.

        Raises:
          ValueError: it couples examples, and says of no part that it does not.
        """
        if not self.couples_examples:
            return self
        raise ValueError(
            f"Kronecker factors are taken example by example, and {self} couples examples: "
            "use a loss without coupling, or another preconditioner."
        )

    def effective_weights(self, outputs: Shaped, weights: Any = None) -> jax.Array:
        """The weights w of the terms, normalizer included.

        Args:
          outputs: the whole batch's outputs; only shape and dtype are read, so a `jax.ShapeDtypeStruct` will do.
          weights: non-negative weights or a mask, real or boolean, whose shape is a prefix of the positions' shape
            (a scalar, (B,), (B, T), ...); losses that are sums over outputs also take the outputs' own shape. `None`
            (default) weighs every position 1.

        Returns:
          w in the accumulation dtype, shaped like the positions (like the outputs for outputs-shaped weights).
          With "mean" the normalizer is the sum of the weights over positions (outputs-shaped weights count 1/K each, so
          that all ones again change nothing); if that sum is zero, so are the weights and the loss. A negative weight
          makes it NaN with "mean": the sum of weights of both signs says nothing of how much they weigh.

        Raises:
          TypeError, ValueError: weights of a wrong dtype or shape.
        """
        positions, dtype = positions_shape(outputs), accumulation_dtype(outputs.dtype)
        if weights is None:
            count = max(math.prod(positions), 1) if self.reduction == "mean" else 1
            return jnp.full(positions, 1.0 / count, dtype)
        self._check_weights(outputs, weights)
        w = jnp.asarray(weights).astype(dtype)
        shape = tuple(outputs.shape) if w.ndim > len(positions) else positions
        if self.reduction == "mean":
            w = jnp.where(jnp.all(w >= 0), w, jnp.full((), jnp.nan, dtype))
            # One entry of w stands for several positions if w is a shorter prefix, for 1/K of one if it has K each.
            total = jnp.sum(w) * (math.prod(positions) / max(w.size, 1))
            w = jnp.where(total == 0, jnp.zeros_like(w), w / jnp.where(total == 0, jnp.ones_like(total), total))
        return jnp.broadcast_to(append_axes(w, len(shape)), shape)

    @property
    def leaves_out(self) -> bool:
        """Whether targets may leave out positions (`observed_weights`)."""
        return False

    def observed_weights(self, outputs: Shaped, targets: Any, weights: Any = None) -> Any:
        """The weights, with zero at positions that the targets themselves leave out: for most losses there are none.

        Args:
          outputs, targets, weights: as in `check`.

        Returns:
          What `effective_weights` takes.
        """
        del outputs, targets
        return weights

    def batch_fault(self, outputs: Shaped, targets: Any, weights: Any = None, *, signed: bool = True) -> jax.Array:
        """What is wrong with the values of targets and weights, a `BatchFault` as an int32 scalar.

        Args:
          outputs, targets, weights: as in `check`.
          signed: whether a sum may have weights of both signs; a mean may not in any case.
        """
        del outputs, targets
        if weights is None or (signed and self.reduction == "sum"):
            return jnp.asarray(int(BatchFault.NONE), jnp.int32)
        w = jnp.asarray(weights)
        fine = jnp.all(w >= jnp.zeros((), w.dtype))
        return jnp.where(fine, int(BatchFault.NONE), int(BatchFault.NEGATIVE_WEIGHT)).astype(jnp.int32)

    def check_values(self, outputs: Shaped, targets: Any, weights: Any = None, *, signed: bool = True) -> None:
        """Raises ValueError for a `batch_fault`, where the arrays are at hand: not under `jit`, nor for shapes."""
        if at_hand((targets, weights)):
            with jax.ensure_compile_time_eval():
                refuse(self.batch_fault(outputs, targets, weights, signed=signed), _extent(targets, weights))

    def kernels(self, outputs: Shaped) -> tuple[tuple[Op, Request], ...]:
        """The ops that `hessian_product` calls on such outputs, and what it asks of them: none for most losses."""
        del outputs
        return ()

    def with_kernels(self, choices: Mapping[str, Choice]) -> Loss:
        """The same loss with the implementations of its ops chosen, as the planner does from a method's backend."""
        del choices
        return self

    def row_shape(self, outputs: Shaped) -> tuple[int, ...]:
        """Shape of the vectors that `factor` takes: the outputs' own, as every S here is square."""
        return tuple(outputs.shape)

    def check(self, outputs: Shaped, targets: Any, weights: Any = None) -> None:
        """Validates shapes and dtypes, which are static: nothing is computed.

        Args:
          outputs: the model's outputs, or their shape and dtype.
          targets: the batch's targets, or their shapes and dtypes.
          weights: as in `effective_weights`.

        Raises:
          TypeError: a dtype that the loss cannot use.
          ValueError: a shape that the loss cannot use. Either message says what to change.
        """
        if not jnp.issubdtype(shaped(outputs, "outputs").dtype, jnp.floating):
            raise TypeError(f"the outputs are of dtype {outputs.dtype}: return real floating-point numbers.")
        self._check_targets(outputs, targets)
        if weights is not None:
            self._check_weights(outputs, weights)

    def _check_weights(self, outputs: Shaped, weights: Any) -> None:
        spec, positions = shaped(weights, "weights"), positions_shape(outputs)
        if not is_real(spec.dtype):
            raise TypeError(f"the weights are of dtype {spec.dtype}: pass real or boolean ones.")
        if spec.shape == positions[: len(spec.shape)]:
            return
        if self._weights_each_output and spec.shape == tuple(outputs.shape):
            return
        allowed = f"{positions} or a prefix of it"
        if self._weights_each_output:
            allowed += f", or {tuple(outputs.shape)}"
        raise ValueError(
            f"the weights have shape {spec.shape} with outputs of shape {tuple(outputs.shape)}: "
            f"give them shape {allowed}."
        )

    @abc.abstractmethod
    def _check_targets(self, outputs: Shaped, targets: Any) -> None:
        """Validates shape and dtype of the targets."""

    @abc.abstractmethod
    def value(self, outputs: jax.Array, targets: Any, weights: jax.Array) -> jax.Array:
        """The loss, sum_i w_i l(f_i, y_i): an upcast scalar."""

    @abc.abstractmethod
    def gradient(self, outputs: jax.Array, targets: Any, weights: jax.Array) -> jax.Array:
        """The gradient with respect to the outputs: w_i l'(f_i), outputs-shaped and in the accumulation dtype."""

    def rounding(self, outputs: jax.Array, targets: Any, weights: jax.Array) -> jax.Array:
        """How far rounding may move the value (`losses.rounding`): an upcast scalar, at least 0."""
        value, slope = self.value(outputs, targets, weights), self.gradient(outputs, targets, weights)
        return loss_rounding(value, jnp.asarray(outputs), slope.reshape(outputs.shape))

    @abc.abstractmethod
    def hessian_product(self, outputs: jax.Array, targets: Any, weights: jax.Array, v: jax.Array) -> jax.Array:
        """Q v with Q = w_i l''(f_i), for outputs-shaped `v`; outputs-shaped and in the accumulation dtype."""

    @abc.abstractmethod
    def factor(self, outputs: jax.Array, targets: Any, weights: jax.Array, u: jax.Array) -> jax.Array:
        """S u with S S^T = Q exactly, for `u` of shape `row_shape`; outputs-shaped and in the accumulation dtype."""

    @abc.abstractmethod
    def factor_transpose(self, outputs: jax.Array, targets: Any, weights: jax.Array, v: jax.Array) -> jax.Array:
        """S^T v for outputs-shaped `v`; of shape `row_shape` and in the accumulation dtype."""

    @abc.abstractmethod
    def gradient_in_rows(self, outputs: jax.Array, targets: Any, weights: jax.Array) -> jax.Array | None:
        """The rows t of shape `row_shape` with S t = gradient, zero at zero weight; `None` if the loss cannot say."""

    @abc.abstractmethod
    def sample_targets(self, outputs: jax.Array, targets: Any, key: jax.Array) -> Any:
        """Targets y~ drawn from the model's own predictive distribution.

        They are such that l'(f, y~) has mean zero and covariance l''(f) at every position: with sqrt(w) in the
        place of weights, `gradient` then gives residuals whose expected outer product is Q.

        Args:
          outputs: the model's outputs.
          targets: the observed targets, from which shape and kind are taken.
          key: random key.

        Returns:
          Targets that the other methods accept in the place of `targets`.
        """

    def sampled_gradient(self, outputs: jax.Array, targets: Any, weights: jax.Array, key: jax.Array) -> jax.Array:
        """A random vector like the outputs with mean zero and covariance Q: sqrt(w) l'(f, y~) at targets y~ drawn anew.

        Args:
          outputs, targets, weights: as for `gradient`.
          key: random key.
        """
        return self.gradient(outputs, self.sample_targets(outputs, targets, key), jnp.sqrt(weights))


def _extent(targets: Any, weights: Any) -> str:
    """Smallest and largest entries, in words."""
    named = [("targets", x) for x in jax.tree.leaves(targets)] + [("weights", x) for x in jax.tree.leaves(weights)]
    return ", ".join(f"{name} from {np.min(x)} to {np.max(x)}" for name, x in named if np.size(x))


def accumulation_dtype(dtype: Any) -> np.dtype:
    """The dtype that losses compute in: at least float32, and one that JAX's current 64-bit setting has."""
    return jax.dtypes.canonicalize_dtype(tree.accumulation_dtype(dtype))


def positions_shape(outputs: Shaped) -> tuple[int, ...]:
    """Shape of the positions of `outputs`: without the last axis, or (B,) for outputs of shape (B,)."""
    shape = tuple(outputs.shape)
    return shape[:-1] if len(shape) > 1 else shape


def shaped(x: Any, name: str) -> Shaped:
    """`x` if it has a shape and a dtype, a number as an array; `TypeError` for anything else."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return x
    if isinstance(x, bool | int | float):
        return np.asarray(x)
    raise TypeError(f"the {name} are a {type(x).__name__}: pass one array.")


def is_real(dtype: Any) -> bool:
    """Whether `dtype` is floating-point, integer or boolean."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def append_axes(x: jax.Array, ndim: int) -> jax.Array:
    """`x` with axes of length one appended until it has `ndim` axes."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def weigh(weights: jax.Array, x: jax.Array) -> jax.Array:
    """The product w x, and exactly zero where w is zero even if x is not finite there."""
    return jnp.where(weights == 0, jnp.zeros((), x.dtype), weights * x)


def root(x: jax.Array) -> jax.Array:
    """Square root whose derivative at zero is zero instead of infinite."""
    zero = x == 0
    return jnp.where(zero, jnp.zeros_like(x), jnp.sqrt(jnp.where(zero, jnp.ones_like(x), x)))


def times(y: jax.Array, x: jax.Array) -> jax.Array:
    """The product y x, and exactly zero where y is zero even if x is infinite there."""
    zero = y == 0
    return jnp.where(zero, jnp.zeros((), x.dtype), y * jnp.where(zero, jnp.zeros((), x.dtype), x))


def exp_clipped(x: jax.Array) -> jax.Array:
    """exp(x) with x clipped to where both exp(x) and exp(-x) are normal numbers: finite and not zero."""
    limit = -math.log(float(jnp.finfo(x.dtype).tiny))
    return jnp.exp(jnp.clip(x, -limit, limit))


def check_loss(loss: Any) -> None:
    """Raises TypeError for what is not a loss object."""
    if isinstance(loss, Loss):
        return
    if isinstance(loss, type) and issubclass(loss, Loss):
        raise TypeError(f"loss is the class {loss.__name__}: pass an instance, {loss.__name__}().")
    raise TypeError(
        "loss must be a curvax.losses object: wrap a function of one position's outputs and target in "
        "curvax.losses.CustomLoss, or pass a function of (params, batch) as loss_fn to a Hessian method."
    )
