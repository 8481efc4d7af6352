"""What can be measured on a run, one file for each kind."""

from safelora_fast.compare.measures.base import Measure, is_taken, take
from safelora_fast.compare.measures.benchmarks import BenchmarksMeasure
from safelora_fast.compare.measures.drift import DriftMeasure
from safelora_fast.compare.measures.judged import JudgedMeasure
from safelora_fast.compare.measures.margin import MarginMeasure
from safelora_fast.compare.measures.operator_swap import OperatorSwapMeasure
from safelora_fast.compare.measures.sweep import SweepMeasure
from safelora_fast.compare.measures.weakened import WeakenedMeasure

MEASURES: tuple[Measure, ...] = (
    MarginMeasure(),
    DriftMeasure(),
    WeakenedMeasure(),
    SweepMeasure(),
    JudgedMeasure(),
    OperatorSwapMeasure(),
    BenchmarksMeasure(),
)

__all__ = ["MEASURES", "Measure", "is_taken", "take"]
