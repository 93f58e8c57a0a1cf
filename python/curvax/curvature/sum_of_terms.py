"""The curvature of a loss of several terms: a sum, in which each term is treated by its own examples.

    gradient    sum of the terms' gradients                  products    sum of the terms' products
    diagonal    sum of the terms' diagonals                  factors     sums over the examples of each
    rows        those of one term after those of another     Gram        blocks of terms (`structure.joint`)

A term's weight enters its examples' effective weights, so that nothing behind knows of it. Row vectors are flat, the
terms' one after another:

    outputs   [ interior (900, 1) | boundary (120, 2) ]   J v and J^T u, (1140,)
    rows      [ S of interior     | S of boundary     ]   S u and S^T v, (1140,) where each S is square
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.curvature.base import Curvature, Evaluation, JacobianRows, LayerFactors, Linearization, Measure, Needs
from curvax.curvature.gauss_newton import GaussNewton
from curvax.curvature.microbatch import Microbatched
from curvax.curvature.model import Extras, Model
from curvax.curvature.partition import TrainablePartition
from curvax.curvature.terms import WEIGHTS, Terms, check_batch, term_weight
from curvax.kernels import Choice, Implementation, Op, Request
from curvax.losses import BatchFault, Loss
from curvax.losses.rounding import loss_rounding
from curvax.output_space import FisherType, OutputCurvature
from curvax.structure.axes import LeafAxes
from curvax.structure.batch_axes import BatchAxes, ExampleAxes
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.find_blocks import join_blocks
from curvax.structure.joint import joint_gram
from curvax.structure.report import LeafStructure
from curvax.structure.rows import RowSource, outputs_like
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class CurvatureTerm:
    """One term of a sum.

    Attributes:
      name: for people and info.
      curvature: of the term with weight 1.
      weight: of the term.
      key: where the batch has its batch.
    """

    name: str
    curvature: Curvature
    weight: float
    key: str


@contextlib.contextmanager
def _naming(term: CurvatureTerm) -> Generator[None, None, None]:
    """Errors that something about the batch does not fit begin with the name of the term."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        # JAX's own errors, which are kinds of these, say where in the user's code they come from.
        if type(error) not in (KeyError, TypeError, ValueError) or not error.args:
            raise
        raise type(error)(f"term '{term.name}': {error.args[0]}") from error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TermBatch:
    """What one term has of a prepared batch: fields as in `Evaluation`."""

    batch: Any
    weights: jax.Array
    axes: BatchAxes | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TermBatches:
    """A prepared batch, which takes the place of the batch in an `Evaluation`.

    Attributes:
      terms: one for each term.
      negative: whether the weight of a term is negative.
    """

    terms: tuple[TermBatch, ...]
    negative: jax.Array


@dataclasses.dataclass(frozen=True)
class SumOfTerms(Curvature):
    """The sum of several curvatures of the same parameters, each on a batch of its own.

    Random keys are folded with the number of the term, and the model state passes through the terms in order.

    Attributes:
      terms: what is added up, at least one.
    """

    terms: tuple[CurvatureTerm, ...]

    @staticmethod
    def of(terms: Terms, extras: Extras, curvature: Callable[[Model, Loss], Curvature]) -> SumOfTerms:
        """The sum over the terms of a loss.

        Args:
          terms: the terms.
          extras: what their models take and return beside the plain signature.
          curvature: makes the curvature of a model and a loss.
        """
        return SumOfTerms(tuple(
            CurvatureTerm(name, curvature(_model(term, extras), term.loss), term.weight, term.key or name)
            for name, term in terms.terms
        ))  # fmt: skip

    @staticmethod
    def gauss_newton(terms: Terms, fisher: FisherType, extras: Extras | None = None) -> SumOfTerms:
        """The sum of the terms' Gauss-Newton matrices."""
        return SumOfTerms.of(terms, extras or Extras(), lambda model, loss: GaussNewton(model, loss, fisher))

    def in_pieces(self, size: int) -> SumOfTerms:
        """The same with each term's batch in pieces of so many examples."""
        return self._mapped(lambda curvature: Microbatched(curvature, size))

    def _mapped(self, function: Callable[[Curvature], Curvature]) -> Self:
        new = tuple(dataclasses.replace(term, curvature=function(term.curvature)) for term in self.terms)
        return dataclasses.replace(self, terms=new)

    @property
    def _curvatures(self) -> list[Curvature]:
        return [term.curvature for term in self.terms]

    @property
    def name(self) -> str:
        return f"sum of {len(self.terms)} terms"

    @property
    def term_names(self) -> tuple[tuple[str, str], ...]:
        return tuple(
            (f"term {term.name}", f"{term.curvature.name}, weight {term.weight:g}, batch['{term.key}']")
            for term in self.terms
        )

    @property
    def partition(self) -> TrainablePartition:
        return self.terms[0].curvature.partition

    @property
    def has_rows(self) -> bool:
        return all(curvature.has_rows for curvature in self._curvatures)

    @property
    def has_sampling(self) -> bool:
        return all(curvature.has_sampling for curvature in self._curvatures)

    @property
    def has_factors(self) -> bool:
        return all(curvature.has_factors for curvature in self._curvatures)

    def traced_once(self) -> SumOfTerms:
        return self._mapped(lambda curvature: curvature.traced_once())

    @property
    def judges_steps(self) -> bool:
        return all(curvature.judges_steps for curvature in self._curvatures)

    @property
    def is_random(self) -> bool:
        return any(curvature.is_random for curvature in self._curvatures)

    @property
    def has_state(self) -> bool:
        return any(curvature.has_state for curvature in self._curvatures)

    @property
    def needs_model_key(self) -> bool:
        return any(curvature.needs_model_key for curvature in self._curvatures)

    @property
    def repeats_forward(self) -> bool:
        return all(curvature.repeats_forward for curvature in self._curvatures)

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        """Those of all terms; of an op that several call, the largest request."""
        wanted: dict[str, tuple[Op, Request]] = {}
        for curvature, own in self._each(params, evaluation):
            for op, request in curvature.kernels(params, own):
                if op.name not in wanted or wanted[op.name][1].size < request.size:
                    wanted[op.name] = (op, request)
        return tuple(wanted.values())

    def with_kernels(self, choices: Mapping[str, Choice]) -> SumOfTerms:
        return self._mapped(lambda curvature: curvature.with_kernels(choices))

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        batch = evaluation.batch
        check_batch(batch, {term.name: term.key for term in self.terms})
        for index, term in enumerate(self.terms):
            with _naming(term):
                own, _ = _counted(term, batch)
                term.curvature.check(params, self._evaluation(index, evaluation, own))

    def examples(self, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]) -> ExampleAxes:
        whole: list[int | None] = [None] * len(jax.tree.leaves(evaluation.batch))
        leaves, structure = jax.tree.flatten(evaluation.batch)
        places = jax.tree.unflatten(structure, list(range(len(leaves))))
        for index, term in enumerate(self.terms):
            own = self._evaluation(index, evaluation, _counted(term, evaluation.batch)[0])
            axes = term.curvature.examples(params, own, sizes).axes
            for place, axis in zip(jax.tree.leaves(places[term.key]), axes.axes, strict=True):
                whole[place] = axis if whole[place] is None else whole[place]
        refused = "its terms have sets of their own: cut each term's (SumOfTerms.in_pieces)"
        return ExampleAxes(BatchAxes(tuple(whole)), refused=refused)

    def prepare(self, params: PyTree, evaluation: Evaluation) -> Evaluation:
        """See `Curvature.prepare`; the terms' weights enter those of their examples."""
        return self.prepare_by([term.curvature.prepare for term in self.terms], params, evaluation)

    def prepare_by(
        self, prepare: Sequence[Callable[[PyTree, Evaluation], Evaluation]], params: PyTree, evaluation: Evaluation
    ) -> Evaluation:
        """`prepare` with functions in the place of the terms' own."""
        if isinstance(evaluation.batch, TermBatches):
            return evaluation
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(evaluation.batch)):
            # Axes are static, so that shapes of what is prepared say all there is.
            batch = jax.eval_shape(lambda p, e: self._prepared(prepare, p, e), params, evaluation)
        else:
            batch = self._prepared(prepare, params, evaluation)
        return dataclasses.replace(evaluation, batch=batch)

    def _prepared(
        self, prepare: Sequence[Callable[[PyTree, Evaluation], Evaluation]], params: PyTree, evaluation: Evaluation
    ) -> TermBatches:
        parts, negative = [], jnp.asarray(False)
        for index, (term, own_prepare) in enumerate(zip(self.terms, prepare, strict=True)):
            scale = term_weight(term.weight, term.name, evaluation.batch, tree.scalar_dtype(params))
            if isinstance(scale, jax.Array):
                negative |= ~(scale >= 0)
            given, empty = _counted(term, evaluation.batch)
            scale = 0.0 if empty else scale
            batch = _finite_if_idle(scale, given)
            with _naming(term):
                own = own_prepare(params, self._evaluation(index, evaluation, batch))
            weights = term.curvature.effective_weights(params, own)
            parts.append(TermBatch(own.batch, _times(scale, weights), own.axes))
        return TermBatches(tuple(parts), negative)

    def _evaluation(self, index: int, whole: Evaluation, batch: Any) -> Evaluation:
        """Of a term, on its batch."""

        def fold(key: jax.Array | None) -> jax.Array | None:
            return None if key is None else jax.random.fold_in(key, index)

        return dataclasses.replace(
            whole, batch=batch, model_key=fold(whole.model_key), sample_key=fold(whole.sample_key)
        )

    def evaluations(self, params: PyTree, evaluation: Evaluation) -> list[Evaluation]:
        """What each term is evaluated on, its weight among those of its examples."""
        whole = self.prepare(params, evaluation)
        return [
            dataclasses.replace(self._evaluation(index, whole, own.batch), weights=own.weights, axes=own.axes)
            for index, own in enumerate(whole.batch.terms)
        ]

    def _each(self, params: PyTree, evaluation: Evaluation) -> list[tuple[Curvature, Evaluation]]:
        """The terms' curvatures, each with its prepared evaluation."""
        return list(zip(self._curvatures, self.evaluations(params, evaluation), strict=True))

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        whole = self.prepare(params, evaluation)
        faults = [curvature.batch_fault(params, own) for curvature, own in self._each(params, whole)]
        return self._fault(whole.batch, faults)

    @staticmethod
    def _fault(batch: TermBatches, faults: Sequence[jax.Array | None]) -> jax.Array:
        own = jnp.where(batch.negative, int(BatchFault.NEGATIVE_WEIGHT), int(BatchFault.NONE)).astype(jnp.int32)
        return functools.reduce(jnp.maximum, [fault for fault in faults if fault is not None], own)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        """Flat, one term after another."""
        return _flat([own.weights for _, own in self._each(params, evaluation) if own.weights is not None])

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return _total(list(self.values(params, evaluation).values()))

    def values(self, params: PyTree, evaluation: Evaluation) -> dict[str, jax.Array]:
        """What each term adds to the loss, by name."""
        each = [curvature.value(params, own) for curvature, own in self._each(params, evaluation)]
        return dict(zip([term.name for term in self.terms], each, strict=True))

    def forward(self, params: PyTree, evaluation: Evaluation) -> Any:
        return [curvature.forward(params, own) for curvature, own in self._each(params, evaluation)]

    def linearize(self, params: PyTree, evaluation: Evaluation, needs: Needs) -> Linearization:
        whole = self.prepare(params, evaluation)
        ats: list[Linearization] = []
        state = whole.model_state
        for curvature, own in self._each(params, whole):
            ats.append(curvature.linearize(params, dataclasses.replace(own, model_state=state), needs))
            state = ats[-1].model_state
        names = [term.name for term in self.terms]
        rows = _joint_rows([_given(at.rows) for at in ats], params) if needs.rows else None
        curved = all(at.product is not None for at in ats)
        return Linearization(
            params_like=ats[0].params_like,
            loss=_total([at.loss for at in ats]),
            gradient=functools.reduce(tree.add, [at.gradient for at in ats]) if needs.gradient else None,
            output_gradient=_flat([_given(at.output_gradient) for at in ats]) if needs.rows else None,
            product=(lambda v: functools.reduce(tree.add, [_given(at.product)(v) for at in ats])) if curved else None,
            quadratic=(lambda v: _total([at.bend(v) for at in ats])) if curved else None,
            sampled_gradient=_sampled(ats) if needs.sampling and self.has_sampling else None,
            rows=rows,
            layer_factors=self._layer_factors(params, whole, ats) if needs.factors else None,
            rounding=lambda: _total([loss_rounding(at.loss) if at.rounding is None else at.rounding() for at in ats]),
            leaf_axes=lambda: self.leaf_axes(params, whole),
            model_state=state,
            aux={n: at.aux for n, at in zip(names, ats, strict=True)} if ats[0].aux is not None else None,
            batch_fault=self._fault(whole.batch, [at.batch_fault for at in ats]),
            losses={n: at.loss for n, at in zip(names, ats, strict=True)},
        )

    def structure(self, params: PyTree, evaluation: Evaluation) -> tuple[LeafStructure, ...]:
        return tuple(
            dataclasses.replace(leaf, path=f"{leaf.path} in {term.name}")
            for term, (curvature, own) in zip(self.terms, self._each(params, evaluation), strict=True)
            for leaf in curvature.structure(params, own)
        )

    def leaf_axes(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[LeafAxes, ...], ...]:
        each = [curvature.leaf_axes(params, own) for curvature, own in self._each(params, evaluation)]
        return tuple(tuple(itertools.chain(*leaf)) for leaf in zip(*each, strict=True))

    def _blocks(self, params: PyTree, evaluation: Evaluation) -> list[KroneckerBlocks]:
        return [curvature.blocks(params, own) for curvature, own in self._each(params, evaluation)]

    def blocks(self, params: PyTree, evaluation: Evaluation) -> KroneckerBlocks:
        return join_blocks(self._blocks(params, evaluation))

    def _layer_factors(self, params: PyTree, evaluation: Evaluation, ats: Sequence[Linearization]) -> LayerFactors:
        blocks = self._blocks(params, evaluation)
        uses, explicit = ([len(x) for x in of] for of in (
            [part.uses for part in blocks], [part.explicit_regions for part in blocks]
        ))  # fmt: skip

        def around(counts: list[int], index: int) -> tuple[int, int]:
            return sum(counts[:index]), sum(counts[index + 1 :])

        def layer_factors(fisher: FisherType, key: jax.Array) -> Callable[[Measure], PyTree]:
            each = [_given(at.layer_factors)(fisher, jax.random.fold_in(key, i)) for i, at in enumerate(ats)]

            def total(measure: Measure) -> PyTree:
                terms = [
                    term(lambda examples, i=i: measure(examples.placed(around(uses, i), around(explicit, i))))
                    for i, term in enumerate(each)
                ]
                return functools.reduce(tree.add, terms)

            return total

        return layer_factors

    def rows(
        self,
        params: PyTree,
        evaluation: Evaluation,
        outputs: jax.Array,
        jvp: Callable[[PyTree], jax.Array],
        vjp: Callable[[jax.Array], PyTree],
    ) -> JacobianRows:
        raise ValueError("several terms have no outputs in common: ask linearize for their rows.")


@dataclasses.dataclass(frozen=True)
class JointOutput(OutputCurvature):
    """Q of several terms: block diagonal, on flat vectors.

    Attributes:
      parts: the terms' own.
    """

    parts: tuple[OutputCurvature, ...]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (sum(math.prod(part.row_shape) for part in self.parts),)

    @property
    def couples_examples(self) -> bool:
        """True: the first axis is no axis of examples."""
        return True

    @property
    def _output_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(outputs_like(part).shape) for part in self.parts]

    @property
    def _row_shapes(self) -> list[tuple[int, ...]]:
        return [part.row_shape for part in self.parts]

    def product(self, v: jax.Array) -> jax.Array:
        cut = split(v, self._output_shapes)
        return _flat([part.product(x) for part, x in zip(self.parts, cut, strict=True)])

    def factor(self, rows: jax.Array) -> jax.Array:
        cut = split(rows, self._row_shapes)
        return _flat([part.factor(x) for part, x in zip(self.parts, cut, strict=True)])

    def factor_transpose(self, v: jax.Array) -> jax.Array:
        cut = split(v, self._output_shapes)
        return _flat([part.factor_transpose(x) for part, x in zip(self.parts, cut, strict=True)])

    def cotangents(self, key: jax.Array) -> jax.Array:
        raise ValueError("the examples of several terms have cotangents of their own: ask each term for them.")

    def gradient_in_rows(self) -> jax.Array | None:
        each = [part.gradient_in_rows() for part in self.parts]
        known = [x for x in each if x is not None]
        return _flat(known) if len(known) == len(each) else None

    def example(self, index: jax.Array) -> OutputCurvature:
        raise ValueError("the examples of several terms are not numbered together: ask each term for its own.")


def in_pieces(curvature: Curvature, size: int) -> Curvature:
    """The curvature of a batch in pieces of so many examples, of several terms each on its own."""
    return curvature.in_pieces(size) if isinstance(curvature, SumOfTerms) else Microbatched(curvature, size)


def split(v: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The parts of a flat vector in their shapes."""
    ends = list(itertools.accumulate(map(math.prod, shapes), initial=0))
    return [v[a:b].reshape(shape) for (a, b), shape in zip(itertools.pairwise(ends), shapes, strict=True)]


def _joint_rows(each: Sequence[JacobianRows], params: PyTree) -> JacobianRows:
    output = JointOutput(tuple(rows.output for rows in each))
    shapes = [tuple(outputs_like(rows.output).shape) for rows in each]
    sources = [rows.source or RowSource(None, params, None, rows.output, rows.vjp) for rows in each]

    def jvp(v: PyTree) -> jax.Array:
        return _flat([rows.jvp(v) for rows in each])

    def vjp(u: jax.Array) -> PyTree:
        return functools.reduce(tree.add, [rows.vjp(x) for rows, x in zip(each, split(u, shapes), strict=True)])

    def gram(max_bytes: int, implementation: Implementation | Choice | None = None) -> jax.Array:
        return joint_gram(sources, max_bytes, implementation)

    def diagonal(max_bytes: int) -> PyTree:
        return functools.reduce(tree.add, [rows.diagonal(max_bytes) for rows in each])

    def scaled(by: PyTree) -> JacobianRows:
        return _joint_rows([rows.scaled(by) for rows in each], tree.zeros_like(params))

    seconds = [rows.second for rows in each]

    def second(v: PyTree) -> jax.Array:
        return _flat([along(v) for along in seconds if along is not None])

    return JacobianRows(jvp, vjp, output, gram, diagonal, scaled, second=None if None in seconds else second)


def _sampled(ats: Sequence[Linearization]) -> Callable[[jax.Array], PyTree]:
    def sampled_gradient(key: jax.Array) -> PyTree:
        keys = [jax.random.fold_in(key, i) for i in range(len(ats))]
        return functools.reduce(tree.add, [_given(at.sampled_gradient)(k) for at, k in zip(ats, keys, strict=True)])

    return sampled_gradient


def _model(term: Any, extras: Extras) -> Model:
    return Model(term.predict_fn, term.x_key, term.y_key, term.weight_key, extras, term.batch_axes)


def _given(x: Any) -> Any:
    if x is None:
        raise AssertionError("a term's linearization offers what it was asked for.")
    return x


def _counted(term: CurvatureTerm, batch: Mapping[str, Any]) -> tuple[Any, bool]:
    """(the term's batch, whether it is an empty set that may be empty, in the place of which one example stands).

    A set may be empty if its term weighs nothing, or if the batch says what it weighs: a program for all weights has
    one for zero. The example in its place weighs nothing, whatever the batch says.
    """
    own = batch[term.key]
    leaves = jax.tree.leaves(own)
    idle = term.weight == 0 or term.name in batch.get(WEIGHTS, {})
    if not idle or not any(np.shape(x)[:1] == (0,) for x in leaves):
        return own, False

    def one(x: Any) -> Any:
        if np.shape(x)[:1] != (0,):
            return x
        shape = (1, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.ones(shape, x.dtype)

    return jax.tree.map(one, own), True


def _finite_if_idle(scale: jax.Array | float, batch: Any) -> Any:
    """The batch with ones for its numbers if the term weighs nothing, so that it contributes nothing whatever it holds.

    One is a number of which logarithm, root and quotient have a slope.
    """
    if not isinstance(scale, jax.Array) and scale != 0:
        return batch

    def keep(x: Any) -> Any:
        if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact):
            return x
        return jnp.where(scale == 0, jnp.ones((), x.dtype), x)

    return jax.tree.map(keep, batch)


def _times(scale: jax.Array | float, weights: jax.Array) -> jax.Array:
    if not isinstance(scale, jax.Array) and scale == 1:
        return weights
    factor = jnp.asarray(scale).astype(weights.dtype)
    # A weight below zero has no square root, and says nothing of how much the term counts.
    return weights * jnp.where(factor >= 0, factor, jnp.full((), jnp.nan, factor.dtype))


def _flat(parts: Sequence[jax.Array]) -> jax.Array:
    """All entries one after another, in the widest dtype."""
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in parts])
    return jnp.concatenate([x.astype(dtype).reshape(-1) for x in parts])


def _total(parts: Sequence[jax.Array]) -> jax.Array:
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in parts])
    return functools.reduce(jnp.add, [x.astype(dtype) for x in parts])
