"""Two collections of one op, row by row: what a framework upgrade, or another machine, changed.

Rows are joined by what makes them a row of their table (:func:`opkit.collect.desk.point.identity`),
since content keys hold the framework's version and never meet between two of them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opkit.collect.admission import kernel_kind
from opkit.collect.comparison import (
    Change,
    CollectionComparison,
    Curve,
    CurveGroup,
    Difference,
    GroupChange,
    KernelChange,
    Mover,
    OneSided,
    Place,
    RowChange,
)
from opkit.collect.desk.point import Point, identity
from opkit.collect.desk.read import Collection
from opkit.collect.desk.series import Layout, layout_of, ordered
from opkit.collect.tables.validate import Value
from opkit.collect.timing.stats import median
from opkit.collect.verify import TOLERANCE
from opkit.errors import WrongUsage

# What a row may differ by and is still the same: `opkit verify` measures rows again in new
# processes and holds them to this. The interval of a row's own samples knows nothing of that.
FLOOR = TOLERANCE
# Differences that warn, as pytest-benchmark warns of machines: they change times with no change of
# the software that is compared. (The SM clock does too, by more than FLOOR.)
WARNS = ("GPU", "host", "driver", "latency", "pacing", "l2", "warmups", "spread", "gpu_time",
         "power limit")  # fmt: skip
# Kernel time by which a kernel must have moved to be named as what changed a row, as a share.
_MOVED = 0.1


def compare_collections(a: Collection, b: Collection) -> CollectionComparison:
    """Compare two collections of one op.

    A row has changed when its latency moved by more than both medians' 95 % intervals allow,
    combined as the root of their squares (errors of independent measurements add so: JCGM
    100:2008, "Guide to the expression of uncertainty in measurement", 5.1.2, for a quotient), and
    by more than ``FLOOR``.

    Raises:
        WrongUsage: they are of different ops, are one and the same, or share no row.
    """
    _check(a, b)
    old = {(point.table, identity(point.columns)): point for point in a.points}
    new = {(point.table, identity(point.columns)): point for point in b.points}
    shared = [key for key in old if key in new]
    if not shared:
        raise WrongUsage(
            f"{a.folder} and {b.folder} share no row: {len(old):,} and {len(new):,} rows "
            "of other shapes, dtypes or heads",
            "collect the same sweep on both sides",
        )
    layouts = _layouts(a, b)
    rows = [_row(old[key], new[key], layouts[key[0]]) for key in shared]
    rows.sort(key=lambda row: -abs(math.log(row.ratio)))
    only_a = [_one_sided(p, b, layouts) for key, p in old.items() if key not in new]
    only_b = [_one_sided(p, a, layouts) for key, p in new.items() if key not in old]
    return CollectionComparison(
        op=a.op,
        backends=(a.backend, b.backend),
        names=(str(a.folder), str(b.folder)),
        rows=tuple(rows),
        overall=_group("", "", rows),
        groups=tuple(_groups(rows, layouts)),
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        curves=tuple(_curves(rows, only_a, only_b, layouts)),
        kernels=tuple(_kernels(rows)),
        differences=tuple(sorted(_differences(a, b), key=lambda item: not item.warns)),
        floor=FLOOR,
        notes=(*a.notes, *b.notes),
    )


def _check(a: Collection, b: Collection) -> None:
    if a.folder.resolve() == b.folder.resolve():
        raise WrongUsage(f"{a.folder}: compared with itself", "name two collections")
    if a.op != b.op:
        raise WrongUsage(
            f"a collection of {a.op} cannot be compared with one of {b.op}",
            "name two collections of one op",
        )
    for side in (a, b):
        if not side.points:
            raise WrongUsage(f"{side.folder} has no row to compare with", "collect it first")


def _layouts(a: Collection, b: Collection) -> dict[str, Layout]:
    """The layout of each table's curves, from the rows of both sides."""
    by_table: dict[str, list[Mapping[str, Value]]] = defaultdict(list)
    for point in (*a.points, *b.points):
        by_table[point.table].append(point.columns)
    return {name: layout_of(columns) for name, columns in by_table.items()}


def _row(a: Point, b: Point, layout: Layout) -> RowChange:
    combined = None
    if a.interval is not None and b.interval is not None:
        combined = math.hypot(a.interval, b.interval)
    allowed = max(FLOOR, combined or 0.0)
    # In logarithms, so that a row is as likely to be called faster as slower.
    moved = math.log(b.latency_ms / a.latency_ms)
    change = Change.SAME if abs(moved) <= math.log1p(allowed) else (
        Change.SLOWER if moved > 0 else Change.FASTER
    )  # fmt: skip
    old, new = _kinds(a), _kinds(b)
    known = bool(old and new)
    names = [{kernel.name for kernel in point.measured.kernels} for point in (a, b)]
    return RowChange(
        table=a.table,
        group=layout.group(a.columns),
        label=layout.label(a.columns),
        columns=a.columns,
        latency_ms_a=a.latency_ms,
        latency_ms_b=b.latency_ms,
        allowed=allowed,
        combined=combined,
        change=change,
        kernels_gone=tuple(sorted(old.keys() - new.keys())) if known else (),
        kernels_new=tuple(sorted(new.keys() - old.keys())) if known else (),
        variants=known and old.keys() == new.keys() and names[0] != names[1],
        mover=_mover(old, new, a.latency_ms) if known else None,
        launch=(str(a.measured.launch), str(b.measured.launch)),
        source=(a.source, b.source),
        flags=(a.flags, b.flags),
    )


def _kinds(point: Point) -> dict[str, float]:
    """Microseconds a forward, by kind of kernel."""
    found: Counter[str] = Counter()
    for kernel in point.measured.kernels:
        found[kernel_kind(kernel.name)] += kernel.us  # type: ignore[assignment]
    return {name: float(us) for name, us in found.items()}


def _mover(old: Mapping[str, float], new: Mapping[str, float], latency_ms: float) -> Mover | None:
    names = sorted(old.keys() | new.keys())
    name = max(names, key=lambda name: abs(new.get(name, 0.0) - old.get(name, 0.0)))
    found = Mover(name, old.get(name, 0.0), new.get(name, 0.0))
    moved = abs(found.us_b - found.us_a)
    return found if moved > _MOVED * FLOOR * latency_ms * 1e3 else None


def _group(table: str, group: str, rows: Sequence[RowChange]) -> GroupChange:
    counts = Counter(row.change for row in rows)
    ratios = [row.ratio for row in rows]
    return GroupChange(
        table, group, len(rows),
        counts[Change.SLOWER], counts[Change.FASTER], counts[Change.SAME],
        median(ratios), min(ratios), max(ratios),
    )  # fmt: skip


def _groups(rows: Sequence[RowChange], layouts: Mapping[str, Layout]) -> Iterable[GroupChange]:
    by_group: dict[tuple[str, str], list[RowChange]] = defaultdict(list)
    for row in rows:
        by_group[row.table, row.group].append(row)
    for table in sorted(layouts):
        found = {name: made for (of, name), made in by_group.items() if of == table}
        for name in layouts[table].order(made[0].columns for made in found.values()):
            yield _group(table, name, found[name])


def _curves(
    rows: Sequence[RowChange],
    only_a: Sequence[OneSided],
    only_b: Sequence[OneSided],
    layouts: Mapping[str, Layout],
) -> Iterable[CurveGroup]:
    for table in sorted(layouts):
        layout = layouts[table]
        placed = [(row.columns, Place(_x(layout, row), row=row))
                  for row in rows if row.table == table]  # fmt: skip
        placed += [(row.columns, Place(_x(layout, row), only_a=row))
                   for row in only_a if row.table == table]  # fmt: skip
        placed += [(row.columns, Place(_x(layout, row), only_b=row))
                   for row in only_b if row.table == table]  # fmt: skip
        placed.sort(key=lambda item: (isinstance(item[1].x, str), item[1].x))
        for group in layout.order(columns for columns, _ in placed):
            own = [(c, place) for c, place in placed if layout.group(c) == group]
            panels = ordered(layout.panel, (columns for columns, _ in own))
            yield CurveGroup(table, group, layout.x, tuple(
                Curve(name, tuple(place for c, place in own if layout.panel_of(c) == name))
                for name in panels
            ))  # fmt: skip


def _x(layout: Layout, row: RowChange | OneSided) -> Value:
    return row.columns[layout.x]


def _one_sided(point: Point, other: Collection, layouts: Mapping[str, Layout]) -> OneSided:
    layout = layouts[point.table]
    sizes = {name: point.columns[name] for name in layout.sizes if name in point.columns}
    why = "not in its sweep"
    for table in other.tables:
        for lost in table.lost if table.name == point.table else ():
            if all(lost.columns.get(name) == value for name, value in sizes.items()):
                why = f"{lost.why}: {lost.what}".removesuffix(": ")
    return OneSided(
        point.table, layout.group(point.columns), layout.label(point.columns), point.columns,
        point.latency_ms, why,
    )  # fmt: skip


def _kernels(rows: Sequence[RowChange]) -> list[KernelChange]:
    gone = Counter(name for row in rows for name in row.kernels_gone)
    new = Counter(name for row in rows for name in row.kernels_new)
    found = [KernelChange(name, gone[name], new[name]) for name in sorted(gone.keys() | new.keys())]
    return sorted(found, key=lambda item: -(item.gone + item.new))


def _differences(a: Collection, b: Collection) -> Iterable[Difference]:
    old, new = _facts(a), _facts(b)
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name, ""), new.get(name, "")
        if was != now:
            yield Difference(name, was, now, name in WARNS)
    clocks = [_clock(side) for side in (a, b)]
    told = [f"{mhz:,.0f} MHz (median)" if mhz else "" for mhz in clocks]
    if told[0] != told[1]:
        apart = not all(clocks) or abs(clocks[1] / clocks[0] - 1) > FLOOR
        yield Difference("SM clock", told[0], told[1], apart)


def _facts(found: Collection) -> dict[str, str]:
    """What a collection was made with, as text."""
    told = [table.told for table in found.tables if table.told]
    measured = [point.measured for point in found.points]
    versions = sorted({name for item in told for name in item["versions"]} - {"gpu"})
    timing = ("pacing", "l2", "warmups", "spread", "gpu_time")
    return {
        "GPU": _text(item["device"] for item in told),
        "host": _text(host for item in told for host in item["hosts"]),
        "backend": found.backend,
        found.backend: _text(item["version"] for item in told),
        **{name: _text(item["versions"].get(name) for item in told) for name in versions},
        "latency": _text(item["latency"] for item in told),
        **{name: _text(getattr(m.timing, name) for m in measured) for name in timing},
        "power limit": _text(f"{m.power.limit_watts:g} W" for m in measured
                             if m.power and m.power.limit_watts),
        "throttled rows": str(sum(m.throttled for m in measured)),
        "verdict": _text(item["verdict"] for item in told),
        "waiver": _text(item["waiver"] for item in told),
    }  # fmt: skip


def _clock(found: Collection) -> float:
    """Median of the SM clocks after the measurements, MHz; 0 where none was told."""
    states = [point.measured.after.sm_mhz for point in found.points]
    known = [float(mhz) for mhz in states if mhz]
    return median(known) if known else 0.0


def _text(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value not in ("", None)}))
