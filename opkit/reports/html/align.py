"""An alignment as one HTML file: ``align_page``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from opkit.align.result import AlignResult, CaseMatch, KernelPair, KernelSum, PhaseResult
from opkit.align.result_json import case_names
from opkit.reports.facts import (
    ALIKE,
    model_text,
    next_step,
    pairs_text,
    policy_text,
    ratio,
    shown_cases,
    unlike,
)
from opkit.reports.html.align_charts import spread
from opkit.reports.html.page import render

HUES = 6  # kernels with a colour of their own: those with most time in a phase

# What the page shows in a form of its own; all else of the provenance is listed as it is.
_SHOWN = {
    "gpu", "versions", "model", "dtypes", "created", "files", "policy", "policy_digest", "recipe",
    "operands", "waves", "commands", "layer_source", "nsys_warnings", "notes", "op", "backend",
    "opkit", "tp_size", "region", "engine_args",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of a kernel table: the pair, its class in the page and the numbers of its names."""

    pair: KernelPair
    css: str
    names: str


@dataclass(frozen=True)
class Sum:
    """One line of the table of kernels by name: the bars of mock and E2E in % of the longest."""

    kernel: KernelSum
    mock: float
    e2e: float


@dataclass(frozen=True)
class CaseView:
    """One case, ready to be written."""

    id: str
    name: str
    case: CaseMatch
    rows: tuple[Row, ...]
    open: bool
    unlike: int
    unlike_glue: int
    ratio: float | None
    elapsed_ratio: float | None
    timed: bool  # the result knows when each kernel started
    sums: tuple[Sum, ...]
    spread: Markup | None


@dataclass(frozen=True)
class PhaseView:
    """One phase and its cases."""

    phase: PhaseResult
    cases: tuple[CaseView, ...]


def align_page(result: AlignResult, *, name: str = "", folder: str = "") -> str:
    """The page of an alignment: HTML text that opens offline.

    Args:
        result: what was found.
        name: its id in the ledger, if it has one.
        folder: where its traces and logs lie, if known.
    """
    names = {text: number for number, text in enumerate(_kernel_names(result), 1)}
    shorts = {
        kernel.name: kernel.short
        for pair in _pairs(result)
        for kernel in (pair.mock, pair.e2e)
        if kernel
    }
    phases = [_phase(phase, names) for phase in result.phases]
    known = result.provenance
    sections = [("verdict", "Verdict")]
    sections += [(str(view.phase.phase), str(view.phase.phase).capitalize()) for view in phases]
    sections += [("regions", "Regions"), ("names", "Kernel names"), ("provenance", "Provenance")]
    return render(
        "align.html",
        title=f"{result.op} · {result.backend}: {result.verdict}",
        sections=sections,
        result=result,
        phases=phases,
        names=[(number, shorts[text], text) for text, number in names.items()],
        next_step=next_step(result),
        facts=_facts(result, name, folder),
        known=dict.fromkeys(_SHOWN - {"region"}) | known,  # an older opkit told less
        others={key: value for key, value in known.items() if key not in _SHOWN},
    )


def _pairs(result: AlignResult) -> Iterator[KernelPair]:
    for phase in result.phases:
        for case in phase.cases:
            yield from case.pairs


def _kernel_names(result: AlignResult) -> dict[str, None]:
    """Demangled names in the order of their first launch."""
    return {
        kernel.name: None
        for pair in _pairs(result)
        for kernel in (pair.mock, pair.e2e)
        if kernel is not None
    }


def _hues(phase: PhaseResult) -> dict[str, int]:
    """The kernels with the largest shares get a colour each, the same in every case."""
    shares: dict[str, float] = defaultdict(float)
    for pair in (pair for case in phase.cases for pair in case.pairs if not pair.glue):
        shares[pair.name] += pair.share
    most = sorted(shares, key=lambda name: -shares[name])
    return {name: hue for hue, name in enumerate(most[:HUES], 1)}


def _phase(phase: PhaseResult, names: dict[str, int]) -> PhaseView:
    hues = _hues(phase)
    telling = [id(case) for case in shown_cases(phase.cases, verbose=False)]
    labels = case_names(phase.cases)
    return PhaseView(
        phase,
        tuple(
            _case(f"{phase.phase}-{number}", label, case, id(case) in telling, names, hues)
            for number, (label, case) in enumerate(zip(labels, phase.cases, strict=True), 1)
        ),
    )


def _case(
    ident: str,
    label: str,
    case: CaseMatch,
    telling: bool,
    names: dict[str, int],
    hues: dict[str, int],
) -> CaseView:
    sides = [side for pair in case.pairs for side in (pair.mock, pair.e2e) if side]
    mismatches = sum(pair.level not in ALIKE for pair in case.pairs)
    return CaseView(
        id=ident,
        name=label,
        case=case,
        rows=tuple(Row(pair, _css(pair, hues), _numbers(pair, names)) for pair in case.pairs),
        open=telling,
        unlike=unlike(case),
        unlike_glue=mismatches - unlike(case),
        ratio=ratio(case.mock.gpu_ns, case.e2e.gpu_ns),
        elapsed_ratio=ratio(case.mock.elapsed_ns, case.e2e.elapsed_ns),
        timed=all(side.offset_ns is not None for side in sides),
        sums=_sums(case),
        spread=spread(f"{ident}-spread", case) if case.mock.samples_ns else None,
    )


def _sums(case: CaseMatch) -> tuple[Sum, ...]:
    longest = max((max(k.mock_ns, k.e2e_ns) for k in case.by_kernel), default=0) or 1
    return tuple(
        Sum(k, 100 * k.mock_ns / longest, 100 * k.e2e_ns / longest) for k in case.by_kernel
    )


def _css(pair: KernelPair, hues: dict[str, int]) -> str:
    if pair.level not in ALIKE:
        return "x"
    if pair.glue:
        return "g"
    return f"h{hues[pair.name]}" if pair.name in hues else ""


def _numbers(pair: KernelPair, names: dict[str, int]) -> str:
    """The number of a kernel's full name, or both where the sides differ."""
    found = dict.fromkeys(str(names[side.name]) for side in (pair.mock, pair.e2e) if side)
    return "/".join(found)


def _facts(result: AlignResult, name: str, folder: str) -> list[tuple[str, str]]:
    known: dict[str, Any] = result.provenance
    found = (
        ("GPU", known.get("gpu")),
        ("versions", pairs_text(known.get("versions"))),
        ("model", model_text(known)),
        ("dtypes", pairs_text(known.get("dtypes"))),
        ("own policy", policy_text(known)),
        ("judged", known.get("created")),
        ("ledger id", name),
        ("folder", folder),
    )
    return [(label, str(value)) for label, value in found if value]
