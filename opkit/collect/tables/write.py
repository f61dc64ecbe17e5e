"""Perf tables: rows in, the field's CSV and parquet out, with a provenance file beside each.

``<table>_perf.txt`` is the CSV of the field's collector, ``<table>_perf.parquet`` what
aiconfigurator loads, ``collection_meta.yaml`` what it wants to know of them,
``<table>_perf.provenance.json`` how every number was obtained. docs/tables.md has all columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit.collect.tables.bound import peaks_of
from opkit.collect.tables.files import (
    META,
    Cell,
    digest_of,
    merged_meta,
    owned_digests,
    staged,
    write_csv,
    write_parquet,
)
from opkit.collect.tables.latency import choose
from opkit.collect.tables.provenance import (
    About,
    Entry,
    Head,
    meta_entry,
    provenance_text,
    spread_of,
)
from opkit.collect.tables.validate import OVERRIDABLE, Line, Problem, Value, is_text, validate
from opkit.collect.timing.stats import median
from opkit.collect.work import Row
from opkit.errors import BadInput
from opkit.layers.op import Op, Table, case_from_json

COMMON = ("framework", "version", "device", "op_name", "kernel_source")
POWER = {"power": "DOUBLE", "power_limit": "DOUBLE"}
# Columns of opkit's own; the field's reader passes over them.
EXTRA = {
    "elapsed_ms": "DOUBLE",
    "gpu_ms": "DOUBLE",
    "spread": "DOUBLE",
    "samples": "BIGINT",
    "launch_mode": "VARCHAR",
    "pacing": "VARCHAR",
    "sm_mhz": "BIGINT",
    "flags": "VARCHAR",
    "kernel": "VARCHAR",
    "verdict": "VARCHAR",
}
WAIVED = "waived"
COMPLETE, PARTIAL = "complete", "partial"


@dataclass(frozen=True)
class TableFiles:
    """One table as it was written.

    Attributes:
        name: of the table.
        rows: written.
        status: ``complete``, or ``partial`` when a planned row is missing.
        csv, parquet, provenance: the files.
    """

    name: str
    rows: int
    status: str
    csv: Path
    parquet: Path
    provenance: Path


@dataclass(frozen=True)
class Written:
    """What became of a collection's rows.

    Attributes:
        tables: those that were written; one without a sound row is not.
        problems: what validation found, hard ones first in each table.
        unbounded: why rows were not held against the least possible time, with their number.
    """

    tables: tuple[TableFiles, ...]
    problems: tuple[Problem, ...]
    unbounded: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether there is a table, and no problem keeps a row out of one."""
        return bool(self.tables) and not any(problem.hard for problem in self.problems)


def check_folder(op: Op, backend: str, head: Head, folder: Path) -> None:
    """Make sure, before anything is measured, that the op's tables may be written.

    Raises:
        BadInput: a file there is not opkit's, or of another framework version.
    """
    for table in op.tables.values():
        csv, parquet, told = _names(table)
        owned_digests(folder, (csv, parquet), told, force=False)
    merged_meta(folder, _runtime(backend, head), {}, force=False)


def _names(table: Table) -> tuple[str, str, str]:
    """Names of a table's CSV, parquet and provenance file."""
    stem = f"{table.name}_perf"
    return f"{stem}.txt", f"{stem}.parquet", f"{stem}.provenance.json"


def _runtime(backend: str, head: Head) -> dict[str, str]:
    return {"framework": backend, "version": head.version}


def write_tables(
    op: Op, rows: Iterable[Row], about: About, folder: Path, *, force: bool = False
) -> Written:
    """Validate rows and write the tables they belong to, and no other file.

    Args:
        op: what was collected; its ``tables`` say what is written.
        rows: of one collection, with a value or without.
        about: what they share.
        folder: where to; made when missing.
        force: replace files that opkit did not write.

    Raises:
        BadInput: a file is not opkit's, the folder cannot be written, or a row belongs to no table
            of the op.
    """
    tables = {table.name: table for table in op.tables.values()}
    by_table: dict[str, list[Row]] = {name: [] for name in tables}
    for row in rows:
        # One whose worker was lost, or that has no columns, never came to name its table.
        name = row.table if row.ok or row.table else op.table(case_from_json(row.case)).name
        if name not in tables:
            raise BadInput(f"row {row.key} is of table {name!r}, which {op.name} has not")
        by_table[name].append(row)
    written, problems = [], []
    unbounded: Counter[str] = Counter()
    for name, found in by_table.items():
        if found or about.planned.get(name):
            made = _Made(op, tables[name], found, about, unbounded)
            problems += made.problems
            if made.entries:
                written.append(made.write(folder, force=force))
    return Written(tuple(written), tuple(problems), dict(unbounded))


class _Made:
    """One table: its rows validated, its problems found."""

    def __init__(
        self, op: Op, table: Table, rows: Sequence[Row], about: About, unbounded: Counter[str]
    ) -> None:
        self.op, self.table, self.rows, self.about = op, table, rows, about
        self.failed = [row for row in rows if not row.ok]
        made = [self._entry(row, unbounded) for row in rows if row.ok]
        self.problems = validate(
            table,
            [_line(entry) for entry in made],
            planned=about.planned.get(table.name),
            failed=len(self.failed),
        )
        out = {problem.key for problem in self.problems if problem.hard}
        kept = [_flagged(entry, self.problems) for entry in made if entry.row.key not in out]
        self.entries = sorted(kept, key=self._place)

    def _place(self, entry: Entry) -> tuple[Value, ...]:
        """Where a row stands in the table."""
        names = (*OVERRIDABLE, *self.table.columns)
        return tuple(entry.row.columns.get(name, "") for name in names)

    def _entry(self, row: Row, unbounded: Counter[str]) -> Entry:
        assert row.measurement is not None
        chosen = choose(row.measurement, self.about.latency)
        bound = self._bound(row)
        if isinstance(bound, str):
            unbounded[bound] += 1
        waived = [WAIVED] if self.about.waiver else []
        flags = (*map(str, chosen.flags), *waived, *self.about.flags.get(row.key, ()))
        return Entry(row, chosen, None if isinstance(bound, str) else bound, flags)

    def _bound(self, row: Row) -> float | str:
        """The least possible time of a row, milliseconds, or why it is not known."""
        if self.op.work is None:
            return f"the work of {self.op.name} is not counted"
        device = str(row.gpu.get("name") or self.about.head.device)
        peaks = peaks_of(device)
        if peaks is None:
            return f"the peaks of {device} are not known"
        manifest = self.about.manifests.get(row.build)
        if manifest is None:
            return f"build {row.build or '?'} left no manifest"
        assert row.measurement is not None
        flops, least_bytes = self.op.work(case_from_json(row.case), manifest)
        dtypes = [
            str(value)
            for name, value in row.columns.items()
            if name.endswith("type") and not name.startswith("kv_cache")
        ]
        cold = row.measurement.timing.l2 == "cold"
        return peaks.bound_ms(flops, least_bytes, dtypes, cold=cold)

    @property
    def status(self) -> str:
        """Whether every planned row is written."""
        planned = max(len(self.rows), self.about.planned.get(self.table.name, 0))
        return COMPLETE if len(self.entries) == planned else PARTIAL

    def types(self) -> dict[str, str]:
        """DuckDB's type of each column, in the order in which they are written."""
        own = {name: "VARCHAR" if is_text(name) else "BIGINT" for name in self.table.columns}
        power = any(e.row.measurement and e.row.measurement.power for e in self.entries)
        return {
            **dict.fromkeys(COMMON, "VARCHAR"),
            **own,
            "latency": "DOUBLE",
            **(POWER if power else {}),
            **EXTRA,
        }

    def write(self, folder: Path, *, force: bool) -> TableFiles:
        """Write the table's files."""
        stem = f"{self.table.name}_perf"
        csv, parquet, told = _names(self.table)
        head, types = self.about.head, self.types()
        replaced = owned_digests(folder, (csv, parquet), told, force=force)
        runtime = _runtime(self.about.backend, head)
        told_of = meta_entry(self.rows, self.about, self.status, len(self.entries))
        meta = merged_meta(folder, runtime, {stem: told_of}, force=force)
        with staged(folder) as stage:
            # First, so that it knows these files and those before wherever this is cut off.
            stage.path(told)
            write_csv(stage.path(csv), list(types), (self._cells(e, types) for e in self.entries))
            write_parquet(stage.path(csv), stage.path(parquet), types)
            digests = {name: digest_of(stage.path(name)) for name in (csv, parquet)}
            text = provenance_text(
                self.table.name, self.about, self.entries, self.failed, self.problems,
                op=self.op.name, status=self.status, files=digests, replaced=replaced,
            )  # fmt: skip
            stage.write(told, text)
            stage.write(META, meta)
        return TableFiles(
            self.table.name, len(self.entries), self.status,
            folder / csv, folder / parquet, folder / told,
        )  # fmt: skip

    def _cells(self, entry: Entry, types: Iterable[str]) -> list[Cell]:
        """The row's values in the order of the columns."""
        measured = entry.row.measurement
        assert measured is not None
        power = measured.power
        head = self.about.head
        values: dict[str, Cell] = {
            "framework": head.framework,
            "version": head.version,
            "device": head.device,
            "op_name": self.table.name,
            "kernel_source": self.table.kernel_source.get(self.about.backend, ""),
            **entry.row.columns,
            "latency": entry.chosen.ms,
            "power": power.watts if power else None,
            "power_limit": power.limit_watts if power else None,
            "elapsed_ms": median(measured.elapsed_ms) if measured.elapsed_ms else None,
            "gpu_ms": median(measured.gpu_ms) if measured.gpu_ms else None,
            "spread": spread_of(entry.chosen.samples),
            "samples": len(entry.chosen.samples),
            "launch_mode": str(measured.launch),
            "pacing": measured.timing.pacing,
            "sm_mhz": measured.after.sm_mhz or measured.before.sm_mhz,
            "flags": ";".join(entry.flags),
            "kernel": measured.kernels[0].name if measured.kernels else "",
            "verdict": self.about.verdict,
        }
        return [values[name] for name in types]


def _line(entry: Entry) -> Line:
    measured = entry.row.measurement
    assert measured is not None
    samples = (*measured.elapsed_ms, *measured.gpu_ms)
    return Line(
        key=entry.row.key,
        columns=entry.row.columns,
        latency=entry.chosen.ms if all(map(math.isfinite, samples)) else math.nan,
        spread=spread_of(entry.chosen.samples),
        elapsed=median(measured.elapsed_ms) if measured.elapsed_ms else None,
        gpu=median(measured.gpu_ms) if measured.gpu_ms else None,
        bound=entry.bound_ms,
    )


def _flagged(entry: Entry, problems: Sequence[Problem]) -> Entry:
    """The entry with the flags of the soft problems that it has."""
    found = [str(p.rule) for p in problems if p.key == entry.row.key and not p.hard]
    flags = tuple(dict.fromkeys((*entry.flags, *found)))
    return Entry(entry.row, entry.chosen, entry.bound_ms, flags)
