"""The page of a collection: curves, coverage, power, clocks, what has no row, and the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup

from opkit.collect.desk.coverage import Cell, State
from opkit.collect.desk.desk import CurveGroup, Desk, Mark, Range, TableDesk
from opkit.collect.desk.point import Point
from opkit.collect.desk.series import SEPARATOR, number, word
from opkit.collect.tables.latency import Flag
from opkit.collect.tables.validate import Rule
from opkit.collect.tables.write import COMPLETE
from opkit.reports.html import collection_charts as charts
from opkit.reports.html.collection_text import (
    NOTHING,
    kernel_words,
    milliseconds,
    share,
    short_number,
    times,
)
from opkit.reports.html.page import render

# A letter for each flag, in the coverage grid; docs/tables.md says more of them.
FLAGS = {
    str(Flag.HOST_BOUND): ("h", "eager, and its kernels fill under 85 % of the elapsed time"),
    str(Flag.THROTTLED): ("t", "measured while the GPU lowered its clock"),
    str(Flag.UNSETTLED): ("s", "ended at the limit of time or iterations, not of spread"),
    "unaligned_kernels": ("u", "launched kernels that the aligned engine did not"),
    "waived": ("w", "collected without, or against, a verdict"),
    str(Flag.EAGER_FALLBACK): ("e", "was to be a CUDA graph, which could not be captured"),
    str(Flag.NO_GPU_TIME): ("n", "should hold GPU time, holds elapsed time"),
    str(Flag.KERNELS_UNKNOWN): ("k", "no kernel was recorded, so none was compared"),
    str(Rule.SPIKE): ("p", "a spike: over 25 % off what its neighbours lead to expect"),
    str(Rule.NOT_MONOTONE): ("m", "more work takes over 10 % less time, beyond both spreads"),
    str(Rule.GPU_OVER_ELAPSED): ("g", "kernels take over 2 % longer than the elapsed time"),
}
OTHER = "x"  # any other flag
SIGNS = {
    State.MEASURED: "●",
    State.FLAGGED: "●",
    State.FAILED: "✗",
    State.LEFT_OUT: "⊘",
    State.NOT_RUN: "○",
    State.NOT_WRITTEN: "◌",
    State.NONE: "",
}
STATES = {
    State.FAILED: "failed: quarantined, see below",
    State.LEFT_OUT: "left out: a hard rule of validation keeps it from the table",
    State.NOT_RUN: "not run: planned, and the run ended before",
    State.NOT_WRITTEN: "not written: measured, but in no table yet",
    State.NONE: "empty: not in the sweep, as far as the collection tells",
}
# Shades of the grid, by times of the least possible time: darker is farther from it.
SHADES = (1.5, 2.0, 3.0, 5.0, 10.0)
WORST = 5  # least settled rows that are named


@dataclass(frozen=True)
class CellText:
    """A cell of the grid: its class, what stands in it, its flags' letters, and its words."""

    style: str
    text: str
    letters: str
    tip: str


@dataclass(frozen=True)
class GroupView:
    """A group of curves as the template writes it."""

    id: str
    title: str
    chart: Markup | None
    power: Markup | None
    group: CurveGroup
    grid: tuple[tuple[str, tuple[CellText, ...]], ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]
    source: str
    changes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TableView:
    """A table as the template writes it."""

    id: str
    desk: TableDesk
    groups: tuple[GroupView, ...]
    head: tuple[str, ...]
    words: tuple[str, ...]
    unsettled: tuple[tuple[str, Point], ...]


def collection_page(desk: Desk) -> str:
    """The page: one file that opens offline.

    Args:
        desk: from :func:`opkit.collect.desk.desk.desk_of`.
    """
    found = desk.collection
    views = [_view(f"t{place}", table) for place, table in enumerate(desk.tables)]
    told = next((table.read.told for table in desk.tables if table.read.told), {})
    complete = all(table.read.status == COMPLETE for table in desk.tables)
    lost = [item for table in desk.tables for item in table.read.lost]
    unseen = [(table.read.name, table.read.unseen) for table in desk.tables if table.read.unseen]
    version = f"{found.backend} {found.version}".strip()
    sections = [("summary", "Summary"), *((view.id, view.desk.read.name) for view in views)]
    sections += [("power", "Power")] if desk.power else []
    sections += [("clocks", "Clocks")] if len(desk.moments) > 1 else []
    if lost or unseen:
        count = len(lost) + sum(rows for _, rows in unseen)
        sections += [("lost", f"Without a row ({count:,})")]
    return render(
        "collection.html",
        title=f"{found.op} on {version}",
        sections=[*sections, ("provenance", "Provenance")],
        desk=desk,
        found=found,
        told=told,
        complete=complete,
        waiver=str(told.get("waiver", "") or (found.record.waiver if found.record else "")),
        views=views,
        lost=lost,
        unseen=unseen,
        clocks=charts.clocks(desk) if len(desk.moments) > 1 else None,
        facts=_facts(desk, told),
        methods=_methods(desk),
        builds=[(digest, _build(build)) for digest, build in found.builds.items()],
        states=[(SIGNS[state], text) for state, text in STATES.items()],
        letters=_letters(desk),
        ms=milliseconds,
        share=share,
        times=times,
        number=number,
        short=short_number,
        spread=_spread,
        separator=SEPARATOR,
    )


def _view(name: str, table: TableDesk) -> TableView:
    head = tuple(word(column) or column for column in (*table.layout.panel, table.layout.x))
    known = [point for point in table.read.points if point.interval is not None]
    widest = sorted(known, key=lambda point: -(point.interval or 0.0))[:WORST]
    return TableView(
        name,
        table,
        tuple(_group(f"{name}g{place}", g, table) for place, g in enumerate(table.groups)),
        head,
        tuple(word(column) for column in (*table.layout.panel, table.layout.x)),
        tuple((table.layout.place(point.columns), point) for point in widest),
    )


def _group(name: str, group: CurveGroup, table: TableDesk) -> GroupView:
    layout = table.layout
    title = SEPARATOR.join(part for part in (table.read.name, group.name) if part)
    marks = [mark for panel in group.panels for mark in panel.marks]
    points = {mark.point.key: mark for mark in marks}
    powered = any(mark.point.measured.power for mark in marks)
    sources = dict(Counter(charts.SOURCES[mark.point.source] for mark in marks).most_common(1))
    return GroupView(
        id=name,
        title=group.name or "all rows",
        chart=charts.curves(name, group, table, title) if marks else None,
        power=charts.power(f"{name}p", group, layout, title) if powered else None,
        group=group,
        grid=tuple(
            (row, tuple(_cell(cell, points, f"{row}{SEPARATOR if row else ''}{number(x)}", table)
                        for cell, x in zip(cells, group.grid.columns, strict=True)))
            for row, cells in zip(group.grid.rows, group.grid.cells, strict=True)
        ),
        rows=tuple(
            (mark.point.key, charts.SOURCES[mark.point.source], tuple(_row(mark, table)))
            for mark in marks
        ),
        source=next(iter(sources), ""),
        changes=tuple(_changes(group, layout.x)),
    )  # fmt: skip


def _cell(cell: Cell, points: dict[str, Mark], place: str, table: TableDesk) -> CellText:
    mark = points.get(cell.key)
    if mark is None:
        told = f"{place}: {cell.state}{': ' + cell.what if cell.what else ''}" if cell.key else ""
        return CellText(cell.state.name.lower(), SIGNS[cell.state], "", told)
    over = mark.point.over_bound
    flags = [flag for flag in cell.flags if flag not in table.common]
    letters = "".join(dict.fromkeys(FLAGS.get(flag, (OTHER,))[0] for flag in flags))
    shade = sum(over > limit for limit in SHADES) if over is not None else 0
    text = SIGNS[cell.state] if over is None else f"{over:.1f}" if over < 99.95 else ">99"
    return CellText(f"s{shade}", text, letters, f"{place}: {', '.join(flags)}" if flags else "")


def _row(mark: Mark, table: TableDesk) -> Iterator[str]:
    """The cells of a row of numbers, in the order of the template's head."""
    point, spread, measured = mark.point, mark.point.spread, mark.point.measured
    layout = table.layout
    yield from (number(point.columns[name]) for name in (*layout.panel, layout.x))
    yield milliseconds(point.latency_ms)
    yield share(point.interval)
    yield str(spread.count)
    for ms in (spread.least, spread.lower, spread.upper, spread.most):
        yield milliseconds(ms)
    yield milliseconds(point.bound_ms)
    yield times(point.over_bound).removesuffix(" ×")
    if table.shipped:
        yield milliseconds(mark.shipped_ms)
        yield times(mark.over_shipped).removesuffix(" ×")
    yield milliseconds(point.elapsed_ms)
    yield milliseconds(point.gpu_ms)
    yield NOTHING if measured.after.sm_mhz is None else number(measured.after.sm_mhz)
    yield NOTHING if measured.after.temperature_c is None else str(measured.after.temperature_c)
    yield " ".join(point.flags)


def _changes(group: CurveGroup, x: str) -> Iterator[tuple[str, str]]:
    """Where kernels change along each curve, and which."""
    for panel in group.panels:
        for mark in panel.marks:
            if mark.new or mark.gone:
                place = f"{word(x)} {number(mark.x)}".strip()
                yield SEPARATOR.join(filter(None, (panel.name, place))), kernel_words(mark)


def _letters(desk: Desk) -> list[tuple[str, str, str, int]]:
    """Letter, flag, meaning and rows of the flags that there are."""
    counts: dict[str, int] = {}
    for table in desk.tables:
        for flag, count in table.flags.items():
            counts[flag] = counts.get(flag, 0) + count
    return [
        (*_of(flag), count) for flag, count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def _of(flag: str) -> tuple[str, str, str]:
    other = "the algorithm that answered" if flag.startswith("served_by_") else "see docs/tables.md"
    letter, text = FLAGS.get(flag, (OTHER, other))
    return letter, flag, text


def _spread(found: Range | None) -> str:
    """A range of ratios as text: ``2.29 × (1.92 to 3.51)``."""
    if found is None:
        return NOTHING
    least, most = (times(value).removesuffix(" ×") for value in (found.least, found.most))
    return f"{times(found.median)} ({least} to {most})"


def _facts(desk: Desk, told: Any) -> list[tuple[str, str]]:
    """What the collection was made of and with."""
    found = desk.collection
    record = found.record
    points = found.points
    created = sorted(point.created for point in points if point.created)
    facts = [
        ("verdict", str(told.get("verdict", "") or "none")),
        ("waiver", str(told.get("waiver", ""))),
        ("overridden", "; ".join(told.get("waived", ()))),
        ("GPU", found.device),
        ("hosts", ", ".join(told.get("hosts", ()))),
        ("versions", SEPARATOR.join(
            f"{name} {version}" for name, version in told.get("versions", {}).items()
            if name != "gpu")),
        ("model", str(told.get("model", "") or (record.model if record else ""))),
        ("server flags", " ".join(record.engine_args) if record else ""),
        ("measured", f"{_minute(created[0])} to {_minute(created[-1])} UTC" if created else ""),
        ("wall time of all rows", f"{sum(point.seconds for point in points):,.0f} s"
                     if points else ""),
        ("tables written by", f"opkit {told['opkit']}" if told else ""),
        ("folder", str(found.folder)),
    ]  # fmt: skip
    return [(name, text) for name, text in facts if text]


def _minute(created: str) -> str:
    """``2026-11-21T15:01:26.040+00:00`` to the minute."""
    return created[:16].replace("T", " ")


def _methods(desk: Desk) -> list[tuple[str, int]]:
    """How rows were measured, in words, with their number."""
    counts: dict[str, int] = {}
    for point in desk.collection.points:
        measured = point.measured
        text = SEPARATOR.join((
            f"{measured.launch}, median of {charts.SOURCES[point.source]} time",
            *(f"{name.replace('_', ' ')} {value}" for name, value in asdict(measured.timing).items()
              if name not in ("power", "power_seconds") or measured.timing.power),
        ))  # fmt: skip
        counts[text] = counts.get(text, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def _build(build: Any) -> str:
    """What a build said of itself, in a line."""
    model: dict[str, Any] = build.get("model", {})
    dtypes: Sequence[str] = [f"{name} {value}" for name, value in build.get("dtypes", {}).items()]
    notes: Sequence[str] = build.get("notes", ())
    heads = f"{model['num_heads']} heads" if "num_heads" in model else ""
    parts = [str(model.get("architecture", "")), f"tp {build.get('tp_size', 1)}", heads]
    return SEPARATOR.join(part for part in (*parts, *dtypes, *notes) if part)
