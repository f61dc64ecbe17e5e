"""The report in the terminal: which kernels, how long, and what to do about it.

Colours carry meaning (green same, cyan variant, yellow role, red missing or of another type), and
every colour has a sign or a word beside it, so that nothing is lost without them.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from opkit.align.ledger import LedgerEntry
from opkit.align.result import (
    AlignResult,
    CaseMatch,
    CheckResult,
    KernelPair,
    KernelStat,
    Level,
    Outcome,
    PhaseResult,
)
from opkit.reports.columns import NOTHING, Column, table
from opkit.reports.facts import (
    LEVEL_SIGN,
    OUTCOME_SIGN,
    SEPARATOR,
    WIDEST,
    files_text,
    gpu_ratio,
    model_text,
    modes_text,
    next_step,
    pairs_text,
    percent,
    policy_text,
    ratio,
    shown_cases,
    two_counts,
    unlike,
    us,
)

NO_VERDICTS = (
    "No verdicts yet.\n"
    'On a GPU host, `opkit align dsa --e2e-cmd "vllm serve …"` records the first;\n'
    "`opkit align dsa --recorded` shows anywhere what a report looks like."
)

OUTCOME_STYLE = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.INCONCLUSIVE: "yellow"}
LEVEL_STYLE = {
    Level.SAME: "green",
    Level.VARIANT: "cyan",
    Level.ROLE: "yellow",
    Level.DTYPE: "red",
    Level.MOCK_ONLY: "red",
    Level.E2E_ONLY: "red",
}
# A ratio's distance from 1 up to which it is green, and yellow. For the eye: the policy judges.
RATIO_GREEN, RATIO_YELLOW = 0.05, 0.10


def print_align(result: AlignResult, console: Console, *, verbose: bool = False) -> None:
    """Print the whole report of an alignment.

    Args:
        result: what was found.
        console: where to; its width decides which columns are shown.
        verbose: show the kernels of every case, not only of those that ask for a look.
    """
    width = min(console.width, WIDEST)
    parts: list[RenderableType] = [_header(result, width)]
    for phase in result.phases:
        parts += ["", *_phase(phase, width, verbose)]
    parts += ["", *_notes(result.notes), _verdict(result, width)]
    for part in parts:
        console.print(part, highlight=False, markup=False, width=width)


def print_status(entries: Iterable[LedgerEntry], console: Console) -> None:
    """Print the ledger's entries as a table, in the order given."""
    rows = list(entries)
    if not rows:
        text = Text(NO_VERDICTS, style="dim")
        console.print(text, highlight=False)
        return
    columns = [
        Column("op", [Text(e.op, style="bold") for e in rows]),
        Column("phase", [Text(e.phase) for e in rows]),
        Column("verdict", [_outcome(Outcome(e.verdict)) for e in rows]),
        Column("backend", [Text(e.backend) for e in rows], leaves=2),
        Column("version", [Text(e.framework or "–") for e in rows], leaves=3),
        Column("GPU", [Text(e.gpu or "–") for e in rows], flexible=True, leaves=4),
        Column("tp", [Text(str(e.tp_size)) for e in rows], right=True, leaves=5),
        Column(
            "recorded (UTC)",
            [Text(e.created[:16].replace("T", " ")) for e in rows],
            leaves=1,
            short=Column("recorded", [Text(e.created[:10]) for e in rows]),
        ),
        Column(
            "id",
            [Text(e.id, style="dim") for e in rows],
            leaves=6,
            short=Column("id", [Text(e.short, style="dim") for e in rows]),  # `opkit report ab12cd`
        ),
    ]
    console.print(table(columns, min(console.width, WIDEST)), highlight=False)


def _header(result: AlignResult, width: int) -> Panel:
    known = result.provenance
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("GPU", known.get("gpu")),
        ("versions", pairs_text(known.get("versions"))),
        ("model", model_text(known)),
        ("dtypes", pairs_text(known.get("dtypes"))),
        ("own policy", policy_text(known)),
        ("traces", files_text(known)),
        ("judged", known.get("created")),
    ):
        if value:
            facts.add_row(name, Text(str(value)))
    title = Text(f" {result.op}{SEPARATOR}{result.backend} ", style="bold")
    return Panel(
        facts,
        title=title,
        title_align="left",
        subtitle=_outcome(result.verdict, pad=True),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style=OUTCOME_STYLE[result.verdict],
        width=width,
    )


def _phase(phase: PhaseResult, width: int, verbose: bool) -> list[RenderableType]:
    name = Text.assemble((str(phase.phase), "bold"), "  ", _outcome(phase.verdict))
    how = str(phase.method) if phase.method else "no region found"
    found = f"regions by {how}{SEPARATOR}{percent(phase.attributed)} of kernels attributed"
    parts: list[RenderableType] = [
        Rule(name, align="left", style=OUTCOME_STYLE[phase.verdict]),
        Text(found, style="dim"),
    ]
    if len(phase.cases) > 1:
        parts += ["", _cases(phase.cases, width)]
    for case in shown_cases(phase.cases, verbose):
        parts += ["", *_case(case, width)]
    parts += ["", _checks(phase.checks), *_notes(phase.notes)]
    return parts


def _cases(cases: tuple[CaseMatch, ...], width: int) -> Table:
    """One row a case."""
    counts = [unlike(case) for case in cases]
    columns = [
        Column("case", [Text(case.mock.case.label()) for case in cases]),
        Column("mode", [Text(modes_text(case)) for case in cases], leaves=2),
        _counts("regions", [(case.mock.regions, case.e2e.regions) for case in cases], leaves=3),
        _counts("launches", [(case.mock.launches, case.e2e.launches) for case in cases], leaves=1),
        Column("unlike", [Text(str(n), style="red" if n else "green") for n in counts], True),
        Column("mock µs", [Text(us(case.mock.gpu_ns)) for case in cases], right=True),
        Column("e2e µs", [Text(us(case.e2e.gpu_ns)) for case in cases], right=True),
        Column("ratio", [_ratio_text(gpu_ratio(case)) for case in cases], right=True),
    ]
    return table(columns, width)


def _counts(title: str, counts: list[tuple[int, int]], leaves: int) -> Column:
    return Column(title, [Text(two_counts(*pair)) for pair in counts], right=True, leaves=leaves)


def _case(case: CaseMatch, width: int) -> list[RenderableType]:
    """A case's heading and its kernels in launch order, with totals."""
    heading = Text.assemble((case.mock.case.label(), "bold"))
    if case.e2e.case != case.mock.case:
        heading.append(f" (e2e {case.e2e.case.label()})", style="red")
    facts = [
        modes_text(case),
        f"{two_counts(case.mock.regions, case.e2e.regions)} regions",
        f"{two_counts(case.mock.launches, case.e2e.launches)} launches each",
        f"{percent(case.explained)} of the step's GPU time",
    ]
    heading.append(SEPARATOR + SEPARATOR.join(facts), style="dim")
    totals = [
        ("GPU time", case.mock.gpu_ns, case.e2e.gpu_ns),
        ("elapsed", case.mock.elapsed_ns, case.e2e.elapsed_ns),
    ]
    pairs = case.pairs
    blank = [Text("")] * len(totals)
    columns = [
        Column("#", [Text(str(n), style="dim") for n in range(1, len(pairs) + 1)] + blank, True,
               leaves=3),
        Column("kernel", [_name(pair) for pair in pairs]
               + [Text(name, style="bold") for name, _, _ in totals], flexible=True),
        Column("calls", [_calls(pair) for pair in pairs]
               + blank, True, leaves=4),
        _times("mock µs", [p.mock for p in pairs], [mock for _, mock, _ in totals]),
        _times("e2e µs", [p.e2e for p in pairs], [e2e for _, _, e2e in totals]),
        Column("ratio", [_ratio_text(pair.ratio) for pair in pairs]
               + [_ratio_text(ratio(mock, e2e)) for _, mock, e2e in totals], right=True),
        Column("share", [Text(percent(p.share), style="dim") for p in pairs] + blank, True,
               leaves=6),
        Column("match", [_level(p.level, word=True) for p in pairs] + blank, leaves=2,
               short=Column("", [_level(p.level, word=False) for p in pairs] + blank)),
    ]  # fmt: skip
    return [heading, table(columns, width, sections=(len(pairs),))]


def _times(title: str, kernels: list[KernelStat | None], totals: list[int]) -> Column:
    """Median times, with their spread where there is room."""
    sums = [Text(us(total), style="bold") for total in totals]
    plain = [Text(us(k.median_ns)) if k else NOTHING for k in kernels]
    # Padded so that the medians stand under each other.
    spreads = [
        f" ± {percent(k.mad_ns / k.median_ns)}" if k and k.median_ns else "" for k in kernels
    ]
    wide = max(map(len, spreads), default=0)
    spread = [
        text + Text(beside.rjust(wide), style="dim")
        for text, beside in zip(plain, spreads, strict=True)
    ]
    padded = [total + Text(" " * wide) for total in sums]
    return Column(
        title, spread + padded, True, leaves=5, short=Column(title, plain + sums, right=True)
    )


def _name(pair: KernelPair) -> Text:
    """The engine's name, and below it the mock's where that is another."""
    style = "dim" if pair.glue else ""
    text = Text(pair.name, style="bold" if pair.key and not pair.glue else style)
    if pair.mock and pair.e2e and pair.mock.short != pair.e2e.short:
        text.append(f"\nmock: {pair.mock.short}", style="not bold dim")
    return text


def _calls(pair: KernelPair) -> Text:
    return Text(
        two_counts(pair.mock.calls if pair.mock else None, pair.e2e.calls if pair.e2e else None)
    )


def _level(level: Level, word: bool) -> Text:
    sign = LEVEL_SIGN[level]
    return Text(f"{sign} {level}" if word else sign, style=LEVEL_STYLE[level])


def _checks(checks: tuple[CheckResult, ...]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        style = OUTCOME_STYLE[check.outcome]
        name = Text(check.check, style="" if check.outcome is Outcome.PASS else "bold")
        sign = Text(OUTCOME_SIGN[check.outcome], style=f"bold {style}")
        grid.add_row(sign, name, Text(check.detail))
        if check.outcome is Outcome.PASS:
            continue
        for label, text, look in (("cause", check.cause, ""), ("next", check.next_step, style)):
            if text:
                grid.add_row("", Text(f"  {label}", style="dim"), Text(text, style=look))
    return grid


def _notes(notes: tuple[str, ...]) -> list[RenderableType]:
    return [Text(f"note: {note}", style="dim") for note in notes]


def _verdict(result: AlignResult, width: int) -> Panel:
    """The verdict, large, and what to do next."""
    style = OUTCOME_STYLE[result.verdict]
    phases = SEPARATOR.join(f"{phase.phase} {phase.verdict}" for phase in result.phases)
    line = Text.assemble(
        (f" {str(result.verdict).upper()} ", f"bold reverse {style}"),
        (f"  {phases or 'nothing was compared'}", "bold"),
    )
    return Panel(
        Group(line, Text.assemble(("next: ", "dim"), next_step(result))),
        box=box.HEAVY,
        border_style=style,
        width=width,
    )


def _outcome(outcome: Outcome, pad: bool = False) -> Text:
    text = f"{OUTCOME_SIGN[outcome]} {outcome}"
    return Text(f" {text} " if pad else text, style=f"bold {OUTCOME_STYLE[outcome]}")


def _ratio_text(value: float | None) -> Text:
    if value is None:
        return NOTHING
    distance = abs(value - 1.0)
    style = "green" if distance <= RATIO_GREEN else "yellow" if distance <= RATIO_YELLOW else "red"
    return Text(f"{value:.2f}", style=style)
