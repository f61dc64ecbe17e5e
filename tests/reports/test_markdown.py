"""Markdown for pull requests: the whole text of a made alignment, and names that hold markup."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from made_result import kernel, made_result, pair, passed_phase
from markdown_it import MarkdownIt

from opkit.align.result import AlignResult, Level, Outcome
from opkit.reports.markdown import align_markdown, code, folded, rows, text

PASSED = """\
### ✅ `opkit align dsa` · vllm: **PASS**

| phase | verdict | cases | unlike kernels | GPU time mock/E2E | regions by | attributed |
| --- | --- | ---: | ---: | ---: | --- | ---: |
| generation | ✅ pass | 1 | 0 | 0.965 to 0.965 | sequence | 100.0 % |

**next** `opkit collect dsa --model DIR` once `opkit status` lists it

#### generation

|  | check | found |
| --- | --- | --- |
| ✓ | latency | GPU time 0.97 of the engine's |

<details>
<summary>16 × 1 @ 1,029: kernels · graph · 26 launches · GPU time mock 81.0 µs, E2E 83.9 µs, \
ratio 0.965</summary>

| # | kernel | mock µs | E2E µs | mock/E2E | share | match |
| ---: | --- | ---: | ---: | ---: | ---: | --- |
| 1 | `flash_mla_decode` | 41.0 ± 0.4 | 42.1 ± 0.4 | 0.97 | 51.0 % | = same |

</details>

<details>
<summary>Provenance</summary>

|  |  |
| --- | --- |
| GPU | NVIDIA H100 80GB HBM3 |

</details>
"""


def one_kernel(short: str) -> AlignResult:
    """A passed alignment whose one kernel is called ``short``."""
    phase = passed_phase()
    case = replace(
        phase.cases[0], pairs=(pair(kernel(short, 4), kernel(short, 4), Level.SAME, 1.0),)
    )
    phases = (replace(phase, cases=(case,)),)
    return replace(made_result(), verdict=Outcome.PASS, phases=phases, notes=())


def test_a_passed_alignment() -> None:
    result = replace(
        made_result(),
        verdict=Outcome.PASS,
        phases=(passed_phase(),),
        provenance={"gpu": "NVIDIA H100 80GB HBM3"},
        notes=(),
    )
    assert align_markdown(result) == PASSED


def test_a_failed_alignment_says_why_and_what_next() -> None:
    made = align_markdown(made_result())
    assert made.startswith("### ❌ `opkit align dsa` · vllm: **FAIL**\n")
    assert "| context | ❌ fail | 2 | 2 | 0.817 to 0.970 |" in made
    why = next(line for line in made.splitlines() if line.startswith("| ✗ | missing / extra |"))
    assert "<br>**cause** the mock has no KV cache manager" in why
    assert "<br>**next** give the mock the engine's KV cache and run `opkit align dsa`" in why
    assert "| – | 4.2 ± 0.0 | – |" in made
    assert "`nvjet_sm90_tst_192x176_64x5`<br>mock: `nvjet_sm90_tst_256x128_64x4`" in made
    # Only cases with a mismatch of their own fold out.
    assert re.findall(r"<summary>(.*?): kernels", made) == ["1 × 4,096", "16 × 1 @ 1,029"]
    assert "> clocks were not locked" in made


@pytest.mark.parametrize(
    "short",
    [
        "elementwise<a|b>",
        "f<void (*)(int)>::operator|()",
        "tick`ed",
        "`begins",
        "<img src=x onerror=alert(1)>",
        "two\nlines",
    ],
)
def test_a_kernels_name_breaks_no_table(short: str) -> None:
    """GIVEN a name with markup, THEN a Markdown reader sees a row of the heading's columns, and
    the name as code."""
    table = seen(align_markdown(one_kernel(short)))
    heading = next(n for n, row in enumerate(table) if row[1:2] == ["kernel"])
    kernel_row = table[heading + 1]
    assert len(kernel_row) == len(table[heading])
    assert kernel_row[1] == f"code:{' '.join(short.split())}"


def test_every_table_of_a_failed_alignment_is_one() -> None:
    table = seen(align_markdown(made_result()))
    names = {row[1] for row in table if len(row) == 7 and row[0].isdigit()}
    assert "code:sparse_attn_fwd_kernel" in names
    assert {len(row) for row in table} == {2, 3, 7}


def seen(markdown: str) -> list[list[str]]:
    """The rows of all tables as a Markdown reader of GitHub's kind sees them."""
    found: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline" and token.level > 2 and found:
            parts = token.children or []
            found[-1].append("".join(f"code:{p.content}" if p.type == "code_inline" else p.content
                                     for p in parts))  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a|b", "a\\|b"),
        ("<b> & a ` tick", "\\<b\\> & a \\` tick"),
        ("run `opkit align *`; `x|y`", "run `opkit align *`; `x\\|y`"),
        ("kv_cache _emphasis_ *strong*", "kv_cache \\_emphasis\\_ \\*strong\\*"),
        ("see #12, @someone, C# 4 for $5", "see \\#12, @\u200bsomeone, C# 4 for \\$5"),
        ("two\n lines", "two lines"),
    ],
)
def test_a_sentence_is_no_markup(given: str, expected: str) -> None:
    assert text(given) == expected


def test_code_of_nothing_is_a_dash() -> None:
    assert code("") == "–"


def test_rows_have_one_mark_a_column() -> None:
    assert rows(("a", "b"), [("1", "2")], "rrrr") == [
        "| a | b |",
        "| ---: | ---: |",
        "| 1 | 2 |",
    ]


def test_a_summary_is_plain_text() -> None:
    assert folded("a < b & c", ["x"])[1] == "<summary>a &lt; b &amp; c</summary>"


@pytest.mark.parametrize("made", [code, text])
def test_what_would_reach_a_terminal_is_left_out(made: Callable[[str], str]) -> None:
    assert made("gemm\x1b]0;title\x07 a\u202eb\x00") in ("`gemm]0;title ab`", "gemm\\]0;title ab")
