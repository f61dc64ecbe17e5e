"""Two alignments of one op as one HTML file: ``compare_page``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from opkit.align.comparison import (
    AlignComparison,
    CaseChange,
    Change,
    KernelChange,
    Limits,
    Pace,
    PhaseChange,
)
from opkit.reports.compare import (
    PACE_SIGN,
    SIGN,
    calls_text,
    case_name,
    change_text,
    end_text,
    fact_name,
    kernels_text,
    ratios_text,
)
from opkit.reports.facts import us
from opkit.reports.html.charts import E2E, MOCK, QUIET, Chart
from opkit.reports.html.page import render

SIDES = {"e2e": "E2E", "mock": "Mock"}
OPEN = 3  # changed cases of a phase that stand open
# A row's class in the page: new, gone, another kernel, or only its time or place.
ROW = {
    Change.NEW: "n",
    Change.MORE: "n",
    Change.GONE: "d",
    Change.FEWER: "d",
    Change.VARIANT: "v",
    Change.DTYPE: "v",
}
WIDTH, ROW_HEIGHT, LETTER = 900, 26, 6.7  # of the chart, pixels


@dataclass(frozen=True)
class CaseView:
    """One shape, ready to be written."""

    id: str
    name: str
    case: CaseChange
    open: bool


@dataclass(frozen=True)
class PhaseView:
    """One phase and its shapes; no chart where no ratio can be told."""

    phase: PhaseChange
    cases: tuple[CaseView, ...]
    changed: int
    chart: Markup | None


def compare_page(found: AlignComparison) -> str:
    """The page of a comparison of two alignments: HTML text that opens offline."""
    phases = [_phase(phase, found.limits) for phase in found.phases]
    sections = [("summary", "Summary")]
    sections += [(str(view.phase.phase), str(view.phase.phase).capitalize()) for view in phases]
    created = [text[:16].replace("T", " ") for text in found.created]
    return render(
        "compare_align.html",
        title=f"{found.op}: {found.names[0]} → {found.names[1]}",
        sections=[*sections, ("names", "Full names"), ("provenance", "Provenance")],
        found=found,
        phases=phases,
        ends=list(zip("AB", found.names, found.backends, found.verdicts, created, strict=True)),
        summary=end_text(found),
        facts=[(fact_name(fact), fact.a, fact.b, False) for fact in found.facts],
        full=list(dict.fromkeys(_full_names(found))),
        signs=[
            *((sign, str(change)) for change, sign in SIGN.items()),
            *((sign, str(pace)) for pace, sign in PACE_SIGN.items() if pace is not Pace.STEADY),
            ("□", "other grid or block"),
        ],
        names=SIDES,
        pace_sign=PACE_SIGN,
        css=_css,
        kernels_text=kernels_text,
        change_text=change_text,
        calls_text=calls_text,
        ratios_text=ratios_text,
    )


def _phase(phase: PhaseChange, limits: Limits) -> PhaseView:
    changed = [case for case in phase.cases if case.differs]
    shown = {id(case) for case in changed[:OPEN]}
    return PhaseView(
        phase,
        tuple(
            CaseView(f"{phase.phase}-{number}", case_name(case), case, id(case) in shown)
            for number, case in enumerate(phase.cases, 1)
        ),
        len(changed),
        _ratios(phase, limits) if _told(phase) else None,
    )


def _css(row: KernelChange) -> str:
    return ROW.get(row.change, "t") if row.differs else "s"


def _full_names(found: AlignComparison) -> Iterator[tuple[str, str, str]]:
    for row in (
        row
        for phase in found.phases
        for case in phase.cases
        for side in case.sides
        for row in side.kernels
    ):
        if row.change is not Change.SAME:
            a, b = (kernel.name if kernel else "" for kernel in (row.a, row.b))
            yield f"{SIGN[row.change]} {row.change}", a, b


def _told(phase: PhaseChange) -> bool:
    return any(side.ratio is not None for case in phase.cases for side in case.sides)


def _ratios(phase: PhaseChange, limits: Limits) -> Markup:
    """B over A of every shape, engine and mock, with its spread, beside the limits."""
    names = [case_name(case) for case in phase.cases]
    height = 46 + ROW_HEIGHT * len(names)
    label = f"GPU time of a forward, B over A, of each shape of {phase.phase}; the table has all"
    chart = Chart(f"{phase.phase}-ratios", WIDTH, height, label, fixed=True)
    axes = chart.axes
    for at, (name, case) in enumerate(zip(names, phase.cases, strict=True)):
        for side, shift, colour in ((case.e2e, -0.16, E2E), (case.mock, 0.16, MOCK)):
            if side.ratio is None:
                continue
            spread = side.ratio_spread or 0.0
            axes.plot([side.ratio - spread, side.ratio + spread], [at + shift] * 2, "-",
                      color=colour, linewidth=2, solid_capstyle="butt")  # fmt: skip
            [dot] = axes.plot([side.ratio], [at + shift], "o", color=colour, markersize=7)
            chart.mark(dot, [
                f"{name}, {SIDES[side.side]}: {us(side.a.gpu_ns)} → {us(side.b.gpu_ns)} µs\n"
                f"B/A {side.ratio:.3f}"
                + (f" ± {side.ratio_spread:.3f}" if side.ratio_spread is not None else "")
                + f", {side.pace}"
            ])  # fmt: skip
    # A share of the shorter time: the limits lie evenly around 1 on a logarithmic axis.
    edge = 1 + limits.case
    axes.axvline(1.0, color=QUIET, linewidth=0.8)
    for limit in (1 / edge, edge):
        axes.axvline(limit, color=QUIET, linewidth=0.8, dashes=(4, 3))
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 1 / edge - 0.02), max(high, edge + 0.02))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("B/A of a forward's GPU time")
    axes.grid(visible=False, axis="y")
    chart.margins(14 + LETTER * max(map(len, names)), 20, 6, 40)
    return chart.svg()
