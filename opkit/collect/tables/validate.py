"""What is wrong with rows that are about to be written: pure functions, nothing is changed here.

The field's reader clamps, back-fills and overrides without a word, so whoever writes a table has to
look. *Hard* problems keep a row out of the table; *soft* ones are written, flagged and listed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from opkit.layers.op import Table

Value = str | int | float

# A row is refused below this share of its bound. Peaks hold at the datasheet's clock, and a GPU may
# run faster: 1,980 instead of 1,830 MHz on an H100, 8 %.
BOUND_SHARE = 0.9
# More work may take less time when a library picks another tile for it. Of 54,000 neighbours in the
# shipped h100_sxm DSA tables of vLLM 0.24.0, 0.6 % drop by more than this; of 106,000 in its GEMM
# table, 8 %.
MONOTONE_TOLERANCE = 0.10
# How far a row may lie off its neighbours, beyond what growth explains. In those DSA tables
# 0.1 % of 42,000 rows lie farther.
SPIKE_TOLERANCE = 0.25
# The two times are taken in separate passes.
GPU_TOLERANCE = 0.02
MOST = 2**32 - 1  # the field's reader takes whole numbers as unsigned 32 bits, messages excepted
_WIDE = ("message_size",)
# Common columns that a row may say itself, as a collective does; else the table does.
OVERRIDABLE = ("op_name", "kernel_source")
_TEXT = re.compile(
    r"(op_name|kernel_source|model|architecture|distribution|implementation|backend|module|.*_d?type)$"
)


class Rule(StrEnum):
    """What a problem breaks. The soft ones are the flags of a row, spelt as in the table."""

    VALUE = "value"
    BOUND = "bound"
    DUPLICATE = "duplicate"
    COUNT = "count"
    COLUMNS = "columns"
    NOT_MONOTONE = "not_monotone"
    SPIKE = "spike"
    GPU_OVER_ELAPSED = "gpu_over_elapsed"


@dataclass(frozen=True)
class Line:
    """A row as it is about to be written.

    Attributes:
        key: the row's content key.
        columns: the table's own columns, and those of ``OVERRIDABLE`` that the row says itself.
        latency: milliseconds.
        spread: half the 95 % interval of the latency, as a share; None when it is not known.
        elapsed, gpu: medians, milliseconds; None where not taken.
        bound: least possible time, milliseconds; None when it is not known.
    """

    key: str
    columns: Mapping[str, Value]
    latency: float
    spread: float | None = None
    elapsed: float | None = None
    gpu: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        table: its name.
        rule: what is broken.
        what: one sentence, with the numbers.
        hard: the row is not written; without a row: the table is not what it should be.
        key: the row's content key; empty when it concerns the table.
        columns: the row's columns.
    """

    table: str
    rule: Rule
    what: str
    hard: bool
    key: str = ""
    columns: Mapping[str, Value] | None = None


@dataclass(frozen=True)
class Axis:
    """A column along which work grows.

    Attributes:
        power: the time grows at most with this power of it.
        steps: the time grows in steps (whole tiles), so that a jump is no spike.
    """

    power: float
    steps: bool = False


AXES = {
    "batch_size": Axis(1),
    "isl": Axis(2),
    "step": Axis(1),
    "m": Axis(1, steps=True),
    "num_tokens": Axis(1, steps=True),
    "message_size": Axis(1),
}


def is_text(column: str) -> bool:
    """Whether a table's column holds text; the others hold whole numbers."""
    return _TEXT.match(column) is not None


def validate(
    table: Table, lines: Sequence[Line], *, planned: int | None = None, failed: int = 0
) -> list[Problem]:
    """All problems of one table's rows, hard ones first.

    Args:
        table: the table.
        lines: its rows.
        planned: rows that were asked for; None when it is not known.
        failed: rows of these that have no value, told elsewhere.
    """
    hard = [*_check_count(table, lines, planned, failed)]
    seen: dict[tuple[tuple[str, Value], ...], Line] = {}
    sound = []
    for line in lines:
        found = _check_columns(table, line) or _check_value(table, line)
        if not found:
            identity = tuple(sorted(line.columns.items()))
            first = seen.setdefault(identity, line)
            if first is not line:
                what = f"same columns as row {first.key} ({first.latency:.6g} ms), which is kept"
                found = [_of(table, line, Rule.DUPLICATE, what)]
        hard += found
        if not found:
            sound.append(line)
    soft = [*_check_times(table, sound), *_check_shape(table, sound)]
    return [*hard, *soft]


def _of(table: Table, line: Line, rule: Rule, what: str, hard: bool = True) -> Problem:
    return Problem(table.name, rule, what, hard, line.key, line.columns)


def _check_count(
    table: Table, lines: Sequence[Line], planned: int | None, failed: int
) -> Iterator[Problem]:
    if planned is not None and len(lines) + failed != planned:
        what = f"{len(lines)} rows and {failed} failed cases, but {planned} were planned"
        yield Problem(table.name, Rule.COUNT, what, hard=True)
    elif not lines:
        yield Problem(table.name, Rule.COUNT, "not one row has a value", hard=True)


def _check_columns(table: Table, line: Line) -> list[Problem]:
    missing = [name for name in table.columns if name not in line.columns]
    if missing:
        return [_of(table, line, Rule.COLUMNS, f"no column {', '.join(missing)}")]
    unknown = [name for name in line.columns if name not in (*table.columns, *OVERRIDABLE)]
    if unknown:
        return [_of(table, line, Rule.COLUMNS, f"the table has no column {', '.join(unknown)}")]
    for name, value in line.columns.items():
        if is_text(name):
            wrong = "" if isinstance(value, str) and value else "text"
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            most = 2**63 - 1 if name in _WIDE else MOST
            wrong = "" if whole and 0 <= int(value) <= most else f"a whole number up to {most}"
        if wrong:
            return [_of(table, line, Rule.COLUMNS, f"{name} is {value!r}, not {wrong}")]
    return []


def _check_value(table: Table, line: Line) -> list[Problem]:
    if not math.isfinite(line.latency) or line.latency <= 0:
        return [_of(table, line, Rule.VALUE, f"latency is {line.latency} ms")]
    if line.bound is not None and line.latency < BOUND_SHARE * line.bound:
        what = f"{line.latency:.6g} ms, but this GPU needs at least {line.bound:.6g} ms for it"
        return [_of(table, line, Rule.BOUND, what)]
    return []


def _check_times(table: Table, lines: Sequence[Line]) -> Iterator[Problem]:
    for line in lines:
        if line.gpu is None or line.elapsed is None:
            continue
        if line.gpu > line.elapsed * (1 + GPU_TOLERANCE + (line.spread or 0.0)):
            what = f"kernels take {line.gpu:.6g} ms in {line.elapsed:.6g} ms elapsed"
            yield _of(table, line, Rule.GPU_OVER_ELAPSED, what, hard=False)


def _check_shape(table: Table, lines: Sequence[Line]) -> Iterator[Problem]:
    """Rows that differ in one size only, in its order; each row is told once for each rule."""
    told: set[tuple[str, Rule]] = set()
    for name in table.columns:
        axis = AXES.get(name)
        for series in _series(name, lines) if axis else ():
            assert axis is not None
            for problem in (
                *_drops(table, name, series),
                *_spikes(table, name, axis, series),
            ):
                if (problem.key, problem.rule) not in told:
                    told.add((problem.key, problem.rule))
                    yield problem


def _series(name: str, lines: Sequence[Line]) -> Iterator[list[tuple[int, Line]]]:
    """Rows that are equal in all columns but ``name``, by its value."""
    groups: dict[tuple[tuple[str, Value], ...], list[tuple[int, Line]]] = defaultdict(list)
    for line in lines:
        rest = tuple(sorted(item for item in line.columns.items() if item[0] != name))
        groups[rest].append((int(line.columns[name]), line))
    for group in groups.values():
        yield sorted(group, key=lambda item: item[0])


def _drops(table: Table, name: str, series: list[tuple[int, Line]]) -> Iterator[Problem]:
    for (small, before), (large, after) in pairwise(series):
        allowed = MONOTONE_TOLERANCE + (before.spread or 0.0) + (after.spread or 0.0)
        if after.latency < before.latency * (1 - allowed):
            what = (
                f"{after.latency:.6g} ms at {name} {large}, but {before.latency:.6g} ms at {small}"
            )
            yield _of(table, after, Rule.NOT_MONOTONE, what, hard=False)


def _spikes(
    table: Table, name: str, axis: Axis, series: list[tuple[int, Line]]
) -> Iterator[Problem]:
    for (x0, before), (x1, line), (x2, after) in zip(series, series[1:], series[2:], strict=False):
        low, high = _between((x0, before.latency), x1, (x2, after.latency), axis)
        if not low / (1 + SPIKE_TOLERANCE) <= line.latency <= high * (1 + SPIKE_TOLERANCE):
            what = (
                f"{line.latency:.6g} ms at {name} {x1}; its neighbours at {x0} and {x2} lead to "
                f"expect {low:.6g} to {high:.6g} ms"
            )
            yield _of(table, line, Rule.SPIKE, what, hard=False)


def _between(
    before: tuple[int, float], place: int, after: tuple[int, float], axis: Axis
) -> tuple[float, float]:
    """Least and most time that two neighbours explain.

    A time that is flat first and then grows with power p lies below the line through both in
    log-log, by at most ``p · left · right / (left + right)``, the gaps being those of logarithms.
    Where time grows in steps, or from 0, anything between the neighbours is explained.
    """
    (x0, low), (x2, high) = before, after
    if axis.steps or x0 <= 0:
        return min(low, high), max(low, high)
    left, right = math.log(place / x0), math.log(x2 / place)
    line = math.exp((right * math.log(low) + left * math.log(high)) / (left + right))
    return line * math.exp(-axis.power * left * right / (left + right)), line
