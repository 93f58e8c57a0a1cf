"""Functions whose keywords are the fields of a dataclass.

A function with many keywords takes one object of typed options instead, and `spread` gives callers the keywords back:

    @dataclasses.dataclass(frozen=True)
    class AreaOptions:  # its docstring says under `Attributes:` what each keyword means
        width: float
        _: dataclasses.KW_ONLY
        height: float = 1.0

    @spread(AreaOptions)
    def area(options: AreaOptions) -> float:
        return options.width * options.height

    inspect.signature(area)    # (width: float, *, height: float = 1.0) -> float, for people and type checkers
    area(2.0, hieght=3.0)      # TypeError: area has no keyword 'hieght'. Did you mean 'height'?

Options inherit the groups of keywords that several functions share, so that a keyword has one default, one meaning and
one check wherever it appears.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from curvax.spelling import check_keywords, respelled

P = ParamSpec("P")
OptionsT = TypeVar("OptionsT")
ResultT = TypeVar("ResultT")
_NONE: Mapping[str, str] = MappingProxyType({})


def spread(
    options: Callable[P, OptionsT], *, spellings: Mapping[str, str] = _NONE, instead: Mapping[str, str] = _NONE
) -> Callable[[Callable[[OptionsT], ResultT]], Callable[P, ResultT]]:
    """Makes of `function(options(...))` a function of the fields of the dataclass `options`.

    Args:
      options: a dataclass; fields that are not keyword-only may be given by position. Its static function `needed`, if
        it has one, says which keywords with a default must be there beside those that are given.
      spellings: other names of keywords -> the fields' names.
      instead: keywords that other functions have -> what to write here.

    Returns:
      The decorator. The function's docstring gets the fields' as `Args`.

    Raises (the function that it makes):
      TypeError: an unknown keyword, with the nearest known one; a missing one; one that is given twice.
    """
    signature = inspect.signature(options)
    known = signature.parameters
    positional = [p.name for p in known.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in known.values() if p.default is p.empty]
    needed: Callable[[Mapping[str, Any]], tuple[str, ...]] = getattr(options, "needed", lambda given: ())

    def decorate(function: Callable[[OptionsT], ResultT]) -> Callable[P, ResultT]:
        name = function.__name__

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> ResultT:
            if len(args) > len(positional):
                raise TypeError(_too_many(name, positional, required))
            given = dict(zip(positional, args, strict=False))
            by_keyword = respelled(name, kwargs, spellings)
            check_keywords(name, by_keyword, known, instead)
            for word in given.keys() & by_keyword.keys():
                raise TypeError(f"{name}: {word} is given by position and by keyword: give it once.")
            given |= by_keyword
            missing = [word for word in (*needed(given), *required) if word not in given]
            if missing:
                raise TypeError(f"{name} needs {', '.join(missing)}: pass {missing[0]}=...")
            return function(options(**given))  # type: ignore[call-arg]

        returned = inspect.signature(function).return_annotation
        call.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.getdoc(function)}\n\nArgs:\n{_listed(keyword_docs(options), signature)}"
        return call

    return decorate


def _too_many(name: str, positional: list[str], required: list[str]) -> str:
    if positional:
        return f"{name} takes {', '.join(positional)} by position and keywords only after them."
    return f"{name} takes keywords only" + (f": write {name}({required[0]}=...)." if required else ".")


def keyword_docs(options: Any) -> dict[str, str]:
    """Text per keyword, from the `Attributes:` of a dataclass and of those that it inherits, its own first."""
    docs: dict[str, str] = {}
    for group in options.__mro__:
        for names, text in _attributes(inspect.cleandoc(group.__dict__.get("__doc__") or "")):
            for keyword in names.split(", "):
                docs.setdefault(keyword, text)
    return docs


def _attributes(doc: str) -> list[tuple[str, str]]:
    """(names, text) of each entry in a docstring's `Attributes:`, with its lines joined."""
    section = doc.partition("Attributes:\n")[2]
    joined = re.sub(r"\n {4,}", " ", section)
    return re.findall(r"^  ([\w, ]+): (.*)$", joined, re.MULTILINE)


def _listed(docs: Mapping[str, str], signature: inspect.Signature) -> str:
    lines = [f"{name}: {docs.get(name, '')}".rstrip() for name in signature.parameters]
    return "\n".join(textwrap.fill(x, 116, initial_indent="  ", subsequent_indent="    ") for x in lines)
