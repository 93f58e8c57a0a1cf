"""A process with eight devices that takes steps of methods on layouts, and compares with one device.

    python -m bench.suites.scale.worker "METHOD[: LAYOUT]" ...

Prints a line of JSON per layout.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bench.suites.scale import DIFFERENCE, GATHERS, MEMORY
from bench.suites.scale.methods import CLASSES, EXAMPLES, METHODS, PIECES, cross_entropy, problem

_STEPS, _MICROBATCH = 3, 8
P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what is split along its axes.

    Attributes:
      name: of the layout.
      axes: names and sizes.
      params: of each parameter.
      explicit: the type of the axes.
      microbatch: examples per piece, or `None` for the whole batch at once.
    """

    name: str
    axes: dict[str, int]
    params: dict[str, PartitionSpec]
    explicit: bool
    microbatch: int | None = None

    @property
    def title(self) -> str:
        """Layout, axis type, pieces."""
        pieces = "" if self.microbatch is None else f", pieces of {self.microbatch}"
        return f"{self.name}, {'explicit' if self.explicit else 'automatic'}{pieces}"

    def spread(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """Both on the mesh."""
        kind = AxisType.Explicit if self.explicit else AxisType.Auto
        names = tuple(self.axes)
        mesh = jax.make_mesh(tuple(self.axes.values()), names, axis_types=(kind,) * len(names))
        own = {name: jax.device_put(x, NamedSharding(mesh, self.params[name])) for name, x in params.items()}
        return own, jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)


def layouts(name: str) -> Iterator[Layout]:
    """Those that a method is tried on."""
    whole = {"w1": P(None, None), "b1": P(None), "w2": P(None, None)}
    fully = {"w1": P(None, "data"), "b1": P("data"), "w2": P("data", None)}
    tensor = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model", None)}
    both = {"w1": P(None, ("data", "model")), "b1": P("model"), "w2": P("model", "data")}
    flat, square = {"data": 8}, {"data": 4, "model": 2}
    yield Layout("data", flat, whole, explicit=True)
    yield Layout("FSDP", flat, fully, explicit=True)
    yield Layout("tensor", square, tensor, explicit=True)
    yield Layout("FSDP x tensor", square, both, explicit=True)
    yield Layout("FSDP x tensor", square, both, explicit=False)
    if name in PIECES:
        yield Layout("FSDP x tensor", square, both, explicit=True, microbatch=_MICROBATCH)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Where some steps lead.

    Attributes:
      params, state: after them.
      program: the compiled step.
      again: whether a step returns another sharding than it takes, so that JAX would compile it a second time.
    """

    params: Any
    state: Any
    program: Any
    again: bool


def steps(name: str, params: Any, batch: Any, microbatch: int | None = None) -> Steps:
    """A few steps of a method."""
    method = METHODS[name]() if microbatch is None else METHODS[name](microbatch_size=microbatch)
    step, state = _optimizer(method, params) if hasattr(method, "update") else _method(method, params, batch)
    program = jax.jit(step).lower(params, batch, state).compile()
    taken, again = jax.tree.map(lambda x: x.sharding, (params, state)), False
    for _ in range(_STEPS):
        results = program(params, batch, state)
        pairs = zip(jax.tree.leaves(results), jax.tree.leaves(taken), strict=True)
        again |= any(not x.sharding.is_equivalent_to(s, x.ndim) for x, s in pairs)
        params, state = jax.device_put(results, taken)
    return Steps(params, state, program, again)


Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def _method(method: Any, params: Any, batch: Any) -> tuple[Step, Any]:
    key = jax.random.key(1)
    return lambda p, b, s: method.step(p, b, s, key)[:2], method.init(params, batch=batch)


def _optimizer(tx: Any, params: Any) -> tuple[Step, Any]:
    def step(params: Any, batch: Any, state: Any) -> tuple[Any, Any]:
        gradient: Any = jax.grad(cross_entropy)
        if AxisType.Explicit in jax.typeof(params["w1"]).sharding.mesh.axis_types:
            own = jax.tree.map(lambda p: jax.typeof(p).sharding, params)
            gradient = jax.sharding.auto_axes(gradient, out_sharding=own)
        update, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, update), state

    return step, tx.init(params)


def compared(name: str, layout: Layout, alone: Steps) -> dict[str, str | float]:
    """The entry of a layout."""
    params, batch = layout.spread(*problem(name.endswith("mse_cg")))
    spread = steps(name, params, batch, layout.microbatch)
    pairs = zip(jax.tree.leaves(spread.params), jax.tree.leaves(alone.params), strict=True)
    differences = [
        float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(np.asarray(b)))) for a, b in pairs
    ]
    one, each = alone.program.memory_analysis(), spread.program.memory_analysis()
    kept = all(x.sharding.is_equivalent_to(params[k].sharding, x.ndim) for k, x in spread.params.items())
    return {
        "method": name,
        "layout": layout.title,
        DIFFERENCE: max(differences),
        GATHERS: len(list(whole_gathers(spread.program.as_text() or "", params))),
        MEMORY: each.temp_size_in_bytes,
        "bytes on one device": one.temp_size_in_bytes,
        "sharded as before": kept,
        "compiled again": spread.again,
    }


def whole_gathers(program: str, params: Any) -> Iterator[str]:
    """The all-gathers of a compiled program that make a vector of all parameters, or a Gram matrix, on every device."""
    least = min(sum(x.size for x in jax.tree.leaves(params)), (EXAMPLES * CLASSES) ** 2)
    for line in program.splitlines():
        found = re.search(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(-start)?\(", line)
        if found and math.prod(int(n) for n in found[1].split(",") if n) >= least:
            yield line


def main(*wanted: str) -> None:
    """Prints the entries of methods, each on the layouts whose titles begin with what stands behind its name."""
    jax.config.update("jax_enable_x64", True)
    for each in wanted:
        name, _, title = each.partition(": ")
        alone: dict[int | None, Steps] = {}
        for layout in layouts(name):
            if not layout.title.startswith(title):
                continue
            if layout.microbatch not in alone:
                alone[layout.microbatch] = steps(name, *problem(name.endswith("mse_cg")), layout.microbatch)
            print(json.dumps(compared(name, layout, alone[layout.microbatch])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
