"""Ten small problems for development: physics in float64, the rest in float32."""

from __future__ import annotations

from bench.suites.untuned.problems.images import IMAGES
from bench.suites.untuned.problems.physics import PHYSICS
from bench.suites.untuned.problems.problem import Data as Data
from bench.suites.untuned.problems.problem import Problem as Problem
from bench.suites.untuned.problems.sequences import SEQUENCES
from bench.suites.untuned.problems.tables import TABLES

PROBLEMS: tuple[Problem, ...] = (*PHYSICS, *TABLES, *IMAGES, *SEQUENCES)
