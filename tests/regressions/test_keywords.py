"""Functions whose keywords are the fields of a dataclass look and err as functions with those keywords do."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import pytest

import curvax
from curvax.keywords import keyword_docs, spread
from curvax.losses import SquaredError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Keywords of both.

    Attributes:
      scale: of the result,
        by default 1.
    """

    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Own(Shared):
    """Keywords of `area`.

    Attributes:
      width, height: in meters.
    """

    width: float
    height: float = 2.0
    _: dataclasses.KW_ONLY
    depth: int = 0


@spread(Own, spellings={"hight": "height"}, instead={"length": "write width."})
def area(options: Own) -> float:
    """Width times height."""
    return options.width * options.height * options.scale


def test_calls() -> None:
    assert area(3.0) == 6.0
    any_keywords: Any = area
    assert area(3.0, 4.0) == area(height=4.0, width=3.0) == any_keywords(3.0, hight=4.0) == 12.0
    assert area(3.0, scale=2.0) == 12.0
    assert str(inspect.signature(area)) == (
        "(width: 'float', height: 'float' = 2.0, *, scale: 'float' = 1.0, depth: 'int' = 0) -> 'float'"
    )
    assert area.__name__ == "area" and area.__doc__ is not None and area.__doc__.startswith("Width times height.")
    assert "  scale: of the result, by default 1.\n" in area.__doc__ and "  height: in meters.\n" in area.__doc__
    assert set(keyword_docs(Own)) == {"width", "height", "scale"}


@pytest.mark.parametrize(
    ("arguments", "keywords", "sentence"),
    [
        ((1.0,), {"hieght": 2.0}, r"area has no keyword 'hieght'\. Did you mean 'height'\?"),
        ((1.0,), {"length": 2.0}, "area has no keyword 'length': write width"),
        ((), {}, r"area needs width: pass width="),
        ((1.0,), {"width": 2.0}, "width is given by position and by keyword"),
        ((1.0,), {"height": 2.0, "hight": 2.0}, "hight and height are one thing"),
        ((1.0, 2.0, 3.0), {}, "area takes width, height by position and keywords only after them"),
    ],
)
def test_errors(arguments: tuple[Any, ...], keywords: dict[str, Any], sentence: str) -> None:
    wrong: Any = area
    with pytest.raises(TypeError, match=sentence):
        wrong(*arguments, **keywords)


def test_faces_and_assemble_name_the_nearest_keyword() -> None:
    def predict(params: Any, x: jax.Array) -> jax.Array:
        return x @ params

    wrong: Any = curvax.transforms.scale_by_ggn
    with pytest.raises(TypeError, match=r"scale_by_ggn has no keyword 'solvr'\. Did you mean 'solver'\?"):
        wrong(predict, SquaredError(), solvr=1)
    wrong = curvax.transforms.scale_by_kfac
    with pytest.raises(TypeError, match=r"scale_by_kfac needs batch"):
        wrong(predict, SquaredError())
    wrong = curvax.assemble
    with pytest.raises(TypeError, match=r"assemble has no keyword 'dampin'\. Did you mean 'damping'\?"):
        wrong(curvature=None, solver=None, dampin=1)
