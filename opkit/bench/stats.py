"""Small statistics, stated: means, sample standard deviations, weighted percentiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1 in the denominator); None below two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def percentile(weighted: Iterable[tuple[float, int]], share: float) -> float | None:
    """The least value that ``share`` of all weight does not exceed (nearest rank).

    Args:
        weighted: values with their weights.
        share: 0 to 1.

    Returns:
        None without any weight.
    """
    ordered = sorted((value, weight) for value, weight in weighted if weight > 0)
    total = sum(weight for _, weight in ordered)
    rank, seen = max(1, math.ceil(share * total)), 0
    for value, weight in ordered:
        seen += weight
        if seen >= rank:
            return value
    return None
