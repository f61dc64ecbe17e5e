"""The ledger: every verdict, with what it holds for. One SQLite row per phase of an alignment.

``opkit status`` shows it and collection asks it for admission, so what a verdict depends on is a
column of its own, not only a part of the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opkit.align.result import AlignResult, Outcome, PhaseResult
from opkit.align.result_json import align_from_json, align_json
from opkit.errors import BadInput
from opkit.layers.op import Phase

TABLE = "verdict"
FORMAT = 1  # PRAGMA user_version of the file
# Another process writes for milliseconds; who waits longer waits for something that hangs.
BUSY_TIMEOUT_S = 30.0
_ELSEWHERE = "--out names another folder"
# The key of a backend's version in the provenance, where it is not the backend's own name.
FRAMEWORKS = {"trtllm": "tensorrt_llm"}


@dataclass(frozen=True)
class LedgerEntry:
    """The verdict on one phase, and all it holds for.

    Attributes:
        id: the alignment, as ``dsa-20261121-103000-ab12cd``; its phases share it.
        created: when it was recorded, UTC, ISO 8601.
        framework, nsys, opkit: versions; empty when unknown.
        dtypes, layer_source, policy: JSON objects as text, their keys as the manifest has them.
        layer_digest, policy_digest: SHA-256 of the two, keys sorted: equal means equal.
        files: JSON list of the compared files with their SHA-256.
        method: how the engine's regions were found; empty when none were.
        attributed: share of the kernels that a launch and a range explain, 0 to 1.
        report_dir: folder of the report, or empty.
        result: the whole alignment (JSON text).
    """

    id: str
    phase: str
    op: str
    backend: str
    verdict: str
    created: str
    gpu: str
    framework: str
    nsys: str
    opkit: str
    architecture: str
    tp_size: int
    dtypes: str
    layer_source: str
    layer_digest: str
    policy: str
    policy_digest: str
    files: str
    method: str
    attributed: float
    report_dir: str
    result: str

    @property
    def passed(self) -> bool:
        """Whether the phase passed."""
        return self.verdict == Outcome.PASS

    @property
    def short(self) -> str:
        """The id's last part, ``ab12cd``: enough to name it by, but for rare twins."""
        return self.id.rsplit("-", 1)[-1]

    def as_json(self) -> dict[str, Any]:
        """All of it but the whole alignment, as JSON-ready data with ``short``."""
        plain = {name: value for name, value in vars(self).items() if name != "result"}
        return plain | {name: json.loads(plain[name]) for name in _DATA} | {"short": self.short}

    def alignment(self) -> AlignResult:
        """The whole alignment that the entry belongs to."""
        return align_from_json(json.loads(self.result), f"ledger entry {self.id}")


_DATA = ("dtypes", "layer_source", "policy", "files")  # columns that hold JSON
_TYPES: dict[str, type] = {"tp_size": int, "attributed": float}
_COLUMNS: dict[str, Any] = {
    field.name: _TYPES.get(field.name, str) for field in fields(LedgerEntry)
}


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """Verdicts in an SQLite file, made when missing; several processes may use it at once.

    Args:
        path: the file.
        now: the clock (UTC).
    """

    def __init__(self, path: Path, now: Callable[[], datetime] = _utc_now) -> None:
        self.path = path
        self._now = now

    def record(self, result: AlignResult, report_dir: Path | None = None) -> str:
        """Add an alignment, one row for each of its phases.

        Returns:
            The id of the alignment.

        Raises:
            BadInput: the file is no ledger or cannot be written, or the result has no phase.
        """
        if not result.phases:
            raise BadInput(f"{result.op}: an alignment without phases is nothing to record")
        data = align_json(result)
        now = self._now()
        digest = _digest(data)[:6]
        name = f"{result.op}-{now:%Y%m%d-%H%M%S}-{digest}"
        shared = _shared_columns(result) | {
            "id": name,
            "created": now.isoformat(timespec="seconds"),
            "report_dir": str(report_dir or ""),
            "result": json.dumps(data),
        }
        rows = [shared | _phase_columns(phase) for phase in result.phases]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"{self.path.parent}: cannot be written ({error.strerror})", _ELSEWHERE
            ) from error
        # Imported by who writes: it loads numpy where that is, which takes longer than reading.
        from sqlite_utils import Database

        with self._open() as connection, _write(connection):
            # Recorded twice within a second is recorded once.
            Database(connection).table(TABLE).insert_all(rows, replace=True)
        return name

    def try_out(self) -> None:
        """See that a verdict could be recorded, before one is worked for; nothing is left behind.

        Raises:
            BadInput: the folder cannot be made or written, or the file is no ledger.
        """
        folder = self.path.parent
        try:
            if self.path.exists():
                with self._open() as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.rollback()
            # The folder itself is made by who has something to put into it.
            there = next(
                parent for parent in (folder, *folder.absolute().parents) if parent.exists()
            )
            os.rmdir(tempfile.mkdtemp(prefix=".opkit-", dir=there))
        except OSError as error:
            raise BadInput(f"{folder}: cannot be written ({error.strerror})", _ELSEWHERE) from error

    def entries(
        self,
        op: str | None = None,
        *,
        phase: Phase | str | None = None,
        backend: str | None = None,
        gpu: str | None = None,
        verdict: Outcome | str | None = None,
        limit: int | None = None,
    ) -> list[LedgerEntry]:
        """Entries that agree with all that is given, newest first; none when there is no file yet.

        Raises:
            BadInput: the file is no ledger.
        """
        if not self.path.exists():
            return []
        asked = {"op": op, "phase": phase, "backend": backend, "gpu": gpu, "verdict": verdict}
        given = {column: str(value) for column, value in asked.items() if value is not None}
        where = " AND ".join(f"{column} = :{column}" for column in given) or "TRUE"
        order = f"ORDER BY created DESC, rowid DESC LIMIT {-1 if limit is None else limit}"
        with self._open() as connection:
            connection.row_factory = sqlite3.Row
            rows = connection.execute(f"SELECT * FROM {TABLE} WHERE {where} {order}", given)
            return [LedgerEntry(**row) for row in rows]

    def latest(
        self, op: str, phase: Phase | str, *, backend: str | None = None, gpu: str | None = None
    ) -> LedgerEntry | None:
        """The newest entry of an op's phase, or None."""
        found = self.entries(op, phase=phase, backend=backend, gpu=gpu, limit=1)
        return found[0] if found else None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The file with its table made; its own errors as one sentence."""
        with contextlib.ExitStack() as stack:
            try:
                connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
                stack.callback(connection.close)
                _prepare(connection, self.path)
                yield connection
            except sqlite3.OperationalError as error:
                raise BadInput(
                    f"{self.path}: the ledger cannot be used ({error})", _ELSEWHERE
                ) from error
            except sqlite3.DatabaseError as error:
                raise BadInput(
                    f"{self.path}: not an opkit ledger ({error})",
                    "move the file away; a new ledger is made by the next `opkit align`",
                ) from error


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    tables = [name for (name,) in names]
    if version == FORMAT and TABLE in tables:
        return
    if tables and version != FORMAT:
        raise BadInput(f"{path}: an SQLite file, but not an opkit ledger of format {FORMAT}")
    from sqlite_utils import Database

    db = Database(connection)
    with _write(connection):
        db.table(TABLE).create(_COLUMNS, pk=("id", "phase"), if_not_exists=True)
        db.table(TABLE).create_index(["op", "phase", "created"], if_not_exists=True)
        db.execute(f"PRAGMA user_version = {FORMAT}")


@contextlib.contextmanager
def _write(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction that takes the write lock at once, so that a second writer waits its turn."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        yield


def _phase_columns(phase: PhaseResult) -> dict[str, Any]:
    return {
        "phase": str(phase.phase),
        "verdict": str(phase.verdict),
        "method": str(phase.method or ""),
        "attributed": phase.attributed,
    }


def _shared_columns(result: AlignResult) -> dict[str, Any]:
    known = result.provenance
    versions = known.get("versions") or {}
    policy, layer_source = known.get("policy") or {}, known.get("layer_source") or {}
    return {
        "op": result.op,
        "backend": result.backend,
        "gpu": str(known.get("gpu") or ""),
        "framework": str(versions.get(FRAMEWORKS.get(result.backend, result.backend)) or ""),
        "nsys": str(versions.get("nsys") or ""),
        "opkit": str(versions.get("opkit") or ""),
        "architecture": str((known.get("model") or {}).get("architecture") or ""),
        "tp_size": int(known.get("tp_size") or 1),
        "dtypes": json.dumps(known.get("dtypes") or {}),
        "layer_source": json.dumps(layer_source),
        "layer_digest": _digest(layer_source),
        "policy": json.dumps(policy),
        "policy_digest": _digest(policy),
        "files": json.dumps(known.get("files") or []),
    }


def _digest(data: Any) -> str:
    """SHA-256 of the JSON with keys sorted: that of equal data is equal."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
