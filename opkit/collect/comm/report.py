"""Rows of collectives for a reader: latency, spread, and what they mean as bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from opkit.collect.comm.sizes import algorithm_bandwidth, bus_bandwidth
from opkit.collect.tables.latency import Latency, choose
from opkit.collect.tables.provenance import spread_of
from opkit.collect.timing.stats import median
from opkit.collect.work import Row


@dataclass(frozen=True)
class CommLine:
    """One line of the report. Without a value ``fault`` and ``error`` say why.

    Attributes:
        implementation, op, dtype, ranks, size: of the case; ``size`` is the whole buffer in bytes.
        launch: how it was launched in fact, ``graph`` or ``eager``.
        served_by: the algorithm that answered, where the implementation has several.
        latency_ms: median over batches of the slowest rank's time for one launch.
        spread: half the 95 % interval of that median, as a share of it; None for few samples.
        algorithm_gbs, bus_gbs: GB/s, as nccl-tests defines them; the latter 0 for one rank.
        flags: as in the table.
    """

    implementation: str
    op: str
    dtype: str
    ranks: int
    size: int
    launch: str
    served_by: str = ""
    latency_ms: float | None = None
    spread: float | None = None
    algorithm_gbs: float | None = None
    bus_gbs: float | None = None
    flags: tuple[str, ...] = ()
    fault: str = ""
    error: str = ""


def line_of(row: Row) -> CommLine:
    """The line of a row."""
    case = row.case
    op, ranks, size = str(case["op"]), int(case["ranks"]), int(case["total_bytes"])
    known = (str(case["implementation"]), op, str(case["dtype"]), ranks, size)
    if row.measurement is None:
        return CommLine(*known, str(case["launch"]), fault=str(row.fault), error=row.error)
    latency = median(row.measurement.elapsed_ms)
    chosen = choose(row.measurement, Latency.ELAPSED)
    return CommLine(
        *known,
        launch=str(row.measurement.launch),
        served_by=str(case.get("served_by", "")),
        latency_ms=latency,
        spread=spread_of(row.measurement.elapsed_ms),
        algorithm_gbs=algorithm_bandwidth(size, latency),
        bus_gbs=bus_bandwidth(op, ranks, size, latency),
        flags=tuple(str(flag) for flag in chosen.flags),
    )
