"""Means over a few seeds, with their standard deviation or confidence interval."""

import math
import statistics
from collections.abc import Callable, Sequence

from scipy import stats


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Returns half the width of Student's t-interval of a mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return float(quantile) * statistics.stdev(values) / math.sqrt(len(values))


def text(values: Sequence[float], digits: str) -> str:
    """Returns mean ± half width of the 95% interval, or "–" if there is no value."""
    return _text(values, digits, half_width) if values else "–"


def spread(values: Sequence[float], digits: str) -> str:
    """Returns mean ± standard deviation of a sample, or the value if there is one."""
    return _text(values, digits, statistics.stdev)


def _text(values: Sequence[float], digits: str, width: Callable[[Sequence[float]], float]) -> str:
    mean = f"{statistics.mean(values):{digits}}"
    return f"{mean} ± {width(values):{digits.lstrip('+')}}" if len(values) > 1 else mean
