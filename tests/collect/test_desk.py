"""What a collection says of itself, read back from its folder: the rows of an H100, and damage."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from made_collections import desk, find, h100, h100_rows, hurt, scaled, write_collection
from made_rows import about, dsa_row, failed_row, grid
from test_review_collect import Bench, bench, collected, host

from opkit.collect.desk.coverage import State
from opkit.collect.desk.desk import Desk, Mark
from opkit.collect.desk.desk_json import SCHEMA, desk_json
from opkit.collect.desk.read import read_collection, sizes_of
from opkit.collect.tables.latency import choose
from opkit.collect.timing.stats import percentile
from opkit.collect.work import Fault, Group, Row, Task
from opkit.errors import BadInput
from opkit.layers.dsa import DSA

__all__ = ["bench", "host"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return h100_rows()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return desk(h100(tmp_path_factory.mktemp("desk") / "dsa-vllm"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, dict[str, str]]:
    folder, keys = hurt(tmp_path_factory.mktemp("desk") / "dsa-vllm")
    return desk(folder), keys


def marks(found: Desk) -> dict[str, Mark]:
    return {mark.point.key: mark for table in found.tables for mark in table.marks}


def test_every_row_is_a_point_with_its_own_numbers(rows: list[Row], whole: Desk) -> None:
    found = marks(whole)
    assert len(found) == len(rows) == 536
    for row in rows:
        assert row.measurement is not None
        point, chosen = found[row.key].point, choose(row.measurement)
        assert (point.latency_ms, point.source) == (chosen.ms, str(chosen.source))
        assert (point.spread.count, point.spread.least, point.spread.most) == (
            len(chosen.samples), min(chosen.samples), max(chosen.samples),
        )  # fmt: skip
        assert point.spread.lower == percentile(chosen.samples, 25)
        assert point.measured == row.measurement


def test_context_runs_over_isl_and_generation_over_step(whole: Desk) -> None:
    context, generation = whole.tables
    assert (context.layout.x, context.layout.panel) == ("isl", ("batch_size",))
    assert [group.name for group in context.groups] == [
        "heads 16 · step 0", "heads 16 · step 128", "heads 128 · step 0", "heads 128 · step 128",
    ]  # fmt: skip
    assert (generation.layout.x, generation.layout.panel) == ("step", ("batch_size",))
    assert [group.name for group in generation.groups] == [""]
    assert [panel.name for panel in generation.groups[0].panels] == [
        f"batch {2**power:,}" for power in range(11)
    ]
    for table in whole.tables:
        for group in table.groups:
            for panel in group.panels:
                places = [mark.x for mark in panel.marks]
                assert places == sorted(set(places))


def test_rows_stand_against_the_least_possible_time(whole: Desk) -> None:
    found = marks(whole).values()
    assert all(mark.point.over_bound and mark.point.over_bound > 1 for mark in found)
    assert "NVIDIA H100 datasheet" in whole.bound_from
    generation = whole.tables[1].groups[0].over_bound
    assert generation is not None
    assert (round(generation.median, 2), round(generation.least, 2)) == (2.93, 2.25)


def test_kernels_that_change_along_a_curve_are_told(whole: Desk) -> None:
    """Prompts of one token run the decode path, as flagged; no batch changes within a decode."""
    context, generation = whole.tables
    batch_1 = context.groups[2].panels[0].marks
    assert (batch_1[0].new, batch_1[0].gone) == ((), ())  # the first has nothing before it
    assert any("sm90_fp8_paged_mqa_logits" in name for name in batch_1[1].gone)
    assert not any(mark.new or mark.gone for mark in generation.marks)


def test_the_clock_is_told_over_the_run(whole: Desk) -> None:
    assert len(whole.moments) == 536
    seconds = [moment.seconds for moment in whole.moments]
    assert (seconds[0], round(seconds[-1])) == (0.0, 238)
    assert seconds == sorted(seconds)
    slow = [moment for moment in whole.moments if moment.throttled]
    assert len(slow) == whole.tables[0].flags["throttled"] == 8
    assert min(moment.sm_mhz or 0 for moment in slow) == 1800


def test_nothing_of_the_sweep_is_lost(damaged: tuple[Desk, dict[str, str]]) -> None:
    found, keys = damaged
    context, generation = found.tables
    assert context.states == {
        "measured": 109, "flagged": 239, "failed": 1, "left out": 1, "not run": 1, "not written": 1,
    }  # fmt: skip
    assert sum(context.states.values()) == context.read.planned == 352
    assert context.read.status == "partial"
    lost = {item.key: item for item in context.read.lost}
    assert {lost[keys[why]].why for why in ("failed", "left out", "not run", "not written")} == {
        "failed", "left out", "not run", "not written",
    }  # fmt: skip
    assert lost[keys["failed"]].fault is Fault.MEMORY
    assert lost[keys["left out"]].what.startswith("0.0")
    assert sum(generation.states.values()) == 184


def test_a_lost_case_stands_in_its_place_of_the_grid(damaged: tuple[Desk, dict[str, str]]) -> None:
    """It knows its sizes and ranks only: the heads are those of rows of as many ranks."""
    found, keys = damaged
    groups = {group.name: group.grid for group in found.tables[0].groups}
    assert set(groups) == {
        "heads 16 · step 0", "heads 16 · step 128", "heads 128 · step 0", "heads 128 · step 128",
    }  # fmt: skip

    def cell(group: str, panel: str, x: int) -> tuple[State, str]:
        made = groups[group]
        found = made.cells[made.rows.index(panel)][made.columns.index(x)]
        return found.state, found.key

    assert cell("heads 128 · step 0", "batch 4", 512) == (State.FAILED, keys["failed"])
    assert cell("heads 128 · step 0", "batch 8", 512) == (State.LEFT_OUT, keys["left out"])
    assert cell("heads 16 · step 0", "batch 1", 64) == (State.NOT_RUN, keys["not run"])
    assert cell("heads 128 · step 128", "batch 2", 64) == (State.NOT_WRITTEN, keys["not written"])
    assert cell("heads 16 · step 0", "batch 256", 16384) == (State.NONE, "")


def test_what_breaks_its_curve_is_an_outlier(damaged: tuple[Desk, dict[str, str]]) -> None:
    """The rows after it, in isl and in step, take less time than it and are flagged: echoes."""
    found, keys = damaged
    (odd,) = [mark for mark in marks(found).values() if mark.outlier]
    assert odd.point.key == keys["spike"]
    (said,) = odd.point.odd
    assert said.startswith("spike: ")
    assert "at isl 4096; its neighbours at 3072 and 6144" in said
    echoes = [mark for mark in marks(found).values() if "not_monotone" in mark.point.flags]
    assert [(mark.point.columns["isl"], mark.point.columns["step"]) for mark in echoes] == [
        (6144, 0), (4096, 128),
    ]  # fmt: skip


def test_a_drop_without_a_spike_is_an_outlier(tmp_path: Path) -> None:
    times = {512: 5.0, 1024: 8.0, 2048: 8.2, 4096: 7.0}
    rows = [dsa_row(1, isl, 0, ms) for isl, ms in times.items()]
    found = marks(desk(write_collection(tmp_path / "c", rows, about()))).values()
    assert [mark.x for mark in found if mark.outlier] == [4096]


def test_the_recorded_rows_have_no_outlier(whole: Desk) -> None:
    assert [mark.point.key for mark in marks(whole).values() if mark.outlier] == []


def test_power_is_told_where_it_was_measured(damaged: tuple[Desk, dict[str, str]]) -> None:
    found, keys = damaged
    assert [point.key for point in found.power] == [keys["power"]]
    power = found.power[0].measured.power
    assert power is not None
    assert (power.watts, power.limit_watts) == (512.25, 700.0)


def test_rows_in_no_table_are_noted(damaged: tuple[Desk, dict[str, str]]) -> None:
    (note,) = damaged[0].collection.notes
    assert note.startswith("1 measured row is in no table")


def test_a_table_that_was_changed_is_noted(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", grid(), about())
    assert read_collection(folder).notes == ()
    with (folder / "tables" / "dsa_context_module_perf.txt").open("a") as file:
        file.write("more\n")
    found = read_collection(folder)
    assert found.tables[0].changed == ("dsa_context_module_perf.txt",)
    assert "not as opkit wrote it" in found.notes[0]


def test_a_folder_of_tables_alone_can_be_read(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", grid(), about())
    found = read_collection(folder / "tables")
    assert (found.record, found.op, found.backend, len(found.points)) == (None, "dsa", "vllm", 24)


def test_an_empty_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing has been collected there"):
        read_collection(tmp_path)


def test_a_collection_without_a_row_is_one_sentence(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", [], about())
    with pytest.raises(BadInput, match="no row has been collected"):
        read_collection(folder)


def test_a_broken_provenance_file_is_one_sentence(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", grid(), about())
    path = folder / "tables" / "dsa_context_module_perf.provenance.json"
    told = json.loads(path.read_text())
    del told["rows"][0]["elapsed"]
    path.write_text(json.dumps(told))
    with pytest.raises(BadInput, match=r"dsa_context_module_perf\.provenance\.json: not readable"):
        read_collection(folder)
    for text in ("{", json.dumps({key: told[key] for key in told if key != "builds"})):
        path.write_text(text)
        with pytest.raises(BadInput, match="not a readable provenance file"):
            read_collection(folder)


def test_failures_alone_still_have_a_grid(tmp_path: Path) -> None:
    failed = [failed_row(batch, 512, 0, Fault.CUDA, "illegal access") for batch in (1, 2)]
    failed = [replace(row, columns={}, table="", group="dsa vllm context tp 8") for row in failed]
    folder = write_collection(tmp_path / "c", [], about(), loose=failed)
    (table,) = desk(folder).tables
    assert (table.read.name, table.read.status) == ("dsa_context_module", "not written")
    assert table.states == {"failed": 2}
    (group,) = table.groups
    assert [[cell.state for cell in row] for row in group.grid.cells] == [
        [State.FAILED, State.FAILED]
    ]
    assert {item.ranks for item in table.read.lost} == {8}


def test_ranks_of_which_nothing_was_built_have_a_group_of_their_own(tmp_path: Path) -> None:
    rows = [
        dsa_row(batch, isl, 0, batch * isl / 100, heads=heads)
        for batch in (1, 2)
        for isl in (512, 1024)
        for heads in (64, 128)
    ]
    lost = replace(failed_row(1, 512, 0, Fault.CRASH, "signal 11"), key="s-lost", columns={},
                   table="", group="dsa vllm context tp 8")  # fmt: skip
    found = desk(write_collection(tmp_path / "c", [*rows, lost], about()))
    assert [group.name for group in found.tables[0].groups] == [
        "heads 64", "heads 128", "batch 1 (tp 8, nothing measured)",
    ]  # fmt: skip


def test_sizes_of_a_case_are_told_as_the_tables_name_them() -> None:
    phase = {"phase": "context", "batch": 2, "tokens": 512, "past": 128, "mode": "eager"}
    assert sizes_of(phase) == {"batch_size": 2, "isl": 512, "step": 128}
    gemm = {"m": 8, "n": 16, "k": 32, "dtype": "bfloat16", "mode": "graph"}
    assert sizes_of(gemm) == {"m": 8, "n": 16, "k": 32}
    experts = {"tokens": 64, "routing": "balanced", "mode": "graph"}
    assert sizes_of(experts) == {"num_tokens": 64, "distribution": "balanced"}


def test_the_json_holds_every_point_and_every_lost_case(
    damaged: tuple[Desk, dict[str, str]],
) -> None:
    found = damaged[0]
    data = json.loads(json.dumps(desk_json(found), allow_nan=False))
    assert data["schema"] == SCHEMA == "opkit.collection_report/1"
    points = {
        point["key"]: point
        for table in data["tables"]
        for group in table["groups"]
        for panel in group["panels"]
        for point in panel["points"]
    }
    assert points.keys() == marks(found).keys()
    for key, mark in marks(found).items():
        assert points[key]["latency_ms"] == mark.point.latency_ms
        assert points[key]["spread"]["upper"] == mark.point.spread.upper
        assert points[key]["over_bound"] == mark.point.over_bound
    assert [item["why"] for item in data["tables"][0]["lost"]] == [
        "failed", "left out", "not run", "not written",
    ]  # fmt: skip


def test_what_an_interrupted_run_did_not_come_to_is_told(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GIVEN a run of two cases WHEN it is interrupted in the second THEN the grid shows where."""
    measure = bench.row

    def row(group: Group, task: Task) -> Row:
        if task.planned.case.m == 16:
            raise KeyboardInterrupt
        return measure(group, task)

    monkeypatch.setattr(bench, "row", row)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path)
    (table,) = desk(tmp_path / "collect" / "gemm-torch").tables
    assert (table.read.planned, table.read.unseen) == (2, 0)
    (lost,) = table.read.lost
    assert (lost.why, lost.columns["m"], lost.columns["gemm_dtype"]) == ("not run", 16, "bfloat16")
    assert [[(str(cell.state)) for cell in row] for row in table.groups[0].grid.cells] == [
        ["flagged", "not run"]
    ]


def test_a_flag_that_all_rows_have_tells_none_apart(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "c", grid(), about(waiver="no GPU to align on"))
    table = desk(folder).tables[0]
    assert table.common == ("waived",)
    assert not any(table.flagged(point) for point in table.read.points)


def test_a_scaled_row_keeps_its_share_of_spread(rows: list[Row]) -> None:
    """What the other tests' damage is made of."""
    row = next(row for row in rows if row.key == find(rows, heads=128, batch_size=1, isl=4096,
                                                      step=0))  # fmt: skip
    before, after = choose(row.measurement), choose(scaled(row, 1.8).measurement)  # type: ignore[arg-type]
    assert math.isclose(after.ms, 1.8 * before.ms)
    assert DSA.name == "dsa"


@pytest.mark.parametrize("ms", [0, -1.0, float("nan"), float("inf")])
def test_a_row_without_a_time_is_a_broken_file(tmp_path: Path, ms: float) -> None:
    folder = write_collection(tmp_path / "c", grid(), about())
    path = folder / "tables" / "dsa_context_module_perf.provenance.json"
    told = json.loads(path.read_text())
    told["rows"][0]["latency_ms"] = ms
    path.write_text(json.dumps(told))
    with pytest.raises(BadInput, match="not readable"):
        read_collection(folder)
