"""Which modules made a state: a static description that a step compares with its own, in place of trusting shapes.

A state is arrays, and those of two methods often have the same shapes: `sgn` with and without a warm start, K-FAC with
exact and with factored damping, the diagonals of Sophia and AdaHessian. What arrays mean is said by the classes of the
modules, and by their switches; numbers (damping, decays, rates, cadences) may change from one step to the next.

    solver          CG(stop=MartensStop, warm_start=True)
    preconditioner  KFAC(fisher=MonteCarloFisher, sharing=EXPAND, inverse=EigenInverse(factored=False))
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """The modules behind a state.

    Attributes:
      parts: (name of the module, what it is), in the order of the names.
    """

    parts: tuple[tuple[str, str], ...]

    @staticmethod
    def of(**modules: Any) -> Origin:
        """Of modules by name: objects, or texts that say what they are."""
        return Origin(tuple((name, kind_of(module)) for name, module in modules.items()))

    def check(self, owner: Origin) -> None:
        """Raises ValueError if a step of other modules is to go on with the state; `owner` are the step's."""
        check_parts(dict(self.parts), dict(owner.parts))


def check_parts(made: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises ValueError for descriptions that differ, with the first difference."""
    for name in {**wanted, **made}:
        mine, theirs = wanted.get(name, "none"), made.get(name, "none")
        if mine != theirs:
            raise ValueError(
                f"the state was made by another method, with the {name} {theirs} where this one has {mine}: call init "
                "again, or pass the state that this method's init or last step returned."
            )


def kind_of(module: Any) -> str:
    """The class of a module and, recursively, its fields that are modules, switches or members of enumerations."""
    if isinstance(module, str):
        return module
    if isinstance(module, tuple | list):
        return f"({', '.join(map(kind_of, module))})"
    name = type(module).__name__
    if not dataclasses.is_dataclass(module):
        return "none" if module is None else name
    said = [(field.name, getattr(module, field.name)) for field in dataclasses.fields(module) if field.compare]
    inside = [f"{key}={_text(value)}" for key, value in said if _tells(value)]
    return f"{name}({', '.join(inside)})" if inside else name


def _tells(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_tells, value))
    return isinstance(value, bool | enum.Enum) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, bool) else kind_of(value)
