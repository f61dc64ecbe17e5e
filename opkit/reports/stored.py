"""Find what ``opkit report`` is asked for: a verdict of the ledger, a run, a file, a collection, a
benchmark."""

from __future__ import annotations

import gzip
import json
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opkit.align.ledger import Ledger, LedgerEntry
from opkit.align.result import AlignResult
from opkit.align.result_json import SCHEMA as ALIGN
from opkit.align.result_json import align_from_json
from opkit.bench.files import SUMMARY
from opkit.bench.read import bench_from_json
from opkit.bench.result import SCHEMA as BENCH
from opkit.bench.result import Bench
from opkit.collect.record import FOLDER, NAME
from opkit.errors import BadInput

LEDGER = "ledger.db"
RESULT = "result.json"  # in the folder of a run
PROVENANCE = "*_perf.provenance.json"  # beside every table that opkit writes
LISTED = 6  # names of each kind that an error lists
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class StoredAlignment:
    """An alignment.

    Attributes:
        name: that a file can have.
        id: in the ledger; empty where it was read from a file.
        folder: of its traces; empty where it is not known.
    """

    name: str
    result: AlignResult
    id: str = ""
    folder: str = ""


@dataclass(frozen=True)
class StoredCollection:
    """The folder of a collection, and a name that a file can have."""

    name: str
    folder: Path


@dataclass(frozen=True)
class StoredBench:
    """A benchmark's summary, and its folder's name."""

    name: str
    bench: Bench


Stored = StoredAlignment | StoredCollection | StoredBench


def find_stored(asked: str, out: Path) -> Stored:
    """What ``asked`` means, looked for as a file or folder first, then in ``out``.

    Args:
        asked: a file, a folder, an id of the ledger or its last part, an op (its newest verdict),
            a collection (``dsa-vllm``), a benchmark (``bench-…``); empty: the newest verdict.
        out: the output folder.

    Raises:
        BadInput: nothing or too much is meant, or it cannot be read; what there is is listed.
    """
    path = Path(asked)
    if asked and path.exists():
        return _folder(path) if path.is_dir() else _file(path)
    entries = Ledger(out / LEDGER).entries()
    if not asked:
        if not entries:
            raise BadInput(f"{out}: no verdict has been recorded there", _what_there_is([], out))
        return _entry(entries[0])
    for kind in (FOLDER, "bench"):
        if (out / kind / asked).is_dir():
            return _folder(out / kind / asked)
    meant = matching(asked, entries)
    if not meant:
        raise BadInput(
            f"{asked}: no verdict, run, result file, collection or benchmark of that name",
            _what_there_is(entries, out),
        )
    if len({entry.id for entry in meant}) > 1 and asked != meant[0].op:
        names = ", ".join(dict.fromkeys(entry.id for entry in meant))
        raise BadInput(f"{asked}: several verdicts begin or end so", f"one of: {names}")
    return _entry(meant[0])


def matching(asked: str, entries: list[LedgerEntry]) -> list[LedgerEntry]:
    """The entries that ``asked`` may mean, newest first: by whole id, else by op, else by the
    id's last part or beginning."""
    by_id = [entry for entry in entries if entry.id == asked]
    by_op = [entry for entry in entries if entry.op == asked]
    return (
        by_id
        or by_op
        or [
            entry
            for entry in entries
            if entry.short.startswith(asked) or entry.id.startswith(asked)
        ]
    )


def _entry(entry: LedgerEntry) -> StoredAlignment:
    return StoredAlignment(entry.id, entry.alignment(), entry.id, entry.report_dir)


def _folder(folder: Path) -> Stored:
    """A run, a benchmark, a collection, or an output folder, whose newest verdict is meant."""
    for name in (RESULT, SUMMARY):
        if (folder / name).is_file():
            return _file(folder / name)
    if (folder / NAME).is_file() or any(
        found for place in (folder, folder / "tables") for found in place.glob(PROVENANCE)
    ):
        return StoredCollection(folder.resolve().name, folder)
    if (folder / LEDGER).is_file():
        return find_stored("", folder)
    raise BadInput(
        f"{folder}: holds no result ({RESULT}, {SUMMARY}), collection ({NAME}) or ledger "
        f"({LEDGER})",
        "a run that was broken off leaves no result; `opkit status` lists what was recorded",
    )


def _file(path: Path) -> Stored:
    if path.name == NAME:
        return _folder(path.absolute().parent)
    if path.name == LEDGER:
        return find_stored("", path.parent)
    data = _json(path)
    # result.json and summary.json are called what their run is.
    run = path.resolve().parent if path.name in (RESULT, SUMMARY) else None
    name = run.name if run else path.name.split(".")[0]
    if data.get("schema") == BENCH:
        return StoredBench(name, bench_from_json(data, str(path)))
    if data.get("schema") != ALIGN:
        said = data.get("schema") or "none"
        raise BadInput(
            f"{path}: schema {said}, which opkit cannot show again",
            f"shown are results of `opkit align --json` ({ALIGN}) and `opkit bench --json` "
            f"({BENCH}), and folders of `opkit collect`",
        )
    return StoredAlignment(name, align_from_json(data, str(path)), folder=str(run or ""))


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw.startswith(GZIP) else raw
        data = json.loads(text, parse_constant=_no_number)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(
            f"{path}: not a JSON file ({error})", "traces are judged by `opkit align`"
        ) from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: not a result of opkit: its JSON is no object")
    return data


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _what_there_is(entries: list[LedgerEntry], out: Path) -> str:
    """What could have been asked for, as hints."""
    ids = list(dict.fromkeys(entry.id for entry in entries))
    made = sorted(path.parent.name for path in (out / FOLDER).glob(f"*/{NAME}"))
    benches = sorted((p.parent.name for p in (out / "bench").glob(f"*/{SUMMARY}")), reverse=True)
    listed = f"`opkit status --out {shlex.quote(str(out))}`"
    lines = [
        f"{what} in {out}: {', '.join(names[:LISTED])}{_more(names, where)}"
        for what, names, where in (
            ("verdicts", ids, listed),
            ("collections", made, listed),
            ("benchmarks", benches, f"folders in {out / 'bench'}"),
        )
        if names
    ]
    return "\n".join(lines) or (
        f"{out} holds no verdicts and no collections; `opkit align OP` records the first, and "
        "--out names another folder"
    )


def _more(names: list[str], where: str) -> str:
    return f" and {len(names) - LISTED} more ({where})" if len(names) > LISTED else ""
