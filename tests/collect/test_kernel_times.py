"""From GPU activities to the times of iterations and kernels."""

from __future__ import annotations

import random

import pytest

from opkit.collect.measurement import KernelTime
from opkit.collect.timing.kernel_times import Activity, summarise

MARKER = "spin_kernel"


def timeline(*parts: str) -> list[Activity]:
    """Activities one after the other: ``|`` a marker, else the name and microseconds, as ``a3``."""
    made, now = [], 1_000
    for part in " ".join(parts).split():
        name, spent = (f"at::{MARKER}(long)", 1) if part == "|" else (part[0], int(part[1:]))
        made.append(Activity(name, now, spent * 1000))
        now += spent * 1000 + 500
    return made


def test_what_lies_outside_the_markers_is_not_counted() -> None:
    trace = summarise(timeline("a9 s5 | a3 b2 | s5 | a5 b2 | s5 | a4 b2 | s5"), MARKER, 3)
    assert trace.gpu_ms == pytest.approx((0.005, 0.007, 0.006))
    assert trace.kernels == (KernelTime("a", 1, 4.0), KernelTime("b", 1, 2.0))
    assert trace.problem == ""


def test_the_order_of_the_records_does_not_matter() -> None:
    activities = timeline("| a3 b2 a1 | | a3 b2 a1 | | a3 b2 a1 |")
    shuffled = activities[:]
    random.Random(0).shuffle(shuffled)
    assert summarise(shuffled, MARKER, 3) == summarise(activities, MARKER, 3)


def test_kernels_of_one_name_are_summed_and_the_largest_comes_first() -> None:
    trace = summarise(timeline("| b9 a5 a6 c1 |"), MARKER, 1)
    assert [(k.name, k.calls, k.us) for k in trace.kernels] == [
        ("a", 2, 11.0),
        ("b", 1, 9.0),
        ("c", 1, 1.0),
    ]


@pytest.mark.parametrize(
    ("parts", "iterations", "problem"),
    [
        ("", 3, "0 of 6 markers"),
        ("a1 b1", 3, "0 of 6 markers"),
        ("| a1 | | a1 |", 3, "4 of 6 markers"),
        ("| a1 | | a1", 2, "3 of 4 markers"),
        ("| a1 | | |", 2, "an iteration without any traced kernel"),
    ],
)
def test_a_trace_that_lost_something_gives_no_times(
    parts: str, iterations: int, problem: str
) -> None:
    trace = summarise(timeline(parts), MARKER, iterations)
    assert (trace.gpu_ms, trace.kernels) == ((), ())
    assert problem in trace.problem


def test_iterations_that_differ_are_kept_and_told() -> None:
    trace = summarise(timeline("| a1 | | a1 b1 | | a1 b1 |"), MARKER, 3)
    assert len(trace.gpu_ms) == 3
    assert {kernel.name: kernel.calls for kernel in trace.kernels} == {"a": 1, "b": 1}
    assert trace.problem == "iterations launched 1 to 2 kernels, not always as many"
