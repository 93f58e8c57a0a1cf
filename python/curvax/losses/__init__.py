"""Losses in output space: values, gradients, Hessians, their square roots, and target sampling."""

from __future__ import annotations

from curvax.losses.base import Loss as Loss
from curvax.losses.base import Reduction as Reduction
from curvax.losses.batch_fault import BatchFault as BatchFault
from curvax.losses.binary_cross_entropy import SigmoidBinaryCrossEntropy as SigmoidBinaryCrossEntropy
from curvax.losses.cross_entropy import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from curvax.losses.custom import CustomLoss as CustomLoss
from curvax.losses.poisson import Poisson as Poisson
from curvax.losses.squared_error import SquaredError as SquaredError
from curvax.losses.variational_energy import VariationalEnergy as VariationalEnergy

__all__ = [
    "BatchFault",
    "CustomLoss",
    "Loss",
    "Poisson",
    "Reduction",
    "SigmoidBinaryCrossEntropy",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "VariationalEnergy",
]
