"""The kernel table: every kernel once, joined to its launch and its graph node, or counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu_export import OTHER_TID, Export
from made_export import OTHER_PID, PID, TID

from opkit.errors import BadInput
from opkit.nsys_parsers.trace import KernelCounts, open_trace

Rows = list[tuple[Any, ...]]


def read(export: Export, path: Path, columns: str, without: tuple[str, ...] = ()) -> Rows:
    """Columns of the kernel table in launch order."""
    with open_trace(export.write(path / "made.sqlite", without)) as trace:
        order = "launch_start, node_start, graph_node, start"
        return trace.rows(f"SELECT {columns} FROM kernel ORDER BY {order}")


def counts(export: Export, path: Path, without: tuple[str, ...] = ()) -> KernelCounts:
    with open_trace(export.write(path / "counted.sqlite", without)) as trace:
        return trace.counts


def two_processes() -> Export:
    """Each process launches kernels with the correlation ids 1 to 3, at other times."""
    made = Export()
    for correlation in (1, 2, 3):
        for tid, pid, at in ((TID, PID, 100), (OTHER_TID, OTHER_PID, 50)):
            made.call(at * correlation, correlation, tid)
            made.kernel(f"k{correlation}", at * correlation + 1_000, correlation, pid=pid)
    return made


def replayed(chain: int, made: Export | None = None) -> Export:
    """One kernel of a graph node that is a clone ``chain`` times over; node 1 was made at 10."""
    made = made or Export()
    for number in range(1, chain + 2):
        made.node(number, 10 * number, origin=number - 1 or None)
        if number > 1:  # nsys writes a second row for a clone, without its origin
            made.node(number, 10 * number)
    made.call(1_000, 7, api="cudaGraphLaunch")
    made.kernel("k", 2_000, 7, node=chain + 1)
    return made


def test_equal_correlation_ids_of_two_processes_never_cross(tmp_path: Path) -> None:
    rows = read(two_processes(), tmp_path, "pid, name, launch_start, launch_tid")
    assert sorted(rows) == [
        (PID, "k1", 100, TID),
        (PID, "k2", 200, TID),
        (PID, "k3", 300, TID),
        (OTHER_PID, "k1", 50, OTHER_TID),
        (OTHER_PID, "k2", 100, OTHER_TID),
        (OTHER_PID, "k3", 150, OTHER_TID),
    ]


def test_a_kernel_of_a_process_without_that_call_stays_unlinked(tmp_path: Path) -> None:
    made = Export()
    made.call(100, 1, TID)
    made.kernel("k", 1_000, 1, pid=OTHER_PID)
    assert read(made, tmp_path, "name, launch_start") == [("k", None)]


def test_kernels_without_a_call_are_kept_and_counted(tmp_path: Path) -> None:
    made = Export()
    made.launch("linked", 100, 1_000)
    made.kernel("began before the window", 500, 99)
    made.kernel("[memset]", 600, 98)
    assert counts(made, tmp_path) == KernelCounts(2, 1, 2, 0, 0)


def test_nested_calls_of_one_id_are_one_launch(tmp_path: Path) -> None:
    made = Export()
    made.call(120, 1)
    made.call(100, 1, api="outer")
    made.kernel("k", 1_000, 1)
    assert read(made, tmp_path, "name, launch_start") == [("k", 100)]


@pytest.mark.parametrize("chain", [0, 1, 2, 3])
def test_clones_lead_to_the_first_creation(chain: int, tmp_path: Path) -> None:
    made = replayed(chain)
    columns = "launch_start, node_start, node_tid, graph_node"
    assert read(made, tmp_path, columns) == [(1_000, 10, TID, chain + 1)]
    assert counts(made, tmp_path) == KernelCounts(1, 0, 0, 1, 0)


@pytest.mark.parametrize("nodes", [((1, 1),), ((1, 2), (2, 1)), ((1, 2), (2, 3), (3, 1))])
def test_a_cycle_of_clones_ends(nodes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    made = Export()
    for node, origin in nodes:
        made.node(node, 10 * node, origin=origin)
    made.launch("k", 1_000, 2_000, node=1)
    rows = read(made, tmp_path, "name, launch_start, node_start IN (10, 20, 30)")
    assert rows == [("k", 1_000, True)]


def test_a_chain_that_leaves_the_export_is_unresolved(tmp_path: Path) -> None:
    made = Export()
    made.node(5, 50, origin=4)
    made.launch("k", 1_000, 2_000, node=5)
    assert read(made, tmp_path, "launch_start, node_start") == [(1_000, None)]
    assert counts(made, tmp_path) == KernelCounts(1, 0, 0, 1, 1)


def test_equal_graph_nodes_of_two_processes_never_cross(tmp_path: Path) -> None:
    made = Export()
    for tid, at in ((TID, 10), (OTHER_TID, 20)):
        made.node(1, at, tid=tid)
        made.node(2, at + 5, origin=1, tid=tid)
        made.launch("k", 1_000 + at, 2_000 + at, tid=tid, node=2)
    assert read(made, tmp_path, "pid, node_start") == [(PID, 10), (OTHER_PID, 20)]


def test_without_node_tables_graph_kernels_are_unresolved(tmp_path: Path) -> None:
    made = replayed(1)
    without = ("CUDA_GRAPH_NODE_EVENTS",)
    assert read(made, tmp_path, "launch_start, node_start", without) == [(1_000, None)]
    assert counts(made, tmp_path, without) == KernelCounts(1, 0, 0, 1, 1)


def test_nodes_without_origins_stand_for_themselves(tmp_path: Path) -> None:
    without = ("CUDA_GRAPH_NODE_EVENTS.originalGraphNodeId",)
    assert read(replayed(2), tmp_path, "node_start", without) == [(30,)]


def test_kernels_of_one_replay_stand_in_capture_order(tmp_path: Path) -> None:
    made = Export()
    for node in (1, 2, 3, 4):
        made.node(node, 10 * node)
        made.node(node + 100, 1_000 + node, origin=node)
    made.call(5_000, 900, api="cudaGraphLaunch")
    # Two streams: the GPU starts the third node first, the fourth before the second.
    for node, start, stream in ((3, 6_000, 13), (1, 6_100, 7), (4, 6_200, 13), (2, 6_300, 7)):
        made.kernel(f"k{node}", start, 900, node=node + 100, stream=stream)
    made.launch("eager before", 4_000, 9_000)
    names = read(made, tmp_path, "name")
    assert [name for (name,) in names] == ["eager before", "k1", "k2", "k3", "k4"]


def test_eager_kernels_stand_in_the_order_of_their_calls(tmp_path: Path) -> None:
    made = Export()
    made.launch("second", 200, 1_000, stream=13)
    made.launch("first", 100, 1_500)
    assert read(made, tmp_path, "name") == [("first",), ("second",)]


def test_copies_and_fills_are_named_and_linked(tmp_path: Path) -> None:
    made = Export()
    made.launch("[memset]", 100, 1_000)
    made.launch("[memcpy DtoD]", 200, 2_000, ns=500)
    made.launch("k", 300, 3_000)
    columns = 'kind, name, launch_start, "end" - start, grid_x'
    assert read(made, tmp_path, columns)[:2] == [
        ("memset", "[memset]", 100, 1_000, None),
        ("memcpy", "[memcpy DtoD]", 200, 500, None),
    ]


@pytest.mark.parametrize(
    ("without", "row"),
    [
        ((), ("k", PID, 10, 100)),
        (("CUPTI_ACTIVITY_KIND_KERNEL.demangledName",), ("k", PID, 10, 100)),
        (("CUPTI_ACTIVITY_KIND_KERNEL.graphNodeId",), ("k", PID, None, 100)),
        # Without processes there is only one: all rows belong together.
        (("CUPTI_ACTIVITY_KIND_KERNEL.globalPid", "CUPTI_ACTIVITY_KIND_KERNEL.graphNodeId"),
         ("k", 0, None, 100)),
        (("CUPTI_ACTIVITY_KIND_RUNTIME",), ("k", PID, 10, None)),
        (("TARGET_INFO_GPU", "CUPTI_ACTIVITY_KIND_MEMSET"), ("k", PID, 10, 100)),
    ],
)  # fmt: skip
def test_columns_and_tables_that_are_not_there(
    without: tuple[str, ...], row: tuple[Any, ...], tmp_path: Path
) -> None:
    made = Export()
    made.node(1, 10)
    made.launch("k", 100, 1_000, node=1)
    made.launch("[memset]", 200, 2_000)
    columns = "name, pid, node_start, launch_start"
    kernels = [r for r in read(made, tmp_path, columns, without) if r[0] != "[memset]"]
    assert kernels == [row]


def test_an_export_without_names_is_refused(tmp_path: Path) -> None:
    made = Export()
    made.launch("k", 100, 1_000)
    with pytest.raises(BadInput, match="holds no names"):
        read(made, tmp_path, "name", ("StringIds",))


def test_a_name_that_is_not_in_the_table_is_said(tmp_path: Path) -> None:
    made = Export()
    made.add("CUPTI_ACTIVITY_KIND_KERNEL", start=1, end=2, demangledName=77, globalPid=PID)
    made.string("another")
    assert read(made, tmp_path, "name") == [("<unnamed kernel>",)]


def test_without_processes_graph_nodes_are_still_found(tmp_path: Path) -> None:
    rows = read(
        replayed(1), tmp_path, "launch_start, node_start", ("CUPTI_ACTIVITY_KIND_KERNEL.globalPid",)
    )
    assert rows == [(1_000, 10)]


def test_a_copy_without_a_process_column_beside_kernels_with_one(tmp_path: Path) -> None:
    made = Export()
    made.launch("k", 100, 1_000)
    made.launch("[memset]", 200, 2_000)
    rows = read(made, tmp_path, "name, launch_start", ("CUPTI_ACTIVITY_KIND_MEMSET.globalPid",))
    assert ("k", 100) in rows
    assert len(rows) == 2


def test_unused_odd_numbers_do_no_harm(tmp_path: Path) -> None:
    made = Export()
    made.kernel("k", 1_000, 1, node=0)  # 0 stands for no node
    made.call(100, 1)
    assert read(made, tmp_path, "graph_node, launch_start") == [(None, 100)]
