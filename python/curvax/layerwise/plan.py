"""The plan of a step with an inner loop: parts, blocks, kernels, and what layerwise costs beyond full Gauss-Newton."""

from __future__ import annotations

import dataclasses

import jax

from curvax import tree
from curvax.curvature import Evaluation
from curvax.kernels._dispatch import Choice
from curvax.layerwise.inner import InnerSolver
from curvax.layerwise.quadratic import InnerProblem
from curvax.layerwise.search import LineSearch
from curvax.plan import drawing
from curvax.plan.cost import Cost, trace
from curvax.plan.plan import bytes_text, flops_text, table
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class InnerLoopPlan:
    """The static answer to what one step does.

    Attributes:
      title: kind of step.
      parts: what runs in a step, in order, with how often.
      blocks: name and number of parameters of each block; empty without shapes.
      choices: implementation of each op, with the reason.
      plain: work of the plain gradient of one minibatch; `None` without shapes.
      full: work of the full problem's inner gradient.
      own: work of this method's inner gradient.
      search: work of the line search.
      inner_steps: minibatches in a step.
    """

    title: str
    parts: tuple[tuple[str, str], ...]
    blocks: tuple[tuple[str, int], ...] = ()
    choices: tuple[Choice, ...] = ()
    plain: Cost | None = None
    full: Cost | None = None
    own: Cost | None = None
    search: Cost | None = None
    inner_steps: int = 1

    @property
    def cost(self) -> Cost:
        """Predicted work of a step: inner gradients and line search; none without shapes."""
        inside = Cost() if self.own is None else self.own.times(self.inner_steps)
        return inside if self.search is None else inside + self.search

    @property
    def over_full(self) -> float | None:
        """Floating-point operations of an inner gradient over those of full Gauss-Newton's; `None` without shapes."""
        return None if self.own is None or self.full is None else self.own.flops / self.full.flops

    @property
    def over_plain(self) -> float | None:
        """Floating-point operations of an inner gradient over those of a plain gradient; `None` without shapes."""
        return None if self.own is None or self.plain is None else self.own.flops / self.plain.flops

    def explain(self) -> str:
        """The plan as text: parts, blocks, kernels, cost."""
        sections = [
            f"plan: lane inner loop, {self.title}",
            table("part", [f"{name:<22}{text}" for name, text in self.parts]),
            table("block", [f"{name:<22}{size} parameters" for name, size in self.blocks]),
            table("kernel", [f"{c.op:<24}{c.implementation:<11}{c.reason}" for c in self.choices]),
            table("cost", self._cost_lines()),
        ]
        return "\n".join(section for section in sections if section)

    def to_svg(self) -> str:
        """The plan as a drawing: parts, blocks by their parameters, work of an inner gradient; an SVG document."""
        bands = [
            drawing.title(f"plan: lane inner loop, {self.title}", "one linearization for each minibatch of a step"),
            drawing.table("parts, in the order of a step", [(name, "", text) for name, text in self.parts]),
        ]
        if self.blocks:
            sizes = [drawing.Bar(name, float(size), f"{size:,}") for name, size in self.blocks]
            bands.append(drawing.bars("blocks", "parameters", sizes))
        gradients = (("of the loss", self.plain), ("full Gauss-Newton", self.full), ("this method", self.own))
        work = [drawing.Bar(name, c.flops, flops_text(c.flops)) for name, c in gradients if c is not None]
        if work:
            bands.append(drawing.bars("gradient on one minibatch", "work", work))
        if self.choices:
            bands.append(drawing.table("kernels", [(c.op, c.implementation, c.reason) for c in self.choices]))
        return drawing.drawing(bands, self.title)

    def _repr_svg_(self) -> str:
        return self.to_svg()

    def _repr_html_(self) -> str:
        return drawing.page(self.to_svg(), self.explain())

    def _cost_lines(self) -> list[str]:
        if self.plain is None or self.full is None or self.own is None:
            return ["needs shapes: ask method.plan_for(params, batch)"]
        named = [("plain gradient", self.plain), ("full inner gradient", self.full)]
        if len(self.blocks) > 1:
            named.append(("blocks' inner gradient", self.own))
        lines = [
            f"{_cost_line(name, c)}  {c.flops / self.plain.flops:.2f} x plain, {c.flops / self.full.flops:.2f} x full"
            for name, c in named
        ]
        if self.search is not None:
            lines.append(_cost_line("line search", self.search))
        return [*lines, _cost_line("step, on average", self.cost)]


def _cost_line(name: str, cost: Cost) -> str:
    return f"{name:<24}{flops_text(cost.flops):>12}{bytes_text(cost.bytes):>11} moved"


def plan_without_shapes(
    problem: InnerProblem, inner: InnerSolver, inner_steps: int, search: LineSearch | None, warm_start: bool
) -> InnerLoopPlan:
    """What is known before a batch has been seen."""
    kind = "full Gauss-Newton" if problem.partition is None else f"layerwise Gauss-Newton ({problem.partition.name})"
    kind += f", {problem.shares} shares" if problem.shares > 1 else ""
    inside = "full loss on linearized outputs" if problem.prox_linear else problem.curvature.name
    times = f"x {inner_steps}, a minibatch each"
    parts = [("linearize", times)]
    if problem.head is not None:
        parts.append(("head", "loss and curvature of its logits by blocks of rows, never all logits"))
    parts += [("inner gradient", f"{times}: {inside}"), ("inner update", f"{inner.name}")]
    if search is not None:
        chunk = "all at once" if search.chunk is None else f"{search.chunk} at once"
        parts.append(
            (
                "line search",
                f"{search.candidates} step sizes and 0 on {search.minibatches} minibatches, {chunk}",
            )
        )
    start = "where the last inner loop ended" if warm_start else "the parameters"
    parts.append(("next inner loop", f"starts from {start}"))
    return InnerLoopPlan(f"{kind}, {inner_steps} inner steps", tuple(parts), inner_steps=inner_steps)


def plan_for_shapes(
    plan: InnerLoopPlan,
    problem: InnerProblem,
    search: LineSearch | None,
    params: PyTree,
    evaluation: Evaluation,
    choices: tuple[Choice, ...],
) -> InnerLoopPlan:
    """`plan` with blocks, kernels and costs."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    upcast = jax.eval_shape(tree.upcast, shapes)
    blocks = problem.blocks(shapes)
    sizes = [0] * blocks.count
    for leaf, owner in zip(jax.tree.leaves(shapes), blocks.of_leaf, strict=True):
        for one in (owner,) if isinstance(owner, int) else owner:
            sizes[one] += tree.size(leaf) // (1 if isinstance(owner, int) else len(owner))

    def inner(which: InnerProblem) -> Cost:
        return trace(lambda p, d, e: which.gradient(p, d, e)[:2], shapes, upcast, evaluation)

    whole = dataclasses.replace(problem, partition=None)
    full = inner(whole)
    searched = None
    if search is not None:
        searched = trace(problem.outputs.value, shapes, evaluation).times((search.candidates + 1) * search.minibatches)
    return dataclasses.replace(
        plan,
        blocks=tuple(zip(blocks.names, sizes, strict=True)),
        choices=choices,
        plain=trace(problem.outputs.gradient, shapes, evaluation),
        full=full,
        own=full if problem.partition is None else inner(problem),
        search=searched,
    )
