"""Steps that nobody looked at, and the way back from one that led to where the loss is no finite number.

    step t      parameters a -> b, its loss not evaluated          state.last = (a, unseen)
    step t + 1  loss or gradient at b are not finite
                  the loss at a on this batch is    -> back to a   undone
                  it is not                         -> stay at b   the batch is bad; the next one decides

While steps are finite this costs a pass over the gradient and a copy of the parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.execute.context import Start, StepContext
from curvax.loops import for_loop_body
from curvax.tree import PyTree


def judged(ctx: StepContext, at: Linearization, gradient: PyTree) -> Start:
    """The start of a step at which loss and gradient are these."""
    params, last, no = ctx.params, ctx.state.last, jnp.asarray(False)
    if last is None:
        return Start(params, None, no, no)
    astray = last.unseen & ~(jnp.isfinite(at.loss) & tree.all_finite(gradient))

    def fine_before() -> jax.Array:
        return jnp.isfinite(ctx.assembly.curvature.value(last.before, ctx.problem.evaluation))

    undone = jax.lax.cond(astray, for_loop_body(fine_before), lambda: no)
    start = tree.where(undone, last.before, params)
    return Start(start, tree.where(astray, last.before, params), undone, astray & ~undone)
