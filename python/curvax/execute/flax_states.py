"""Flax's serialization (`flax.serialization`, `TrainState` checkpoints) for the states of methods.

Flax serializes classes that are registered with it. curvax does not import Flax; a method that makes a state registers
its class if Flax is there by then, and `curvax.register_with_flax` does so at any time. The state dict has the leaves
by their places, and the state's stamp, so that bytes of another method are refused:

    {"stamp": {"version": "2", "solver": "CG(warm_start=True)", ...}, "leaves": {".step": 3, ...}}
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.execute.state import AbstractState

_FLAX = "flax.serialization"


def register_if_imported(kind: type[AbstractState]) -> None:
    """Registers a class of states with Flax if the program has imported Flax."""
    if _FLAX in sys.modules:
        register(kind, sys.modules[_FLAX])


def register(kind: type[AbstractState], serialization: Any) -> None:
    """Registers a class of states with `flax.serialization`; again does no harm."""
    serialization.register_serialization_state(kind, _to_dict, _from_dict, override=True)


def _to_dict(state: AbstractState) -> dict[str, Any]:
    leaves = dict(zip(tree.places(state), jax.tree.leaves(state), strict=True))
    return {"stamp": dict(state.stamp), "leaves": leaves}


def _from_dict(target: AbstractState, saved: Mapping[str, Any]) -> AbstractState:
    if set(saved) != {"stamp", "leaves"}:
        raise ValueError(f"the bytes are of no curvax {type(target).__name__}: give from_bytes the matching target.")
    target.check_stamp(saved["stamp"])
    places, leaves = tree.places(target), saved["leaves"]
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(target)]
    if set(places) != set(leaves) or any(jnp.shape(leaves[p]) != s for p, s in zip(places, shapes, strict=True)):
        raise ValueError(
            "the serialized state belongs to other parameters: give from_bytes what init returns for parameters of "
            "their shapes."
        )
    return jax.tree.unflatten(jax.tree.structure(target), [leaves[place] for place in places])
