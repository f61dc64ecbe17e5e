"""Two collections beside each other: what changed, and what warns of machines and methods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_collections import h100, h100_rows, scaled, write_collection
from made_rows import about, dsa_row, failed_row, grid, measured

from opkit.collect.compare import FLOOR, compare_collections
from opkit.collect.comparison import Change, CollectionComparison
from opkit.collect.desk.read import read_collection
from opkit.collect.measurement import KernelTime, Timing
from opkit.collect.tables.provenance import head_of
from opkit.collect.work import Fault, Row
from opkit.errors import WrongUsage

NEWER = {"head": head_of("vllm", "0.25.0", "NVIDIA H100 80GB HBM3"),
         "versions": {"vllm": "0.25.0", "driver": "590.1"}}  # fmt: skip


def compared(folder: Path, before: list[Row], after: list[Row], **changed: object):  # type: ignore[no-untyped-def]
    old = write_collection(folder / "before", before, about())
    new = write_collection(folder / "after", after, about(**changed))
    return compare_collections(read_collection(old), read_collection(new))


def test_a_row_changes_beyond_the_floor_and_its_spread(tmp_path: Path) -> None:
    """Made rows have ±0.1 %: what verify would call the same is the same, more is not."""
    factors = {512: 1.0, 1024: 1.015, 2048: 1.05, 4096: 0.9}
    before = [dsa_row(1, isl, 0, isl / 100) for isl in factors]
    after = [scaled(row, factors[int(row.columns["isl"])]) for row in before]
    found = compared(tmp_path, before, after)
    assert FLOOR == 0.02
    assert {row.columns["isl"]: row.change for row in found.rows} == {
        512: Change.SAME, 1024: Change.SAME, 2048: Change.SLOWER, 4096: Change.FASTER,
    }  # fmt: skip
    # Largest change first, and the ratio is B over A.
    assert [row.columns["isl"] for row in found.changed] == [4096, 2048]
    assert found.rows[0].ratio == pytest.approx(0.9)
    overall = found.overall
    assert (overall.rows, overall.slower, overall.faster, overall.same) == (4, 1, 1, 2)
    assert overall.median == pytest.approx((1.0 + 1.015) / 2)
    assert (overall.least, overall.most) == pytest.approx((0.9, 1.05))


def test_rows_of_wide_spread_must_differ_by_more(tmp_path: Path) -> None:
    wide = tuple(factor * 1.0 for factor in (0.9, 0.95, 1.0, 1.05, 1.1, 1.0, 0.92, 1.08))
    row = dsa_row(1, 512, 0, 1.0, measurement=measured(1.0, elapsed_ms=wide))
    found = compared(tmp_path, [row], [scaled(row, 1.08)])
    (only,) = found.rows
    assert only.combined is not None
    assert only.allowed == only.combined > 0.08
    assert only.change is Change.SAME


def test_rows_of_few_samples_are_held_against_the_floor_alone(tmp_path: Path) -> None:
    row = dsa_row(1, 512, 0, 1.0, measurement=measured(1.0, elapsed_ms=(1.0, 1.0, 1.0)))
    (only,) = compared(tmp_path, [row], [scaled(row, 1.03)]).rows
    assert (only.combined, only.allowed, only.change) == (None, FLOOR, Change.SLOWER)


def test_kernels_that_changed_are_told_with_the_one_that_moved(tmp_path: Path) -> None:
    def row(kernels: tuple[KernelTime, ...], ms: float) -> Row:
        return dsa_row(1, 512, 0, ms, measurement=measured(ms, kernels=kernels))

    norm = KernelTime("void vllm::rms_norm_kernel<c10::BFloat16, 8>(int)", 2, 4.0)
    old = (KernelTime("void flash::decode<128>(int)", 1, 700.0), norm)
    new = (KernelTime("void flashinfer::plan<64>(int)", 1, 500.0), norm)
    found = compared(tmp_path, [row(old, 1.0)], [row(new, 0.8)])
    (only,) = found.rows
    assert only.kernels_gone == ("flash::decode",)
    assert only.kernels_new == ("flashinfer::plan",)
    assert only.mover is not None
    assert (only.mover.kernel, only.mover.us_a, only.mover.us_b) == (
        "flash::decode", 700.0, 0.0,
    )  # fmt: skip
    assert [(item.kernel, item.gone, item.new) for item in found.kernels] == [
        ("flash::decode", 1, 0), ("flashinfer::plan", 0, 1),
    ]  # fmt: skip


def test_another_tile_is_a_variant(tmp_path: Path) -> None:
    def row(tile: int) -> Row:
        kernel = KernelTime(f"void flash::decode<{tile}>(int)", 1, 700.0)
        return dsa_row(1, 512, 0, 1.0, measurement=measured(1.0, kernels=(kernel,)))

    (only,) = compared(tmp_path, [row(64)], [row(128)]).rows
    assert (only.variants, only.kernels_gone, only.mover) == (True, (), None)


def test_new_and_lost_rows_say_what_the_other_side_has(tmp_path: Path) -> None:
    before = [dsa_row(1, isl, 0, isl / 100) for isl in (512, 1024, 2048)]
    failed = replace(failed_row(1, 1024, 0, Fault.MEMORY, "12 GiB"), columns={}, table="")
    after = [before[0], failed, dsa_row(1, 4096, 0, 41.0)]
    found = compared(tmp_path, before, after)
    assert [row.columns["isl"] for row in found.rows] == [512]
    assert [(item.columns["isl"], item.why) for item in found.only_a] == [
        (1024, "failed: 12 GiB"), (2048, "not in its sweep"),
    ]  # fmt: skip
    assert [(item.columns["isl"], item.latency_ms) for item in found.only_b] == [(4096, 41.0)]


def test_curves_hold_every_row_of_both_sides(tmp_path: Path) -> None:
    """GIVEN two batches, one row lost and one won, THEN each stands at its place in its curve."""
    before = [dsa_row(batch, isl, 0, isl / 100) for batch in (1, 4) for isl in (2048, 512, 1024)]
    after = [scaled(row, 1.1) for row in before[1:]] + [dsa_row(4, 4096, 0, 41.0)]
    found = compared(tmp_path, before, after)
    (group,) = found.curves
    assert (group.table, group.name, group.x) == ("dsa_context_module", "", "isl")
    assert group.xs == (512, 1024, 2048, 4096)
    assert [(curve.name, [(p.x, p.latency_ms_a, p.latency_ms_b) for p in curve.places])
            for curve in group.curves] == [
        ("batch 1", [(512, 5.12, pytest.approx(5.632)), (1024, 10.24, pytest.approx(11.264)),
                     (2048, 20.48, None)]),
        ("batch 4", [(512, 5.12, pytest.approx(5.632)), (1024, 10.24, pytest.approx(11.264)),
                     (2048, 20.48, pytest.approx(22.528)), (4096, None, 41.0)]),
    ]  # fmt: skip
    rows = [place.row for curve in group.curves for place in curve.places if place.row]
    assert sorted(map(id, rows)) == sorted(map(id, found.rows))


@pytest.mark.parametrize(("factor", "times"), [(1.0, 0.0), (1.02, 1.0), (1.0404, 2.0), (0.9, 5.32)])
def test_how_far_a_row_moved_is_told_in_what_it_may(
    tmp_path: Path, factor: float, times: float
) -> None:
    row = dsa_row(1, 512, 0, 1.0)
    (only,) = compared(tmp_path, [row], [scaled(row, factor)]).rows
    assert only.allowed == FLOOR
    assert only.times_allowed == pytest.approx(times, abs=0.01)


def test_versions_are_told_and_machines_warn(tmp_path: Path) -> None:
    found = compared(tmp_path, grid(), [replace(row, host="node2") for row in grid()], **NEWER)
    told = {item.name: (item.a, item.b, item.warns) for item in found.differences}
    assert told == {
        "host": ("node1", "node2", True),
        "driver": ("", "590.1", True),
        "vllm": ("0.24.0", "0.25.0", False),
    }
    assert found.warnings == (
        "host differs: node1 in A, node2 in B",
        "driver is not known of A; B says 590.1",
    )


def test_another_way_of_measuring_warns(tmp_path: Path) -> None:
    def again(row: Row) -> Row:
        assert row.measurement is not None
        timing = Timing(pacing="sustained", l2="cold")
        state = replace(row.measurement.after, sm_mhz=1410)
        return replace(row, measurement=replace(row.measurement, timing=timing, after=state))

    found = compared(tmp_path, grid(), [again(row) for row in grid()])
    assert {item.name for item in found.differences if item.warns} == {"pacing", "l2", "SM clock"}
    assert "SM clock differs: 1,755 MHz (median) in A, 1,410 MHz (median) in B" in found.warnings


def test_groups_have_medians_of_their_own(tmp_path: Path) -> None:
    """The H100's rows, decode a tenth slower: only that group has changed."""
    rows = h100_rows()
    before = read_collection(h100(tmp_path / "a" / "dsa-vllm", rows))
    slower = [scaled(row, 1.1) if row.table == "dsa_generation_module" else row for row in rows]
    found = compare_collections(before, read_collection(h100(tmp_path / "b" / "dsa-vllm", slower)))
    assert [(group.table, group.group, group.rows, group.slower, round(group.median, 6))
            for group in found.groups] == [
        ("dsa_context_module", "heads 16 · step 0", 83, 0, 1.0),
        ("dsa_context_module", "heads 16 · step 128", 75, 0, 1.0),
        ("dsa_context_module", "heads 128 · step 0", 97, 0, 1.0),
        ("dsa_context_module", "heads 128 · step 128", 97, 0, 1.0),
        ("dsa_generation_module", "", 184, 184, 1.1),
    ]  # fmt: skip
    movers = {row.mover.kernel for row in found.changed if row.mover}
    assert any("sparse_attn" in kernel for kernel in movers)


def test_what_is_not_comparable_is_a_usage_error(tmp_path: Path) -> None:
    rows = grid()
    one = read_collection(write_collection(tmp_path / "a", rows, about()))
    with pytest.raises(WrongUsage, match="compared with itself"):
        compare_collections(one, one)
    other = replace(one, folder=tmp_path / "b", op="mla")
    with pytest.raises(WrongUsage, match="of dsa cannot be compared with one of mla"):
        compare_collections(one, other)
    apart = [dsa_row(8, 512, 0, 20.0)]
    disjoint = read_collection(write_collection(tmp_path / "c", apart, about()))
    with pytest.raises(WrongUsage, match=r"share no row: 24 and 1 rows"):
        compare_collections(one, disjoint)
    failed = [failed_row(1, 512, 0, Fault.CUDA, "no")]
    empty = read_collection(write_collection(tmp_path / "d", [], about(), loose=failed))
    with pytest.raises(WrongUsage, match="no row to compare with"):
        compare_collections(one, empty)


def test_the_json_is_complete_and_versioned(tmp_path: Path) -> None:
    found: CollectionComparison = compared(tmp_path, grid(), [scaled(r, 1.2) for r in grid()])
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (data["schema"], data["kind"], data["differs"]) == (
        "opkit.compare/1",
        "collection",
        True,
    )
    assert len(data["rows"]) == data["overall"]["slower"] == 24
    assert {round(row["ratio"], 9) for row in data["rows"]} == {1.2}
    assert data["rows"][0]["change"] == "slower"
    assert data["warnings"] == []
