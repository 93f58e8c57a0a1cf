"""Which parameters have a posterior; the others stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from curvax.curvature import Model
from curvax.structure.capture import capture
from curvax.tree import PyTree

Subset = str | Callable[[str], bool] | PyTree


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A mask of frozen parameters that can be hashed: params -> a tree of booleans."""

    flags: tuple[bool, ...]

    def __call__(self, params: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(params), self.flags)


def restricted(model: Model, params: PyTree, subset: Subset) -> Model:
    """The model in which only a subset of what trains does.

    Args:
      model: the model.
      params: its parameters.
      subset: a path, whose leaves are those at it and below it; a function of paths; or a tree of booleans like the
        parameters, or a prefix of it, True for leaves that have a posterior. A path is keys and indices with slashes,
        "layers/2/w".

    Raises:
      ValueError: no leaf that trains is in it, or the tree does not fit.
    """
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    chosen = _chosen(subset, paths, params)
    _, frozen = model.extras.partition.split(params)
    idle = [x is not None for x in jax.tree.leaves(frozen, is_leaf=lambda x: x is None)]
    flags = tuple(not keep or fixed for keep, fixed in zip(chosen, idle, strict=True))
    if all(flags):
        raise ValueError(f"subset {subset!r} has no leaf that trains: the leaves are {', '.join(paths)}.")
    partition = dataclasses.replace(model.extras.partition, frozen=Frozen(flags))
    return dataclasses.replace(model, extras=dataclasses.replace(model.extras, partition=partition))


def _chosen(subset: Subset, paths: list[str], params: PyTree) -> list[bool]:
    if isinstance(subset, str):
        return [path == subset or path.startswith(f"{subset}/") for path in paths]
    if callable(subset):
        return [bool(subset(path)) for path in paths]
    try:
        full = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: bool(keep), part), subset, params)
    except ValueError as error:
        raise ValueError(
            "subset must be a path, a function of paths, or a tree of booleans like the parameters."
        ) from error
    return jax.tree.leaves(full)


def last_layer(predict_fn: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> PyTree:
    """The weights of a model's last layer and their bias, as a subset for `fit`: what is linear in the outputs,
    usually.

    Args:
      predict_fn: (params, inputs) -> outputs.
      params, inputs: of some batch; shapes will do.

    Returns:
      A tree of booleans like the parameters.

    Raises:
      ValueError: there is no layer.
    """
    uses = capture(predict_fn, params, inputs).structure.uses
    if not uses:
        raise ValueError(
            "no layer was recognized in the model: pass the subset as paths, curvax.structure.report names them."
        )
    last = uses[-1]
    leaves = {last.leaf} if last.bias is None else {last.leaf, last.bias.leaf}
    flags = [i in leaves for i in range(len(jax.tree.leaves(params)))]
    return jax.tree.unflatten(jax.tree.structure(params), flags)
