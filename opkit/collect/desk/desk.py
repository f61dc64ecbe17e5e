"""All that is shown of a collection, as plain data: what a report of one is drawn from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from opkit.collect.admission import kernel_kind
from opkit.collect.desk.coverage import Grid, grid_of
from opkit.collect.desk.point import Lost, Point
from opkit.collect.desk.read import Collection, ReadTable
from opkit.collect.desk.series import Layout, layout_of, ordered, words
from opkit.collect.desk.shipped import Shipped, read_shipped
from opkit.collect.tables.bound import peaks_of
from opkit.collect.tables.validate import Line, Rule, Value, validate
from opkit.collect.timing.stats import median
from opkit.errors import WrongUsage
from opkit.layers.op import Table

# What makes a row stand out from its curve. They are rules of `collect` (thresholds and what they
# were taken from: opkit.collect.tables.validate), so that a page marks what the table flags.
OUTLIER = (str(Rule.SPIKE), str(Rule.NOT_MONOTONE), str(Rule.GPU_OVER_ELAPSED))


@dataclass(frozen=True)
class Mark:
    """One point of a curve.

    Attributes:
        x: its value of the layout's x.
        point: the row.
        shipped_ms: what the shipped table says of it; None without one.
        outlier: whether it stands out, see :func:`outliers`; ``point.odd`` says by what.
        gone, new: kinds of kernels that the point before on this curve launched and this one does
            not, and the other way round.
    """

    x: Value
    point: Point
    shipped_ms: float | None
    outlier: bool
    gone: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    @property
    def over_shipped(self) -> float | None:
        """Ours over the shipped latency."""
        return self.point.latency_ms / self.shipped_ms if self.shipped_ms else None


@dataclass(frozen=True)
class Panel:
    """One curve: rows that differ in x alone.

    Attributes:
        name: in words; empty where a group has one curve.
        marks: in order of x.
    """

    name: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Range:
    """Least, median and most of some numbers, and how many there are."""

    count: int
    least: float
    median: float
    most: float


@dataclass(frozen=True)
class CurveGroup:
    """Curves that share all but their panels' columns and x.

    Attributes:
        name: in words; empty where a table has one group.
        panels: its curves.
        grid: its coverage.
        over_bound: latency over the least possible time, of all its points; None where unknown.
        over_shipped: latency over the shipped one.
    """

    name: str
    panels: tuple[Panel, ...]
    grid: Grid
    over_bound: Range | None
    over_shipped: Range | None


@dataclass(frozen=True)
class TableDesk:
    """One table, laid out.

    Attributes:
        read: the table as it was read.
        layout: which column is what.
        groups: its curves.
        states: cases by what became of them, in words.
        flags: rows by flag.
        interval: of the 95 % half-widths of its medians, as shares.
        shipped: the table beside it.
    """

    read: ReadTable
    layout: Layout
    groups: tuple[CurveGroup, ...]
    states: Mapping[str, int]
    flags: Mapping[str, int]
    interval: Range | None
    shipped: Shipped | None = None

    @property
    def common(self) -> tuple[str, ...]:
        """Flags that every row has, where there are several: they tell no row from another."""
        count = len(self.read.points)
        return tuple(flag for flag, rows in self.flags.items() if rows == count > 1)

    def flagged(self, point: Point) -> bool:
        """Whether a row has a flag that not all rows have."""
        return any(flag not in self.common for flag in point.flags)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """All points of all curves."""
        return tuple(m for group in self.groups for panel in group.panels for m in panel.marks)


@dataclass(frozen=True)
class Moment:
    """The GPU when a row was measured: seconds since the first row, and what it told then."""

    seconds: float
    key: str
    gpu: str
    sm_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttled: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Desk:
    """A collection as it is shown.

    Attributes:
        collection: as it was read.
        tables: laid out.
        moments: the GPU's state after each row, in the order of measuring.
        bound_from: where the peaks behind the bounds are from; empty where they are not known.
        power: rows whose power was measured.
    """

    collection: Collection
    tables: tuple[TableDesk, ...]
    moments: tuple[Moment, ...]
    bound_from: str
    power: tuple[Point, ...]


def desk_of(collection: Collection, shipped: Sequence[Path] = ()) -> Desk:
    """Lay a collection out.

    Args:
        collection: from :func:`opkit.collect.desk.read.read_collection`.
        shipped: perf tables to show beside its own, at most one for each.

    Raises:
        BadInput: a shipped table cannot be read, or stands beside none of the collection's.
        WrongUsage: two shipped tables stand beside one.
    """
    points = {table.name: table.points for table in collection.tables if table.points}
    beside: dict[str, Shipped] = {}
    for path in shipped:
        found = read_shipped(path, points)
        if found.table in beside:
            raise WrongUsage(
                f"{beside[found.table].path} and {path} are both tables of {found.table}",
                "name one shipped table for each",
            )
        beside[found.table] = found
    peaks = peaks_of(collection.device)
    return Desk(
        collection,
        tuple(_table(table, beside.get(table.name)) for table in collection.tables),
        tuple(_moments(collection.points)),
        peaks.source if peaks else "",
        tuple(point for point in collection.points if point.measured.power),
    )


def range_of(values: Iterable[float | None]) -> Range | None:
    """The range of those numbers that are known; None when none is."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return Range(len(known), known[0], median(known), known[-1])


def outliers(points: Sequence[Point]) -> frozenset[str]:
    """Keys of the rows of a table that stand out: those that ``OUTLIER`` flags, less echoes.

    The row after a spike takes less time than the spike: it is flagged ``not_monotone``, and
    nothing is wrong with it. So a drop counts only if it is one without the spikes too.
    """
    flagged = {point.key for point in points if any(flag in OUTLIER for flag in point.flags)}
    spikes = {point.key for point in points if str(Rule.SPIKE) in point.flags}
    if not spikes or flagged == spikes:
        return frozenset(flagged)
    table = Table(points[0].table, "", tuple(points[0].columns), {})
    lines = [
        Line(point.key, point.columns, point.latency_ms, point.interval, point.elapsed_ms,
             point.gpu_ms)
        for point in points if point.key not in spikes
    ]  # fmt: skip
    rules = (Rule.NOT_MONOTONE, Rule.GPU_OVER_ELAPSED)
    still = {problem.key for problem in validate(table, lines) if problem.rule in rules}
    return frozenset(spikes | (flagged & still))


def _table(table: ReadTable, shipped: Shipped | None) -> TableDesk:
    columns = [item.columns for item in (table.points or table.lost)]
    layout = layout_of([*columns, *_complete(columns, table.lost)])
    points: dict[str, list[Point]] = defaultdict(list)
    for point in table.points:
        points[layout.group(point.columns)].append(point)
    lost: dict[str, list[Lost]] = defaultdict(list)
    for item in table.lost:
        lost[_group_of(layout, item)].append(item)
    names = layout.order(point.columns for point in table.points)
    names += sorted(lost.keys() - set(names))
    odd = outliers(table.points)
    groups = tuple(_curves(name, layout, points[name], lost[name], shipped, odd) for name in names)
    cells = [cell for group in groups for row in group.grid.cells for cell in row]
    states = Counter(str(cell.state) for cell in cells if cell.key)
    if table.unseen:
        states["unknown"] = table.unseen
    return TableDesk(
        table, layout, groups, dict(states),
        dict(Counter(flag for point in table.points for flag in point.flags).most_common()),
        range_of(point.interval for point in table.points),
        shipped,
    )  # fmt: skip


def _complete(
    known: Sequence[Mapping[str, Value]], lost: Sequence[Lost]
) -> list[Mapping[str, Value]]:
    """Columns of those lost cases that know as much as rows do."""
    names = set(known[0])
    return [item.columns for item in lost if names <= set(item.columns)]


def _group_of(layout: Layout, item: Lost) -> str:
    """The group of a lost case; of its own where its build was never made."""
    if all(name in item.columns for name in (*layout.groups, *layout.panel)):
        return layout.group(item.columns)
    ranks = f"tp {item.ranks}, " if item.ranks else ""
    known = words((*layout.groups, *layout.panel), item.columns)
    return f"{known} ({ranks}nothing measured)".strip()


def _curves(
    name: str, layout: Layout, points: Sequence[Point], lost: Sequence[Lost],
    shipped: Shipped | None, odd: frozenset[str],
) -> CurveGroup:  # fmt: skip
    panels = []
    for panel in ordered(layout.panel, (point.columns for point in points)):
        own = [point for point in points if layout.panel_of(point.columns) == panel]
        own.sort(
            key=lambda point: (isinstance(point.columns[layout.x], str), point.columns[layout.x])
        )
        panels.append(Panel(panel, tuple(_marks(own, layout.x, shipped, odd))))
    marks = [mark for panel in panels for mark in panel.marks]
    return CurveGroup(
        name,
        tuple(panels),
        grid_of(layout, points, lost),
        range_of(mark.point.over_bound for mark in marks),
        range_of(mark.over_shipped for mark in marks),
    )


def _marks(
    points: Sequence[Point], x: str, shipped: Shipped | None, odd: frozenset[str]
) -> Iterable[Mark]:
    before: frozenset[str] = frozenset()
    for point in points:
        kinds = frozenset(kernel_kind(kernel.name) for kernel in point.measured.kernels)
        known = bool(before and kinds)
        yield Mark(
            x=point.columns[x],
            point=point,
            shipped_ms=shipped.of(point.columns) if shipped else None,
            outlier=point.key in odd,
            gone=tuple(sorted(before - kinds)) if known else (),
            new=tuple(sorted(kinds - before)) if known else (),
        )
        before = kinds


def _moments(points: Sequence[Point]) -> Iterable[Moment]:
    timed = sorted((point for point in points if point.created), key=lambda point: point.created)
    for point in timed:
        since = datetime.fromisoformat(point.created) - datetime.fromisoformat(timed[0].created)
        state = point.measured.after
        yield Moment(
            since.total_seconds(), point.key, _gpu(point.gpu), state.sm_mhz, state.temperature_c,
            state.power_w, point.measured.throttled, state.throttle,
        )  # fmt: skip


def _gpu(gpu: Mapping[str, Any]) -> str:
    return f"{gpu.get('name', '')} {gpu.get('index', '')}".strip()
