"""Which leaves Muon takes: hidden matrices. AdamW takes the rest.

Only matrices between two hidden layers have a spectrum to even out, so a label sends each leaf to one of two
optimizers:

    {"embed": (V, d), "layers": {"w": (L, d, d), "b": (L, d)}, "head": (d, V)}
      adamw                      muon, L matrices  adamw         adamw

Which matrices are embeddings and heads is said by the user, by their paths, a regular expression or a function, or by
their names (`hidden_matrices_by_name`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax.optimizers.axes import LastTwoAxes, MatrixRule, paths

Other: TypeAlias = str | re.Pattern[str] | Callable[[str, tuple[int, ...]], bool]
"""What is no hidden matrix: a path and all below it, a pattern that paths are searched for, or a function of both."""

_OUTER_WORDS = frozenset(
    """embed embeds embedding embeddings embedder emb wte wpe vocab vocabulary unembed unembedding head lmhead logits
    classifier readout""".split()
)
"""Words in the names of matrices that stand before the first hidden layer or behind the last one."""

_VECTOR_WORDS = frozenset(("bias", "scale"))
"""Names of what acts entry by entry: two axes make a stack of it, no matrix."""

_LAST_TWO = LastTwoAxes()


def hidden_matrices(*others: Other, matrices: MatrixRule = _LAST_TWO) -> Callable[[Any], Any]:
    """Labels for `optax.partition`: "muon" for matrices, "adamw" for vectors, scalars and the named entries.

    Args:
      others: what matrices are no hidden ones. A string is a path, "embed" or "params/embed", and names all below it; a
        compiled pattern is searched for in each path; a function says it of (path, shape).
      matrices: which leaves are matrices; by default all with two axes or more.

    Returns:
      A function from parameters to a tree of labels. A leaf with more than two axes is a stack of matrices; one without
      entries is none.

    Raises (the returned function):
      ValueError: a path is no part of the parameters.
      TypeError: a hidden matrix is complex.
    """

    def labels(params: Any) -> Any:
        known = paths(params)
        if not known:
            return params  # `optax.tree.map_params` asks without parameters
        for name in others:
            if isinstance(name, str) and not any(_is_below(path, name) for path in known):
                raise ValueError(_not_there(name, known))
        return _labeled(params, lambda path, shape: any(_names(other, path, shape) for other in others), matrices)

    return labels


def hidden_matrices_by_name(params: Any, matrices: MatrixRule = _LAST_TWO) -> Any:
    """The labels of `hidden_matrices`, with embeddings and heads told by their names.

    AdamW takes every leaf with a word such as "embed", "wte", "head", "logits" or "classifier" in its path, in any
    spelling (`lm_head`, `TokenEmbedding_0`), every leaf named "bias" or "scale", and every leaf that has at most one
    axis longer than 1. "heads", "output" and "out" are no such words: attention has them within.
    """

    def outer(path: str, shape: tuple[int, ...]) -> bool:
        words = (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", path))
        entrywise = path.rpartition("/")[2] in _VECTOR_WORDS or sum(size > 1 for size in shape) < 2
        return entrywise or any(word in _OUTER_WORDS for word in words)

    return _labeled(params, outer, matrices)


def _labeled(params: Any, outer: Callable[[str, tuple[int, ...]], bool], matrices: MatrixRule) -> Any:
    leaves, structure = jax.tree.flatten(params)
    known = zip(paths(params), leaves, strict=True)
    return jax.tree.unflatten(structure, [_label(path, leaf, outer, matrices) for path, leaf in known])


def _label(path: str, leaf: Any, outer: Callable[[str, tuple[int, ...]], bool], matrices: MatrixRule) -> str:
    shape = tuple(leaf.shape)
    if len(shape) < 2 or not math.prod(shape) or outer(path, shape) or matrices.axes(path, shape) is None:
        return "adamw"
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(
            f"{path!r} is complex, and Muon orthogonalizes real matrices: wrap the optimizer in "
            "optax.contrib.split_real_and_imaginary, or name its entry in others=."
        )
    return "muon"


def _names(other: Other, path: str, shape: tuple[int, ...]) -> bool:
    if isinstance(other, str):
        return _is_below(path, other)
    return other.search(path) is not None if isinstance(other, re.Pattern) else bool(other(path, shape))


def _is_below(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/")


def _not_there(name: str, known: Sequence[str]) -> str:
    groups = ", ".join(sorted({path.partition("/")[0] for path in known}))
    inside = sorted({path[: path.index(f"/{name}") + 1 + len(name)] for path in known if f"/{name}/" in f"{path}/"})
    nested = f", or {inside[0]!r}" if inside else ""
    return (
        f"{name!r} is no entry of the parameters that train, which are {groups}: name those whose matrices AdamW takes"
        f"{nested}, as muon_adamw's others= or hidden_matrices(...), or none."
    )
