"""How tables are laid out as curves, and a shipped table beside them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
from made_collections import desk, h100, h100_rows, shipped_table, write_collection
from made_rows import about, dsa_row, grid

from opkit.collect.desk.desk import desk_of
from opkit.collect.desk.read import read_collection
from opkit.collect.desk.series import layout_of
from opkit.collect.desk.shipped import read_shipped
from opkit.collect.fidelity import shipped_latencies
from opkit.collect.work import Row
from opkit.errors import BadInput, WrongUsage
from opkit.layers.op import Case, case_from_json


@pytest.mark.parametrize(
    ("rows", "x", "panel", "groups"),
    [
        (
            [{"gemm_dtype": "fp8", "m": m, "n": n, "k": 7168} for m in (1, 8) for n in (64, 128)],
            "m", ("n",), (),
        ),
        (
            [{"gemm_dtype": dtype, "m": m, "n": n, "k": k} for dtype in ("bfloat16", "fp8")
             for m in (1, 8) for n, k in ((64, 128), (128, 256))],
            "m", ("n", "k"), ("gemm_dtype",),
        ),
        (
            [{"num_tokens": tokens, "topk": 8, "moe_tp_size": tp, "distribution": spread}
             for tokens in (1, 64) for tp in (1, 8) for spread in ("balanced", "power_law_1.2")],
            "num_tokens", ("distribution",), ("moe_tp_size",),
        ),
        (
            [{"op_name": name, "num_gpus": 2, "message_size": size} for name in ("all_gather", "x")
             for size in (256, 512)],
            "message_size", ("op_name",), (),
        ),
        (
            [{"batch_size": batch, "isl": 1, "num_heads": 128, "step": step}
             for batch in (1, 2) for step in (1, 512)],
            "step", ("batch_size",), (),
        ),
        # Only the past varies, as with --case-filter.
        ([{"batch_size": 1, "isl": 512, "step": step} for step in (0, 128)], "step", (), ()),
        ([{"batch_size": batch, "isl": 512, "step": 0} for batch in (1, 2)], "batch_size", (), ()),
        ([{"batch_size": 1, "isl": 512, "step": 0}], "isl", (), ()),
    ],
)  # fmt: skip
def test_what_varies_decides_what_is_x(
    rows: list[dict[str, str | int | float]], x: str, panel: tuple[str, ...],
    groups: tuple[str, ...],
) -> None:  # fmt: skip
    found = layout_of(rows)
    assert (found.x, found.panel, found.groups) == (x, panel, groups)


def test_rows_are_called_by_what_tells_them_apart() -> None:
    rows = [{"model": "a", "num_heads": heads, "batch_size": batch, "isl": isl, "mla_dtype": "fp8"}
            for heads in (16, 128) for batch in (1, 2) for isl in (512, 4096)]  # fmt: skip
    found = layout_of(rows)
    assert found.group(rows[0]) == "heads 16"
    assert found.panel_of(rows[0]) == "batch 1"
    assert found.label(rows[-1]) == "batch 2 · isl 4,096"
    assert found.order(rows) == ["heads 16", "heads 128"]  # by number, not by letter
    assert found.fixed == {"mla_dtype": "fp8"}


def test_a_shipped_table_says_what_verify_reads_from_it(tmp_path: Path) -> None:
    """`opkit verify --shipped` and the desk give the same number for each of 184 decode shapes."""
    rows = [row for row in h100_rows() if row.table == "dsa_generation_module"]
    # Every other step only, so that the others are read between two.
    steps = sorted({int(row.columns["step"]) for row in rows})[::2]
    path = shipped_table(
        tmp_path / "dsa_generation_module_perf.parquet",
        [row for row in rows if row.columns["step"] in steps],
    )
    cases = {case: row.columns for row in rows
             if isinstance(case := case_from_json(row.case), Case)}  # fmt: skip
    wanted = shipped_latencies(path, cases)
    points = read_collection(h100(tmp_path / "c")).tables[1].points
    found = read_shipped(path, {"dsa_generation_module": points})
    assert 150 < len(wanted) < 184
    for case, columns in cases.items():
        assert found.of(columns) == wanted.get(case), case


def test_points_stand_beside_the_shipped_ones(tmp_path: Path) -> None:
    rows = grid()
    folder = write_collection(tmp_path / "c", rows, about())
    context = [row for row in rows if row.table == "dsa_context_module"]
    path = shipped_table(tmp_path / "dsa_context_module_perf.parquet", context[:-1], factor=2.0)
    table, other = desk(folder, path).tables
    assert table.shipped is not None
    assert (table.shipped.rows, table.shipped.versions) == (11, ("VLLM 0.24.0",))
    ratios = [mark.over_shipped for mark in table.marks]
    assert ratios.count(None) == 1
    assert all(ratio == pytest.approx(0.5) for ratio in ratios if ratio is not None)
    assert table.groups[0].over_shipped is not None
    assert table.groups[0].over_shipped.count == 11
    assert other.shipped is None


def test_a_shipped_csv_is_read_too(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", grid(), about())
    # Our own CSV is the field's; a table beside itself is equal.
    table, _ = desk(folder, folder / "tables" / "dsa_context_module_perf.txt").tables
    assert {round(mark.over_shipped or 0, 9) for mark in table.marks} == {1.0}


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", grid(), about())
    other = tmp_path / "gemm_perf.parquet"
    with duckdb.connect() as db:
        db.sql("SELECT 'gemm' AS op_name, 1 AS m, 0.5 AS latency").write_parquet(str(other))
    with pytest.raises(BadInput, match=r"beside none of the tables dsa_context.*of gemm"):
        desk(folder, other)
    named = other.rename(tmp_path / "dsa_context_module_perf.parquet")
    with pytest.raises(BadInput, match="no column architecture, mla_dtype"):
        desk(folder, named)
    named.write_text("nothing")
    with pytest.raises(BadInput, match="not a readable perf table"):
        desk(folder, named)


def test_two_shipped_tables_beside_one_are_refused(tmp_path: Path) -> None:
    rows: list[Row] = [dsa_row(1, isl, 0, 1.0) for isl in (512, 1024)]
    folder = write_collection(tmp_path / "c", rows, about())
    paths = [shipped_table(tmp_path / name / "dsa_context_module_perf.parquet", rows)
             for name in ("a", "b") if not (tmp_path / name).mkdir()]  # fmt: skip
    with pytest.raises(WrongUsage, match="both tables of dsa_context_module"):
        desk_of(read_collection(folder), paths)
