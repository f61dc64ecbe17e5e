"""From a list of GPU activities to the times of each iteration and of each kernel.

The traced pass launches a marker kernel before and after each iteration; what runs on the GPU
between the two belongs to the iteration. That needs no matching of host and GPU clocks, and leaves
out what prepares an iteration, as the sweep of L2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from opkit.collect.measurement import KernelTime
from opkit.collect.timing.stats import median


@dataclass(frozen=True)
class Activity:
    """A kernel, copy or memset on the GPU; start and duration in nanoseconds."""

    name: str
    start: int
    duration: int


@dataclass(frozen=True)
class Trace:
    """What a traced pass saw.

    Attributes:
        gpu_ms: of each iteration the sum of its activities' durations, milliseconds.
        kernels: by name, largest first.
        problem: why there is nothing, or what is odd; empty otherwise.
    """

    gpu_ms: tuple[float, ...] = ()
    kernels: tuple[KernelTime, ...] = ()
    problem: str = ""


def summarise(activities: Iterable[Activity], marker: str, iterations: int) -> Trace:
    """The times of ``iterations`` that stand between markers.

    Args:
        activities: in any order.
        marker: text in the marker kernel's name that no other kernel has.
        iterations: how many were run between markers.
    """
    ordered = sorted(activities, key=lambda activity: activity.start)
    markers = sum(marker in activity.name for activity in ordered)
    if markers != 2 * iterations:
        return Trace(
            problem=f"GPU time not taken: {markers} of {2 * iterations} markers were traced"
        )
    parts = _between(ordered, marker)
    if not all(parts):
        return Trace(problem="GPU time not taken: an iteration without any traced kernel")
    totals = tuple(sum(item.duration for item in part) / 1e6 for part in parts)
    lengths = {len(part) for part in parts}
    odd = ""
    if len(lengths) > 1:
        odd = f"iterations launched {min(lengths)} to {max(lengths)} kernels, not always as many"
    return Trace(totals, _kernels(parts), odd)


def _between(ordered: list[Activity], marker: str) -> list[list[Activity]]:
    """The activities between the first and second marker, third and fourth, and so on."""
    parts: list[list[Activity]] = []
    inside = False
    for activity in ordered:
        if marker in activity.name:
            inside = not inside
            if inside:
                parts.append([])
        elif inside:
            parts[-1].append(activity)
    return parts


def _kernels(parts: list[list[Activity]]) -> tuple[KernelTime, ...]:
    """By name: calls in one iteration, and microseconds summed over them; medians of both."""
    calls: dict[str, list[int]] = defaultdict(lambda: [0] * len(parts))
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(parts))
    for number, part in enumerate(parts):
        for activity in part:
            calls[activity.name][number] += 1
            spent[activity.name][number] += activity.duration / 1e3
    found = [KernelTime(name, round(median(calls[name])), median(spent[name])) for name in calls]
    return tuple(sorted(found, key=lambda kernel: (-kernel.us, kernel.name)))
