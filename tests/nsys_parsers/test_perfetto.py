"""The trace for Perfetto: everything selected is in it, and drawn so that nothing is lost."""

from __future__ import annotations

import gzip
import json
import resource
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_export import Export, module
from hypothesis import given, settings
from hypothesis import strategies as st
from made_export import EAGER_STEP, OTHER_PID, PID, TID, make_export
from read_tables import NO_CACHE, opened

from opkit.errors import BadInput
from opkit.nsys_parsers.table import KernelTable, open_table
from opkit.nsys_parsers.views.perfetto import lanes, nested_lanes, write_perfetto
from opkit.nsys_parsers.views.view import Selection

RECORDED = Path(__file__).parents[1] / "traces"
ALL = Selection()
FLOWS = ("flow_in", "flow_out")


@dataclass(frozen=True)
class Slice:
    """A slice as a viewer reads it: times in ns, its row by name."""

    process: str
    row: str
    name: str
    start: int
    end: int
    event: dict[str, Any]

    @property
    def executed(self) -> bool:
        return self.event["cat"] not in ("step", "module", "range", "launch")


def read(path: Path) -> list[Slice]:
    """All slices, after what must hold for each file."""
    events = json.loads(path.read_bytes())["traceEvents"]
    named: dict[str, dict[Any, str]] = {"process_name": {}, "thread_name": {}}
    sorted_by = set()
    for event in events:
        assert event["ph"] in ("M", "X")
        key = (event["pid"], event["tid"]) if "tid" in event else event["pid"]
        if event["name"].endswith("_name"):
            assert key not in named[event["name"]], "a row with two names"
            named[event["name"]][key] = event["args"]["name"]
        elif event["ph"] == "M":
            sorted_by.add(key)
    processes, rows = named["process_name"], named["thread_name"]
    ids = list(processes) + [tid for _, tid in rows]
    assert len(set(ids)) == len(ids)
    assert sorted(ids) == list(range(1, len(ids) + 1))
    assert sorted_by == {*processes, *rows}
    slices = []
    for event in filter(lambda event: event["ph"] == "X", events):
        start, length = round(event["ts"] * 1000), round(event["dur"] * 1000)
        on = (processes[event["pid"]], rows[event["pid"], event["tid"]])
        slices.append(Slice(*on, event["name"], start, start + length, event))
    assert min(each.start for each in slices) == 0
    return slices


def crossings(slices: list[Slice]) -> list[tuple[Slice, Slice]]:
    """Slices of one row that overlap and do not nest; in the order of the file where they start
    together, as a viewer takes them. On a stream nesting counts too: no kernel is part of one."""
    found, rows = [], defaultdict(list)
    for each in slices:
        rows[each.process, each.row].append(each)
    for (_, name), row in rows.items():
        open_now: list[Slice] = []
        for each in sorted(row, key=lambda s: s.start):
            while open_now and open_now[-1].end <= each.start:
                open_now.pop()
            if open_now and (open_now[-1].end < each.end or "stream" in name):
                found.append((open_now[-1], each))
            open_now.append(each)
    return found


def written(
    table: KernelTable, folder: Path, selection: Selection = ALL, **more: int
) -> list[Slice]:
    """The slices of a trace that was written now, checked for what must always hold."""
    path = folder / "trace.json"
    count = write_perfetto(table, selection, path, **more)
    slices = read(path)
    assert crossings(slices) == []
    where = selection.where(table)
    said = 'SELECT n.short, k."end" - k.start, k.grid_x FROM kernel k'
    rows = table.rows(f"{said} JOIN name n ON n.id = k.name_id WHERE {where}")
    shown = [
        (s.name, s.end - s.start, int(s.event["args"].get("grid", "0").split(",")[0]) or None)
        for s in slices
        if s.executed
    ]
    assert Counter(shown) == Counter(rows)
    assert count == len(rows)
    return slices


# Real traces.


@pytest.mark.parametrize("name", ["h100-process-e2e", "h100-strict-e2e"])
def test_a_real_trace_is_complete_and_nests(name: str, tmp_path: Path) -> None:
    with open_table([RECORDED / f"{name}.sqlite.gz"], NO_CACHE) as table:
        slices = written(table, tmp_path)
        found = Counter(s.event["cat"] for s in slices if not s.executed)
        steps, ranges = (table.rows(f"SELECT count(*) FROM {t}")[0][0] for t in ("step", "range"))
        eager = table.rows(
            "SELECT count(*) FROM kernel WHERE kind = 'kernel' AND graph_node IS NULL "
            "AND launch_start IS NOT NULL"
        )[0][0]
    assert (found["step"], found["module"] + found["range"]) == (steps, ranges)
    assert found["launch"] == eager > 0


def test_times_are_exact_to_the_ns_and_begin_with_the_first_event(tmp_path: Path) -> None:
    with open_table([RECORDED / "h100-process-e2e.sqlite.gz"], NO_CACHE) as table:
        slices = written(table, tmp_path)
        rows = table.rows('SELECT start, "end" FROM kernel ORDER BY ALL')
    first = min(start for start, _ in rows)  # in this trace a fill comes before any launch
    assert sorted((s.start + first, s.end + first) for s in slices if s.executed) == rows


def test_a_selected_step_brings_its_kernels_and_ranges_only(tmp_path: Path) -> None:
    with open_table([RECORDED / "h100-process-e2e.sqlite.gz"], NO_CACHE) as table:
        slices = written(table, tmp_path, Selection(step="0"))
    step = [s for s in slices if s.event["cat"] == "step"]
    modules = [s for s in slices if s.event["cat"] == "module"]
    assert [s.event["args"]["step"] for s in step] == [0]
    assert len(modules) > 50
    assert all(step[0].start <= s.start <= s.end <= step[0].end for s in modules)
    assert {s.event["args"]["label"] for s in slices if s.executed} == {step[0].name}


def test_a_selected_module_brings_its_ranges_and_the_steps_it_ran_in(tmp_path: Path) -> None:
    with open_table([make_export(tmp_path / "made.sqlite")], NO_CACHE) as table:
        slices = written(table, tmp_path, Selection(module=r"layers\.1\.mlp"))
    host = Counter((s.name, s.event["cat"]) for s in slices if not s.executed)
    assert host == {(EAGER_STEP, "step"): 3, ("mlp", "module"): 3, ("launch", "launch"): 3}


# What a slice says.


def test_a_slice_tells_where_its_kernel_comes_from(tmp_path: Path) -> None:
    with open_table([make_export(tmp_path / "made.sqlite")], NO_CACHE) as table:
        slices = written(table, tmp_path, Selection(step="0"))
        name = table.rows("SELECT name FROM name WHERE short LIKE '%topKPerRow%'")[0][0]
    told = min((s for s in slices if "topKPerRow" in s.name), key=lambda s: s.start)
    assert told.event["args"] == {
        "demangled": name, "module": "model.layers.0.self_attn", "step": 0, "label": EAGER_STEP,
        "mode": "eager", "grid": "8,1,1", "block": "0,0,0",
    }  # fmt: skip
    assert told.process == f"rank 0 · GPU 0 · pid {PID >> 24 & 0xFFFFFF}"
    assert told.row.startswith("GPU 0 · stream 7")


def test_copies_have_no_grid_and_graphs_are_told_from_eager(tmp_path: Path) -> None:
    made = Export()
    made.launch("[memset]", 100, 200)
    made.launch("k", 300, 400, node=11)
    with opened(made, tmp_path) as table:
        told = {s.name: s.event["args"] for s in written(table, tmp_path) if s.executed}
    assert told["[memset]"] == {"demangled": "[memset]", "mode": "eager"}
    assert told["k"]["mode"] == "graph"


HOSTILE = "a\"b\\c\n\t\x01/{}<pid>,\u2028\ufffdé🔥 'quoted'"


def test_any_text_is_valid_json(tmp_path: Path) -> None:
    made = Export()
    made.range(HOSTILE, 100, 900)
    made.range(f"execute_context_1(1)_generation_0(0){HOSTILE}", 150, 800)
    made.launch(HOSTILE, 200, 1_000)
    with opened(made, tmp_path) as table:
        slices = written(table, tmp_path)
    (told,) = (s.event["args"] for s in slices if s.executed)
    assert told["demangled"] == told["module"] == told["label"][-len(HOSTILE) :] == HOSTILE
    assert HOSTILE in [s.name for s in slices if s.event["cat"] == "range"]


def test_a_range_is_named_by_the_last_part_of_its_module(tmp_path: Path) -> None:
    made = Export()
    made.range(module("model.layers.5.self_attn"), 100, 900)
    made.range("aten::mm, op_id = 77", 200, 300)
    made.launch("k", 250, 1_000)
    with opened(made, tmp_path) as table:
        host = {s.name: s.event["args"] for s in written(table, tmp_path) if not s.executed}
    assert host["self_attn"]["path"] == "model.layers.5.self_attn"
    assert host["aten::mm"] == {
        "path": "model.layers.5.self_attn/aten::mm", "text": "aten::mm, op_id = 77"
    }  # fmt: skip


# Lanes.


def test_kernels_that_overlap_on_one_stream_get_lanes(tmp_path: Path) -> None:
    made = Export()
    for name, start, ns in (("a", 1000, 100), ("b", 1050, 100), ("c", 1100, 20), ("d", 1120, 99)):
        made.launch(name, 10, start, ns=ns)
    made.launch("a", 10, 5000, ns=10)
    made.launch("a", 10, 5010, ns=10)
    for ns in (100, 100, 100, 0):
        made.launch("e", 10, 9000, ns=ns)
    with opened(made, tmp_path) as table:
        slices = written(table, tmp_path)
    rows = {name: [s.row for s in slices if s.name == name] for name in "abcde"}
    first, second = "GPU 0 · stream 7", "GPU 0 · stream 7 (2)"
    assert (rows["a"], rows["b"]) == ([first] * 3, [second])
    assert rows["c"] == rows["d"] == [first]
    assert len(set(rows["e"])) == 4


def test_a_range_that_crosses_moves_with_what_it_holds(tmp_path: Path) -> None:
    made = Export()
    ends = {"a": 200, "in a": 190, "crosses": 300, "in it": 290, "after": 400}
    for (text, end), start in zip(ends.items(), (100, 110, 150, 210, 300), strict=True):
        made.range(text, start, end, kind=60)
    made.launch("k", 160, 1_000)
    with opened(made, tmp_path) as table:
        slices = written(table, tmp_path)
    found = {s.name: s.row for s in slices if s.event["cat"] == "range"}
    main = f"thread {TID & 0xFFFFFF}"
    assert {name for name, row in found.items() if row == main} == {"a", "in a", "after"}
    assert {name for name, row in found.items() if row == f"{main} (2)"} == {"crosses", "in it"}


def test_a_range_still_open_ends_with_the_last_event(tmp_path: Path) -> None:
    made = Export()
    made.range("open", 100, None)
    made.range("closed", 200, 300)
    made.launch("k", 250, 1_000, ns=700)
    with opened(made, tmp_path) as table:
        ends = {s.name: (s.start, s.end) for s in written(table, tmp_path)}
    assert ends == {"open": (0, 1600), "closed": (100, 200), "launch": (150, 150), "k": (900, 1600)}


INTERVALS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 12)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(INTERVALS)
def test_lanes_never_overlap_and_are_as_few_as_can_be(
    given_rows: list[tuple[int, int, int]],
) -> None:
    track, start, length = np.array(given_rows, np.int64).reshape(-1, 3).T
    end = np.maximum(start + length, start + 1)
    lane = lanes(track, start, start + length)
    for i in range(len(lane)):
        for j in range(i):
            if (track[i], lane[i]) == (track[j], lane[j]):
                assert end[i] <= start[j] or end[j] <= start[i]
    for one in set(track.tolist()):
        mine = track == one
        most = max(((start[mine] <= at) & (at < end[mine])).sum() for at in start[mine])
        assert sorted(set(lane[mine].tolist())) == list(range(most))


@settings(max_examples=300, deadline=None)
@given(INTERVALS)
def test_nested_lanes_hold_what_nests(given_rows: list[tuple[int, int, int]]) -> None:
    ordered = sorted(given_rows, key=lambda row: (row[0], row[1], -row[2]))
    track, start, length = np.array(ordered, np.int64).reshape(-1, 3).T
    end = start + length
    lane = nested_lanes(track, start, end)
    crossing = set()
    for i in range(len(lane)):
        for j in range(i):
            if track[i] == track[j] and start[j] < start[i] < end[j] < end[i]:
                crossing.add(track[i])
                assert lane[i] != lane[j]
    empty = set(track[length == 0].tolist())
    assert all(lane[track == one].max() == 0 for one in set(track.tolist()) - crossing - empty)


# Arrows.


def test_an_arrow_leads_from_each_eager_launch_to_its_kernel(tmp_path: Path) -> None:
    with open_table([make_export(tmp_path / "made.sqlite")], NO_CACHE) as table:
        slices = written(table, tmp_path, arrows=24)
        none = written(table, tmp_path, arrows=23)
        called = table.rows(
            "SELECT launch_start - (SELECT min(start) FROM range), name_id FROM kernel "
            "WHERE graph_node IS NULL AND launch_start IS NOT NULL ORDER BY ALL"
        )
        ids = dict(table.rows("SELECT short, id FROM name"))
    into, out = ({s.event["bind_id"]: s for s in slices if f in s.event} for f in FLOWS)
    assert len(into) == len(out) == 24
    assert sorted((s.start, ids[into[key].name]) for key, s in out.items()) == called
    assert all(s.process == into[key].process for key, s in out.items())
    assert [s for s in none if "bind_id" in s.event or s.event["cat"] == "launch"] == []


# Ranks.


def of_ranks(folder: Path, begun: list[int]) -> KernelTable:
    """Two files of one kernel each, their sessions begun at these times."""
    paths = [folder / f"rank{number}.sqlite" for number in range(2)]
    for number, path in enumerate(paths):
        made = Export()
        if begun:
            made.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=begun.pop(0))
        # One took a ns longer, or the files would be two copies of one recording.
        made.launch("k", 10, 1_000, ns=1_000 + number)
        made.write(path)
    return open_table(paths, NO_CACHE)


def test_ranks_of_several_files_have_processes_of_their_own(tmp_path: Path) -> None:
    with of_ranks(tmp_path, [0, 1_000]) as table:
        slices = written(table, tmp_path)
        one = written(table, tmp_path, Selection(rank=1))
    pid = PID >> 24 & 0xFFFFFF
    shown = [(s.process, s.start) for s in sorted(slices, key=lambda s: s.start) if s.executed]
    assert shown == [(f"rank 0 · GPU 0 · pid {pid}", 990), (f"rank 1 · GPU 0 · pid {pid}", 1_990)]
    assert {s.process for s in one} == {f"rank 1 · GPU 0 · pid {pid}"}


def test_a_file_with_its_own_clock_says_so(tmp_path: Path) -> None:
    with of_ranks(tmp_path, []) as table:
        processes = {s.process for s in written(table, tmp_path)}
    said = {name.rpartition(" · ")[2] for name in processes}
    assert said == {"rank0.sqlite (own clock)", "rank1.sqlite (own clock)"}


def test_a_process_that_only_copies_stands_last_without_a_rank(tmp_path: Path) -> None:
    made = Export()
    made.launch("[memset]", 100, 200, tid=TID)
    made.launch("k", 100, 200, tid=OTHER_PID + 5)
    with opened(made, tmp_path) as table:
        slices = written(table, tmp_path)
    order = {s.event["pid"]: s.process for s in slices}
    number = [f"pid {pid >> 24 & 0xFFFFFF}" for pid in (OTHER_PID, PID)]
    assert order == {1: f"rank 0 · GPU 0 · {number[0]}", 2: f"GPU 0 · {number[1]}"}


# The file.


def test_gzip_by_name(tmp_path: Path) -> None:
    with open_table([make_export(tmp_path / "made.sqlite")], NO_CACHE) as table:
        write_perfetto(table, ALL, tmp_path / "t.json")
        write_perfetto(table, ALL, tmp_path / "t.json.gz")
    packed = (tmp_path / "t.json.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "t.json").read_bytes()


def test_nothing_selected_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    made = make_export(tmp_path / "made.sqlite")
    refused = pytest.raises(BadInput, match="nothing was launched in module no_such")
    with open_table([made], NO_CACHE) as table, refused:
        write_perfetto(table, Selection(module="no_such"), tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_damaged_times_are_one_sentence(tmp_path: Path) -> None:
    made = Export()
    made.launch("k", 10, 1_000)
    made.launch("k", 10, 2 * 10**18)  # 63 years later
    with opened(made, tmp_path) as table, pytest.raises(BadInput, match=r"times .* damaged"):
        write_perfetto(table, ALL, tmp_path / "t.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made.sqlite"]


def test_what_cannot_be_written_leaves_the_old_file_and_the_table_usable(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_table([RECORDED / "h100-process-e2e.sqlite.gz"], NO_CACHE) as table:
        with pytest.raises(OSError, match="missing"):
            write_perfetto(table, ALL, tmp_path / "missing" / "t.json")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
        try:
            with pytest.raises(OSError, match=r"t\.json"):
                write_perfetto(table, ALL, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert table.rows("SELECT current_setting('preserve_insertion_order')") == [(False,)]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json"]
        assert path.read_text() == "old"
        assert write_perfetto(table, ALL, path) == len(table.rows("SELECT 1 FROM kernel"))
    assert read(path)
