"""A collection read back: its tables in the terminal and as Markdown. The page shows the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from opkit.collect.desk.desk import CurveGroup, Desk, Range, TableDesk
from opkit.collect.desk.point import Lost
from opkit.reports.columns import Column, table
from opkit.reports.facts import SEPARATOR, WIDEST, rows_of
from opkit.reports.markdown import NOTHING, folded, rows, text

ODD = 8  # rows that stand out, listed in the terminal
TOLD = ("framework", "version", "device", "latency", "verdict", "waiver")


def print_desk(desk: Desk, console: Console, *, verbose: bool = False) -> None:
    """Print a collection's tables: rows, spread, distance to the bound, and what stands out.

    Args:
        desk: the collection, laid out.
        console: where to; its width decides which columns are shown.
        verbose: list every row that stands out.
    """
    width = min(console.width, WIDEST)
    found = desk.collection
    console.print(Text.assemble((f"{found.op} on {found.backend}", "bold"),
                                (f"  {found.folder}", "dim")))  # fmt: skip
    for one in desk.tables:
        console.print()
        console.print(Text.assemble((one.read.name, "bold"), f"  {status(one)}"))
        console.print(Text(told(one), style="dim"))
        if one.groups:
            console.print(_groups(one, width))
        _odd(one, console, verbose)
        _lost(one, console, verbose)
    console.print()
    for line in (*found.notes, *power(desk)):
        console.print(Text(line, style="yellow" if line in found.notes else "dim"))


def status(one: TableDesk) -> str:
    """Rows, what became of the others, and the spread of the medians."""
    parts = [rows_of(len(one.read.points)), one.read.status]
    parts += [f"{count:,} {state}" for state, count in one.states.items() if state != "measured"]
    if one.interval is not None:
        parts.append(
            f"95 % interval of a median ± {one.interval.median:.2%}, at most "
            f"{one.interval.most:.2%}"
        )
    return SEPARATOR.join(parts)


def told(one: TableDesk) -> str:
    """What the table was made with."""
    known: Mapping[str, object] = one.read.told
    parts = [str(known[name]) for name in TOLD[:3] if known.get(name)]
    parts += [f"{name} {known[name]}" for name in TOLD[3:] if known.get(name)]
    return SEPARATOR.join(parts)


def power(desk: Desk) -> list[str]:
    """A sentence on the rows whose power was measured, and on throttling."""
    found = []
    if desk.power:
        found.append(f"power was measured with {rows_of(len(desk.power))}")
    throttled = sum(moment.throttled for moment in desk.moments)
    if throttled:
        found.append(f"{rows_of(throttled)} measured while the GPU was throttled")
    return found


def _groups(one: TableDesk, width: int) -> object:
    groups = one.groups
    columns = [
        Column("curves", [Text(group.name or "all") for group in groups], flexible=True),
        Column("rows", [Text(f"{_rows(group):,}") for group in groups], True),
        Column("ms", [Text(latencies(group)) for group in groups], True, leaves=2),
        Column("× bound", [Text(range_text(group.over_bound)) for group in groups], True, leaves=1),
    ]
    if one.shipped is not None:
        columns.append(
            Column("× shipped", [Text(range_text(g.over_shipped)) for g in groups], True)
        )
    return table(columns, width)


def _rows(group: CurveGroup) -> int:
    return sum(len(panel.marks) for panel in group.panels)


def latencies(group: CurveGroup) -> str:
    """Least to largest latency."""
    found = [mark.point.latency_ms for panel in group.panels for mark in panel.marks]
    return f"{min(found):,.4f} to {max(found):,.4f}" if found else NOTHING


def range_text(found: Range | None) -> str:
    """Median, and least to most: ``3.1 (1.9 to 12.4)``."""
    if found is None:
        return NOTHING
    return f"{found.median:,.2f} ({found.least:,.2f} to {found.most:,.2f})"


def outliers(one: TableDesk) -> list[str]:
    """Rows that stand out, each with its numbers."""
    return [
        f"{one.layout.group(mark.point.columns)} {one.layout.label(mark.point.columns)}: "
        + "; ".join(mark.point.odd or mark.point.flags)
        for mark in one.marks
        if mark.outlier
    ]


def missing(one: TableDesk) -> list[str]:
    """Cases without a row, each with its reason."""
    return [
        f"{_place(one, item)}: {item.why}" + (f" ({item.what})" if item.what else "")
        for item in one.read.lost
    ]


def _place(one: TableDesk, item: Lost) -> str:
    """What tells a case from the others; with its build's name where that is not known in full."""
    known = all(name in item.columns for name in one.layout.sizes)
    return " ".join(filter(None, ("" if known else item.group, one.layout.place(item.columns))))


def _odd(one: TableDesk, console: Console, verbose: bool) -> None:
    _list(outliers(one), "stands out: ", "yellow", console, verbose)
    for flag, count in one.flags.items():
        console.print(Text(f"{rows_of(count)} flagged {flag}", style="yellow"))


def _lost(one: TableDesk, console: Console, verbose: bool) -> None:
    _list(missing(one), "no row: ", "red", console, verbose)


def _list(lines: Sequence[str], word: str, style: str, console: Console, verbose: bool) -> None:
    shown = lines if verbose else lines[:ODD]
    for line in shown:
        console.print(Text(word + " ".join(line.split()), style=style))
    if len(lines) > len(shown):
        console.print(Text(f"… and {len(lines) - len(shown):,} more; --verbose lists all", "dim"))


def desk_markdown(desk: Desk) -> str:
    """A collection as GitHub-flavoured Markdown, ending in a line break."""
    found = desk.collection
    lines = [f"### {text(found.op)} on {text(found.backend)}", ""]
    lines += rows(
        ("table", "rows", "status", "95 % interval", "× bound", "flags"),
        [_table_cells(one) for one in desk.tables],
        " r rr",
    )
    for note in (*found.notes, *power(desk)):
        lines += ["", f"> {text(note)}"]
    for one in desk.tables:
        lines += ["", f"**{text(one.read.name)}**: {text(told(one))}"]
        if one.groups:
            lines += ["", *folded(f"curves: {len(one.groups)}", _group_rows(one))]
        for about, inside in (("rows stand out", outliers(one)), ("cases have no row",
                                                                  missing(one))):  # fmt: skip
            if inside:
                lines += [
                    "",
                    *folded(f"{about}: {len(inside):,}", [f"- {text(x)}" for x in inside]),
                ]
    return "\n".join(lines) + "\n"


def _table_cells(one: TableDesk) -> tuple[str, ...]:
    marks = [mark.point.over_bound for mark in one.marks]
    known = sorted(ratio for ratio in marks if ratio is not None)
    flags = ", ".join(f"{count:,} {flag}" for flag, count in one.flags.items())
    return (
        text(one.read.name),
        f"{len(one.read.points):,}",
        text(one.read.status),
        NOTHING if one.interval is None else f"± {one.interval.median:.2%}",
        f"{known[0]:,.2f} to {known[-1]:,.2f}" if known else NOTHING,
        text(flags) if flags else NOTHING,
    )


def _group_rows(one: TableDesk) -> list[str]:
    cells = [
        (
            text(group.name or "all"),
            f"{_rows(group):,}",
            latencies(group),
            range_text(group.over_bound),
            *((range_text(group.over_shipped),) if one.shipped else ()),
        )
        for group in one.groups
    ]
    shipped = ("× shipped",) if one.shipped else ()
    return rows(("curves", "rows", "ms", "× bound", *shipped), cells, " rrrr")
