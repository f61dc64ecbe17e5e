"""Rows that may not be written, rows that are flagged, and what is no fault at all."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from made_rows import H100, installed_aiconfigurator, manifest, shipped_rows

from opkit.collect.tables.bound import peaks_of
from opkit.collect.tables.validate import (
    BOUND_SHARE,
    MONOTONE_TOLERANCE,
    Line,
    Problem,
    Rule,
    is_text,
    validate,
)
from opkit.layers.dsa import DSA
from opkit.layers.op import Case, Phase, Table

GEMM = Table("gemm", "gemm", ("gemm_dtype", "m", "n", "k"), {"torch": "torch"})
GENERATION = DSA.tables[Phase.GENERATION]


def gemm(m: int, ms: float, **changed: Any) -> Line:
    columns = {"gemm_dtype": "bfloat16", "m": m, "n": 4096, "k": 4096}
    return replace(Line(f"k{m}", columns, ms), **changed)


def decode(batch: int, step: int, ms: float) -> Line:
    columns = {
        "model": "deepseek-ai/DeepSeek-V3.2",
        "architecture": "DeepseekV32ForCausalLM",
        "mla_dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "gemm_type": "bfloat16",
        "num_heads": 16,
        "batch_size": batch,
        "isl": 1,
        "tp_size": 1,
        "step": step,
    }
    return Line(f"k{batch}-{step}", columns, ms)


def rules(problems: list[Problem]) -> list[tuple[Rule, bool, str]]:
    return [(problem.rule, problem.hard, problem.key) for problem in problems]


def test_rows_that_grow_have_no_problem() -> None:
    lines = [decode(b, s, 0.2 + 0.01 * b + 1e-5 * s) for b in (1, 2, 4) for s in (2, 64, 2048)]
    assert validate(GENERATION, lines, planned=9) == []


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_a_latency_that_is_none_is_not_written(ms: float) -> None:
    problems = validate(GEMM, [gemm(1, 1.0), gemm(2, ms)])
    assert rules(problems) == [(Rule.VALUE, True, "k2")]


def test_below_the_bound_is_not_written_and_just_below_it_is() -> None:
    # 4,096 × 4,096 × 4,096 in bf16 on an H100: 137.4 GFLOP at 989.4 TFLOP/s.
    peaks = peaks_of(H100)
    assert peaks is not None
    bound = peaks.bound_ms(2.0 * 4096**3, 3 * 4096**2 * 2.0, ["bfloat16"], cold=False)
    assert bound == pytest.approx(0.13891, rel=1e-3)
    kept = gemm(4096, BOUND_SHARE * bound * 1.001, bound=bound)
    lost = gemm(4096, BOUND_SHARE * bound * 0.999, bound=bound)
    assert validate(GEMM, [kept]) == []
    (problem,) = validate(GEMM, [lost])
    assert (problem.rule, problem.hard) == (Rule.BOUND, True)
    assert f"{bound:.6g} ms" in problem.what


def test_the_bound_knows_dtypes_memory_and_the_cache() -> None:
    peaks = peaks_of(H100)
    assert peaks is not None
    wide = peaks.bound_ms(1e12, 0, ["bfloat16"], cold=False)
    assert peaks.bound_ms(1e12, 0, ["fp8_block"], cold=False) == pytest.approx(wide / 2, rel=1e-3)
    # FP8 weights under bf16 activations may run at the faster rate.
    assert peaks.bound_ms(1e12, 0, ["bfloat16", "fp8"], cold=False) < wide
    assert peaks.bound_ms(1e12, 0, [], cold=False) < wide  # what is not known is the fastest
    assert peaks.bound_ms(0, 3.35e9, [], cold=True) == pytest.approx(1.0)
    assert peaks.bound_ms(0, 40 * 2**20, [], cold=False) == 0.0  # may lie in the L2 cache
    assert peaks.bound_ms(0, 40 * 2**20, [], cold=True) > 0.0


def test_a_gpu_that_is_not_known_has_no_bound() -> None:
    assert peaks_of("CPU") is None
    assert peaks_of("NVIDIA H100 NVL") is None  # other memory than the SXM's
    assert peaks_of("NVIDIA H200 NVL") is None
    ampere = peaks_of("NVIDIA A100-SXM4-80GB")
    assert ampere is not None
    # No FP8 tensor cores: computed in bf16.
    assert ampere.rate(["fp8"]) == ampere.rate(["bfloat16"])


def test_the_work_of_dsa_gives_a_bound_below_what_was_measured() -> None:
    # vLLM 0.24 on an H100: 1 × 4,096 takes 6.8 to 7.5 ms of GPU time.
    assert DSA.work is not None
    peaks = peaks_of(H100)
    assert peaks is not None
    work = DSA.work(Case(Phase.CONTEXT, 1, 4096, 0), manifest())
    assert 1.0 < peaks.bound_ms(*work, ["bfloat16"], cold=True) < 6.8


def test_of_equal_columns_the_first_is_written() -> None:
    first, second = gemm(8, 1.0), gemm(8, 1.1, key="again")
    problems = validate(GEMM, [first, second], planned=2)
    assert rules(problems) == [(Rule.DUPLICATE, True, "again")]
    assert "k8" in problems[0].what


@pytest.mark.parametrize(
    ("planned", "failed", "wrong"), [(None, 0, False), (3, 1, False), (3, 0, True), (2, 1, True)]
)
def test_rows_are_counted(planned: int | None, failed: int, wrong: bool) -> None:
    problems = validate(GEMM, [gemm(1, 1.0), gemm(2, 1.1)], planned=planned, failed=failed)
    assert [(p.rule, p.hard, p.key) for p in problems] == [(Rule.COUNT, True, "")] * wrong


def test_no_row_at_all_is_a_failure_also_when_every_case_failed() -> None:
    assert rules(validate(GEMM, [], planned=2, failed=2)) == [(Rule.COUNT, True, "")]


@pytest.mark.parametrize(
    "columns",
    [
        {"gemm_dtype": "bfloat16", "m": 8, "n": 4096},  # one is missing
        {"gemm_dtype": "bfloat16", "m": 8, "n": 4096, "k": 8, "tile": 1},  # one too many
        {"gemm_dtype": 16, "m": 8, "n": 4096, "k": 4096},
        {"gemm_dtype": "", "m": 8, "n": 4096, "k": 4096},
        {"gemm_dtype": "bfloat16", "m": "8", "n": 4096, "k": 4096},
        {"gemm_dtype": "bfloat16", "m": 8.0, "n": 4096, "k": 4096},
        {"gemm_dtype": "bfloat16", "m": True, "n": 4096, "k": 4096},
        {"gemm_dtype": "bfloat16", "m": -1, "n": 4096, "k": 4096},
        {"gemm_dtype": "bfloat16", "m": 2**32, "n": 4096, "k": 4096},
    ],
)
def test_columns_must_be_those_of_the_table(columns: dict[str, Any]) -> None:
    problems = validate(GEMM, [gemm(1, 1.0), Line("odd", columns, 2.0)])
    assert rules(problems) == [(Rule.COLUMNS, True, "odd")]


def test_a_collective_names_itself_and_long_messages_are_whole() -> None:
    nccl = Table("nccl", "comm", ("nccl_dtype", "num_gpus", "message_size"), {})
    columns = {"op_name": "all_gather", "nccl_dtype": "half", "num_gpus": 2}
    lines = [
        Line("a", {**columns, "message_size": 2**33}, 1.0),
        Line("b", {**columns, "message_size": 2**33, "op_name": "all_reduce"}, 1.0),
    ]
    assert validate(nccl, lines) == []


def test_text_columns_are_told_by_name() -> None:
    texts = ("gemm_dtype", "gemm_type", "kv_cache_dtype", "model", "architecture", "op_name")
    assert all(map(is_text, texts))
    assert not any(map(is_text, ("m", "isl", "batch_size", "step", "num_heads", "message_size")))


def test_less_time_for_more_work_is_flagged_beyond_the_tolerance() -> None:
    shallow = validate(GEMM, [gemm(1, 1.0), gemm(2, 1 - 0.9 * MONOTONE_TOLERANCE)])
    assert shallow == []
    deep = validate(GEMM, [gemm(2, 0.8), gemm(1, 1.0)])  # given in any order
    assert rules(deep) == [(Rule.NOT_MONOTONE, False, "k2")]
    noisy = validate(GEMM, [gemm(1, 1.0, spread=0.1), gemm(2, 0.8, spread=0.1)])
    assert noisy == []


def test_rows_that_differ_in_more_than_the_size_are_not_compared() -> None:
    other = gemm(2, 0.1)
    other = replace(other, columns={**other.columns, "n": 64})
    assert validate(GEMM, [gemm(1, 1.0), other]) == []


def test_a_lone_spike_is_flagged() -> None:
    times = {256: 0.2, 512: 0.21, 1024: 0.33, 2048: 0.24, 4096: 0.26}
    problems = validate(GENERATION, [decode(1, step, ms) for step, ms in times.items()])
    assert (Rule.SPIKE, False, "k1-1024") in rules(problems)
    assert {problem.key for problem in problems} == {"k1-1024", "k1-2048"}  # and the drop after it


def test_flat_and_then_growing_is_no_spike() -> None:
    # A step of host-bound or latency-bound shapes up to 2,048, then linear, then quadratic.
    knee = [decode(batch, 64, ms) for batch, ms in ((1, 1.0), (32, 1.0), (64, 2.0), (128, 4.0))]
    assert validate(GENERATION, knee) == []
    deep = [decode(batch, 64, ms) for batch, ms in ((1, 1.0), (32, 0.5), (64, 2.0))]
    assert Rule.SPIKE in {problem.rule for problem in validate(GENERATION, deep)}


def test_a_whole_tile_more_is_no_spike_in_a_matrix_product() -> None:
    tiles = [gemm(m, math.ceil(m / 128) * 1.0) for m in (64, 128, 129, 256, 257, 512)]
    assert validate(GEMM, tiles) == []


def test_kernels_longer_than_the_elapsed_time_are_flagged() -> None:
    assert validate(GEMM, [gemm(1, 1.0, elapsed=1.0, gpu=1.01)]) == []
    problems = validate(GEMM, [gemm(1, 1.0, elapsed=1.0, gpu=1.1)])
    assert rules(problems) == [(Rule.GPU_OVER_ELAPSED, False, "k1")]
    assert validate(GEMM, [gemm(1, 1.0, elapsed=1.0, gpu=1.1, spread=0.1)]) == []


def test_the_field_s_own_rows_lie_above_the_bound() -> None:
    """3,386 rows that others measured: a bound that refused one of them would be none."""
    tool = installed_aiconfigurator()
    peaks = peaks_of(H100)
    assert peaks is not None
    assert DSA.work is not None
    where = (
        "architecture = 'DeepseekV32ForCausalLM' AND gemm_type = 'bfloat16' "
        "AND kv_cache_dtype = 'bfloat16'"
    )
    rows = shipped_rows(tool, where)
    assert len(rows) > 3000
    worst = 0.0
    for row in rows:
        case = Case(
            Phase(row.case["phase"]), row.case["batch"], row.case["tokens"], row.case["past"]
        )
        work = DSA.work(case, manifest(int(row.columns["num_heads"])))
        assert row.measurement is not None
        bound = peaks.bound_ms(*work, ["bfloat16"], cold=False)
        worst = max(worst, bound / row.measurement.elapsed_ms[0])
    assert 0.3 < worst < 1.0
