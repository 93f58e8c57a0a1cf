"""Steps, tokens and time to a target loss: full and layerwise Gauss-Newton against first- and second-order baselines.

The protocol of the paper (arXiv 2510.09378) on a byte-level transformer: all methods start from one short AdamW
checkpoint, see the same batches, and have their learning rate tuned over the same grid of factors around a customary
one on the first seed; the best rate then runs on all seeds. Tokens of the line search count as tokens of the step.
Seconds to the target are steps times the median time of a step, which is measured in turns with all other methods'.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.schema import Row
from bench.suites.layerwise import cost
from bench.suites.layerwise.contenders import ABLATIONS, contenders
from bench.suites.layerwise.setting import LARGEST, MAIN, PAPER, QUICK, SMALL
from bench.suites.layerwise.study import SUITE as SUITE
from bench.suites.layerwise.study import Study, compare


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, setting by setting.

    Args:
      quick: a smoke run of about a minute: one rate, one seed, few steps, the methods that matter most.
      only: text in the case's name, such as "45M" for the paper's configuration on a GPU, or "ablations".
    """
    for setting in (QUICK,) if quick else (PAPER,) if "45M" in only else (MAIN, SMALL, LARGEST):
        costs, study, ablations = (f"{setting.case}, {what}" for what in _cases(setting.target))
        wanted = [case for case in (costs, study, ablations) if only in case]
        if not wanted:
            continue
        started = Study(setting)
        if costs in wanted and setting is not SMALL:
            yield cost.rows(started, costs)
        if study in wanted:
            yield from compare(started, study, contenders(setting))
        if ablations in wanted and setting is MAIN:
            yield from compare(started, ablations, ABLATIONS)


def _cases(target: float) -> tuple[str, str, str]:
    return "cost of a step", f"to test loss {target:g}", f"ablations, to test loss {target:g}"
