"""Choose what of a recording stays: which NVTX ranges, and which stretches of time."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from dataclasses import dataclass

from opkit.errors import BadInput
from opkit.nsys_parsers.ranges import parse_step

MAX_TIME = 2**63 - 1
_MODULE = re.compile(r"\{'Module': '([^']*)'")
# A mock's iteration range as opkit writes it: what it repeats, then its number. Which op and case
# that is does not matter here.
_ITERATION = re.compile(r"(opkit \S+ .*\S) iter=\d+")

# (process, start, end) in ns, sorted and without overlaps.
Windows = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Keep:
    """What stays of the NVTX ranges and of the recorded time; everything when nothing is set.

    Attributes:
        modules: regular expression, searched in module paths; other module ranges go. Step labels
            and opkit's own ranges always stay.
        texts: regular expressions, searched in NVTX texts; further ranges to keep.
        steps: of each distinct step label, the first so many occurrences (per process).
        iterations: of each case of a mock, the first so many iterations.

    Raises:
        BadInput: a pattern is not a regular expression, or a limit is below 1.
    """

    modules: str | None = None
    texts: tuple[str, ...] = ()
    steps: int | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        for pattern in (self.modules, *self.texts):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise BadInput(f"{pattern!r}: not a regular expression ({error})") from error
        for limit in (self.steps, self.iterations):
            if limit is not None and limit < 1:
                raise BadInput(f"{limit}: keep at least 1 step or iteration")


@dataclass(frozen=True)
class Range:
    """One NVTX range or mark: its row in the export, start and end (ns), process and text."""

    row: int
    start: int
    end: int
    pid: int
    text: str


def windows_of(ranges: list[Range], keep: Keep, origin: str) -> Windows:
    """The steps and iterations to keep; empty when all time is kept.

    Args:
        ranges: the recording's ranges in order of their start.
        keep: the limits.
        origin: the recording's name, for the error.

    Raises:
        BadInput: there are limits, but no range is a step or an iteration.
    """
    if keep.steps is None and keep.iterations is None:
        return []
    seen: Counter[object] = Counter()
    windows = []
    for each in ranges:
        key, limit = _occurrence(each, keep)
        if key is None:
            continue
        seen[key] += 1
        if limit is None or seen[key] <= limit:
            windows.append((each.pid, each.start, each.end))
    if not windows:
        raise BadInput(
            f"{origin}: no step label and no opkit range in it, so no first steps to keep",
            "slim it without a limit on steps and iterations",
        )
    return _merged(windows)


def _occurrence(each: Range, keep: Keep) -> tuple[object | None, int | None]:
    """What a range is an occurrence of, and how many of those stay (None: all)."""
    if found := _ITERATION.fullmatch(each.text):
        return (each.pid, found[1]), keep.iterations
    if step := parse_step(each.text):
        return (each.pid, step), keep.steps
    return None, None


def _merged(windows: Windows) -> Windows:
    merged: Windows = []
    for pid, start, end in sorted(windows):
        if merged and merged[-1][0] == pid and start <= merged[-1][2]:
            merged[-1] = (pid, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((pid, start, end))
    return merged


def matters(text: str, keep: Keep) -> bool:
    """Whether a range stays by its text."""
    if keep.modules is None and not keep.texts:
        return True
    if parse_step(text) or _ITERATION.fullmatch(text):
        return True
    module = _MODULE.match(text)
    if module and keep.modules is not None:
        # The twin range of a module's outputs covers no launch that the first does not.
        return bool(re.search(keep.modules, module[1])) and "'Outputs'" not in text
    return any(re.search(pattern, text) for pattern in keep.texts)


def overlaps(windows: Windows, pid: int, start: int, end: int) -> bool:
    """Whether the time from ``start`` to ``end`` (ns) touches a window of the process."""
    last = bisect.bisect_right(windows, (pid, end, MAX_TIME)) - 1
    return last >= 0 and windows[last][0] == pid and windows[last][2] >= start


def holds(times: dict[int, list[int]], each: Range) -> bool:
    """Whether one of the process's times (sorted, ns) lies within a range."""
    own = times.get(each.pid, [])
    first = bisect.bisect_left(own, each.start)
    return first < len(own) and own[first] <= each.end
