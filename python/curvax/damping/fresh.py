"""Checks whether the loss decreases that steps predict also appear on the batches that follow.

A step is computed from one batch. On that batch its predicted decrease is usually reached, but the next batch may see
little of it: a network with more parameters than a batch has examples can memorize one batch after another. The change
of the loss from batch to batch shows this, and it costs no extra evaluation:

    batch              1      2      3      4
    loss before      2.00   1.98   2.01   1.99       decrease from batch to batch:  0.02, -0.03, 0.02
    promise          0.90   0.80   0.85              kept of what was promised:     0.01 / 2.55

With the full batch in every step both are the same numbers, one step later.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_MEMORY = 0.9
"""Decay of the running means. They average over about ten steps, so the difference in loss between two batches enters
with a weight of about 1/10.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FreshBatches:
    """What became of promises on the batches after them. All scalars.

    Attributes:
      loss: loss before the last step, on its batch; NaN before any.
      promise: predicted decrease of the last step. If that step was not evaluated, the prediction of the last step that
        was. 0 if the step was not taken.
      decrease: running mean of the decrease from batch to batch.
      promised: running mean of what was promised for it.
    """

    loss: jax.Array
    promise: jax.Array
    decrease: jax.Array
    promised: jax.Array

    @staticmethod
    def none(dtype: jax.typing.DTypeLike) -> FreshBatches:
        """Before any step."""
        # An array for each: a buffer cannot be donated twice.
        promise, decrease, promised = (jnp.zeros((), dtype) for _ in range(3))
        return FreshBatches(jnp.full((), jnp.nan, dtype), promise, decrease, promised)

    def after(self, loss: jax.Array, promise: jax.Array) -> FreshBatches:
        """With the loss of a new batch before its step, and what that step promises (NaN: as much as the last)."""
        loss, promise = loss.astype(self.loss.dtype), promise.astype(self.loss.dtype)
        change = self.loss - loss
        known = jnp.isfinite(change)

        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(known, _MEMORY * old + (1 - _MEMORY) * new, old)

        return FreshBatches(
            loss=jnp.where(jnp.isfinite(loss), loss, self.loss),
            promise=jnp.where(jnp.isnan(promise), self.promise, promise),
            decrease=mean(self.decrease, change),
            promised=mean(self.promised, self.promise),
        )

    def kept(self, least: float | jax.Array, rounding: float | jax.Array) -> jax.Array:
        """Whether at least this share of the promises was kept; true where they are no more than rounding."""
        return (self.promised <= rounding) | (self.decrease >= least * self.promised)
