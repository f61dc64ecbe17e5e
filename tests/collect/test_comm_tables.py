"""The tables of collectives: columns and types of the field's, and what must not be in them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
import yaml
from comm_bench import H100, fake_launcher, made_host

from opkit.collect.comm.plan import CommOptions
from opkit.collect.comm.run import CommResult, run_comm
from opkit.collect.tables.files import read_provenance

# `describe` of h100_sxm/comm/{nccl/2.29.2,vllm/0.24.0} of aiconfigurator 0.12.0.
SHIPPED_NCCL = {
    "framework": "VARCHAR",
    "version": "VARCHAR",
    "device": "VARCHAR",
    "op_name": "VARCHAR",
    "kernel_source": "VARCHAR",
    "nccl_dtype": "VARCHAR",
    "num_gpus": "BIGINT",
    "message_size": "BIGINT",
    "latency": "DOUBLE",
}
SHIPPED_CUSTOM = {
    **{name: kind for name, kind in SHIPPED_NCCL.items() if name != "nccl_dtype"},
    "allreduce_dtype": "VARCHAR",
    "backend": "VARCHAR",
}


def collect(tmp_path: Path, gpus: int = 2, **asked: object) -> CommResult:
    """Two sizes, measured by fake ranks."""
    options = CommOptions(out=tmp_path / "out", min_bytes=512, max_bytes=1024, **asked)  # type: ignore[arg-type]
    variables = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    return run_comm(options, print, fake_launcher(tmp_path), made_host(gpus, **variables))


def rows_of(path: Path, columns: str) -> list[tuple[object, ...]]:
    with duckdb.connect() as db:
        found = db.execute(f"select {columns} from '{path}' order by all").fetchall()
    return [tuple(row) for row in found]


def types_of(path: Path) -> dict[str, str]:
    with duckdb.connect() as db:
        described = db.execute(f"describe select * from '{path}'").fetchall()
    return {str(name): str(kind) for name, kind, *_ in described}


def test_the_nccl_table_has_the_shipped_columns_and_types(tmp_path: Path) -> None:
    (table,) = collect(tmp_path).tables
    found = types_of(table.parquet)
    assert {name: found.get(name) for name in SHIPPED_NCCL} == SHIPPED_NCCL
    assert table.parquet == tmp_path / "out/comm/nccl/2.29.2/nccl_perf.parquet"
    # The field's order, in the CSV, with opkit's own columns behind.
    header = table.csv.read_text().splitlines()[0].split(",")
    assert header[: len(SHIPPED_NCCL)] == list(SHIPPED_NCCL)


def test_the_nccl_table_counts_elements_and_names_ops_as_the_reader_does(tmp_path: Path) -> None:
    (table,) = collect(tmp_path).tables
    columns = "op_name, nccl_dtype, num_gpus, message_size"
    assert rows_of(table.parquet, columns) == sorted(
        (op, dtype, 2, elements)
        for op in ("all_gather", "all_reduce", "alltoall", "reduce_scatter")
        for dtype, sizes in (("half", (256, 512)), ("int8", (512, 1024)))
        for elements in sizes
    )
    assert rows_of(table.parquet, "distinct framework, version, device, kernel_source") == [
        ("NCCL", "2.29.2", H100, "NCCL")
    ]


def test_vllms_table_tells_graph_from_eager_as_the_reader_does(tmp_path: Path) -> None:
    (table,) = collect(tmp_path, all_reduce_backend="vllm").tables
    assert table.parquet == tmp_path / "out/comm/vllm/0.24.0/custom_allreduce_perf.parquet"
    found = types_of(table.parquet)
    assert {name: found.get(name) for name in SHIPPED_CUSTOM} == SHIPPED_CUSTOM
    columns = "framework, op_name, kernel_source, backend, allreduce_dtype, message_size"
    assert rows_of(table.parquet, columns) == [
        ("vLLM", "all_reduce", f"vLLM_custom_{mode}", f"vllm_{mode}", "bfloat16", elements)
        for mode in ("eager", "graph")
        for elements in (256, 512)
    ]
    # Which kernel answered is told, since it is not always vLLM's own.
    flags = [str(value) for (value,) in rows_of(table.parquet, "flags")]
    assert all("served_by_fake" in flag.split(";") for flag in flags)


def test_trtllms_table_has_its_implementation(tmp_path: Path) -> None:
    (table,) = collect(tmp_path, all_reduce_backend="trtllm").tables
    columns = "distinct framework, kernel_source, implementation"
    assert rows_of(table.parquet, columns) == [("TRTLLM", "TRTLLM", "trtllm")]


def test_one_gpus_rows_are_in_no_table(tmp_path: Path) -> None:
    # A table that ends at one GPU makes aiconfigurator count communication as free.
    alone = collect(tmp_path, gpus=1)
    assert alone.ok
    assert alone.tables == ()
    assert any("one GPU communicates with nobody" in note for note in alone.notes)
    assert {line.bus_gbs for line in alone.lines()} == {0.0}


def test_rows_of_several_runs_meet_in_one_table(tmp_path: Path) -> None:
    host = made_host(4)
    for gpus in ((2,), (4,)):
        options = CommOptions(
            out=tmp_path / "out", gpus=gpus, ops=("all_reduce",), dtypes=("half",),
            min_bytes=512, max_bytes=512,
        )  # fmt: skip
        result = run_comm(options, print, fake_launcher(tmp_path), host)
    (table,) = result.tables
    assert rows_of(table.parquet, "num_gpus, message_size") == [(2, 256), (4, 256)]
    assert table.status == "complete"


def test_the_sidecar_covers_the_table(tmp_path: Path) -> None:
    (table,) = collect(tmp_path).tables
    meta = yaml.safe_load((table.parquet.parent / "collection_meta.yaml").read_text())
    assert meta["schema_version"] == 1
    assert meta["runtime"] == {"framework": "nccl", "version": "2.29.2"}
    assert meta["tables"]["nccl_perf"]["status"] == "complete"
    assert meta["tables"]["nccl_perf"]["rows"] == 16


def test_the_provenance_tells_the_circumstances(tmp_path: Path) -> None:
    (table,) = collect(tmp_path).tables
    told = read_provenance(table.provenance)
    assert told is not None
    (build,) = told["builds"].values()
    assert build["recipe"]["env NCCL_NVLS_ENABLE"] == "0"
    assert build["recipe"]["env TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert "NV18" in build["notes"][0]
    assert build["versions"]["nccl"] == "2.29.2"
    assert told["gpus"] == [{"name": H100, "uuid": ["GPU-0", "GPU-1"], "index": [0, 1]}]
    row = told["rows"][0]
    assert len(row["elapsed"]["samples"]) == 20
    assert len(row["case"]["rank_ms"]) == 2


@pytest.mark.parametrize("dtype", ["half", "int8"])
def test_the_report_shows_latency_and_bandwidths(tmp_path: Path, dtype: str) -> None:
    result = collect(tmp_path, ops=("all_reduce",), dtypes=(dtype,))
    line = result.lines()[1]
    assert (line.op, line.dtype, line.ranks, line.size) == ("all_reduce", dtype, 2, 1024)
    # The fake's time: 10 µs and 10 ns a KiB, its samples up to 0.4 % above; median in the middle.
    assert line.latency_ms == pytest.approx((0.01 + 1024e-8) * 1.002)
    assert line.algorithm_gbs == pytest.approx(1024 / line.latency_ms / 1e6)
    assert line.bus_gbs == pytest.approx(line.algorithm_gbs)  # 2 (n - 1) / n is 1 for two
