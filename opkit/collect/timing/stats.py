"""Median, spread and confidence of few, skewed samples; nothing here assumes a normal distribution.

Times of GPU work have a hard floor and a long tail, so a mean and its standard error say little.
All functions keep every sample: robustness comes from ranks, not from dropping outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

CONFIDENCE = 0.95
FEWEST = 5  # samples from which a confidence interval is given: at 5 the range covers 93.75 %


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the two in the middle.

    Raises:
        ValueError: no samples.
    """
    return percentile(samples, 50.0)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The sample below which ``percent`` % lie, linearly interpolated between ranks.

    Definition 7 of Hyndman and Fan, "Sample quantiles in statistical packages" (1996), as numpy's
    default: rank ``(n - 1) · percent / 100`` counted from 0.

    Raises:
        ValueError: no samples, or ``percent`` is not within 0 to 100.
    """
    if not samples:
        raise ValueError("no samples")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be 0 to 100, not {percent}")
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def mad(samples: Sequence[float]) -> float:
    """Median absolute deviation from the median, in the samples' unit, not scaled.

    Raises:
        ValueError: no samples.
    """
    middle = median(samples)
    return median([abs(sample - middle) for sample in samples])


def deviation(value: float, reference: float) -> float:
    """By which share ``value`` lies above (below: negative) ``reference``; inf when that is 0."""
    return value / reference - 1 if reference else math.inf


def half_width(samples: Sequence[float]) -> float:
    """Half the width of the median's 95 % confidence interval, as a share of the median.

    The interval lies between two order statistics, so it holds for any continuous distribution:
    the d-th smallest and d-th largest of n samples enclose the median with probability
    ``1 - 2·P(Binomial(n, 1/2) < d)`` (Conover, "Practical Nonparametric Statistics", 3rd edition,
    1999, section 3.2). That jumps with d; interpolating between d and d + 1 brings it to 95 %
    (Hettmansperger and Sheather, "Confidence intervals based on interpolated order statistics",
    Statistics & Probability Letters 4, 1986).

    Returns:
        A share, 0.01 for 1 %. With 5 samples their range, which covers 93.75 %. ``inf`` with fewer
        than 5, or when the median is not above 0.
    """
    count = len(samples)
    if count < FEWEST:
        return math.inf
    middle = median(samples)
    if middle <= 0:
        return math.inf
    ordered = sorted(samples)
    depth, share = interval_ranks(count)
    inner = min(depth, count - 1)
    low = ordered[depth - 1] + share * (ordered[inner] - ordered[depth - 1])
    high = ordered[count - depth] + share * (ordered[count - 1 - inner] - ordered[count - depth])
    return (high - low) / 2 / middle


@lru_cache(maxsize=1024)
def interval_ranks(count: int) -> tuple[int, float]:
    """Where the 95 % interval of a median of ``count`` samples begins, counted inwards.

    Returns:
        The depth d, from 1, and the share, 0 to 1, by which it lies from the d-th order statistic
        towards the next one inwards.
    """
    # Further out than ten standard deviations there is nothing; starting there keeps it cheap.
    depth = max(1, math.floor(count / 2 - 5 * math.sqrt(count)))
    below = sum(_binomial(count, hits) for hits in range(depth))  # P(Binomial < depth)
    while True:
        mass = _binomial(count, depth)
        if 1 - 2 * (below + mass) < CONFIDENCE:
            break
        below += mass
        depth += 1
    covered, next_covered = 1 - 2 * below, 1 - 2 * (below + mass)
    if covered <= CONFIDENCE:
        return depth, 0.0  # too few samples to reach 95 %
    part = (covered - CONFIDENCE) / (covered - next_covered)
    return depth, (count - depth) * part / (depth + (count - 2 * depth) * part)


def _binomial(count: int, hits: int) -> float:
    """The probability of ``hits`` heads in ``count`` fair throws."""
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(ways - count * math.log(2))
