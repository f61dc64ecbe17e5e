"""Whole reports, as they appear, at two widths and without colour."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
from made_result import made_result, passed_phase
from rich.console import Console

from opkit.align.ledger import LedgerEntry
from opkit.align.result import AlignResult, Outcome
from opkit.reports.terminal import print_align, print_status

WIDE = """
╭─  dsa · vllm  ───────────────────────────────────────────────────────────────────────────────────╮
│ GPU       NVIDIA H100 80GB HBM3                                                                  │
│ versions  vllm 0.24.0 · torch 2.11.0+cu130 · nsys 2024.2.3 · opkit 0.1.0                         │
│ model     DeepseekV32ForCausalLM · 4 layers · 128 heads · tp 1                                   │
│ dtypes    weights bfloat16 · kv_cache bfloat16 · indexer_cache fp8                               │
│ traces    mock.sqlite (1f3a9c20) · e2e.sqlite (9c2e77d1)                                         │
│ judged    2026-11-21T10:30:00+00:00                                                              │
╰───────────────────────────────────────────────────────────────────────────────────────  ✗ fail  ─╯

context  ✗ fail ────────────────────────────────────────────────────────────────────────────────────
regions by module range of the launch · 99.8 % of kernels attributed

case       mode   regions  launches  unlike  mock µs   e2e µs  ratio
────────────────────────────────────────────────────────────────────
1 × 4,096  eager  20 / 24         7       2  5,866.2  7,176.9   0.82
4 × 1,024  eager  20 / 24        30       0  4,502.0  4,641.5   0.97

1 × 4,096 · eager · 20 / 24 regions · 7 launches each · 61.2 % of the step's GPU time
#  kernel                               calls          mock µs           e2e µs  ratio  match
───────────────────────────────────────────────────────────────────────────────────────────────────
1  nvjet_sm90_tst_256x128_64x4        20 / 24    812.4 ± 1.0 %    918.2 ± 1.0 %   0.88  = same
2  copy_kernel                        20 / 24      3.1 ± 1.0 %      3.2 ± 1.0 %   0.97  = same
3  nvjet_sm90_tst_192x176_64x5        20 / 24    640.0 ± 1.0 %    648.3 ± 1.0 %   0.99  ~ variant
   mock: nvjet_sm90_tst_256x128_64x4
4  cooperative_topk_cs8               20 / 24     97.0 ± 1.0 %    657.1 ± 1.0 %   0.15  ≈ role
   mock: topKPerRowPrefill
5  indexer_k_quant_and_cache           – / 24                –      4.2 ± 1.0 %      –  − e2e only
6  fill_kernel                         20 / –      1.4 ± 1.0 %                –      –  + mock only
7  sparse_attn_fwd_kernel             20 / 24  3,310.2 ± 1.0 %  3,785.9 ± 1.0 %   0.87  = same
8  gemm_fp8                           20 / 24  1,002.1 ± 1.0 %  1,160.0 ± 1.0 %   0.86  ≠ dtype
   mock: gemm_bf16
───────────────────────────────────────────────────────────────────────────────────────────────────
   GPU time                                            5,866.2          7,176.9   0.82
   elapsed                                             6,042.2          7,392.2   0.82

✓  evidence         24 regions; 99.8 % of launches attributed
✗  missing / extra  the engine launches indexer_k_quant_and_cache once a forward, the mock never
     cause          the mock has no KV cache manager, so nothing writes the indexer's cache
     next           give the mock the engine's KV cache and run `opkit align dsa` again
?  data             topKPerRowPrefill takes 97 µs against 657 µs at the same grid
     cause          its time depends on the values
     next           capture the engine's activations
note: 2 steps of mixed phases were left out

generation  ✓ pass ─────────────────────────────────────────────────────────────────────────────────
regions by sequence · 100.0 % of kernels attributed

16 × 1 @ 1,029 · graph · 30 / 120 regions · 26 launches each · 41.2 % of the step's GPU time
#  kernel               calls       mock µs        e2e µs  ratio   share  match
────────────────────────────────────────────────────────────────────────────────
1  flash_mla_decode  30 / 120  41.0 ± 1.0 %  42.1 ± 1.0 %   0.97  51.0 %  = same
────────────────────────────────────────────────────────────────────────────────
   GPU time                            81.0          83.9   0.97
   elapsed                             83.4          86.4   0.97

✓  latency  GPU time 0.97 of the engine's

note: clocks were not locked
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃  FAIL   context fail · generation pass                                                           ┃
┃ next: give the mock the engine's KV cache and run `opkit align dsa` again                        ┃
┗━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┛
"""

NARROW = """
╭─  dsa · vllm  ───────────────────────────────────────────╮
│ GPU       NVIDIA H100 80GB HBM3                          │
│ versions  vllm 0.24.0 · torch 2.11.0+cu130 · nsys        │
│           2024.2.3 · opkit 0.1.0                         │
│ model     DeepseekV32ForCausalLM · 4 layers · 128 heads  │
│           · tp 1                                         │
│ dtypes    weights bfloat16 · kv_cache bfloat16 ·         │
│           indexer_cache fp8                              │
│ traces    mock.sqlite (1f3a9c20) · e2e.sqlite (9c2e77d1) │
│ judged    2026-11-21T10:30:00+00:00                      │
╰───────────────────────────────────────────────  ✗ fail  ─╯

context  ✗ fail ────────────────────────────────────────────
regions by module range of the launch · 99.8 % of kernels
attributed

case       mode   launches  unlike  mock µs   e2e µs  ratio
───────────────────────────────────────────────────────────
1 × 4,096  eager         7       2  5,866.2  7,176.9   0.82
4 × 1,024  eager        30       0  4,502.0  4,641.5   0.97

1 × 4,096 · eager · 20 / 24 regions · 7 launches each · 61.2
% of the step's GPU time
kernel                            mock µs   e2e µs  ratio
────────────────────────────────────────────────────────────
nvjet_sm90_tst_256x128_64x4         812.4    918.2   0.88  =
copy_kernel                           3.1      3.2   0.97  =
nvjet_sm90_tst_192x176_64x5         640.0    648.3   0.99  ~
mock: nvjet_sm90…st_256x128_64x4
cooperative_topk_cs8                 97.0    657.1   0.15  ≈
mock: topKPerRowPrefill
indexer_k_quant_and_cache               –      4.2      –  −
fill_kernel                           1.4        –      –  +
sparse_attn_fwd_kernel            3,310.2  3,785.9   0.87  =
gemm_fp8                          1,002.1  1,160.0   0.86  ≠
mock: gemm_bf16
────────────────────────────────────────────────────────────
GPU time                          5,866.2  7,176.9   0.82
elapsed                           6,042.2  7,392.2   0.82

✓  evidence         24 regions; 99.8 % of launches
                    attributed
✗  missing / extra  the engine launches
                    indexer_k_quant_and_cache once a
                    forward, the mock never
     cause          the mock has no KV cache manager, so
                    nothing writes the indexer's cache
     next           give the mock the engine's KV cache and
                    run `opkit align dsa` again
?  data             topKPerRowPrefill takes 97 µs against
                    657 µs at the same grid
     cause          its time depends on the values
     next           capture the engine's activations
note: 2 steps of mixed phases were left out

generation  ✓ pass ─────────────────────────────────────────
regions by sequence · 100.0 % of kernels attributed

16 × 1 @ 1,029 · graph · 30 / 120 regions · 26 launches each
· 41.2 % of the step's GPU time
#  kernel            mock µs  e2e µs  ratio  match
───────────────────────────────────────────────────
1  flash_mla_decode     41.0    42.1   0.97  = same
───────────────────────────────────────────────────
   GPU time             81.0    83.9   0.97
   elapsed              83.4    86.4   0.97

✓  latency  GPU time 0.97 of the engine's

note: clocks were not locked
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃  FAIL   context fail · generation pass                   ┃
┃ next: give the mock the engine's KV cache and run `opkit ┃
┃ align dsa` again                                         ┃
┗━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┛
"""

PASSED = """
╭─  dsa · vllm  ───────────────────────────────────────────────────────────────╮
╰───────────────────────────────────────────────────────────────────  ✓ pass  ─╯

generation  ✓ pass ─────────────────────────────────────────────────────────────
regions by sequence · 100.0 % of kernels attributed

16 × 1 @ 1,029 · graph · 30 / 120 regions · 26 launches each · 41.2 % of the
step's GPU time
#  kernel               calls       mock µs        e2e µs  ratio   share  match
────────────────────────────────────────────────────────────────────────────────
1  flash_mla_decode  30 / 120  41.0 ± 1.0 %  42.1 ± 1.0 %   0.97  51.0 %  = same
────────────────────────────────────────────────────────────────────────────────
   GPU time                            81.0          83.9   0.97
   elapsed                             83.4          86.4   0.97

✓  latency  GPU time 0.97 of the engine's

┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃  PASS   generation pass                                                      ┃
┃ next: `opkit collect dsa --model DIR` once `opkit status` lists it           ┃
┗━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┛
"""

STATUS_WIDE = """
op   phase       verdict         backend  version   GPU                    recorded (UTC)    id
───────────────────────────────────────────────────────────────────────────────────────────────────
mla  generation  ? inconclusive  trtllm   1.3.0rc2  NVIDIA B200            2026-11-21 10:30  ab12cd
dsa  context     ✓ pass          vllm     0.24.0    NVIDIA H100 80GB HBM3  2026-11-20 09:15  0f9e8d
dsa  generation  ✗ fail          vllm     –         –                      2026-11-20 09:15  0f9e8d
"""

STATUS_NARROW = """
op   phase       verdict         recorded (UTC)    id
─────────────────────────────────────────────────────────
mla  generation  ? inconclusive  2026-11-21 10:30  ab12cd
dsa  context     ✓ pass          2026-11-20 09:15  0f9e8d
dsa  generation  ✗ fail          2026-11-20 09:15  0f9e8d
"""


def render(show: Callable[[Console], None], width: int) -> str:
    """What ``show`` prints, without colour and without blanks at the ends of lines."""
    console = Console(width=width, file=io.StringIO(), no_color=True)
    show(console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def entry(**cells: Any) -> LedgerEntry:
    blank: dict[str, Any] = {field.name: "" for field in dataclasses.fields(LedgerEntry)}
    return LedgerEntry(**blank | {"tp_size": 1, "attributed": 1.0} | cells)


ENTRIES = [
    entry(
        id="mla-20261121-103000-ab12cd", op="mla", phase="generation", backend="trtllm",
        verdict="inconclusive", created="2026-11-21T10:30:00+00:00", gpu="NVIDIA B200",
        framework="1.3.0rc2", tp_size=8,
    ),
    entry(
        id="dsa-20261120-091500-0f9e8d", op="dsa", phase="context", backend="vllm",
        verdict="pass", created="2026-11-20T09:15:00+00:00", gpu="NVIDIA H100 80GB HBM3",
        framework="0.24.0",
    ),
    entry(
        id="dsa-20261120-091500-0f9e8d", op="dsa", phase="generation", backend="vllm",
        verdict="fail", created="2026-11-20T09:15:00+00:00",
    ),
]  # fmt: skip


def passed() -> AlignResult:
    result = made_result()
    return dataclasses.replace(
        result, verdict=Outcome.PASS, phases=(passed_phase(),), notes=(), provenance={}
    )


@pytest.mark.parametrize(("width", "expected"), [(100, WIDE), (60, NARROW)])
def test_a_failed_alignment(width: int, expected: str) -> None:
    assert render(lambda console: print_align(made_result(), console), width) == expected.strip()


def test_a_passed_alignment_of_which_little_is_known() -> None:
    assert render(lambda console: print_align(passed(), console), 80) == PASSED.strip()


def test_verbose_shows_every_case() -> None:
    brief = render(lambda console: print_align(made_result(), console), 100)
    full = render(lambda console: print_align(made_result(), console, verbose=True), 100)
    heading = "4 × 1,024 · eager · 20 / 24 regions"
    assert heading not in brief
    assert heading in full


def test_without_a_mismatch_the_case_farthest_from_1_is_shown() -> None:
    result = made_result()
    phase = result.phases[0]
    near = phase.cases[1]
    far = dataclasses.replace(
        near,
        mock=dataclasses.replace(
            near.mock, case=dataclasses.replace(near.mock.case, batch=9), gpu_ns=2_000_000
        ),
    )
    phase = dataclasses.replace(phase, cases=(near, far))
    shown = render(
        lambda console: print_align(dataclasses.replace(result, phases=(phase,)), console), 100
    )
    assert "9 × 1,024 (e2e 4 × 1,024) · eager" in shown
    assert "4 × 1,024 · eager · 20" not in shown


@pytest.mark.parametrize("width", [40, 60, 72, 80, 100, 132, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    shown = render(lambda console: print_align(made_result(), console), width)
    assert max(map(len, shown.splitlines())) <= width
    if width >= 60:
        for number in ("3,310.2", "3,785.9", "0.87", "5,866.2", "7,176.9"):
            assert number in shown


def test_brackets_in_names_are_no_markup() -> None:
    result = dataclasses.replace(made_result(), notes=("kernel [bold]x[/bold] at [/tmp]",))
    assert "note: kernel [bold]x[/bold] at [/tmp]" in render(
        lambda console: print_align(result, console), 80
    )


def test_colour_is_used_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def colours(environment: dict[str, str]) -> bool:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        console = Console(width=100, file=io.StringIO(), force_terminal=True)
        print_align(made_result(), console)
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        return "[31m" in text or ";31m" in text

    assert colours({})
    assert not colours({"NO_COLOR": "1"})


@pytest.mark.parametrize(("width", "expected"), [(100, STATUS_WIDE), (60, STATUS_NARROW)])
def test_status(width: int, expected: str) -> None:
    assert render(lambda console: print_status(ENTRIES, console), width) == expected.strip()


def test_status_of_an_empty_ledger_says_what_to_do() -> None:
    text = render(lambda console: print_status([], console), 80)
    assert text.splitlines() == [
        "No verdicts yet.",
        'On a GPU host, `opkit align dsa --e2e-cmd "vllm serve …"` records the first;',
        "`opkit align dsa --recorded` shows anywhere what a report looks like.",
    ]


def test_thresholds_of_ones_own_stand_in_the_header_and_in_the_next_step() -> None:
    """A pass by a loosened policy must not look like any other."""
    own = {"latency": 1.0, "min_regions": 3, "roles": [{"mock": "a", "e2e": "b"}]}
    result = dataclasses.replace(passed(), provenance={"gpu": "H100", "policy": own})
    shown = render(lambda console: print_align(result, console), 100)
    assert "│ own policy  latency 1.0 (0.1) · roles 1 (none)" in shown
    assert "next: `opkit collect dsa --model DIR --policy FILE`: this policy is your own" in shown
    usual = dataclasses.replace(result, provenance={"gpu": "H100", "policy": {"latency": 0.1}})
    assert "policy" not in render(lambda console: print_align(usual, console), 100)
