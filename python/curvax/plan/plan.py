"""The plan: lane, parts, implementations, cost; and how it reads."""

from __future__ import annotations

import dataclasses

from curvax.curvature import Needs
from curvax.kernels._dispatch import Choice
from curvax.plan import drawing
from curvax.plan.assembly import PlanMode
from curvax.requirements import Cadence, Part, Requirement
from curvax.solvers import Lane, Solver
from curvax.work import Cost


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A solver that could serve the method, and what it is predicted to cost per step.

    Attributes:
      index: among the automatic solver's candidates.
      solver: the solver.
      cost: of the gradient and the solve.
      seconds: what these take on the machine that `curvax.plan.machine` knows.
      reason: the sizes that the cost follows from.
    """

    index: int
    solver: Solver
    cost: Cost
    seconds: float
    reason: str


@dataclasses.dataclass(frozen=True)
class PartCost:
    """Predicted work of one part, per time that it runs, and the rate at which it runs."""

    part: Part
    cost: Cost
    rate: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static answer to what one step does. Made before tracing; printed by `explain`.

    Attributes:
      lane: where the linear system lives; `None` while an automatic choice waits for the shapes of a batch.
      solver: the chosen solver, and its index among automatic candidates.
      needs: what the linearization of every step offers.
      requirements: parts with cadence and requester.
      refresh, evaluate, predict: cadences of the preconditioner's refresh, the loss after the step, the predicted
        decrease.
      refresh_apart: the refresh linearizes inside its own branch, so that its residuals live only there.
      refresh_needs: what that linearization offers.
      predict_apart: likewise for the predicted decrease.
      mode: shared or off.
      factors: multiples of lam that every step tries.
      choices: implementation of each op, with the reason.
      candidates: what an automatic choice chose from.
      costs: predicted work by part; empty without shapes.
      state_bytes: bytes of the state of solver, preconditioner and damping, by kind of module; empty without shapes.
      notes: facts learned while planning (custom_vjp, frozen leaves, fallbacks).
    """

    lane: Lane | None
    solver: Solver
    solver_index: int | None
    needs: Needs
    requirements: tuple[Requirement, ...]
    refresh: Cadence
    evaluate: Cadence
    predict: Cadence
    refresh_apart: bool
    refresh_needs: Needs
    predict_apart: bool
    mode: PlanMode
    modules: tuple[tuple[str, str], ...]
    factors: tuple[float, ...] = (1.0,)
    choices: tuple[Choice, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    costs: tuple[PartCost, ...] = ()
    state_bytes: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sharpness(self) -> Cadence:
        """The steps that measure the largest eigenvalue of the curvature."""
        periods = (period for r in self.requirements if r.part is Part.SHARPNESS for period in r.cadence.periods)
        return Cadence(tuple(periods))

    @property
    def cost(self) -> Cost:
        """Predicted work of an average step."""
        total = Cost()
        for part in self.costs:
            total = total + part.cost.times(part.rate)
        return total

    def explain(self) -> str:
        """The plan as text: lane, modules, parts with cadence, implementations, candidates, cost, notes."""
        sections = [
            self._header(),
            table("module", [f"{kind:<15}{name}" for kind, name in self.modules]),
            table("part", [_requirement_line(r) for r in self.requirements]),
            table("kernel", self._kernel_lines()),
            table("candidate", [self._candidate_line(c) for c in self.candidates]),
            table("cost", self._cost_lines()),
            table("note", list(self.notes)),
        ]
        return "\n".join(section for section in sections if section)

    def to_svg(self) -> str:
        """The plan as a drawing: parts over the first steps, their work, and what an automatic choice chose from.

        Returns:
          An SVG document, which a page or a notebook can show as it is. Costs, candidates and kernels are in it where
          the plan knows shapes (`method.plan_for(params, batch)`). It stands on a light ground of its own.
        """
        work = {p.part: p.cost.flops * p.rate for p in self.costs}
        asked = [(r.part, r.cadence, r.by) for r in self.requirements]
        total = self.cost
        averages = f"{flops_text(total.flops)} and {bytes_text(total.bytes)} moved in an average step, "
        subtitle = averages + f"{bytes_text(total.memory)} at the peak" if self.costs else "costs need shapes: plan_for"
        bands = [drawing.title(self._header(), subtitle), drawing.timeline(drawing.rows_of(asked, work, flops_text))]
        if self.candidates:
            entries = [
                drawing.Bar(c.solver.name, c.seconds, time_text(c.seconds), c.index == self.solver_index)
                for c in self.candidates
            ]
            bands.append(drawing.bars("solvers that could serve", "predicted time of gradient and solve", entries))
        if self.choices:
            kernels = [(c.op, c.implementation, c.reason) for c in self.choices]
            bands.append(drawing.table("kernels", kernels))
        return drawing.drawing(bands, self._header())

    def _repr_svg_(self) -> str:
        return self.to_svg()

    def _repr_html_(self) -> str:
        return drawing.page(self.to_svg(), self.explain())

    def _header(self) -> str:
        lane = self.lane.value if self.lane is not None else "chosen from the shapes of the first batch"
        sharing = "" if self.mode is PlanMode.SHARED else " (plan off: nothing shared, cadence work in every step)"
        return f"plan: lane {lane}, {self.solver.name}{sharing}"

    def _kernel_lines(self) -> list[str]:
        if self.costs and not self.choices:
            return ["none: this lane runs on plain JAX, whatever the backend"]
        return [f"{c.op:<24}{c.implementation:<11}{c.reason}" for c in self.choices]

    def _candidate_line(self, candidate: Candidate) -> str:
        mark = "->" if candidate.index == self.solver_index else "  "
        return (
            f"{mark} {candidate.solver.name:<58}{time_text(candidate.seconds):>10}"
            f"{flops_text(candidate.cost.flops):>12}"
            f"{bytes_text(candidate.cost.memory):>11}  {candidate.reason}"
        )

    def _cost_lines(self) -> list[str]:
        if not self.costs:
            return ["needs shapes: ask method.plan_for(params, batch)"]
        lines = [
            f"{p.part.value:<22}{_si(p.cost.flops, 'FLOP'):>12}{bytes_text(p.cost.bytes):>11} moved"
            f"{bytes_text(p.cost.memory):>11} alive  x {p.rate:.2f} per step"
            for p in self.costs
        ]
        total = self.cost
        return [
            *lines,
            f"{'step, on average':<22}{_si(total.flops, 'FLOP'):>12}{bytes_text(total.bytes):>11} moved"
            f"{bytes_text(total.memory):>11} peak",
        ]


def _requirement_line(requirement: Requirement) -> str:
    return f"{requirement.part.value:<22}{requirement.cadence!s:<26}{requirement.by}"


def table(title: str, lines: list[str]) -> str:
    """Lines under a title that stands beside the first; empty without lines."""
    if not lines:
        return ""
    return "\n".join(f"  {title if i == 0 else '':<11}{line}" for i, line in enumerate(lines))


def _si(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def time_text(seconds: float) -> str:
    """A number of seconds."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def flops_text(value: float) -> str:
    """A number of floating-point operations."""
    return _si(value, "FLOP")


def bytes_text(value: float) -> str:
    """A number of bytes."""
    return _si(value, "B")
