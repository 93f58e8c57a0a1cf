"""Curvature outside of a step: matrices of a model and a loss as linear operators, their inverses and their spectra.

    C = operators.ggn(predict_fn, loss, params, data)      C @ v, C.T, 2 * C + D, C.shift(lam), C.restrict(kept)
    operators.inverse(C, lam) @ v                          by a solver of curvax.solvers
    operators.eigenpairs(C, 10)                            sharpness
    operators.kfac(predict_fn, loss, params, data)         inverse, root and determinant in closed form

`data` is one batch, a list of batches, or a loader that is walked anew for each product.
"""

from curvax.operators.base import LinearOperator as LinearOperator
from curvax.operators.base import Product as Product
from curvax.operators.base import Restricted as Restricted
from curvax.operators.base import Scaled as Scaled
from curvax.operators.base import Shifted as Shifted
from curvax.operators.base import Sum as Sum
from curvax.operators.base import SymmetricOperator as SymmetricOperator
from curvax.operators.convert import as_lineax as as_lineax
from curvax.operators.convert import as_scipy as as_scipy
from curvax.operators.curvature import CurvatureOperator as CurvatureOperator
from curvax.operators.curvature import StreamedCurvature as StreamedCurvature
from curvax.operators.curvature import empirical_fisher as empirical_fisher
from curvax.operators.curvature import fisher as fisher
from curvax.operators.curvature import ggn as ggn
from curvax.operators.curvature import hessian as hessian
from curvax.operators.curvature import of_curvature as of_curvature
from curvax.operators.factored import Diagonal as Diagonal
from curvax.operators.factored import Factored as Factored
from curvax.operators.factored import KroneckerEigen as KroneckerEigen
from curvax.operators.factored import LowRankPlusIdentity as LowRankPlusIdentity
from curvax.operators.factored import low_rank as low_rank
from curvax.operators.inverse import Inverse as Inverse
from curvax.operators.inverse import inverse as inverse
from curvax.operators.jacobian import Jacobian as Jacobian
from curvax.operators.jacobian import TangentKernel as TangentKernel
from curvax.operators.jacobian import jacobian as jacobian
from curvax.operators.jacobian import tangent_kernel as tangent_kernel
from curvax.operators.kronecker import diagonal as diagonal
from curvax.operators.kronecker import ekfac as ekfac
from curvax.operators.kronecker import kfac as kfac
from curvax.operators.kronecker import nystrom as nystrom
from curvax.operators.spectra import Eigenpairs as Eigenpairs
from curvax.operators.spectra import Estimate as Estimate
from curvax.operators.spectra import Quadrature as Quadrature
from curvax.operators.spectra import condition_number as condition_number
from curvax.operators.spectra import effective_dimension as effective_dimension
from curvax.operators.spectra import eigenpairs as eigenpairs
from curvax.operators.spectra import frobenius_norm as frobenius_norm
from curvax.operators.spectra import log_determinant as log_determinant
from curvax.operators.spectra import spectrum as spectrum
from curvax.operators.spectra import trace as trace
