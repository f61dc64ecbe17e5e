"""A collection read back from its folder: the tables with their proof, and what has no row in them.

The provenance files are what is believed: they say how each number of a table was obtained, and
hold the digests of the files that they speak of. Parts are read for what came to no table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opkit.collect.desk.point import Lost, Point, spread_of
from opkit.collect.measurement import measurement_from_json
from opkit.collect.record import NAME as RECORD
from opkit.collect.record import Record, read_record
from opkit.collect.tables.files import digest_of, read_provenance
from opkit.collect.tables.validate import Value
from opkit.collect.work import Fault, Row
from opkit.collect.workers.parts import read_parts
from opkit.errors import BadInput, OpkitError
from opkit.layers.op import case_from_json
from opkit.layers.registry import find_op

TABLES = "tables"
_PROVENANCE = "_perf.provenance.json"
_HEAD = {"table", "op", "backend", "builds", "opkit"}  # what every provenance file says
# A case's sizes, by the names that the tables give them.
_SIZES = {"batch": "batch_size", "tokens": "isl", "past": "step"}
_EXPERTS = {"tokens": "num_tokens", "routing": "distribution"}
_RANKS = re.compile(r" tp (\d+)$")  # what a group's name ends with


@dataclass(frozen=True)
class ReadTable:
    """One table with its proof.

    Attributes:
        name: of the table.
        status: ``complete`` or ``partial``; ``not written`` when there is no file.
        planned: rows that were asked for; None when it is not known.
        points: its rows, in the table's order.
        lost: cases of the sweep without a row in it.
        told: the provenance file's other facts: verdict, waiver, waived, framework, version,
            device, versions, latency, opkit.
        sweep: where the cases come from.
        unbounded: rows without a least possible time.
        changed: files that are no longer as opkit wrote them.
    """

    name: str
    status: str
    planned: int | None
    points: tuple[Point, ...]
    lost: tuple[Lost, ...]
    told: Mapping[str, Any]
    sweep: str = ""
    changed: tuple[str, ...] = ()

    @property
    def unbounded(self) -> int:
        """Rows that no least possible time is known of."""
        return sum(point.bound_ms is None for point in self.points)

    @property
    def unseen(self) -> int:
        """Cases that were planned and of which nothing is known, not even their shape."""
        if self.planned is None:
            return 0
        return max(0, self.planned - len(self.points) - len(self.lost))


@dataclass(frozen=True)
class Collection:
    """What a collection's folder holds.

    Attributes:
        folder: where it is.
        op, backend: what was collected.
        tables: in the order of their names.
        record: ``run.json``; None in a folder of tables alone.
        builds: what each build said of itself, by digest, as JSON-ready data.
        notes: what the reader must know: rows that came to no table, files that were changed.
    """

    folder: Path
    op: str
    backend: str
    tables: tuple[ReadTable, ...]
    record: Record | None
    builds: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The backend's version; empty when nothing tells it."""
        return self._told("version", "framework")

    @property
    def device(self) -> str:
        """The GPU's name; empty when nothing tells it."""
        return self._told("device", "gpu")

    def _told(self, by_table: str, by_record: str) -> str:
        """What the tables say; where none was written, what was admitted."""
        admitted = self.record.admitted.values() if self.record else ()
        found = [table.told.get(by_table) for table in self.tables if table.told]
        found += [phase.get(by_record) for phase in admitted] if not found else []
        return ", ".join(sorted({str(text) for text in found if text}))

    @property
    def points(self) -> tuple[Point, ...]:
        """All rows of all tables."""
        return tuple(point for table in self.tables for point in table.points)


def read_collection(folder: Path) -> Collection:
    """Read a collection, or a folder of tables that opkit wrote.

    Args:
        folder: ``opkit-out/collect/OP-BACKEND``, its ``tables``, or one of ``opkit-out/comm``.

    Raises:
        BadInput: nothing was collected there, no row and no failure, or it cannot be read.
    """
    record = read_record(folder) if (folder / RECORD).exists() else None
    tables = folder / TABLES if (folder / TABLES).is_dir() else folder
    found = {path: read_provenance(path) for path in sorted(tables.glob(f"*{_PROVENANCE}"))}
    unreadable = [path for path, data in found.items() if data is None or not data.keys() >= _HEAD]
    if unreadable:
        raise BadInput(f"{unreadable[0]}: not a readable provenance file of opkit's")
    told = [data for data in found.values() if data is not None]
    if not told and record is None:
        raise BadInput(
            f"{folder}: nothing has been collected there", "opkit collect OP makes a collection"
        )
    read = [_read_table(data, tables) for data in told]
    loose = list(_loose_rows(folder, record, read))
    builds = {digest: build for data in told for digest, build in data["builds"].items()}
    read = [_completed(table, builds) for table in _with_loose(read, loose)]
    if not any(table.points or table.lost for table in read):
        raise BadInput(f"{folder}: no row has been collected", "opkit collect makes them")
    unwritten = sum(lost.why == "not written" for lost in loose)
    notes = [
        f"{name} is not as opkit wrote it: its numbers may be others than those shown here"
        for table in read
        for name in table.changed
    ]
    if unwritten:
        notes.append(
            f"{unwritten:,} measured {'row is' if unwritten == 1 else 'rows are'} in no table: "
            "the run ended before tables were written; the same opkit collect writes them"
        )
    return Collection(
        folder=folder,
        op=record.op if record else str(told[0]["op"]),
        backend=record.backend if record else str(told[0]["backend"]),
        tables=tuple(read),
        record=record,
        builds=builds,
        notes=tuple(notes),
    )


def sizes_of(case: Mapping[str, Any]) -> dict[str, Value]:
    """The table's columns that a case tells without a build: its sizes.

    Args:
        case: as rows and quarantine keep it, JSON-ready.
    """
    names = _EXPERTS if "routing" in case else _SIZES
    found = {names.get(name, name): value for name, value in case.items()}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | str) and name not in ("mode", "phase", "dtype")
    }


def _read_table(data: Mapping[str, Any], folder: Path) -> ReadTable:
    name = str(data["table"])
    try:
        odd: dict[str, list[str]] = {}
        for problem in data["problems"]:
            if not problem["hard"]:
                odd.setdefault(problem["key"], []).append(f"{problem['rule']}: {problem['what']}")
        sweep = data["sweep"]
        left = [
            Lost(name, item["key"], item["columns"], "left out", what=item["what"])
            for item in data["problems"]
            if item["hard"] and item["key"]
        ]
        return ReadTable(
            name=name,
            status=str(data["status"]),
            planned=sweep["planned"],
            points=tuple(_point(name, item, odd.get(item["key"], ())) for item in data["rows"]),
            lost=(*(_failed(name, item) for item in sweep["quarantined"]), *left,
                  *(_not_run(name, item) for item in sweep.get("missing", ()))),
            told={key: value for key, value in data.items()
                  if key not in ("rows", "problems", "builds", "sweep", "files", "replaced")},
            sweep=str(sweep["from"]),
            changed=tuple(_changed(folder, data["files"])),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder / (name + _PROVENANCE)}: not readable ({error})") from error


def _point(table: str, item: Mapping[str, Any], odd: Iterable[str]) -> Point:
    def samples(name: str) -> list[float]:
        return list(item[name]["samples"]) if item[name] else []

    names = ("launch", "kernels", "timing", "warmups", "stopped", "graph_error", "before", "after",
             "throttled", "power", "notes")  # fmt: skip
    times = {"elapsed_ms": samples("elapsed"), "gpu_ms": samples("gpu")}
    if not 0 < item["latency_ms"] < math.inf:
        raise ValueError(f"{item['key']} took {item['latency_ms']} ms")
    if not all(isinstance(value, int | float | str) for value in item["columns"].values()):
        raise TypeError(f"columns of {item['key']}: {item['columns']}")
    source = "gpu" if "gpu" in str(item["latency_is"]) else "elapsed"
    measured = measurement_from_json({name: item[name] for name in names} | times, item["key"])
    return Point(
        table=table,
        key=item["key"],
        columns=item["columns"],
        latency_ms=float(item["latency_ms"]),
        source=source,
        spread=spread_of(times[f"{source}_ms"]),
        interval=item["spread"],
        bound_ms=item["bound_ms"],
        flags=tuple(item["flags"]),
        measured=measured,
        gpu=item["on_gpu"],
        host=item["host"],
        created=item["created"],
        seconds=item["seconds"],
        attempts=item["attempts"],
        build=item["build"],
        odd=tuple(odd),
    )


def _failed(table: str, item: Mapping[str, Any]) -> Lost:
    group, tries = str(item["group"]), int(item["attempts"])
    return Lost(
        table, item["key"], sizes_of(item["case"]), "failed", Fault(item["fault"]), item["error"],
        tries, group, _ranks(group),
    )  # fmt: skip


def _not_run(table: str, item: Mapping[str, Any]) -> Lost:
    group = str(item["group"])
    sizes = sizes_of(item["case"])
    return Lost(table, item["key"], sizes, "not run", group=group, ranks=_ranks(group))


def _ranks(group: str) -> int | None:
    found = _RANKS.search(group)
    return int(found[1]) if found else None


def _changed(folder: Path, digests: Mapping[str, str]) -> Iterator[str]:
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or digest_of(path) != digest:
            yield name


def _loose_rows(folder: Path, record: Record | None, tables: Sequence[ReadTable]) -> Iterator[Lost]:
    """Rows of the collection's own series that no provenance file names."""
    if record is None:
        return
    known = {point.key for table in tables for point in table.points}
    known |= {lost.key for table in tables for lost in table.lost}
    for key, row in read_parts(folder).rows.items():
        if key in known or key.split("-")[0] not in record.series:
            continue
        yield Lost(
            table=row.table or _table_of(record, row),
            key=key,
            columns=row.columns or sizes_of(row.case),
            why="not written" if row.ok else "failed",
            fault=row.fault,
            what=row.error,
            attempts=row.attempts,
            group=row.group,
            ranks=_ranks(row.group),
        )


def _table_of(record: Record, row: Row) -> str:
    try:
        return find_op(record.op).table(case_from_json(row.case)).name
    except (OpkitError, KeyError):
        return record.op


def _with_loose(tables: Sequence[ReadTable], loose: Sequence[Lost]) -> Iterator[ReadTable]:
    """The tables with what came to none; those that were not written are made of it alone."""
    known = {table.name: table for table in tables}
    for name in sorted({*known, *(lost.table for lost in loose)}):
        lost = tuple(item for item in loose if item.table == name)
        table = known.get(name) or ReadTable(name, "not written", None, (), (), {})
        yield replace(table, lost=(*table.lost, *lost)) if lost else table


def _completed(table: ReadTable, builds: Mapping[str, Mapping[str, Any]]) -> ReadTable:
    """The table whose lost cases have the columns that all rows of their ranks share.

    A case that never was built knows its sizes only. What a build adds (heads of a rank, dtypes) is
    what the rows of another build of as many ranks have.
    """
    shared: dict[int | None, dict[str, Value]] = {}
    for point in table.points:
        ranks = builds.get(point.build, {}).get("tp_size")
        known = shared.setdefault(ranks, dict(point.columns))
        for name in [name for name, value in known.items() if point.columns.get(name) != value]:
            del known[name]
    lost = []
    for item in table.lost:
        told = {} if item.ranks is None else {"tp_size": item.ranks}
        lost.append(replace(item, columns={**shared.get(item.ranks, told), **item.columns}))
    return replace(table, lost=tuple(lost))
