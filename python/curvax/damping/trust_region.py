"""Levenberg-Marquardt damping with real rejection.

After a look at a step d, with rho = (f(x) - f(x + d)) / (predicted decrease), lam and the step fare as follows. The
numbers are those of the comments in `TrustRegion.update`.

    rho      -inf ....... accept ......... lower ............... upper ....... 1 .......
    lam        x inc^k      |    x inc       |     unchanged       |    x dec
    step      refused       |    taken       |       taken         |    taken

    1. refused?   the k-th refusal in a row multiplies lam by inc^k
    2. worse, better, or silent (the promise is below the rounding of the loss)?
    3. lam by that answer, within bounds that follow the curvature along the steps
    4. radius     how long a step may be that nobody looks at

An example with inc = 1.5 and dec = 0.5: from lam = 1, rho = 0.9 makes 0.5. Two refusals in a row from there make
0.5 x 1.5 = 0.75 and 0.75 x 1.5^2 = 1.6875.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from curvax.damping.base import Damping, Outcome, ScalarLike, scalar
from curvax.damping.constant import _check_lam0, _show
from curvax.damping.fresh import FreshBatches

_MOST = 1e6
"""Default upper bound on lam, in curvatures: far beyond, a step is a millionth of what the curvature allows."""
_REFUSALS = 1 / 20
"""Share of steps that a trust region at the floor of its dtype may spend on refusals; see `TrustRegion`."""
_FIRST = 0.1
"""First damping over the least curvature along the gradient that a loss of its size can have; see `TrustRegion`."""
_FIRST_SEARCHED = 1e-9
"""The same where a search shortens steps."""
_SHORT, _LONG = 1 / 500, 1 / 8
"""Step sizes below which a model was trusted too much, and from which on it may be trusted more."""
_KEPT = 0.25
"""Share of the promised decrease that the next batches must see before lam falls."""
_MEMORY = 0.99
"""Factor per look of the largest curvature so far, so that bounds follow a curvature that fades."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrustRegionState:
    """State of `TrustRegion`. All scalars.

    Attributes:
      lam: the damping; 0 before the first step of a region without `lam0`.
      refused: lam of the last step that was refused; 0 before any.
      refusals: steps refused since one was taken, int32.
      curvature: largest curvature along a step so far, |d.Cd| / d.d, slowly forgotten; 0 before any.
      radius: length up to which steps are taken unseen.
      fresh: what the batches after a step saw of its promise.
    """

    lam: jax.Array
    refused: jax.Array
    refusals: jax.Array
    curvature: jax.Array
    radius: jax.Array
    fresh: FreshBatches


@dataclasses.dataclass(frozen=True)
class TrustRegion(Damping):
    """Raises lam after steps that the quadratic model promised more of than they kept, and lowers it after good ones.

    With rho = actual / predicted decrease on the step's own batch: rho < lower multiplies lam by `inc`, rho > upper by
    `dec`. A step that does not decrease the loss is rejected: parameters and transform state stay, lam rises. So it
    does after a step that is not finite, evaluated or not. The k-th of several rejections in a row multiplies lam by
    inc^k, so that a lam which is off by many orders is found in a few steps (Nielsen 1999).

    Decreases are known to within the rounding of the loss (`Outcome.rounding`), which is added to both before they are
    compared (Conn, Gould and Toint 2000, section 17.4.2). A step that promises less than that, and does no visible
    harm, is taken and says nothing about the model, so lam falls: by `dec` down to where a step last did harm, and from
    there by inc^(-1/19). One refusal takes that back, so at the floor of its dtype, where nothing is left to gain, a
    run refuses one step in twenty and lam stays where it can return from when the data move.

    Of a step that a search had to shorten (`Outcome.shortened`) lam does not fall, however good the shorter one is.

    A step is judged on the batch it was made for. What the next batches see of it (`FreshBatches`) bounds lam from
    below: lam falls only while they see at least a quarter of what steps promise, and rises by sqrt(inc) per step while
    their loss climbs. With the full batch in every step that changes nothing.

    Without `lam0` the first damping is a tenth of |g|^2 / 2 L, the least curvature along the gradient g that a loss of
    size L = |r|^2 / 2 can have: (g.g)^2 = (r.Jg)^2 <= |r|^2 |Jg|^2, so |Jg|^2 / |g|^2 >= |g|^2 / 2 L. It follows the
    units of the loss and of the parameters.

    Between looks (`every` > 1) a step is taken unseen if it is no longer than 2 / dec times the last one that was
    looked at and taken: twice what the change of lam explains. Longer ones are evaluated although they are not due, as
    are all steps behind one that was refused.

    Attributes:
      lam0: first damping, in units of the curvature; `None` takes it from loss and gradient of the first step.
      lower, upper: bounds on rho between which lam stays; 1/4 and 3/4 (Marquardt 1963, Martens 2010).
      inc, dec: factors for lam.
      every: every how many steps rho is evaluated (one forward pass and one curvature product).
      min_lam, max_lam: bounds on lam; `None` for the rounding unit of the loss and 1e6, times the largest curvature
        along a step so far (times the first damping before any), so that they follow the scale of the loss. A damping
        below the first is lost in the sum C + lam I; the second counts the curvature that a rise of the loss shows.
      accept: least rho of a step that is taken.
      factors: multiples of lam that every step tries, in one batched forward pass; the one with the lowest loss behind
        it becomes lam, and rho judges it. None below 1 while fresh batches see too little of what steps promise.
        Several need a solver of several lam: `QR` or `Eigen` with one factorization, `MultiShiftCG` with the products
        of one solve. `None`, the default, leaves it to the plan: (1/100, 1/10, 1, 10) in small fits for which the
        planner chose QR, which took 40 % fewer steps on the classic least-squares problems; lam alone elsewhere, and
        with a `lam0`, which is tried as it is.
      by_step_size: whether the step size that a search found speaks in the place of rho: lam rises where it is below
        1/500 and falls where it is at least 1/8. Along a line rho says little, as the best step size keeps about half
        of what the model promises for it, whatever the model is worth. The first damping is then 1e-8 of the one above:
        the search, not lam, keeps steps short. It needs one, and goes with `inc=4` (docs/steps.md). False by default:
        it takes some fits many digits further, and others not as far.
    """

    lam0: ScalarLike | None = None
    lower: float = 0.25
    upper: float = 0.75
    inc: float = 1.5
    dec: float = 0.5
    every: int = 1
    min_lam: float | None = None
    max_lam: float | None = None
    accept: float = 0.0
    factors: tuple[float, ...] | None = None
    by_step_size: bool = False

    def __post_init__(self) -> None:
        if self.lam0 is not None:
            _check_lam0(self.lam0)
            if not isinstance(self.lam0, Tracer) and float(self.lam0) == 0:
                raise ValueError("a trust region multiplies its damping: give lam0 above 0.")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}.")
        if not (self.inc > 1 > self.dec > 0):
            raise ValueError("inc must be above 1 and dec between 0 and 1.")
        if not self.lower <= self.upper:
            raise ValueError("lower must not exceed upper.")
        if self.factors is None and self.lam0 is not None:
            object.__setattr__(self, "factors", (1.0,))
        if self.factors is not None and not (self.factors and all(f > 0 for f in self.factors)):
            raise ValueError(f"factors must be multiples of lam above 0, at least one, not {self.factors}.")

    @property
    def name(self) -> str:
        first = "the curvature" if self.lam0 is None else _show(self.lam0)
        by = ", by the step size" if self.by_step_size else ""
        return f"trust region (from {first}, every {self.every}{by})"

    @property
    def evaluate_every(self) -> int | None:
        return self.every

    @property
    def needs_search(self) -> bool:
        return self.by_step_size

    def init(self) -> TrustRegionState:
        lam0 = scalar(0.0 if self.lam0 is None else self.lam0)
        # An array for each: a buffer cannot be donated twice.
        refused, curvature, radius = (jnp.zeros_like(lam0) for _ in range(3))
        fresh = FreshBatches.none(lam0.dtype)
        return TrustRegionState(lam0, refused, jnp.zeros((), jnp.int32), curvature, radius, fresh)

    def start(
        self, state: TrustRegionState, loss: jax.Array, gradient_norm: Callable[[], jax.Array]
    ) -> TrustRegionState:
        if self.lam0 is not None:
            return state
        dtype = state.lam.dtype
        least = jnp.square(gradient_norm().astype(dtype)) / (2 * jnp.abs(loss.astype(dtype)))
        # Where nothing can be learnt from the first batch, the next one says.
        usable = jnp.isfinite(least) & (least > 0)
        share = _FIRST_SEARCHED if self.by_step_size else _FIRST
        first = jnp.where(usable, jnp.clip(share * least, self.min_lam, self.max_lam), jnp.zeros_like(least))
        return dataclasses.replace(state, lam=jnp.where(state.lam == 0, first, state.lam))

    def lam(self, state: TrustRegionState) -> jax.Array:
        # Zero until a batch had a loss and a gradient to take it from: a step from where both are zero goes nowhere.
        return jnp.where(state.lam == 0, jnp.ones_like(state.lam), state.lam)

    def lams(self, state: TrustRegionState, factors: tuple[float, ...]) -> jax.Array:
        lam, multiples = self.lam(state), jnp.asarray(factors, state.lam.dtype)
        kept = state.fresh.kept(_KEPT, 0.0)
        multiples = jnp.where(kept, multiples, jnp.maximum(multiples, 1.0))
        low = jnp.finfo(lam.dtype).eps * state.curvature if self.min_lam is None else scalar(self.min_lam)
        return jnp.maximum(lam * multiples, jnp.minimum(low.astype(lam.dtype), lam))

    def chosen(self, state: TrustRegionState, lam: jax.Array) -> TrustRegionState:
        return dataclasses.replace(state, lam=jnp.where(state.lam == 0, state.lam, lam.astype(state.lam.dtype)))

    def trusts(self, state: TrustRegionState) -> jax.Array:
        return state.fresh.kept(0.0, 0.0)

    def demands(self, state: TrustRegionState, norm: jax.Array) -> jax.Array:
        return ~(norm.astype(state.radius.dtype) <= state.radius)

    def accepts(self, outcome: Outcome) -> jax.Array:
        # Where the model predicts an increase (momentum can turn an update uphill), the loss itself decides.
        downhill = outcome.predicted >= -outcome.rounding
        return jnp.where(downhill, outcome.safe_rho >= self.accept, outcome.actual > 0)

    def update(self, state: TrustRegionState, outcome: Outcome, due: jax.Array) -> TrustRegionState:
        # 1.
        seen = due & outcome.evaluated
        accepted = self.accepts(outcome)
        refused = (seen & ~accepted) | ~outcome.finite | ~jnp.asarray(outcome.descends)
        # 2.
        size, solved = jnp.asarray(outcome.step_size), jnp.asarray(outcome.solved)
        fails = (size < _SHORT) | ~solved if self.by_step_size else outcome.safe_rho < self.lower
        holds = size >= _LONG if self.by_step_size else outcome.safe_rho > self.upper
        worse = refused | (seen & fails)
        # A promise below rounding: whatever became of it, it does not speak for the model.
        silent = seen & ~refused & (jnp.abs(outcome.predicted) <= outcome.rounding)
        # Nor does half of a step for one that would have been refused: it is progress, and lam stays.
        whole = ~jnp.asarray(outcome.shortened) | self.by_step_size
        silent &= whole
        better = seen & ~worse & ~silent & holds & whole
        # What the next batches see of earlier steps.
        fresh = state.fresh.after(outcome.loss, _promise(outcome, seen, refused))
        better &= fresh.kept(_KEPT, outcome.rounding)
        climbs = ~fresh.kept(0.0, outcome.rounding)
        # 3.
        curvature = self._largest(state, outcome, seen)
        lam = jnp.where(better, state.lam * self.dec, state.lam)
        lam = jnp.where(silent, self._fallen(state), lam)
        # From a small first damping minibatches have a long way to go.
        lam = jnp.where(climbs, state.lam * (self.inc if self.by_step_size else self.inc**0.5), lam)
        lam = jnp.where(worse & ~silent, state.lam * self.inc, lam)
        lam = jnp.where(silent & ~solved, state.lam * self.inc, lam)
        refusals = jnp.where(refused, state.refusals + 1, jnp.where(seen, 0, state.refusals))
        lam = jnp.where(refused, state.lam * self.inc ** refusals.astype(lam.dtype), lam)
        # 4.
        norm = jnp.asarray(outcome.norm).astype(state.radius.dtype)
        radius = jnp.where(seen & accepted, norm * jnp.where(worse, 1.0, 2 / self.dec).astype(norm.dtype), state.radius)
        return TrustRegionState(
            lam=self._bounded(lam, state.lam, curvature, outcome),
            refused=jnp.where(refused, state.lam, state.refused),
            refusals=refusals,
            curvature=curvature,
            radius=jnp.where(refused, jnp.zeros_like(radius), radius),
            fresh=fresh,
        )

    def _fallen(self, state: TrustRegionState) -> jax.Array:
        """lam after a step that promised less than rounding."""
        slowly = state.lam * self.inc ** (-_REFUSALS / (1 - _REFUSALS))
        # Fast only as far as nothing is known against it.
        return jnp.minimum(slowly, jnp.maximum(state.lam * self.dec, state.refused * self.inc))

    def _largest(self, state: TrustRegionState, outcome: Outcome, seen: jax.Array) -> jax.Array:
        along = jnp.asarray(outcome.curvature).astype(state.curvature.dtype)
        along = jnp.where(seen & jnp.isfinite(along), along, jnp.zeros_like(along))
        return jnp.maximum(jnp.where(seen, _MEMORY * state.curvature, state.curvature), along)

    def _bounded(self, lam: jax.Array, before: jax.Array, curvature: jax.Array, outcome: Outcome) -> jax.Array:
        """`lam` within its bounds; the default ones stop it on its way and never move it."""
        lam0 = before if self.lam0 is None else scalar(self.lam0).astype(lam.dtype)
        scale = jnp.where(curvature > 0, curvature, lam0)
        eps = float(jnp.finfo(outcome.loss.dtype).eps)
        low = jnp.minimum(eps * scale, before) if self.min_lam is None else scalar(self.min_lam).astype(lam.dtype)
        # Along a flat tail the curvature there is no scale for a step, but that which the rise of the loss shows is.
        shown = jnp.asarray(outcome.shown).astype(lam.dtype)
        top = jnp.maximum(scale, jnp.where(jnp.isfinite(shown), shown, jnp.zeros_like(shown)))
        high = jnp.maximum(_MOST * top, before) if self.max_lam is None else scalar(self.max_lam).astype(lam.dtype)
        # Where no step was ever seen each refusal moves the bound: not to where lam could no longer come back from.
        high = jnp.minimum(high, jnp.maximum(before, float(jnp.finfo(lam.dtype).max) ** 0.5))
        # Before a first damping there is nothing to keep within bounds.
        return jnp.where(before == 0, before, jnp.clip(lam, low, high))


def _promise(outcome: Outcome, seen: jax.Array, refused: jax.Array) -> jax.Array:
    """What a step promises to the batches after it: 0 where it is not taken, NaN where it was not evaluated."""
    promise = jnp.where(seen, jnp.maximum(outcome.predicted, 0), jnp.full_like(outcome.predicted, jnp.nan))
    return jnp.where(refused, jnp.zeros_like(promise), promise)
