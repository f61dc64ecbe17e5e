"""Two collections beside each other: in the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from opkit.collect.comparison import (
    Change,
    CollectionComparison,
    GroupChange,
    KernelChange,
    OneSided,
    RowChange,
)
from opkit.collect.desk.series import SEPARATOR
from opkit.reports.columns import NOTHING, Column, table
from opkit.reports.compare import both
from opkit.reports.facts import WIDEST, rows_of
from opkit.reports.markdown import code, folded, rows, text

SIGN = {Change.SLOWER: "▲", Change.FASTER: "▼", Change.SAME: "="}
STYLE = {Change.SLOWER: "red", Change.FASTER: "cyan", Change.SAME: "green"}
SHOWN = 20  # rows that changed, listed in the terminal
ALONE = 5  # rows of one side only


def print_rows(found: CollectionComparison, console: Console, *, verbose: bool = False) -> None:
    """Print what changed from collection A to B.

    Args:
        found: the comparison.
        console: where to; its width decides which columns are shown.
        verbose: list every changed row.
    """
    width = min(console.width, WIDEST)
    console.print(Text(f"{found.op}: A against B", style="bold"))
    for letter, name, backend in zip("AB", found.names, found.backends, strict=True):
        console.print(f"{letter}  {name}  {backend}", markup=False, highlight=False)
    for line in (*found.warnings, *found.notes):
        console.print(Text(f"warning: {line}", style="yellow"))
    if found.differences:
        console.print()
        for part in both([(item.name, item.a, item.b) for item in found.differences], width):
            console.print(part, highlight=False, markup=False, width=width)
    console.print()
    console.print(_groups((*found.groups, found.overall), width))
    shown = found.changed if verbose else found.changed[:SHOWN]
    if shown:
        console.print()
        console.print(_rows(shown, width))
    if len(found.changed) > len(shown):
        more = len(found.changed) - len(shown)
        console.print(Text(f"… and {more:,} more changed; --verbose lists all", style="dim"))
    for kernel in found.kernels:
        console.print(Text(f"kernel {kernel_text(kernel)}", style="yellow"))
    _one_sided("A", found.only_a, console, verbose)
    _one_sided("B", found.only_b, console, verbose)
    console.print()
    style = "bold red" if found.differs else "bold green"
    console.print(Text(end_text(found), style=style))


def end_text(found: CollectionComparison) -> str:
    """The answer in a sentence."""
    rest = f"{rows_of(len(found.rows))} that both have"
    if not found.differs:
        return (
            f"NO DIFFERENCE  {rest}: times within {found.floor:.0%} or their intervals, the same "
            "kernels"
        )
    parts = [
        f"{number:,} {word}"
        for number, word in (
            (found.overall.slower, "slower"),
            (found.overall.faster, "faster"),
            (len(found.only_a), "only in A"),
            (len(found.only_b), "only in B"),
            (len(found.kernels), "kinds of kernels changed"),
        )
        if number
    ]
    return f"DIFFERENT  {', '.join(parts)}; {rest}"


def kernel_text(kernel: KernelChange) -> str:
    """Which kernel, and in how many rows it came or went."""
    parts = [
        f"{sign}{rows_of(count)}"
        for sign, count in (("−", kernel.gone), ("+", kernel.new))
        if count
    ]
    return f"{kernel.kernel}: {', '.join(parts)}"


def _groups(groups: Sequence[GroupChange], width: int) -> object:
    columns = [
        Column("curves", [Text(_group_name(g)) for g in groups], flexible=True),
        Column("rows", [Text(f"{g.rows:,}") for g in groups], True),
        Column("slower", [_count(g.slower, Change.SLOWER) for g in groups], True),
        Column("faster", [_count(g.faster, Change.FASTER) for g in groups], True),
        Column("B/A median", [Text(f"{g.median:.3f}") for g in groups], True),
        Column("least", [Text(f"{g.least:.3f}") for g in groups], True, leaves=1),
        Column("most", [Text(f"{g.most:.3f}") for g in groups], True, leaves=1),
    ]
    return table(columns, width, sections=(len(groups) - 1,))


def _group_name(group: GroupChange) -> str:
    return f"{group.table} {group.group}".strip() or "all"


def _count(number: int, change: Change) -> Text:
    return Text(f"{SIGN[change]} {number:,}", style=STYLE[change]) if number else NOTHING


def _rows(changed: Sequence[RowChange], width: int) -> object:
    columns = [
        Column("row", [Text(row_name(row)) for row in changed], flexible=True, narrowest=50),
        Column("A ms", [Text(f"{row.latency_ms_a:.4f}") for row in changed], True),
        Column("B ms", [Text(f"{row.latency_ms_b:.4f}") for row in changed], True),
        Column("B/A", [Text(f"{SIGN[row.change]} {row.ratio:.3f}", style=STYLE[row.change])
                       for row in changed], True),
        Column("same within", [Text(f"{row.allowed:.1%}") for row in changed], True, leaves=3),
        Column("most moved", [Text(mover_text(row)) for row in changed], leaves=2,
               short=Column("most moved", [Text(mover_name(row)) for row in changed], leaves=1)),
    ]  # fmt: skip
    return table(columns, width)


def row_name(row: RowChange | OneSided) -> str:
    """What a row is called within its table: ``heads 128 · step 0 · batch 1 · isl 4,096``."""
    return SEPARATOR.join(part for part in (row.group, row.label) if part)


def mover_text(row: RowChange) -> str:
    """The kernel whose time changed most."""
    if row.mover is None:
        return ""
    return f"{mover_name(row)} {row.mover.us_a:,.1f} → {row.mover.us_b:,.1f} µs"


def mover_name(row: RowChange) -> str:
    """Its kind, without namespaces."""
    return row.mover.kernel.rsplit("::", 1)[-1] if row.mover else ""


def _one_sided(letter: str, found: Sequence[OneSided], console: Console, verbose: bool) -> None:
    shown = found if verbose else found[:ALONE]
    for row in shown:
        console.print(Text(f"only in {letter}: {alone_text(row)}", style="yellow"))
    if len(found) > len(shown):
        more = len(found) - len(shown)
        console.print(Text(f"… and {more:,} more only in {letter}; --verbose lists all", "dim"))


def alone_text(row: OneSided) -> str:
    """A row that one collection has, and what the other has instead."""
    return f"{row.table} {row_name(row)} ({row.why})"


def rows_markdown(found: CollectionComparison) -> str:
    """What changed, as GitHub-flavoured Markdown ending in a line break."""
    lines = [f"### {text(found.op)}: {text(found.names[0])} → {text(found.names[1])}", ""]
    lines += [f"**{text(end_text(found))}**"]
    for line in (*found.warnings, *found.notes):
        lines += ["", f"> ⚠️ {text(line)}"]
    groups = [
        (text(_group_name(g)), f"{g.rows:,}", f"{g.slower:,}", f"{g.faster:,}", f"{g.median:.3f}",
         f"{g.least:.3f} to {g.most:.3f}")
        for g in (*found.groups, found.overall)
    ]  # fmt: skip
    heading = ("curves", "rows", "slower", "faster", "B/A median", "B/A range")
    lines += ["", *rows(heading, groups, " rrrrr")]
    if found.changed:
        cells = [
            (text(row_name(row)),
             f"{row.latency_ms_a:.4f}", f"{row.latency_ms_b:.4f}",
             f"{SIGN[row.change]} {row.ratio:.3f}", code(mover_text(row)))
            for row in found.changed
        ]  # fmt: skip
        inside = rows(("row", "A ms", "B ms", "B/A", "most moved"), cells, " rrr")
        lines += ["", *folded(f"{rows_of(len(cells))} changed", inside)]
    if found.kernels:
        inside = [f"- {text(kernel_text(kernel))}" for kernel in found.kernels]
        lines += ["", *folded(f"{len(inside):,} kinds of kernels changed", inside)]
    for letter, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            inside = [f"- {text(alone_text(row))}" for row in only]
            lines += ["", *folded(f"{rows_of(len(only))} only in {letter}", inside)]
    if found.differences:
        values = [(text(item.name), code(item.a), code(item.b))
                  for item in found.differences]  # fmt: skip
        inside = rows(("differs", "A", "B"), values)
        lines += ["", *folded(f"{len(values)} facts differ", inside)]
    return "\n".join(lines) + "\n"
