"""Confidence intervals of means over a few seeds."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Returns half the width of Student's t-interval of a mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return float(quantile) * statistics.stdev(values) / math.sqrt(len(values))


def text(values: Sequence[float], digits: str) -> str:
    """Returns mean ± half width of the 95% interval, or "–" if there is no value."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{digits}}"
    return f"{mean} ± {half_width(values):{digits.lstrip('+')}}" if len(values) > 1 else mean
