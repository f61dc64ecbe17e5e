"""What is written of rows: CSV, parquet, metadata and provenance, in one step and over nobody's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
import yaml
from made_rows import NOISE, about, dsa_row, failed_row, grid, measured
from made_tables import provenance, read_csv, read_parquet, write

from opkit.collect.measurement import Power
from opkit.collect.tables.latency import Flag, Latency, choose
from opkit.collect.tables.provenance import FRAMEWORKS, head_of
from opkit.collect.tables.validate import (
    BOUND_SHARE,
    GPU_TOLERANCE,
    MONOTONE_TOLERANCE,
    SPIKE_TOLERANCE,
    Rule,
)
from opkit.collect.tables.write import EXTRA, write_tables
from opkit.collect.timing.measure import HOST_BOUND
from opkit.collect.work import Fault
from opkit.errors import BadInput
from opkit.layers.op import LaunchMode, Op, Table

FIELD = (
    "framework,version,device,op_name,kernel_source,model,architecture,mla_dtype,kv_cache_dtype,"
    "gemm_type,num_heads,batch_size,isl,tp_size,step,latency"
)


# --- the files ---


def test_the_csv_is_the_field_s_with_columns_of_opkit_s_own_behind(tmp_path: Path) -> None:
    written = write(tmp_path, grid())
    assert [(item.name, item.rows, item.status) for item in written.tables] == [
        ("dsa_context_module", 12, "complete"),
        ("dsa_generation_module", 12, "complete"),
    ]
    assert written.ok
    assert written.problems == ()
    header = written.tables[0].csv.read_text().splitlines()[0]
    assert header == ",".join((FIELD, *EXTRA))
    row = next(r for r in read_csv(written.tables[0].csv) if r["isl"] == "1024")
    assert row["framework"] == "VLLM"
    assert row["device"] == "NVIDIA H100 80GB HBM3"
    assert row["op_name"] == "dsa_context_module"
    assert row["kernel_source"] == "FLASHMLA_SPARSE"
    assert float(row["latency"]) == pytest.approx(0.5 + 1024 / 600)
    assert row["kernel"] == "void gemm<bf16, 128>(int, float*)"  # a comma within quotes
    assert row["verdict"] == "dsa-20261121-103000-ab12cd"


def test_the_parquet_has_the_field_s_types_and_the_csv_s_values(tmp_path: Path) -> None:
    made = write(tmp_path, grid()).tables[0]
    found = duckdb.read_parquet(str(made.parquet))
    types = dict(zip(found.columns, map(str, found.types), strict=True))
    whole = ("num_heads", "batch_size", "isl", "tp_size", "step", "samples", "sm_mhz")
    numbers = ("latency", "elapsed_ms", "gpu_ms", "spread")
    assert {name for name, kind in types.items() if kind == "BIGINT"} == set(whole)
    assert {name for name, kind in types.items() if kind == "DOUBLE"} == set(numbers)
    assert set(types.values()) == {"BIGINT", "DOUBLE", "VARCHAR"}
    for text, value in zip(read_csv(made.csv), read_parquet(made.parquet), strict=True):
        assert {name: str(cell) for name, cell in value.items()} == text


def test_a_version_of_two_numbers_stays_text(tmp_path: Path) -> None:
    made = write(tmp_path, grid(), head=head_of("vllm", "9.9", "NVIDIA H200")).tables[0]
    assert {row["version"] for row in read_parquet(made.parquet)} == {"9.9"}


def test_rows_stand_in_the_order_of_their_columns(tmp_path: Path) -> None:
    made = write(tmp_path, grid()[::-1]).tables[0]
    order = [(row["batch_size"], row["isl"]) for row in read_parquet(made.parquet)]
    assert order == sorted(order)


def test_what_was_not_taken_is_empty_and_no_number(tmp_path: Path) -> None:
    bare = replace(measured(1.0), after=replace(measured(1.0).after, sm_mhz=None), kernels=())
    bare = replace(bare, before=bare.after)
    made = write(tmp_path, [dsa_row(1, 1024, 0, 1.0, measurement=bare)]).tables[0]
    (row,) = read_parquet(made.parquet)
    assert (row["gpu_ms"], row["sm_mhz"]) == (None, None)
    assert (row["flags"], row["kernel"]) == ("kernels_unknown", "")
    assert "power" not in row


def test_power_is_written_where_it_was_measured(tmp_path: Path) -> None:
    power = Power(612.5, 700.0, 1.2, "energy counter", 1.0, 0)
    rows = [
        dsa_row(1, 1024, 0, 2.0, measurement=measured(2.0, power=power)),
        dsa_row(1, 2048, 0, 4.0),
    ]
    made = write(tmp_path, rows).tables[0]
    assert made.csv.read_text().splitlines()[0].startswith(f"{FIELD},power,power_limit,elapsed_ms")
    found = [(row["power"], row["power_limit"]) for row in read_parquet(made.parquet)]
    assert found == [(612.5, 700.0), (None, None)]


def test_frameworks_are_spelt_as_the_field_does() -> None:
    spelt = {backend: head_of(backend, "1", "GPU").framework for backend in FRAMEWORKS}
    assert spelt == {"vllm": "VLLM", "trtllm": "TRTLLM", "sglang": "SGLang", "torch": "TORCH"}


def test_the_metadata_lists_the_tables_of_both_runs(tmp_path: Path) -> None:
    context = [row for row in grid() if row.table == "dsa_context_module"]
    write(tmp_path, context)
    write(tmp_path, [row for row in grid() if row not in context])
    meta = yaml.safe_load((tmp_path / "collection_meta.yaml").read_text())
    assert meta["schema_version"] == 1
    assert meta["runtime"] == {"framework": "vllm", "version": "0.24.0"}
    assert list(meta["tables"]) == ["dsa_context_module_perf", "dsa_generation_module_perf"]
    told = meta["tables"]["dsa_context_module_perf"]
    assert (told["rows"], told["status"], told["collected_at"]) == (12, "complete", "2026-11-21")
    assert told["collector_hash"].startswith("sha256:")


def test_a_collective_names_its_op_itself(tmp_path: Path) -> None:
    nccl = Table("nccl", "comm", ("nccl_dtype", "num_gpus", "message_size"), {"torch": "NCCL"})
    op = Op("nccl", "collectives", (), {}, tables={"": nccl})
    rows = [
        replace(
            dsa_row(1, 1, 0, 0.01),
            key=name,
            table="nccl",
            columns={
                "op_name": name, "nccl_dtype": "half", "num_gpus": 2, "message_size": 1024,
            },
        )
        for name in ("all_gather", "all_reduce")
    ]  # fmt: skip
    written = write_tables(op, rows, about(backend="torch"), tmp_path)
    found = read_parquet(written.tables[0].parquet)
    assert [(r["op_name"], r["kernel_source"]) for r in found] == [
        ("all_gather", "NCCL"),
        ("all_reduce", "NCCL"),
    ]
    assert written.unbounded == {"the work of nccl is not counted": 2}


# --- which time ---


@pytest.mark.parametrize(
    ("launch", "asked", "ms", "source"),
    [
        (LaunchMode.GRAPH, Latency.AUTO, 2.0, Latency.ELAPSED),
        (LaunchMode.EAGER, Latency.AUTO, 1.8, Latency.GPU),
        (LaunchMode.GRAPH, Latency.GPU, 1.8, Latency.GPU),
        (LaunchMode.EAGER, Latency.ELAPSED, 2.0, Latency.ELAPSED),
    ],
)
def test_the_latency_is_elapsed_of_a_graph_and_gpu_time_of_an_eager_launch(
    launch: LaunchMode, asked: Latency, ms: float, source: Latency
) -> None:
    chosen = choose(measured(2.0, 1.8, launch), asked)
    assert (chosen.ms, chosen.source) == (pytest.approx(ms, rel=1e-3), source)
    assert chosen.flags == ()


def test_an_eager_row_that_waits_for_its_launches_is_host_bound() -> None:
    below, above = HOST_BOUND * 0.99, HOST_BOUND * 1.01
    assert choose(measured(2.0, 2.0 * below, LaunchMode.EAGER)).flags == (Flag.HOST_BOUND,)
    assert choose(measured(2.0, 2.0 * above, LaunchMode.EAGER)).flags == ()
    assert choose(measured(2.0, 2.0 * below, LaunchMode.GRAPH)).flags == ()


def test_gpu_time_that_was_not_taken_is_told() -> None:
    chosen = choose(measured(2.0, launch=LaunchMode.EAGER))
    assert (chosen.source, chosen.flags) == (Latency.ELAPSED, (Flag.NO_GPU_TIME,))


def test_flags_reach_the_table(tmp_path: Path) -> None:
    odd = measured(
        2.0, 0.5, LaunchMode.EAGER, throttled=True, graph_error="not supported", stopped="time"
    )
    row = dsa_row(1, 1024, 0, 2.0, measurement=odd)
    written = write(
        tmp_path, [row], waiver="no verdict yet", flags={row.key: ("unaligned_kernels",)}
    )
    (found,) = read_parquet(written.tables[0].parquet)
    assert found["flags"].split(";") == [
        "host_bound", "throttled", "eager_fallback", "unsettled", "waived", "unaligned_kernels",
    ]  # fmt: skip
    assert found["latency"] == pytest.approx(0.5, rel=1e-3)
    assert found["launch_mode"] == "eager"


# --- what is wrong ---


def test_a_row_below_the_bound_is_left_out_and_listed(tmp_path: Path) -> None:
    rows = [*grid(), dsa_row(8, 4096, 0, 0.1)]
    written = write(tmp_path, rows)
    assert not written.ok
    (problem,) = written.problems
    assert (problem.rule, problem.hard, problem.key) == (Rule.BOUND, True, rows[-1].key)
    assert (written.tables[0].rows, written.tables[0].status) == (12, "partial")
    told = provenance(written)
    assert [(p["rule"], p["key"]) for p in told["problems"]] == [("bound", rows[-1].key)]
    assert rows[-1].key not in {row["key"] for row in told["rows"]}


def test_a_soft_problem_is_written_and_flagged(tmp_path: Path) -> None:
    rows = [dsa_row(1, 1024, 0, 3.0), dsa_row(1, 2048, 0, 2.0)]
    written = write(tmp_path, rows)
    assert written.ok
    found = read_parquet(written.tables[0].parquet)
    assert [row["flags"] for row in found] == ["", "not_monotone"]
    assert provenance(written)["rows"][1]["flags"] == ["not_monotone"]


def test_failed_cases_make_a_table_partial_and_are_listed(tmp_path: Path) -> None:
    rows = [
        dsa_row(1, 1024, 0, 2.0),
        failed_row(64, 4096, 0, Fault.MEMORY, "CUDA out of memory"),
        failed_row(32, 4096, 0, Fault.MEMORY, "CUDA out of memory"),
        failed_row(1, 32768, 0, Fault.TIMEOUT, "no answer for 120 s"),
    ]
    written = write(tmp_path, rows, planned={"dsa_context_module": 4})
    assert written.ok
    assert written.tables[0].status == "partial"
    told = provenance(written)["sweep"]
    assert (told["planned"], told["collected"]) == (4, 1)
    assert told["failed"] == {"out of memory": 2, "timed out": 1}
    assert [(item["case"]["batch"], item["error"]) for item in told["quarantined"]] == [
        (64, "CUDA out of memory"),
        (32, "CUDA out of memory"),
        (1, "no answer for 120 s"),
    ]
    meta = yaml.safe_load((tmp_path / "collection_meta.yaml").read_text())
    assert meta["tables"]["dsa_context_module_perf"]["status"] == "partial"


def test_a_row_that_is_lost_is_a_problem(tmp_path: Path) -> None:
    written = write(tmp_path, [dsa_row(1, 1024, 0, 2.0)], planned={"dsa_context_module": 2})
    assert [problem.rule for problem in written.problems] == [Rule.COUNT]
    assert not written.ok
    assert written.tables[0].status == "partial"


def test_zero_rows_write_no_table_and_are_a_failure(tmp_path: Path) -> None:
    failed = [failed_row(1, 1024, 0, Fault.CRASH, "killed")]
    written = write(tmp_path / "none", failed)
    assert (written.ok, written.tables) == (False, ())
    assert [problem.what for problem in written.problems] == ["not one row has a value"]
    assert not (tmp_path / "none").exists()
    assert not write(tmp_path, []).ok


def test_samples_that_are_no_numbers_keep_a_row_out(tmp_path: Path) -> None:
    broken = replace(measured(2.0), gpu_ms=(1.0, float("nan")))
    empty = replace(measured(2.0), elapsed_ms=())
    rows = [
        dsa_row(1, 1024, 0, 2.0),
        dsa_row(2, 1024, 0, 2.0, measurement=broken),
        dsa_row(4, 1024, 0, 2.0, measurement=empty),
    ]
    written = write(tmp_path, rows)
    assert written.tables[0].rows == 1
    assert {(p.rule, p.key) for p in written.problems} == {
        (Rule.VALUE, rows[1].key),
        (Rule.VALUE, rows[2].key),
    }


def test_a_row_of_no_table_of_the_op_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="of table 'moe'"):
        write(tmp_path, [replace(dsa_row(1, 1, 0, 1.0), table="moe")])


def test_rows_without_a_bound_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        dsa_row(1, 1024, 0, 2.0),
        dsa_row(2, 1024, 0, 4.0, gpu={"name": "CPU"}),
        dsa_row(4, 1024, 0, 8.0, build="lost"),
    ]
    written = write(tmp_path, rows)
    assert written.unbounded == {
        "the peaks of CPU are not known": 1,
        "build lost left no manifest": 1,
    }
    bounds = [row["bound_ms"] for row in provenance(written)["rows"]]
    assert bounds[0] > 0
    assert bounds[1:] == [None, None]


# --- provenance ---


def test_the_provenance_has_every_sample_and_circumstance(tmp_path: Path) -> None:
    written = write(tmp_path, grid(), waiver="trial", differences=("GPU: other",))
    told = provenance(written)
    assert told["schema"] == "opkit.provenance/1"
    assert told["verdict"] == "dsa-20261121-103000-ab12cd"
    assert (told["waiver"], told["waived"]) == ("trial", ["GPU: other"])
    assert told["hosts"] == ["node1"]
    assert told["gpus"][0]["uuid"] == "GPU-1"
    assert told["builds"]["heads-128"]["layer_source"]
    row = told["rows"][0]
    assert row["latency_is"] == "median elapsed time"
    assert row["elapsed"]["samples"] == [row["latency_ms"] * factor for factor in NOISE]
    assert row["elapsed"]["min"] < row["elapsed"]["median"] < row["elapsed"]["max"]
    assert row["elapsed"]["mad"] == pytest.approx(0.00075 * row["latency_ms"], rel=0.01)
    assert row["gpu"]["median"] == pytest.approx(0.95 * row["latency_ms"])
    assert row["spread"] == row["elapsed"]["half_width"] > 0
    assert row["kernels"][0]["calls"] == 2
    assert (row["before"]["sm_mhz"], row["after"]["sm_mhz"]) == (1980, 1755)
    assert row["timing"]["pacing"] == "burst"
    assert (row["launch"], row["throttled"], row["power"]) == ("graph", False, None)
    assert row["waiver"] == "trial"


# --- docs/tables.md ---

DOC = (Path(__file__).parents[2] / "docs" / "tables.md").read_text("utf-8")


@pytest.mark.parametrize("name", [*EXTRA, *Flag, *Rule, "waived", "unaligned_kernels"])
def test_every_column_flag_and_rule_is_documented(name: str) -> None:
    assert re.search(rf"^\| [^|]*`{name}`", DOC, flags=re.MULTILINE)


def test_every_threshold_is_documented() -> None:
    (host_bound,) = re.findall(r"^\| `host_bound` .* (\d+) %", DOC, flags=re.MULTILINE)
    (bound,) = re.findall(r"^\| `bound` .* (\d+) %", DOC, flags=re.MULTILINE)
    (drop,) = re.findall(r"^\| `not_monotone` \|[^|]* (\d+) %", DOC, flags=re.MULTILINE)
    (spike,) = set(re.findall(r"over (\d+) %", DOC[DOC.index("| `spike`") :].split("\n")[0]))
    (gpu,) = re.findall(r"^\| `gpu_over_elapsed` \|[^|]* (\d+) %", DOC, flags=re.MULTILINE)
    shown = [float(text) / 100 for text in (host_bound, bound, drop, spike, gpu)]
    assert shown == [
        HOST_BOUND, BOUND_SHARE, MONOTONE_TOLERANCE, SPIKE_TOLERANCE, GPU_TOLERANCE,
    ]  # fmt: skip
