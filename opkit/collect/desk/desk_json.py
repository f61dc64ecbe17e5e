"""A collection as JSON: every number that a report of one shows, under a versioned schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from opkit.collect.desk.desk import Desk, Mark, Range, TableDesk

SCHEMA = "opkit.collection_report/1"


def desk_json(desk: Desk) -> dict[str, Any]:
    """The desk, JSON-ready: milliseconds, shares of 1, MHz, watts, joules, °C.

    Kernels are left to the provenance files, which hold them with all samples.
    """
    found = desk.collection
    return {
        "schema": SCHEMA,
        "folder": str(found.folder),
        "op": found.op,
        "backend": found.backend,
        "notes": list(found.notes),
        "bound_from": desk.bound_from,
        "tables": [_table(table) for table in desk.tables],
        "moments": [asdict(moment) for moment in desk.moments],
        "builds": {digest: dict(build) for digest, build in found.builds.items()},
    }


def _table(table: TableDesk) -> dict[str, Any]:
    read, layout = table.read, table.layout
    return {
        "name": read.name,
        "status": read.status,
        "planned": read.planned,
        "rows": len(read.points),
        "unbounded": read.unbounded,
        "changed_files": list(read.changed),
        "sweep": read.sweep,
        "told": dict(read.told),
        "layout": asdict(layout) | {"fixed": dict(layout.fixed)},
        "states": dict(table.states),
        "flags": dict(table.flags),
        "interval": _range(table.interval),
        "shipped": _shipped(table),
        "groups": [
            {
                "name": group.name,
                "over_bound": _range(group.over_bound),
                "over_shipped": _range(group.over_shipped),
                "panels": [
                    {"name": panel.name, "points": [_mark(mark) for mark in panel.marks]}
                    for panel in group.panels
                ],
                "coverage": {
                    "rows": list(group.grid.rows),
                    "columns": list(group.grid.columns),
                    "states": [[str(cell.state) for cell in row] for row in group.grid.cells],
                },
            }
            for group in table.groups
        ],
        "lost": [
            {**asdict(lost), "columns": dict(lost.columns), "fault": str(lost.fault or "")}
            for lost in read.lost
        ],
    }


def _shipped(table: TableDesk) -> dict[str, Any] | None:
    if table.shipped is None:
        return None
    found = asdict(table.shipped)
    del found["latencies"]
    return {**found, "path": str(table.shipped.path)}


def _range(found: Range | None) -> Mapping[str, float] | None:
    return None if found is None else asdict(found)


def _mark(mark: Mark) -> dict[str, Any]:
    point = mark.point
    measured = point.measured
    return {
        "key": point.key,
        "x": mark.x,
        "columns": dict(point.columns),
        "latency_ms": point.latency_ms,
        "source": point.source,
        "spread": asdict(point.spread),
        "interval": point.interval,
        "bound_ms": point.bound_ms,
        "over_bound": point.over_bound,
        "shipped_ms": mark.shipped_ms,
        "over_shipped": mark.over_shipped,
        "elapsed_ms": point.elapsed_ms,
        "gpu_ms": point.gpu_ms,
        "flags": list(point.flags),
        "outlier": mark.outlier,
        "odd": list(point.odd),
        "kernels_gone": list(mark.gone),
        "kernels_new": list(mark.new),
        "launch": str(measured.launch),
        "stopped": measured.stopped,
        "throttled": measured.throttled,
        "before": asdict(measured.before),
        "after": asdict(measured.after),
        "power": asdict(measured.power) if measured.power else None,
        "attempts": point.attempts,
        "host": point.host,
        "created": point.created,
        "build": point.build,
    }
