"""What a curvature operator is, and what one linearization of it offers."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.curvature.differentiate import LinearModel
from curvax.curvature.partition import TrainablePartition
from curvax.kernels import Choice, Implementation, Op, Request
from curvax.output_space import FisherType, OutputCurvature
from curvax.structure.axes import LeafAxes
from curvax.structure.batch_axes import BatchAxes, ExampleAxes
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.gram import RowGroups
from curvax.structure.kronecker import Examples
from curvax.structure.report import LeafStructure
from curvax.structure.rows import RowSource, row_diagonal, row_gram, row_groups
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything beside the trainable parameters that an evaluation of the model depends on.

    Attributes:
      batch: mapping of inputs, targets and weights.
      frozen: the parameter tree with `None` where a leaf is trainable (`Partition.split`).
      model_state: mutable model state (BatchNorm statistics), or `None`.
      model_key: random key of the model (dropout), or `None`.
      sample_key: random key for targets that the curvature itself samples (Monte Carlo Fisher), or `None`.
      weights: effective weights (see `Loss.effective_weights`) when the caller holds a slice of a larger batch.
      total_weight: likewise the sum of the weights that a `loss_fn` returns over the larger batch.
      axes: which leaves of the batch hold the examples, once `Curvature.prepare` has asked; static.
    """

    batch: Any
    frozen: PyTree = None
    model_state: PyTree = None
    model_key: jax.Array | None = None
    sample_key: jax.Array | None = None
    weights: jax.Array | None = None
    total_weight: jax.Array | None = None
    axes: BatchAxes | None = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one linearization is asked for; what is not asked for is never traced.

    Attributes:
      gradient: the gradient of the loss.
      product: curvature products; `rows` implies it.
      rows: the factors J and S of C = J^T S S^T J (row lane).
      sampling: gradients with targets sampled from the model.
      factors: activations and cotangents of the model's layer uses, for Kronecker-factored blocks.
      shared: one linearization serves all products. False repeats the forward pass in every product: only for the
        ablation `plan="off"`.
    """

    gradient: bool = False
    product: bool = False
    rows: bool = False
    sampling: bool = False
    factors: bool = False
    shared: bool = True


class GramProduct(Protocol):
    """S^T J J^T S of some rows."""

    def __call__(self, max_bytes: int, implementation: Implementation | Choice | None = None, /) -> jax.Array:
        """The (rows, rows) matrix, rows and factors in bounded memory, by an implementation of `gram_accumulate`."""
        ...


Measure: TypeAlias = Callable[[Examples], PyTree]
"""A sum over examples, made from the factors of their rows."""


class LayerFactors(Protocol):
    """The factors of rows whose outer products make, or have as expectation, the curvature that a metric chooses."""

    def __call__(self, fisher: FisherType, key: jax.Array, /) -> Callable[[Measure], PyTree]:
        """measure -> what it measures on the whole batch, summed over the slices of the batch."""
        ...


@dataclasses.dataclass(frozen=True)
class JacobianRows:
    """The factors of C = J^T Q J, Q = S S^T, on one batch: J maps parameters to outputs, S maps rows to outputs.

    Attributes:
      jvp: v -> J v, upcast parameter vector to upcast outputs.
      vjp: u -> J^T u.
      output: Q, its factor S and their shapes.
      gram: (max_bytes, implementation) -> S^T J J^T S as a dense matrix.
      diagonal: max_bytes -> the diagonal of C, an upcast tree.
      scaled: d -> the rows of J diag(d), for an upcast tree d.
      source: what the rows are made from, which lets them meet other rows; `None` for whoever cannot say.
      groups: max_bytes -> the rows as `gram` makes them in so much memory, for the planner; `None` if nobody can say.
      second: v -> d^2/dt^2 f(theta + t v) at t = 0, upcast outputs; `None` where nobody differentiates twice.
    """

    jvp: Callable[[PyTree], jax.Array]
    vjp: Callable[[jax.Array], PyTree]
    output: OutputCurvature
    gram: GramProduct
    diagonal: Callable[[int], PyTree]
    scaled: Callable[[PyTree], JacobianRows]
    groups: Callable[[int], RowGroups] | None = None
    source: RowSource | None = None
    second: Callable[[PyTree], jax.Array] | None = None

    @staticmethod
    def of(source: RowSource, jvp: Callable[[PyTree], jax.Array]) -> JacobianRows:
        """The rows that a source makes."""
        gram, diagonal = functools.partial(row_gram, source), functools.partial(row_diagonal, source)
        groups = functools.partial(row_groups, source)
        scaled = functools.partial(_scaled_rows, source, jvp)
        return JacobianRows(jvp, source.vjp, source.output, gram, diagonal, scaled, groups, source)

    def product(self, v: PyTree) -> PyTree:
        """C v."""
        return self.vjp(self.output.product(self.jvp(v)))

    def quadratic(self, v: PyTree) -> jax.Array:
        """v.Cv = (J v).Q(J v), without a pass back."""
        tangents = self.jvp(v)
        return tree.vdot(tangents, self.output.product(tangents))


def _scaled_rows(source: RowSource, jvp: Callable[[PyTree], jax.Array], by: PyTree) -> JacobianRows:
    """The rows of q -> f(p + by q) at q = 0, which are the same point to the last bit."""

    def predict(q: PyTree, inputs: Any) -> jax.Array:
        moved = jax.tree.map(lambda p, d, x: p + (d * x).astype(p.dtype), source.params, by, q)
        if source.predict is None:
            raise AssertionError("without a model of the examples nobody calls it.")
        return source.predict(moved, inputs)

    apart = dataclasses.replace(
        source,
        predict=None if source.predict is None else predict,
        params=tree.zeros_like(source.params),
        vjp=lambda u: jax.tree.map(jnp.multiply, by, source.vjp(u)),
    )
    return JacobianRows.of(apart, lambda v: jvp(jax.tree.map(jnp.multiply, by, v)))


@dataclasses.dataclass(frozen=True)
class Linearization:
    """One batch seen from one parameter point. All vectors are upcast (`curvax.tree.accumulation_dtype`).

    Attributes:
      params_like: `jax.ShapeDtypeStruct`s of upcast parameter vectors.
      loss: scalar loss at the point.
      gradient: its gradient, or `None` if not asked for.
      output_gradient: the gradient in output space, r with gradient = J^T r; `None` where there is no output space.
      product: v -> C v for the symmetric curvature C, or `None` if not asked for; may be vmapped.
      quadratic: v -> v.Cv, if that is cheaper than the product; `None` if it is not, or not asked for.
      sampled_gradient: key -> sum_i sqrt(w_i) J_i^T grad l_i(f_i, sampled target), whose elementwise square has
        the expectation diag(GGN) for losses that are log-likelihoods; `None` if there is nothing to sample from.
      rows: the factors of C, or `None`.
      layer_factors: activations and cotangents at the model's layer uses, example by example, or `None`.
      rounding: () -> how far rounding may move the loss (`losses.rounding`), a scalar; `None` for an operator that
        cannot say.
      leaf_axes: () -> `Curvature.leaf_axes` at the point, or `None`.
      model_state: the model's new state.
      aux: what the model returned beside its outputs.
      batch_fault: what is wrong with the values of the batch, a `curvax.losses.BatchFault` as an int32 scalar; `None`
        where nobody looks.
      losses: of a loss of several terms what each adds to it, by name; `None` for others.
    """

    params_like: PyTree
    loss: jax.Array
    gradient: PyTree = None
    output_gradient: jax.Array | None = None
    product: Callable[[PyTree], PyTree] | None = None
    quadratic: Callable[[PyTree], jax.Array] | None = None
    sampled_gradient: Callable[[jax.Array], PyTree] | None = None
    rows: JacobianRows | None = None
    layer_factors: LayerFactors | None = None
    rounding: Callable[[], jax.Array] | None = None
    leaf_axes: Callable[[], tuple[tuple[LeafAxes, ...], ...]] | None = None
    model_state: PyTree = None
    aux: Any = None
    batch_fault: jax.Array | None = None
    losses: Mapping[str, jax.Array] | None = None

    @property
    def has_sampling(self) -> bool:
        """Whether targets can be sampled from the model."""
        return self.sampled_gradient is not None

    def bend(self, v: PyTree) -> jax.Array:
        """v.Cv, of a linearization that was asked for products."""
        if self.quadratic is not None:
            return self.quadratic(v)
        if self.product is None:
            raise AssertionError("a linearization asked for products has them.")
        return tree.vdot(v, self.product(v))


class ReadsBatches(abc.ABC):
    """What an operator and the loss of one both know of a batch; all but `check` answer for who knows nothing."""

    @abc.abstractmethod
    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        """Raises a one-sentence error for a batch that does not fit, from shapes alone."""

    def examples(self, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]) -> ExampleAxes:
        """Where the batch holds its examples, from shapes alone; an operator that does not know takes first axes.

        Args:
          params, evaluation: as for `linearize`.
          sizes: number of examples -> those of the pieces that the batch is to be cut into; none if it stays whole.
        """
        del params, sizes
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(evaluation.batch)]
        axes = BatchAxes(tuple(0 if shape else None for shape in shapes))
        alike = len({shape[:1] for shape in shapes}) == 1 and axes.any
        return ExampleAxes(axes, refused="" if alike else "the leaves of the batch have no first axis in common")

    def prepare(self, params: PyTree, evaluation: Evaluation) -> Evaluation:
        """The evaluation with `axes`, where they are needed, and without what examples of zero weight hold.

        Such an example (a position, where the model acts on each position by itself) holds a copy of one that counts:
        with weight zero it adds zero times the other's numbers, which are finite, and not zero times its own. Given
        shapes in the place of arrays it finds the axes and changes nothing.
        """
        del params
        return evaluation

    def stand_in(self, params: PyTree, evaluation: Evaluation, examples: ExampleAxes) -> Evaluation:
        """The second half of `prepare`, of an evaluation whose examples are known."""
        del params
        return dataclasses.replace(evaluation, axes=examples.axes)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        """See `Linearization.batch_fault`."""
        del params, evaluation
        return None

    def total_weight(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        """What a `loss_fn` that returns (total, weight) says of the weight of a piece; `None` for all others."""
        del params, evaluation
        return None


class Curvature(ReadsBatches):
    """A symmetric matrix-free curvature of a loss, bound to a batch by `linearize`.

    An implementor is a frozen dataclass whose one job is `linearize`: loss, gradient and products at a point, and what
    else `Needs` asks for and the `has_` properties promise. `value` and `forward` are a forward pass for the step and
    for the planner, which counts traces of all of these; `kernels` and `repeats_forward` tell it what traces do not.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The operator's name in the plan."""

    @property
    def term_names(self) -> tuple[tuple[str, str], ...]:
        """Of a loss of several terms, the name of each and what it is, for the plan."""
        return ()

    @property
    @abc.abstractmethod
    def partition(self) -> TrainablePartition:
        """Which parameters train."""

    @property
    @abc.abstractmethod
    def has_rows(self) -> bool:
        """Whether C = J^T S S^T J with known factors, so that the row lane can serve it."""

    @property
    @abc.abstractmethod
    def has_sampling(self) -> bool:
        """Whether targets can be sampled from the model."""

    @property
    def has_factors(self) -> bool:
        """Whether linearizations offer `layer_factors`."""
        return False

    @property
    @abc.abstractmethod
    def is_random(self) -> bool:
        """Whether `linearize` needs `Evaluation.sample_key`."""

    @property
    @abc.abstractmethod
    def has_state(self) -> bool:
        """Whether the model takes and returns mutable state."""

    @property
    @abc.abstractmethod
    def needs_model_key(self) -> bool:
        """Whether the model takes a random key."""

    @property
    def repeats_forward(self) -> bool:
        """Whether each product begins with a forward pass of its own, so that it costs one more."""
        return False

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        """The ops that curvature products call, and what they ask of them, from shapes alone: none for most."""
        del params, evaluation
        return ()

    def with_kernels(self, choices: Mapping[str, Choice]) -> Curvature:
        """The same operator with the implementations of its ops chosen."""
        del choices
        return self

    def traced_once(self) -> Self:
        """The same operator, which runs the user's functions once for each set of shapes (`curvax.traced_once`)."""
        return self

    @property
    def judges_steps(self) -> bool:
        """Whether the loss of the batch at other parameters says how good a step was."""
        return True

    @property
    def couples_examples(self) -> bool:
        """Whether examples enter each other's terms of the loss, so that it takes the outputs of all of them."""
        return False

    def outputs(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """(model outputs, (new model state, aux)), of an operator with rows or one that couples examples."""
        return self.forward(params, evaluation), (evaluation.model_state, None)

    def value_of(self, outputs: jax.Array, evaluation: Evaluation) -> jax.Array:
        """`value` from the outputs of the whole batch, of an operator that couples examples."""
        raise ValueError(f"the {self.name} is no function of a model's outputs: pass predict_fn and loss.")

    def linearize_outputs(self, params: PyTree, evaluation: Evaluation, at: LinearModel, needs: Needs) -> Linearization:
        """`linearize` from the outputs of the whole batch, of an operator that couples examples."""
        raise ValueError(f"the {self.name} is no function of a model's outputs: pass predict_fn and loss.")

    @abc.abstractmethod
    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        """The weights with which the examples of `evaluation.batch` enter the loss, normalizer included."""

    @abc.abstractmethod
    def linearize(self, params: PyTree, evaluation: Evaluation, needs: Needs) -> Linearization:
        """Evaluates the model at `params` (the trainable part) once, for everything in `needs`."""

    @abc.abstractmethod
    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        """The scalar loss alone, by a forward pass."""

    @abc.abstractmethod
    def forward(self, params: PyTree, evaluation: Evaluation) -> Any:
        """What is differentiated (model outputs or loss), for the planner's tracing."""

    @abc.abstractmethod
    def structure(self, params: PyTree, evaluation: Evaluation) -> tuple[LeafStructure, ...]:
        """How each parameter leaf enters the Gram matrix of the rows; nothing where there are no rows."""

    @abc.abstractmethod
    def leaf_axes(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[LeafAxes, ...], ...]:
        """Per parameter leaf, what its axes are to the layers that use it, from shapes alone."""

    def blocks(self, params: PyTree, evaluation: Evaluation) -> KroneckerBlocks:
        """The blocks of the parameters that Kronecker factors serve, from shapes alone.

        Raises:
          ValueError: the curvature has no factors, or the model or the loss mixes examples.
        """
        del params, evaluation
        raise ValueError(f"Kronecker factors are those of a Gauss-Newton matrix, and the {self.name} has none: "
                         "use a GaussNewton curvature.")  # fmt: skip

    @abc.abstractmethod
    def rows(
        self,
        params: PyTree,
        evaluation: Evaluation,
        outputs: jax.Array,
        jvp: Callable[[PyTree], jax.Array],
        vjp: Callable[[jax.Array], PyTree],
    ) -> JacobianRows:
        """The row factors of C at given outputs and linear maps; raises if there are none."""
