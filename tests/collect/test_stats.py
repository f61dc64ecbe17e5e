"""Median, spread and confidence, against known values and by counting."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opkit.collect.timing.stats import (
    deviation,
    half_width,
    interval_ranks,
    mad,
    median,
    percentile,
)

SAMPLES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=60)


@given(SAMPLES)
def test_the_median_is_the_standard_one(samples: list[float]) -> None:
    assert median(samples) == pytest.approx(statistics.median(samples))


def test_percentiles_interpolate_between_ranks() -> None:
    samples = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(samples, p) for p in (0, 25, 50, 90, 100)] == pytest.approx(
        [1.0, 1.75, 2.5, 3.7, 4.0]
    )


def test_mad_ignores_one_outlier() -> None:
    assert mad([1.0, 2.0, 3.0, 4.0, 1000.0]) == 1.0


@pytest.mark.parametrize("call", [median, mad, lambda samples: percentile(samples, 5)])
def test_no_samples_is_an_error(call: object) -> None:
    with pytest.raises(ValueError, match="no samples"):
        call([])  # type: ignore[operator]


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_percentage_beyond_its_range_is_an_error(percent: float) -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        percentile([1.0], percent)


def test_deviation_is_a_signed_share() -> None:
    assert deviation(1.02, 1.0) == pytest.approx(0.02)
    assert deviation(0.9, 1.0) == pytest.approx(-0.1)
    assert deviation(1.0, 0.0) == math.inf


# Largest depth d with P(Binomial(n, 1/2) < d) at most 0.025, as tables of the sign test have it.
@pytest.mark.parametrize(
    ("count", "depth"), [(5, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8)]
)
def test_the_depth_is_the_binomial_one(count: int, depth: int) -> None:
    assert interval_ranks(count)[0] == depth


@pytest.mark.parametrize("count", [6, 9, 20, 200, 5000, 100_000])
def test_the_interval_covers_95_percent_between_two_depths(count: int) -> None:
    depth, share = interval_ranks(count)
    assert 0 <= share < 1
    if count <= 1000:
        ways = [math.comb(count, hits) / 2**count for hits in range(depth + 1)]
        assert 1 - 2 * sum(ways) < 0.95 <= 1 - 2 * sum(ways[:depth])
    else:  # n/2 - 1.96·√n/2
        assert depth == pytest.approx(count / 2 - 0.98 * math.sqrt(count), abs=2)


@pytest.mark.parametrize("count", [6, 8, 15, 40])
def test_the_interval_holds_the_true_median_95_times_in_100(count: int) -> None:
    stream = random.Random(count)
    trials, hits = 4000, 0
    for _ in range(trials):
        samples = sorted(stream.expovariate(1.0) for _ in range(count))  # skewed, as times are
        depth, share = interval_ranks(count)
        low = samples[depth - 1] + share * (samples[depth] - samples[depth - 1])
        high = samples[-depth] + share * (samples[-depth - 1] - samples[-depth])
        hits += low <= math.log(2) <= high
    assert hits / trials == pytest.approx(0.95, abs=0.012)


def test_half_width_by_hand() -> None:
    # 5 samples: their range. (12 - 8) / 2 / 10.
    assert half_width([8.0, 9.0, 10.0, 11.0, 12.0]) == pytest.approx(0.2)
    # 9 samples: depth 2 and a share of 0.2279; even steps of 1 around 10.
    depth, share = interval_ranks(9)
    assert depth == 2
    assert half_width([float(v) for v in range(6, 15)]) == pytest.approx((3 - share) / 10)


def test_one_outlier_among_nine_does_not_widen_it() -> None:
    steady = [10.0 + 0.001 * step for step in range(9)]
    assert half_width([*steady[:-1], 99.0]) == pytest.approx(half_width(steady), rel=0.3)


@pytest.mark.parametrize("samples", [[], [1.0] * 4, [0.0] * 9, [-1.0] * 9])
def test_what_says_nothing_is_infinitely_wide(samples: list[float]) -> None:
    assert half_width(samples) == math.inf


@given(st.lists(st.floats(1, 1e3), min_size=5, max_size=40), st.floats(0.01, 100))
def test_half_width_is_a_share_whatever_unit_and_order(samples: list[float], unit: float) -> None:
    width = half_width(samples)
    assert 0 <= width <= (max(samples) - min(samples)) / 2 / median(samples) + 1e-9
    assert half_width([unit * value for value in reversed(samples)]) == pytest.approx(width)


def test_equal_samples_have_no_width() -> None:
    assert half_width([2.5] * 8) == 0.0
