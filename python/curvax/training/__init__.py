"""A training loop around any method: optional, on top of everything, and imported by nothing below.

In reading order: `batches.py` is where batches come from, `chunk.py` many steps as one program, `history.py` what they
reported, `rules.py` stops and evaluations, `progress.py`, `checkpoints.py`, and `loop.py` puts them together.
"""

from curvax.training.batches import Minibatches as Minibatches
from curvax.training.batches import Sampler as Sampler
from curvax.training.checkpoints import Checkpoints as Checkpoints
from curvax.training.history import History as History
from curvax.training.loop import FitFailed as FitFailed
from curvax.training.loop import FitResult as FitResult
from curvax.training.loop import fit as fit
from curvax.training.progress import Progress as Progress
from curvax.training.rules import Evaluate as Evaluate
from curvax.training.rules import Reason as Reason
from curvax.training.rules import Stop as Stop
