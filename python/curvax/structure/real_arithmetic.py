"""A model's complex arithmetic as real arithmetic: a complex layer becomes the real ones that it consists of.

A complex weight is a pair of real leaves, and a product with it is a sum of products with these:

    (x + i y) (A + i B) = (x A - y B) + i (x B + y A)        leaf A used on x and on y, leaf B used on x and on y

What is linear is written out so, with no imaginary part where there is none; what is not (exp, log cosh, ...) is
evaluated as it stands, between two conversions. Scans, branches and rematerialized calls are written anew around
bodies in real arithmetic; `while` loops and calls with derivative rules of their own are taken whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from curvax.complex_parts import is_complex
from curvax.jaxprs import (
    BARRIER,
    CALLS,
    COND,
    REMATERIALIZED,
    SCAN,
    AnyJaxpr,
    Program,
    Step,
    bind,
    bodies,
    evaluate,
    opened,
    program_of,
    scan_counts,
)


class Parts(NamedTuple):
    """A complex value; `imag` is `None` where it is zero because the value was real."""

    real: jax.Array
    imag: jax.Array | None


Value = Any
"""A `Parts` or a real array."""


_OPENED = CALLS | REMATERIALIZED | {SCAN, COND}
"""Equations whose bodies are written in real arithmetic, too."""


def is_complex_program(jaxpr: AnyJaxpr) -> bool:
    """Whether any equation that this module looks at makes complex numbers."""
    return any(is_complex(v.aval) for eqn in _equations(jaxpr) for v in eqn.outvars)


def _equations(jaxpr: AnyJaxpr) -> Iterator[JaxprEqn]:
    for eqn in opened(jaxpr)[0].eqns:
        yield eqn
        if eqn.primitive.name in _OPENED:
            for body in bodies(eqn):
                yield from _equations(body.jaxpr)


def in_real_arithmetic(jaxpr: AnyJaxpr) -> Callable[..., list[Any]]:
    """A function of the jaxpr's arguments with its results."""
    program = program_of(jaxpr)

    def function(*arguments: Any) -> list[Any]:
        return [_joined(x) for x in _evaluated(program, arguments)]

    return function


def _evaluated(program: Program, arguments: Sequence[Value]) -> list[Value]:
    return evaluate(program, [_parts(x) for x in arguments], _step)


def _step(index: int, step: Step, operands: Sequence[Value]) -> list[Value]:
    del index
    operands = [_parts(x) for x in operands]
    if step.primitive in _CONTROL and any(is_complex_program(body.jaxpr) for body in bodies(step.eqn)):
        return _CONTROL[step.primitive](step, operands)
    rule = _RULES.get(step.primitive)
    produces = any(is_complex(v) for v in step.output_avals)
    if rule is None or not (produces or any(isinstance(x, Parts) for x in operands)):
        return [_parts(x) for x in bind(step.eqn, [_joined(x) for x in operands])]
    made = rule(step, *operands)
    return made if isinstance(made, list) else [made]


def _rematerialized(step: Step, operands: list[Value]) -> list[Value]:
    params = step.eqn.params
    body = functools.partial(_evaluated, step.bodies[0])
    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(operands)


def _branches(step: Step, operands: list[Value]) -> list[Value]:
    which, *rest = operands
    made = [lambda *given, body=body: _whole(_evaluated(body, given)) for body in step.bodies]
    return jax.lax.switch(which.astype(jnp.int32), made, *rest)


def _scan(step: Step, operands: list[Value]) -> list[Value]:
    params, body = step.eqn.params, step.bodies[0]
    consts, carried = scan_counts(step.eqn)
    fixed, state, scanned = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def iteration(state: list[Value], slices: list[Value]) -> tuple[list[Value], list[Value]]:
        results = _evaluated(body, [*fixed, *state, *slices])
        return _whole(results[:carried]), results[carried:]

    state, stacked = jax.lax.scan(
        iteration,
        _whole(state),
        scanned,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*state, *stacked]


def _whole(values: Sequence[Value]) -> list[Value]:
    """With both parts of what is complex: in every iteration and branch alike."""
    return [Parts(x.real, _imag_of(x)) if isinstance(x, Parts) else x for x in values]


_CONTROL: dict[str, Callable[[Step, list[Value]], list[Value]]] = {
    **dict.fromkeys(REMATERIALIZED, _rematerialized),
    COND: _branches,
    SCAN: _scan,
}


def _parts(x: Value) -> Value:
    return Parts(jnp.real(x), jnp.imag(x)) if is_complex(x) else x


def _joined(x: Value) -> Any:
    if not isinstance(x, Parts):
        return x
    return jax.lax.complex(x.real, _imag_of(x))


def _imag_of(x: Parts) -> jax.Array:
    return jnp.zeros_like(x.real) if x.imag is None else x.imag


def _both(x: Value) -> Parts:
    return x if isinstance(x, Parts) else Parts(x, None)


def _sum(a: Any, b: Any, sign: int = 1) -> Any:
    """a + sign b of parts that may not be there."""
    if b is None:
        return a
    if a is None:
        return b if sign > 0 else -b
    return a + b if sign > 0 else a - b


def _real_bind(step: Step, *operands: jax.Array) -> jax.Array:
    """The step on real operands; a complex dtype among its parameters becomes the real one."""
    params = {
        name: jnp.finfo(value).dtype if name in _DTYPES and value is not None and _is_complex_dtype(value) else value
        for name, value in step.eqn.params.items()
    }
    return step.eqn.primitive.bind(*operands, **params)


_DTYPES = ("preferred_element_type", "new_dtype", "input_dtype")


def _is_complex_dtype(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _make(step: Step, real: jax.Array, imag: jax.Array) -> Parts:
    return Parts(real, imag)


def _real(step: Step, x: Value) -> Any:
    return _both(x).real


def _imag(step: Step, x: Value) -> Any:
    return _imag_of(_both(x))


def _conj(step: Step, x: Value) -> Parts:
    x = _both(x)
    return Parts(x.real, None if x.imag is None else -x.imag)


def _add(step: Step, a: Value, b: Value) -> Parts:
    a, b = _both(a), _both(b)
    return Parts(a.real + b.real, _sum(a.imag, b.imag))


def _subtract(step: Step, a: Value, b: Value) -> Parts:
    a, b = _both(a), _both(b)
    return Parts(a.real - b.real, _sum(a.imag, b.imag, -1))


def _bilinear(step: Step, a: Value, b: Value) -> Parts:
    """Products of all kinds: elementwise, matrices, convolutions."""
    a, b = _both(a), _both(b)

    def product(x: Any, y: Any) -> Any:
        return None if x is None or y is None else _real_bind(step, x, y)

    real = _sum(product(a.real, b.real), product(a.imag, b.imag), -1)
    return Parts(real, _sum(product(a.real, b.imag), product(a.imag, b.real)))


def _by_part(step: Step, x: Value, *others: Any) -> Parts:
    """Linear functions of the first operand with real coefficients; other operands are indices."""
    x = _both(x)
    return Parts(_real_bind(step, x.real, *others), None if x.imag is None else _real_bind(step, x.imag, *others))


def _all_by_part(step: Step, *operands: Value) -> Parts:
    """Functions that join several operands without arithmetic."""
    parts = [_both(x) for x in operands]
    real = _real_bind(step, *(x.real for x in parts))
    if all(x.imag is None for x in parts):
        return Parts(real, None)
    return Parts(real, _real_bind(step, *map(_imag_of, parts)))


def _select(step: Step, which: Any, *cases: Value) -> Parts:
    parts = [_both(x) for x in cases]
    real = _real_bind(step, which, *(x.real for x in parts))
    if all(x.imag is None for x in parts):
        return Parts(real, None)
    return Parts(real, _real_bind(step, which, *map(_imag_of, parts)))


def _divide(step: Step, a: Value, b: Value) -> Parts:
    """By a real number part by part, by a complex one as the product with its inverse."""
    a, b = _both(a), _both(b)
    if b.imag is None:
        return Parts(a.real / b.real, None if a.imag is None else a.imag / b.real)
    inverse = 1 / _joined(b)
    real, imag = jnp.real(inverse), jnp.imag(inverse)
    if a.imag is None:
        return Parts(a.real * real, a.real * imag)
    return Parts(a.real * real - a.imag * imag, a.real * imag + a.imag * real)


def _pieces(step: Step, x: Value) -> list[Parts]:
    """Functions with several results that take an array apart."""
    x = _both(x)
    real = bind(step.eqn, [x.real])
    imag = [None] * len(real) if x.imag is None else bind(step.eqn, [x.imag])
    return [Parts(*pair) for pair in zip(real, imag, strict=True)]


def _barrier(step: Step, *operands: Value) -> list[Value]:
    return list(jax.lax.optimization_barrier(operands))


def _gather(step: Step, x: Value, *indices: Any) -> Parts:
    if step.eqn.params["fill_value"] is None:
        return _by_part(step, x, *indices)
    return _parts(*bind(step.eqn, [_joined(x), *indices]))


_RULES: dict[str, Callable[..., Any]] = {
    "complex": _make,
    "real": _real,
    "imag": _imag,
    "conj": _conj,
    "add": _add,
    "add_any": _add,
    "sub": _subtract,
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated"), _bilinear),
    **dict.fromkeys(
        """neg reshape broadcast_in_dim transpose squeeze slice rev reduce_sum cumsum copy copy_p expand_dims
        convert_element_type dynamic_slice sharding_constraint tile name""".split(),
        _by_part,
    ),
    **dict.fromkeys(("concatenate", "pad", "stack"), _all_by_part),
    "select_n": _select,
    "div": _divide,
    "gather": _gather,
    **dict.fromkeys(("split", "unstack"), _pieces),
    BARRIER: _barrier,
}
"""Primitive -> (step, operands) -> result, for what is linear in each complex operand."""
