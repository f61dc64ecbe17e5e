"""A table that fits its terminal: columns leave in a declared order, no cell wraps by accident."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.box import Box
from rich.table import Table
from rich.text import Text

NOTHING = Text("–", style="dim")
GAP = 2  # blanks between columns
# Lines under the heading and before a section, nothing else.
LINES = Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")
# A flexible column narrower than this says too little: rather drop another column.
NARROWEST_FLEXIBLE = 36


@dataclass
class Column:
    """One column of a table.

    Attributes:
        title: its heading.
        cells: one a row; a cell may have several lines.
        right: numbers are set to the right.
        flexible: takes what width the others leave; its cells end in an ellipsis.
        tail: cells that are too long lose their beginning: the end of a path says most.
        leaves: columns with the highest number leave first, together; 0 never leaves.
        short: the narrow form, tried before the column leaves.
    """

    title: str
    cells: list[Text] = field(default_factory=list)
    right: bool = False
    flexible: bool = False
    tail: bool = False
    leaves: int = 0
    short: Column | None = None

    def width(self) -> int:
        """Cells of the widest line."""
        lines = [line.cell_len for cell in self.cells for line in cell.split("\n")]
        return max([len(self.title), *lines])

    def least(self) -> int:
        """The width below which the column is of no use."""
        return min(self.width(), NARROWEST_FLEXIBLE) if self.flexible else self.width()


def fit(columns: list[Column], width: int) -> list[Column]:
    """The columns that fit in ``width`` cells, in their order; shortened, then dropped."""
    kept = list(columns)
    while sum(c.least() for c in kept) + GAP * (len(kept) - 1) > width:
        next_to_leave = max(column.leaves for column in kept)
        if next_to_leave == 0:
            break
        shorter = [c.short if c.leaves == next_to_leave else c for c in kept]
        kept = [column for column in shorter if column is not None]
    return kept


def table(columns: list[Column], width: int, sections: tuple[int, ...] = ()) -> Table:
    """A rich table of the columns that fit, with a line before the rows in ``sections``."""
    kept = fit(columns, width)
    others = sum(column.width() for column in kept if not column.flexible)
    room = width - others - GAP * (len(kept) - 1)
    made = Table(
        box=LINES, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0),
        header_style="dim", border_style="dim",
    )  # fmt: skip
    for column in kept:
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            # Rich would take the missing width from every column alike; only this one can spare it.
            width=min(column.width(), max(room, 1)) if column.flexible else column.width(),
        )
    cells = [_ends(c.cells, max(room, 1)) if c.tail and c.flexible else c.cells for c in kept]
    for number, row in enumerate(zip(*cells, strict=True)):
        if number in sections:
            made.add_section()
        made.add_row(*row)
    return made


def _ends(cells: list[Text], width: int) -> list[Text]:
    """Cells cut at their beginning to ``width``."""
    return [
        cell if cell.cell_len <= width else Text("…" + cell.plain[1 - width :], style=cell.style)
        for cell in cells
    ]
