"""Every equation that contains a jaxpr, through everything that reads jaxprs: nobody has a list of calls of their own.

The same layer, tanh(x w), stands inside each primitive that a jaxpr may be inside of. JAX has renamed such primitives
before (`pjit` is `jit` now, `remat` is `checkpoint`), and names that the installed JAX has given up are made here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Jaxpr, Primitive
from jax.sharding import PartitionSpec

from curvax.jaxprs import (
    CALLS,
    COND,
    CUSTOM,
    LINEAR_SOLVE,
    REMATERIALIZED,
    SCAN,
    SHARDED,
    WHILE,
    Program,
    Wanted,
    contains,
    equations_of,
    evaluate,
    program_of,
    subjaxprs,
)
from curvax.layerwise.block_maps import Tangents, block_jvp
from curvax.layerwise.blocks import ParameterBlocks
from curvax.live import live_part
from curvax.loops import for_loop_body
from curvax.plan.cost import trace
from curvax.structure import examples_independent, report
from curvax.structure.additive import additive_axes
from curvax.structure.positions import LossWeights
from curvax.structure.replay import traced_program

Layer = Callable[[jax.Array, jax.Array], jax.Array]
Wrap = Callable[[Layer, jax.Array, jax.Array], jax.Array]

# Their jaxprs say how two numbers are combined, and are no part of the program.
COMBINING = frozenset(
    """reduce reduce_window scatter scatter-add scatter_add scatter-mul scatter_mul scatter-min scatter_min scatter-max
    scatter_max scatter-sub scatter_sub reduce_and reduce_or""".split()
)


def _made(name: str, parameter: str, closed: bool) -> Wrap:
    """A call by a primitive of this name, whose parameter of that name is the jaxpr."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *_, **params: params["out"])

    def wrap(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
        jaxpr = jax.make_jaxpr(layer)(w, x)
        inner = {parameter: jaxpr if closed else jaxpr.jaxpr}
        return primitive.bind(w, x, **inner, out=tuple(jaxpr.out_avals))[0]

    return wrap


def _custom_jvp(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    function = jax.custom_jvp(layer)
    function.defjvp(lambda primals, tangents: jax.jvp(layer, primals, tangents))
    return function(w, x)


def _custom_vjp(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    function = jax.custom_vjp(layer)
    function.defvjp(lambda w, x: jax.vjp(layer, w, x), lambda pull, u: pull(u))
    return function(w, x)


def _scan(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, _: (layer(w, h), None), x, length=2)[0]


def _while(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, layer(w, c[1])), (0, x))[1]


def _cond(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(w) > 0, layer, lambda w, x: 2.0 * layer(w, x), w, x)


def _linear_solve(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.custom_linear_solve(lambda y: 2.0 * y, x, lambda _, b: layer(w, b) / 2.0, symmetric=True)


def _shard_map(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "i")
    spec = PartitionSpec()
    return jax.shard_map(layer, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(w, x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A primitive.

    Attributes:
      name: of the primitive, as JAX has it.
      wrap: a layer inside it.
      rule: how w enters the model.
      followed: whether values are followed into it.
      times: how often the layer is evaluated, for its cost.
      evaluated: whether the installed JAX evaluates it.
    """

    name: str
    wrap: Wrap
    rule: str = "dense"
    followed: bool = True
    times: int = 1

    def __str__(self) -> str:
        return self.name

    evaluated: bool = True


def _renamed(names: frozenset[str], wrap: Wrap, parameter: str, closed: bool) -> Iterator[Case]:
    """The installed JAX's primitive under the name that it has, and the others as they were."""
    (eqn,) = jax.make_jaxpr(lambda w, x: wrap(jnp.matmul, w, x))(jnp.ones((2, 2)), jnp.ones((2, 2))).jaxpr.eqns
    assert eqn.primitive.name in names, f"a new name for curvax/jaxprs/calls.py: {eqn.primitive.name}"
    for name in sorted(names):
        if name == eqn.primitive.name:
            yield Case(name, wrap)
        else:
            yield Case(name, _made(name, parameter, closed), evaluated=False)


CASES = (
    *_renamed(frozenset({"jit", "pjit"}), lambda layer, w, x: jax.jit(layer)(w, x), "jaxpr", closed=True),
    *_renamed(REMATERIALIZED, lambda layer, w, x: jax.checkpoint(layer)(w, x), "jaxpr", closed=False),
    Case("closed_call", _made("closed_call", "call_jaxpr", closed=True), evaluated=False),
    Case("core_call", _made("core_call", "call_jaxpr", closed=False), evaluated=False),
    Case("custom_jvp_call", _custom_jvp, rule="explicit rows"),
    Case("custom_vjp_call", _custom_vjp, rule="explicit rows"),
    Case(SCAN, _scan, times=2),
    Case(WHILE, _while, rule="explicit rows"),
    Case(COND, _cond),
    Case(LINEAR_SOLVE, _linear_solve, rule="explicit rows"),
    Case("shard_map", _shard_map, rule="explicit rows", followed=False),
)
LISTED = CALLS | REMATERIALIZED | CUSTOM | SHARDED | {SCAN, WHILE, COND, LINEAR_SOLVE}

W = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)


def _layer(w: jax.Array, x: jax.Array) -> jax.Array:
    jnp.sin(x)  # dead
    return jnp.tanh(x @ w)


def _names(program: Program) -> Iterator[str]:
    for step in program.steps:
        yield step.primitive
        for body in step.bodies:
            yield from _names(body)


def _primitives(jaxpr: Jaxpr) -> Iterator[tuple[str, bool]]:
    """(name, whether it contains a jaxpr) of every equation."""
    for eqn in jaxpr.eqns:
        inner = list(subjaxprs(eqn.params))
        yield eqn.primitive.name, bool(inner)
        for one in inner:
            yield from _primitives(one)


def test_there_is_a_case_for_every_listed_primitive() -> None:
    assert {case.name for case in CASES} == LISTED


def _everything(w: jax.Array, x: jax.Array) -> list[Any]:
    """All that JAX's public functions put around a function."""
    vector, pair = x[:, 0], (w, x)
    transformed = [
        jax.vmap(lambda r: _cond(_layer, w, r))(x),
        jax.grad(lambda w: jnp.sum(_scan(_layer, w, x)))(w),
        jax.grad(lambda w: jnp.sum(jax.checkpoint(_layer)(w, x)))(w),
        jax.linearize(jax.checkpoint(_layer), w, x)[1](w, x),
        jax.jvp(lambda w: _while(_layer, w, x), (w,), (w,))[1],
        jax.jvp(lambda w: jnp.linalg.solve(w, x.T), (w,), (w,))[1],
        jax.named_call(_layer, name="layer")(w, x),
        jax.closure_convert(lambda x: _layer(w, x), x)[0](x, *jax.closure_convert(lambda x: _layer(w, x), x)[1]),
        lax.switch(jnp.argmax(vector) % 3, [_layer] * 3, *pair),
        lax.fori_loop(0, 3, lambda i, y: _layer(w, y), x),
        lax.map(lambda r: _layer(w, r), x),
        lax.associative_scan(jnp.multiply, x),
        lax.custom_root(lambda y: y**3 - vector, vector, lambda f, y: y, lambda g, y: y / g(jnp.ones_like(y))),
        lax.linalg.cholesky(w @ w.T + jnp.eye(3, dtype=w.dtype)),
    ]
    libraries = [
        jnp.linalg.solve(w, w),
        jnp.linalg.svd(w),
        jnp.linalg.qr(w),
        jnp.sort(x),
        jnp.searchsorted(vector, vector),
        jnp.interp(vector, vector, vector),
        x.at[0].add(1.0),
        x.at[:, jnp.asarray([0, 1])].mul(2.0),
        lax.reduce(x, jnp.float32(1.0), lambda a, b: a * b + 0.0, (0,)),
        lax.reduce_window(x, jnp.float32(0.0), lax.add, (2, 1), (1, 1), "SAME"),
        jax.random.normal(jax.random.key(0), (3,)),
        jax.random.permutation(jax.random.key(0), 5),
        jax.nn.softmax(x),
        jax.nn.relu(x),
        jax.nn.logsumexp(x),
        jax.scipy.special.gammaln(jnp.abs(x)),
        jax.scipy.sparse.linalg.cg(lambda v: 2.0 * v, vector)[0],
    ]
    return [*transformed, *libraries, *(case.wrap(_layer, w, x) for case in CASES if case.evaluated)]


def test_every_primitive_that_contains_a_jaxpr_is_listed() -> None:
    """A new or renamed one is red here, and is to be added to `curvax/jaxprs/calls.py`."""
    found = set(_primitives(jax.make_jaxpr(_everything)(W, X).jaxpr))
    containing = {name for name, inner in found if inner}
    assert containing <= LISTED | COMBINING, containing - LISTED - COMBINING
    assert {case.name for case in CASES if case.evaluated} <= containing


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryCall:
    """One primitive after another."""

    def model(self, case: Case) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda w, x: case.wrap(_layer, w, x)

    def test_the_case_is_what_it_says(self, case: Case) -> None:
        assert contains(jax.make_jaxpr(self.model(case))(W, X), frozenset({case.name}))

    def test_plain_calls_are_gone_and_others_have_bodies(self, case: Case) -> None:
        program = program_of(jax.make_jaxpr(self.model(case))(W, X))
        names = list(_names(program))
        assert not set(names) & CALLS and (case.name in names) == (case.name not in CALLS)
        assert ("tanh" in names) == case.followed

    def test_an_evaluation_is_the_functions(self, case: Case) -> None:
        if not (case.evaluated or case.name in CALLS):
            pytest.skip("this JAX has no such primitive, so nobody evaluates it as a whole.")
        jaxpr, want = jax.make_jaxpr(self.model(case))(W, X), self.model(dataclasses.replace(case, wrap=_inside(case)))
        np.testing.assert_allclose(evaluate(program_of(jaxpr), [W, X])[0], want(W, X), rtol=1e-6)
        if case.evaluated:
            np.testing.assert_allclose(evaluate(equations_of(jaxpr), [W, X])[0], want(W, X), rtol=1e-6)

    def test_what_is_dead_inside_is_seen(self, case: Case) -> None:
        live = live_part(jax.make_jaxpr(self.model(case))(W, X), [True, False])
        assert "sin" not in set(_names(live))
        assert live.wanted == (Wanted.DERIVATIVE, Wanted.VALUE)

    def test_the_leaf_is_recognized(self, case: Case) -> None:
        (leaf,) = report(self.model(case), W, X)
        assert leaf.rule == case.rule, leaf

    def test_the_examples_are_followed(self, case: Case) -> None:
        independent, reason = examples_independent(self.model(case), W, X)
        assert independent == case.followed, reason
        assert not examples_independent(lambda w, x: case.wrap(lambda w, x: _layer(w, x - x.mean(0)), w, x), W, X)[0]

    def test_a_loss_adds_up_over_them(self, case: Case) -> None:
        def loss(w: jax.Array, x: jax.Array) -> list[jax.Array]:
            return [jnp.mean(jnp.sum(self.model(case)(w, x), 1))]

        axes = additive_axes(loss, W, X, None, lambda count: (count // 2,), True)
        # Nobody has shown that what solves a system is linear in its constants.
        assert bool(axes.refused) == (not case.followed or case.name == LINEAR_SOLVE), axes.refused

    def test_positions_are_followed_back(self, case: Case) -> None:
        x = jnp.zeros((1, 4, 3))
        program = traced_program(self.model(case), W, x)
        reach = LossWeights(jnp.ones((1, 4)), 3, 2).reach_in(program).arguments[-1]
        apart = reach.first.ravel().tolist() == reach.last.ravel().tolist() == [0, 1, 2, 3]
        assert apart == (case.followed and case.name not in (WHILE, LINEAR_SOLVE))

    def test_its_work_is_counted(self, case: Case) -> None:
        product = 2 * X.shape[0] * W.size
        assert product * case.times <= trace(self.model(case), W, X).flops < product * (case.times + 1)

    def test_convolutions_inside_are_brought_into_one_layout(self, case: Case) -> None:
        def convolve(k: jax.Array, x: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"))

        k, x = jnp.ones((2, 2, 3)), jnp.ones((1, 2, 5))
        fit = for_loop_body(lambda k, x: case.wrap(convolve, k, x))
        if case.name in CALLS:
            text = str(jax.make_jaxpr(fit)(k, x))
            assert text.count("conv_general_dilated") == 1 and "lhs_spec=(0, 2, 1)" in text

    def test_products_inside_contract_one_axis(self, case: Case) -> None:
        def contract(d: jax.Array, h: jax.Array) -> jax.Array:
            return lax.dot_general(d, h, (((2, 3), (1, 2)), ((0,), (0,))))

        rng = np.random.default_rng(0)
        d, h = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 5, 3, 4), (2, 3, 4, 6)))
        fit = for_loop_body(lambda d, h: case.wrap(contract, d, h))
        if case.name in CALLS:
            text = str(jax.make_jaxpr(fit)(d, h))
            assert text.count("dot_general") == 1 and "(([2], [1]), ([0], [0]))" in text
            np.testing.assert_allclose(fit(d, h), jnp.einsum("bmtu,btun->bmn", d, h), rtol=1e-5, atol=1e-5)

    def test_tangents_arrive_block_by_block(self, case: Case) -> None:
        if case.name not in CALLS:
            pytest.skip("a linear map contains plain calls only.")
        shapes = {"a": W, "b": W, "c": W}

        def jvp(v: dict[str, jax.Array]) -> jax.Array:
            return case.wrap(lambda a, b: a + 2.0 * a.T + b, v["a"], v["b"])

        blocks = ParameterBlocks(("a", "b", "c"), (0, 1, 2))
        reached = block_jvp(jvp, shapes, blocks, (0, 1, 2))(shapes)
        assert isinstance(reached, Tangents) and reached.blocks == (0, 1)


def _inside(case: Case) -> Wrap:
    """What the case computes, without a primitive that the installed JAX lacks."""
    return case.wrap if case.evaluated else lambda layer, w, x: layer(w, x)
