"""How every number of a table was obtained: ``<table>_perf.provenance.json``."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import opkit
from opkit.collect.tables.files import PROVENANCE_SCHEMA
from opkit.collect.tables.latency import Chosen, Latency
from opkit.collect.tables.validate import Problem
from opkit.collect.timing.stats import half_width, mad, median
from opkit.collect.work import Row
from opkit.layers.manifest import Manifest

# The framework column, as the field spells it.
FRAMEWORKS = {"vllm": "VLLM", "trtllm": "TRTLLM", "sglang": "SGLang", "torch": "TORCH"}


@dataclass(frozen=True)
class Head:
    """The first three columns of every row.

    Attributes:
        framework: as the field spells it, see :func:`head_of`.
        version: of the framework.
        device: the GPU's name.
    """

    framework: str
    version: str
    device: str


def head_of(backend: str, version: str, device: str) -> Head:
    """The head of a backend's tables, with the framework spelt as the field does."""
    return Head(FRAMEWORKS.get(backend, backend.upper()), version, device)


@dataclass(frozen=True)
class About:
    """What all rows of a collection share.

    Attributes:
        head: the first columns.
        backend: the engine whose classes built the mock.
        model: the model that it was built from.
        latency: which time the tables get.
        verdict: ids of the verdicts that admitted the op, blanks between; empty without.
        waiver: the user's reason to collect without, or against, a verdict.
        differences: what that reason overrode.
        versions: of software, by name.
        sweep: where the cases come from.
        planned: rows asked for, by table; a table that is not named is not counted.
        manifests: what each build says of itself, by its digest (``Row.build``).
        flags: more flags of rows, by key, as ``unaligned_kernels``.
        missing: planned cases of which there is no row at all, by table: key, case and group.
    """

    head: Head
    backend: str
    model: str = ""
    latency: Latency = Latency.AUTO
    verdict: str = ""
    waiver: str = ""
    differences: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    sweep: str = ""
    planned: Mapping[str, int] = field(default_factory=dict)
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    missing: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A row of a table on its way: what was measured, what is written of it, what is flagged."""

    row: Row
    chosen: Chosen
    bound_ms: float | None
    flags: tuple[str, ...]


def provenance_text(
    table: str,
    about: About,
    entries: Sequence[Entry],
    failed: Sequence[Row],
    problems: Sequence[Problem],
    *,
    op: str,
    status: str,
    files: Mapping[str, str],
    replaced: Sequence[str],
) -> str:
    """The provenance file of one table, as JSON.

    Args:
        table: its name.
        about: what its rows share.
        entries: the rows that are written.
        failed: those that have no value.
        problems: what validation found, of this table.
        op: name of the op.
        status: ``complete`` or ``partial``.
        files: SHA-256 of the files it is about, by name.
        replaced: SHA-256 of those that they replace.
    """
    rows = [*(entry.row for entry in entries), *failed]
    data = {
        "schema": PROVENANCE_SCHEMA,
        "opkit": opkit.__version__,
        "table": table,
        "op": op,
        "status": status,
        "verdict": about.verdict,
        "waiver": about.waiver,
        "waived": list(about.differences),
        **asdict(about.head),
        "backend": about.backend,
        "model": about.model,
        "versions": dict(about.versions),
        "hosts": sorted({row.host for row in rows if row.host}),
        "gpus": _gpus(rows),
        "latency": str(about.latency),
        "sweep": {
            "from": about.sweep,
            "planned": about.planned.get(table),
            "collected": len(entries),
            "failed": dict(Counter(str(row.fault) for row in failed)),
            "quarantined": [_failure(row) for row in failed],
            "missing": [dict(item) for item in about.missing.get(table, ())],
        },
        "problems": [_problem(problem) for problem in problems],
        "builds": {
            digest: asdict(about.manifests[digest])
            for digest in sorted({entry.row.build for entry in entries})
            if digest in about.manifests
        },
        "files": dict(files),
        "replaced": list(replaced),
        "rows": [_entry(entry, about) for entry in entries],
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def meta_entry(rows: Sequence[Row], about: About, status: str, count: int) -> dict[str, Any]:
    """What ``collection_meta.yaml`` says of one table, in the words of its schema 1.

    Args:
        rows: all of the table's, also those without a value.
        about: what they share.
        status: ``complete`` or ``partial``.
        count: rows that are written.
    """
    sources = sorted(
        item
        for digest in {row.build for row in rows}
        for item in (
            about.manifests[digest].layer_source.items() if digest in about.manifests else ()
        )
    )
    return {
        "collector_ref": f"opkit {opkit.__version__}",
        "collector_hash": _hash(sources),
        "case_plan_hash": _hash(sorted(row.key for row in rows)),
        "collected_at": max((row.created[:10] for row in rows), default=""),
        "rows": count,
        "status": status,
    }


def _hash(data: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(data).encode()).hexdigest()}"


def _gpus(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each GPU once."""
    found = {json.dumps(row.gpu, sort_keys=True) for row in rows if row.gpu}
    return [json.loads(text) for text in sorted(found)]


def _failure(row: Row) -> dict[str, Any]:
    return {
        "key": row.key,
        "case": row.case,
        "group": row.group,
        "fault": str(row.fault),
        "error": row.error,
        "attempts": row.attempts,
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "rule": str(problem.rule),
        "what": problem.what,
        "hard": problem.hard,
        "key": problem.key,
        "columns": dict(problem.columns or {}),
    }


def _entry(entry: Entry, about: About) -> dict[str, Any]:
    row, chosen = entry.row, entry.chosen
    assert row.measurement is not None
    measured = row.measurement.to_json()
    return {
        "key": row.key,
        "case": row.case,
        "columns": row.columns,
        "latency_ms": chosen.ms,
        "latency_is": f"median {chosen.source} time",
        "spread": spread_of(chosen.samples),
        "elapsed": _summary(measured.pop("elapsed_ms")),
        "gpu": _summary(measured.pop("gpu_ms")),
        "bound_ms": entry.bound_ms,
        "flags": list(entry.flags),
        "waiver": about.waiver,
        **measured,
        "on_gpu": row.gpu,
        "host": row.host,
        "created": row.created,
        "seconds": row.seconds,
        "attempts": row.attempts,
        "build": row.build,
    }


def _summary(samples: Sequence[float]) -> dict[str, Any] | None:
    """Samples with their median and spread, milliseconds; None when there are none."""
    if not samples:
        return None
    return {
        "median": median(samples),
        "mad": mad(samples),
        "min": min(samples),
        "max": max(samples),
        "half_width": spread_of(samples),
        "samples": list(samples),
    }


def spread_of(samples: Sequence[float]) -> float | None:
    """Half the 95 % interval of the median as a share of it; None for too few samples."""
    found = half_width(samples)
    return found if math.isfinite(found) else None
