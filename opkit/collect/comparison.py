"""What a comparison of two collections says, as plain data: rows, groups, kernels, facts.

A is the first, B the second, as in a comparison of alignments, whose JSON has the same frame; every
ratio is B over A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from opkit.align.comparison import SCHEMA
from opkit.collect.tables.validate import Value


class Change(StrEnum):
    """What became of a row."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"


@dataclass(frozen=True)
class Mover:
    """The kernel whose time changed most: its kind, and microseconds a forward on both sides."""

    kernel: str
    us_a: float
    us_b: float


@dataclass(frozen=True)
class RowChange:
    """One row on both sides.

    Attributes:
        table, group, label: where it stands and what it is called: ``group`` is what its curves
            share (as ``num_heads 128 · step 0``), ``label`` its sizes.
        columns: of the table.
        latency_ms_a, latency_ms_b: the tables' latencies.
        allowed: share by which it may differ and is the same: both intervals of the medians,
            combined, and at least ``FLOOR``.
        combined: root of the sum of squares of both 95 % half-widths, as a share; None where one
            of them is not known (fewer than five samples).
        change: slower, faster or same.
        kernels_gone, kernels_new: kinds of kernels that only the one or the other launched.
        variants: names differ, kinds do not: other tiles or templates.
        mover: the kernel that moved most, where kernels were recorded on both sides and one moved.
        launch: launch modes of A and B.
        source: which time was the latency, of A and B.
        flags: of A and B.
    """

    table: str
    group: str
    label: str
    columns: Mapping[str, Value]
    latency_ms_a: float
    latency_ms_b: float
    allowed: float
    combined: float | None
    change: Change
    kernels_gone: tuple[str, ...]
    kernels_new: tuple[str, ...]
    variants: bool
    mover: Mover | None
    launch: tuple[str, str]
    source: tuple[str, str]
    flags: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def ratio(self) -> float:
        """B over A: above 1 is slower."""
        return self.latency_ms_b / self.latency_ms_a

    @property
    def times_allowed(self) -> float:
        """How far it moved, in what it may: above 1 it has changed. In logarithms, as that is."""
        return abs(math.log(self.ratio)) / math.log1p(self.allowed)


@dataclass(frozen=True)
class GroupChange:
    """The rows of one set of curves, or of all: how many changed, and by how much.

    ``median``, ``least`` and ``most`` are of the ratios B over A.
    """

    table: str
    group: str
    rows: int
    slower: int
    faster: int
    same: int
    median: float
    least: float
    most: float


@dataclass(frozen=True)
class OneSided:
    """A row that only one collection has; ``why`` says what the other one has instead."""

    table: str
    group: str
    label: str
    columns: Mapping[str, Value]
    latency_ms: float
    why: str


@dataclass(frozen=True)
class Place:
    """One size of a curve: the row that both have, or the one that A or B has."""

    x: Value
    row: RowChange | None = None
    only_a: OneSided | None = None
    only_b: OneSided | None = None

    @property
    def latency_ms_a(self) -> float | None:
        """None where A has no row."""
        found = self.only_a.latency_ms if self.only_a else None
        return self.row.latency_ms_a if self.row else found

    @property
    def latency_ms_b(self) -> float | None:
        """None where B has no row."""
        found = self.only_b.latency_ms if self.only_b else None
        return self.row.latency_ms_b if self.row else found


@dataclass(frozen=True)
class Curve:
    """A's and B's curve of one panel, in order of x; ``name`` is empty where there is only one."""

    name: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class CurveGroup:
    """Curves that share a table and all but their panels' columns and x, which is ``x``."""

    table: str
    name: str
    x: str
    curves: tuple[Curve, ...]

    @property
    def xs(self) -> tuple[Value, ...]:
        """All values of x, in order; numbers before text."""
        found = {place.x for curve in self.curves for place in curve.places}
        return tuple(sorted(found, key=lambda x: (isinstance(x, str), x)))


@dataclass(frozen=True)
class Difference:
    """What the two collections differ in, besides their rows.

    Attributes:
        name: in words: ``GPU``, ``vllm``, ``pacing`` …
        a, b: as text; empty where it is not known.
        warns: the ratios do not tell software from this: other machines, other methods.
    """

    name: str
    a: str
    b: str
    warns: bool


@dataclass(frozen=True)
class KernelChange:
    """A kind of kernel that rows launch on one side only; ``gone`` and ``new`` count the rows."""

    kernel: str
    gone: int
    new: int


@dataclass(frozen=True)
class CollectionComparison:
    """Two collections of one op.

    Attributes:
        op: the op of both.
        backends, names: of A and B; a name is the folder.
        rows: those that both have, largest change first.
        overall: of all of these.
        groups: of each set of curves, in the tables' order.
        only_a, only_b: rows of one side only.
        curves: all these rows, laid out as the curves of A and B.
        kernels: kinds of kernels that changed, most rows first.
        differences: of versions, machines and methods; those that warn first.
        floor: share by which any row may differ and is the same.
        notes: what the folders themselves need to have said.
    """

    op: str
    backends: tuple[str, str]
    names: tuple[str, str]
    rows: tuple[RowChange, ...]
    overall: GroupChange
    groups: tuple[GroupChange, ...]
    only_a: tuple[OneSided, ...]
    only_b: tuple[OneSided, ...]
    curves: tuple[CurveGroup, ...]
    kernels: tuple[KernelChange, ...]
    differences: tuple[Difference, ...]
    floor: float
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why a ratio may be of the machine or the method rather than of the software."""
        return tuple(_warning(item) for item in self.differences if item.warns)

    @property
    def changed(self) -> tuple[RowChange, ...]:
        """Rows that are slower or faster than their spread explains, largest change first."""
        return tuple(row for row in self.rows if row.change is not Change.SAME)

    @property
    def differs(self) -> bool:
        """Whether a row's time or kernels changed, or a row is on one side only."""
        return bool(self.changed or self.kernels or self.only_a or self.only_b)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; every row that both have, changed or not."""
        data = asdict(replace(self, curves=()))  # the rows, once more
        rows = [row | {"ratio": made.ratio, "times_allowed": made.times_allowed}
                for row, made in zip(data["rows"], self.rows, strict=True)]  # fmt: skip
        sides = [
            {"name": name, "backend": backend}
            for name, backend in zip(self.names, self.backends, strict=True)
        ]
        return {
            "schema": SCHEMA,
            "kind": "collection",
            "op": self.op,
            "differs": self.differs,
            "a": sides[0],
            "b": sides[1],
            "warnings": list(self.warnings),
            "notes": data["notes"],
            "provenance": data["differences"],
            "limits": {"floor": self.floor},
            "overall": data["overall"],
            "groups": data["groups"],
            "rows": rows,
            "only_a": data["only_a"],
            "only_b": data["only_b"],
            "kernels": data["kernels"],
        }


def _warning(found: Difference) -> str:
    """What differs, or which side does not say it: that is no difference yet."""
    if found.a and found.b:
        return f"{found.name} differs: {found.a} in A, {found.b} in B"
    known, silent = ("A", "B") if found.a else ("B", "A")
    return f"{found.name} is not known of {silent}; {known} says {found.a or found.b}"
