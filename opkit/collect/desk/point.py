"""One row of a collection as it is looked at: its time, how its samples lie, what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opkit.collect.measurement import Measurement
from opkit.collect.tables.validate import Value
from opkit.collect.timing.stats import percentile
from opkit.collect.work import Fault

# Columns that name what was measured for people only. aiconfigurator 0.12.0 reads neither, so two
# rows that differ in nothing else are the same row to it.
NAMES = ("model",)


@dataclass(frozen=True)
class Spread:
    """How samples lie: their number, and least, lower quartile, median, upper quartile, most, ms.

    Quartiles are definition 7 of Hyndman and Fan (:func:`opkit.collect.timing.stats.percentile`).
    """

    count: int
    least: float
    lower: float
    median: float
    upper: float
    most: float


def spread_of(samples: Sequence[float]) -> Spread:
    """The spread of ``samples`` (milliseconds); ValueError when there are none."""
    return Spread(len(samples), *(percentile(samples, at) for at in (0.0, 25.0, 50.0, 75.0, 100.0)))


@dataclass(frozen=True)
class Point:
    """One row of a table.

    Attributes:
        table: its name.
        key: the row's content key.
        columns: the table's own columns.
        latency_ms: what the table holds.
        source: which time that is, ``elapsed`` or ``gpu``.
        spread: of the samples that it is the median of.
        interval: half the 95 % interval of the median, as a share of it; None for few samples.
        bound_ms: least possible time (:mod:`opkit.collect.tables.bound`); None when unknown.
        flags: as in the table.
        measured: all that was measured.
        gpu, host, created, seconds, attempts, build: as in :class:`opkit.collect.work.Row`.
        odd: what the soft rules of :mod:`opkit.collect.tables.validate` say of it, with numbers.
    """

    table: str
    key: str
    columns: Mapping[str, Value]
    latency_ms: float
    source: str
    spread: Spread
    interval: float | None
    bound_ms: float | None
    flags: tuple[str, ...]
    measured: Measurement
    gpu: Mapping[str, Any] = field(default_factory=dict)
    host: str = ""
    created: str = ""
    seconds: float = 0.0
    attempts: int = 1
    build: str = ""
    odd: tuple[str, ...] = ()

    @property
    def over_bound(self) -> float | None:
        """How many times the least possible time it takes; None where that is unknown or 0."""
        return self.latency_ms / self.bound_ms if self.bound_ms else None

    @property
    def elapsed_ms(self) -> float | None:
        """Median time on the GPU's timeline."""
        return _median(self.measured.elapsed_ms)

    @property
    def gpu_ms(self) -> float | None:
        """Median of the sum of kernel times; None where it was not taken."""
        return _median(self.measured.gpu_ms)


@dataclass(frozen=True)
class Lost:
    """A case of the sweep that has no row in the table.

    Attributes:
        table: name of the table that it belongs to.
        key: its content key.
        columns: the table's columns as far as they are known without a build: its sizes.
        why: ``failed`` (quarantined), ``left out`` (a hard rule of validation), ``not run`` or
            ``not written`` (measured, but the tables were not written since).
        fault: the cause, of a failed one.
        what: one sentence: the error, or the rule's words.
        attempts: times it was tried.
        group: the build that it belongs to, in words.
        ranks: the build's tensor-parallel size; None where the group's name does not tell.
    """

    table: str
    key: str
    columns: Mapping[str, Value]
    why: str
    fault: Fault | None = None
    what: str = ""
    attempts: int = 0
    group: str = ""
    ranks: int | None = None


def identity(columns: Mapping[str, Value]) -> tuple[tuple[str, Value], ...]:
    """What makes a row of a table this row: all its columns but the names for people."""
    return tuple(sorted(item for item in columns.items() if item[0] not in NAMES))


def _median(samples: Sequence[float]) -> float | None:
    return percentile(samples, 50.0) if samples else None
