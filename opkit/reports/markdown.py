"""An alignment as GitHub-flavoured Markdown: a comment under a pull request.

The verdict and the checks are seen at once; kernels fold out. Kernel names hold ``<``, ``|`` and
``*``: every name passes :func:`code` or :func:`text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from opkit.align.result import (
    AlignResult,
    CaseMatch,
    CheckResult,
    KernelPair,
    KernelStat,
    Outcome,
    PhaseResult,
)
from opkit.reports.facts import (
    LEVEL_SIGN,
    OUTCOME_SIGN,
    SEPARATOR,
    files_text,
    gpu_ratio,
    model_text,
    modes_text,
    next_step,
    pairs_text,
    percent,
    policy_text,
    shown_cases,
    two_counts,
    unlike,
    us,
)

ICON = {Outcome.PASS: "✅", Outcome.FAIL: "❌", Outcome.INCONCLUSIVE: "❔"}
NOTHING = "–"
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# What Markdown and GitHub's HTML take for markup, and what would make a mention or an issue link.
# An underscore inside a word is none.
_MARKUP = re.compile(r"[\\`*{}\[\]<>|~$]|(?<!\w)_|_(?!\w)|#(?=\d)|@(?=\w)")


def _plain(text: str) -> str:
    """On one line, without control characters: they would reach the terminal of who prints it."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def code(name: str) -> str:
    """A name in code style that may stand in a table: pipes escaped, as many ticks as it takes."""
    plain = _plain(name)
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    ticks = "`" * (longest + 1)
    # A span that begins or ends with a tick is set off by a blank, which GitHub takes away.
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return ticks + pad + plain.replace("|", "\\|") + pad + ticks if plain else NOTHING


def text(sentence: object) -> str:
    """A sentence on one line in which nothing is markup, but what opkit sets in ``code``."""
    parts = _SPAN.split(_plain(str(sentence)))
    return "".join(code(part) if n % 2 else _escaped(part) for n, part in enumerate(parts))


def _escaped(plain: str) -> str:
    # A zero-width space keeps a name from being mentioned; nothing else does.
    return _MARKUP.sub(lambda m: "@\u200b" if m[0] == "@" else f"\\{m[0]}", plain)


def rows(heading: Sequence[str], cells: Iterable[Sequence[str]], right: str = "") -> list[str]:
    """A table's lines.

    Args:
        heading: titles.
        cells: one sequence a row, Markdown already.
        right: a letter a column: ``r`` for numbers; others are set to the left.
    """
    marks = ["---:" if side == "r" else "---" for side in right.ljust(len(heading))[: len(heading)]]
    return [f"| {' | '.join(row)} |" for row in ([*heading], marks, *([*row] for row in cells))]


def folded(summary: str, inside: Sequence[str]) -> list[str]:
    """Lines that fold out; ``summary`` is plain text."""
    safe = summary.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return ["<details>", f"<summary>{safe}</summary>", "", *inside, "", "</details>"]


def align_markdown(result: AlignResult) -> str:
    """An alignment's verdict, checks and worst kernels, ending in a line break."""
    lines = [
        f"### {ICON[result.verdict]} `opkit align {result.op}`{SEPARATOR}{text(result.backend)}: "
        f"**{str(result.verdict).upper()}**",
        "",
        *_phases(result.phases),
        "",
        f"**next** {text(next_step(result))}",
    ]
    for phase in result.phases:
        lines += ["", f"#### {phase.phase}", "", *_checks(phase.checks), *_notes(phase.notes)]
        for case in shown_cases(phase.cases, verbose=False):
            lines += ["", *folded(_case_text(case), _kernels(case))]
    if not result.phases:
        lines += ["Nothing was compared."]
    lines += [*_notes(result.notes), "", *folded("Provenance", _provenance(result))]
    return "\n".join(lines) + "\n"


def _phases(phases: Sequence[PhaseResult]) -> list[str]:
    found = []
    for phase in phases:
        ratios = [r for case in phase.cases if (r := gpu_ratio(case)) is not None]
        span = f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else NOTHING
        found.append(
            (
                str(phase.phase),
                f"{ICON[phase.verdict]} {phase.verdict}",
                str(len(phase.cases)),
                str(sum(unlike(case) for case in phase.cases)),
                span,
                str(phase.method or "no region found"),
                percent(phase.attributed),
            )
        )
    heading = ("phase", "verdict", "cases", "unlike kernels", "GPU time mock/E2E", "regions by",
               "attributed")  # fmt: skip
    return rows(heading, found, "  rrr r") if found else []


def _checks(checks: Sequence[CheckResult]) -> list[str]:
    found = []
    for check in checks:
        said = [text(check.detail)]
        if check.outcome is not Outcome.PASS:
            said += [f"**{label}** {text(what)}" for label, what in
                     (("cause", check.cause), ("next", check.next_step)) if what]  # fmt: skip
        found.append((OUTCOME_SIGN[check.outcome], text(check.check), "<br>".join(said)))
    return rows(("", "check", "found"), found) if found else ["No check was made."]


def _notes(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in ("", f"> {text(note)}")]


def _case_text(case: CaseMatch) -> str:
    mock, e2e = us(case.mock.gpu_ns), us(case.e2e.gpu_ns)
    ratio = gpu_ratio(case)
    return SEPARATOR.join(
        (
            f"{case.mock.case.label()}: kernels",
            modes_text(case),
            f"{two_counts(case.mock.launches, case.e2e.launches)} launches",
            f"GPU time mock {mock} µs, E2E {e2e} µs"
            + (f", ratio {ratio:.3f}" if ratio is not None else ""),
        )
    )


def _kernels(case: CaseMatch) -> list[str]:
    found = [
        (
            str(number),
            _name(pair),
            _time(pair.mock),
            _time(pair.e2e),
            NOTHING if pair.ratio is None else f"{pair.ratio:.2f}",
            percent(pair.share),
            f"{LEVEL_SIGN[pair.level]} {pair.level}",
        )
        for number, pair in enumerate(case.pairs, 1)
    ]
    heading = ("#", "kernel", "mock µs", "E2E µs", "mock/E2E", "share", "match")
    return rows(heading, found, "r rrrr")


def _name(pair: KernelPair) -> str:
    said = code(pair.name)
    if pair.mock and pair.e2e and pair.mock.short != pair.e2e.short:
        said += f"<br>mock: {code(pair.mock.short)}"
    return said


def _time(kernel: KernelStat | None) -> str:
    """Median and spread (median absolute deviation) in µs."""
    return f"{us(kernel.median_ns)} ± {us(kernel.mad_ns)}" if kernel else NOTHING


def _provenance(result: AlignResult) -> list[str]:
    known = result.provenance
    facts = (
        ("GPU", known.get("gpu")),
        ("versions", pairs_text(known.get("versions"))),
        ("model", model_text(known)),
        ("dtypes", pairs_text(known.get("dtypes"))),
        ("own policy", policy_text(known)),
        ("traces", files_text(known)),
        ("policy", known.get("policy_digest")),
        ("judged", known.get("created")),
    )
    return rows(("", ""), [(name, text(value)) for name, value in facts if value])
