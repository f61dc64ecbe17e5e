"""Collections on disk: the rows that were measured on an H100 as a folder, also with damage."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
from test_h100_rows import FOLDER, H100, read_rows

from opkit.align.ledger import Ledger
from opkit.align.result_json import align_from_json
from opkit.collect.admission import ask_ledger
from opkit.collect.desk.desk import Desk, desk_of
from opkit.collect.desk.read import read_collection
from opkit.collect.measurement import Power, Timing
from opkit.collect.record import Record
from opkit.collect.run import unaligned_kernels
from opkit.collect.tables.latency import choose
from opkit.collect.tables.provenance import About, head_of
from opkit.collect.tables.write import write_tables
from opkit.collect.work import Fault, Row
from opkit.layers.dsa import DSA
from opkit.layers.manifest import Manifest, manifest_from_json
from opkit.layers.op import LaunchMode, Op

ROWS = "dsa-h100-rows.jsonl.gz"


def h100_rows() -> list[Row]:
    """The 536 rows; origin: tests/traces/README.md, "collected"."""
    return read_rows(ROWS)


def h100_about(folder: Path, rows: Sequence[Row], **changed: Any) -> About:
    """What was said of them when they were collected: the verdict, builds, and flags."""
    text = gzip.decompress((FOLDER / "dsa-h100-builds.json.gz").read_bytes())
    builds: dict[str, Manifest] = {
        digest: manifest_from_json(json.dumps(data), digest)
        for digest, data in json.loads(text).items()
    }
    found = gzip.decompress((FOLDER / "dsa-h100-alignment.json.gz").read_bytes())
    ledger = Ledger(folder / "ledger.db")
    ledger.record(align_from_json(json.loads(found), "the alignment"))
    admission = ask_ledger(ledger, DSA, ("context", "generation"), "vllm", gpu=H100)
    made = About(
        head_of("vllm", "0.24.0", H100),
        "vllm",
        verdict=admission.verdicts,
        versions=next(iter(builds.values())).versions,
        sweep="the grid of dsa",
        planned={"dsa_context_module": 352, "dsa_generation_module": 184},
        manifests=builds,
        flags=unaligned_kernels(admission, rows)[0],
    )
    return replace(made, **changed)


def record(rows: Sequence[Row], **changed: Any) -> Record:
    """``run.json`` of DSA rows."""
    made = Record(
        op="dsa",
        backend="vllm",
        model="deepseek-ai/DeepSeek-V3.2",
        engine_args=("--max-model-len", "8192"),
        modes={"context": LaunchMode.EAGER, "generation": LaunchMode.GRAPH},
        seed=0,
        admitted={phase: {"framework": "0.24.0", "gpu": H100} for phase in
                  ("context", "generation")},
        timing=Timing(),
        latency="auto",
        series=tuple(sorted({row.key.split("-")[0] for row in rows})),
        created="2026-11-21T15:01:00+00:00",
        updated="2026-11-21T15:06:00+00:00",
    )  # fmt: skip
    return replace(made, **changed)


def write_collection(
    folder: Path,
    written: Sequence[Row],
    told: About,
    *,
    op: Op = DSA,
    loose: Sequence[Row] = (),
    **changed: Any,
) -> Path:
    """Write a collection's folder.

    Args:
        folder: of the collection.
        written: rows that the tables are made of.
        told: what they share.
        op: what they are of.
        loose: rows that only the parts hold.
        changed: fields of the record.
    """  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if written:
        write_tables(op, written, told, folder / "tables")
    rows = [*written, *loose]
    (folder / "parts").mkdir()
    lines = "".join(row.to_json() + "\n" for row in rows)
    (folder / "parts" / "host-1-ab.jsonl").write_text(lines)
    record(rows, op=op.name, **changed).write(folder)
    return folder


def h100(folder: Path, rows: Sequence[Row] | None = None, **changed: Any) -> Path:
    """The collection of the H100, or of other rows of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(rows) if rows is not None else h100_rows()
    planned = {name: sum(row.table == name for row in found) for name in
               ("dsa_context_module", "dsa_generation_module")}  # fmt: skip
    told = h100_about(folder, found, **{"planned": planned, **changed})
    return write_collection(folder, found, told)


def hurt(folder: Path) -> tuple[Path, dict[str, str]]:
    """The H100's rows with damage; returns the folder and the keys of what was hurt, by how."""
    rows = h100_rows()
    keys = {
        "failed": find(rows, heads=128, batch_size=4, isl=512, step=0),
        "left out": find(rows, heads=128, batch_size=8, isl=512, step=0),
        "not run": find(rows, heads=16, batch_size=1, isl=64, step=0),
        "not written": find(rows, heads=128, batch_size=2, isl=64, step=128),
        "spike": find(rows, heads=128, batch_size=1, isl=4096, step=0),
        "power": find(rows, heads=128, batch_size=16, isl=1, step=4096),
    }
    by_key = {row.key: row for row in rows}
    failed = replace(
        by_key[keys["failed"]], measurement=None, columns={}, table="", fault=Fault.MEMORY,
        error="CUDA out of memory: 12 GiB <asked> & not there", attempts=2,
    )  # fmt: skip
    missing = by_key.pop(keys["not run"])
    loose = [by_key.pop(keys["not written"])]
    by_key[failed.key] = failed
    by_key[keys["left out"]] = scaled(by_key[keys["left out"]], 0.01)
    by_key[keys["spike"]] = scaled(by_key[keys["spike"]], 1.8)
    by_key[keys["power"]] = powered(by_key[keys["power"]])
    told = h100_about(
        _made(folder.parent), rows,
        missing={"dsa_context_module": [
            {"key": missing.key, "case": missing.case, "group": missing.group}
        ]},
    )  # fmt: skip
    return write_collection(folder, list(by_key.values()), told, loose=loose), keys


def find(rows: Sequence[Row], **columns: int) -> str:
    """The key of the one row with these columns."""
    wanted = {"num_heads" if name == "heads" else name: value for name, value in columns.items()}
    (key,) = [row.key for row in rows
              if all(row.columns[name] == value for name, value in wanted.items())]  # fmt: skip
    return key


def scaled(row: Row, factor: float) -> Row:
    """The row with all its times multiplied."""
    found = row.measurement
    assert found is not None
    return replace(
        row,
        measurement=replace(
            found,
            elapsed_ms=tuple(ms * factor for ms in found.elapsed_ms),
            gpu_ms=tuple(ms * factor for ms in found.gpu_ms),
            kernels=tuple(replace(kernel, us=kernel.us * factor) for kernel in found.kernels),
        ),
    )


def powered(row: Row, watts: float = 512.25) -> Row:
    """The row with a power measurement."""
    assert row.measurement is not None
    power = Power(watts, 700.0, 0.1875, "energy counter", 1.02, 0, 0.001)
    return replace(row, measurement=replace(row.measurement, power=power))


def shipped_table(path: Path, rows: Sequence[Row], factor: float = 2.0) -> Path:
    """A shipped table of rows' shapes (context or generation): ``factor`` times their times."""
    lines = []
    for row in rows:
        found = row.measurement
        assert found is not None
        own: Mapping[str, Any] = row.columns
        lines.append({**own, "latency": factor * choose(found).ms, "op_name": row.table,
                      "framework": "VLLM", "version": "0.24.0", "device": H100})  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(lines))
    with duckdb.connect() as db:
        db.read_json(str(path.with_suffix(".json"))).write_parquet(str(path))
    return path


def desk(folder: Path, *shipped: Path) -> Desk:
    """The desk of a folder."""
    return desk_of(read_collection(folder), shipped)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
