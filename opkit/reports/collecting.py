"""The reports of collection in the terminal: the plan, what was collected, verified, compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from opkit.collect.fidelity import Fidelity, Shape
from opkit.collect.install.proof import Installed, command_line
from opkit.collect.record import Record
from opkit.collect.run import Collected
from opkit.collect.sweep import Sweep, phase_of
from opkit.collect.verify import Verified
from opkit.collect.work import Group, Row
from opkit.layers.op import case_from_json
from opkit.reports.columns import NOTHING, Column, table
from opkit.reports.facts import WIDEST

# A deviation up to which it is green, and yellow. For the eye: the tolerance judges.
GREEN, YELLOW = 0.01, 0.03
SHOWN = 12  # rows of a verification that are listed


def print_plan(
    sweep: Sweep, groups: Sequence[Group], done: int, refused: Sequence[str], console: Console
) -> None:
    """Print what would be measured: rows by phase and build, an estimate, and what forbids it."""
    phases = list(dict.fromkeys(phase_of(case) for case in sweep.cases))
    ranks = ", ".join(map(str, sweep.tp))
    console.print(Text.assemble(("plan  ", "bold"), f"{sweep.origin}; tp {ranks}"))
    builds = Counter(group.name.rsplit(" tp ", 1)[0] for group in groups)
    cases = {group.name.rsplit(" tp ", 1)[0]: len(group.tasks) for group in groups}
    columns = [
        Column("build", [Text(name) for name in builds], flexible=True),
        Column("cases", [Text(f"{cases[name]:,}") for name in builds], right=True),
        Column("tp sizes", [Text(str(count)) for count in builds.values()], right=True),
    ]
    console.print(table(columns, min(console.width, WIDEST)))
    counts = ", ".join(
        f"{sum(phase_of(case) == phase for case in sweep.cases):,} {phase or 'cases'}"
        for phase in phases
    )
    console.print(
        f"{counts} a tp size; {sweep.count():,} rows in all, {done:,} of them there already"
    )
    share = 1 - done / max(1, sweep.count())
    console.print(f"about {duration(sweep.estimate_s() * share)} of measuring on one GPU, and")
    console.print(f"{len(groups)} builds (seconds each; the first compiles kernels: minutes)")
    for difference in refused:
        console.print(Text(f"would be refused: {difference}", style="yellow"))


def print_verified(found: Verified, console: Console) -> None:
    """Print how far a second measurement lies from the first."""
    shown = found.rows[:SHOWN]
    columns = [
        Column("case", [Text(row.label) for row in shown], flexible=True),
        Column("table", [Text(row.table, style="dim") for row in shown], leaves=1),
        Column("first ms", [Text(f"{row.first_ms:.4f}") for row in shown], right=True),
        Column("again ms", [Text(f"{row.again_ms:.4f}") for row in shown], right=True),
        Column("deviation", [deviation(row.deviation) for row in shown], right=True),
    ]
    if shown:
        console.print(table(columns, min(console.width, WIDEST)))
        more = len(found.rows) - len(shown)
        least = f" ({more} more deviate less)" if more else ""
        console.print(
            f"{len(found.rows)} rows measured again: median deviation {found.median:.2%}, worst "
            f"{found.worst:.2%}{least}"
        )
    for line in found.failed:
        console.print(Text(f"not measured again: {line}", style="red"))
    if found.passed:
        console.print(Text(f"PASS  all within {found.tolerance:.0%}", style="green"))
    else:
        outside = len(found.outside)
        console.print(Text(f"FAIL  {outside} beyond {found.tolerance:.0%}", style="red"))
        if outside:
            console.print(
                "  look at the clocks in the provenance file; rows marked throttled, another\n"
                "  process on the GPU, or data that changed between the runs are the usual causes"
            )


def print_fidelity(found: Fidelity, console: Console) -> None:
    """Print the op's GPU time beside the engine's, and what a shipped table says."""
    for phase in found.phases:
        shapes = [shape for shape in found.shapes if str(shape.case.phase) == phase]
        console.print()
        console.print(Text(f"{phase}: one layer, GPU time", style="bold"))
        console.print(table(_shape_columns(shapes), min(console.width, WIDEST)))
        what = "without data-dependent kernels" if phase == "context" else "all kernels"
        console.print(
            f"{len(shapes)} shapes, {what}: median deviation {found.median(phase):.2%}, worst "
            f"{found.worst(phase):.2%}"
        )
    for line in found.failed:
        console.print(Text(f"not compared: {line}", style="red"))
    word, style = ("PASS", "green") if found.passed else ("FAIL", "red")
    console.print(
        Text(f"{word}  tolerance {found.tolerance:.0%}, against {found.alignment}", style)
    )


def _shape_columns(shapes: Sequence[Shape]) -> list[Column]:
    return [
        Column("shape", [Text(shape.case.label()) for shape in shapes]),
        Column("mode", [Text(str(shape.mode), style="dim") for shape in shapes], leaves=4),
        Column("regions", [Text(str(s.regions)) for s in shapes], right=True, leaves=5),
        Column("ours µs", [_us(shape.ours_ms) for shape in shapes], right=True),
        Column("engine µs", [_us(shape.engine_ms) for shape in shapes], right=True),
        Column("all", [deviation(shape.ratio - 1) for shape in shapes], right=True),
        Column("fixed", [deviation(s.rest_ratio - 1) for s in shapes], right=True),
        Column("data-dep.", [Text(f"{s.data_share:.0%}") for s in shapes], right=True, leaves=3),
        Column("elapsed µs", [_us(s.elapsed_ms) for s in shapes], right=True, leaves=2),
        Column("shipped µs", [_us(s.shipped_ms) for s in shapes], right=True, leaves=1),
        Column(
            "shipped",
            [NOTHING if s.shipped_ratio is None else deviation(s.shipped_ratio - 1)
             for s in shapes],
            right=True, leaves=1,
        ),
    ]  # fmt: skip


def print_collections(found: Iterable[tuple[Path, Record]], console: Console) -> None:
    """Print the collections below an output folder, each with its waiver."""
    for folder, record in found:
        rows = ", ".join(f"{name} {count:,} rows" for name, count in record.rows.items())
        failed = sum(record.failed.values())
        line = Text.assemble(
            (f"collected {record.op} on {record.backend}", "bold"),
            f"  {rows or 'no rows yet'}",
            (f", {failed} quarantined" if failed else "", "yellow"),
            (f"  {record.updated[:16].replace('T', ' ')}  {folder}", "dim"),
        )
        console.print(line)
        if record.waiver:
            console.print(Text(f"  waived: {record.waiver}", style="yellow"))
            for difference in record.differences:
                console.print(Text(f"    {difference}", style="dim"))


def deviation(share: float) -> Text:
    """A deviation with its sign, coloured by size."""
    style = "green" if abs(share) <= GREEN else "yellow" if abs(share) <= YELLOW else "red"
    return Text(f"{share:+.2%}".replace("-", "−"), style=style)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _us(milliseconds: float | None) -> Text:
    return NOTHING if milliseconds is None else Text(f"{milliseconds * 1e3:,.1f}")


def print_collected(found: Collected, console: Console) -> None:
    """Print what a collection has become: tables, problems, quarantine, and where the time went."""
    outcome = found.outcome
    for made in found.written.tables:
        style = "green" if made.status == "complete" else "yellow"
        console.print(Text.assemble(
            (f"{made.name}", "bold"), f"  {made.rows:,} rows  ", (made.status, style),
            (f"  {made.csv.parent}", "dim"),
        ))  # fmt: skip
    _print_problems(found, console)
    for kernel, count in sorted(found.unaligned.items(), key=lambda item: -item[1]):
        console.print(
            Text(f"{count:,} rows launch {kernel}, which the alignment never saw", "yellow")
        )
    if found.unaligned:
        console.print(
            "  they are flagged unaligned_kernels; align at such shapes too: "
            "opkit align … --requests NxP+O"
        )
    for row in found.quarantined:
        console.print(Text(f"quarantined: {_case_text(row)}: {row.fault}: {row.error}", "red"))
    for left in outcome.not_run:
        text = f"not run: {len(left.tasks)} cases of {left.group.name}: {left.reason}"
        console.print(Text(text, style="red"))
    if found.quarantined or outcome.not_run:
        console.print("  run the same command again; --retry-failed takes the quarantined ones too")
    if outcome.stopped:
        console.print(Text(f"stopped: {outcome.stopped}", style="red"))
    if found.elsewhere:
        console.print(
            f"{found.elsewhere:,} rows in the folder are not in these tables: they are of another "
            "subject or measured in another way; the options of that run bring them back"
        )
    console.print(_time_text(found))
    if found.record.waiver:
        console.print(Text(f"waived: {found.record.waiver}", style="yellow"))
        for difference in found.record.differences:
            console.print(Text(f"  {difference}", style="dim"))
    if found.ok:
        console.print(f"next: opkit verify {found.record.op}, then opkit install {found.record.op}")


def _print_problems(found: Collected, console: Console) -> None:
    """Problems of validation: the hard ones each, the soft ones by rule."""
    hard = [problem for problem in found.written.problems if problem.hard]
    for problem in hard:
        console.print(Text(f"not written: {problem.table}: {problem.what}", style="red"))
    soft: dict[tuple[str, str], list[str]] = {}
    for problem in found.written.problems:
        if not problem.hard:
            soft.setdefault((problem.table, str(problem.rule)), []).append(problem.what)
    for (name, rule), what in soft.items():
        text = f"{len(what)} rows of {name} flagged {rule}, as: {what[0]}"
        console.print(Text(text, style="yellow"))
    for reason, count in found.written.unbounded.items():
        console.print(Text(f"{count} rows not held against a bound: {reason}", style="dim"))


def _time_text(found: Collected) -> Text:
    outcome = found.outcome
    total = max(outcome.wall_s * outcome.lanes, 1e-9)
    parts = ", ".join(
        f"{name} {spent / total:.0%}" for name, spent in outcome.activities.items() if spent
    )
    measured = outcome.done + len(outcome.failed)
    rate = f"{60 * measured / outcome.wall_s:,.0f} cases/min, " if outcome.wall_s else ""
    return Text(
        f"{outcome.done:,} cases measured in {duration(outcome.wall_s)} ({rate}the GPU ran "
        f"measured work {outcome.busy_s / total:.0%} of the time; {parts}), "
        f"{found.already + outcome.skipped:,} were there already",
        style="dim",
    )


def _case_text(row: Row) -> str:
    return f"{row.group}, {case_from_json(row.case).label()}"


def print_installed(found: Installed, console: Console) -> None:
    """Print what was installed, and the proof that it is read."""
    rows = ", ".join(f"{name} {count:,} rows" for name, count in found.tables.items())
    console.print(Text.assemble(("installed  ", "bold"), rows, (f"  {found.folder}", "dim")))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    for proof in found.proofs:
        entries = [*proof.scaled, *proof.partly, *proof.foreign]
        console.print()
        console.print(Text(f"{proof.table}: its latencies × {proof.factor:g}", style="bold"))
        columns = [
            Column("operation", [Text(entry.name) for entry in entries], flexible=True),
            Column("before ms", [Text(f"{entry.old_ms:,.3f}") for entry in entries], right=True),
            Column("after ms", [Text(f"{entry.new_ms:,.3f}") for entry in entries], right=True),
            Column("ratio", [Text(f"{entry.ratio:.4f}") for entry in entries], right=True),
        ]
        if entries:
            console.print(table(columns, min(console.width, WIDEST)))
        unchanged = len(proof.entries) - len(entries)
        console.print(f"{unchanged} other operations of the estimate unchanged")
        word, style = ("PROVED", "green") if proof.holds else ("NOT PROVED", "red")
        console.print(Text(f"{word}  {proof.sentence}", style=style))
        console.print(Text(f"  {command_line(proof)}", style="dim"), soft_wrap=True)
    console.print()
    console.print(f"use it: aiconfigurator … --systems-paths {found.root}")
