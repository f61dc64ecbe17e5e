"""Verdicts on recordings of the other ops: vLLM 0.24 on an H100, engine and mock.

Where each recording comes from is told in ``tests/traces/README.md``. Those of gqa and gemm hold
four steps of each label, so that the requests do not add up and only context is judged here; both
phases passed in the live runs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from opkit.align.judge import Question, judge
from opkit.align.policy import load_policy
from opkit.align.result import AlignResult, Level, Method, Outcome
from opkit.layers.op import LaunchMode, Phase
from opkit.layers.registry import find_op

TRACES = Path(__file__).parents[1] / "traces" / "vllm"
CONTEXT, GENERATION = Phase.CONTEXT, Phase.GENERATION


@cache
def judged(op: str, mock: str, e2e: str, *phases: Phase) -> AlignResult:
    return judge(
        Question(
            find_op(op),
            TRACES / f"{mock}-mock.sqlite.gz",
            (TRACES / f"{e2e}-e2e.sqlite.gz",),
            "vllm",
            load_policy(None),
            phases,
        )
    )


_QWEN = ["1 × 512", "1 × 2,048", "2 × 256", "3 × 1,024"]
_MIXTRAL = ["1 × 1,024", "4 × 1,024"]
# Op, mock, engine, kernels of one context forward, which of them is the largest, and shapes: as the
# scheduler cut the waves, not as they were sent.
PASSING = [
    ("gqa", "gqa-qwen3", "qwen3", 3, "FlashAttnFwdSm90", _QWEN),
    ("gemm", "gemm-qwen3", "qwen3", 5, "nvjet_sm90", _QWEN),
    ("moe", "moe-mixtral", "mixtral", 8, "fused_moe_kernel", _MIXTRAL),
]


@pytest.mark.parametrize(("op", "mock", "e2e", "launches", "largest", "shapes"), PASSING)
def test_a_region_inside_the_layer_passes(
    op: str, mock: str, e2e: str, launches: int, largest: str, shapes: list[str]
) -> None:
    (phase,) = judged(op, mock, e2e, CONTEXT).phases
    assert phase.verdict is Outcome.PASS
    assert phase.method is Method.LAUNCH_NVTX
    assert [case.e2e.case.label() for case in phase.cases] == shapes
    case = phase.cases[0]
    assert case.mock.launches == launches
    assert case.e2e.regions == 4  # one step by four layers
    assert {pair.level for pair in case.pairs} == {Level.SAME}
    heaviest = max(case.pairs, key=lambda pair: pair.e2e.median_ns if pair.e2e else 0)
    assert heaviest.e2e is not None
    assert largest in heaviest.e2e.name


def test_latent_attention_passes_in_both_phases() -> None:
    result = judged("mla", "mla-deepseek-v3", "deepseek-v3", CONTEXT, GENERATION)
    assert result.verdict is Outcome.PASS
    context, generation = result.phases
    assert context.method is Method.LAUNCH_NVTX
    assert generation.method is Method.SEQUENCE
    assert {case.e2e.mode for case in generation.cases} == {LaunchMode.GRAPH}
    ratios = [case.mock.gpu_ns / case.e2e.gpu_ns for phase in result.phases for case in phase.cases]
    assert len(ratios) >= 7
    assert all(0.98 < ratio < 1.021 for ratio in ratios)


def test_experts_are_compared_in_the_step_that_the_mock_ran() -> None:
    # Live it failed: over all steps of this wave the engine took 605 µs, 584 with 5 experts in one
    # step and 696 with 6 in the next; the mock, at the step of 1,047 cached tokens, met 6.
    (phase,) = judged("moe", "moe-mixtral", "mixtral", GENERATION).phases
    assert phase.verdict is Outcome.PASS
    assert phase.method is Method.NODE_NVTX
    ratios = {case.e2e.case.label(): case.mock.gpu_ns / case.e2e.gpu_ns for case in phase.cases}
    assert list(ratios) == ["1 × 1 @ 1,047", "4 × 1 @ 1,047"]
    assert all(0.99 < ratio < 1.01 for ratio in ratios.values())
    assert [case.e2e.regions for case in phase.cases] == [4, 4]  # one step of four layers


def test_another_models_mock_fails_by_its_time() -> None:
    (phase,) = judged("gqa", "gqa-qwen3", "mixtral", CONTEXT).phases
    assert phase.verdict is Outcome.FAIL
    latency = next(check for check in phase.checks if check.check == "latency")
    assert latency.outcome is Outcome.FAIL
    assert "FlashAttnFwdSm90" in latency.detail


def test_experts_are_not_found_in_a_dense_model() -> None:
    (phase,) = judged("moe", "moe-mixtral", "qwen3", CONTEXT).phases
    assert phase.verdict is not Outcome.PASS
