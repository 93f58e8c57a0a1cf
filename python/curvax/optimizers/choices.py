"""Choices that SOAP and Shampoo share, one name each."""

from __future__ import annotations

import enum


class Sides(enum.Enum):
    """Which sides of a matrix have a factor.

    One-sided forms keep half of the state or less: SOAP's paper (arXiv 2409.11321, section 7) turns the shorter side
    alone, and one-sided Shampoo is L^(-1/2) G (An et al. 2025, arXiv 2503.20762).
    """

    BOTH = enum.auto()
    ROWS = enum.auto()
    COLUMNS = enum.auto()
    SHORTER = enum.auto()

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sides, 0 for rows and 1 for columns, of a stack (..., rows, columns)."""
        if self is Sides.SHORTER:
            return (0,) if shape[-2] <= shape[-1] else (1,)
        return {Sides.BOTH: (0, 1), Sides.ROWS: (0,), Sides.COLUMNS: (1,)}[self]


class FactorTerms(enum.Enum):
    """What a gradient G (m, n) adds to the factors L and R.

    GRADIENT: G G^H and G^T conj(G), as Shampoo's and SOAP's papers have it.
    KULLBACK_LEIBLER: G R^-1 G^H / n and G^T L^-1 conj(G) / m, each seen through the other's inverse: the factors then
      minimize the Kullback-Leibler divergence of L kron R from the second moments (Lin et al. 2025, arXiv 2509.03378).
      The first gradient sees a multiple of the identity, its root mean square, so that scale plays no part.
    """

    GRADIENT = enum.auto()
    KULLBACK_LEIBLER = enum.auto()


class BasisMethod(enum.Enum):
    """How SOAP refreshes its bases.

    POWER_ITERATION: one step of orthogonal iteration, Q <- QR(P Q), as in the paper.
    EIGENDECOMPOSITION: eigenvectors of the factors, the paper's slower alternative.
    """

    POWER_ITERATION = enum.auto()
    EIGENDECOMPOSITION = enum.auto()
