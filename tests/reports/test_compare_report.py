"""Two alignments beside each other, as they appear, at two widths and as Markdown."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from made_result import kernel, made_result, pair, side
from rich.console import Console

from opkit.align.compare import compare_alignments
from opkit.align.comparison import AlignComparison
from opkit.align.result import (
    AlignResult,
    CaseMatch,
    KernelStat,
    Level,
    Method,
    Outcome,
    PhaseResult,
)
from opkit.layers.op import Case, Phase
from opkit.reports.compare import comparison_markdown, print_comparison

OLD_TILE, NEW_TILE = "nvjet_sm90_tst_256x128_64x4_TNN", "nvjet_sm90_tst_192x176_64x5_TNN"
MOCK = (OLD_TILE, 800.0), ("rms_norm_kernel", 2.0), ("topKPerRowPrefill", 97.0)
BEFORE = (OLD_TILE, 800.0), ("rms_norm_kernel", 2.0), ("topKPerRowPrefill", 100.0)
AFTER = (
    (NEW_TILE, 640.0),
    ("rms_norm_kernel", 2.0),
    ("indexer_k_quant_and_cache", 4.0),
    ("topKPerRowPrefill", 150.0),
)
DECODE = Case(Phase.GENERATION, 16, 1, 1029)


def kernels(listed: tuple[tuple[str, float], ...]) -> list[KernelStat]:
    """Kernels with demangled names of their own."""
    made = [kernel(short, us) for short, us in listed]
    return [replace(k, name=k.short if k.short.startswith("nvjet") else k.name) for k in made]


def case(shape: Case, engine: tuple[tuple[str, float], ...]) -> CaseMatch:
    mode = "eager" if shape.phase is Phase.CONTEXT else "graph"
    sides = [
        side(shape, sum(us for _, us in listed), len(listed), regions=20, mode=mode)
        for listed in (MOCK, engine)
    ]
    pairs = [pair(k, None, Level.MOCK_ONLY, 0.1) for k in kernels(MOCK)]
    pairs += [pair(None, k, Level.E2E_ONLY, 0.1) for k in kernels(engine)]
    return CaseMatch(sides[0], sides[1], Method.LAUNCH_NVTX, 1.0, 0.5, tuple(pairs))


def aligned(version: str, *cases: CaseMatch, verdict: Outcome = Outcome.PASS) -> AlignResult:
    phases = tuple(
        PhaseResult(phase, verdict, Method.LAUNCH_NVTX, 1.0, chosen, ())
        for phase in Phase
        if (chosen := tuple(c for c in cases if c.mock.case.phase is phase))
    )
    known = {"gpu": "NVIDIA H100 80GB HBM3", "versions": {"vllm": version},
             "created": "2026-11-21T10:30:00+00:00"}  # fmt: skip
    return replace(made_result(), verdict=verdict, phases=phases, provenance=known, notes=())


def upgraded() -> AlignComparison:
    """From vLLM 0.24.0 to 0.25.0: another GEMM, one kernel new, one slower; decode as it was."""
    shape, long = Case(Phase.CONTEXT, 1, 4096, 0), Case(Phase.CONTEXT, 1, 8192, 0)
    before = aligned("0.24.0", case(shape, BEFORE), case(DECODE, BEFORE))
    after = aligned(
        "0.25.0",
        case(shape, AFTER),
        case(long, AFTER),
        case(DECODE, BEFORE),
        verdict=Outcome.FAIL,
    )
    return compare_alignments(before, after, ("dsa-20261121-103000-ab12cd", "dsa-later"))


WIDE = """
dsa: A against B
A  dsa-20261121-103000-ab12cd  vllm, pass  judged 2026-11-21 10:30
B  dsa-later  vllm, fail  judged 2026-11-21 10:30

versions vllm  0.24.0 → 0.25.0

context  ✓ pass → ✗ fail ───────────────────────────────────────────────────────────────────────────
case       e2e A µs  e2e B µs  e2e B/A  e2e kernels  mock A µs  mock B µs  mock B/A  mock kernels
─────────────────────────────────────────────────────────────────────────────────────────────────
1 × 4,096     902.0     796.0  ▼ 0.882  ~1 +1 ▼1 ▲1      899.0      899.0   = 1.000  =
only in B: 1 × 8,192

side  change                     kernel                             calls   A µs   B µs   B/A
─────────────────────────────────────────────────────────────────────────────────────────────
e2e   ~ other variant, ▼ faster  nvjet_sm90_tst_256x128_64x4_TNN        1  800.0  640.0  0.80
                                 → nvjet_sm90_tst_192x176_64x5_TNN
e2e   ▲ slower                   topKPerRowPrefill                      1  100.0  150.0  1.50
e2e   + new                      indexer_k_quant_and_cache          0 → 1      –    4.0     –

generation  ✓ pass → ✗ fail ────────────────────────────────────────────────────────────────────────
case            e2e A µs  e2e B µs  e2e B/A  e2e kernels  mock B/A  mock kernels
────────────────────────────────────────────────────────────────────────────────
16 × 1 @ 1,029     902.0     902.0  = 1.000  =             = 1.000  =
the same kernels in the same order, times within the limits

DIFFERENT  1 of 2 shapes changed, 1 shape in one only, context ✓ pass → ✗ fail, generation ✓ pass →
✗ fail
"""


def render(found: AlignComparison, width: int, *, verbose: bool = False) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    print_comparison(found, console, verbose=verbose)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_an_upgrade_at_full_width() -> None:
    assert render(upgraded(), 100) == WIDE.strip()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = render(upgraded(), width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "▲ slower" in text
    assert "+ new" in text


def test_like_runs_say_so() -> None:
    case_ = case(DECODE, BEFORE)
    text = render(compare_alignments(aligned("0.24.0", case_), aligned("0.25.0", case_)), 100)
    assert text.splitlines()[-2:] == [
        "NO DIFFERENCE  1 shape: the same kernels; times within 15.0% a kernel and 7.5% a shape, "
        "or within",
        "their spread",
    ]


def test_many_facts_are_cut_and_verbose_shows_all() -> None:
    case_ = case(DECODE, BEFORE)
    sources = {f"vllm/{n}.py": str(n) * 64 for n in range(20)}
    after = aligned("0.24.0", case_)
    known = after.provenance | {"layer_source": sources}
    found = compare_alignments(aligned("0.24.0", case_), replace(after, provenance=known))
    short = render(found, 100)
    assert "… and 8 more; --verbose shows all" in short
    assert "vllm/19.py" not in short
    every = render(found, 100, verbose=True)
    assert "layer source vllm/1.py" in every
    assert "– → 11111111\n" in every


def test_a_warning_stands_first() -> None:
    case_ = case(DECODE, BEFORE)
    after = aligned("0.24.0", case_)
    other = replace(after, provenance=after.provenance | {"gpu": "NVIDIA B200"})
    lines = render(compare_alignments(aligned("0.24.0", case_), other), 100).splitlines()
    assert lines[3] == "warning: different GPUs: NVIDIA H100 80GB HBM3 and NVIDIA B200"


def test_markdown_holds_the_same_numbers() -> None:
    made = comparison_markdown(upgraded())
    assert made.startswith("### dsa: dsa-20261121-103000-ab12cd → dsa-later\n\n**DIFFERENT 1 of 2")
    row = "| 1 × 4,096 | 902.0 | 796.0 | ▼ 0.882 | \\~1 +1 ▼1 ▲1 | 899.0 | 899.0 | = 1.000 | = |"
    assert row in made.splitlines()
    assert (
        f"| e2e | \\~ other variant, ▼ faster | `{OLD_TILE}` → `{NEW_TILE}` | 1 | 800.0 | 640.0 "
        "| 0.80 | 1 of 1 |"
    ) in made.splitlines()
    assert "Only in B: 1 × 8,192" in made
    assert "| versions vllm | `0.24.0` | `0.25.0` |" in made
