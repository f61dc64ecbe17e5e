"""The parsed table: every row once, joined right, whatever tables and columns an export lacks."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_export import OTHER_TID, Export, module
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from made_export import OTHER_PID, PID, TID, make_export
from read_tables import NO_CACHE, Given, Rows, every, lines_run, opened, paths, rows
from slow_oracle import Slow

from opkit.errors import BadInput
from opkit.nsys_parsers import attribution, parse, stacks, strings, table
from opkit.nsys_parsers.reading import Options, Reading, Via
from opkit.nsys_parsers.table import open_table

REPOSITORY = Path(__file__).parents[2]
VLLM = "execute_context_1(4096)_generation_4(4)"
ATTN = "model.layers.5.self_attn"
SUMS = """SELECT count(*), sum("end" - start), sum(launch_start::HUGEINT), sum(node_start::HUGEINT),
    sum(hash(k.rank, k.step, k.via, k.step_via, k.range, k.launch_tid, k.graph_node, k.grid_x)),
    sum(hash(n.name, p.path, p.module, k.start, k.device, k.stream))
    FROM kernel k JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id"""


def read(export: Export, folder: Path, columns: str, without: tuple[str, ...] = ()) -> Rows:
    """Columns of the kernel table (``k``, its name ``n``), ordered."""
    with opened(export, folder, without) as found:
        return found.rows(
            f"SELECT {columns} FROM kernel k JOIN name n ON n.id = k.name_id ORDER BY ALL"
        )


# Launches.


def test_equal_correlation_ids_of_two_processes_never_cross(tmp_path: Path) -> None:
    made = Export()
    for tid, pid, at in ((TID, PID, 100), (OTHER_TID, OTHER_PID, 50)):
        made.range(f"of {pid}", at, 10 * at, tid=tid)
        for correlation in (1, 2):
            made.call(at * correlation, correlation, tid)
            made.kernel("k", at * correlation + 1_000, correlation, pid=pid)
    with opened(made, tmp_path) as found:
        assert every(found, "k.pid, k.launch_start, k.launch_tid, k.rank") == [
            ((PID, 100, TID, 0), Given(f"of {PID}", via=Via.THREAD)),
            ((PID, 200, TID, 0), Given(f"of {PID}", via=Via.THREAD)),
            ((OTHER_PID, 50, OTHER_TID, 1), Given(f"of {OTHER_PID}", via=Via.THREAD)),
            ((OTHER_PID, 100, OTHER_TID, 1), Given(f"of {OTHER_PID}", via=Via.THREAD)),
        ]


def test_kernels_without_a_launch_row_stay_and_are_given_nothing(tmp_path: Path) -> None:
    made = Export()
    made.range("open all the time", 0, None)
    made.range(VLLM, 0, None)
    made.kernel("lost", 500, 77)
    made.kernel("[memset]", 600, 78)
    made.kernel("[memcpy DtoD]", 700, 79)
    made.call(100, 77, OTHER_TID)  # another process
    with opened(made, tmp_path) as found:
        names = "n.name, k.launch_start, k.launch_tid"
        assert every(found, names) == [
            (("[memcpy DtoD]", None, None), Given()),
            (("[memset]", None, None), Given()),
            (("lost", None, None), Given()),
        ]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_of_nested_calls_the_outermost_is_the_launch(
    order: tuple[int, ...], tmp_path: Path
) -> None:
    """An annotation pushed between the outer and the inner call does not cover the outer."""
    made = Export()
    made.range("inner", 105, 500)
    calls = ((100, 77), (110, 77), (120, 77))
    for number in order:
        made.call(*calls[number])
    made.kernel("k", 9_000, 77)
    made.launch("other", 200, 9_900)
    with opened(made, tmp_path) as found:
        assert every(found, "n.name, k.launch_start") == [
            (("k", 100), Given()),
            (("other", 200), Given("inner", via=Via.THREAD)),
        ]


def test_a_launch_of_many_kernels_gives_all_the_same(tmp_path: Path) -> None:
    made = Export()
    made.range(VLLM, 100, 500)
    made.call(150, 1, api="cudaGraphLaunch")
    for i in range(500):
        made.kernel("k", 9_000 + i, 1)
    with opened(made, tmp_path) as found:
        assert found.rows("SELECT count(*), count(DISTINCT start), min(step), max(step), "
                          "min(launch_start), max(launch_start) FROM kernel") == [
            (500, 500, 0, 0, 150, 150)
        ]  # fmt: skip


@pytest.mark.parametrize("chunk", [7, 299])
def test_calls_placed_in_pieces(
    chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = Export()
    for i in range(30):
        made.range(f"r{i}", 100 * i, 100 * i + 99)
    for i in range(300):
        made.launch(f"k{i}", 10 * i, 9_000 + i)
    monkeypatch.setattr(parse, "CHUNK", chunk)
    assert paths(made, tmp_path) == {f"k{i}": f"r{i // 10}" for i in range(300)}


# Graph nodes.


def test_clones_of_clones_lead_to_the_first_creation(tmp_path: Path) -> None:
    made = Export()
    for chain in (0, 1, 2, 15):  # how many times over the node is a clone
        at = 10_000 * chain
        made.range(f"capture {chain}", at + 5, at + 15)
        for number in range(1, chain + 2):
            node, origin = at + number, at + number - 1 if number > 1 else None
            made.node(node, at + 10 * number, origin=origin)
            if origin:  # nsys writes a second row for a clone, without its origin
                made.node(node, at + 10 * number)
        made.launch(f"k{chain}", 900_000 + at, 950_000 + at, node=at + chain + 1)
    with opened(made, tmp_path) as found:
        assert every(found, "n.name, k.node_start, k.node_tid") == [
            ((f"k{chain}", 10_000 * chain + 10, TID), Given(f"capture {chain}", via=Via.NODE))
            for chain in (0, 1, 15, 2)
        ]


def test_a_cycle_of_clones_ends(tmp_path: Path) -> None:
    made = Export()
    for length in (1, 2, 3, 16, 17, 40):
        for node in range(1, length + 1):
            made.node(1_000 * length + node, 10, origin=1_000 * length + node % length + 1)
        made.launch("k", 1_000, 2_000, node=1_000 * length + 1)
    assert read(made, tmp_path, "node_start") == [(10,)] * 6


def test_equal_graph_nodes_of_two_processes_never_cross(tmp_path: Path) -> None:
    made = Export()
    for tid, at in ((TID, 10), (OTHER_TID, 20)):
        made.range(f"capture {at}", at, at + 3, tid=tid)
        made.node(1, at + 1, tid=tid)
        made.node(2, at + 5, origin=1, tid=tid)
        made.launch(f"k{at}", 1_000 + at, 2_000 + at, tid=tid, node=2)
    assert paths(made, tmp_path) == {"k10": "capture 10", "k20": "capture 20"}


def test_nodes_of_older_schemas_are_in_another_table(tmp_path: Path) -> None:
    made = Export()
    made.range("capture", 5, 15)
    made.launch("k", 1_000, 2_000, node=1)
    made.node(1, 10)
    path = made.write(tmp_path / "made.sqlite")
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE CUDA_GRAPH_NODE_EVENTS RENAME TO CUDA_GRAPH_EVENTS")
    assert rows(path, "SELECT node_start FROM kernel") == [(10,)]


# What may be missing.


def whole() -> Export:
    """One of everything: an eager kernel, one of a graph, a copy and a fill, ranges of two kinds
    of text."""
    made = Export()
    made.range(module(ATTN), 5, 15)
    made.node(1, 10)
    made.node(101, 20, origin=1)
    made.range(VLLM, 100, 900)
    made.range("forward", 110, 890, registered=True)
    made.launch("eager", 120, 9_000)
    made.launch("replayed", 130, 9_100, node=101)
    made.launch("[memset]", 140, 9_200)
    made.launch("[memcpy DtoD]", 150, 9_300)
    return made


EAGER = Given("forward", "", VLLM, Via.THREAD, Via.THREAD)
NODE = Given(ATTN, ATTN, VLLM, Via.NODE, Via.THREAD)
BARE = Given("", "", VLLM, Via.NONE, Via.THREAD)
ALL = {"eager": EAGER, "replayed": NODE, "[memset]": EAGER, "[memcpy DtoD]": EAGER}
K, R, N = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"


@pytest.mark.parametrize(
    ("without", "change"),
    [
        ((), {}),
        ((R,), dict.fromkeys(ALL, Given()) | {"replayed": Given(ATTN, ATTN, via=Via.NODE)}),
        ((N,), dict.fromkeys(ALL, Given())),
        ((R, N), dict.fromkeys(ALL, Given())),
        (("CUPTI_ACTIVITY_KIND_MEMCPY",), {"[memcpy DtoD]": None}),
        (("CUPTI_ACTIVITY_KIND_MEMSET",), {"[memset]": None}),
        (("CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET"),
         {"[memset]": None, "[memcpy DtoD]": None}),
        (("CUDA_GRAPH_NODE_EVENTS",), {"replayed": EAGER}),
        (("CUDA_GRAPH_NODE_EVENTS.originalGraphNodeId",), {"replayed": EAGER}),
        ((f"{K}.graphNodeId",), {"replayed": EAGER}),
        ((f"{K}.globalPid",), {}),  # one process: all rows belong together
        ((f"{K}.globalPid", "CUPTI_ACTIVITY_KIND_MEMCPY.globalPid",
          "CUPTI_ACTIVITY_KIND_MEMSET.globalPid"), {}),
        ((f"{K}.gridX", f"{K}.blockZ"), {}),
        ((f"{K}.demangledName",), {}),
        ((f"{K}.shortName",), {}),
        (("CUPTI_ACTIVITY_KIND_MEMCPY.copyKind",), {"[memcpy DtoD]": None, "[memcpy]": EAGER}),
        ((f"{N}.textId",), dict.fromkeys(ALL, BARE) | {"replayed": NODE}),
        ((f"{N}.text",), {"replayed": EAGER._replace(step=None, step_via=Via.NONE)}
         | {name: EAGER._replace(step=None, step_via=Via.NONE) for name in ALL}),
        ((f"{N}.endGlobalTid",), {}),
        ((f"{N}.eventType",), {}),
        ((f"{N}.globalTid",), dict.fromkeys(ALL, Given())),
        ((f"{R}.nameId",), {}),
        (("TARGET_INFO_GPU",), {}),
        (("META_DATA_EXPORT",), {}),
    ],
)  # fmt: skip
def test_tables_and_columns_that_are_not_there(
    without: tuple[str, ...], change: dict[str, Given | None], tmp_path: Path
) -> None:
    with opened(whole(), tmp_path, without) as found:
        what = {name: kernel for (name,), kernel in every(found, "n.name")}
    assert what == {name: kernel for name, kernel in (ALL | change).items() if kernel is not None}


def test_sizes_that_are_not_there_are_null(tmp_path: Path) -> None:
    got = read(whole(), tmp_path, "n.name, grid_x, grid_y, block_x, block_z", (f"{K}.gridX",))
    assert got[2:] == [("eager", None, 1, 256, 1), ("replayed", None, 1, 256, 1)]
    assert got[0] == ("[memcpy DtoD]", None, None, None, None)


def test_an_export_without_names_is_refused(tmp_path: Path) -> None:
    made = Export()
    made.launch("k", 100, 1_000)
    with pytest.raises(BadInput, match="holds no names"):
        opened(made, tmp_path, ("StringIds",))


# Names and copies.


def test_every_kind_of_copy_has_a_name(tmp_path: Path) -> None:
    made = Export()
    for kind in [*range(14), 77]:
        made.add("CUPTI_ACTIVITY_KIND_MEMCPY", start=1, end=2, copyKind=kind, globalPid=PID)
    made.launch("k", 100, 1_000)
    got = dict(read(made, tmp_path, "n.name, count(*) OVER (PARTITION BY n.name)"))
    named = {"HtoD", "DtoH", "HtoA", "AtoH", "DtoD", "HtoH", "PtoP"}
    assert got == {"k": 1, "[memcpy]": 15 - 7} | {f"[memcpy {kind}]": 1 for kind in named}


def same_names(folder: Path) -> table.KernelTable:
    """Kernels, copies and ranges whose names are equal and whose ids are not."""
    made = Export()
    for kind in (0, 5, 77):
        made.add("CUPTI_ACTIVITY_KIND_MEMCPY", start=1, end=2, copyKind=kind, globalPid=PID)
    for number in (901, 902):
        made.add("StringIds", id=number, value="twice")
        made.add(K, start=5, end=6, demangledName=number, globalPid=PID, correlationId=number)
        made.call(100 * number, number)
        made.range(f"aten::mm, op_id = {number}", 100 * number - 10, 100 * number + 10)
    for number in (903, 904):  # no such text
        made.add(K, start=5, end=6, demangledName=number, globalPid=PID)
    return opened(made, folder)


def test_one_name_has_one_id(tmp_path: Path) -> None:
    with same_names(tmp_path) as found:
        counts = "SELECT n.name, count(DISTINCT k.name_id), count(*) FROM kernel k"
        assert found.rows(f"{counts} JOIN name n ON n.id = k.name_id GROUP BY 1 ORDER BY 1") == [
            ("<unnamed kernel>", 1, 2), ("[memcpy]", 1, 3), ("twice", 1, 2),
        ]  # fmt: skip


def test_one_path_has_one_id(tmp_path: Path) -> None:
    with same_names(tmp_path) as found:
        counts = "SELECT p.path, count(DISTINCT k.path_id), count(*) FROM kernel k"
        assert found.rows(f"{counts} JOIN path p ON p.id = k.path_id GROUP BY 1 ORDER BY 1") == [
            ("", 1, 5), ("aten::mm", 1, 2),
        ]  # fmt: skip


def test_a_range_with_an_empty_text_gives_no_path(tmp_path: Path) -> None:
    """``path_id <> 0`` is how views ask for kernels in a range."""
    made = Export()
    made.range("", 100, 200)
    made.launch("k", 150, 9_000)
    made.range("outer", 300, 500)
    made.range("", 310, 490)
    made.launch("inside", 350, 9_500)
    found = read(made, tmp_path, "n.name, k.path_id = 0")
    assert found == [("inside", False), ("k", True)]
    (tmp_path / "again").mkdir()
    assert paths(made, tmp_path / "again")["inside"] == "outer"


# Against a slow, independent reading, on exports of any shape.

TIMES, FEW = st.integers(0, 60), st.integers(1, 6)
THREADS = st.integers(0, 2)
TEXTS = st.sampled_from(
    ["a", "b, op_id = 1", "b, op_id = 2", VLLM, module("m.1"), module("m.1", True), module("m.2.x")]
)
PROCESS = st.fixed_dictionaries(
    {
        "ranges": st.lists(
            st.tuples(THREADS, TIMES, st.none() | TIMES, TEXTS, st.booleans()), max_size=12
        ),
        "calls": st.lists(st.tuples(THREADS, TIMES, FEW), max_size=8),
        "nodes": st.lists(st.tuples(THREADS, TIMES, FEW, st.none() | FEW), max_size=6),
        "kernels": st.lists(st.tuples(FEW, st.none() | FEW), min_size=1, max_size=8),
    }
)


# Not made smaller when it fails: that takes minutes, and processes are small already.
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(PROCESS, min_size=3, max_size=10), st.booleans())
def test_made_exports_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory, processes: list[Any], other_threads: bool
) -> None:
    """Processes whose threads, correlation ids and graph nodes are numbered alike."""
    made = Export()
    for number, process in enumerate(processes):
        pid = PID + (number << 24)
        for thread, start, end, text, registered in process["ranges"]:
            made.range(text, start, end, tid=pid + thread, registered=registered)
        for thread, start, correlation in process["calls"]:
            made.call(start, correlation, pid + thread)
        for thread, start, node, origin in process["nodes"]:
            made.node(node, start, origin, pid + thread)
        for i, (correlation, node) in enumerate(process["kernels"]):
            made.kernel(f"k{number}.{i}", 100, correlation, pid=pid, node=node)
    folder = tmp_path_factory.mktemp("any")
    with opened(made, folder, other_threads=other_threads) as found:
        got = every(found, "n.name, k.launch_start, k.node_start")
    slow = Slow(folder / "made.sqlite", other_threads)
    for (name, launched, created), what in got:
        wanted = slow.kernel(name)
        assert launched in wanted.launches
        assert created in wanted.nodes
        assert what in wanted.given
    assert len(got) == sum(len(process["kernels"]) for process in processes)


# Size.


def test_nothing_is_done_in_python_for_each_kernel_or_range(tmp_path: Path) -> None:
    def lines(many: int) -> int:
        made = Export()
        for i in range(many):
            made.range(("a", "b", VLLM)[i % 3], 100 * i, 100 * i + 99)
            made.launch("k", 100 * i + 50, 1_000_000 + i)
        folder = tmp_path / str(many)
        folder.mkdir()
        modules = (attribution, parse, stacks, strings, table)
        count, found = lines_run(lambda: opened(made, folder), *modules)
        found.close()
        return count

    assert lines(5_000) < lines(500) + 300


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300,000 kernels: a recording many times over."""
    sys.path.append(str(REPOSITORY / "benchmarks"))
    try:
        import big_export
    finally:
        sys.path.pop()
    path = tmp_path_factory.mktemp("big") / "big.sqlite"
    recording = REPOSITORY / "tests/traces/h100-process-e2e.sqlite.gz"
    assert big_export.replicate(recording, path, 300_000) >= 300_000
    return path


def test_memory_does_not_change_the_table(big: Path) -> None:
    wanted = rows(big, SUMS)
    assert wanted[0][0] > 300_000
    assert rows(big, SUMS, Reading(memory="128MB", use_cache=False)) == wanted


def test_too_little_memory_is_said(big: Path) -> None:
    """Not that the export is damaged, which it is not."""
    with pytest.raises(BadInput) as caught:
        rows(big, SUMS, Reading(memory="16MB", use_cache=False))
    assert "memory" in (caught.value.hint or "")
    assert "damaged" not in f"{caught.value} {caught.value.hint}"
    assert "export the report again" not in (caught.value.hint or "")


@pytest.mark.parametrize("memory", ["", "much", "1"])
def test_an_amount_of_memory_that_is_none(memory: str, tmp_path: Path) -> None:
    path = make_export(tmp_path / "made.sqlite")
    with pytest.raises(BadInput, match="memory"):
        open_table([path], Reading(memory=memory, use_cache=False))


def test_the_export_is_only_read_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = make_export(tmp_path / "it's made; DROP.sqlite")
    before = path.read_bytes()
    with open_table([path], NO_CACHE) as found:
        assert found.rows("SELECT count(*) FROM kernel") == [(27,)]
        assert list(scratch.iterdir())
    assert path.read_bytes() == before
    assert not list(scratch.iterdir())
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, "scratch"]
    with pytest.raises(BadInput):
        open_table([path], Reading(Options("("), use_cache=False))
    assert not list(scratch.iterdir())


def test_whole_numbers_keep_their_size(tmp_path: Path) -> None:
    """Times and serialised ids of 63 bits."""
    far = 2**62 - 10_000
    made = Export()
    tid = (2**39 - 1) << 24 | 0xFFFFFF
    made.range("r", far, far + 500, tid=tid)
    made.launch("k", far + 100, far + 2_000, tid=tid, grid=(2**31 - 1, 65_535, 65_535))
    got = read(made, tmp_path, "launch_start, launch_tid, k.pid, start, grid_x")
    assert got == [(far + 100, tid, tid & ~0xFFFFFF, far + 2_000, 2**31 - 1)]
    assert np.iinfo(np.int64).max > far
    (tmp_path / "again").mkdir()
    assert paths(made, tmp_path / "again") == {"k": "r"}
