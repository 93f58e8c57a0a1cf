"""How curvax calls a user's model: one place for optional state, random keys and auxiliary output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from curvax import tree
from curvax.curvature.base import Evaluation
from curvax.curvature.partition import Partition
from curvax.structure.outputs import check_outputs
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
    partition: Partition = Partition()

    def call(
        self, function: Callable[..., Any], trainable: PyTree, inputs: Any, evaluation: Evaluation
    ) -> tuple[Any, tuple[PyTree, Any]]:
        """Returns (result, (new model state, aux))."""
        params = self.partition.merge(trainable, evaluation.frozen)
        positional = (params, inputs, evaluation.model_state) if self.has_state else (params, inputs)
        keyword = {"rng": self._key(evaluation)} if self.has_rng else {}
        returned = function(*positional, **keyword)
        return self._unpack(returned, evaluation)

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
        state = tree.in_boxes_of(evaluation.model_state, returned)
        if jax.tree.structure(state) == jax.tree.structure(evaluation.model_state):
            return state
        differ = sorted(set(tree.places(state)) ^ set(tree.places(evaluation.model_state)))
        raise TypeError(
            "the model returned a state unlike the one that it took"
            + (f" (not in both: {', '.join(differ[:4])})" if differ else "")
            + ": return the whole new state, in the containers of the old one."
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """`predict_fn(params, inputs) -> outputs` and where a batch holds its inputs, targets and weights.

    Attributes:
      predict_fn: acts on each example of the leading axis by itself.
      x_key, y_key: keys of inputs and targets in the batch mapping.
      weight_key: key of per-example weights or a mask, or `None` for none.
      extras: state, aux, random key, frozen parameters.
    """

    predict_fn: Callable[..., Any]
    x_key: str = "x"
    y_key: str = "y"
    weight_key: str | None = None
    extras: Extras = Extras()

    def outputs(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """Returns (outputs, (new model state, aux))."""
        outputs, rest = self.extras.call(self.predict_fn, params, self.inputs(evaluation.batch), evaluation)
        beside = "; for what it returns beside them set has_aux=True or has_state=True"
        return check_outputs(outputs, beside), rest

    def inputs(self, batch: Any) -> Any:
        """The model inputs in a batch."""
        return self._entry(batch, self.x_key, "x_key")

    def targets(self, batch: Any) -> Any:
        """The targets in a batch."""
        return self._entry(batch, self.y_key, "y_key")

    def weights(self, batch: Any) -> jax.Array | None:
        """The weights in a batch, or `None`."""
        return None if self.weight_key is None else self._entry(batch, self.weight_key, "weight_key")

    def _entry(self, batch: Any, key: str, option: str) -> Any:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the batch must be a mapping such as {{'{self.x_key}': inputs, '{self.y_key}': targets}}, "
                f"not a {type(batch).__name__}."
            )
        if key not in batch:
            raise KeyError(f"the batch has no '{key}' (it has {sorted(map(str, batch))}): add it or set {option}.")
        return batch[key]
