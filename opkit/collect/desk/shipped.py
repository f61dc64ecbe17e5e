"""Another perf table beside a collection's: the rows that the field ships, joined by their columns.

``opkit verify --shipped`` asks such a table for a few shapes
(:func:`opkit.collect.fidelity.shipped_latencies`); a collection has hundreds of rows, so the table
is read once here, and answered from by the same rule: the mean where a shape stands there more than
once, and linearly between two steps of one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection as Names
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from opkit.collect.desk.point import NAMES, Point
from opkit.collect.fidelity import between
from opkit.collect.tables.validate import Value
from opkit.errors import BadInput

_SUFFIXES = ("_perf.parquet", "_perf.txt", ".parquet", ".txt", ".csv")
# Columns that do not decide which row is meant: names for people, the ranks (heads are a rank's
# own), and those that only opkit writes.
_APART = (*NAMES, "tp_size", "module")
_STEP = "step"


@dataclass(frozen=True)
class Shipped:
    """A table beside the collection's.

    Attributes:
        path: the file.
        table: name of the collection's table that it stands beside.
        names: columns that rows are joined by.
        rows: of the file.
        shapes: those that differ, a mean where several rows are of one.
        latencies: milliseconds: by the values of ``names`` but ``step``, pairs of step and latency
            in order of step (step 0 for tables that have none).
        versions: frameworks and versions that it names.
        devices: GPUs that it names.
    """

    path: Path
    table: str
    names: tuple[str, ...]
    rows: int
    shapes: int
    latencies: Mapping[tuple[Value, ...], tuple[tuple[float, float], ...]]
    versions: tuple[str, ...]
    devices: tuple[str, ...]

    def of(self, columns: Mapping[str, Value]) -> float | None:
        """What it says of a row, milliseconds; None where it has no such shape."""
        place = self.latencies.get(self._place(columns), ())
        return between(place, int(columns.get(_STEP, 0)))

    def _place(self, columns: Mapping[str, Value]) -> tuple[Value, ...]:
        return tuple(columns[name] for name in self.names if name != _STEP)


def read_shipped(path: Path, tables: Mapping[str, Sequence[Point]]) -> Shipped:
    """Read a perf table that stands beside one of a collection's.

    Args:
        path: parquet, or the field's CSV.
        tables: the collection's rows, by table.

    Raises:
        BadInput: it cannot be read, or is no table of these.
    """
    with duckdb.connect() as db:
        try:
            text = path.suffix in (".txt", ".csv")
            found = db.read_csv(str(path)) if text else db.read_parquet(str(path))
            columns = list(found.columns)
            table = _table_of(path, found if "op_name" in columns else None, tables)
            own = tables[table][0].columns
            names = tuple(name for name in own if name not in _APART)
            missing = [name for name in (*names, "latency") if name not in columns]
            if missing:
                raise BadInput(f"{path}: no column {', '.join(missing)}: it is no table of {table}")
            groups = ", ".join(f'"{name}"' for name in names)
            rows = found.aggregate(f"{groups}, avg(latency)", groups).fetchall()
            told = [_distinct(found, name) for name in ("framework", "version", "device")
                    if name in columns]  # fmt: skip
            total = len(found)
        except (duckdb.Error, OSError) as error:
            raise BadInput(f"{path}: not a readable perf table ({error})") from error
    latencies: dict[tuple[Value, ...], list[tuple[float, float]]] = defaultdict(list)
    for *values, ms in rows:
        known = dict(zip(names, values, strict=True))
        step = float(known.pop(_STEP, 0))
        latencies[tuple(known.values())].append((step, float(ms)))
    return Shipped(
        path, table, names, total, len(rows),
        {place: tuple(sorted(steps)) for place, steps in latencies.items()},
        versions=tuple(" ".join(pair) for pair in zip(*told[:2], strict=False)) if told else (),
        devices=told[2] if len(told) > 2 else (),
    )  # fmt: skip


def _table_of(path: Path, found: duckdb.DuckDBPyRelation | None, tables: Names[str]) -> str:
    """The collection's table that a file is beside: by its name, else by its column op_name."""
    stem = next((path.name.removesuffix(s) for s in _SUFFIXES if path.name.endswith(s)), path.name)
    if stem in tables:
        return stem
    names = _distinct(found, "op_name") if found is not None else ()
    if len(names) == 1 and names[0] in tables:
        return names[0]
    told = f" (its rows are of {', '.join(names)})" if names else ""
    raise BadInput(f"{path}: beside none of the tables {', '.join(tables)}{told}")


def _distinct(found: duckdb.DuckDBPyRelation, name: str) -> tuple[str, ...]:
    return tuple(str(value) for (value,) in found.unique(f'"{name}"').order(name).fetchall())
