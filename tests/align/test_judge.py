"""From two files to a verdict: each wrong mock fails for its own reason, a loss is inconclusive."""

from __future__ import annotations

import sqlite3
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_export import Export
from made_pair import CASES, CONTEXT, GENERATION, OPERAND, engine, mock, session

from opkit.align import judge as judge_module
from opkit.align.engine import engine_shapes
from opkit.align.judge import Question, judge
from opkit.align.policy import Policy
from opkit.align.regions import Launch, Region
from opkit.align.result import AlignResult, Method, Outcome
from opkit.errors import BadInput
from opkit.layers.dsa import DSA
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.nsys_parsers.names import parse_name

CONTEXT_CASES, DECODE_CASES = CASES[:2], CASES[2:]


@pytest.fixture(scope="module")
def e2e(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine().write(tmp_path_factory.mktemp("engine") / "e2e.sqlite")


def ask(made: Export, e2e: Path, folder: Path, **more: Any) -> AlignResult:
    return judge(Question(DSA, made.write(folder / "mock.sqlite"), (e2e,), **more))


def outcomes(result: AlignResult) -> dict[str, str]:
    return {str(phase.phase): str(phase.verdict) for phase in result.phases}


def problems(result: AlignResult) -> dict[str, set[str]]:
    """The checks that did not pass, by phase."""
    return {
        str(phase.phase): {c.check for c in phase.checks if c.outcome is not Outcome.PASS}
        for phase in result.phases
    }


def detail(result: AlignResult, phase: Phase, check: str) -> str:
    found = next(p for p in result.phases if p.phase is phase)
    return next(c.detail for c in found.checks if c.check == check)


def cause(result: AlignResult, phase: Phase, check: str) -> str:
    found = next(p for p in result.phases if p.phase is phase)
    return next(c.cause for c in found.checks if c.check == check)


def test_the_true_mock_passes_in_both_phases(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(), e2e, tmp_path)
    assert result.verdict is Outcome.PASS
    assert outcomes(result) == {"context": "pass", "generation": "pass"}
    context, generation = result.phases
    assert (context.method, generation.method) == (Method.LAUNCH_NVTX, Method.SEQUENCE)
    assert [case.e2e.case for case in context.cases] == list(CONTEXT_CASES)
    assert [case.e2e.case for case in generation.cases] == list(DECODE_CASES)
    assert [case.mock.launches for case in context.cases] == [len(CONTEXT)] * 2
    assert [case.e2e.regions for case in generation.cases] == [15, 15]
    assert {case.mock.mode for case in generation.cases} == {LaunchMode.GRAPH}
    assert result.backend == "vllm"
    assert [file["side"] for file in result.provenance["files"]] == ["mock", "e2e"]
    assert [wave["requests"] for wave in result.provenance["waves"]] == [1, 4]
    assert result.provenance["policy_digest"] == Policy().digest()


def test_the_result_says_when_kernels_started_and_what_ran_beside_them(
    e2e: Path, tmp_path: Path
) -> None:
    result = ask(mock(), e2e, tmp_path)
    for case in (case for phase in result.phases for case in phase.cases):
        for side, kernels in (
            (case.mock, [p.mock for p in case.pairs if p.mock]),
            (case.e2e, [p.e2e for p in case.pairs if p.e2e]),
        ):
            offsets = [kernel.offset_ns for kernel in kernels if kernel.offset_ns is not None]
            assert offsets == sorted(offsets)
            assert (len(offsets), offsets[0]) == (len(kernels), 0)
            assert offsets[-1] + kernels[-1].median_ns <= side.elapsed_ns * 1.01
            assert len(side.samples_ns) == side.regions - side.odd_regions - side.misreported
            assert round(statistics.median(side.samples_ns)) == side.gpu_ns
        assert case.steps > 0
        assert sum(x.share for x in case.outside) + case.explained == pytest.approx(1.0)
        assert case.unattributed == ()
    pattern = DSA.region["vllm"]
    assert result.provenance["region"] == {
        "module": pattern.module,
        "borders": list(pattern.borders),
    }


def test_samples_are_thinned_evenly_and_long_lists_are_cut() -> None:
    def region(number: int) -> Region:
        return Region(CASES[0], (Launch(parse_name("k"), 0, number, None, None, False),))

    kept = [r.gpu_ns for r in judge_module._evenly([region(n) for n in range(1, 1_001)])]
    assert (len(kept), kept[:3], kept[-1]) == (240, [1, 5, 9], 996)
    few = [region(n) for n in (3, 1, 2)]
    assert judge_module._evenly(few) == few


def test_one_phase_may_be_asked_for(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(cases=DECODE_CASES), e2e, tmp_path, phases=(Phase.GENERATION,))
    assert outcomes(result) == {"generation": "pass"}


def without(kernels: tuple[tuple[str, float], ...], *words: str) -> tuple[tuple[str, float], ...]:
    return tuple(k for k in kernels if not any(word in k[0] for word in words))


@pytest.mark.parametrize(
    ("make", "checks", "said", "why"),
    [
        (lambda: mock(context=without(CONTEXT, "concat_and_cache")),
         {"names", "counts", "missing/extra"}, "concat_and_cache_mla_kernel", "KV cache manager"),
        (lambda: mock(context=without(CONTEXT, "mqa_logits", "topK", "indexer")),
         {"names", "counts", "missing/extra"}, "topKPerRowPrefill", "indexer"),
        (lambda: mock(context=(("vectorized_elementwise_kernel(MulFunctor)", 1.0), *CONTEXT)),
         {"missing/extra"}, "extra in the mock: vectorized_elementwise", "extra work"),
        (lambda: mock(context=(*CONTEXT[1:], CONTEXT[0])),
         {"missing/extra"}, "nvjet_sm90_tst_64x128", "another order"),
    ],
    ids=["no cache write", "no indexer", "extra elementwise", "moved"],
)  # fmt: skip
def test_a_wrong_context_mock_fails_with_its_reason(
    make: Callable[[], Export], checks: set[str], said: str, why: str, e2e: Path, tmp_path: Path
) -> None:
    result = ask(make(), e2e, tmp_path)
    assert outcomes(result) == {"context": "fail", "generation": "pass"}
    assert checks <= problems(result)["context"]
    assert said in detail(result, Phase.CONTEXT, "missing/extra")
    assert why in cause(result, Phase.CONTEXT, "missing/extra")


def test_eager_instead_of_graph_fails_by_launch_mode(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(eager=True), e2e, tmp_path)
    assert outcomes(result) == {"context": "pass", "generation": "fail"}
    assert "mock eager, E2E graph" in detail(result, Phase.GENERATION, "launch")
    assert "CUDA graph" in cause(result, Phase.GENERATION, "launch")


def test_another_batch_size_fails_by_shape(e2e: Path, tmp_path: Path) -> None:
    wrong = (CASES[0], CASES[1], CASES[2], Case(Phase.GENERATION, 8, 1, 514))
    result = ask(mock(cases=wrong), e2e, tmp_path)
    assert outcomes(result) == {"context": "pass", "generation": "fail"}
    said = detail(result, Phase.GENERATION, "launch")
    assert "mock ran 8 × 1 @ 514, E2E ran 4 × 1 @ 514" in said


def test_faster_kernels_throughout_are_operand_data(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(scale=0.87), e2e, tmp_path)
    assert result.verdict is Outcome.FAIL
    assert "heavy kernels take 0.87× E2E's time" in detail(result, Phase.CONTEXT, "data")
    assert {"latency", "data"} <= problems(result)["context"]


def test_degenerate_operands_fail_though_all_kernels_agree(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(operand={**OPERAND, "zeros": 1.0}), e2e, tmp_path)
    assert problems(result) == {"context": {"data"}, "generation": {"data"}}
    assert "o_proj.weight [7168, 16384] bfloat16: 100% zeros" in detail(
        result, Phase.CONTEXT, "data"
    )


def test_half_of_the_operation_without_borders_is_not_found(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(generation=GENERATION[4:7]), e2e, tmp_path)
    assert outcomes(result)["generation"] == "fail"


def test_a_mock_without_a_manifest_is_inconclusive(e2e: Path, tmp_path: Path) -> None:
    made = mock()
    del made.rows["OPKIT_MANIFEST"]
    result = ask(made, e2e, tmp_path)
    assert problems(result) == {"context": {"data"}, "generation": {"data"}}
    assert result.verdict is Outcome.INCONCLUSIVE


def test_too_few_iterations_are_inconclusive(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(iterations=2), e2e, tmp_path)
    assert result.verdict is Outcome.INCONCLUSIVE
    assert "2 mock region(s), 3 needed" in detail(result, Phase.CONTEXT, "evidence")


def test_a_phase_that_the_mock_lacks_is_inconclusive(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(cases=CONTEXT_CASES), e2e, tmp_path)
    assert outcomes(result) == {"context": "pass", "generation": "inconclusive"}
    assert result.verdict is Outcome.INCONCLUSIVE


def test_a_shape_that_the_mock_lacks_is_noted(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(cases=(CASES[0], *DECODE_CASES)), e2e, tmp_path)
    assert result.phases[0].notes == ("E2E also ran 4 × 512; the mock did not",)


def test_a_shape_that_the_engine_lacks_never_passes(e2e: Path, tmp_path: Path) -> None:
    result = ask(mock(cases=(*CASES, Case(Phase.CONTEXT, 8, 2048, 0))), e2e, tmp_path)
    assert outcomes(result) == {"context": "fail", "generation": "pass"}
    assert "mock ran 8 × 2,048" in detail(result, Phase.CONTEXT, "launch")


def test_losses_that_nsys_reports_are_inconclusive(tmp_path: Path) -> None:
    lossy = engine()
    lossy.add("DIAGNOSTIC_EVENT", text="CUPTI buffer full: 12 records dropped")
    result = ask(mock(), lossy.write(tmp_path / "e2e.sqlite"), tmp_path)
    assert outcomes(result) == {"context": "inconclusive", "generation": "inconclusive"}
    assert "E2E: nsys says 'CUPTI buffer full" in detail(result, Phase.CONTEXT, "evidence")


def test_every_rank_counts(e2e: Path, tmp_path: Path) -> None:
    mock_path = mock().write(tmp_path / "mock.sqlite")
    first, second = (
        session(engine(), number).write(tmp_path / f"{number}.sqlite") for number in (0, 1)
    )
    good = judge(Question(DSA, mock_path, (first, second)))
    assert good.verdict is Outcome.PASS
    assert good.phases[0].cases[0].e2e.regions == 8
    other = engine(attention=(without(CONTEXT, "concat_and_cache"), GENERATION))
    wrong = judge(Question(DSA, mock_path, (e2e, other.write(tmp_path / "rank1.sqlite"))))
    assert outcomes(wrong) == {"context": "inconclusive", "generation": "pass"}


def test_strict_compares_the_decoder_layers_own_module(e2e: Path, tmp_path: Path) -> None:
    mock_path = mock().write(tmp_path / "mock.sqlite")
    same = mock(variants=("strict",)).write(tmp_path / "same.sqlite")
    result = judge(Question(DSA, mock_path, (e2e,), strict=same))
    assert result.verdict is Outcome.PASS
    assert "within 1% in 2 cases" in detail(result, Phase.CONTEXT, "strict")
    slow = mock(variants=("strict",), scale=1.02).write(tmp_path / "slow.sqlite")
    result = judge(Question(DSA, mock_path, (e2e,), strict=slow))
    assert problems(result) == {"context": {"strict"}, "generation": {"strict"}}
    other = mock(variants=("strict",), context=CONTEXT[1:]).write(tmp_path / "other.sqlite")
    result = judge(Question(DSA, mock_path, (e2e,), strict=other))
    assert problems(result) == {"context": {"strict"}, "generation": set()}


def test_the_shapes_for_the_mock_are_those_the_engine_ran(e2e: Path) -> None:
    found = {case.case: (mode, len(case.steps)) for case, mode in engine_shapes((e2e,))[0]}
    assert found == {
        CASES[0]: (LaunchMode.EAGER, 1),
        CASES[1]: (LaunchMode.EAGER, 1),
        CASES[2]: (LaunchMode.GRAPH, 5),
        CASES[3]: (LaunchMode.GRAPH, 5),
    }


def test_an_engine_without_labels_is_refused(tmp_path: Path) -> None:
    silent = engine()
    ranges = silent.rows["NVTX_EVENTS"]
    silent.rows["NVTX_EVENTS"] = [r for r in ranges if "execute_" not in r["text"]]
    path = silent.write(tmp_path / "silent.sqlite")
    with pytest.raises(BadInput, match="no forward step"):
        engine_shapes((path,))
    with pytest.raises(BadInput, match="no forward step is labelled"):
        ask(mock(), path, tmp_path)


@pytest.mark.parametrize("side", ["mock", "e2e"])
def test_graph_level_traces_are_refused(side: str, e2e: Path, tmp_path: Path) -> None:
    made = {"mock": mock(), "e2e": engine()}
    path = made[side].write(tmp_path / "whole.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER)")
    other = mock().write(tmp_path / "mock.sqlite")
    files = (path, e2e) if side == "mock" else (other, path)
    with pytest.raises(BadInput, match="--cuda-graph-trace=graph"):
        judge(Question(DSA, files[0], (files[1],)))


def test_a_backend_without_a_pattern_is_refused(e2e: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no region pattern for backend 'torch'"):
        ask(mock(), e2e, tmp_path, backend="torch")
