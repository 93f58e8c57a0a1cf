"""A whole method as an Optax transformation: its update includes the method's transform and rejection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.complex_parts import is_parts, join_complex, split_complex
from curvax.execute import StepInputs
from curvax.method import AbstractMethod
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class _Given:
    """The extra arguments of `update` that a method takes."""

    batch: Any = None
    rng: jax.Array | None = None
    curvature_batch: Any = None
    search_batch: Any = None
    full_params: PyTree | None = None

    @staticmethod
    def of(extra: Mapping[str, Any]) -> _Given:
        """Without the others: Optax passes every extra argument to every transformation of a chain."""
        return _Given(**{field.name: extra[field.name] for field in dataclasses.fields(_Given) if field.name in extra})


def as_gradient_transformation(
    method: AbstractMethod[Any, Any],
    *,
    batch: Any | None = None,
    model_state: PyTree = None,
    full_params: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A method as an Optax transformation.

    `update(updates, state, params, *, batch, rng=None, curvature_batch=None, search_batch=None, full_params=None)`
    returns what `optax.apply_updates` adds to the parameters: zero for a step that is not taken.

    Args:
      method: any method.
      batch: the shapes of a batch, for methods whose `init` needs them (`kfac`, `ekfac`).
      model_state: first model state, for models with `has_state`. The state's `model_state` carries it on.
      full_params: all parameters of the model, or their shapes, for such a method within `optax.masked`,
        `optax.partition` and the like: its `init` sees a part of them, and layers are those of the whole model.

    Raises:
      TypeError: that is no method.
      ValueError (in `init` and `update`): `params`, `batch` or `full_params` is missing where it is needed.
    """
    if not isinstance(method, AbstractMethod):
        raise TypeError(
            f"method is a {type(method).__name__}: pass what a preset such as curvax.sgn or curvax.assemble returned."
        )

    def init(params: PyTree) -> Any:
        if not jax.tree.leaves(params):
            return method.init_empty(params, model_state=model_state)
        trainable, frozen = method.partition.split(params)
        if _is_masked(params) and method.needs_batch:
            if full_params is None:
                raise ValueError(
                    "these parameters are masked (optax.masked or optax.partition), and layers are those of the whole "
                    "model: pass full_params=params, or their shapes, where the transformation is made."
                )
            frozen = _filled(params, frozen, full_params)
        return method.init_split(trainable, frozen, batch=batch, model_state=model_state)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        given = _Given.of(extra)
        if not jax.tree.leaves(updates):
            return updates, dataclasses.replace(state, step=state.step + 1)
        if params is None:
            raise ValueError("curvature is taken at the parameters: call update(grads, state, params, batch=batch).")
        if given.batch is None:
            raise ValueError("curvature is taken on a batch: call update(grads, state, params, batch=batch).")
        trainable, frozen = _split(method, params, given.full_params)
        gradient = None
        if method.takes_gradient:
            gradient = jax.tree.map(
                lambda t, u: None if t is None else split_complex(u), trainable, updates, is_leaf=_is_leaf
            )
        inputs = StepInputs(
            trainable, frozen, given.batch, state, given.rng, given.curvature_batch, given.search_batch, gradient
        )
        proposal = method.propose_step(inputs)
        return _fill(proposal.update, trainable, updates, method.narrows_updates), proposal.state

    # Optax's types allow arrays and containers as states; a registered dataclass is a pytree all the same.
    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _is_leaf(x: Any) -> bool:
    """A frozen parameter or a complex one."""
    return x is None or is_parts(x)


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _split(method: AbstractMethod[Any, Any], params: PyTree, full_params: PyTree | None) -> tuple[PyTree, PyTree]:
    """Trainable parameters (holes stay holes) and the rest, from the full parameters where there are holes."""
    trainable, frozen = method.partition.split(params)
    if not _is_masked(params):
        return trainable, frozen
    if full_params is None:
        raise ValueError(
            "these parameters are masked (optax.masked or optax.partition), and the model needs all of them: "
            "pass full_params=params to update."
        )
    return trainable, _filled(params, frozen, full_params)


def _is_masked(params: PyTree) -> bool:
    return any(_is_hole(x) for x in jax.tree.leaves(params, is_leaf=_is_hole))


def _filled(params: PyTree, frozen: PyTree, full_params: PyTree) -> PyTree:
    """The frozen parameters with those that `params` has holes for."""

    def choose(p: Any, own: Any, full: Any) -> Any:
        return full if _is_hole(p) else own

    return jax.tree.map(choose, params, frozen, full_params, is_leaf=_is_hole)


def _fill(update: PyTree, trainable: PyTree, updates: PyTree, narrow: bool) -> PyTree:
    """Updates, in the dtypes of the parameters if `narrow`; zero for frozen parameters."""

    def one(t: Any, s: Any, g: Any) -> Any:
        if t is None:
            return jnp.zeros_like(g)
        return join_complex(tree.cast_like(s, t) if narrow else s)

    return jax.tree.map(one, trainable, update, updates, is_leaf=_is_leaf)
