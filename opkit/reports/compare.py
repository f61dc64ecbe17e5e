"""Two alignments beside each other: in the terminal, and as Markdown for a pull request.

Every change has a sign and a word; colours only repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from opkit.align.comparison import (
    AlignComparison,
    CaseChange,
    Change,
    Fact,
    Grouped,
    KernelChange,
    Pace,
    PhaseChange,
    SideChange,
)
from opkit.align.result import Outcome
from opkit.reports.columns import GAP, NOTHING, Column, table
from opkit.reports.facts import OUTCOME_SIGN, WIDEST, us
from opkit.reports.markdown import code, folded, rows, text

SIGN = {
    Change.SAME: "=",
    Change.VARIANT: "~",
    Change.DTYPE: "≠",
    Change.NEW: "+",
    Change.GONE: "−",
    Change.MORE: "↑",
    Change.FEWER: "↓",
    Change.MOVED: "↔",
}
# Shorter words, for a narrow terminal.
WORD = {
    Change.VARIANT: "variant",
    Change.DTYPE: "types",
    Change.MORE: "more",
    Change.FEWER: "fewer",
}
STYLE = {Change.SAME: "green", Change.VARIANT: "cyan", Change.MOVED: "yellow"}  # others: red
PACE_SIGN = {Pace.STEADY: "=", Pace.SLOWER: "▲", Pace.FASTER: "▼"}
PACE_STYLE = {Pace.STEADY: "green", Pace.SLOWER: "red", Pace.FASTER: "cyan"}
FACTS = 12  # differing values of the provenance that the terminal shows without --verbose
DIGEST = 8  # characters of a SHA-256 that tell two apart
ARROW = " → "


def print_comparison(found: AlignComparison, console: Console, *, verbose: bool = False) -> None:
    """Print what differs from A to B.

    Args:
        found: the comparison.
        console: where to; its width decides which columns are shown.
        verbose: every differing value of the provenance, and shapes without a difference.
    """
    width = min(console.width, WIDEST)
    parts: list[RenderableType] = [_heading(found), *_warnings(found)]
    parts += _facts(found.facts, width, verbose)
    for phase in found.phases:
        parts += ["", *_phase(phase, width)]
    parts += ["", _end(found)]
    for part in parts:
        console.print(part, highlight=False, markup=False, width=width)


def _heading(found: AlignComparison) -> Text:
    heading = Text.assemble((f"{found.op}: A against B", "bold"))
    for letter, name, backend, verdict, created in zip(
        "AB", found.names, found.backends, found.verdicts, found.created, strict=True
    ):
        heading.append(f"\n{letter}  {name}  {backend}, {verdict}", style="")
        heading.append(f"  judged {created[:16].replace('T', ' ')}" if created else "", style="dim")
    return heading


def _warnings(found: AlignComparison) -> list[RenderableType]:
    return [Text(f"warning: {line}", style="yellow") for line in found.warnings]


def _facts(facts: Sequence[Fact], width: int, verbose: bool) -> list[RenderableType]:
    if not facts:
        return ["", Text("versions, machine, model, flags and policy agree", style="dim")]
    shown = facts if verbose else facts[:FACTS]
    values = [(fact_name(fact), short(fact.a), short(fact.b)) for fact in shown]
    parts: list[RenderableType] = ["", *both(values, width)]
    if len(facts) > len(shown):
        parts.append(Text(f"… and {len(facts) - len(shown)} more; --verbose shows all", "dim"))
    return parts


def both(values: Sequence[tuple[str, str, str]], width: int) -> list[RenderableType]:
    """What differs, with A's and B's value: ``vllm  0.24.0 → 0.25.0``, and below these what is too
    long for a line, A above B."""
    names = max((len(name) for name, a, b in values if _fits(name, a, b, width)), default=0)
    grid = Table.grid(padding=(0, GAP, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    long = []
    for name, a, b in values:
        if _fits(" " * names, a, b, width) and len(name) <= names:
            grid.add_row(name, Text(f"{a or '–'}{ARROW}{b or '–'}"))
        else:
            long.append((name, a, b))
    parts: list[RenderableType] = [grid] if grid.row_count else []
    for name, a, b in long:
        below = Table.grid(padding=(0, GAP, 0, 0))
        below.add_column(no_wrap=True)
        below.add_column(overflow="fold")
        below.add_row("  A", Text(a or "–"))
        below.add_row("  B", Text(b or "–"))
        parts += [Text(name, style="dim"), below]
    return parts


def _fits(name: str, a: str, b: str, width: int) -> bool:
    return len(name) + GAP + max(len(a), 1) + len(ARROW) + max(len(b), 1) <= width


def fact_name(fact: Fact) -> str:
    """What differs, in words."""
    return f"{fact.group} {fact.name}".strip()


def short(value: str) -> str:
    """A value in which digests are cut to what tells two apart."""
    digest = len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)
    return value[:DIGEST] if digest else value


def listed(before: str, items: Sequence[str], width: int, style: str = "") -> Text:
    """``only in A: 1 × 512, 2 × 512``: over several lines where needed, no item broken."""
    lines, line = [], before
    for number, item in enumerate(items, 1):
        told = item + ("," if number < len(items) else "")
        if len(line) + 1 + len(told) > width and line:
            lines.append(line)
            line = f"  {told}"
        else:
            line = f"{line} {told}"
    return Text("\n".join([*lines, line]), style=style)


def _phase(phase: PhaseChange, width: int) -> list[RenderableType]:
    title = Text.assemble((str(phase.phase), "bold"), "  ", verdicts(phase))
    parts: list[RenderableType] = [Rule(title, align="left", style="dim")]
    if phase.cases:
        parts.append(_cases(phase.cases, width))
    for letter, only in (("A", phase.only_a), ("B", phase.only_b)):
        if only:
            parts.append(listed(f"only in {letter}:", only, width, "yellow"))
    if phase.grouped:
        parts += ["", _changes(phase.grouped, len(phase.cases), width)]
    elif phase.cases:
        parts.append(Text("the same kernels in the same order, times within the limits", "dim"))
    return parts


def verdicts(phase: PhaseChange) -> str:
    """``✓ pass``, or both where they differ."""
    said = [_verdict(verdict) for verdict in (phase.verdict_a, phase.verdict_b)]
    return said[0] if said[0] == said[1] else " → ".join(said)


def _verdict(verdict: Outcome | None) -> str:
    return f"{OUTCOME_SIGN[verdict]} {verdict}" if verdict else "not judged"


def _cases(cases: Sequence[CaseChange], width: int) -> RenderableType:
    columns = [Column("case", [Text(case_name(case)) for case in cases])]
    for name, sides in (("e2e", [c.e2e for c in cases]), ("mock", [c.mock for c in cases])):
        leaves = 2 if name == "mock" else 1
        columns += [
            Column(f"{name} A µs", [Text(us(s.a.gpu_ns)) for s in sides], True, leaves=leaves),
            Column(f"{name} B µs", [Text(us(s.b.gpu_ns)) for s in sides], True, leaves=leaves),
            Column(f"{name} B/A", [_ratio(s) for s in sides], True),
            Column(f"{name} kernels", [_kernels(s) for s in sides]),
        ]
    return table(columns, width)


def case_name(case: CaseChange) -> str:
    """The shape, of both where they differ by what is cached."""
    return case.label if case.label == case.label_b else f"{case.label} / {case.label_b}"


def _ratio(side: SideChange) -> Text:
    if side.ratio is None:
        return NOTHING
    return Text(f"{PACE_SIGN[side.pace]} {side.ratio:.3f}", style=PACE_STYLE[side.pace])


def kernels_text(side: SideChange) -> str:
    """How many kernels changed, and how: ``+1 −2 ~3``; ``=`` when none did."""
    signs = [SIGN[kernel.change] for kernel in side.kernels if kernel.change is not Change.SAME]
    signs += [PACE_SIGN[kernel.pace] for kernel in side.kernels if kernel.pace is not Pace.STEADY]
    signs += ["□" for kernel in side.kernels if kernel.launch]
    said = [f"{sign}{signs.count(sign)}" for sign in dict.fromkeys(signs)]
    if side.mode_differs:
        said.append(f"{side.a.mode or 'mixed'} → {side.b.mode or 'mixed'}")
    return " ".join(said) or "="


def _kernels(side: SideChange) -> Text:
    said = kernels_text(side)
    return Text(said, style="green" if said == "=" else "yellow")


def _changes(grouped: Sequence[Grouped], cases: int, width: int) -> RenderableType:
    columns = [
        Column("side", [Text(g.side) for g in grouped]),
        Column("change", [_change(g, change_text(g)) for g in grouped], leaves=2,
               short=Column("change", [_change(g, change_text(g, WORD)) for g in grouped])),
        Column("kernel", [Text(_names(g)) for g in grouped], flexible=True),
        Column("calls", [Text(calls_text(g)) for g in grouped], True, leaves=2),
        Column("A µs", [_time(g.ns[0]) for g in grouped], True, leaves=1),
        Column("B µs", [_time(g.ns[1]) for g in grouped], True, leaves=1),
        Column("B/A", [Text(ratios_text(g)) for g in grouped], True),
        Column("cases", [Text(f"{len(g.cases)} of {cases}") for g in grouped], True, leaves=3),
    ]  # fmt: skip
    return table(columns, width)


def change_text(group: Grouped | KernelChange, words: Mapping[Change, str] | None = None) -> str:
    """``~ other variant, ▲ slower``; ``words`` are said instead of a change's own."""
    said = []
    if group.change is not Change.SAME:
        said.append(f"{SIGN[group.change]} {(words or {}).get(group.change, group.change)}")
    if group.pace is not Pace.STEADY:
        said.append(f"{PACE_SIGN[group.pace]} {group.pace}")
    if group.launch:
        said.append("□ other grid or block")
    return ", ".join(said)


def _change(group: Grouped, said: str) -> Text:
    if group.change is Change.SAME:
        return Text(said, style=PACE_STYLE[group.pace] if not group.launch else "")
    return Text(said, style=STYLE.get(group.change, "red"))


def _names(group: Grouped) -> str:
    names = [name for name in (group.name_a, group.name_b) if name]
    return "\n→ ".join(dict.fromkeys(names))


def calls_text(group: Grouped) -> str:
    """Launches a forward: ``1``, or ``1 → 2``."""
    said = [str(least) if least == most else f"{least}–{most}" for least, most in group.calls]
    return said[0] if said[0] == said[1] else " → ".join(said)


def ratios_text(group: Grouped) -> str:
    """The range of B over A."""
    if group.ratios is None:
        return "–"
    least, most = (f"{ratio:.2f}" for ratio in group.ratios)
    return least if least == most else f"{least}–{most}"


def _time(ns: int | None) -> Text:
    return NOTHING if ns is None else Text(us(ns))


def end_text(found: AlignComparison) -> str:
    """The answer in a sentence."""
    limits = found.limits
    if found.differs:
        changed = sum(case.differs for phase in found.phases for case in phase.cases)
        alone = sum(len(phase.only_a) + len(phase.only_b) for phase in found.phases)
        said = [f"{changed} of {_shapes(found.cases)} changed"]
        said += [f"{_shapes(alone)} in one only"] if alone else []
        said += [
            f"{phase.phase} {verdicts(phase)}"
            for phase in found.phases
            if phase.verdict_a != phase.verdict_b
        ]
        return f"DIFFERENT  {', '.join(said)}"
    return (
        f"NO DIFFERENCE  {_shapes(found.cases)}: the same kernels; times within "
        f"{limits.kernel:.1%} a kernel and {limits.case:.1%} a shape, or within their spread"
    )


def _shapes(count: int) -> str:
    return f"{count} shape" if count == 1 else f"{count} shapes"


def _end(found: AlignComparison) -> Text:
    return Text(end_text(found), style="bold red" if found.differs else "bold green")


def comparison_markdown(found: AlignComparison) -> str:
    """What differs, as GitHub-flavoured Markdown ending in a line break."""
    lines = [f"### {text(found.op)}: {text(found.names[0])} → {text(found.names[1])}", ""]
    lines += [f"**{text(end_text(found))}**"]
    for warning in found.warnings:
        lines += ["", f"> ⚠️ {text(warning)}"]
    for phase in found.phases:
        lines += ["", f"#### {phase.phase} {verdicts(phase)}", *_phase_markdown(phase)]
    if found.facts:
        values = [
            (text(fact_name(fact)), code(short(fact.a)), code(short(fact.b)))
            for fact in found.facts
        ]
        about = f"Provenance: {len(values)} differences"
        lines += ["", *folded(about, rows(("differs", "A", "B"), values))]
    return "\n".join(lines) + "\n"


def _phase_markdown(phase: PhaseChange) -> list[str]:
    lines: list[str] = []
    if phase.cases:
        cells = [
            (
                case_name(case),
                *(cell for side in case.sides for cell in (
                    us(side.a.gpu_ns), us(side.b.gpu_ns),
                    "–" if side.ratio is None else f"{PACE_SIGN[side.pace]} {side.ratio:.3f}",
                    text(kernels_text(side)))),
            )
            for case in phase.cases
        ]  # fmt: skip
        heading = [f"{side} {what}" for side in ("E2E", "mock")
                   for what in ("A µs", "B µs", "B/A", "kernels")]  # fmt: skip
        lines += ["", *rows(("case", *heading), cells, " rrr rrr ")]
    for letter, only in (("A", phase.only_a), ("B", phase.only_b)):
        if only:
            lines += ["", f"Only in {letter}: {', '.join(only)}"]
    if phase.grouped:
        lines += ["", *rows(
            ("side", "change", "kernel", "calls", "A µs", "B µs", "B/A", "cases"),
            [_group_cells(group, len(phase.cases)) for group in phase.grouped],
            "   rrrrr",
        )]  # fmt: skip
    return lines


def _group_cells(group: Grouped, cases: int) -> tuple[str, ...]:
    names = [code(name) for name in dict.fromkeys((group.name_a, group.name_b)) if name]
    return (
        group.side,
        text(change_text(group)),
        " → ".join(names),
        calls_text(group),
        *("–" if ns is None else us(ns) for ns in group.ns),
        ratios_text(group),
        f"{len(group.cases)} of {cases}",
    )
