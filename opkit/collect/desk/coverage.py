"""Which cases of a sweep are measured, which are not and why: a grid for each group of curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from opkit.collect.desk.point import Lost, Point
from opkit.collect.desk.series import Layout, ordered
from opkit.collect.tables.validate import Value


class State(StrEnum):
    """What became of a case."""

    MEASURED = "measured"
    FLAGGED = "flagged"
    FAILED = "failed"
    LEFT_OUT = "left out"
    NOT_RUN = "not run"
    NOT_WRITTEN = "not written"
    NONE = "no row"  # not in the sweep, as far as is known


@dataclass(frozen=True)
class Cell:
    """One case: its state, the flags of its row, and why it has none.

    Attributes:
        state: what became of it.
        flags: of the row.
        what: one sentence, of a case without a row.
        key: of the row or case; empty where there is none.
    """

    state: State
    flags: tuple[str, ...] = ()
    what: str = ""
    key: str = ""


@dataclass(frozen=True)
class Grid:
    """The cases of one group: a row a panel, a column a value of x.

    Attributes:
        rows: names of the panels; one empty name where a group has one only.
        columns: values of x.
        cells: by row, then column.
    """

    rows: tuple[str, ...]
    columns: tuple[Value, ...]
    cells: tuple[tuple[Cell, ...], ...]


def grid_of(layout: Layout, points: Sequence[Point], lost: Sequence[Lost]) -> Grid:
    """The grid of one group.

    Args:
        layout: of the table.
        points, lost: of the group.
    """
    both: list[Point | Lost] = [*lost, *points]
    sizes: list[Mapping[str, Value]] = [item.columns for item in both]
    rows = ordered(layout.panel, sizes)
    columns = sorted({known[layout.x] for known in sizes if layout.x in known}, key=_order)
    cells = {
        (layout.panel_of(item.columns), item.columns.get(layout.x)): _cell(item) for item in both
    }
    none = Cell(State.NONE)
    return Grid(
        tuple(rows),
        tuple(columns),
        tuple(tuple(cells.get((row, column), none) for column in columns) for row in rows),
    )


def _order(value: Value) -> tuple[bool, Value]:
    return isinstance(value, str), value


def _cell(item: Point | Lost) -> Cell:
    if isinstance(item, Point):
        return Cell(State.FLAGGED if item.flags else State.MEASURED, item.flags, key=item.key)
    what = f"{item.fault}: {item.what}" if item.fault else item.what
    return Cell(State(item.why), what=what, key=item.key)
