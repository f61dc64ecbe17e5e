"""Table files: CSV, parquet and ``collection_meta.yaml``, each replaced in one step, never someone
else's.

Whose a file is, is told by the provenance file beside it, which holds the digests of what opkit
wrote; of ``collection_meta.yaml``, by its first line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import yaml

from opkit.errors import BadInput

PROVENANCE_SCHEMA = "opkit.provenance/1"
META = "collection_meta.yaml"
META_HEADER = "# Written by opkit; collecting again writes it anew.\n"

Cell = str | int | float | None


class Stage:
    """Files on their way into a folder: under hidden names until all of them are complete.

    Args:
        folder: where they belong; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._mark = f"{os.getpid()}-{secrets.token_hex(4)}"

    def path(self, name: str) -> Path:
        """Where to write the file ``name``; files are put in place in the order of these calls."""
        return self._files.setdefault(name, self.folder / f".{name}.{self._mark}")

    def write(self, name: str, text: str) -> None:
        """Write a whole text file."""
        self.path(name).write_text(text, encoding="utf-8")

    def put(self) -> None:
        """Put all files in place: each in one step, and on the disk when this returns."""
        for path in self._files.values():
            _sync(path)
        for name, path in self._files.items():
            os.replace(path, self.folder / name)
        _sync(self.folder)

    def drop(self) -> None:
        """Remove what is not in place."""
        for path in self._files.values():
            with suppress(FileNotFoundError):
                path.unlink()


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """A stage whose files are put in place when the block ends, and dropped when it fails.

    Raises:
        BadInput: the folder cannot be written, or the disk is full.
    """
    stage = Stage(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield stage
        stage.put()
    except (OSError, duckdb.IOException) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{folder}: tables cannot be written there ({reason})") from error
    finally:
        stage.drop()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Write rows as the field's collector does: Python's own CSV dialect, a header first."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_parquet(source: Path, target: Path, types: Mapping[str, str]) -> None:
    """Turn a CSV of :func:`write_csv` into parquet.

    Args:
        source: the CSV.
        target: the parquet file.
        types: DuckDB's type of each column, in order: VARCHAR, BIGINT or DOUBLE. An empty cell
            becomes an empty text, and NULL in a column of numbers.
    """
    texts = [name for name, kind in types.items() if kind == "VARCHAR"]
    with duckdb.connect() as db:
        db.read_csv(
            str(source),
            header=True,
            sep=",",
            quotechar='"',
            escapechar='"',
            auto_detect=False,
            columns=dict(types),
            force_not_null=texts,
        ).write_parquet(str(target), compression="zstd")


def read_provenance(path: Path) -> dict[str, Any] | None:
    """A provenance file of opkit's; None when there is none, or it is something else."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("schema") != PROVENANCE_SCHEMA:
        return None
    return data


def owned_digests(folder: Path, names: Sequence[str], provenance: str, *, force: bool) -> list[str]:
    """Make sure that files may be replaced.

    Args:
        folder: where they are.
        names: of the files.
        provenance: name of the provenance file that tells whose they are.
        force: replace them whoever wrote them.

    Returns:
        The digests of the files that will be replaced.

    Raises:
        BadInput: one of them was not written by opkit, or was changed since.
    """
    known = read_provenance(folder / provenance) or {}
    ours = {*known.get("files", {}).values(), *known.get("replaced", ())}
    if not known and (folder / provenance).exists() and not force:
        raise _not_ours(folder / provenance)
    found = []
    for name in names:
        path = folder / name
        if path.exists():
            found.append(digest_of(path))
            if found[-1] not in ours and not force:
                raise _not_ours(path)
    return found


def _not_ours(path: Path) -> BadInput:
    return BadInput(
        f"{path}: not as opkit wrote it, so it is not overwritten",
        "move it away, or choose another folder",
    )


def merged_meta(
    folder: Path,
    runtime: Mapping[str, str],
    tables: Mapping[str, Mapping[str, Any]],
    *,
    force: bool,
) -> str:
    """The text of ``collection_meta.yaml`` with ``tables`` added to what stands there.

    Args:
        folder: where it is.
        runtime: framework (lower case) and version.
        tables: what is to be said of each, by file name without suffix.
        force: replace a file that opkit did not write, or that is of another version.

    Raises:
        BadInput: the file is not opkit's, or of another framework version.
    """
    path = folder / META
    known: dict[str, Any] = {}
    if path.exists():
        text = path.read_text("utf-8")
        if text.startswith(META_HEADER):
            known = yaml.safe_load(text)
        elif not force:
            raise _not_ours(path)
    if known and known["runtime"] != dict(runtime):
        if not force:
            was = " ".join(known["runtime"].values())
            raise BadInput(
                f"{path}: holds tables of {was}, not of {' '.join(runtime.values())}",
                f"move {folder} away, or choose another folder",
            )
        known = {}
    kept = {
        name: told
        for name, told in known.get("tables", {}).items()
        if (folder / f"{name}.parquet").exists()
    }
    return meta_text(runtime, {**kept, **tables})


def meta_text(runtime: Mapping[str, str], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a ``collection_meta.yaml`` of schema 1, as aiconfigurator 0.12.0 checks it."""
    data = {
        "schema_version": 1,
        "provenance": "collected",
        "runtime": dict(runtime),
        "tables": {name: dict(tables[name]) for name in sorted(tables)},
    }
    return META_HEADER + yaml.safe_dump(data, sort_keys=False)
