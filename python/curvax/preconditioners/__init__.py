"""Approximate inverses of a damped curvature, for solvers and for the diagonal lane."""

from curvax.preconditioners.base import BlockPreconditioner as BlockPreconditioner
from curvax.preconditioners.base import EntrywiseInverse as EntrywiseInverse
from curvax.preconditioners.base import Preconditioner as Preconditioner
from curvax.preconditioners.denominators import AdaHessianPower as AdaHessianPower
from curvax.preconditioners.denominators import Damped as Damped
from curvax.preconditioners.denominators import Denominator as Denominator
from curvax.preconditioners.denominators import SophiaFloor as SophiaFloor
from curvax.preconditioners.ekfac import EKFAC as EKFAC
from curvax.preconditioners.ekfac import EKFACState as EKFACState
from curvax.preconditioners.ema_diagonal import EmaDiagonal as EmaDiagonal
from curvax.preconditioners.ema_diagonal import EmaDiagonalState as EmaDiagonalState
from curvax.preconditioners.factor_inverses import CholeskyInverse as CholeskyInverse
from curvax.preconditioners.factor_inverses import EigenInverse as EigenInverse
from curvax.preconditioners.factor_inverses import FactorInverse as FactorInverse
from curvax.preconditioners.identity import IdentityPreconditioner as IdentityPreconditioner
from curvax.preconditioners.identity import IdentityState as IdentityState
from curvax.preconditioners.jacobi import Jacobi as Jacobi
from curvax.preconditioners.jacobi import JacobiState as JacobiState
from curvax.preconditioners.kfac import KFAC as KFAC
from curvax.preconditioners.kfac import KFACState as KFACState
from curvax.preconditioners.nystrom import NystromPreconditioner as NystromPreconditioner
from curvax.preconditioners.nystrom import NystromState as NystromState
