"""Intervals for the mean of a few differences, by Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

CONFIDENCE = 0.95


def student_t(confidence: float, degrees: int) -> float:
    """How many standard errors an interval reaches to each side: 12.71 at 95% for 1 degree of freedom."""
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


@dataclass(frozen=True)
class Interval:
    """The mean of ``count`` values and where the true mean lies; of one value the ends are unknown."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self:.4f}"

    def __format__(self, form: str) -> str:
        """``form`` is that of a number, without a sign: ".4f"."""
        ends = "" if self.low is None else f" [{self.low:+{form}}, {self.high:+{form}}]"
        return f"{self.mean:+{form}}{ends}"


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The interval of so much confidence for the mean that ``values``, at least one, are drawn around."""
    count, middle = len(values), mean(values)
    if count < 2:
        return Interval(middle, None, None, count)
    half = student_t(confidence, count - 1) * stdev(values) / math.sqrt(count)
    return Interval(middle, middle - half, middle + half, count)
