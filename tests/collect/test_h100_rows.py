"""The rows that were collected on an H100: what is quoted of them, checked against the rows.

Origin: tests/traces/README.md, "collected".
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest

from opkit.align.ledger import Ledger
from opkit.align.result import AlignResult
from opkit.align.result_json import align_from_json
from opkit.collect.admission import ask_ledger
from opkit.collect.fidelity import compare_with_engine, engine_cases
from opkit.collect.measurement import Measurement
from opkit.collect.run import unaligned_kernels
from opkit.collect.tables.latency import choose
from opkit.collect.tables.provenance import About, head_of
from opkit.collect.tables.validate import Rule
from opkit.collect.tables.write import write_tables
from opkit.collect.timing.stats import median
from opkit.collect.verify import compare
from opkit.collect.work import Row, row_from_json
from opkit.layers.dsa import DSA
from opkit.layers.manifest import Manifest, manifest_from_json
from opkit.layers.op import Case, case_from_json

FOLDER = Path(__file__).parents[1] / "traces" / "collected"
H100 = "NVIDIA H100 80GB HBM3"


def read_rows(name: str) -> list[Row]:
    with gzip.open(FOLDER / name, "rt") as file:
        return [row_from_json(line, name) for line in file]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows("dsa-h100-rows.jsonl.gz")


@pytest.fixture(scope="module")
def builds() -> dict[str, Manifest]:
    found = json.loads(gzip.decompress((FOLDER / "dsa-h100-builds.json.gz").read_bytes()))
    return {digest: manifest_from_json(json.dumps(data), digest) for digest, data in found.items()}


@pytest.fixture(scope="module")
def alignment() -> AlignResult:
    text = gzip.decompress((FOLDER / "dsa-h100-alignment.json.gz").read_bytes())
    return align_from_json(json.loads(text), "the alignment")


def about(builds: dict[str, Manifest]) -> About:
    return About(head_of("vllm", "0.24.0", H100), "vllm", verdict="dsa-1", manifests=builds)


def test_every_row_is_sound_and_written(
    rows: list[Row], builds: dict[str, Manifest], tmp_path: Path
) -> None:
    written = write_tables(DSA, rows, about(builds), tmp_path)
    assert written.problems == ()
    assert written.unbounded == {}  # every row was held against the least possible time
    assert {table.name: table.rows for table in written.tables} == {
        "dsa_context_module": 352,
        "dsa_generation_module": 184,
    }
    table = tmp_path / "dsa_context_module_perf.parquet"
    (heads,) = zip(
        *duckdb.sql(f"SELECT DISTINCT num_heads FROM '{table}' ORDER BY 1").fetchall(), strict=True
    )
    assert heads == (16, 128)


def test_a_row_that_is_too_fast_is_not_written(
    rows: list[Row], builds: dict[str, Manifest], tmp_path: Path
) -> None:
    """The same rows, one of them 20 times as fast as a GPU of this kind can be."""
    first = next(row for row in rows if row.columns["isl"] == 4096 and row.ok)
    measured = first.measurement
    assert measured is not None
    fast = replace(
        measured,
        elapsed_ms=tuple(ms / 20 for ms in measured.elapsed_ms),
        gpu_ms=tuple(ms / 20 for ms in measured.gpu_ms),
    )
    changed = [replace(row, measurement=fast) if row is first else row for row in rows]
    written = write_tables(DSA, changed, about(builds), tmp_path)
    assert [(p.rule, p.key) for p in written.problems if p.hard and p.key] == [
        (Rule.BOUND, first.key)
    ]
    assert not written.ok


def test_medians_repeat(rows: list[Row]) -> None:
    """72 rows of 536, measured again in new processes on the same host."""
    again = {
        item["key"]: item for item in json.loads((FOLDER / "dsa-h100-verified.json").read_text())
    }
    first = [row for row in rows if row.key in again]
    latencies = {row.key: choose(_measured(row)).ms for row in first}
    assert latencies == pytest.approx({key: item["first_ms"] for key, item in again.items()})
    found = compare(
        first,
        {row.key: row for row in first},
        latencies,
        {key: item["again_ms"] for key, item in again.items()},
        {row.key: row.key for row in first},
    )
    assert len(found.rows) == 72
    assert (round(found.median, 4), round(found.worst, 4)) == (0.0019, 0.0103)
    assert found.passed


def test_fidelity_to_the_engine(alignment: AlignResult) -> None:
    """The engine's own GPU time, of `vllm serve` on another host with the same kind of GPU."""
    measured: dict[Case, Row] = {}
    for row in read_rows("dsa-h100-engine-shapes.jsonl.gz"):
        case = case_from_json(row.case)
        assert isinstance(case, Case)
        measured[case] = row
    found = compare_with_engine("dsa-1", DSA, engine_cases(alignment), measured)
    assert Counter(str(shape.case.phase) for shape in found.shapes) == {
        "context": 9,
        "generation": 9,
    }
    assert round(found.median("generation"), 4) == 0.0063
    assert round(found.worst("generation"), 4) == 0.0134
    assert round(found.median("context"), 4) == 0.0107
    assert round(found.worst("context"), 4) == 0.0172
    shares = [shape.data_share for shape in found.shapes if shape.case.tokens > 1]
    assert (round(min(shares), 2), round(max(shares), 2)) == (0.20, 0.52)


def test_what_the_alignment_never_saw_is_flagged(
    rows: list[Row], alignment: AlignResult, tmp_path: Path
) -> None:
    """Prompts of one token run the decode path, of up to 16 tokens another first GEMM, steps of
    24,576 and more another rope kernel, and decode batches of 64 and more another top-k."""
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.record(alignment)
    admission = ask_ledger(ledger, DSA, ("context", "generation"), "vllm", gpu=H100)
    flags, kernels = unaligned_kernels(admission, rows)
    assert "vllm::filtered_topk::FilteredTopKUnifiedKernel" in kernels
    for row in rows:
        tokens = int(row.columns["batch_size"]) * int(row.columns["isl"])
        if row.table == "dsa_context_module":
            strange = row.columns["isl"] == 1 or tokens <= 16 or tokens >= 24576
        else:
            strange = tokens >= 64
        assert (row.key in flags) == strange


def test_small_cases_take_milliseconds(rows: list[Row]) -> None:
    """Wall time of a case, all included; the field's collector: 0.27 to 0.65 s."""
    small = {"dsa_generation_module": 0.0225, "dsa_context_module": 0.0779}
    for table, seconds in small.items():
        found = [
            row.seconds
            for row in rows
            if row.table == table and median(_measured(row).gpu_ms) < 1.0
        ]
        assert median(found) == pytest.approx(seconds, abs=1e-4)


def _measured(row: Row) -> Measurement:
    assert row.measurement is not None
    return row.measurement
