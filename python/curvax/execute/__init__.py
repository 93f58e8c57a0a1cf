"""Execution: the planned step."""

from curvax.execute.context import Problem as Problem
from curvax.execute.context import Proposal as Proposal
from curvax.execute.context import StepContext as StepContext
from curvax.execute.context import StepInputs as StepInputs
from curvax.execute.flax_states import register as register
from curvax.execute.flax_states import register_if_imported as register_if_imported
from curvax.execute.state import AbstractState as AbstractState
from curvax.execute.state import LastStep as LastStep
from curvax.execute.state import Layout as Layout
from curvax.execute.state import MethodState as MethodState
from curvax.execute.state import check_part as check_part
from curvax.execute.state import upcast_shapes as upcast_shapes
from curvax.execute.step import propose as propose
