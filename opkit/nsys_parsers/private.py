"""Find what is private in an export: the look before a recording is published.

It knows the places where nsys keeps such things (``scrub`` knows what they look like) and opens any
SQLite file, so it also serves as the judge of what ``slim`` has made.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from opkit.errors import BadInput
from opkit.nsys_parsers.scrub import ENVIRONMENT, HOST, private_parts, without_versions

GZIP_MAGIC = b"\x1f\x8b"
SQLITE_MAGIC = b"SQLite format 3\x00"
MANIFEST = "OPKIT_MANIFEST"
META_TABLES = ("META_DATA_EXPORT", "EXPORT_META_DATA", "META_DATA_CAPTURE")
# Tables that tell of the machine and its other processes; no row of them may be published.
PRIVATE_TABLES = ("TARGET_INFO_SYSTEM_ENV", "ThreadNames", "TARGET_INFO_NIC_INFO")
PRIVATE_CELLS = {"TARGET_INFO_GPU": ("uuid", "busLocation"), "TARGET_INFO_CUDA_DEVICE": ("uuid",)}
NAME_KEYS = re.compile(r"EXPORT_(?:HOST|USER)|DEVICE_DISPLAY_NAME|PROCESS_\d+:USER_NAME")
NAME_VARIABLES = re.compile(r"(?:HOSTNAME|USER|LOGNAME|USERNAME|COMPUTERNAME)=\"?([^\"]+)\"?")
SHOWN = 80  # characters of a finding

Tables = dict[str, tuple[str, ...]]


def find_private(path: Path) -> list[str]:
    """Look for private things in every text cell of an export, plain or gzipped.

    Returns:
        One line a finding, as ``NVTX_EVENTS.text: absolute path '/home/me/x'``; empty when clean.

    Raises:
        BadInput: the file is not a readable SQLite file.
    """
    with tempfile.TemporaryDirectory(prefix="opkit-scan-") as scratch, reading(path):
        export = unpacked(path, Path(scratch))
        db = sqlite3.connect(f"{export.as_uri()}?mode=ro", uri=True)
        db.text_factory = decode
        with contextlib.closing(db):
            tables = table_columns(db, "main")
            names = machine_names(db, "main", tables)
            findings = [line for table in tables for line in _scan(db, table, tables[table], names)]
    return list(dict.fromkeys(findings))


def _scan(
    db: sqlite3.Connection, table: str, columns: tuple[str, ...], names: frozenset[str]
) -> Iterator[str]:
    if table in PRIVATE_TABLES:
        rows = db.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
        if rows:
            yield f"{table}: {rows} rows that describe the machine"
    if table in META_TABLES and {"name", "value"} <= set(columns):
        for key, value in db.execute(f'SELECT name, value FROM "{table}"'):
            if NAME_KEYS.fullmatch(str(key)) and value:
                yield f"{table}.{key}: {HOST} {str(value)[:SHOWN]!r}"
            elif "ENVIRONMENT" in str(key):
                yield f"{table}.{key}: {ENVIRONMENT} {str(value)[:SHOWN]!r}"
    for column in columns:
        where = f"WHERE typeof(\"{column}\") IN ('text', 'blob')"
        for (cell,) in db.execute(f'SELECT DISTINCT "{column}" FROM "{table}" {where} ORDER BY 1'):
            text = decode(cell) if isinstance(cell, bytes) else cell
            if column in PRIVATE_CELLS.get(table, ()) and text:
                yield f"{table}.{column}: identifies the device: {text[:SHOWN]!r}"
                continue
            if table == MANIFEST:
                text = without_versions(text)
            for kind, part in private_parts(text, names):
                yield f"{table}.{column}: {kind} {part[:SHOWN]!r}"


def machine_names(db: sqlite3.Connection, schema: str, tables: Tables) -> frozenset[str]:
    """Host and user names that an export tells of the machines it was recorded and exported on."""
    names: set[str] = set()
    for table in META_TABLES:
        if not {"name", "value"} <= set(tables.get(table, ())):
            continue
        for key, value in db.execute(f'SELECT name, value FROM {schema}."{table}"'):
            if NAME_KEYS.fullmatch(str(key)):
                names.add(str(value))
            elif found := NAME_VARIABLES.match(str(value)):
                names.add(found[1])
    if {"name", "value"} <= set(tables.get("TARGET_INFO_SYSTEM_ENV", ())):
        rows = db.execute(
            f"SELECT value FROM {schema}.TARGET_INFO_SYSTEM_ENV WHERE name = 'Hostname'"
        )
        names.update(str(value) for (value,) in rows)
    return frozenset(name.strip() for name in names if name)


def table_columns(db: sqlite3.Connection, schema: str) -> Tables:
    """Every table with its columns, in the file's order."""
    names = db.execute(f"SELECT name FROM {schema}.sqlite_master WHERE type = 'table'").fetchall()
    return {
        name: tuple(row[1] for row in db.execute(f'PRAGMA {schema}.table_info("{name}")'))
        for (name,) in names
        if not name.startswith("sqlite_")
    }


def decode(raw: bytes) -> str:
    """Text of a cell; nsys does not promise UTF-8."""
    return raw.decode("utf-8", "replace")


def unpacked(path: Path, scratch: Path) -> Path:
    """The SQLite file itself: ``path``, or what it holds gzipped, unpacked into ``scratch``.

    Raises:
        BadInput: no such file, a damaged gzip file, or no SQLite file.
    """
    if not path.is_file():
        raise BadInput(f"{path}: {'a folder, not a trace' if path.is_dir() else 'no such file'}")
    export = path.resolve()
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    if packed:
        export = scratch / "export.sqlite"
        try:
            with gzip.open(path) as source, export.open("wb") as out:
                shutil.copyfileobj(source, out)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BadInput(f"{path}: the gzip file is damaged ({error})") from error
    with export.open("rb") as file:
        if file.read(16) != SQLITE_MAGIC:
            raise BadInput(f"{path}: not an SQLite file")
    return export


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what SQLite or a pattern says into one sentence about ``path``."""
    try:
        yield
    except sqlite3.Error as error:
        raise BadInput(f"{path}: cannot be read or copied to its end ({error})") from error
