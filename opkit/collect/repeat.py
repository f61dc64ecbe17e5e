"""Measuring again: a sample of a collection, or the shapes that the engine itself ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from opkit.align.ledger import Ledger, LedgerEntry
from opkit.collect.admission import Admission
from opkit.collect.fidelity import (
    Fidelity,
    compare_with_engine,
    engine_cases,
    shipped_latencies,
)
from opkit.collect.groups import make_groups
from opkit.collect.options import NO_GPU, Where, again
from opkit.collect.record import Record
from opkit.collect.run import labels_of, measure, read_builds, rows_of
from opkit.collect.sweep import Sweep
from opkit.collect.tables.latency import Latency, choose
from opkit.collect.tables.provenance import head_of
from opkit.collect.verify import Verified, compare, pick
from opkit.collect.work import Group, Row
from opkit.collect.workers.parts import read_parts
from opkit.collect.workers.tally import Status
from opkit.errors import BadInput
from opkit.layers.op import AnyCase, Case, case_from_json
from opkit.layers.registry import find_op

OnEvent = Callable[[Status], None]


@dataclass(frozen=True)
class VerifyOptions:
    """How a collection is verified.

    Attributes:
        sample: rows to measure again.
        seed: of the sample; None for a new one each time.
        tolerance: share by which a row may deviate; None for each comparison's own.
        shipped: tables to show beside the engine, by phase.
    """

    sample: int
    seed: int | None
    tolerance: float | None
    shipped: tuple[Path, ...] = ()


def verify_sample(
    folder: Path, record: Record, where: Where, options: VerifyOptions, on_event: OnEvent
) -> Verified:
    """Measure a random sample of a collection's rows again.

    Raises:
        OpkitError: nothing was collected, or nothing can be measured.
    """
    _check_gpu(record, where)
    first = pick(rows_of(folder, record), options.sample, options.seed)
    manifests = read_builds(folder)
    by_rank: dict[int, list[AnyCase]] = {}
    for row in first:
        by_rank.setdefault(manifests[row.build].tp_size, []).append(case_from_json(row.case))
    groups = [group for tp, cases in by_rank.items() for group in _groups(record, tp, cases)]
    repeated = _measure(folder / "verify", groups, record, where, on_event)
    latency = Latency(record.latency)
    return compare(
        first,
        repeated,
        {row.key: _latency(row, latency) for row in first},
        {key: _latency(row, latency) for key, row in repeated.items() if row.ok},
        labels_of(first),
        **({} if options.tolerance is None else {"tolerance": options.tolerance}),
    )


def verify_against_engine(
    folder: Path,
    record: Record,
    ledger: Ledger,
    where: Where,
    options: VerifyOptions,
    on_event: OnEvent,
) -> Fidelity:
    """Measure the shapes that the aligned engine ran, and compare with its own GPU time.

    Raises:
        BadInput: the verdict that admitted the collection is not in the ledger.
    """
    op = find_op(record.op)
    if "" in record.admitted:
        raise BadInput(
            f"rows of {record.op} know no phase: no step of the engine's is theirs to compare with",
            "opkit align compares its region; opkit verify without --against-e2e repeats rows",
        )
    _check_gpu(record, where)
    entries = _entries(ledger, record)
    cases = [
        case
        for phase, entry in entries.items()
        for case in engine_cases(entry.alignment())
        if str(case.mock.case.phase) == phase
    ]
    by_rank: dict[int, list[AnyCase]] = {}
    for match in cases:
        entry = entries[str(match.mock.case.phase)]
        by_rank.setdefault(entry.tp_size, []).append(match.mock.case)
    groups = [group for tp, found in by_rank.items() for group in _groups(record, tp, found)]
    rows = _measure(folder / "engine", groups, record, where, on_event)
    measured = {_case(row): row for row in rows.values()}
    shipped: dict[Case, float] = {}
    for table in options.shipped:
        shipped |= shipped_latencies(
            table, {case: row.columns for case, row in measured.items() if row.columns}
        )
    return compare_with_engine(
        " ".join(sorted({entry.id for entry in entries.values()})),
        op,
        cases,
        measured,
        shipped,
        **({} if options.tolerance is None else {"tolerance": options.tolerance}),
    )


def _entries(ledger: Ledger, record: Record) -> dict[str, LedgerEntry]:
    """The verdict of each phase of a collection.

    Raises:
        BadInput: the ledger lacks one: a phase that is not compared must not pass.
    """
    wanted = set(record.verdicts.split())
    found = {}
    for phase in record.admitted:
        entries = ledger.entries(record.op, phase=phase or None, backend=record.backend)
        known = [entry for entry in entries if entry.id in wanted]
        if not known:
            raise BadInput(
                f"the ledger {ledger.path} does not hold the verdict that admitted this collection "
                f"({' '.join((record.verdicts or 'it was waived', phase)).strip()})",
                "there is no engine's trace to compare with",
            )
        found[phase] = known[0]
    return found


def _check_gpu(record: Record, where: Where) -> None:
    """Raise BadInput when this host's GPUs are not what was collected on."""
    wanted = {str(found["gpu"]) for found in record.admitted.values()}
    here = {gpu.name for gpu in where.gpus} or ({NO_GPU} if where.engine == "local" else wanted)
    if here - wanted:
        raise BadInput(
            f"{record.op} was collected on {', '.join(sorted(wanted))}, "
            f"this is {', '.join(sorted(here - wanted))}",
            "measuring again tells something on the same kind of GPU only; choose with --gpus",
        )


def _case(row: Row) -> Case:
    case = case_from_json(row.case)
    assert isinstance(case, Case)  # only ops with phases are aligned
    return case


def _groups(record: Record, tp_size: int, cases: Sequence[AnyCase]) -> list[Group]:
    sweep = Sweep("a sample", (tp_size,), tuple(dict.fromkeys(cases)), {})
    return make_groups(again(record, find_op(record.op)), sweep, record.timing, ordered=False)


def _measure(
    folder: Path, groups: Sequence[Group], record: Record, where: Where, on_event: OnEvent
) -> dict[str, Row]:
    """Measure groups in a folder of their own; rows by key."""
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    here = folder / stamp
    # Admitted once: what was collected is measured again, whatever the ledger says by now.
    admitted = Admission(record.op, record.backend, waiver="measured again")
    told = next(iter(record.admitted.values()))
    head = head_of(record.backend, str(told["framework"]), str(told["gpu"]))
    measure(groups, where, here, admitted, on_event, head=head)
    return read_parts(here).rows


def _latency(row: Row, latency: Latency) -> float:
    assert row.measurement is not None
    return choose(row.measurement, latency).ms
