"""Texts of an export, made clean UTF-8.

Names come from other people's programs: paths in Latin-1, mojibake of Windows, cut characters.
DuckDB may end on text that is no UTF-8, so texts leave the export as bytes and are decoded here,
each distinct one once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import duckdb

from opkit.nsys_parsers.export import Columns


def load_strings(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Create table ``string(id, value)`` from ``StringIds``; empty when the export has none."""
    found: dict[int, str] = {}
    if {"id", "value"} <= columns.get("StringIds", frozenset()):
        rows = db.execute(
            "SELECT id::BIGINT, encode(value::VARCHAR) FROM export.StringIds"
        ).fetchall()
        found = {row[0]: decode(row[1]) for row in rows if row[0] is not None}
    write_texts(db, "string", found, value=found.values())


def clean_texts(db: duckdb.DuckDBPyConnection, table: str) -> None:
    """Create ``{table}_text(raw, text)`` for the distinct bytes in column ``raw`` of ``table``."""
    db.execute(
        f"""
        CREATE TABLE raw_text AS SELECT row_number() OVER () AS id, raw
        FROM (SELECT DISTINCT raw FROM {table} WHERE raw IS NOT NULL)
        """
    )
    rows = dict(db.execute("SELECT id, raw FROM raw_text").fetchall())
    write_texts(db, "clean_text", rows, text=map(decode, rows.values()))
    db.execute(
        f"CREATE TABLE {table}_text AS SELECT raw, text FROM raw_text JOIN clean_text USING (id)"
    )
    db.execute("DROP TABLE raw_text; DROP TABLE clean_text")


def decode(raw: bytes | None) -> str:
    """Text of these bytes; what is no UTF-8 becomes U+FFFD."""
    return "" if raw is None else raw.decode("utf-8", "replace")


def write_texts(
    db: duckdb.DuckDBPyConnection, table: str, ids: Iterable[int], **texts: Iterable[str]
) -> None:
    """Create ``table(id, …)`` from ids and as many texts.

    Through JSON: DuckDB looks for pandas once for every Python object that it is handed, which
    takes 0.1 ms each where there is none.
    """
    names = ", ".join(f"unnest(from_json(?, '[\"VARCHAR\"]')) AS {name}" for name in texts)
    db.execute(
        f"CREATE TABLE {table} AS SELECT unnest(from_json(?, '[\"BIGINT\"]')) AS id, {names}",
        [json.dumps(list(values)) for values in (ids, *texts.values())],
    )
