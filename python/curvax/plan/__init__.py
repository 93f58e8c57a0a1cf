"""Planning: requirements to a static, printable plan."""

from curvax.plan.assembly import Assembly as Assembly
from curvax.plan.assembly import PlanMode as PlanMode
from curvax.plan.entrywise import Entrywise as Entrywise
from curvax.plan.entrywise import entrywise as entrywise
from curvax.plan.expense import warn_of_expense as warn_of_expense
from curvax.plan.plan import Candidate as Candidate
from curvax.plan.plan import PartCost as PartCost
from curvax.plan.plan import Plan as Plan
from curvax.plan.planner import choose_solver as choose_solver
from curvax.plan.planner import flat_vectors as flat_vectors
from curvax.plan.planner import kernel_choices as kernel_choices
from curvax.plan.planner import plan_for_shapes as plan_for_shapes
from curvax.plan.planner import plan_method as plan_method
from curvax.plan.step_sizes import planned_search as planned_search
from curvax.requirements import Cadence as Cadence
from curvax.requirements import Part as Part
from curvax.requirements import Requirement as Requirement
from curvax.work import Cost as Cost
