"""What a comparison of two collections says, as plain data: rows, groups, kernels, facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from opkit.collect.tables.validate import Value

SCHEMA = "opkit.collection_comparison/1"


class Change(StrEnum):
    """What became of a row."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"


@dataclass(frozen=True)
class Mover:
    """The kernel whose time changed most: its kind, and microseconds a forward on both sides."""

    kernel: str
    before_us: float
    after_us: float


@dataclass(frozen=True)
class RowChange:
    """One row on both sides.

    Attributes:
        table, group, label: where it stands and what it is called: ``group`` is what its curves
            share (as ``num_heads 128 · step 0``), ``label`` its sizes.
        columns: of the table.
        before_ms, after_ms: the tables' latencies.
        allowed: share by which it may differ and is the same: both intervals of the medians,
            combined, and at least ``FLOOR``.
        combined: root of the sum of squares of both 95 % half-widths, as a share; None where one
            of them is not known (fewer than five samples).
        change: slower, faster or same.
        kernels_gone, kernels_new: kinds of kernels that only the one or the other launched.
        variants: names differ, kinds do not: other tiles or templates.
        mover: the kernel that moved most, where kernels were recorded on both sides and one moved.
        launch: launch modes before and after.
        source: which time was the latency, before and after.
        flags: of both, before and after.
    """

    table: str
    group: str
    label: str
    columns: Mapping[str, Value]
    before_ms: float
    after_ms: float
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
        """After over before: above 1 is slower."""
        return self.after_ms / self.before_ms


@dataclass(frozen=True)
class GroupChange:
    """The rows of one set of curves, or of all: how many changed, and by how much.

    ``median``, ``least`` and ``most`` are of the ratios after over before.
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
class Difference:
    """What the two collections differ in, besides their rows.

    Attributes:
        what: in words: ``GPU``, ``vllm``, ``pacing`` …
        before, after: as text; empty where it is not known.
        warns: the ratios do not tell software from this: other machines, other methods.
    """

    what: str
    before: str
    after: str
    warns: bool


@dataclass(frozen=True)
class KernelChange:
    """A kind of kernel that rows launch on one side only; ``gone`` and ``new`` count the rows."""

    kernel: str
    gone: int
    new: int


@dataclass(frozen=True)
class CollectionComparison:
    """What changed from one collection to another.

    Attributes:
        op, backends, folders: what was compared, before and after.
        rows: those that both have, largest change first.
        overall: of all of these.
        groups: of each set of curves, in the tables' order.
        new, lost: rows of one side only.
        kernels: kinds of kernels that changed, most rows first.
        differences: of versions, machines and methods; those that warn first.
        notes: what the folders themselves need to have said.
    """

    op: str
    backends: tuple[str, str]
    folders: tuple[str, str]
    rows: tuple[RowChange, ...]
    overall: GroupChange
    groups: tuple[GroupChange, ...]
    new: tuple[OneSided, ...]
    lost: tuple[OneSided, ...]
    kernels: tuple[KernelChange, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    schema: str = SCHEMA

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why a ratio may be of the machine or the method rather than of the software."""
        return tuple(
            f"{item.what} differs: {item.before or '?'} before, {item.after or '?'} after"
            for item in self.differences
            if item.warns
        )

    @property
    def changed(self) -> tuple[RowChange, ...]:
        """Rows that are slower or faster than their spread explains, largest change first."""
        return tuple(row for row in self.rows if row.change is not Change.SAME)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with each row's ratio and the warnings."""
        data = asdict(self)
        for row, made in zip(data["rows"], self.rows, strict=True):
            row["ratio"] = made.ratio
        return {"schema": data.pop("schema"), **data, "warnings": list(self.warnings)}
