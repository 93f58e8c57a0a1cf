"""The dispatcher: choice, fallback, warning, strictness and report, on ops made up for the purpose."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import (
    Choice,
    Op,
    Request,
    Unsupported,
    Variant,
    clear_report,
    report,
    resolve,
    select,
    strict_backend,
)

pytestmark = pytest.mark.fast

REQUEST = Request("cpu", 1, (np.dtype(np.float32),), ((3,), (4,)))


def big_only(request: Request) -> str | None:
    return None if request.size > 100 else f"{request.size} elements are too few"


def gpu_only(request: Request) -> str | None:
    return None if request.platform == "gpu" else f"it needs a GPU, and this is {request.platform}"


OP = Op(
    "demo",
    (
        Variant("pallas", cannot=gpu_only, gain="one kernel"),
        Variant("native", better_not=big_only, gain="one call"),
        Variant("reference"),
    ),
)


@pytest.fixture(autouse=True)
def empty_report() -> Iterator[None]:
    clear_report()
    yield
    clear_report()


def test_auto_takes_the_best_and_says_what_stood_in_the_way() -> None:
    choice = resolve(OP, "auto", REQUEST)
    assert choice.implementation == "reference"
    assert choice.reason == (
        "auto: always available (pallas: it needs a GPU, and this is cpu; native: 7 elements are too few)"
    )
    assert resolve(OP, "auto", Request("cpu", 1, REQUEST.dtypes, ((101,),))).implementation == "native"
    on_gpu = Request("gpu", 1, REQUEST.dtypes, ((3,),))
    assert resolve(OP, "auto", on_gpu) == Choice("demo", "pallas", "auto: one kernel")


def test_a_backend_that_can_run_is_taken_though_auto_would_not() -> None:
    assert resolve(OP, "native", REQUEST) == Choice("demo", "native", 'backend="native"')


def test_a_fallback_warns_once_and_gives_the_reason() -> None:
    with pytest.warns(
        UserWarning, match='backend="pallas": demo fell back: pallas cannot run demo: it needs a GPU'
    ) as caught:
        choice = resolve(OP, "pallas", REQUEST)
    # It points to who asked, not into curvax.
    assert [warning.filename for warning in caught] == [__file__]
    assert choice.implementation == "reference"
    assert "it needs a GPU" in choice.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(OP, "pallas", REQUEST) == choice
    with pytest.warns(UserWarning, match=r"no triton implementation \(it has pallas, native, reference\)"):
        resolve(OP, "triton", REQUEST)


def test_auto_and_reference_never_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(OP, "auto", REQUEST)
        assert resolve(OP, "reference", REQUEST).implementation == "reference"


def test_strict_backend_turns_fallbacks_into_errors() -> None:
    with strict_backend():
        with pytest.raises(Unsupported, match="it needs a GPU") as caught:
            resolve(OP, "pallas", REQUEST)
        assert caught.value.reason == str(caught.value)
        assert resolve(OP, "auto", REQUEST).implementation == "reference"
    with pytest.warns(UserWarning):
        resolve(OP, "pallas", REQUEST)


def test_a_named_implementation_never_falls_back() -> None:
    with pytest.raises(Unsupported, match="pallas cannot run demo"):
        select(OP, "pallas", REQUEST)
    with pytest.raises(Unsupported, match="has no triton implementation"):
        select(OP, "triton", REQUEST)
    assert report() == ()


def test_the_report_counts_op_calls() -> None:
    select(OP, None, REQUEST)
    select(OP, None, REQUEST)
    select(OP, "native", REQUEST)
    assert [(r.choice.implementation, r.count) for r in report()] == [("reference", 2), ("native", 1)]


def test_misspelled_names_are_named() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, reference, pallas, triton, native, got 'cuda'"):
        resolve(OP, "cuda", REQUEST)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"implementation must be None or one of .* got 'auto'"):
        select(OP, "auto", REQUEST)  # pyright: ignore[reportArgumentType]


def test_an_op_needs_its_reference_last() -> None:
    with pytest.raises(ValueError, match="reference last"):
        Op("bad", (Variant("reference"), Variant("native")))


def test_request_of_operands() -> None:
    tree = {"a": jnp.ones((2, 3)), "b": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}
    request = Request.of(tree, tree)
    assert request.sizes == (6, 4)
    assert request.size == 10
    assert request.dtypes == (np.dtype(jnp.bfloat16), np.dtype(np.float32))
    assert request.platform == jax.default_backend()


SEVERAL_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from curvax.kernels import Request, Unsupported, report
from curvax.kernels.tree_cg import dots
assert jax.device_count() == 2
assert Request.of().devices == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
v = jax.device_put(jnp.arange(10, dtype=jnp.float32), NamedSharding(mesh, P("data")))
assert float(jax.jit(lambda v: dots([(v, v)])[0])(v)) == 285
assert [r.choice.implementation for r in report()] == ["reference"]
assert "not partitioned" in report()[0].choice.reason
try:
    dots([(v, v)], implementation="native")
except Unsupported as error:
    assert "shard_map" in str(error)
else:
    raise AssertionError("native ran on two devices")
def local(v):
    return jax.lax.psum(dots([(v, v)], implementation="native")[0], "data")
sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P()))
assert float(sharded(v)) == 285
"""


def test_several_devices() -> None:
    """Outside shard_map the reference, which XLA partitions; inside, the native handlers on each shard."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SEVERAL_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
