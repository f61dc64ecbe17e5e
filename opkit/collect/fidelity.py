"""Against the engine: what a collected op takes, beside what the engine itself spent on the shape.

The engine's side comes out of the aligned trace (the ledger keeps it): the GPU time of the op in
one layer, kernel by kernel. Kernels whose time depends on operand values are stated apart, since
only the engine's own inputs give them the engine's own values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from opkit.align.result import AlignResult, CaseMatch
from opkit.collect.timing.stats import median
from opkit.collect.work import Row
from opkit.errors import BadInput
from opkit.layers.op import Case, LaunchMode, Op

US = 1e3  # nanoseconds
MS = 1e6


@dataclass(frozen=True)
class Shape:
    """One shape on both sides; milliseconds of GPU time of one layer's op.

    Attributes:
        case, mode: the shape and how the engine launched it.
        regions: the engine's regions behind the figure.
        ours_ms, engine_ms: summed kernel time, all kernels (medians).
        ours_rest_ms, engine_rest_ms: without the data-dependent kernels (sums of medians).
        data_share: part of the engine's kernel time that is data-dependent, 0 to 1.
        elapsed_ms: ours on the GPU timeline, as a table of this launch mode may hold it.
        shipped_ms: what a shipped table says; None without one, or where it has no row.
    """

    case: Case
    mode: LaunchMode
    regions: int
    ours_ms: float
    engine_ms: float
    ours_rest_ms: float
    engine_rest_ms: float
    data_share: float
    elapsed_ms: float
    shipped_ms: float | None = None

    @property
    def ratio(self) -> float:
        """Ours over the engine's, all kernels."""
        return self.ours_ms / self.engine_ms

    @property
    def rest_ratio(self) -> float:
        """Ours over the engine's, without the data-dependent kernels."""
        return self.ours_rest_ms / self.engine_rest_ms

    @property
    def shipped_ratio(self) -> float | None:
        """The shipped table's latency over the engine's GPU time."""
        return None if self.shipped_ms is None else self.shipped_ms / self.engine_ms


@dataclass(frozen=True)
class Fidelity:
    """All shapes of one comparison, and those that could not be compared."""

    alignment: str
    shapes: tuple[Shape, ...]
    failed: tuple[str, ...]
    tolerance: float

    def worst(self, phase: str) -> float:
        """Largest deviation of a phase: all kernels in generation, the rest in context."""
        return max((abs(value) for value in self.deviations(phase)), default=0.0)

    def median(self, phase: str) -> float:
        """Median of the absolute deviations of a phase."""
        return median([abs(value) for value in self.deviations(phase)])

    def deviations(self, phase: str) -> list[float]:
        """Ours over the engine's minus one, of each shape of a phase.

        In context without the data-dependent kernels, whose inputs are not the engine's own there.
        """
        return [
            (shape.rest_ratio if phase == "context" else shape.ratio) - 1
            for shape in self.shapes
            if str(shape.case.phase) == phase
        ]

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that have a shape."""
        return tuple(dict.fromkeys(str(shape.case.phase) for shape in self.shapes))

    @property
    def passed(self) -> bool:
        """Whether every shape was compared and is within the tolerance."""
        near = all(self.worst(phase) <= self.tolerance for phase in self.phases)
        return bool(self.shapes) and not self.failed and near


def engine_cases(found: AlignResult) -> list[CaseMatch]:
    """The aligned cases whose launch mode is known, in the order of the report."""
    return [case for phase in found.phases for case in phase.cases if case.e2e.mode is not None]


def compare_with_engine(
    alignment: str,
    op: Op,
    cases: Sequence[CaseMatch],
    measured: Mapping[Case, Row],
    shipped: Mapping[Case, float] | None = None,
    tolerance: float = 0.03,
) -> Fidelity:
    """Put measured rows beside the engine's regions of the same shapes.

    Args:
        alignment: the verdict's id.
        op: tells which kernels depend on data.
        cases: the aligned cases.
        measured: a row for each case of the mock; a missing or failed one is listed.
        shipped: latencies of another table, milliseconds.
        tolerance: share by which a shape may deviate.
    """
    shapes, failed = [], []
    for match in cases:
        case, mode = match.mock.case, match.e2e.mode
        row = measured.get(case)
        if row is None or row.measurement is None or not row.measurement.gpu_ms or mode is None:
            why = (row.error if row is not None else "") or "no GPU time was measured"
            failed.append(f"{case.phase} {case.label()}: {why}")
            continue
        if row.measurement.launch is not mode:
            why = f"measured in mode {row.measurement.launch}, the engine ran it in mode {mode}"
            failed.append(f"{case.phase} {case.label()}: {why}")
            continue
        engine = [(pair.e2e.name, pair.e2e.median_ns / MS) for pair in match.pairs if pair.e2e]
        ours = [(kernel.name, kernel.us / US) for kernel in row.measurement.kernels]
        total = sum(ms for _, ms in engine)
        rest = _rest(op, engine)
        shapes.append(
            Shape(
                case=case,
                mode=mode,
                regions=match.e2e.regions,
                ours_ms=median(row.measurement.gpu_ms),
                engine_ms=match.e2e.gpu_ns / MS,
                ours_rest_ms=_rest(op, ours),
                engine_rest_ms=rest,
                data_share=1 - rest / total,
                elapsed_ms=median(row.measurement.elapsed_ms),
                shipped_ms=(shipped or {}).get(case),
            )
        )
    return Fidelity(alignment, tuple(shapes), tuple(failed), tolerance)


def _rest(op: Op, kernels: Sequence[tuple[str, float]]) -> float:
    """Time of the kernels that do not depend on data."""
    patterns = [re.compile(pattern) for pattern in op.data_dependent]
    return sum(ms for name, ms in kernels if not any(p.search(name) for p in patterns))


def shipped_latencies(
    table: Path, columns: Mapping[Case, Mapping[str, str | int | float]]
) -> dict[Case, float]:
    """What another table says of the cases; between two steps of one batch, linearly in between.

    Args:
        table: a perf table (parquet) with ``batch_size``, ``isl``, ``step``, ``latency``.
        columns: each case's own columns, as :attr:`opkit.layers.op.Op.columns` gives them.

    Raises:
        BadInput: the table cannot be read.
    """
    found = {}
    sql = (
        "SELECT step, avg(latency) FROM read_parquet(?) WHERE architecture = ? AND mla_dtype = ? "
        "AND kv_cache_dtype = ? AND gemm_type = ? AND num_heads = ? AND batch_size = ? AND isl = ? "
        "GROUP BY step ORDER BY step"
    )
    names = ("architecture", "mla_dtype", "kv_cache_dtype", "gemm_type", "num_heads", "batch_size",
             "isl")  # fmt: skip
    for case, row in columns.items():
        try:
            rows = duckdb.execute(sql, [str(table), *(row[name] for name in names)]).fetchall()
        except duckdb.Error as error:
            raise BadInput(f"{table}: not a readable perf table ({error})") from error
        value = between([(float(step), float(ms)) for step, ms in rows], case.past)
        if value is not None:
            found[case] = value
    return found


def between(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Linear interpolation of sorted points; None outside them."""
    for step, value in points:
        if step == at:
            return value
    for left, right in itertools.pairwise(points):
        if left[0] < at < right[0]:
            share = (at - left[0]) / (right[0] - left[0])
            return left[1] + share * (right[1] - left[1])
    return None
