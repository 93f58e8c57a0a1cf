"""The exact diagonal of a Gauss-Newton matrix."""

from __future__ import annotations

import dataclasses

import jax

from curvax.curvature import Linearization
from curvax.estimators.base import DiagonalEstimator, check_count
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.tree import PyTree
from curvax.work import Cost, StepWork


@dataclasses.dataclass(frozen=True)
class ExactDiagonal(DiagonalEstimator):
    """diag(J^T Q J) without sampling, from the layers of the model (`curvax.structure`); its key is not used.

    A layer that meets an example once costs one reverse pass per output and one product of squared factors; one that
    meets it at several positions forms the gradient of each row. With a `MonteCarloFisher` or `ObservedFisher` it is
    the diagonal of that. See Dangel, Kunstner and Hennig, "BackPACK: Packing more into backprop" (2020).

    Attributes:
      max_bytes: bound on the memory of factors and formed rows; 2 GiB by default.
    """

    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        check_count("max_bytes", self.max_bytes)

    @property
    def needs_product(self) -> bool:
        return False

    @property
    def needs_sampling(self) -> bool:
        return False

    @property
    def needs_rows(self) -> bool:
        return True

    def cost(self, work: StepWork) -> Cost:
        return work.product

    def diagonal(self, linearization: Linearization, key: jax.Array) -> PyTree:
        del key
        if linearization.rows is None:
            raise ValueError("ExactDiagonal needs the factors of a Gauss-Newton curvature; use one, or Hutchinson.")
        return linearization.rows.diagonal(self.max_bytes)
