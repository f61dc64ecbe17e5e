"""A table that fits its terminal: columns leave in a declared order, no cell wraps by accident."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import Box
from rich.table import Table
from rich.text import Text

NOTHING = Text("–", style="dim")
GAP = 2  # blanks between columns
# Lines under the heading and before a section, nothing else.
LINES = Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")
# A flexible column narrower than this says too little: rather drop another column.
NARROWEST_FLEXIBLE = 35
ELLIPSIS = "…"
# What stands before a second name in a cell; it tells no name from another.
BEFORE = re.compile(r"→ |mock: ")


@dataclass
class Column:
    """One column of a table.

    Attributes:
        title: its heading.
        cells: one a row; a cell may have several lines.
        right: numbers are set to the right.
        flexible: takes what width the others leave; lines that are too long lose their middle,
            or are folded where two that differ would then look alike.
        narrowest: width below which a flexible column has others leave.
        tail: cells that are too long lose their beginning: the end of a path says most.
        leaves: columns with the highest number leave first, together; 0 never leaves.
        short: the narrow form, tried before the column leaves.
    """

    title: str
    cells: list[Text] = field(default_factory=list)
    right: bool = False
    flexible: bool = False
    narrowest: int = NARROWEST_FLEXIBLE
    tail: bool = False
    leaves: int = 0
    short: Column | None = None

    def width(self) -> int:
        """Cells of the widest line."""
        lines = [line.cell_len for cell in self.cells for line in cell.split("\n")]
        return max([len(self.title), *lines])

    def least(self) -> int:
        """The width below which the column is of no use."""
        return min(self.width(), self.narrowest) if self.flexible else self.width()


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
    cells = [
        c.cells if not c.flexible else (_ends if c.tail else middles)(c.cells, max(room, 1))
        for c in kept
    ]
    for number, row in enumerate(zip(*cells, strict=True)):
        if number in sections:
            made.add_section()
        made.add_row(*row)
    return made


def middles(cells: Sequence[Text], width: int) -> list[Text]:
    """Cells whose lines fit in ``width``: of a name its beginning says what, its end which.

    Too long lines lose their middle; those of which two would then look alike, though they differ
    in what was cut, are folded instead.
    """
    long = dict.fromkeys(
        line.plain for cell in cells for line in cell.split("\n") if line.cell_len > width
    )
    cut = {name: _around(name, width) for name in long}
    alike = {
        one
        for one in long
        for other in long
        if _name(one) != _name(other) and _could_be_one(cut[one], cut[other])
    }

    def fitted(line: Text) -> Text:
        if line.plain not in cut:
            return line
        if line.plain in alike:
            return _folded(line, width)
        head, tail = cut[line.plain]
        return line[: len(head)] + Text(ELLIPSIS) + line[len(line) - len(tail) :]

    return [Text("\n").join(map(fitted, cell.split("\n"))) for cell in cells]


def _around(name: str, width: int) -> tuple[str, str]:
    """What stays of a name on both sides of the ellipsis."""
    tail = max(width - 1, 0) // 2
    return name[: max(width - 1 - tail, 0)], name[len(name) - tail :]


def _name(line: str) -> str:
    return BEFORE.sub("", line, count=1)


def _could_be_one(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two cut names may be read as the same name, cut at different places."""
    (head, tail), (head2, tail2) = ((_name(h), t) for h, t in (one, other))
    heads = head.startswith(head2) or head2.startswith(head)
    return heads and (tail.endswith(tail2) or tail2.endswith(tail))


def _folded(line: Text, width: int) -> Text:
    """A line over several, broken behind ``_`` or a bracket where one stands near the edge."""
    pieces, room = [], width
    while line.cell_len > room > 2:
        at = max(line.plain.rfind(sign, room // 2, room) for sign in "_,(<: ") + 1 or room
        pieces.append(line[:at])
        line, room = line[at:], width - 2
    return Text("\n  ").join([*pieces, line])


def _ends(cells: list[Text], width: int) -> list[Text]:
    """Cells cut at their beginning to ``width``."""
    return [
        cell if cell.cell_len <= width else Text("…" + cell.plain[1 - width :], style=cell.style)
        for cell in cells
    ]
