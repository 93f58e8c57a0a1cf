"""How a solve ended: the codes that solvers and kernels share."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp


class Result(enum.IntEnum):
    """How a solve ended. Stored in solutions as int32; `describe` gives the sentence.

    csrc/common/result.h holds the same numbers for compiled code.
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NEGATIVE_CURVATURE = 2
    BREAKDOWN = 3
    NON_FINITE = 4
    INDEFINITE = 5
    SINGULAR = 6
    STOPPED_EARLY = 7
    INACCURATE = 8
    NOT_POSITIVE_DEFINITE = 9
    BAD_PRECONDITIONER = 10
    BOUNDARY = 11

    def describe(self) -> str:
        """What happened and what to do about it."""
        return _SENTENCES[self]


_SENTENCES = {
    Result.CONVERGED: "The residual is below the tolerance.",
    Result.MAX_ITERATIONS: "The iteration limit came first: the direction is usable; raise maxiter, lam or tol.",
    Result.NEGATIVE_CURVATURE: "A direction of negative curvature ended the iteration: the step goes downhill and does "
    "not solve the system; raise lam, or use a Gauss-Newton matrix, which has no negative curvature.",
    Result.BREAKDOWN: "The curvature along the search direction is zero to rounding: raise lam.",
    Result.NON_FINITE: "The system has NaN, infinity or numbers at the end of their range: look at the batch and the "
    "loss.",
    Result.INDEFINITE: "The matrix is indefinite: lam was added to the magnitudes of its eigenvalues; raise lam.",
    Result.SINGULAR: "The matrix is singular to rounding: the minimum-norm solution was used; raise lam.",
    Result.INACCURATE: "The solution does not satisfy the system: raise lam or use float64.",
    Result.STOPPED_EARLY: "The quadratic stopped improving (Martens' rule): the direction is usable.",
    Result.NOT_POSITIVE_DEFINITE: "The matrix is not positive definite to rounding: there is no solution; raise lam.",
    Result.BAD_PRECONDITIONER: "The preconditioner is not positive definite, or not finite: the iterate before it was "
    "applied is returned; give a preconditioner whose inverse is positive definite.",
    Result.BOUNDARY: "The step ends at the radius of the trust region: the direction is usable.",
}


SOLVED = frozenset({Result.CONVERGED, Result.MAX_ITERATIONS, Result.STOPPED_EARLY, Result.BOUNDARY})
"""How a solve ends that found a solution, or was on its way to one."""


def solved(result: jax.Array) -> jax.Array:
    """Whether a solve of this code ended at a solution, or on its way to one, of its system."""
    return _among(result, SOLVED)


def bounded(result: jax.Array) -> jax.Array:
    """Whether a solve of this code, under a radius, went as far as the radius allows."""
    return _among(result, (Result.BOUNDARY, Result.NEGATIVE_CURVATURE))


def _among(result: jax.Array, known: Iterable[Result]) -> jax.Array:
    return functools.reduce(jnp.logical_or, (result == int(each) for each in known))


def code(result: Result) -> jax.Array:
    """A result as the int32 scalar that states and infos carry."""
    return jnp.asarray(int(result), jnp.int32)
