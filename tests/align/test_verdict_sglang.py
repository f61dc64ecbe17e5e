"""The verdict on SGLang's recorded pair: engine and mock of one host, both phases.

Where the pair comes from is told in ``tests/traces/README.md``. It passed live. An earlier live run
failed in generation: its sample of decode steps was every fourth one, where the engine's top-k took
7 µs, and none of those between, where it took 9; this engine alternates alike.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from opkit.align.engine import MAX_STEPS, _spread
from opkit.align.judge import Question, judge
from opkit.align.policy import load_policy
from opkit.align.result import AlignResult, Level, Method, Outcome
from opkit.layers.op import LaunchMode, Phase
from opkit.layers.registry import find_op

TRACES = Path(__file__).parents[1] / "traces"
CONTEXT, GENERATION = Phase.CONTEXT, Phase.GENERATION
TOP_K = "topk_transform_decode_kernel"


@cache
def judged() -> AlignResult:
    """The pair, judged as ``opkit align dsa --mock-trace … --e2e-trace …`` does."""
    mock, e2e = (TRACES / f"dsa-sglang-pair-{side}.sqlite.gz" for side in ("mock", "e2e"))
    return judge(
        Question(find_op("dsa"), mock, (e2e,), "", load_policy(None), (CONTEXT, GENERATION))
    )


def test_both_phases_pass() -> None:
    result = judged()
    assert result.backend == "sglang"
    assert [phase.phase for phase in result.phases] == [CONTEXT, GENERATION]
    failed = [
        f"{phase.phase} {check.check}: {check.detail}"
        for phase in result.phases
        for check in phase.checks
        if check.outcome is not Outcome.PASS
    ]
    assert failed == []
    assert result.verdict is Outcome.PASS


@pytest.mark.parametrize(
    ("index", "method", "mode", "cases"),
    [
        # Up to index_topk tokens a prefill is dense: 19 and 20 launches; above it is sparse.
        (0, Method.LAUNCH_NVTX, LaunchMode.EAGER,
         {"1 × 512": (19, 4), "1 × 4,096": (35, 4), "4 × 1,024": (20, 4)}),
        # Three of four layers have a border on their left; 16 steps are read.
        (1, Method.SEQUENCE, LaunchMode.GRAPH,
         {"1 × 1 @ 543": (29, 48), "1 × 1 @ 4,127": (29, 48), "4 × 1 @ 1,055": (29, 48)}),
    ],
)  # fmt: skip
def test_every_kernel_of_the_mock_is_the_engines(
    index: int, method: Method, mode: LaunchMode, cases: dict[str, tuple[int, int]]
) -> None:
    phase = judged().phases[index]
    assert phase.method is method
    found = {c.e2e.case.label(): (c.mock.launches, c.e2e.regions) for c in phase.cases}
    assert found == cases
    for case in phase.cases:
        assert {case.mock.mode, case.e2e.mode} == {mode}
        assert case.mock.launches == case.e2e.launches
        assert {pair.level for pair in case.pairs} == {Level.SAME}
        assert 0.98 < case.mock.gpu_ns / case.e2e.gpu_ns < 1.02


def test_the_engines_top_k_shows_its_whole_spread() -> None:
    (long,) = (c for c in judged().phases[1].cases if c.e2e.case.past == 4127)
    (pair,) = (pair for pair in long.pairs if TOP_K in pair.name)
    assert pair.mock is not None
    assert pair.e2e is not None
    assert pair.e2e.min_ns < 7_500 < 8_500 < pair.e2e.max_ns
    assert pair.e2e.mad_ns > 500  # of every fourth step alone: under 300
    assert pair.e2e.min_ns <= pair.mock.median_ns <= pair.e2e.max_ns


@pytest.mark.parametrize("period", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [48, 63, 64, 96, 127, 600])
def test_the_steps_read_favour_no_phase_of_a_period(period: int, count: int) -> None:
    chosen = _spread(tuple(range(count)))
    shares = [sum(step % period == phase for step in chosen) for phase in range(period)]
    assert sum(shares) == MAX_STEPS
    assert min(shares) >= 1
    assert max(shares) <= 2 * MAX_STEPS / period


def test_the_steps_read_lie_over_the_whole_window() -> None:
    ids = tuple(range(100, 163))
    chosen = _spread(ids)
    ends = [100 + i * len(ids) // MAX_STEPS for i in range(MAX_STEPS + 1)]
    assert all(ends[i] <= step < ends[i + 1] for i, step in enumerate(chosen))
    assert _spread(ids[:MAX_STEPS]) == ids[:MAX_STEPS]
