"""Compiling for an NVIDIA H200 that is not there.

JAX's CUDA plugin can compile for a device that is only described (`h200.txtpb`), without a driver. That proves that
code lowers and that XLA accepts it, and it shows the optimized program: which kernels it launches, how many per
iteration of a loop, how much memory it takes. It does not show values or time.
"""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# The plugin refuses to start where it finds no driver; read when it is initialized.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_TARGET = pathlib.Path(__file__).with_name("h200.txtpb")
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

# HLO operations that start something on the device; all others are part of one or only name its results.
_LAUNCHES = frozenset(
    "fusion custom-call copy sort convolution dot reduce scatter cholesky triangular-solve fft".split()
)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?(%\S+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE)
_HEADER = re.compile(r"^(ENTRY )?(%\S+) \(.*\{$", re.MULTILINE)
_TARGET_NAME = re.compile(r'custom_call_target="([^"]+)"')
_CALLED = {
    "call": re.compile(r"to_apply=(%[\w.\-]+)"),
    "while": re.compile(r"body=(%[\w.\-]+)"),
    "conditional": re.compile(r"(?:true_computation|false_computation)=(%[\w.\-]+)|branch_computations=\{([^}]*)\}"),
}


PLATFORM = "NVIDIA H200, described only"


def missing() -> str | None:
    """Why nothing can be compiled for the H200 here; None if it can."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} cannot compile for a CUDA device that is described only: use 0.11 or newer"
    if _plugin() is None:
        return "JAX's CUDA plugin is not installed: pip install 'jax[cuda13]'"
    return None


def thunks(function: Callable[..., Any], *args: Any) -> str:
    """What XLA's runtime does for `function` on one H200, an operation per line, nested ones indented.

    What stands inside a `kCommandBuffer` is recorded into a CUDA graph and started at once.

    Args:
      function: as for `compile_for_h200`.
      *args: as for `compile_for_h200`.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        _lower_for_h200(function, *args).compile(compiler_options=dump)
        (path,) = pathlib.Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        return path.read_text()


def compile_for_h200(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """Lowers and compiles `function` for one H200; skips the calling test where that cannot be done.

    Args:
      function: any traceable function; ops called in it see the platform "gpu" and the capability (9, 0).
      *args: pytrees of arrays, `jax.ShapeDtypeStruct`s or numbers.
    """
    return _lower_for_h200(function, *args).compile()


def _lower_for_h200(function: Callable[..., Any], *args: Any) -> jax.stages.Lowered:
    reason = missing()
    if reason is not None:
        import pytest  # here, so that benchmarks need no pytest

        pytest.skip(reason)
    mesh = h200_mesh()
    sharding = NamedSharding(mesh, PartitionSpec())

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        array = leaf if hasattr(leaf, "dtype") else jax.numpy.asarray(leaf)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*jax.tree.map(described, args))


@functools.cache
def h200_mesh() -> Mesh:
    """A mesh of one H200."""
    name = _plugin()
    if name is None:
        raise RuntimeError(str(missing()))
    jax.default_backend()  # first, or JAX would complain later of a plugin that is there already
    try:
        importlib.import_module(name).initialize()
    except Exception as error:  # JAX may have registered the plugin already.
        if "ALREADY_EXISTS" not in str(error):
            raise
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", topology="1x1x1", target_config=_TARGET.read_text()
    )
    return Mesh(np.array(topology.devices[:1]), ("x",))


def kernel_counts(compiled: jax.stages.Compiled) -> dict[str, collections.Counter[str]]:
    """What the entry computation ("ENTRY") and each loop body (its name in the HLO) launch, by kind.

    Kinds are HLO opcodes, for custom calls "custom-call:<target>". A loop body that runs inside another has its own
    entry and counts once in neither; of a conditional the branch with most launches counts.
    """
    computations, entry = _computations(_text(compiled))
    found = {"ENTRY": _launches(computations, entry)}
    for body in _loop_bodies(computations, entry):
        found[body] = _launches(computations, body)
    return found


def busiest_loop(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """What the loop body with most launches launches per iteration: in a step, one iteration of its solver."""
    bodies = [counts for name, counts in kernel_counts(compiled).items() if name != "ENTRY"]
    return max(bodies, key=lambda counts: counts.total(), default=collections.Counter())


def custom_calls(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """How often each custom call target stands in the program."""
    return collections.Counter(_TARGET_NAME.findall(_text(compiled)))


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory beyond arguments and results."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("this plugin does not say how much memory a program takes.")
    return memory.temp_size_in_bytes


def _plugin() -> str | None:
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    return next((name for name in _PLUGINS if importlib.util.find_spec(name) is not None), None)


def _text(compiled: jax.stages.Compiled) -> str:
    return compiled.as_text() or ""


_Instruction = tuple[str, str]


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Name -> its instructions as (opcode, rest of the line), and the entry's name."""
    headers = list(_HEADER.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    found, entry = {}, ""
    for header, end in zip(headers, ends, strict=True):
        lines = _INSTRUCTION.finditer(text, header.end(), end)
        found[header[2]] = [(line[2], line[3]) for line in lines]
        entry = header[2] if header[1] else entry
    return found, entry


def _called(opcode: str, rest: str) -> list[str]:
    if opcode not in _CALLED:
        return []
    groups = (group for match in _CALLED[opcode].finditer(rest) for group in match.groups() if group)
    return [name.strip() for group in groups for name in group.split(",")]


def _launches(computations: dict[str, list[_Instruction]], name: str) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    for opcode, rest in computations[name]:
        if opcode in _LAUNCHES:
            target = _TARGET_NAME.search(rest)
            counts[f"{opcode}:{target[1]}" if target else opcode] += 1
        elif opcode == "call":
            counts += _launches(computations, _called(opcode, rest)[0])
        elif opcode == "conditional":
            branches = [_launches(computations, branch) for branch in _called(opcode, rest)]
            counts += max(branches, key=lambda branch: branch.total())
    return counts


def _loop_bodies(computations: dict[str, list[_Instruction]], name: str) -> Iterator[str]:
    for opcode, rest in computations[name]:
        for called in _called(opcode, rest):
            if opcode == "while":
                yield called
            yield from _loop_bodies(computations, called)
