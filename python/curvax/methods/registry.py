"""Presets by name: keywords checked, signatures visible to people and type checkers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from curvax.keywords import keyword_docs, spread
from curvax.method import AbstractMethod
from curvax.methods.names import SPELLINGS
from curvax.spelling import nearest

P = ParamSpec("P")
OptionsT = TypeVar("OptionsT")
MethodT = TypeVar("MethodT", bound=AbstractMethod[Any, Any])


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """A preset as `describe` returns it.

    Attributes:
      name: its name.
      description: one line.
      signature: its keywords with defaults.
      doc: what it does.
      keywords: what each keyword means.
    """

    name: str
    description: str
    signature: inspect.Signature
    doc: str
    keywords: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.name}{self.signature}\n{self.description}"


class UnknownMethod(KeyError, ValueError):
    """A preset's name that there is not; its text is the sentence itself."""

    def __str__(self) -> str:
        return str(self.args[0])


_PRESETS: dict[str, tuple[Callable[..., AbstractMethod[Any, Any]], MethodInfo]] = {}

_ELSEWHERE = {
    "clip_norm": "it clips every entry of the direction: write clip_value=, or tx= with optax.clip_by_global_norm.",
    "mask": "what weight decay applies to is weight_decay_mask here.",
    "damping": "write lam0= for a number or a schedule, and lam_policy= for a curvax.damping object.",
    "loss_fn": "write predict_fn= and loss=, or take newton_cg, sophia_h or adahessian for it.",
    "solver": "each preset has its own: take the one whose it is, or curvax.assemble(solver=...).",
    "preconditioner": "write precond= with sgn and newton_cg, or curvax.assemble(preconditioner=...).",
    "scaling": "gauss_newton, egn, sgn and their kin scale the damping; the others have no D.",
    **dict.fromkeys(("model", "apply_fn", "log_psi"), "write predict_fn=, a function of (params, inputs)."),
    **dict.fromkeys(("lr", "step_size", "schedule"), "write learning_rate=, a number or an Optax schedule."),
    **dict.fromkeys(("optimizer", "transform"), "write tx=, an Optax chain behind the direction."),
    **dict.fromkeys(("rng", "key", "seed"), "the random key goes to step(params, batch, state, rng)."),
    "momentum": "write direction_momentum= for momentum on the direction, or beta1= where a preset has it.",
    "batch_size": "a step takes the batch that it is given: microbatch_size= cuts that into pieces.",
}
"""Keywords that some presets have, and what to write for them with the others."""


def preset(
    description: str, options: Callable[P, OptionsT], *, instead: Mapping[str, str] = _ELSEWHERE
) -> Callable[[Callable[[OptionsT], MethodT]], Callable[P, MethodT]]:
    """Registers `build(options)` as a preset whose keywords are the fields of the dataclass `options`.

    Args:
      description: one line.
      options: a dataclass, whose docstring says under `Attributes:` what each keyword means.
      instead: keywords that other presets have -> what to write with this one.
    """

    def register(build: Callable[[OptionsT], MethodT]) -> Callable[P, MethodT]:
        name, doc = build.__name__, inspect.getdoc(build) or description
        method = spread(options, spellings=SPELLINGS, instead=instead)(build)
        info = MethodInfo(name, description, inspect.signature(method), doc, keyword_docs(options))
        _PRESETS[name] = (method, info)
        return method

    return register


def make(name: str, /, **options: Any) -> Any:
    """The preset of that name, in any case; unknown names and keywords name the nearest known one.

    Returns:
      A `Method`, or the `InnerLoopMethod` of `full_gn` and `layerwise_gn`.

    Raises:
      UnknownMethod: a KeyError, as for other mappings from names, and a ValueError.
    """
    return _find(name)[0](**options)


def list_methods() -> dict[str, str]:
    """Preset names with one line each."""
    return {name: info.description for name, (_, info) in sorted(_PRESETS.items())}


def describe(name: str) -> MethodInfo:
    """Name, description and signature of a preset."""
    return _find(name)[1]


def _find(name: str) -> tuple[Callable[..., AbstractMethod[Any, Any]], MethodInfo]:
    known = _PRESETS.get(name.lower())
    if known is None:
        raise UnknownMethod(f"there is no method {name!r}.{nearest(name.lower(), _PRESETS)}")
    return known
