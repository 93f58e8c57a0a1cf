"""Damping policies: constant, schedule, trust regions by lam and by radius; and what they are measured by."""

from curvax.damping.base import Damping as Damping
from curvax.damping.base import Outcome as Outcome
from curvax.damping.constant import Constant as Constant
from curvax.damping.constant import Scheduled as Scheduled
from curvax.damping.radius import Radius as Radius
from curvax.damping.scaling import Marquardt as Marquardt
from curvax.damping.scaling import Scaling as Scaling
from curvax.damping.trust_region import TrustRegion as TrustRegion
from curvax.damping.trust_region import TrustRegionState as TrustRegionState
