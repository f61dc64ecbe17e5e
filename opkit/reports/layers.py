"""The reports on mocks in the terminal: what was checked, and which mocks there are.

Colours carry meaning, and every colour has a sign or a word beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from opkit.layers.available import Availability, State
from opkit.layers.check.result import CheckResult, Line, Outcome
from opkit.layers.skeleton.new import Written
from opkit.reports.columns import Column, table
from opkit.reports.facts import SEPARATOR, WIDEST, model_text, pairs_text

STYLE = {
    Outcome.PASS: "green",
    Outcome.FAIL: "red",
    Outcome.NOT_APPLICABLE: "dim",
    Outcome.NOT_RUN: "yellow",
}
SIGN = {Outcome.PASS: "✓", Outcome.FAIL: "✗", Outcome.NOT_APPLICABLE: "–", Outcome.NOT_RUN: "?"}
STATE_STYLE = {
    State.READY: "green",
    State.DOUBTFUL: "yellow",
    State.NOT_HERE: "red",
    State.NONE: "dim",
}
STATE_SIGN = {State.READY: "✓", State.DOUBTFUL: "~", State.NOT_HERE: "✗", State.NONE: "–"}


def print_check(result: CheckResult, console: Console, failure: str = "") -> None:
    """Print the whole report of a check.

    Args:
        result: what was found.
        console: where to.
        failure: why the process ended before it was done; empty when it did not.
    """
    width = min(console.width, WIDEST)
    parts = [_header(result, width), "", _lines(result.lines), "", _end(result, failure, width)]
    for part in parts:
        console.print(part, highlight=False, markup=False, width=width)


def _header(result: CheckResult, width: int) -> Panel:
    known = result.mock
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    versions = known.get("versions") or {}
    recipe = known.get("recipe") or {}
    for name, value in (
        ("GPU", versions.get("gpu") or ("none: run on the CPU" if result.device == "cpu" else "")),
        ("versions", pairs_text(versions)),
        ("model", model_text(known)),
        ("dtypes", pairs_text(known.get("dtypes"))),
        ("weights", recipe.get("weights")),
        ("inputs", recipe.get("activations") or result.inputs),
    ):
        if value:
            facts.add_row(name, Text(str(value)))
    notes = known.get("notes") or []
    return Panel(
        Group(facts, *(Text(f"note: {note}", style="dim") for note in notes)),
        title=Text(f" check {result.op}{SEPARATOR}{result.backend} ", style="bold"),
        title_align="left",
        box=box.ROUNDED,
        border_style="green" if result.passed else "red",
        width=width,
    )


def _lines(lines: Sequence[Line]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in lines:
        style = STYLE[line.outcome]
        absent = line.outcome is Outcome.NOT_APPLICABLE
        name = Text(line.check, style="dim" if absent else "")
        if line.outcome is Outcome.FAIL:
            name.stylize("bold")
        said = f"{line.outcome}: {line.detail}" if absent else line.detail
        detail = Text(said, style="dim" if absent else "")
        grid.add_row(Text(SIGN[line.outcome], style=f"bold {style}"), name, detail)
        for label, text, look in (("cause", line.cause, ""), ("fix", line.fix, style)):
            if text:
                grid.add_row("", Text(f"  {label}", style="dim"), Text(text, style=look))
    return grid


def _end(result: CheckResult, failure: str, width: int) -> Panel:
    """The verdict, large, and what to do next."""
    counts = Counter(line.outcome for line in result.lines)
    word, style = ("PASS", "green") if result.passed else ("FAIL", "red")
    if failure:
        word = "ENDED EARLY"
    counted = SEPARATOR.join(
        f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome]
    )
    line = Text.assemble((f" {word} ", f"bold reverse {style}"), (f"  {counted}", "bold"))
    rows = [line]
    if failure:
        rows.append(Text(f"at {result.running}: {failure}" if result.running else failure))
    rows.append(Text.assemble(("next: ", "dim"), _next(result, failure)))
    return Panel(Group(*rows), box=box.HEAVY, border_style=style, width=width)


def _next(result: CheckResult, failure: str) -> str:
    if failure:
        return "read the log of the check; run the case alone"
    wrong = [line for line in result.lines if line.outcome is Outcome.FAIL]
    if wrong:
        return wrong[0].fix
    if not result.passed:
        return "nothing failed, and not everything ran: see the lines marked ?"
    if result.backend == "torch":
        return f'opkit collect {result.op} --backend torch --waive "no engine to align with"'
    return f'opkit align {result.op} --backend {result.backend} --e2e-cmd "…"'


def print_layers(found: Sequence[Availability], gpu: str, console: Console) -> None:
    """Print which mocks there are, which can run here, and why the others cannot."""
    width = min(console.width, WIDEST)
    phases = list(dict.fromkeys(phase for item in found for phase in item.phases))
    firsts = {op: number for number, op in reversed(list(enumerate(i.op for i in found)))}
    columns = [
        Column("op", [Text(item.op if firsts[item.op] == number else "", style="bold")
                      for number, item in enumerate(found)]),
        Column("backend", [Text(item.backend) for item in found]),
        *(Column(phase, [_phase(item, phase) for item in found]) for phase in phases),
        Column("version", [Text(item.version or "–", style="" if item.version else "dim")
                           for item in found], leaves=1),
        Column("why not", [Text(item.reason, style=STATE_STYLE[item.state]) for item in found],
               flexible=True),
    ]  # fmt: skip
    made = table(columns, width, tuple(number for number in firsts.values() if number))
    console.print(Text.assemble(("GPU  ", "dim"), gpu or "none"), highlight=False)
    console.print(made, highlight=False)
    fixes = {i.backend: i.fix for i in found if i.state is State.NOT_HERE and i.fix}
    for backend, fix in fixes.items():
        console.print(Text.assemble((f"{backend}: ", "bold"), fix), highlight=False, width=width)
    ready = next((item for item in found if item.state is State.READY), None)
    if ready is not None:
        next_step = f"opkit check {ready.op} --backend {ready.backend}"
        console.print(Text.assemble(("next: ", "dim"), next_step), highlight=False)


def _phase(item: Availability, phase: str) -> Text:
    """Whether a mock's phase can run here: a sign and a word."""
    if phase not in item.phases:
        return Text("– none", style="dim")
    word = {State.READY: "ready", State.DOUBTFUL: "try", State.NOT_HERE: "not here"}
    text = f"{STATE_SIGN[item.state]} {word.get(item.state, 'none')}"
    return Text(text, style=STATE_STYLE[item.state])


def print_new(name: str, written: Written, console: Console) -> None:
    """Print what `opkit new` has written, and what to do with it."""
    for path in written.files:
        console.print(Text.assemble(("wrote  ", "green"), str(path)), highlight=False)
    line = Text.assemble(("added  ", "green"), f'"{name}" to NAMES in {written.registry}')
    console.print(line, highlight=False)
    steps = (
        f"opkit check {name} --backend torch    it runs as it is",
        f"pytest tests/layers/test_{name}.py    so do its tests",
        f"replace the layer in {written.files[1]}, then cases, columns and work in "
        f"{written.files[0]}; docs/new-op.md says how",
    )
    for number, step in enumerate(steps):
        label = "next: " if not number else "      "
        console.print(Text.assemble((label, "dim"), step), highlight=False, soft_wrap=True)
