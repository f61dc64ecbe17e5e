"""Re-measuring: a random sample of a collection, measured again and compared with what was kept."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opkit.collect.timing.stats import median
from opkit.collect.work import Row
from opkit.errors import BadInput

TOLERANCE = 0.02  # of a row's latency
SAMPLE = 24  # rows measured again


@dataclass(frozen=True)
class Again:
    """One row measured twice. Latencies in milliseconds, as the table takes them."""

    key: str
    table: str
    label: str
    first_ms: float
    again_ms: float

    @property
    def deviation(self) -> float:
        """The second measurement over the first, minus one."""
        return self.again_ms / self.first_ms - 1


@dataclass(frozen=True)
class Verified:
    """What re-measuring showed.

    Attributes:
        rows: those measured twice, largest deviation first.
        failed: cases that could not be measured again, with the reason.
        tolerance: share by which a row may deviate.
    """

    rows: tuple[Again, ...]
    failed: tuple[str, ...]
    tolerance: float

    @property
    def median(self) -> float:
        """Median of the absolute deviations."""
        return median([abs(row.deviation) for row in self.rows])

    @property
    def worst(self) -> float:
        """Largest absolute deviation."""
        return max(abs(row.deviation) for row in self.rows)

    @property
    def outside(self) -> tuple[Again, ...]:
        """Rows beyond the tolerance."""
        return tuple(row for row in self.rows if abs(row.deviation) > self.tolerance)

    @property
    def passed(self) -> bool:
        """Whether every row of the sample was measured again, within the tolerance."""
        return bool(self.rows) and not self.failed and not self.outside


def pick(rows: Sequence[Row], count: int = SAMPLE, seed: int | None = None) -> list[Row]:
    """A random sample of rows that have a value, the same number of each table where there are.

    Raises:
        BadInput: there is nothing to pick from.
    """
    tables: dict[str, list[Row]] = {}
    for row in rows:
        if row.ok:
            tables.setdefault(row.table, []).append(row)
    if not tables:
        raise BadInput("nothing has been collected that could be verified")
    draw = random.Random(seed)
    for found in tables.values():
        draw.shuffle(found)
    # Round by round, so that a small table does not shrink the sample of a large one.
    order = [row for place in range(max(map(len, tables.values())))
             for found in tables.values() for row in found[place : place + 1]]  # fmt: skip
    return order[:count]


def compare(
    first: Sequence[Row],
    again: Mapping[str, Row],
    latencies: Mapping[str, float],
    repeated: Mapping[str, float],
    labels: Mapping[str, str],
    tolerance: float = TOLERANCE,
) -> Verified:
    """Compare a sample with its second measurement.

    Args:
        first: the sample.
        again: the second measurements by key; a key may be missing.
        latencies, repeated: milliseconds by key, of the first and of the second.
        labels: how a reader calls the case, by key.
        tolerance: share by which a row may deviate.
    """
    rows, failed = [], []
    for row in first:
        found = again.get(row.key)
        if found is None or not found.ok:
            why = found.error or str(found.fault) if found is not None else "not measured"
            failed.append(f"{labels[row.key]}: {why}")
            continue
        rows.append(
            Again(row.key, row.table, labels[row.key], latencies[row.key], repeated[row.key])
        )
    rows.sort(key=lambda item: -abs(item.deviation))
    return Verified(tuple(rows), tuple(failed), tolerance)
