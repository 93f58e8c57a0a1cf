"""A loss of several terms, each with a model, a loss and a set of examples of its own.

    L = sum over terms k of weight_k * loss_k(predict_k(params, inputs_k), targets_k)

A physics-informed network has residuals at interior points and values on the boundary; other losses of this form are
those of several tasks, or of policy and value. Sets differ in size, outputs and losses:

    Terms(
        interior=Term(residual),                       batch = {"interior": {"x": (900, 2), "y": (900, 1)},
        boundary=Term(network, weight=10.0),                    "boundary": {"x": (120, 2), "y": (120, 1)}}
    )

`curvature.SumOfTerms` is their curvature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from curvax.losses import Loss, SquaredError
from curvax.losses.base import check_loss
from curvax.spelling import nearest
from curvax.structure.batch_axes import AxesPrefix

WEIGHTS = "weights"
"""The key of a batch that may hold a factor on the weight of each term."""


@final
@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
      predict_fn: `predict_fn(params, inputs) -> outputs` (B, ...), acting on each example of the leading axis by
        itself: residuals at points, say. State, random key and aux are as the method's options say.
      loss: of the outputs; `SquaredError()` by default, the mean over the set's positions of half their squares.
      weight: what the term counts, a number that is not negative; 1 by default. It is a part of the program: another
        one compiles again. Factors that change from step to step come with the batch (`Terms`).
      key: where the batch has the term's own batch; by default, `None`, the term's name.
      x_key, y_key, weight_key: keys of inputs, targets and per-example weights in that; "x", "y" and none by default.
      batch_axes: which axes of it hold the examples (`curvature.Model`); by default, `None`, the model says it.

    Raises:
      TypeError, ValueError: `predict_fn` is no function, `loss` no loss, or `weight` is negative or no number.
    """

    predict_fn: Callable[..., Any]
    loss: Loss = SquaredError()
    weight: float = 1.0
    _: dataclasses.KW_ONLY
    key: str | None = None
    x_key: str = "x"
    y_key: str = "y"
    weight_key: str | None = None
    batch_axes: AxesPrefix | None = None

    def __post_init__(self) -> None:
        if not callable(self.predict_fn):
            raise TypeError("a term's predict_fn must be a function predict_fn(params, inputs) -> outputs.")
        check_loss(self.loss)
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float | np.number):
            raise TypeError(
                f"a term's weight is a {type(self.weight).__name__}: pass a number, and weights that change with the "
                f"batch, batch['{WEIGHTS}'] = {{name: weight}}."
            )
        if not self.weight >= 0:
            raise ValueError(f"a term's weight is {self.weight}: pass one that is not negative.")


@final
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Terms:
    """The terms of a loss by name, in the place of `loss` and `predict_fn` of a method.

    A batch is a mapping from the terms' names (or keys) to their batches, and may have `"weights"`: a mapping from
    names of terms to scalars, which multiply the terms' own weights. They may be traced, so that schemes which change
    them (`balanced_weights`) cost no other compilation; Python's numbers will do as well as arrays, and one kind of
    them for all steps. The set of a term that weighs nothing may be empty, and so may one whose weight comes so.

        terms = Terms(interior=Term(residual), boundary=Term(network))
        method = curvax.gauss_newton(loss=terms)
        batch = {"interior": {...}, "boundary": {...}, "weights": {"boundary": 10.0}}

    Attributes:
      terms: (name, term) pairs.

    A mapping from names to terms will do in the place of keywords.

    Raises:
      TypeError, ValueError: there is no term, one is no `Term`, or one is called "weights".
    """

    terms: tuple[tuple[str, Term], ...]

    def __init__(self, mapping: Mapping[str, Term] | None = None, /, **terms: Term) -> None:
        if mapping is not None:
            if not isinstance(mapping, Mapping):
                raise TypeError(f"Terms got a {type(mapping).__name__}: pass Terms(name=Term(predict_fn, loss), ...).")
            if twice := sorted(mapping.keys() & terms.keys()):
                raise TypeError(f"the term '{twice[0]}' is given twice: once in the mapping and once by keyword.")
            terms = {**mapping, **terms}
        for name, term in terms.items():
            if not isinstance(name, str):
                raise TypeError(f"the name of a term is a {type(name).__name__}: name each by a string.")
            if not isinstance(term, Term):
                raise TypeError(f"the term '{name}' is a {type(term).__name__}: pass curvax.Term(predict_fn, loss).")
        if not terms:
            raise ValueError("there are no terms: pass Terms(name=Term(predict_fn, loss), ...).")
        if WEIGHTS in terms:
            raise ValueError(f"a term is called '{WEIGHTS}', where a batch has the terms' weights: rename it.")
        object.__setattr__(self, "terms", tuple(terms.items()))

    def __repr__(self) -> str:
        return f"Terms({', '.join(f'{name}={term!r}' for name, term in self.terms)})"

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.terms)

    def __getitem__(self, name: str) -> Term:
        return dict(self.terms)[name]


def check_batch(batch: Any, keys: Mapping[str, str]) -> None:
    """Raises a one-sentence error for a batch that is not that of the terms, given by name with their keys."""
    if not isinstance(batch, Mapping):
        example = ", ".join(f"'{key}': {{...}}" for key in dict.fromkeys(keys.values()))
        raise TypeError(f"the batch of several terms must be a mapping {{{example}}}, not a {type(batch).__name__}.")
    for name, key in keys.items():
        if key not in batch:
            has = sorted(map(str, batch))
            raise KeyError(f"the batch has no '{key}' for the term '{name}' (it has {has}): add it, or set Term(key=).")
    known = {*keys.values(), WEIGHTS}
    for key in batch:
        if key not in known:
            raise KeyError(f"no term reads the batch's '{key}': drop it, or add a term.{nearest(str(key), known)}")
    _check_weights(batch.get(WEIGHTS, {}), keys)


def _check_weights(weights: Any, names: Mapping[str, str]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"the batch's '{WEIGHTS}' are a {type(weights).__name__}: pass a mapping from names of terms to scalars."
        )
    for name, weight in weights.items():
        if name not in names:
            raise KeyError(f"the batch's '{WEIGHTS}' name '{name}', which is no term.{nearest(str(name), names)}")
        dtype = jnp.result_type(weight)
        if np.shape(weight) != () or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise ValueError(
                f"the weight of the term '{name}' is of type {dtype} and shape {np.shape(weight)}: pass one real "
                "number, and weights of examples by Term(weight_key=)."
            )


def term_weight(weight: float, name: str, batch: Mapping[str, Any], dtype: Any) -> jax.Array | float:
    """The weight of a term in a batch: a plain number if the batch does not change it."""
    factor = batch.get(WEIGHTS, {}).get(name)
    return weight if factor is None else weight * jnp.asarray(factor).astype(dtype)
