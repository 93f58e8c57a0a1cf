"""Linear solvers: conjugate gradients, least residuals, dense, least squares, diagonal, row space, lineax, and the
planner's choice.

Beside them, for many independent systems at once: `batched_cg` and `batched_cholesky_solve`.
"""

from curvax.solvers.acceleration import GeodesicAcceleration as GeodesicAcceleration
from curvax.solvers.automatic import Automatic as Automatic
from curvax.solvers.base import EntrywiseMean as EntrywiseMean
from curvax.solvers.base import Lane as Lane
from curvax.solvers.base import Result as Result
from curvax.solvers.base import Solution as Solution
from curvax.solvers.base import Solver as Solver
from curvax.solvers.base import Space as Space
from curvax.solvers.base import System as System
from curvax.solvers.base import TreeSpace as TreeSpace
from curvax.solvers.batched import BatchedSolution as BatchedSolution
from curvax.solvers.batched import batched_cg as batched_cg
from curvax.solvers.batched import batched_cholesky_solve as batched_cholesky_solve
from curvax.solvers.conjugate_gradient import CG as CG
from curvax.solvers.conjugate_gradient import MartensStop as MartensStop
from curvax.solvers.conjugate_residual import CR as CR
from curvax.solvers.dense import Cholesky as Cholesky
from curvax.solvers.diagonal import Diagonal as Diagonal
from curvax.solvers.diagonal import DiagonalState as DiagonalState
from curvax.solvers.eigen import Eigen as Eigen
from curvax.solvers.least_squares import LeastSquares as LeastSquares
from curvax.solvers.least_squares import LeastSquaresSolver as LeastSquaresSolver
from curvax.solvers.lineax_adapter import Lineax as Lineax
from curvax.solvers.lsmr import LSMR as LSMR
from curvax.solvers.minres import MINRES as MINRES
from curvax.solvers.multi_shift import MultiShiftCG as MultiShiftCG
from curvax.solvers.nystrom import LowRankRows as LowRankRows
from curvax.solvers.nystrom import NystromCG as NystromCG
from curvax.solvers.nystrom import NystromCGState as NystromCGState
from curvax.solvers.pseudo_inverse import PseudoInverse as PseudoInverse
from curvax.solvers.qr import QR as QR
from curvax.solvers.row_space import RowSpace as RowSpace
