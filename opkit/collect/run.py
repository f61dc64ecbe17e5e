"""A collection from a job to its tables: work, merge, validate, write."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opkit.align.ledger import FRAMEWORKS
from opkit.collect.admission import Admission, check_mock, kernel_kind
from opkit.collect.options import NO_GPU, Job, Where
from opkit.collect.record import NAME as RECORD
from opkit.collect.record import Record, read_record
from opkit.collect.sweep import phase_of
from opkit.collect.tables.latency import Latency
from opkit.collect.tables.provenance import About, Head, head_of
from opkit.collect.tables.write import Written, check_folder, write_tables
from opkit.collect.work import Group, Row, build_digest
from opkit.collect.workers.lane import Lane, LaneOptions, LocalLane
from opkit.collect.workers.parts import Parts, read_parts
from opkit.collect.workers.pool import RunOptions, run_groups
from opkit.collect.workers.tally import Outcome, Status
from opkit.errors import BadInput, OpkitError
from opkit.layers.manifest import Manifest, manifest_from_json
from opkit.layers.op import case_from_json

TABLES = "tables"
BUILDS = "builds"
LOGS = "logs"
UNALIGNED = "unaligned_kernels"
# The host's name for what runs without a GPU.
CPU_LANE = "cpu"
# CUPTI's names of what is no kernel: copies and fills by the driver.
_NO_KERNEL = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Collected:
    """What became of a collection.

    Attributes:
        outcome: of this run.
        written: the tables, made of every row of the same series that the folder holds.
        record: what it was.
        already: cases of the sweep that had a value, or were in quarantine, before this run.
        unaligned: kernels that the verdict's engine never launched, with the rows that do.
        folder: where everything is.
        quarantined: rows of the sweep without a value, this run's and those of runs before.
        elsewhere: rows with a value that the folder holds and these tables do not: they are of
            another subject, or were measured in another way.
    """

    outcome: Outcome
    written: Written
    record: Record
    already: int
    unaligned: Mapping[str, int]
    folder: Path
    quarantined: tuple[Row, ...] = ()
    elsewhere: int = 0

    @property
    def ok(self) -> bool:
        """Whether every planned row is in a table."""
        return self.outcome.complete and not self.quarantined and self.written.ok


def collect(job: Job, on_event: Callable[[Status], None]) -> Collected:
    """Measure what is missing, and write the tables.

    Raises:
        Refused: the built mock is not what the verdicts hold for.
        OpkitError: a folder or program that cannot be used.
        KeyboardInterrupt: everything started has been ended; the rows measured are kept.
    """
    head = _head(job)
    check_folder(job.op, job.subject.backend, head, job.folder / TABLES)
    if (job.folder / RECORD).exists():
        record = job.record.with_other_phases(read_record(job.folder))
        job = dataclasses.replace(job, record=record)
    try:
        outcome = measure(
            job.groups, job.where, job.folder, job.admission, on_event, job.record, head
        )
    except KeyboardInterrupt:
        # What is measured goes into the tables, which say that they are partial; if that fails too,
        # the rows are still on disk, and it was an interrupt all the same.
        with contextlib.suppress(OpkitError, OSError):
            write(job)
        raise
    written, record, unaligned = write(job)
    already = sum(len(group.tasks) for group in job.groups) - outcome.planned
    parts = read_parts(job.folder)
    planned = {task.key for group in job.groups for task in group.tasks}
    return Collected(
        outcome,
        written,
        record,
        already,
        unaligned,
        job.folder,
        quarantined=tuple(row for key, row in parts.rows.items() if key in planned and not row.ok),
        elsewhere=sum(
            row.ok and row.key.split("-")[0] not in record.series for row in parts.rows.values()
        ),
    )


def _admission_of(
    admission: Admission, rows: Iterable[Row], manifests: Mapping[str, Manifest]
) -> Admission:
    """The admission with all that its rows' builds differ by, those of earlier runs too.

    Raises:
        Refused: a row is of a build that nothing admits.
    """
    sources: dict[str, set[str]] = {}
    for digest in sorted({row.build for row in rows if row.ok and row.build in manifests}):
        manifest = manifests[digest]
        admission = check_mock(admission, manifest, manifest.versions.get("gpu", NO_GPU))
        for name, source in manifest.layer_source.items():
            sources.setdefault(name, set()).add(source)
    mixed = sorted(name for name, found in sources.items() if len(found) > 1)
    if not mixed:  # never with a verdict: it holds for one source
        return admission
    told = f"layer source: rows of several versions of {', '.join(mixed)} stand together"
    return dataclasses.replace(admission, differences=(*admission.differences, told))


def write(job: Job) -> tuple[Written, Record, dict[str, int]]:
    """Merge all parts and write the tables.

    Returns:
        The tables, the collection's record, and the kernels that the alignment never saw.
    """
    parts = read_parts(job.folder)
    series = {job.subject.series(job.timing, phase) for phase in job.subject.admitted}
    rows = [row for row in parts.rows.values() if row.key.split("-")[0] in series]
    manifests = read_builds(job.folder)
    admission = _admission_of(job.admission, rows, manifests)
    job = dataclasses.replace(job, admission=admission)
    flags, unaligned = unaligned_kernels(job.admission, rows)
    written = write_tables(
        job.op, rows, _about(job, rows, manifests, flags), job.folder / TABLES, force=False
    )
    record = dataclasses.replace(
        job.record,
        updated=datetime.now(UTC).isoformat(timespec="seconds"),
        differences=admission.differences,
        rows=job.record.rows | {table.name: table.rows for table in written.tables},
        failed=dict(Counter(str(row.fault) for row in rows if not row.ok)),
    )
    record.write(job.folder)
    return written, record, unaligned


def measure(
    groups: Sequence[Group],
    where: Where,
    folder: Path,
    admission: Admission,
    on_event: Callable[[Status], None],
    record: Record | None = None,
    head: Head | None = None,
) -> Outcome:
    """Run groups on this host's GPUs, or on a Ray cluster, and keep what builds say of themselves.

    Args:
        groups: the work.
        where: who does it.
        folder: the run's folder.
        admission: what every build is held against.
        on_event: told how things stand.
        record: written when the first build has been admitted: until then the folder is what it
            was.
        head: the table's device and version, which every build must have.

    Raises:
        Refused: a build is not what ``admission`` holds for.
        BadInput: a build is of another GPU or version than the table.
    """

    def built(manifest: Manifest, group: Group) -> None:
        nonlocal record
        gpu = manifest.versions.get("gpu", NO_GPU)
        check_mock(admission, manifest, gpu)
        if head is not None:
            _check_head(head, group.plan.backend, manifest, gpu)
        _keep_build(folder, manifest)
        if record is not None:
            record.write(folder)
            record = None

    options = LaneOptions(
        python=where.python, build_s=where.build_timeout, case_s=where.case_timeout
    )
    running = RunOptions(retry_failed=where.retry_failed)
    if where.engine == "ray":
        from opkit.collect.workers.ray_engine import RayOptions, run_on_ray

        ray = RayOptions(address=where.ray_address, workers=where.lanes, lane=options)
        return run_on_ray(groups, ray, folder, running, on_event, built)
    return run_groups(groups, lanes_of(where, options, folder), folder, running, on_event, built)


def _check_head(head: Head, backend: str, manifest: Manifest, gpu: str) -> None:
    """Raise BadInput unless a build is of the device and the version that its table names."""
    version = manifest.versions.get(FRAMEWORKS.get(backend, backend), "")
    # torch writes its own build after a plus sign, the installed package may not.
    pairs = (
        ("GPU", head.device, gpu),
        (f"version of {backend}", head.version.split("+")[0], version.split("+")[0]),
    )
    for what, wanted, found in pairs:
        if wanted != found:
            raise BadInput(
                f"the table is for {what} {wanted}, a worker has {found or 'an unknown one'}",
                "one table holds for one GPU and one version; start it where both are the workers'",
            )


def lanes_of(where: Where, options: LaneOptions, folder: Path) -> list[Lane]:
    """One lane for each GPU; one without a GPU on a host that has none."""
    logs = folder / LOGS
    if not where.gpus:
        return [LocalLane(CPU_LANE, None, options, logs, folder)]
    return [LocalLane(f"gpu{gpu.index}", gpu.uuid, options, logs, folder) for gpu in where.gpus]


def labels_of(rows: Iterable[Row]) -> dict[str, str]:
    """How a reader calls each row's case, by key."""
    found = {}
    for row in rows:
        case = case_from_json(row.case)
        heads = row.columns.get("num_heads")
        suffix = f" · {heads} heads" if heads is not None else ""
        found[row.key] = f"{phase_of(case)} {case.label()}{suffix}".strip()
    return found


def unaligned_kernels(
    admission: Admission, rows: Iterable[Row]
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Rows that launch what the aligned engine never did at the shapes it was aligned at.

    Returns:
        Flags by key, and how many rows launch each such kernel, by its short name.
    """
    known = {phase: admission.kernels(phase) for phase in ("", *admission.entries)}
    flags: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        aligned = known.get(str(row.case.get("phase", "")))
        if not aligned or row.measurement is None:
            continue
        seen = {
            kernel_kind(kernel.name)
            for kernel in row.measurement.kernels
            if not kernel.name.startswith(_NO_KERNEL)
        }
        strange = seen - aligned
        counts.update(strange)
        if strange:
            flags[row.key] = [UNALIGNED]
    return flags, dict(counts)


def read_builds(folder: Path) -> dict[str, Manifest]:
    """What every build of a collection said of itself, by digest."""
    return {
        path.stem: manifest_from_json(path.read_text(), str(path))
        for path in sorted((folder / BUILDS).glob("*.json"))
    }


def rows_of(folder: Path, record: Record) -> list[Row]:
    """The rows that a collection's tables hold.

    Raises:
        BadInput: it has none.
    """
    parts: Parts = read_parts(folder)
    # The record holds one series a phase; rows of others were measured in another way.
    series = set(record.series)
    found = [row for row in parts.rows.values() if row.ok and row.key.split("-")[0] in series]
    if not found:
        raise BadInput(f"{folder}: no row has been collected")
    return found


def _keep_build(folder: Path, manifest: Manifest) -> None:
    path = folder / BUILDS / f"{build_digest(manifest)}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        manifest.write(part)
        part.replace(path)


def _about(
    job: Job,
    rows: Sequence[Row],
    manifests: Mapping[str, Manifest],
    flags: Mapping[str, Sequence[str]],
) -> About:
    builds = [manifests[row.build] for row in rows if row.build in manifests]
    return About(
        head=_head(job),
        backend=job.subject.backend,
        model=str(builds[0].model.get("architecture", "")) if builds else "",
        latency=Latency(job.record.latency),
        verdict=job.admission.verdicts,
        waiver=job.admission.waiver,
        differences=job.admission.differences,
        versions=_versions(builds),
        sweep=job.sweep.origin,
        planned=_planned(job, rows),
        manifests=manifests,
        flags=flags,
        missing=_missing(job, rows),
    )


def _head(job: Job) -> Head:
    phase = next(iter(job.subject.admitted.values()))
    return head_of(job.subject.backend, str(phase["framework"]), str(phase["gpu"]))


def _versions(builds: Sequence[Manifest]) -> dict[str, str]:
    """Versions of all builds; where they differ, each of them."""
    found: dict[str, set[str]] = {}
    for build in builds:
        for name, version in build.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def _planned(job: Job, rows: Iterable[Row]) -> dict[str, int]:
    """Rows asked for, by table: of this run's sweep, and those that runs before have left."""
    tables = {row.key: job.op.table(case_from_json(row.case)).name for row in rows}
    for group in job.groups:
        for task in group.tasks:
            tables[task.key] = job.op.table(task.planned.case).name
    return dict(Counter(tables.values()))


def _missing(job: Job, rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """Cases of this run's sweep that have no row, by table: the run ended before."""
    known = {row.key for row in rows}
    found: dict[str, list[dict[str, Any]]] = {}
    for group in job.groups:
        for task in group.tasks:
            if task.key not in known:
                case = {**dataclasses.asdict(task.planned.case), "mode": str(task.planned.mode)}
                told = {"key": task.key, "case": case, "group": group.name}
                found.setdefault(job.op.table(task.planned.case).name, []).append(told)
    return found
