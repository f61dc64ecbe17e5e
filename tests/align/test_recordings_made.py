"""Mock and engine on one checkpoint of random weights (`opkit model make`): gqa and gemm.

Where the recordings come from is told in ``tests/traces/README.md``. The live verdict was
inconclusive in context: the scheduler split one wave once, so that a prefill of two requests ran in
one step of two layers, and the mock was asked to run it. Such a shape is left to the engine now.
"""

from __future__ import annotations

import gzip
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest

from opkit.align.engine import engine_shapes
from opkit.align.judge import Question, judge
from opkit.align.policy import load_policy
from opkit.align.result import AlignResult, Level, Outcome
from opkit.align.run import _transient, _worth_a_mock
from opkit.align.shapes import CaseSteps
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.registry import find_op

TRACES = Path(__file__).parents[1] / "traces" / "vllm"
E2E = TRACES / "qwen3-made-e2e.sqlite.gz"
CONTEXT, GENERATION = Phase.CONTEXT, Phase.GENERATION
SPLIT = Case(CONTEXT, 2, 1024, 0)
OPS = ["gqa", "gemm"]
LOW, HIGH = 0.98, 1.03


def judged(op: str, mock: Path) -> AlignResult:
    return judge(
        Question(find_op(op), mock, (E2E,), "vllm", load_policy(None), (CONTEXT, GENERATION))
    )


@cache
def as_recorded(op: str) -> AlignResult:
    return judged(op, TRACES / f"{op}-made-mock.sqlite.gz")


@pytest.mark.parametrize("op", OPS)
def test_generation_passes_on_shared_weights(op: str) -> None:
    phase = as_recorded(op).phases[1]
    assert phase.verdict is Outcome.PASS
    assert {case.e2e.regions for case in phase.cases} == {32}  # 16 steps by two layers
    assert {pair.level for case in phase.cases for pair in case.pairs} == {Level.SAME}
    ratios = [case.mock.gpu_ns / case.e2e.gpu_ns for case in phase.cases]
    assert LOW < min(ratios) <= max(ratios) < HIGH


@pytest.mark.parametrize("op", OPS)
def test_a_prefill_of_one_step_is_too_little_to_judge_by(op: str) -> None:
    phase = as_recorded(op).phases[0]
    assert phase.verdict is Outcome.INCONCLUSIVE
    said = {
        check.check: check.detail for check in phase.checks if check.outcome is not Outcome.PASS
    }
    assert said == {"evidence": "2 × 1,024: 2 E2E region(s), 3 needed"}


@pytest.mark.parametrize("op", OPS)
def test_without_it_context_passes(op: str, tmp_path: Path) -> None:
    """The same recording without the mock's ranges of that shape, as if it had not been asked."""
    less = tmp_path / "mock.sqlite"
    less.write_bytes(gzip.decompress((TRACES / f"{op}-made-mock.sqlite.gz").read_bytes()))
    with closing(sqlite3.connect(less)) as db:
        gone = db.execute("DELETE FROM NVTX_EVENTS WHERE text LIKE '% b=2 t=1024 %'").rowcount
        db.commit()
    assert gone == 5
    phase = judged(op, less).phases[0]
    assert phase.verdict is Outcome.PASS
    assert f"E2E also ran {SPLIT.label()}; the mock did not" in phase.notes
    ratios = [case.mock.gpu_ns / case.e2e.gpu_ns for case in phase.cases]
    assert LOW < min(ratios) <= max(ratios) < HIGH


def test_shapes_of_too_few_regions_are_not_run() -> None:
    ran, manifest = engine_shapes([E2E])
    assert SPLIT in {case.case for case, _ in ran}
    assert manifest is not None
    layers = manifest.model["num_hidden_layers"]
    assert layers == 2
    policy = load_policy(None)
    scarce = [case for case, _ in ran if _transient(case, layers, policy)]
    assert {case.case.label() for case in scarce} == {"2 × 1,024", "2 × 1 @ 1,070"}
    left = {case.case for case, _ in _worth_a_mock(ran, scarce, (CONTEXT, GENERATION))}
    assert left == {case.case for case, _ in ran} - {case.case for case in scarce}
    assert not [case for case, _ in ran if case.case == SPLIT and _transient(case, 3, policy)]


def test_prefills_that_are_all_scarce_are_run_for_the_verdict_to_tell() -> None:
    once = CaseSteps(SPLIT, (7,), (0, 0), (7,))
    decode = CaseSteps(Case(GENERATION, 2, 1, 1050), (8, 9), (1049, 1050), (9,))
    ran = [(once, LaunchMode.EAGER), (decode, LaunchMode.GRAPH)]
    assert _worth_a_mock(ran, [once, decode], (CONTEXT, GENERATION)) == [(once, LaunchMode.EAGER)]
