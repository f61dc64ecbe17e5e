"""Rows on disk: each process appends to a part of its own, readers merge all parts.

``parts/<host>-<pid>-<random>.jsonl`` holds one row a line. No file has two writers, so nothing is
locked and a folder on NFS is as good as a local one. A row counts once its line is complete: each
is one write and one fsync, so a crash costs at most the last line, which readers leave out.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from opkit.collect.work import Fault, Row, row_from_json
from opkit.errors import BadInput

FOLDER = "parts"
SUFFIX = ".jsonl"
# A full disk, a full quota, a file at its size limit: no later row will fit either.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class PartFailed(BadInput):
    """A row cannot be kept. The run must stop: what it measured next would be lost too."""


class Part:
    """The part that this process appends to. The file is made with the first row.

    Args:
        folder: the run's output folder.
    """

    def __init__(self, folder: Path) -> None:
        host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname()) or "host"
        name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        self.path = folder / FOLDER / name
        self._file = -1
        self._length = 0

    def append(self, row: Row) -> None:
        """Add a row; it is on the disk when this returns.

        Raises:
            PartFailed: it could not be written. What was written before is intact, and of this row
                nothing counts.
        """
        line = row.to_json().encode() + b"\n"
        try:
            if self._file < 0:
                self._file = self._create()
            written = os.write(self._file, line)
            if written < len(line):  # a disk that has become full takes what still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            self._withdraw()
            raise PartFailed(
                f"{self.path}: a row could not be written ({error.strerror or error})",
                hint="what was measured before is safe; free space, and collecting again goes on "
                "from there",
            ) from error
        self._length += len(line)

    def close(self) -> None:
        """Close the file; the part is complete at any time."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _create(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)

    def _withdraw(self) -> None:
        """Take back what was written of the last row."""
        if self._file >= 0:
            # Where even this fails a torn last line is left, which readers know.
            with suppress(OSError):
                os.ftruncate(self._file, self._length)


@dataclass(frozen=True)
class Failed:
    """A key that has failed and has no value: how, and how often it was tried in all."""

    fault: Fault
    error: str
    attempts: int


class Parts:
    """All parts of a folder, merged; :meth:`refresh` reads only what was added.

    Of rows of one key, one with a value beats one without; among equals the first by
    (created, name of the part) counts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.torn = 0
        self._offsets: dict[str, int] = {}
        self._lines: dict[str, int] = {}
        self._best: dict[str, tuple[bool, str, str, Row]] = {}
        self._attempts: dict[str, int] = {}

    @property
    def rows(self) -> dict[str, Row]:
        """The row that counts, of each key."""
        return {key: best[-1] for key, best in self._best.items()}

    def row(self, key: str) -> Row | None:
        """The row of ``key`` that counts."""
        best = self._best.get(key)
        return None if best is None else best[-1]

    def done(self, key: str) -> bool:
        """Whether the key has a value."""
        row = self.row(key)
        return row is not None and row.ok

    def failed(self) -> dict[str, Failed]:
        """The keys that were tried and have no value."""
        return {
            key: Failed(row.fault or Fault.ERROR, row.error, self._attempts[key])
            for key, row in self.rows.items()
            if not row.ok
        }

    def refresh(self, *, strict: bool = True) -> int:
        """Read what was added since the last time.

        Args:
            strict: False while others write: over NFS a line may be seen before all of its bytes,
                so an unreadable one is left for the next time.

        Returns:
            Rows read.

        Raises:
            BadInput: a complete line is no row (``strict``), or a part cannot be read.
        """
        read, torn = 0, 0
        for path in self._paths():
            try:
                text = self._added(path)
            except FileNotFoundError:  # tidied away since it was listed
                continue
            except OSError as error:
                raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
            complete, newline, rest = text.rpartition(b"\n")
            torn += bool(rest)
            if newline:
                read += self._take(path, complete, strict)
        self.torn = torn
        return read

    def _paths(self) -> Iterator[Path]:
        if self.folder.is_dir():
            names = sorted(entry.name for entry in os.scandir(self.folder))
            yield from (self.folder / name for name in names if name.endswith(SUFFIX))

    def _added(self, path: Path) -> bytes:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path.name, 0))
            return file.read()

    def _take(self, path: Path, complete: bytes, strict: bool) -> int:
        """Merge complete lines; return how many."""
        lines = complete.split(b"\n")
        for count, line in enumerate(lines):
            number = self._lines.get(path.name, 0) + 1
            try:
                row = row_from_json(line.decode(), f"{path}, line {number}")
            except (BadInput, UnicodeDecodeError) as error:
                if not strict:
                    return count
                if isinstance(error, BadInput):
                    raise
                raise BadInput(f"{path}, line {number}: not text ({error})") from error
            self._lines[path.name] = number
            self._offsets[path.name] = self._offsets.get(path.name, 0) + len(line) + 1
            self._merge(row, path.name)
        return len(lines)

    def _merge(self, row: Row, part: str) -> None:
        self._attempts[row.key] = self._attempts.get(row.key, 0) + row.attempts
        candidate = (not row.ok, row.created, part, row)
        if row.key not in self._best or candidate[:3] < self._best[row.key][:3]:
            self._best[row.key] = candidate


def read_parts(folder: Path) -> Parts:
    """All rows of a run's folder.

    Raises:
        BadInput: see :meth:`Parts.refresh`.
    """
    parts = Parts(folder)
    parts.refresh()
    return parts
