"""A trust region whose radius follows rho, for solvers that keep the direction within it.

`TrustRegion` shortens a step by adding lam I to the curvature; on an indefinite Hessian that works once lam is beyond
the lowest eigenvalue. Here the quadratic model stays as it is and is minimized in a ball (Conn, Gould and Toint 2000),
so negative curvature is used where it is:

    rho      -inf ....... accept ......... lower ............... upper ....... 1 .......
    radius   / inc^k     |    / inc      |     unchanged       |    / dec, if the step ended on the boundary
    step     refused     |    taken      |       taken         |    taken

All else is as in `trust_region.py`, whose rules move 1 / radius here: rounding, what fresh batches see, steps taken
unseen. An example with inc = 4 and dec = 0.5: radius 1, a good step to the boundary makes 2, two refusals in a row make
2 / 4 / 16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from curvax.damping.base import Damping, Outcome, ScalarLike, scalar
from curvax.damping.constant import _check_lam0, _show
from curvax.damping.trust_region import TrustRegion, TrustRegionState


@dataclasses.dataclass(frozen=True)
class Radius(Damping):
    """A bound on the norm of the direction that follows rho = actual / predicted decrease; lam stays.

    It goes with solvers that say `takes_radius`: `CG`, which under a radius is the method of Steihaug and Toint, and
    `Cholesky`, which then takes the least of the quadratic model in the ball. The bound is on the direction, before
    learning rate and transform.

    Without `radius0` the first radius is 2 L / |g|, where the tangent of a loss L comes to -L: the longest step that
    a loss of squares lets expect anything of. It follows the units of the parameters and of the loss.

    The state is a `TrustRegionState` whose `lam` is 1 / radius, and whose `curvature` is the largest such lam of a step
    that was taken (the first one before any), slowly forgotten. Both bound it: radius stays between 1e-6 and 1 / eps
    times what was last of use.

    Attributes:
      radius0: first radius, in units of the parameters, above 0; `None` takes it from loss and gradient.
      lam0: added to the curvature in every step; 0, as the radius alone bounds steps.
      lower, upper: bounds on rho between which the radius stays; 1/4 and 3/4 (Conn, Gould and Toint 2000).
      inc, dec: factors for 1 / radius: a quarter after a bad step and twice after a good one. On the 41 classic
        problems of Moré, Garbow and Hillstrom and 17 others that took fewer steps (1,333) than a third and three times
        (1,625).
      every: every how many steps rho is evaluated (one forward pass and one curvature product).
      accept: least rho of a step that is taken.
    """

    radius0: ScalarLike | None = None
    lam0: ScalarLike = 0.0
    lower: float = 0.25
    upper: float = 0.75
    inc: float = 4.0
    dec: float = 0.5
    every: int = 1
    accept: float = 0.0

    def __post_init__(self) -> None:
        _check_lam0(self.lam0)
        if self.radius0 is not None and not isinstance(self.radius0, Tracer) and not float(self.radius0) > 0:
            raise ValueError(f"radius0 must be above 0, not {self.radius0}: a step of length zero goes nowhere.")
        _ = self._inverse  # checks what both have in common

    @property
    def _inverse(self) -> TrustRegion:
        """The policy of 1 / radius."""
        return TrustRegion(None, self.lower, self.upper, self.inc, self.dec, self.every, accept=self.accept)

    @property
    def name(self) -> str:
        first = "2 L / |g|" if self.radius0 is None else _show(self.radius0)
        return f"radius (from {first}, every {self.every})"

    @property
    def evaluate_every(self) -> int | None:
        return self.every

    @property
    def has_radius(self) -> bool:
        return True

    def init(self) -> TrustRegionState:
        state = self._inverse.init()
        if self.radius0 is None:
            return state
        # An array for each: a buffer cannot be donated twice.
        return dataclasses.replace(state, lam=1 / scalar(self.radius0), curvature=1 / scalar(self.radius0))

    def start(
        self, state: TrustRegionState, loss: jax.Array, gradient_norm: Callable[[], jax.Array]
    ) -> TrustRegionState:
        if self.radius0 is not None:
            return state
        dtype = state.lam.dtype
        first = gradient_norm().astype(dtype) / (2 * jnp.abs(loss.astype(dtype)))
        usable = jnp.isfinite(first) & (first > 0)
        now = usable & (state.lam == 0)
        return dataclasses.replace(
            state, lam=jnp.where(now, first, state.lam), curvature=jnp.where(now, first, state.curvature)
        )

    def lam(self, state: TrustRegionState) -> jax.Array:
        return scalar(self.lam0)

    def radius(self, state: TrustRegionState) -> jax.Array:
        return 1 / self._inverse.lam(state)

    def trusts(self, state: TrustRegionState) -> jax.Array:
        return self._inverse.trusts(state)

    def demands(self, state: TrustRegionState, norm: jax.Array) -> jax.Array:
        return self._inverse.demands(state, norm)

    def accepts(self, outcome: Outcome) -> jax.Array:
        return self._inverse.accepts(outcome)

    def update(self, state: TrustRegionState, outcome: Outcome, due: jax.Array) -> TrustRegionState:
        at_boundary = jnp.asarray(outcome.at_boundary)
        # Where loss or gradient were zero nothing bounds a step, unless it left a saddle all the same.
        before = jnp.where(at_boundary, self._inverse.lam(state), state.lam)
        # Bounds follow what was of use, as those on lam follow the curvature.
        used = jnp.where(self.accepts(outcome), before, jnp.full_like(before, jnp.nan))
        nothing = jnp.full_like(before, jnp.nan)
        seen = dataclasses.replace(outcome, curvature=used, shown=nothing, solved=outcome.solved | at_boundary)
        new = self._inverse.update(dataclasses.replace(state, lam=before), seen, due)
        # A good step that ended inside says nothing of longer ones.
        return dataclasses.replace(new, lam=jnp.where(at_boundary, new.lam, jnp.maximum(new.lam, before)))
