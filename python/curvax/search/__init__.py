"""How far a step goes once its direction is known, and whether it goes at all.

In the order in which a step runs them: `bounds` shorten an update that is too long, a search (`grid`, `backtracking`,
`quadratic`) chooses a step size along it. `base` says what a search is, `geometric` what those over 1, 1/2, 1/4, ...
share.
"""

from curvax.search.backtracking import Backtracking as Backtracking
from curvax.search.base import Line as Line
from curvax.search.base import Searched as Searched
from curvax.search.base import StepSearch as StepSearch
from curvax.search.bounds import CurvatureBound as CurvatureBound
from curvax.search.bounds import EntryBound as EntryBound
from curvax.search.bounds import NormBound as NormBound
from curvax.search.bounds import StepBound as StepBound
from curvax.search.grid import GridSearch as GridSearch
from curvax.search.quadratic import QuadraticModel as QuadraticModel
