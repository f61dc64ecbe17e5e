"""Tables written from made rows, and read back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import duckdb
from made_rows import about

from opkit.collect.tables.write import Written, write_tables
from opkit.collect.work import Row
from opkit.layers.dsa import DSA


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_parquet(path: Path) -> list[dict[str, Any]]:
    found = duckdb.read_parquet(str(path))
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


def provenance(written: Written, table: str = "dsa_context_module") -> dict[str, Any]:
    (found,) = [item for item in written.tables if item.name == table]
    told: dict[str, Any] = json.loads(found.provenance.read_text())
    return told


def write(folder: Path, rows: list[Row], **changed: Any) -> Written:
    return write_tables(DSA, rows, about(**changed), folder)
