"""The reports on mocks, whole, as they appear."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from opkit.layers.available import Availability, State, availabilities
from opkit.layers.check.result import CheckResult, Line, Outcome
from opkit.layers.skeleton.new import Written
from opkit.reports.layers import print_check, print_layers, print_new

RESULT = CheckResult(
    op="gqa",
    backend="vllm",
    device="cuda",
    mock={
        "versions": {"vllm": "0.24.0", "gpu": "NVIDIA H100 80GB HBM3"},
        "model": {"architecture": "Qwen3ForCausalLM", "num_heads": 64, "config_sha256": "ab"},
        "tp_size": 1,
        "dtypes": {"activations": "bfloat16"},
        "recipe": {"weights": "dummy", "activations": "prompt_tokens(seed=0)"},
        "notes": ["one rank's heads"],
    },
    lines=(
        Line("forward", Outcome.PASS, "context 1 × 256 ran"),
        Line("KV cache written", Outcome.FAIL, "context 1 × 256: kv_cache 16 of 16 blocks stay "
             "blank", "the new tokens' slots are missing", "check the slot mapping"),
        Line("graph = eager", Outcome.NOT_RUN, "the check ended before"),
        Line("collected cases", Outcome.NOT_APPLICABLE, "gqa has no others"),
    ),
    complete=True,
)  # fmt: skip
GOOD = replace(RESULT, lines=RESULT.lines[:1])

FAILED = """
╭─  check gqa · vllm  ─────────────────────────────────────────────────────────╮
│ GPU       NVIDIA H100 80GB HBM3                                              │
│ versions  vllm 0.24.0                                                        │
│ model     Qwen3ForCausalLM · 64 num_heads · tp 1                             │
│ dtypes    activations bfloat16                                               │
│ weights   dummy                                                              │
│ inputs    prompt_tokens(seed=0)                                              │
│ note: one rank's heads                                                       │
╰──────────────────────────────────────────────────────────────────────────────╯

✓  forward           context 1 × 256 ran
✗  KV cache written  context 1 × 256: kv_cache 16 of 16 blocks stay blank
     cause           the new tokens' slots are missing
     fix             check the slot mapping
?  graph = eager     the check ended before
–  collected cases   not applicable: gqa has no others

┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃  FAIL   1 pass · 1 fail · 1 not applicable · 1 not run                       ┃
┃ next: check the slot mapping                                                 ┃
┗━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┛
"""


def drawn(result: CheckResult, failure: str = "", width: int = 80, colour: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, highlight=False)
    print_check(result, console, failure)
    return "\n" + "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def test_a_failed_check() -> None:
    assert drawn(RESULT) == FAILED


def test_colours_mean_what_the_signs_say() -> None:
    text = drawn(RESULT, colour=True)
    lines = {sign: line for line in text.splitlines() for sign in "✓✗?" if sign in line}
    assert "\x1b[1;32m✓" in lines["✓"]
    assert "\x1b[1;31m✗" in lines["✗"]
    assert "\x1b[1;33m?" in lines["?"]


def test_a_passed_check_leads_to_alignment() -> None:
    text = drawn(GOOD)
    assert " PASS   1 pass" in text
    assert 'next: opkit align gqa --backend vllm --e2e-cmd "…"' in text
    assert "next: opkit collect gqa" in drawn(replace(GOOD, backend="torch"))


def test_a_check_that_ended_early_says_where() -> None:
    text = drawn(replace(RESULT, complete=False, running="generation 1 × 1 @ 255"), "SIGSEGV")
    assert " ENDED EARLY " in text
    assert "at generation 1 × 1 @ 255: SIGSEGV" in text


def test_what_did_not_run_is_no_pass() -> None:
    undone = replace(RESULT, lines=(RESULT.lines[0], RESULT.lines[2]))
    assert "next: nothing failed, and not everything ran" in drawn(undone)


def test_a_narrow_terminal_loses_nothing() -> None:
    text = drawn(RESULT, width=44)
    assert max(map(len, text.splitlines())) <= 44
    words = "".join(text.split())
    assert "16of16blocks" in words
    assert "checktheslotmapping" in words


FOUND = [
    Availability("gqa", "vllm", ("context", "generation"), State.READY, "0.24.0", "0.24.0"),
    Availability(
        "gqa", "sglang", ("context", "generation"), State.DOUBTFUL, "0.6", "0.5.14",
        "0.6 is here, written against 0.5.14", "opkit check gqa --backend sglang",
    ),
    Availability("gqa", "trtllm", (), State.NONE, reason="not written"),
    Availability(
        "moe", "torch", ("context", "generation"), State.NOT_HERE, reason="torch is not installed",
        fix="pip install torch",
    ),
]  # fmt: skip
TABLE = """
GPU  NVIDIA H100
op   backend  context     generation  version  why not
──────────────────────────────────────────────────────────────────────────────────
gqa  vllm     ✓ ready     ✓ ready     0.24.0
     sglang   ~ try       ~ try       0.6      0.6 is here, written against 0.5.14
     trtllm   – none      – none      –        not written
──────────────────────────────────────────────────────────────────────────────────
moe  torch    ✗ not here  ✗ not here  –        torch is not installed
torch: pip install torch
next: opkit check gqa --backend vllm
"""


def test_the_table_of_mocks() -> None:
    out = io.StringIO()
    print_layers(FOUND, "NVIDIA H100", Console(file=out, width=100))
    assert "\n" + "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n" == TABLE


def test_all_mocks_fit_a_terminal() -> None:
    for gpu in ("", "NVIDIA H100 80GB HBM3"):
        out = io.StringIO()
        print_layers(availabilities({"torch": "2.13.0+cpu"}, gpu), gpu, Console(file=out, width=80))
        assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_new_op_names_its_files_and_the_next_step() -> None:
    out = io.StringIO()
    files = tuple(Path(f"opkit/layers/rope/{name}") for name in ("__init__.py", "torch.py"))
    print_new("rope", Written(files), Console(file=out, width=80))
    text = out.getvalue()
    assert "wrote  opkit/layers/rope/__init__.py" in text
    assert 'added  "rope" to NAMES in opkit/layers/registry.py' in text
    assert "next: opkit check rope --backend torch" in text
