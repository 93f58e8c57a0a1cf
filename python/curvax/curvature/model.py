"""How curvax calls a user's model: one place for optional state, random keys and auxiliary output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.arity import check_takes
from curvax.complex_parts import is_complex, real_view
from curvax.curvature.base import Evaluation
from curvax.curvature.partition import TrainablePartition
from curvax.explicit_models import on_automatic_axes
from curvax.losses.base import Loss, Shaped
from curvax.structure.batch_axes import AxesPrefix, BatchAxes, ExampleAxes, expand_axes
from curvax.structure.batch_axis import ExampleModel
from curvax.structure.outputs import check_outputs
from curvax.structure.positions import LossWeights, fill_idle_leaves
from curvax.traced_once import traced_once
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a user's function takes and returns beside the plain signature.

    Attributes:
      has_state: it takes the model state as third argument and returns `(result, new_state)`.
      has_aux: it returns `(result, aux)`, or `(result, new_state, aux)` together with `has_state`.
      has_rng: it takes a random key as keyword `rng`.
      partition: which parameters train.
    """

    has_state: bool = False
    has_aux: bool = False
    has_rng: bool = False
    partition: TrainablePartition = TrainablePartition()

    def call(
        self, function: Callable[..., Any], trainable: PyTree, inputs: Any, evaluation: Evaluation
    ) -> tuple[Any, tuple[PyTree, Any]]:
        """Returns (result, (new model state, aux))."""
        params = self.partition.merge(trainable, evaluation.frozen)
        positional = (params, inputs, evaluation.model_state) if self.has_state else (params, inputs)
        keyword = {"rng": self._key(evaluation)} if self.has_rng else {}
        returned = function(*positional, **keyword)
        return self._unpack(returned, evaluation)

    def check_takes(self, name: str, function: Callable[..., Any], data: str) -> None:
        """Raises TypeError for a function that cannot be called so.

        Args:
          name: of the option that it is given by.
          function: what `call` will call.
          data: name of what it takes beside the parameters.
        """
        positional = ["params", data, *(["model_state"] if self.has_state else [])]
        check_takes(name, function, positional, ["rng"] if self.has_rng else [])

    def _key(self, evaluation: Evaluation) -> jax.Array:
        if evaluation.model_key is None:
            raise ValueError("the model takes a random key (has_rng=True): pass one to step.")
        return evaluation.model_key

    def _unpack(self, returned: Any, evaluation: Evaluation) -> tuple[Any, tuple[PyTree, Any]]:
        expected = 1 + self.has_state + self.has_aux
        if expected == 1:
            return returned, (evaluation.model_state, None)
        if not isinstance(returned, tuple) or len(returned) != expected:
            parts = ["result"] + ["new_state"] * self.has_state + ["aux"] * self.has_aux
            raise TypeError(f"the model must return the tuple ({', '.join(parts)}) with the has_* options as they are.")
        state = self._state(returned[1], evaluation) if self.has_state else evaluation.model_state
        aux = returned[-1] if self.has_aux else None
        return returned[0], (state, aux)

    @staticmethod
    def _state(returned: PyTree, evaluation: Evaluation) -> PyTree:
        """The new model state in the boxes and dtypes of the old one, so that the next step is the same program."""
        old = evaluation.model_state
        if old is None:
            return returned
        new = tree.in_boxes_of(old, returned)
        if jax.tree.structure(new) == jax.tree.structure(old):
            return jax.tree.map(lambda x, y: jax.lax.convert_element_type(x, jnp.result_type(y)), new, old)
        differ = sorted(set(tree.places(new)) ^ set(tree.places(old)))
        raise TypeError(
            "the model returned a state unlike the one that it took"
            + (f" (not in both: {', '.join(differ[:4])})" if differ else "")
            + ": return the whole new state, in the containers of the old one."
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """`predict_fn(params, inputs) -> outputs` and where a batch holds its inputs, targets and weights.

    Inputs, targets, weights and outputs are handed on with their examples on the first axis, wherever they are.

    Attributes:
      predict_fn: acts on each example by itself.
      x_key, y_key: keys of inputs and targets in the batch mapping.
      weight_key: key of per-example weights or a mask, or `None` for none.
      extras: state, aux, random key, frozen parameters.
      batch_axes: which axis of each leaf of the batch holds the examples, `None` for a leaf that all examples share: a
        prefix of the batch, as `in_axes` of `jax.vmap` is one of its arguments. By default, `None`, the first axis of
        targets, weights, and those inputs that the model turns out to treat so (`curvax.structure`). The outputs have
        their examples where the targets have theirs.
      complex_outputs: whether the model may return complex numbers; outputs are then `real_view`s of them. By default
        not: a `GaussNewton` sets it to what its loss takes.
    """

    predict_fn: Callable[..., Any]
    x_key: str = "x"
    y_key: str = "y"
    weight_key: str | None = None
    extras: Extras = Extras()
    batch_axes: AxesPrefix | None = None
    complex_outputs: bool = False

    def __post_init__(self) -> None:
        self.extras.check_takes("predict_fn", self.predict_fn, "inputs")

    def traced_once(self) -> Model:
        """The same model, whose Python runs once for each set of shapes."""
        return dataclasses.replace(self, predict_fn=traced_once(on_automatic_axes(self.predict_fn)))

    def returning_to(self, loss: Loss) -> Model:
        """The model with complex outputs allowed if the loss takes them."""
        return dataclasses.replace(self, complex_outputs=loss.takes_complex)

    def outputs(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """Returns (outputs, (new model state, aux))."""
        return self.call(params, self.inputs(evaluation.batch), evaluation)

    def call(self, params: PyTree, inputs: Any, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """`outputs` of these inputs instead of those of the evaluation's batch."""
        axes, axis = self._entry_axes(self.x_key, inputs), self._output_axis(evaluation.batch)
        if axes is not None:
            inputs = axes.from_front(inputs)
        outputs, rest = self.extras.call(self.predict_fn, params, inputs, evaluation)
        if self.complex_outputs and is_complex(outputs):
            return real_view(jnp.moveaxis(outputs, axis, 0)), rest
        outputs = check_outputs(outputs, "; for what it returns beside them set has_aux=True or has_state=True")
        return (jnp.moveaxis(outputs, axis, 0) if axis else outputs), rest

    def inputs(self, batch: Any) -> Any:
        """The model inputs in a batch."""
        return self._front(batch, self.x_key)

    def targets(self, batch: Any) -> Any:
        """The targets in a batch; complex ones, which are for complex outputs, as their `real_view`."""
        targets = self._front(batch, self.y_key)
        return jax.tree.map(_real_targets, targets) if self.complex_outputs else targets

    def weights(self, batch: Any) -> jax.Array | None:
        """The weights in a batch, or `None`."""
        return None if self.weight_key is None else self._front(batch, self.weight_key)

    def examples(
        self, loss: Loss, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]
    ) -> ExampleAxes:
        """See `Curvature.examples`."""
        batch, inputs, masks = evaluation.batch, self.inputs(evaluation.batch), self._may_mask(loss)
        given = self._entry_axes(self.x_key, inputs)
        axes: BatchAxes | None = None
        if given is not None:
            axes = _joined(batch, {key: self._entry_axes(key, self._entry(batch, key)) for key in self._keys})
            if not masks:
                return ExampleAxes(axes)
        model = ExampleModel.of(lambda p, x: self.call(p, x, evaluation)[0], params, inputs)
        # How the positions of masked examples act is seen on one example.
        input_axes, mixed = model.examples(
            None if given is None else given.fronted,
            lambda count: (*(sizes(count) if given is None else ()), *((1,) if masks else ())),
        )
        single = functools.partial(model.at, input_axes, 1)
        if axes is not None:
            # How the batch is cut is the user's word, whether examples interact or not.
            return ExampleAxes(axes, mixed, single=single)
        entries = {key: _leading(self._entry(batch, key)) for key in self._keys}
        refused = (
            f"the model mixes examples ({mixed}); drop microbatch_size, or say by batch_axes= which axes hold the "
            "examples, if every piece is to count as a batch of its own"
        )
        return ExampleAxes(_joined(batch, {**entries, self.x_key: input_axes}), mixed, refused if mixed else "", single)

    def _may_mask(self, loss: Loss) -> bool:
        return self.weight_key is not None or loss.leaves_out

    def input_axes(self, evaluation: Evaluation) -> BatchAxes | None:
        """Which leaves of `inputs` hold examples, on their first axis, if the evaluation knows."""
        if evaluation.axes is None:
            given = self._entry_axes(self.x_key, self._entry(evaluation.batch, self.x_key))
            return None if given is None else given.fronted
        places = jax.tree.leaves(_places(evaluation.batch)[self.x_key])
        return BatchAxes(tuple(evaluation.axes.axes[place] for place in places)).fronted

    def prepare(self, loss: Loss, params: PyTree, evaluation: Evaluation) -> Evaluation:
        """See `Curvature.prepare`: without weights there is nothing to do."""
        if evaluation.axes is not None or not self._may_mask(loss):
            return evaluation
        return self.stand_in(loss, params, evaluation, self.examples(loss, params, evaluation, lambda _: ()))

    def stand_in(self, loss: Loss, params: PyTree, evaluation: Evaluation, examples: ExampleAxes) -> Evaluation:
        """See `Curvature.stand_in`. ExampleAxes that interact keep what they hold: it is part of the others."""
        evaluation, batch = dataclasses.replace(evaluation, axes=examples.axes), evaluation.batch
        shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch))
        if examples.mixed or shapes or not self._may_mask(loss):
            return evaluation
        if examples.single is None:
            raise AssertionError("a model whose examples were looked at has a program on one of them.")
        outputs = jax.eval_shape(lambda p, e: self.outputs(p, e)[0], params, evaluation)
        weights = self.loss_weights(loss, loss.effective_weights(outputs, self._observed(loss, outputs, batch)),
                                    outputs, batch)  # fmt: skip
        leaves, structure = jax.tree.flatten(batch)
        inputs, places = self.inputs(batch), jax.tree.leaves(_places(batch)[self.x_key])
        own = BatchAxes(tuple(examples.axes.axes[place] for place in places))
        filled = fill_idle_leaves(examples.single, own.fronted, jax.tree.leaves(inputs), weights)
        for place, leaf in zip(places, jax.tree.leaves(own.from_front(filled)), strict=True):
            leaves[place] = leaf
        return dataclasses.replace(evaluation, batch=jax.tree.unflatten(structure, leaves))

    def loss_weights(self, loss: Loss, weights: jax.Array, outputs: Shaped, batch: Any) -> LossWeights:
        """Effective weights, and how they come from the batch."""
        return LossWeights.of(weights, outputs, self._observed(loss, outputs, batch))

    def _observed(self, loss: Loss, outputs: Shaped, batch: Any) -> Any:
        return loss.observed_weights(outputs, self.targets(batch), self.weights(batch))

    def check(self, loss: Loss, outputs: Shaped, batch: Any, *, signed: bool) -> None:
        """Raises a one-sentence error for targets and weights that do not fit the outputs or the loss."""
        targets, weights = self.targets(batch), self.weights(batch)
        loss.check(outputs, targets, weights)
        loss.check_values(outputs, targets, weights, signed=signed)

    def batch_fault(self, loss: Loss, outputs: Shaped, batch: Any, *, signed: bool) -> jax.Array:
        """See `Loss.batch_fault`."""
        targets, weights = self.targets(batch), self.weights(batch)
        return loss.batch_fault(outputs, targets, weights, signed=signed)

    def effective_weights(self, loss: Loss, outputs: Shaped, batch: Any, *, signed: bool) -> jax.Array:
        """See `Loss.effective_weights`; NaN where a weight is negative and none may be."""
        weights = loss.effective_weights(
            outputs, loss.observed_weights(outputs, self.targets(batch), self.weights(batch))
        )
        if signed or self.weight_key is None:
            return weights
        return jnp.where(jnp.all(weights >= 0), weights, jnp.full((), jnp.nan, weights.dtype))

    @property
    def _keys(self) -> dict[str, str]:
        """The keys that are read, and the options that name them."""
        named = {self.x_key: "x_key", self.y_key: "y_key"}
        return named if self.weight_key is None else {**named, self.weight_key: "weight_key"}

    def _entry_axes(self, key: str, entry: Any) -> BatchAxes | None:
        """The axes that `batch_axes` gives to one entry of the batch; `None` without it."""
        prefix = self.batch_axes
        if prefix is None:
            return None
        if isinstance(prefix, Mapping):
            if key not in prefix:
                raise KeyError(
                    f"batch_axes says nothing of '{key}': give its axis of examples, or None if all share it."
                )
            prefix = prefix[key]
        if key == self.weight_key and np.shape(entry) == ():
            prefix = None
        return expand_axes(prefix, entry, f"batch_axes of '{key}'")

    def _output_axis(self, batch: Any) -> int:
        axes = self._entry_axes(self.y_key, self._entry(batch, self.y_key)) if self.batch_axes is not None else None
        if axes is None:
            return 0
        own = set(axes.axes)
        if len(own) != 1 or None in own:
            raise ValueError(
                f"batch_axes gives the targets '{self.y_key}' the axes {sorted(map(str, own))}: give all of them the "
                "axis that holds the examples of the outputs."
            )
        return axes.axes[0] or 0

    def _front(self, batch: Any, key: str) -> Any:
        entry = self._entry(batch, key)
        axes = self._entry_axes(key, entry)
        return entry if axes is None else axes.to_front(entry)

    def _entry(self, batch: Any, key: str) -> Any:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the batch must be a mapping such as {{'{self.x_key}': inputs, '{self.y_key}': targets}}, "
                f"not a {type(batch).__name__}."
            )
        if key not in batch:
            raise KeyError(
                f"the batch has no '{key}' (it has {sorted(map(str, batch))}): add it or set {self._keys[key]}."
            )
        return batch[key]


def _real_targets(x: Any) -> Any:
    shapes = isinstance(x, jax.ShapeDtypeStruct)
    return (jax.eval_shape(real_view, x) if shapes else real_view(x)) if is_complex(x) else x


def _leading(entry: Any) -> BatchAxes:
    return BatchAxes(tuple(0 if np.shape(leaf) else None for leaf in jax.tree.leaves(entry)))


def _places(batch: Mapping[str, Any]) -> Any:
    """The batch with the numbers of its leaves in their place."""
    leaves, structure = jax.tree.flatten(batch)
    return jax.tree.unflatten(structure, list(range(len(leaves))))


def _joined(batch: Mapping[str, Any], entries: Mapping[str, BatchAxes | None]) -> BatchAxes:
    """The axes of a whole batch from those of its entries; what is in none of them holds no examples."""
    places = _places(batch)
    axes: list[int | None] = [None] * len(jax.tree.leaves(batch))
    for key, own in entries.items():
        if own is not None:
            for place, axis in zip(jax.tree.leaves(places[key]), own.axes, strict=True):
                axes[place] = axis
    return BatchAxes(tuple(axes))
