"""Full and layerwise Gauss-Newton for large batches, around any Optax optimizer (arXiv 2510.09378).

In reading order: `presets` (keywords), `method` (the step), `quadratic` (what is minimized inside), `inner` (what
minimizes it), `search`, `blocks` and `shares`, `outputs` and `head` (the loss in output space), `plan`, `state`.
"""

from curvax.layerwise.blocks import BlockPartition as BlockPartition
from curvax.layerwise.blocks import ByGroup as ByGroup
from curvax.layerwise.blocks import ByLeaf as ByLeaf
from curvax.layerwise.blocks import ByPath as ByPath
from curvax.layerwise.blocks import ByPrefix as ByPrefix
from curvax.layerwise.blocks import ParameterBlocks as ParameterBlocks
from curvax.layerwise.inner import ConjugateGradients as ConjugateGradients
from curvax.layerwise.method import InnerLoopMethod as InnerLoopMethod
from curvax.layerwise.plan import InnerLoopPlan as InnerLoopPlan
from curvax.layerwise.presets import full_gn as full_gn
from curvax.layerwise.presets import layerwise_gn as layerwise_gn
from curvax.layerwise.search import LineSearch as LineSearch
from curvax.layerwise.state import Carry as Carry
from curvax.layerwise.state import OuterState as OuterState
from curvax.transforms import as_gradient_transformation as as_gradient_transformation
