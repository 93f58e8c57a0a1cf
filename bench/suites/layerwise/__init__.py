"""Steps, tokens and time to a target loss: full and layerwise Gauss-Newton against first- and second-order baselines.

The protocol of the paper (arXiv 2510.09378) on a byte-level transformer: all methods start from one short AdamW
checkpoint, see the same batches, and have their learning rate tuned over the same grid of factors around a customary
one on the first seed; the best rate then runs on all seeds. Tokens of the line search count as tokens of the step.
Costs are measured apart from the runs, method after method in turns; seconds to the target are steps times the cost of
a step.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.schema import Row
from bench.suites.layerwise import cost, head
from bench.suites.layerwise.contenders import ABLATIONS, contenders_in
from bench.suites.layerwise.setting import GLIMPSE, LARGEST, MAIN, PAPER, QUICK, SMALL, WIDER
from bench.suites.layerwise.study import SUITE as SUITE
from bench.suites.layerwise.study import Study, compare


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, setting by setting.

    Args:
      quick: a smoke run of about a minute: one rate, one seed, few steps, the methods that matter most.
      only: text in the case's name, such as "45M" for the paper's configuration on a GPU, "45M, 224" for a batch of
        minutes there, "ablations", or "head of".
    """
    yield from head.cases(SUITE, quick, only)
    for setting in (QUICK,) if quick else (PAPER, GLIMPSE) if "45M" in only else (MAIN, LARGEST, SMALL, WIDER):
        cases = {name: f"{setting.case}, {text}" for name, text in _CASES.items()}
        if not any(only in case for case in cases.values()):
            continue
        study, chosen = Study(setting), contenders_in(setting)
        if only in cases["inner"] and setting not in (SMALL, LARGEST, WIDER, GLIMPSE):  # minibatches are those of MAIN
            yield cost.inner_loops(study, cases["inner"])
        if only in cases["methods"]:
            yield cost.methods(study, cases["methods"], (*chosen, *(ABLATIONS if setting is MAIN else ())))
        if only in cases["runs"]:
            yield from compare(study, f"{cases['runs']} {setting.target:g}", chosen)
        if only in cases["ablations"] and setting is MAIN:
            yield from compare(study, f"{cases['ablations']} {setting.target:g}", ABLATIONS)


_CASES = {
    "inner": "cost of an inner loop",
    "methods": "cost of a step",
    "runs": "to test loss",
    "ablations": "ablations, to test loss",
}
