"""Geodesic acceleration: the second-order term of a Gauss-Newton step (Transtrum and Sethna 2012, arXiv 1201.5885).

A Gauss-Newton step follows the tangent of the model's outputs, and a narrow curved valley bends away from it. With the
direction s and the second derivative f'' of the outputs along s,

    1. (C + lam I) s = g                         the direction, as ever
    2. f'' = d^2/dt^2 f(theta - t s) at t = 0    one jvp of a jvp
    3. (C + lam I) c = J^T Q f'' / 2             the same system again; a factorization serves both
    4. s <- s + c   if 2 |c| <= most |s|         else the series does not converge: s as it was

An example: f = theta^2 with target 0 at theta = 1, lam = 0, Q = 1 has J = 2, g = 2, C = 4 and s = 1/2. With f'' = 2 s^2
= 1/2 the correction is c = 2 (1/2) / (2 x 4) = 1/8, and theta - s - c = 3/8 instead of 1/2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.numbers import Number, check_positive, shown
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class GeodesicAcceleration:
    """Adds the second-order correction to a Gauss-Newton direction where it is small beside it.

    Attributes:
      most: largest 2 |c| / |s| of a correction c that is added; 0.75 (Transtrum and Sethna, section 3). May be traced.
    """

    most: Number = 0.75

    def __post_init__(self) -> None:
        check_positive("most", self.most)

    @property
    def name(self) -> str:
        """Its name in the plan."""
        return f"geodesic, corrections up to {shown(self.most)}"

    def apply(
        self, s: PyTree, second: Callable[[PyTree], jax.Array], solve: Callable[[jax.Array], PyTree]
    ) -> tuple[PyTree, jax.Array]:
        """(the direction, 2 |c| / |s|).

        Args:
          s: solution of (C + lam I) s = g.
          second: s -> f'', upcast, in the shape of the outputs.
          solve: u -> (C + lam I)^-1 J^T Q u.
        """
        doubled = solve(second(s))
        ratio = tree.relative_norm(doubled, s)
        small = ratio <= jnp.asarray(self.most, ratio.dtype)
        half = jnp.where(small, 0.5, 0.0).astype(ratio.dtype)
        # What is not finite must not come in by way of a product with zero.
        kept = jax.tree.map(lambda c: jnp.where(small, c, jnp.zeros_like(c)), doubled)
        return tree.axpy(half, kept, s), ratio
