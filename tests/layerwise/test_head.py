"""With head=, every number is that of the same method on a model that returns logits, and all logits never exist."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax.curvature import Evaluation
from curvax.layerwise import ByGroup, ByLeaf, ConjugateGradients, LineSearch, full_gn, layerwise_gn
from curvax.losses import SigmoidBinaryCrossEntropy, SoftmaxCrossEntropy
from curvax.solvers import CG
from tests.oracle.compiling import quick_jit

VOCABULARY, WIDTH, LENGTH, EXAMPLES = 11, 4, 3, 5


@functools.partial(quick_jit, static_argnums=0)
def params(dtype: Any = jnp.float64) -> dict[str, Any]:
    k = jax.random.split(jax.random.key(0), 6)

    def layer(key: jax.Array) -> dict[str, jax.Array]:
        return {"w": 0.5 * jax.random.normal(key, (WIDTH, WIDTH), dtype), "b": jnp.full(WIDTH, 0.1, dtype)}

    return {
        "embed": jax.random.normal(k[0], (VOCABULARY, WIDTH), dtype),
        "layers": [layer(k[1]), layer(k[2])],
        "head": {
            "norm": jnp.ones(WIDTH, dtype),
            "w": jax.random.normal(k[3], (WIDTH, VOCABULARY), dtype),
            "bias": 0.1 * jax.random.normal(k[4], (VOCABULARY,), dtype),
        },
    }


def hidden(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x = x + jnp.tanh(jnp.cumsum(x, axis=1) @ layer["w"] + layer["b"])
    return x * p["head"]["norm"]


HEADS = {
    "matrix": lambda p: p["head"]["w"],
    "bias": lambda p: (p["head"]["w"], p["head"]["bias"]),
    "tied": lambda p: p["embed"].T,
}


def logits_of(head: Any) -> Any:
    def predict(p: Any, tokens: jax.Array) -> jax.Array:
        found = head(p)
        matrix, bias = found if isinstance(found, tuple) else (found, 0.0)
        return hidden(p, tokens) @ matrix + bias

    return predict


@functools.partial(quick_jit, static_argnums=(0, 1))
def batch(parts: int, dtype: Any = jnp.float64) -> dict[str, jax.Array]:
    k = jax.random.split(jax.random.key(7), 3)
    shape = (parts * EXAMPLES, LENGTH)
    mask = jax.random.bernoulli(k[2], 0.7, shape)
    labels = jax.random.randint(k[1], shape, 0, VOCABULARY)
    return {
        "x": jax.random.randint(k[0], shape, 0, VOCABULARY),
        "y": jnp.where(mask, labels, -100),
        "w": jnp.where(mask, 1.5, 0.0).astype(dtype),
    }


def pair(rule: Any = None, head: Any = HEADS["matrix"], **options: Any) -> tuple[Any, Any]:
    """The method with logits from predict_fn, and with a head."""
    options = {
        "loss": SoftmaxCrossEntropy(),
        "inner": optax.sgd(0.3, momentum=0.5),
        "inner_steps": 2,
        "weight_key": "w",
        "line_search": LineSearch(candidates=2, minibatches=2),
        **options,
    }
    make = full_gn if rule is None else layerwise_gn
    rules = {} if rule is None else {"partition": rule}
    plain = make(predict_fn=logits_of(head), **rules, **options)
    return plain, make(predict_fn=hidden, head=head, **rules, **options)


def same(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


LAYERS = ByGroup(split=("layers",))
# What each problem has that the others have not.
PROBLEMS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, tied, prox-linear": {"head": HEADS["tied"], "prox_linear": True},
    "full, bias, microbatches": {"head": HEADS["bias"], "microbatch_size": 2},
    "layers, microbatches": {"rule": LAYERS, "microbatch_size": 2},
    "layers, tied, prox-linear": {"rule": LAYERS, "head": HEADS["tied"], "prox_linear": True},
    "layers, prox-linear, shares": {"rule": LAYERS, "prox_linear": True, "shares": 2},
    "leaves, bias, shares": {"rule": ByLeaf(), "head": HEADS["bias"], "shares": 2},
    "layers, frozen, smoothed": {
        "rule": LAYERS,
        "frozen": {"embed": False, "layers": False, "head": True},
        "loss": SoftmaxCrossEntropy(0.1, reduction="sum"),
    },
}


@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS)
def test_inner_problems_are_those_with_logits(case: dict[str, Any], x64: None) -> None:
    """Loss, gradient of the inner problem, plain gradient, product."""
    methods = pair(**case)
    trainable, frozen = methods[0].problem.curvature.partition.split(params())
    delta = jax.tree.map(lambda x: 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trainable)

    @quick_jit
    def compute(delta: Any, data: Any) -> list[Any]:
        found = []
        for method in methods:
            problem, evaluation = method.problem, Evaluation(data, frozen)
            problem.outputs.check(trainable, evaluation)
            loss, gradient, _ = problem.gradient(trainable, delta, evaluation)
            found.append([loss, gradient, problem.outputs.gradient(trainable, evaluation)])
            if problem.microbatch_size is None:
                at = problem.linearize(trainable, evaluation)
                found[-1] += [at.loss, at.start(), at.product(delta)]
        return found

    want, got = compute(delta, batch(1))
    same(got, want)


def test_steps_are_those_with_logits(x64: None) -> None:
    plain, headed = pair(LAYERS, clip_norm=0.1)
    p, data = params(), batch(plain.parts)
    want, got = (quick_jit(m.step)(p, data, m.init(p)) for m in (plain, headed))
    assert bool(got[2]["accepted"]) and float(got[2]["step_size"]) > 0
    same((got[0], got[1].offset, got[2]), (want[0], want[1].offset, want[2]))


def test_conjugate_gradients_in_the_streaming_form(x64: None) -> None:
    solver = ConjugateGradients(CG(tol=1e-13, maxiter=60), lam=0.1)
    methods = pair(None, HEADS["tied"], inner=solver, inner_steps=1)
    p = params()

    @quick_jit
    def compute(data: Any) -> Any:
        return [m.accumulate(m.start(p, m.init(p)), data).progress.delta for m in methods]

    want, got = compute(batch(1))
    same(got, want, 1e-8)


def test_model_state_key_and_aux_pass_through() -> None:
    def stateful(p: Any, x: jax.Array, calls: jax.Array, rng: jax.Array) -> Any:
        out = hidden(p, x)
        return out * jax.random.bernoulli(rng, 0.5, out.shape).astype(out.dtype), calls + 1, x

    head = HEADS["matrix"]
    method = full_gn(
        predict_fn=stateful, head=head, loss=SoftmaxCrossEntropy(), inner=optax.sgd(0.1), inner_steps=2,
        line_search=None, has_state=True, has_aux=True, has_rng=True, weight_key="w",
    )  # fmt: skip
    p, data = params(jnp.bfloat16), batch(2, jnp.float32)
    state = method.init(p, model_state=jnp.zeros((), jnp.int32))
    step = quick_jit(method.step)
    after, state, info = step(p, data, state, jax.random.key(0))
    assert int(state.model_state) == 2 and bool(info["finite"])
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    other = step(p, data, method.init(p, model_state=jnp.zeros((), jnp.int32)), jax.random.key(1))[0]
    assert not np.array_equal(after["head"]["w"], other["head"]["w"])


def test_bfloat16_stays_near_float32() -> None:
    methods = pair()
    p, data = params(jnp.float32), batch(1, jnp.float32)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    delta = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), p)

    @quick_jit
    def compute(delta: Any) -> Any:
        return [m.problem.gradient(at, delta, Evaluation(data))[1] for m, at in ((methods[1], narrow), (methods[0], p))]

    got, want = compute(delta)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b)) < 0.05 * float(jnp.linalg.norm(b)) + 1e-3


def test_the_plan_shows_the_ops_of_the_head_and_its_work() -> None:
    plain, headed = pair(LAYERS, backend="reference")
    p, data = params(jnp.float32), batch(plain.parts, jnp.float32)
    plan = headed.plan_for(p, data)
    assert [(c.op, c.implementation) for c in plan.choices] == [
        ("linear_softmax_residual", "reference"), ("linear_softmax_hvp", "reference"),
    ]  # fmt: skip
    text = plan.explain()
    assert "never all logits" in text and 'backend="reference"' in text
    width, vocabulary = 64, 4096
    big = {
        "embed": jnp.zeros((vocabulary, width)),
        "layers": [{"w": jnp.zeros((width, width)), "b": jnp.zeros(width)}] * 2,
        "head": {"norm": jnp.ones(width), "w": jnp.zeros((width, vocabulary)), "bias": jnp.zeros(vocabulary)},
    }
    full, headed = pair()
    ratio = []
    for method in (full, headed):
        found = method.plan_for(big, batch(method.parts, jnp.float32))
        assert found.own is not None and found.plain is not None
        ratio.append((found.own.flops, found.plain.flops))
    # As many operations as with logits: the pass that makes the slope makes the loss too.
    np.testing.assert_allclose(ratio[1], ratio[0], rtol=0.1)


@pytest.mark.parametrize("rule", [None, LAYERS], ids=["full", "layers"])
def test_all_logits_never_exist(rule: Any) -> None:
    vocabulary, width, length, examples = 20_000, 8, 256, 256
    shapes = {
        "embed": (vocabulary, width),
        "layers": [{"w": (width, width), "b": (width,)}] * 2,
        "head": {"norm": (width,), "w": (width, vocabulary), "bias": (vocabulary,)},
    }
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    tokens = jax.ShapeDtypeStruct((2 * examples, length), jnp.int32)
    method = pair(rule, inner_steps=1, line_search=LineSearch(1, chunk=1), weight_key=None)[1]
    state = jax.eval_shape(method.init, like)
    compiled = quick_jit(method.step).lower(like, {"x": tokens, "y": tokens}, state).compile()
    found = compiled.memory_analysis()
    assert found is not None
    # One array of logits is 5.2 GB, and a step with logits holds several.
    assert found.temp_size_in_bytes < examples * length * vocabulary * 4 / 6


def test_errors() -> None:
    p, data = params(jnp.float32), batch(1, jnp.float32)

    def run(head: Any, batch: Any = data, **options: Any) -> None:
        options = {"loss": SoftmaxCrossEntropy(), "predict_fn": hidden, **options}
        method = full_gn(head=head, inner=optax.sgd(0.1), inner_steps=1, line_search=None, weight_key="w", **options)
        method.step(p, batch, method.init(p))

    with pytest.raises(TypeError, match="head= goes with SoftmaxCrossEntropy, and the loss is SigmoidBinary"):
        run(HEADS["matrix"], loss=SigmoidBinaryCrossEntropy())
    with pytest.raises(TypeError, match="head must be a function of the parameters"):
        run(p["embed"].T)
    with pytest.raises(ValueError, match=r"head\(params\) is float32\(11, 4\) and the hidden states float32\(5, 3"):
        run(lambda p: p["embed"])
    with pytest.raises(ValueError, match=r"head\(params\) is bfloat16\(4, 11\) and the hidden states float32"):
        run(lambda p: p["embed"].T.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"the head's bias is float32\(4,\) and its matrix float32\(4, 11\)"):
        run(lambda p: (p["embed"].T, p["head"]["norm"]))
    with pytest.raises(TypeError, match=r"head\(params\) returned a dict: return one floating-point matrix"):
        run(lambda p: p["head"])
    with pytest.raises(ValueError, match=r"with head= the targets are integer labels, and these are rows"):
        run(HEADS["matrix"], {**data, "y": jnp.ones((EXAMPLES, LENGTH, VOCABULARY))})
    with pytest.raises(ValueError, match=r"the labels have shape \(5, 2\) with logits of shape \(5, 3, 11\)"):
        run(HEADS["matrix"], {**data, "y": data["y"][:, :2]})
