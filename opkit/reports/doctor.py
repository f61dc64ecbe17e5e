"""The doctor's report in the terminal: a line a finding, and below those not ok the fix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from opkit.doctor.finding import Diagnosis, Finding, Group, Status
from opkit.reports.facts import SEPARATOR, WIDEST

SIGN = {Status.OK: "✓", Status.UNKNOWN: "?", Status.WARN: "!", Status.FAIL: "✗"}
STYLE = {Status.OK: "green", Status.UNKNOWN: "dim", Status.WARN: "yellow", Status.FAIL: "red"}
WORDS = {
    Status.FAIL: "would spoil a run",
    Status.WARN: "to look at",
    Status.UNKNOWN: "not known",
    Status.OK: "ok",
}
NEXT_FILES = "recordings can be judged on this machine: `opkit align dsa --recorded` shows how"
NEXT_RUN = 'opkit align OP --e2e-cmd "vllm serve …"'


def print_doctor(diagnosis: Diagnosis, console: Console) -> None:
    """Print the report.

    Args:
        diagnosis: all findings.
        console: where to.
    """
    width = min(console.width, WIDEST)
    rows = list(_joined(diagnosis.findings))
    widest = max((len(row.name) for row in rows), default=0)
    for group in Group:
        of_group = [row for row in rows if row.group is group]
        if of_group:
            console.print(
                Rule(Text(str(group), style="bold"), align="left", style="dim"), width=width
            )
            console.print(_lines(of_group, min(widest, width // 3)), width=width, highlight=False)
            console.print()
    console.print(_end(diagnosis), width=width, highlight=False, markup=False)


def _joined(findings: tuple[Finding, ...]) -> Iterator[Finding]:
    """Neighbours that are unknown for one reason become one line."""
    for (status, says, fix, group), alike in groupby(
        findings, key=lambda found: (found.status, found.says, found.fix, found.group)
    ):
        first, *others = alike
        if status is not Status.UNKNOWN:
            yield first
            yield from others
        elif others:
            also = ", ".join(found.name for found in others)
            yield Finding(first.name, status, f"{says}; neither for {also}", fix, group)
        else:
            yield first


def _lines(findings: list[Finding], widest: int) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(width=widest, overflow="fold")
    grid.add_column(overflow="fold")
    for finding in findings:
        style = STYLE[finding.status]
        look = {Status.UNKNOWN: "dim", Status.OK: ""}.get(finding.status, "bold")
        says = Text(finding.says, style="dim" if finding.status is Status.UNKNOWN else "")
        sign = Text(SIGN[finding.status], style=f"bold {style}")
        grid.add_row(sign, Text(finding.name, style=look), says)
        if finding.fix:
            grid.add_row("", Text("  fix", style="dim"), Text(finding.fix, style=style))
    return grid


def _end(diagnosis: Diagnosis) -> Text:
    """How many there are of each, and the next step."""
    counted = SEPARATOR.join(
        f"{SIGN[status]} {count} {WORDS[status]}" for status, count in diagnosis.counts().items()
        if count
    )  # fmt: skip
    return Text.assemble((counted or "nothing was looked at", "bold"), "\n", ("next: ", "dim"),
                         next_step(diagnosis))  # fmt: skip


def next_step(diagnosis: Diagnosis) -> str:
    """What to do now, in a line."""
    grave = diagnosis.with_status(Status.FAIL)
    if any(finding.name in ("driver", "nsys") for finding in grave):
        return f"{grave[0].fix}; {NEXT_FILES}"
    if grave:
        return grave[0].fix
    if warned := diagnosis.with_status(Status.WARN):
        return f"mend {', '.join(finding.name for finding in warned)} if you can; then {NEXT_RUN}"
    return NEXT_RUN
