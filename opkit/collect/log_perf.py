"""``log_perf`` for those who come from the field's collector: same call, same CSV, no lock file.

Each process appends to a part of its own, ``<perf_filename>.<host>-<pid>.part``, so writers never
meet, on NFS neither. The one file that users expect is made of all parts when a process that logged
ends, and by :func:`merge_perf`. Parts stay: a merge that is repeated adds nothing twice.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from opkit.collect.tables.files import staged
from opkit.errors import BadInput, OpkitError

COMMON = ("framework", "version", "device", "op_name", "kernel_source")
POWER = ("power", "power_limit")
MEASURED = ("latency", *POWER)  # the other columns tell rows apart
SUFFIX = ".part"
END = "\r\n"  # as Python's csv module ends lines, and so the field's collector
# Merges in a row while others go on logging; they merge once more when they end.
_LOOKS = 10
_EXIT_PRIORITY = 0  # after the finalizers of the program itself


def log_perf(
    item_list: Sequence[Mapping[str, Any]],
    framework: str,
    version: str,
    device_name: str,
    op_name: str,
    kernel_source: str,
    perf_filename: str,
    power_stats: Mapping[str, Any] | None = None,
) -> bool:
    """Append rows, as the field's ``log_perf`` does. On the disk when this returns.

    Args:
        item_list: rows: the table's columns and ``latency``, the same columns in each.
        framework, version, device_name, op_name, kernel_source: the common columns.
        perf_filename: the CSV that all processes together are to make.
        power_stats: with ``power`` and ``power_limit``, watts.

    Returns:
        True.

    Raises:
        BadInput: columns differ between rows or from what was logged before, or the disk is full;
            nothing of the call is written then.
    """
    if not item_list:
        return True
    common = dict(zip(COMMON, (framework, version, device_name, op_name, kernel_source),
                      strict=True))  # fmt: skip
    power = {name: power_stats.get(name, "") for name in POWER} if power_stats else {}
    header = list({**common, **item_list[0], **power})
    rows = []
    for item in item_list:
        row = {**common, **item, **power}
        if list(row) != header and set(row) != set(header):
            raise BadInput(f"{perf_filename}: rows with other columns: {', '.join(row)}")
        rows.append(["" if row[name] is None else str(row[name]) for name in header])
    if any(mark in cell for row in rows for cell in row for mark in "\r\n"):
        raise BadInput(f"{perf_filename}: a value has more than one line")
    _writer_of(perf_filename).append(header, rows)
    return True


@dataclass(frozen=True)
class Merged:
    """What a merge found.

    Attributes:
        path: the merged file.
        rows: in it.
        parts: files they came from, beside the merged one itself.
        torn: lines that a killed writer left incomplete; they are dropped.
        duplicates: rows beyond the first of their columns but the measured ones; all are kept.
    """

    path: Path
    rows: int
    parts: int
    torn: int
    duplicates: int


def merge_perf(perf_filename: str | os.PathLike[str], *, remove_parts: bool = False) -> Merged:
    """Merge all parts into ``perf_filename``, beside what it holds already, in one step.

    Lines that are equal in every byte are one row, so merging again, or by several processes at
    once, changes nothing. Whoever merges looks again afterwards, and merges again when a part has
    grown, so that the last of several to write has seen everything.

    Args:
        perf_filename: as given to :func:`log_perf`.
        remove_parts: remove the parts then. Only when every writer has ended: what a process still
            writes into a removed part is lost.

    Raises:
        BadInput: headers differ, there is nothing to merge, or a file cannot be read or written.
    """
    target = Path(perf_filename).absolute()
    try:
        for _ in range(_LOOKS):
            seen = _state(target)
            merged = _merge(target, [path for path, _ in seen])
            if _state(target) == seen:
                break
        if remove_parts:
            for path, _ in seen:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"{target}: cannot be merged ({error.strerror or error})") from error
    return merged


def _state(target: Path) -> list[tuple[Path, int]]:
    """The parts and their sizes."""
    own = re.compile(re.escape(target.name) + r"\..+-\d+(\.[0-9a-f]+)?" + re.escape(SUFFIX))
    found = [path for path in target.parent.iterdir() if own.fullmatch(path.name)]
    return sorted((path, path.stat().st_size) for path in found)


def _merge(target: Path, parts: list[Path]) -> Merged:
    sources = [*([target] if target.exists() else []), *parts]
    header, torn = "", 0
    lines: dict[str, None] = {}
    for path in sources:
        *whole, rest = path.read_bytes().decode("utf-8").split("\n")
        torn += bool(rest)
        if not whole:
            continue
        first, *found = (line.removesuffix("\r") for line in whole)
        header = header or first
        if first != header:
            raise BadInput(
                f"{path}: has columns {first}, others of {target.name} have {header}",
                "rows with and without power cannot be in one file; move one of them away",
            )
        width = len(_cells(header))
        sound = [line for line in found if len(_cells(line)) == width]
        torn += len(found) - len(sound)
        lines.update(dict.fromkeys(sound))
    if not header:
        raise BadInput(f"{target}: nothing was logged")
    with staged(target.parent) as stage:
        text = "".join(line + END for line in (header, *lines))
        stage.path(target.name).write_bytes(text.encode())
    return Merged(target, len(lines), len(parts), torn, _duplicates(header, list(lines)))


def _cells(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def _duplicates(header: str, lines: list[str]) -> int:
    """Rows that share all columns but the measured ones with one before."""
    own = [place for place, name in enumerate(_cells(header)) if name not in MEASURED]
    keys = {tuple(cells[place] for place in own) for cells in map(_cells, lines)}
    return len(lines) - len(keys)


class _Writer:
    """The part of this process for one file. Threads take turns."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._turn = threading.Lock()
        self._file = -1
        self._length = 0
        self._header: list[str] = []

    def append(self, header: list[str], rows: list[list[str]]) -> None:
        """Add rows in one write; all of them, or none."""
        with self._turn:
            if self._header and header != self._header:
                raise BadInput(
                    f"{self._target}: columns {', '.join(header)}, but {', '.join(self._header)} "
                    "were logged before",
                    "measure with the same settings, or log to another file",
                )
            text = io.StringIO()
            csv.writer(text, lineterminator=END).writerows(
                rows if self._header else [header, *rows]
            )
            try:
                self._append(text.getvalue().encode())
            except OSError as error:
                reason = error.strerror or error
                raise BadInput(f"{self._target}: cannot be written ({reason})") from error
            self._header = header

    def _append(self, data: bytes) -> None:
        if self._file < 0:
            self._file = self._create()
        try:
            if os.write(self._file, data) < len(data):  # what still fits on a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):  # a torn line is left, which the merge drops
                os.ftruncate(self._file, self._length)
            raise
        self._length += len(data)

    def _create(self) -> int:
        """A new part; where another process of this name and number was before, a further one."""
        host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host"
        name = f"{self._target.name}.{host}-{os.getpid()}"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        try:
            return os.open(self._target.with_name(name + SUFFIX), flags, 0o644)
        except FileExistsError:
            other = f"{name}.{secrets.token_hex(4)}{SUFFIX}"
            return os.open(self._target.with_name(other), flags, 0o644)


_writers: dict[tuple[int, Path], _Writer] = {}
_registry = threading.Lock()


def _writer_of(perf_filename: str) -> _Writer:
    """This process's writer; a forked child gets its own."""
    key = (os.getpid(), Path(perf_filename).absolute())
    with _registry:
        if key not in _writers:
            _writers[key] = _Writer(key[1])
            # Runs at the end of the main process and of multiprocessing's children, which do not
            # run what atexit knows.
            Finalize(None, _merge_at_exit, args=(key[1],), exitpriority=_EXIT_PRIORITY)
        return _writers[key]


def _merge_at_exit(target: Path) -> None:
    """Merge, and say what a reader should know; a process that ends has nobody to raise to."""
    try:
        merged = merge_perf(target)
    except (OpkitError, OSError, UnicodeDecodeError) as error:
        print(f"opkit: {error}; the rows are safe in {target}.*{SUFFIX}", file=sys.stderr)
        return
    if merged.torn or merged.duplicates:
        print(
            f"opkit: {target}: {merged.torn} incomplete lines dropped, {merged.duplicates} rows "
            "measured more than once",
            file=sys.stderr,
        )
