"""Against the engine: the real engine's regions beside rows made from the mock's own recording."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from opkit.align.result import AlignResult
from opkit.collect.fidelity import compare_with_engine, engine_cases, shipped_latencies
from opkit.collect.measurement import KernelTime, Measurement
from opkit.collect.work import Row
from opkit.errors import BadInput
from opkit.layers.dsa import DSA
from opkit.layers.op import Case, LaunchMode, Phase


def rows_of_the_mock(found: AlignResult, scale: float = 1.0) -> dict[Case, Row]:
    """Rows as collection would have them, with the times that nsys saw in the recorded mock."""
    rows = {}
    for match in engine_cases(found):
        kernels = tuple(
            KernelTime(pair.mock.name, 1, scale * pair.mock.median_ns / 1e3)
            for pair in match.pairs
            if pair.mock
        )
        measured = Measurement(
            elapsed_ms=(match.mock.elapsed_ns / 1e6,),
            gpu_ms=(scale * match.mock.gpu_ns / 1e6,),
            launch=match.e2e.mode or LaunchMode.EAGER,
            kernels=kernels,
        )
        rows[match.mock.case] = Row("k", "g", "t", {}, {}, measured)
    return rows


def test_the_recorded_pair_gives_the_reports_own_ratios(aligned: AlignResult) -> None:
    found = compare_with_engine("id", DSA, engine_cases(aligned), rows_of_the_mock(aligned))
    ratios = {shape.case.label(): round(shape.ratio, 2) for shape in found.shapes}
    # The figures of README's report and docs/development.md.
    assert ratios["1 × 512"] == 1.00
    assert ratios["1 × 4,096"] == 0.99
    assert ratios["1 × 1 @ 4,101"] == 0.96
    assert len(found.shapes) == 10
    assert found.phases == ("context", "generation")
    assert round(found.worst("generation"), 3) == 0.039
    assert not found.passed  # 3 % is the tolerance


def test_data_dependent_kernels_are_stated_apart(aligned: AlignResult) -> None:
    found = compare_with_engine("id", DSA, engine_cases(aligned), rows_of_the_mock(aligned))
    long = next(shape for shape in found.shapes if shape.case.tokens == 4096)
    assert 0.1 < long.data_share < 0.7  # top-k and the sparse attention of a 7 ms forward
    assert long.engine_rest_ms < long.engine_ms


def test_a_scaled_collection_is_outside(aligned: AlignResult) -> None:
    rows = rows_of_the_mock(aligned, 1.2)
    found = compare_with_engine("id", DSA, engine_cases(aligned), rows)
    assert found.worst("context") > 0.15
    assert not found.passed


def test_a_shape_without_a_row_is_listed(aligned: AlignResult) -> None:
    rows = rows_of_the_mock(aligned)
    del rows[Case(Phase.CONTEXT, 1, 512, 0)]
    found = compare_with_engine("id", DSA, engine_cases(aligned), rows, tolerance=0.5)
    assert found.failed == ("context 1 × 512: no GPU time was measured",)
    assert not found.passed


COLUMNS = {
    "architecture": "A", "mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16",
    "gemm_type": "bfloat16", "num_heads": 128, "batch_size": 1, "isl": 1,
}  # fmt: skip


def test_a_shipped_table_is_read_between_its_steps(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    duckdb.execute(
        f"COPY (SELECT 'A' architecture, 'bfloat16' mla_dtype, 'bfloat16' kv_cache_dtype, "
        f"'bfloat16' gemm_type, 128 num_heads, 1 batch_size, 1 isl, s AS step, ms AS latency "
        f"FROM (VALUES (512, 1.0), (1024, 2.0)) AS v(s, ms)) TO '{table}' (FORMAT parquet)"
    )
    cases = {Case(Phase.GENERATION, 1, 1, past): COLUMNS for past in (512, 768, 1024, 4096)}
    found = shipped_latencies(table, cases)
    assert {case.past: ms for case, ms in found.items()} == {512: 1.0, 768: 1.5, 1024: 2.0}


def test_no_table_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a readable perf table"):
        shipped_latencies(tmp_path / "no.parquet", {Case(Phase.GENERATION, 1, 1, 1): COLUMNS})
