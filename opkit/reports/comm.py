"""The reports of ``opkit comm`` in the terminal: the plan, and how long collectives took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from opkit.collect.comm.report import CommLine
from opkit.collect.comm.run import CommPlan, CommResult
from opkit.collect.tables.validate import Problem
from opkit.reports.collecting import duration
from opkit.reports.columns import NOTHING, Column, table
from opkit.reports.facts import WIDEST

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def print_comm_plan(plan: CommPlan, console: Console) -> None:
    """Print what would be measured: cases by implementation and number of GPUs, and an estimate."""
    worlds = plan.worlds
    columns = [
        Column("measured", [Text(world.implementation) for world in worlds]),
        Column("ranks", [Text(str(world.ranks)) for world in worlds], right=True),
        Column("ops", [_names(case.op for case in world.cases) for world in worlds], flexible=True),
        Column(
            "dtypes", [_names(case.dtype for case in world.cases) for world in worlds], leaves=1
        ),
        Column("sizes", [_span([case.size for case in world.cases]) for world in worlds]),
        Column("cases", [Text(f"{len(world.cases):,}") for world in worlds], right=True),
    ]
    console.print(table(columns, min(console.width, WIDEST)))
    console.print(
        f"{plan.cases:,} cases in {len(worlds)} set{'s' if len(worlds) > 1 else ''} of ranks, "
        f"roughly {duration(plan.seconds)} (a guess, not a measurement)"
    )


def print_comm(found: CommResult, console: Console) -> None:
    """Print the latencies of a run, what was written, and what is wrong or to be known of it."""
    lines = found.lines()
    for implementation in dict.fromkeys(line.implementation for line in lines):
        own = [line for line in lines if line.implementation == implementation]
        console.print(Text(implementation, style="bold"))
        console.print(table(_columns(own), min(console.width, WIDEST), _sections(own)))
        console.print()
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    _print_problems(found.problems, console)
    _print_failures(found, lines, console)
    for made in found.tables:
        style = "green" if made.status == "complete" else "yellow"
        console.print(Text.assemble(
            (made.name, "bold"), f"  {made.rows:,} rows  ", (made.status, style),
            (f"  {made.csv.parent}", "dim"),
        ))  # fmt: skip
    console.print(Text(
        f"{len(lines):,} cases, {found.resumed:,} of them measured before; "
        f"{duration(found.seconds)}",
        style="dim",
    ))  # fmt: skip
    console.print(f"next: {_next_step(found, lines)}")


def _columns(lines: Sequence[CommLine]) -> list[Column]:
    """The table of one implementation; which of its algorithms answered only where it tells."""
    engine = lines[0].implementation
    ranks = "ranks" if engine == "gloo" else "GPUs"
    modes = {line.launch for line in lines}
    algorithm = [_gbs(line.algorithm_gbs) for line in lines]
    columns = [
        Column("op", [Text(line.op) for line in lines]),
        Column("dtype", [Text(line.dtype) for line in lines]),
        Column(ranks, [Text(str(line.ranks)) for line in lines], right=True),
        Column("size", [Text(size_text(line.size, pad=True)) for line in lines], right=True),
        # Where there are both, rows would look alike without it.
        Column("launch", [Text(line.launch) for line in lines], leaves=5 if len(modes) == 1 else 0),
        Column("latency µs", [_us(line.latency_ms) for line in lines], right=True),
        Column("spread", [_spread(line.spread, "± {:.2f} %") for line in lines], True, leaves=3,
               short=Column("spread", [_spread(line.spread, "{:.1f} %") for line in lines], True,
                            leaves=3)),
        Column("algorithm GB/s", algorithm, True, leaves=4,
               short=Column("alg. GB/s", algorithm, True, leaves=4)),
        # One rank has no bus to cross.
        Column("bus GB/s", [_gbs(line.bus_gbs if line.ranks > 1 else None) for line in lines],
               right=True, leaves=1),
    ]  # fmt: skip
    if any(line.served_by not in ("", engine) for line in lines):
        columns.append(Column("answered by", [Text(line.served_by) for line in lines], leaves=2))
    if any(line.flags or line.fault for line in lines):
        columns.append(Column("flags", [_flags(line) for line in lines], flexible=True))
    return columns


def _sections(lines: Sequence[CommLine]) -> tuple[int, ...]:
    """The rows before which another series of ascending sizes begins."""
    what = [(line.op, line.dtype, line.ranks) for line in lines]
    return tuple(
        n
        for n in range(1, len(lines))
        if what[n] != what[n - 1] or lines[n].size <= lines[n - 1].size
    )


def _print_problems(problems: Sequence[Problem], console: Console) -> None:
    """Problems of validation: the hard ones each, the soft ones by table and rule."""
    for problem in problems:
        if problem.hard:
            console.print(Text(f"not written: {problem.table}: {problem.what}", style="red"))
    soft: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        if not problem.hard:
            soft.setdefault((problem.table, str(problem.rule)), []).append(problem.what)
    for (name, rule), what in soft.items():
        rows = f"{len(what)} row{'s' if len(what) > 1 else ''}"
        text = f"{rows} of {name} flagged {rule}, as: {what[0]}"
        console.print(Text(text, style="yellow"))


def _print_failures(found: CommResult, lines: Sequence[CommLine], console: Console) -> None:
    """The cases without a value, those with the same error together."""
    failed: dict[tuple[str, str], list[CommLine]] = {}
    for line in lines:
        if line.latency_ms is None:
            failed.setdefault((line.fault, line.error), []).append(line)
    for (fault, error), some in failed.items():
        first = some[0]
        ranks = f"{first.ranks} rank{'s' if first.ranks > 1 else ''}"
        case = f"{first.implementation} {first.op} {first.dtype}, {ranks}, {size_text(first.size)}"
        others = f" and {len(some) - 1:,} more" if len(some) > 1 else ""
        console.print(Text(f"quarantined: {case}{others}: {fault}: {error}", style="red"))
    if failed:
        console.print(f"  what the ranks printed is in {found.folder / 'logs'}", soft_wrap=True)


def _next_step(found: CommResult, lines: Sequence[CommLine]) -> str:
    if found.failed:
        return "run the same command again: it measures only what is missing or has failed"
    if not found.ok:
        return "see what was not written, above"
    if all(line.implementation == "gloo" for line in lines):
        return "the same on GPUs: these are gloo's times on a CPU, which no one else reads"
    if not found.tables:
        return "the same between two GPUs or more"
    places = ", ".join(f"comm/{made.csv.parent.parent.name}/{made.csv.parent.name}"
                       for made in found.tables)  # fmt: skip
    return f"aiconfigurator reads {places} below a system's data folder; docs/comm.md says when"


def size_text(size: int, *, pad: bool = False) -> str:
    """Bytes with their unit, exact: ``512 B``, ``64 KiB``, ``1,048,560 B``.

    Args:
        pad: make every unit three cells wide, so that numbers stand under each other.
    """
    number, unit = size, "B"
    for bytes_of_unit, name in UNITS:
        if size >= bytes_of_unit and size % bytes_of_unit == 0:
            number, unit = size // bytes_of_unit, name
            break
    return f"{number:,} {unit:<3}" if pad else f"{number:,} {unit}"


def _names(values: Iterable[str]) -> Text:
    return Text(", ".join(dict.fromkeys(values)))


def _span(sizes: Sequence[int]) -> Text:
    least, most = size_text(min(sizes)), size_text(max(sizes))
    return Text(least if least == most else f"{least} to {most}")


def _us(milliseconds: float | None) -> Text:
    return NOTHING if milliseconds is None else Text(f"{milliseconds * 1e3:,.2f}")


def _spread(share: float | None, form: str) -> Text:
    return NOTHING if share is None else Text(form.format(100 * share), style="dim")


def _gbs(speed: float | None) -> Text:
    return NOTHING if speed is None else Text(f"{speed:,.3f}")


def _flags(line: CommLine) -> Text:
    if line.fault:
        return Text(line.fault, style="red")
    return Text(", ".join(line.flags), style="yellow")
