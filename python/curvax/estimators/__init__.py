"""Stochastic estimates of a curvature's diagonal, trace and dominant eigenspace."""

from curvax.estimators.base import DiagonalEstimator as DiagonalEstimator
from curvax.estimators.base import LowRank as LowRank
from curvax.estimators.base import LowRankEstimator as LowRankEstimator
from curvax.estimators.base import TraceEstimate as TraceEstimate
from curvax.estimators.base import TraceEstimator as TraceEstimator
from curvax.estimators.block_average import BlockAverage as BlockAverage
from curvax.estimators.block_average import spatial_or_last_axis as spatial_or_last_axis
from curvax.estimators.exact import ExactDiagonal as ExactDiagonal
from curvax.estimators.gnb import GaussNewtonBartlett as GaussNewtonBartlett
from curvax.estimators.hutchinson import Hutchinson as Hutchinson
from curvax.estimators.hutchinson import HutchinsonTrace as HutchinsonTrace
from curvax.estimators.hutchpp import HutchPlusPlus as HutchPlusPlus
from curvax.estimators.nystrom import RandomizedNystrom as RandomizedNystrom
from curvax.estimators.xtrace import XTrace as XTrace
