"""Weights of a loss's terms that balance them, from what each term is at the present parameters.

Where the gradient of one term, or its rate of convergence under gradient descent, is a hundred times another's, the
other is left as it is. Both rules give term k the weight

    w_k = sum_j s_j / s_k

with s_k its scale at present: the norm of its gradient, or the trace of its tangent kernel. Two terms with scales 3
and 1 have the weights 4 / 3 and 4, and then both the scale 4.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature.base import Evaluation, Linearization, Needs
from curvax.curvature.sum_of_terms import SumOfTerms
from curvax.curvature.terms import WEIGHTS, Terms
from curvax.output_space import GeneralizedGaussNewton
from curvax.structure.exact import gradient_norms
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.tree import PyTree


class TermScale(abc.ABC):
    """What is balanced between terms.

    An implementor is a frozen dataclass that says what it reads of a term's linearization, and its scale.
    """

    @property
    @abc.abstractmethod
    def needs(self) -> Needs:
        """What `scale` reads."""

    @abc.abstractmethod
    def scale(self, at: Linearization) -> jax.Array:
        """A scalar that is not negative, proportional to the term's weight."""


@dataclasses.dataclass(frozen=True)
class GradientNorm(TermScale):
    """The norm of the term's gradient (Wang, Teng and Perdikaris 2021; Wang et al., "An Expert's Guide to Training
    Physics-informed Neural Networks", 2023).
    """

    @property
    def needs(self) -> Needs:
        return Needs(gradient=True)

    def scale(self, at: Linearization) -> jax.Array:
        return tree.norm(at.gradient)


@dataclasses.dataclass(frozen=True)
class TangentKernelTrace(TermScale):
    """The trace of the term's Gauss-Newton matrix: of a squared error the mean diagonal of its tangent kernel J J^T.

    See Wang, Yu and Perdikaris, "When and why PINNs fail to train: A neural tangent kernel perspective" (2022). Means
    in the place of the paper's sums, so that a set with more points does not count as one that converges faster.

    Attributes:
      max_bytes: bound on the memory of factors; 2 GiB by default.
    """

    max_bytes: int = DEFAULT_MAX_BYTES

    @property
    def needs(self) -> Needs:
        return Needs(rows=True)

    def scale(self, at: Linearization) -> jax.Array:
        if at.rows is None:
            raise AssertionError("a Gauss-Newton matrix that is asked for rows has them.")
        return functools.reduce(jnp.add, [jnp.sum(x) for x in jax.tree.leaves(at.rows.diagonal(self.max_bytes))])


def balanced_weights(
    terms: Terms,
    params: PyTree,
    batch: Mapping[str, Any],
    *,
    by: TermScale = GradientNorm(),
    previous: Mapping[str, jax.Array] | None = None,
    decay: float = 0.9,
) -> dict[str, jax.Array]:
    """Factors on the terms' weights that balance them, for `batch["weights"]`.

    Jit it, call it every hundred steps or so, and no method compiles again. A trust region compares losses of one step
    with those of the next, so that weights which change in every step disturb it.

    Args:
      terms: the terms, whose models take and return nothing beside the plain signature.
      params: parameters.
      batch: as for a step; its own weights are not read.
      by: what is balanced; the norms of gradients by default, which costs a gradient of each term.
      previous: the factors so far; by default, `None`, there are none.
      decay: how much of `previous` stays; 0.9, as in the papers.

    Returns:
      A scalar for each term. A term whose scale is zero or not finite keeps its previous factor, or 1.

    Raises:
      ValueError: `decay` is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}.")
    # 1. The scale of each term as the loss has it.
    curvature, evaluation = _plain(terms, batch)
    scales = {
        term.name: by.scale(term.curvature.linearize(params, own, by.needs))
        for term, own in zip(curvature.terms, curvature.evaluations(params, evaluation), strict=True)
    }
    # 2. Their sum, over each.
    usable = {name: (s > 0) & jnp.isfinite(s) for name, s in scales.items()}
    total = functools.reduce(jnp.add, [jnp.where(usable[n], s, jnp.zeros_like(s)) for n, s in scales.items()])
    weights = {}
    for name, s in scales.items():
        old = jnp.ones_like(s) if previous is None else jnp.asarray(previous[name]).astype(s.dtype)
        new = total / jnp.where(usable[name], s, jnp.ones_like(s))
        # 3. Not too fast.
        mixed = new if previous is None else decay * old + (1 - decay) * new
        weights[name] = jnp.where(usable[name], mixed, old)
    return weights


def term_gradient_norms(
    terms: Terms, params: PyTree, batch: Mapping[str, Any], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> dict[str, jax.Array]:
    """Norms of the gradients that the examples of each term contribute to that of the loss, weights included.

    Args:
      terms, params: as in `balanced_weights`.
      batch: as for a step.
      max_bytes: bound on the memory of factors; 2 GiB by default.

    Returns:
      (B,) for each term, by name.

    Raises:
      ValueError: the examples of a term interact, so that none has a gradient of its own.
    """
    curvature, evaluation = _plain(terms, batch, own_weights=True)
    norms = {}
    for term, own in zip(curvature.terms, curvature.evaluations(params, evaluation), strict=True):
        at = term.curvature.linearize(params, own, Needs(rows=True))
        if at.rows is None or at.rows.source is None or at.output_gradient is None:
            raise AssertionError("a Gauss-Newton matrix that is asked for rows says what they are made from.")
        norms[term.name] = gradient_norms(at.rows.source, at.output_gradient, max_bytes)
    return norms


def _plain(terms: Terms, batch: Mapping[str, Any], own_weights: bool = False) -> tuple[SumOfTerms, Evaluation]:
    """The Gauss-Newton matrix of terms without state, keys or aux, and its evaluation."""
    kept = batch if own_weights else {key: x for key, x in batch.items() if key != WEIGHTS}
    return SumOfTerms.gauss_newton(terms, GeneralizedGaussNewton()), Evaluation(kept)
