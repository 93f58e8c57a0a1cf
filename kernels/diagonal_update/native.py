"""diagonal_update through the XLA FFI handlers of csrc/cpu and csrc/cuda: one call for all leaves, in place.

Operands and results are flat. `diagonal_update` takes sound, a vector of scalars (`common/diagonal.h` lists them) and
the leaves of params, average, gradient and, if there is one, mean; it gives finite and the leaves of params, of mean
and of a copy of the old params. `diagonal_accumulate` takes its scalars and the leaves of average and of one or two
factors; it gives finite, scale and the leaves of average and of a copy of the old one. The copies are what a step that
is not finite is undone from; without results for them the handlers of the CPU look before they write. On a GPU a last
result is scratch memory, one byte or one float64 per block of a leaf, which XLA allocates so that the handlers allocate
nothing. Batch axes stand in front of everything, which is what `vmap_method="broadcast_all"` makes of a vmapped call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import ffi
from curvax.kernels import _native
from curvax.kernels._dispatch import Request
from curvax.kernels._vary import vary_alike
from curvax.kernels.diagonal_update import reference
from curvax.kernels.diagonal_update.rule import (
    AccumulateRule,
    DenominatorRule,
    DiagonalEstimate,
    UpdateRule,
    UpdateScalars,
)
from curvax.tree import PyTree, scalar_dtype, size

_WIDE = (np.dtype(np.float32), np.dtype(np.float64))
_NARROW = (np.dtype(jnp.bfloat16), np.dtype(np.float16))
# Copies up to this many bytes cost less than looking first (measured: a fifth more time against twice the time). Larger
# ones are memory that XLA asks the system for at every call, page by page, and then looking first takes half the time.
_COPY_BYTES = 2**25
_ESTIMATES = {"value": 0, "square": 1, "product": 2, "magnitude": 3}


def cannot(request: Request) -> str | None:
    """Why the handlers cannot run a request; None if they can."""
    if not request.shapes or any(dtype not in _WIDE + _NARROW for dtype in request.dtypes):
        actual = ", ".join(map(str, request.dtypes)) if request.shapes else "no leaves"
        return f"the native handlers take leaves of float64, float32, bfloat16 and float16, and these have {actual}"
    return _native.cannot(request)


def diagonal_update(
    rule: UpdateRule,
    scalars: UpdateScalars,
    params: PyTree,
    mean: PyTree | None,
    average: PyTree,
    gradient: PyTree,
    sound: jax.Array,
    decays: tuple[bool, ...],
    *,
    threads: int = 0,
) -> tuple[PyTree, PyTree | None, jax.Array]:
    """See `api.diagonal_update`. `threads`: 0 lets the handler decide; the result does not depend on it."""
    structure = jax.tree.structure(params)
    n = structure.num_leaves
    dtype = scalar_dtype(params)
    row = (
        *(rule.beta1, 1 - rule.beta1, scalars.mean_correction, scalars.correction),
        *(rule.denominator.slope, rule.denominator.power, scalars.offset, scalars.fallback),
        *(rule.clip, scalars.weight_decay, scalars.rate),
    )
    vector = jnp.stack([jnp.asarray(x, dtype) for x in row])
    leaves = jax.tree.leaves([params, average, gradient] + ([] if mean is None else [mean]))
    operands = vary_alike([sound, vector, *leaves])

    attributes: dict[str, Any] = {
        "denominator": np.int64(_denominator(rule.denominator)),
        "decays": np.asarray(decays, np.int64),
    }
    target = "curvax_diagonal_update"

    def handler(sound: jax.Array, vector: jax.Array, *flat: jax.Array, platform: ffi.Platform) -> list[jax.Array]:
        own, past = list(map(_like, flat[:n])), list(map(_like, flat[3 * n :]))
        results = [jax.ShapeDtypeStruct(sound.shape, np.dtype(bool)), *own, *past]
        aliases = {2 + i: 1 + i for i in range(n)} | {2 + 3 * n + i: 1 + n + i for i in range(len(past))}
        call = _Call(platform, target, (sound, vector, *flat), results, aliases, attributes)
        return call.on_cpu(_copies(own), threads) if platform == "cpu" else call.on_cuda(own, _scratch(own, 1))

    def fallback(sound: jax.Array, vector: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        traced = UpdateScalars(vector[2], vector[3], vector[6], vector[7], vector[9], vector[10])
        own, average, gradient = (list(flat[g * n : (g + 1) * n]) for g in range(3))
        past = list(flat[3 * n :]) if len(flat) > 3 * n else None
        new, mean, finite = reference.diagonal_update(rule, traced, own, past, average, gradient, sound, decays)
        return [finite, *new, *([] if mean is None else mean)]

    finite, *flat = _on_each_platform(handler, fallback, operands)
    new = jax.tree.unflatten(structure, flat[:n])
    return new, None if mean is None else jax.tree.unflatten(structure, flat[n:]), finite


def _denominator(rule: DenominatorRule) -> int:
    """The number of a rule in csrc/common/diagonal.h."""
    if rule.kind == "power":
        return {1.0: 1, 0.5: 2}.get(rule.power, 3)
    return 0 if rule.kind == "floor" else 4


def diagonal_accumulate(
    rule: AccumulateRule, average: PyTree, estimate: DiagonalEstimate, correction: jax.Array, *, threads: int = 0
) -> tuple[PyTree, jax.Array, jax.Array]:
    """See `api.diagonal_accumulate`. `threads`: 0 lets the handler decide; the result does not depend on it."""
    structure = jax.tree.structure(average)
    n = structure.num_leaves
    dtype = scalar_dtype(average)
    keep, gain = rule.beta2, 1 - rule.beta2
    if rule.root_mean_square:
        keep, gain = math.sqrt(keep), math.sqrt(gain)
    unit = correction.astype(dtype) / max(size(average), 1)
    vector = jnp.stack([jnp.asarray(keep, dtype), jnp.asarray(gain, dtype), unit])
    likes = jax.tree.leaves(average)
    factors = [
        _spreadable(factor.astype(like.dtype), like.shape)
        for tree in estimate.factors
        for factor, like in zip(jax.tree.leaves(tree), likes, strict=True)
    ]
    operands = vary_alike([vector, *likes, *factors])

    attributes: dict[str, Any] = {
        "estimate": np.int64(_ESTIMATES[estimate.kind]),
        "root_mean_square": np.bool_(rule.root_mean_square),
    }
    target = "curvax_diagonal_accumulate"

    def handler(vector: jax.Array, *flat: jax.Array, platform: ffi.Platform) -> list[jax.Array]:
        own = list(map(_like, flat[:n]))
        batch = vector.shape[:-1]
        results = [jax.ShapeDtypeStruct(batch, np.dtype(bool)), jax.ShapeDtypeStruct(batch, dtype), *own]
        aliases = {1 + i: 2 + i for i in range(n)}
        if platform == "cpu":
            return _Call(platform, target, (vector, *flat), results, aliases, attributes).on_cpu(_copies(own), threads)
        # The CUDA kernel reads block means written out.
        written = [jnp.broadcast_to(f, own[i % n].shape) for i, f in enumerate(flat)]
        call = _Call(platform, target, (vector, *written), results, aliases, attributes)
        return call.on_cuda(own, _scratch(own, 8))

    def fallback(vector: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        groups = [list(flat[g * n : (g + 1) * n]) for g in range(len(flat) // n)]
        whole = DiagonalEstimate(tuple(groups[1:]), estimate.kind)
        new, scale, finite = reference.diagonal_accumulate(rule, groups[0], whole, vector[2] * max(size(groups[0]), 1))
        return [finite, scale, *new]

    finite, scale, *flat = _on_each_platform(handler, fallback, operands)
    return jax.tree.unflatten(structure, flat), scale, finite


def _spreadable(factor: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The factor if the handler can lay it over `shape` (1 on some first and some last axes), else written out."""
    own = [axis for axis, d in enumerate(factor.shape) if d != 1]
    inner = range(own[0], own[-1] + 1) if own else range(0)
    if len(factor.shape) == len(shape) and all(factor.shape[axis] == shape[axis] for axis in inner):
        return factor
    return jnp.broadcast_to(factor, shape)


def _copies(own: list[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    """Results for copies of these leaves, or none if those were large."""
    return own if sum(leaf.size * leaf.dtype.itemsize for leaf in own) <= _COPY_BYTES else []


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _scratch(own: list[jax.ShapeDtypeStruct], count: int) -> jax.ShapeDtypeStruct:
    """So many bytes for each block of each leaf, as csrc/common/leaves.h cuts them."""
    block: int = ffi.native_status("cuda").build["block"]
    return jax.ShapeDtypeStruct((count * sum(-(-leaf.size // block) for leaf in own),), np.dtype(np.uint8))


def _on_each_platform(
    handler: Callable[..., list[jax.Array]], fallback: Callable[..., list[jax.Array]], operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """Calls what suits the platform that the computation is lowered for; the fallback where a module is absent."""
    return jax.lax.platform_dependent(
        *operands,
        cpu=partial(handler, platform="cpu") if ffi.native_status("cpu").available else fallback,
        cuda=partial(handler, platform="cuda") if ffi.native_status("cuda").available else fallback,
        default=fallback,
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """A foreign call, but for the results that only one of the platforms has."""

    platform: ffi.Platform
    target: str
    operands: tuple[jax.Array, ...]
    results: list[jax.ShapeDtypeStruct]
    aliases: dict[int, int]
    attributes: dict[str, Any]

    def on_cpu(self, copies: list[jax.ShapeDtypeStruct], threads: int) -> list[jax.Array]:
        return self._run(copies, {**self.attributes, "threads": np.int64(threads)})

    def on_cuda(self, copies: list[jax.ShapeDtypeStruct], scratch: jax.ShapeDtypeStruct) -> list[jax.Array]:
        return self._run([*copies, scratch], self.attributes)

    def _run(self, more: list[jax.ShapeDtypeStruct], attributes: dict[str, Any]) -> list[jax.Array]:
        ffi.require_native(self.platform)
        call = jax.ffi.ffi_call(
            self.target, [*self.results, *more], vmap_method="broadcast_all", input_output_aliases=self.aliases
        )
        return vary_alike(call(*self.operands, **attributes)[: len(self.results)], like=self.operands)
