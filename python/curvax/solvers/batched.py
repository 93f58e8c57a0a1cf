"""Many independent linear systems at once: `batched_cg` and `batched_cholesky_solve`, and what they return."""

from curvax.kernels.batched_cg import BatchedSolution as BatchedSolution
from curvax.kernels.batched_cg import batched_cg as batched_cg
from curvax.kernels.batched_cholesky_solve import batched_cholesky_solve as batched_cholesky_solve
