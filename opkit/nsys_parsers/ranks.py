"""Ranks: which process of which file is which, on one clock, and which of them do the same.

A rank is a process that ran kernels. Several files are the ranks of one run: numbered by what their
names differ in, complete, of sessions that overlap in time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from opkit.errors import BadInput
from opkit.nsys_parsers.export import TraceFacts, quoted


@dataclass(frozen=True)
class Rank:
    """One process that ran kernels.

    Attributes:
        rank: its number.
        file: index of its file.
        pid: its ``globalPid``.
        devices: GPUs it used, by index.
        kernels: kernels it ran.
    """

    rank: int
    file: int
    pid: int
    devices: tuple[int, ...]
    kernels: int

    @property
    def process(self) -> int:
        """The process id on its host."""
        return self.pid >> 24 & 0xFFFFFF


@dataclass(frozen=True)
class Recording:
    """What tells a recording from others, whatever its file is called or was cut down to.

    Attributes:
        path: its file.
        epoch_ns: start of its session in ns since 1970; None if unknown.
        processes: of each process that ran anything on a GPU its ``globalPid``, how many kernels,
            and its first start and last end, ns since the session's start.
    """

    path: Path
    epoch_ns: int | None
    processes: tuple[tuple[int, int, int, int], ...]

    def same(self, other: Recording) -> bool:
        """Whether both are of one process in one session, in whole or in part."""
        if self.epoch_ns is not None and other.epoch_ns is not None:
            pids = {pid for pid, *_ in self.processes} & {pid for pid, *_ in other.processes}
            return self.epoch_ns == other.epoch_ns and bool(pids)
        return self.processes == other.processes


def numbers(paths: Sequence[Path], partial: bool = False) -> list[int]:
    """Rank numbers of files, from what their names differ in; else their order.

    Raises:
        BadInput: no file, a file twice, or a number is missing and ``partial`` is not set.
    """
    if not paths:
        raise BadInput("no trace was given")
    real = [os.path.realpath(path) for path in paths]
    for path, own in zip(paths, real, strict=True):
        if real.count(own) > 1:
            raise BadInput(f"{path}: given twice", "one file a rank")
    found = _called(paths) or _numbered([path.name for path in paths])
    if found is None:
        return list(range(len(paths)))
    missing = sorted(set(range(max(found))) - set(found))
    if missing and not partial:
        listed = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        raise BadInput(
            f"rank {listed} is missing: the files' names say ranks "
            f"{', '.join(map(str, sorted(found)))}",
            "give all ranks of the run, or --partial if these are meant",
        )
    return found


def _called(paths: Sequence[Path]) -> list[int] | None:
    """Numbers that every path calls a rank, as ``host-b.rank1.sqlite`` or ``rank_1/77.sqlite``."""
    if len(paths) < 2:
        return None
    said = [re.findall(r"rank[_-]?(\d{1,6})", str(path), flags=re.IGNORECASE) for path in paths]
    found = [int(numbers[-1]) for numbers in said if numbers]
    return found if len(found) == len(paths) == len(set(found)) else None


def _numbered(names: list[str]) -> list[int] | None:
    """The numbers in which names differ and nothing else does; None when there are none."""
    if len(names) < 2:
        return None
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({len(piece) for piece in pieces}) != 1:
        return None
    differing = [i for i, column in enumerate(zip(*pieces, strict=True)) if len(set(column)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:
        return None
    found = [int(piece[differing[0]]) for piece in pieces]
    # Process ids and times differ too; ranks are few and start low.
    if len(set(found)) != len(found) or max(found) >= 16 * len(found) + 16:
        return None
    from_one = sorted(found) == list(range(1, len(found) + 1))
    says_rank = re.search(
        r"(^|[^a-z])r(ank)?[^a-z]*$", pieces[0][differing[0] - 1], flags=re.IGNORECASE
    )
    return [number - 1 for number in found] if from_one and not says_rank else found


@contextlib.contextmanager
def told(found: Sequence[int], file: int) -> Iterator[None]:
    """Name the rank when one of several files cannot be used."""
    try:
        yield
    except BadInput as error:
        if len(found) == 1:
            raise
        raise BadInput(f"rank {found[file]}: {error}", error.hint or "") from error


def clock(facts: Sequence[TraceFacts]) -> tuple[list[int], bool]:
    """What to add to each file's times (ns) to put them on the earliest session's clock, and
    whether that is known."""
    epochs = [each.epoch_ns for each in facts]
    known = [epoch for epoch in epochs if epoch is not None]
    if len(known) < len(epochs) or not known:
        return [0] * len(epochs), len(epochs) == 1
    return [epoch - min(known) for epoch in known], True


def find(
    db: duckdb.DuckDBPyConnection,
    folders: Sequence[Path],
    facts: Sequence[TraceFacts],
    shifts: Sequence[int],
    found: Sequence[int],
) -> tuple[Rank, ...]:
    """The ranks in parsed folders.

    Raises:
        BadInput: a file without kernels, the same recording twice, or sessions that do not
            overlap: they are not of one run.
    """
    seen: list[tuple[int, int, int, tuple[int, ...], int]] = []
    spans = []
    recordings: list[Recording] = []
    for file, folder in enumerate(folders):
        rows = db.execute(
            f"""
            SELECT pid, list(DISTINCT device ORDER BY device), count(*) FILTER (kind = 'kernel'),
                   min(start), max("end")
            FROM read_parquet('{quoted(folder / "kernel.parquet")}') GROUP BY pid
            ORDER BY min(device), pid
            """
        ).fetchall()
        ran = [row for row in rows if row[2]]
        if not ran:
            raise BadInput(f"rank {found[file]}: {facts[file].path}: no GPU kernels in this export")
        own = Recording(facts[file].path, facts[file].epoch_ns, tuple((r[0], *r[2:]) for r in ran))
        for other in recordings:
            if own.same(other):
                raise BadInput(
                    f"{own.path} and {other.path} hold the same recording", "one file a rank"
                )
        recordings.append(own)
        spans.append((min(r[3] for r in ran) + shifts[file], max(r[4] for r in ran) + shifts[file]))
        for pid, devices, count, _, _ in ran:
            seen.append((found[file], file, pid, tuple(d for d in devices if d is not None), count))
    if len(folders) > 1:
        _one_run(facts, spans)
    one_each = len({file for _, file, *_ in seen}) == len(seen)
    order = sorted(seen, key=lambda each: (each[0], each[1]))
    return tuple(
        Rank(number if one_each else index, file, pid, devices, count)
        for index, (number, file, pid, devices, count) in enumerate(order)
    )


def _one_run(facts: Sequence[TraceFacts], spans: Sequence[tuple[int, int]]) -> None:
    """Refuse files whose recordings do not overlap, when their clock is known."""
    if any(each.epoch_ns is None for each in facts):
        return
    first = min(range(len(spans)), key=lambda i: spans[i][1])
    last = max(range(len(spans)), key=lambda i: spans[i][0])
    if spans[first][1] < spans[last][0]:
        apart = (spans[last][0] - spans[first][1]) / 1e9
        raise BadInput(
            f"{facts[first].path} ended {apart:,.1f} s before {facts[last].path} began: these are "
            "not ranks of one run",
            f"to compare two runs: opkit trace diff {os.fspath(facts[first].path)} "
            f"{os.fspath(facts[last].path)}",
        )
