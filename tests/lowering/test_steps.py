"""Whole steps lower for CUDA on any jaxlib, and compile for an H200 where JAX's CUDA plugin is installed."""

from __future__ import annotations

import functools
import importlib.util
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from curvax import ffi
from curvax.kernels import Backend, Request, _mosaic
from tests.lowering import steps
from tests.lowering.h200 import busiest_loop, compile_for_h200, custom_calls, kernel_counts, missing, temp_bytes


@functools.cache
def compiled(preset: str, network: steps.Network, backend: Backend) -> jax.stages.Compiled:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ops without this backend fall back
        step, args = steps.step(preset, network, backend)
        return compile_for_h200(step, *args)


def needs(backend: Backend) -> None:
    if missing() is None and backend == "native" and not ffi.native_status("cuda").available:
        pytest.skip(ffi.native_status("cuda").reason)
    if backend == "pallas" and (reason := _mosaic.absent()) is not None:
        pytest.skip(reason)
    if backend == "triton" and importlib.util.find_spec("jax_triton") is None:
        pytest.skip("jax-triton is not installed: pip install 'curvax[triton]'")


@pytest.mark.parametrize("preset", steps.PRESETS)
def test_step_lowers_for_cuda(preset: str) -> None:
    step, args = steps.step(preset, steps.SMALL, "reference")
    lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",))
    assert "stablehlo.dot_general" in lowered.as_text()


@pytest.mark.parametrize("preset", steps.PRESETS)
def test_step_compiles_for_the_h200(preset: str) -> None:
    program = compiled(preset, steps.SMALL, "reference")
    assert kernel_counts(program)["ENTRY"].total() > 0
    assert 0 < temp_bytes(program) < 2**26
    assert not any("callback" in target for target in custom_calls(program))


@pytest.mark.parametrize("network", [steps.SMALL, steps.DEEP], ids=lambda n: n.name)
class TestConjugateGradients:
    def test_reference_launches_follow_the_layers(self, network: steps.Network) -> None:
        """The vector work is a few launches, however many leaves there are: what grows is the model's own product."""
        iteration = busiest_loop(compiled("sgn_ce", network, "reference"))
        product = busiest_loop(compile_for_h200(*_products(network)))
        assert iteration.total() <= 2.3 * product.total()

    def test_native_adds_three_calls(self, network: steps.Network) -> None:
        """One call each for inner products, update and direction, for any number of leaves."""
        needs("native")
        iteration = busiest_loop(compiled("sgn_ce", network, "native"))
        calls = {kind.split(":")[1]: n for kind, n in iteration.items() if ":curvax" in kind}
        assert calls == {"curvax_dots": 1, "curvax_cg_update": 1, "curvax_cg_direction": 1}
        assert iteration.total() <= busiest_loop(compiled("sgn_ce", network, "reference")).total()


def test_pallas_multiplies_with_the_softmax_hessian() -> None:
    needs("pallas")
    program = compiled("sgn_ce", steps.HEAD, "pallas")
    assert any(kind.startswith("custom-call:mosaic_gpu") for kind in busiest_loop(program))


def test_triton_makes_the_gram_matrix() -> None:
    """One launch per layer, in place of several and of their products in memory."""
    needs("triton")
    network = steps.SMALL
    program, reference = (compiled("egn_ce", network, backend) for backend in ("triton", "reference"))
    assert custom_calls(program)["triton_kernel_call_ffi"] == len(network.widths) - 1
    ours, theirs = (kernel_counts(p)["ENTRY"].total() for p in (program, reference))
    assert ours < theirs
    assert temp_bytes(program) <= temp_bytes(reference)


def test_ops_see_the_described_device() -> None:
    seen = []

    def function(x: jax.Array) -> jax.Array:
        seen.append(Request.of(x))
        return x + 1

    compile_for_h200(function, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert [(r.platform, r.capability, r.devices) for r in seen] == [("gpu", (9, 0), 1)]


HLO = """HloModule m

%inner (a: f32[4]) -> f32[4] {
  ROOT %f.1 = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused
}

%outer (b: (f32[4], s32[])) -> (f32[4], s32[]) {
  %c.1 = (f32[4]{0}, /*index=1*/s32[]) custom-call(%b), custom_call_target="curvax_dots"
  %w.1 = f32[4]{0} while(%c.1), condition=%test, body=%inner
  ROOT %t.1 = (f32[4]{0}, s32[]) tuple(%w.1, %i)
}

%small (d: f32[4]) -> f32[4] {
  ROOT %f.2 = f32[4]{0} copy(%d)
}

%large (e: f32[4]) -> f32[4] {
  %f.3 = f32[4]{0} fusion(%e), kind=kLoop, calls=%fused
  ROOT %f.4 = f32[4]{0} fusion(%f.3), kind=kLoop, calls=%fused
}

%graph (g: f32[4]) -> f32[4] {
  ROOT %f.5 = f32[4]{0} copy(%g)
}

ENTRY %main (x: f32[4], p: pred[]) -> f32[4] {
  %k = f32[4]{0} call(%x), to_apply=%graph
  %y = f32[4]{0} conditional(%p, %k, %k), true_computation=%small, false_computation=%large
  %z = (f32[4]{0}, s32[]) while(%y), condition=%test, body=%outer
  ROOT %r = f32[4]{0} get-tuple-element(%z), index=0
}
"""


def test_counting_looks_into_calls_branches_and_loops() -> None:
    """A loop within a loop has its own entry; of a conditional the branch with more launches counts."""
    program: Any = types.SimpleNamespace(as_text=lambda: HLO)
    assert kernel_counts(program) == {
        "ENTRY": {"copy": 1, "fusion": 2},
        "%outer": {"custom-call:curvax_dots": 1},
        "%inner": {"fusion": 1},
    }
    assert custom_calls(program) == {"curvax_dots": 1}


def _products(network: steps.Network) -> tuple:
    function, args = steps.products(network)
    return function, *args
