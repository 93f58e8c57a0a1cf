"""Muon for hidden matrices, AdamW for the rest: the paper's inner optimizer, by labels.

Muon replaces the momentum M = U S V^T of a matrix by about U V^T, with all singular values 1, by a few Newton-Schulz
iterations (Optax's). Only matrices between two hidden layers have a spectrum to even out, so a label sends each leaf
to one of two optimizers:

    {"embed": (V, d), "layers": {"w": (L, d, d), "b": (L, d)}, "head": (d, V)}
      adamw                      muon, L matrices  adamw         adamw

Which matrices are embeddings and heads is said by the user, or by their names (`hidden_matrices_by_name`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.tree_util import keystr

from curvax.chain import check_rates
from curvax.meshes import on_any_mesh

# Beside any norm it adds nothing, and a gradient of zero stays zero: Optax's 1e-8 would give gradients a unit.
_TINY = 1e-30

_OUTER_WORDS = frozenset(
    """embed embeds embedding embeddings embedder emb wte wpe vocab vocabulary unembed unembedding head lmhead logits
    classifier readout""".split()
)
"""Words in the names of matrices that stand before the first hidden layer or behind the last one."""


def hidden_matrices(*others: str) -> Callable[[Any], Any]:
    """Labels for `optax.partition`: "muon" for matrices, "adamw" for vectors, scalars and the named entries.

    Args:
      others: top-level entries of the parameters, such as "embed" and "head", whose matrices are no hidden ones.

    Returns:
      A function from parameters to a tree of labels. A leaf with more than two axes is a stack of matrices; one without
      entries is none.

    Raises (the returned function):
      ValueError: a name is no top-level entry of the parameters.
      TypeError: a hidden matrix is complex.
    """

    def labels(params: Any) -> Any:
        paths = jax.tree_util.tree_leaves_with_path(params)
        if not paths:
            return params  # `optax.tree.map_params` asks without parameters
        groups = {keystr(path[:1], simple=True) for path, _ in paths}
        for name in others:
            if name not in groups:
                raise ValueError(
                    f"{name!r} is no entry of the parameters that train, which are {', '.join(sorted(groups))}: name "
                    "those whose matrices AdamW takes, as muon_adamw's others= or hidden_matrices(...), or none."
                )

        def label(path: Any, leaf: Any) -> str:
            return _label(path, leaf, outer=keystr(path[:1], simple=True) in others)

        return jax.tree_util.tree_map_with_path(label, params)

    return labels


def hidden_matrices_by_name(params: Any) -> Any:
    """The labels of `hidden_matrices`, with embeddings and heads told by their names.

    AdamW takes every leaf with a word such as "embed", "wte", "head", "logits" or "classifier" in its path, in any
    spelling (`lm_head`, `TokenEmbedding_0`), and every leaf that has at most one axis longer than 1. "heads", "output"
    and "out" are no such words: attention has them within.
    """

    def label(path: Any, leaf: Any) -> str:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", keystr(path))
        outer = any(word.lower() in _OUTER_WORDS for word in words)
        return _label(path, leaf, outer=outer or sum(size > 1 for size in leaf.shape) < 2)

    return jax.tree_util.tree_map_with_path(label, params)


def _label(path: Any, leaf: Any, *, outer: bool) -> str:
    if outer or len(leaf.shape) < 2 or not math.prod(leaf.shape):
        return "adamw"
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(
            f"{keystr(path)} is complex, and Muon orthogonalizes real matrices: wrap the optimizer in "
            "optax.contrib.split_real_and_imaginary, or name its entry in others=."
        )
    return "muon"


def muon_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    others: tuple[str, ...] | None = None,
    adamw_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.muon` on hidden matrices and `optax.adamw` on everything else.

    Args:
      learning_rate: of Muon, and of AdamW unless it has its own.
      others: top-level entries whose matrices AdamW takes; every one must be there. `()` where no entry is meant. By
        default, `None`, embeddings and heads by their names (`hidden_matrices_by_name`).
      adamw_learning_rate: `None` for the same.
      b1, b2: AdamW's; 0.9 and 0.999 as in the paper.
      weight_decay: of both, times the learning rate.

    Raises:
      TypeError: `others` is a single string, or a rate is neither a number nor a schedule.
      ValueError: a rate is out of its range.
      ValueError (in `init`): one of `others` is no top-level entry of the parameters.
      TypeError (in `init`): a matrix that Muon would take is complex.
    """
    if isinstance(others, str):
        raise TypeError(f"muon_adamw: others is the string {others!r}: pass a tuple of names, ({others!r},).")
    rate = learning_rate if adamw_learning_rate is None else adamw_learning_rate
    check_rates(learning_rate, weight_decay, b1=b1, b2=b2)
    check_rates(rate, weight_decay)
    stacks = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    matrices = optax.contrib.muon(
        learning_rate,
        eps=_TINY,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: stacks, params),
    )
    rest = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    labels = hidden_matrices_by_name if others is None else hidden_matrices(*others)
    return on_any_mesh(optax.partition({"muon": matrices, "adamw": rest}, labels))
