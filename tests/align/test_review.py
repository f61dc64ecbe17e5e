"""Ways found in review in which thin evidence or a wrong mock could pass, or sound input crash."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_export import Export
from made_pair import CASES, CONTEXT, GENERATION, LAYERS, Kernels, engine, mock, session
from made_subject import (
    OPERAND,
    PAIRS,
    case_match,
    checked,
    glue,
    not_passed,
    same,
    subject,
    with_pair,
)

from opkit.align.engine import distance
from opkit.align.judge import Question, judge
from opkit.align.match import name_level
from opkit.align.result import AlignResult, Level, Outcome
from opkit.align.shapes import Step, case_steps
from opkit.layers.dsa import DSA
from opkit.layers.manifest import Wave
from opkit.layers.op import Case, Phase
from opkit.nsys_parsers.names import parse_name
from opkit.nsys_parsers.ranges import parse_step


def written(made: Export, path: Path, *edits: str) -> Path:
    """The export with its rows edited."""
    made.write(path)
    with closing(sqlite3.connect(path)) as db:
        for edit in edits:
            assert db.execute(edit).rowcount != 0
        db.commit()
    return path


def say(path: Path, **said: Any) -> Path:
    """The export whose manifest says something else."""
    with closing(sqlite3.connect(path)) as db:
        (text,) = db.execute("SELECT value FROM OPKIT_MANIFEST WHERE key = 'manifest'").fetchone()
        text = json.dumps({**json.loads(text), **said})
        db.execute("UPDATE OPKIT_MANIFEST SET value = ? WHERE key = 'manifest'", (text,))
        db.commit()
    return path


def verdicts(result: AlignResult) -> dict[Phase, Outcome]:
    return {phase.phase: phase.verdict for phase in result.phases}


def evidence(result: AlignResult, phase: Phase) -> str:
    found = next(part for part in result.phases if part.phase is phase)
    return next(check.detail for check in found.checks if check.check == "evidence")


def test_an_empty_record_of_operands_is_inconclusive() -> None:
    assert not_passed(subject(operands=())) == {"data": "inconclusive"}


@pytest.mark.parametrize("field", ["zeros", "equal_rows", "distinct"])
def test_an_operand_sample_that_is_no_number_is_degenerate(field: str) -> None:
    made = subject(operands=(replace(OPERAND, **{field: math.nan}),))
    assert not_passed(made) == {"data": "fail"}


def test_regions_set_aside_are_no_evidence() -> None:
    made = subject(case_match(e2e={"regions": 12, "misreported": 11}))
    assert not_passed(made) == {"evidence": "inconclusive"}
    assert "1 E2E region(s), 3 needed" in checked(made)["evidence"].detail


def test_a_short_glue_kernel_of_another_element_type_fails() -> None:
    cast = glue(same("cast_kernel", 1.0, level=Level.DTYPE))
    assert not_passed(subject(case_match(with_pair(cast)))) == {"names": "fail"}


def test_a_mix_of_launch_modes_is_not_equal_to_another_mix() -> None:
    made = subject(case_match(mock={"mode": None}, e2e={"mode": None}))
    assert not_passed(made) == {"launch": "fail"}


def test_strict_regions_of_some_cases_only_are_inconclusive() -> None:
    other = Case(Phase.CONTEXT, 2, 512, 0)
    matches = (case_match(), case_match(mock={"case": other}, e2e={"case": other}))
    found = {matches[0].mock.case.label(): 1.0}
    made = subject(*matches, strict=found)
    assert not_passed(made) == {"strict": "inconclusive"}
    assert other.label() in checked(made)["strict"].detail
    assert len(PAIRS) == len(matches[0].pairs)


@pytest.mark.parametrize(
    ("mock_types", "e2e_types"),
    [("float, __nv_bfloat16", "__nv_bfloat16, float"), ("float, float, half", "float, half, half")],
)
def test_element_types_of_other_operands_are_no_variant(mock_types: str, e2e_types: str) -> None:
    ours, theirs = (
        parse_name(f"void rms_norm_kernel<{types}>(T1 *, T2 *)")
        for types in (mock_types, e2e_types)
    )
    assert name_level(ours, theirs) is Level.DTYPE


def test_tiles_of_the_same_types_stay_variants() -> None:
    ours, theirs = (parse_name(f"void gemm_kernel<float, half, (int){n}>(T1 *)") for n in (8, 16))
    assert name_level(ours, theirs) is Level.VARIANT


def test_a_range_that_says_zero_has_a_distance() -> None:
    assert distance(Case(Phase.CONTEXT, 0, 0, 0), Case(Phase.CONTEXT, 2, 8, 0))[0] == 2


def steps(*labels: str) -> list[Step]:
    made = []
    for number, text in enumerate(labels):
        label = parse_step(text)
        assert label is not None
        made.append(Step(number, number, label))
    return made


def test_a_step_of_no_token_makes_no_shape_of_no_request() -> None:
    ran = steps("execute_context_1(0)_generation_0(0)", "execute_context_1(512)_generation_0(0)")
    cases, _ = case_steps(ran[:1] * 9 + ran[1:], (Wave(1, 512, 1),))
    assert [case.case for case in cases] == [Case(Phase.CONTEXT, 1, 512, 0)]


def test_a_wave_of_empty_prompts_is_not_replayed() -> None:
    cases, notes = case_steps(steps("execute_context_1(512)_generation_0(0)"), (Wave(1, 0, 1),))
    assert [case.case.tokens for case in cases] == [512]
    assert any("do not add up" in note for note in notes)


@pytest.mark.parametrize("waves", [(), (Wave(4, 512, 2),)])
def test_speculative_decode_is_not_taken_for_one_token_a_request(waves: tuple[Wave, ...]) -> None:
    ran = steps("execute_context_4(2048)_generation_0(0)", "execute_context_0(0)_generation_4(8)")
    cases, notes = case_steps(ran, waves)
    assert all(case.case.phase is Phase.CONTEXT for case in cases)
    assert any("more than one token" in note for note in notes)


@pytest.fixture
def true_mock(tmp_path: Path) -> Path:
    return written(mock(), tmp_path / "mock.sqlite")


def test_a_layer_missing_in_some_steps_is_inconclusive(true_mock: Path, tmp_path: Path) -> None:
    # GIVEN an engine whose second layer has lost its range in one step
    path = written(
        engine(),
        tmp_path / "e2e.sqlite",
        "DELETE FROM NVTX_EVENTS WHERE start IN (SELECT max(start) FROM NVTX_EVENTS "
        "WHERE text LIKE '%layers.1.self_attn%' OR textId IN "
        "(SELECT id FROM StringIds WHERE value LIKE '%layers.1.self_attn%'))",
    )
    # WHEN it is judged THEN what is left is not called complete
    result = judge(Question(DSA, true_mock, (path,)))
    assert verdicts(result)[Phase.CONTEXT] is Outcome.INCONCLUSIVE
    assert f"lack some of the {LAYERS} layers" in evidence(result, Phase.CONTEXT)


def test_a_rank_without_the_phase_is_inconclusive(true_mock: Path, tmp_path: Path) -> None:
    # GIVEN two ranks, the second without a decode step
    whole = written(session(engine(), 0), tmp_path / "rank0.sqlite")
    part = written(
        session(engine(), 1),
        tmp_path / "rank1.sqlite",
        "DELETE FROM NVTX_EVENTS WHERE text LIKE 'execute_context_0(%' OR textId IN "
        "(SELECT id FROM StringIds WHERE value LIKE 'execute_context_0(%')",
    )
    result = judge(Question(DSA, true_mock, (whole, part)))
    assert verdicts(result)[Phase.GENERATION] is Outcome.INCONCLUSIVE
    assert "rank1.sqlite" in evidence(result, Phase.GENERATION)


def test_two_equal_ranks_still_pass(true_mock: Path, tmp_path: Path) -> None:
    ranks = tuple(written(session(engine(), n), tmp_path / f"rank{n}.sqlite") for n in range(2))
    assert judge(Question(DSA, true_mock, ranks)).verdict is Outcome.PASS


def test_a_rank_without_the_op_is_inconclusive(true_mock: Path, tmp_path: Path) -> None:
    # GIVEN a second rank whose decode runs other kernels
    whole = written(engine(), tmp_path / "rank0.sqlite")
    other = tuple((f"foreign_kernel_{n}", 5.0) for n in range(13))
    strange = engine(attention=(CONTEXT, other)).write(tmp_path / "rank1.sqlite")
    result = judge(Question(DSA, true_mock, (whole, strange)))
    assert verdicts(result)[Phase.GENERATION] is Outcome.INCONCLUSIVE
    assert "rank1.sqlite: the op was not found" in evidence(result, Phase.GENERATION)


def test_regions_of_nothing_but_collectives_do_not_crash(tmp_path: Path) -> None:
    # GIVEN a mock that stands for one of two ranks, and an engine whose ranges hold only NCCL
    ours = say(written(mock(), tmp_path / "mock.sqlite"), tp_size=2)
    nccl = (("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 5.0),)
    theirs = engine(attention=(nccl, nccl)).write(tmp_path / "e2e.sqlite")
    result = judge(Question(DSA, ours, (theirs,)))
    assert result.verdict is Outcome.INCONCLUSIVE


@pytest.mark.parametrize(
    ("staged", "outcome"),
    [
        # vLLM's own all-reduce outside graphs: a copy into the shared buffer, then the exchange.
        ((("[memcpy DtoD]", 4.1), ("cross_device_reduce_1stage", 9.0)), Outcome.PASS),
        # A copy that nothing sends on is the op's.
        ((("cross_device_reduce_1stage", 9.0), ("[memcpy DtoD]", 40.0)), Outcome.FAIL),
    ],
)
def test_a_copy_for_a_collective_is_communication(
    staged: Kernels, outcome: Outcome, tmp_path: Path
) -> None:
    ours = say(written(mock(), tmp_path / "mock.sqlite"), tp_size=2)
    theirs = say(
        written(engine(attention=((*CONTEXT, *staged), GENERATION)), tmp_path / "e2e.sqlite"),
        tp_size=2,
    )
    result = judge(Question(DSA, ours, (theirs,)))
    assert verdicts(result)[Phase.CONTEXT] is outcome


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        ({"versions": {"vllm": "0.23"}}, {"versions": {"vllm": "0.24"}}, "vllm: mock 0.23"),
        ({"model": {"config_sha256": "a"}}, {"model": {"config_sha256": "b"}}, "model: mock a"),
    ],
)
def test_another_framework_or_model_is_inconclusive(
    ours: dict[str, Any], theirs: dict[str, Any], word: str, true_mock: Path, tmp_path: Path
) -> None:
    e2e = say(written(engine(), tmp_path / "e2e.sqlite"), **theirs)
    result = judge(Question(DSA, say(true_mock, **ours), (e2e,)))
    assert result.verdict is Outcome.INCONCLUSIVE
    assert word in evidence(result, CASES[0].phase)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", "nvjet_tst_128x64_64x8_1x2_h_bz_bias_TNT"),
        ("void cache<float, (vllm::Fp8Type)1>(T1 *)", "void cache<float, (vllm::Fp8Type)2>(T1 *)"),
        ("void gemm<(int)8, (dg::GemmType)0>(int)", "void gemm<(int)8, (dg::GemmType)1>(int)"),
    ],
)
def test_an_epilogue_or_an_enumeration_is_no_tile(ours: str, theirs: str) -> None:
    assert name_level(parse_name(ours), parse_name(theirs)) in (None, Level.DTYPE)


def test_kernels_of_another_thread_amid_the_mock_are_inconclusive(tmp_path: Path) -> None:
    # GIVEN a mock during whose prompt iterations a second thread launches kernels
    ours = mock().write(tmp_path / "mock.sqlite")
    kernel, call = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"
    moved = {
        kernel: {
            "start": "end + 1",
            "end": "end + 200",
            "correlationId": "correlationId + 5000000",
        },
        call: {"globalTid": "globalTid + 1", "correlationId": "correlationId + 5000000"},
    }
    with closing(sqlite3.connect(ours)) as db:
        for table, changed in moved.items():
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            values = ", ".join(changed.get(column, column) for column in columns)
            eager = " WHERE graphNodeId IS NULL OR graphNodeId = 0" if table == kernel else ""
            assert db.execute(f"INSERT INTO {table} SELECT {values} FROM {table}{eager}").rowcount
        db.commit()
    # WHEN it is judged THEN the kernels that its ranges do not hold are not overlooked
    result = judge(Question(DSA, ours, (engine().write(tmp_path / "e2e.sqlite"),)))
    assert verdicts(result)[Phase.CONTEXT] is Outcome.INCONCLUSIVE
    assert "ran amid iterations" in evidence(result, Phase.CONTEXT)
