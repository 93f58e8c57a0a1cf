"""No preconditioner."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax.curvature import Linearization
from curvax.estimators.base import check_count
from curvax.preconditioners.base import Preconditioner
from curvax.requirements import Requirement
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdentityState:
    """State of `IdentityPreconditioner`.

    Attributes:
      rejected: always 0 (int32).
    """

    rejected: jax.Array


@dataclasses.dataclass(frozen=True)
class IdentityPreconditioner(Preconditioner):
    """P^-1 v = v. It looks at nothing, so the plan has nothing to do at any cadence."""

    every: int = 1

    def __post_init__(self) -> None:
        check_count("every", self.every)

    @property
    def needs_product(self) -> bool:
        """False."""
        return False

    @property
    def needs_sampling(self) -> bool:
        """False."""
        return False

    @property
    def is_identity(self) -> bool:
        """True."""
        return True

    def requirements(self) -> tuple[Requirement, ...]:
        """Nothing."""
        return ()

    def init(self, params_like: PyTree) -> IdentityState:
        """A state without content."""
        return IdentityState(jnp.zeros((), jnp.int32))

    def refresh(self, state: IdentityState, linearization: Linearization, key: jax.Array) -> IdentityState:
        """The state as it is."""
        return state

    def apply(self, state: IdentityState, lam: jax.Array | float, v: PyTree) -> PyTree:
        """`v`."""
        return v
