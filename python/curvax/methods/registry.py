"""Presets by name: keywords checked, signatures visible to people and type checkers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from curvax.method import Method
from curvax.methods.names import SPELLINGS
from curvax.spelling import check_keywords, nearest, respelled

P = ParamSpec("P")
OptionsT = TypeVar("OptionsT")


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """A preset as `describe` returns it."""

    name: str
    description: str
    signature: inspect.Signature
    doc: str

    def __str__(self) -> str:
        return f"{self.name}{self.signature}\n{self.description}"


class UnknownMethod(KeyError, ValueError):
    """A preset's name that there is not; its text is the sentence itself."""

    def __str__(self) -> str:
        return str(self.args[0])


_PRESETS: dict[str, tuple[Callable[..., Method], MethodInfo]] = {}


def preset(
    description: str, options: Callable[P, OptionsT]
) -> Callable[[Callable[[OptionsT], Method]], Callable[P, Method]]:
    """Registers `build(options) -> Method` as a preset whose keywords are the fields of the dataclass `options`."""

    def register(build: Callable[[OptionsT], Method]) -> Callable[P, Method]:
        name = build.__name__
        signature = inspect.signature(options)
        required = [p.name for p in signature.parameters.values() if p.default is inspect.Parameter.empty]

        @functools.wraps(build)
        def method(*args: P.args, **kwargs: P.kwargs) -> Method:
            if args:
                raise TypeError(f"{name} takes keywords only: write {name}({required[0]}=...).")
            given = respelled(name, kwargs, SPELLINGS)
            check_keywords(name, given, signature.parameters, _ELSEWHERE)
            missing = [word for word in required if word not in given]
            if missing:
                raise TypeError(f"{name} needs {', '.join(missing)}: pass {missing[0]}=...")
            return build(options(**given))  # type: ignore[call-arg]

        method.__doc__ = f"{inspect.getdoc(build)}\n\nKeywords and what they mean: `curvax methods {name}` in a shell."
        method.__signature__ = signature.replace(return_annotation=Method)  # type: ignore[attr-defined]
        info = MethodInfo(name, description, signature, inspect.getdoc(build) or description)
        _PRESETS[name] = (method, info)
        return method

    return register


_ELSEWHERE = {
    "clip_norm": "it clips every entry of the direction: write clip_value=, or tx= with optax.clip_by_global_norm.",
    "clip_value": "write clip_norm= for a bound on the direction's norm, or tx= with optax.clip.",
    "mask": "what weight decay applies to is weight_decay_mask here.",
}
"""Keywords that some presets have, and what to write for them with the others."""


def make(name: str, /, **options: Any) -> Method:
    """The preset of that name, in any case; unknown names and keywords name the nearest known one.

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


def _find(name: str) -> tuple[Callable[..., Method], MethodInfo]:
    found = _PRESETS.get(name.lower())
    if found is None:
        raise UnknownMethod(f"there is no method {name!r}.{nearest(name.lower(), _PRESETS)}")
    return found
