"""Whose ranges count: threads that label nothing, and nodes of graphs made elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_export import OTHER_TID, Export, module
from made_export import OTHER_PID, PID, TID
from read_tables import Given, given, launched, opened, paths

from opkit.nsys_parsers.reading import Via

AUTOGRAD = TID + 1  # another thread of the same process
VLLM = "execute_context_1(4096)_generation_4(4)"
ATTN = "model.layers.5.self_attn"


# Other threads.


def backward() -> Export:
    """A step and a module of the main thread; the kernels come from a thread without ranges."""
    made = launched((VLLM, 100, 500), (module(ATTN), 120, 300), tid=AUTOGRAD)
    made.launch("after", 400, 9_500, tid=AUTOGRAD)
    made.launch("outside", 600, 9_600, tid=AUTOGRAD)
    return made


def test_a_thread_without_ranges_gets_what_another_had_open(tmp_path: Path) -> None:
    assert given(backward(), tmp_path) == {
        "k": Given(ATTN, ATTN, VLLM, Via.TIME, Via.TIME),
        "after": Given("", "", VLLM, Via.NONE, Via.TIME),
        "outside": Given(),
    }


def test_other_threads_can_be_left_out(tmp_path: Path) -> None:
    found = given(backward(), tmp_path, other_threads=False)
    assert found == dict.fromkeys(("k", "after", "outside"), Given())


def test_a_thread_with_ranges_of_its_own_gets_no_others(tmp_path: Path) -> None:
    made = backward()
    made.range("own", 700, 800, tid=AUTOGRAD)
    found = given(made, tmp_path)
    assert found["k"] == Given("", "", VLLM, Via.NONE, Via.TIME)  # it labels no steps of its own
    made.range(VLLM, 700, 800, tid=AUTOGRAD)
    (tmp_path / "again").mkdir()
    assert given(made, tmp_path / "again")["k"] == Given()


def test_no_process_gets_what_another_had_open(tmp_path: Path) -> None:
    made = launched((VLLM, 100, 500), (module(ATTN), 120, 300), tid=OTHER_TID)
    assert given(made, tmp_path) == {"k": Given()}


def test_the_range_begun_last_of_several_threads_is_innermost(tmp_path: Path) -> None:
    made = Export()
    made.range("one", 100, 500, tid=TID)
    made.range("two", 120, 400, tid=TID + 2)
    made.range("foreign", 130, 400, tid=OTHER_TID)
    for name, called in (("a", 110), ("b", 150), ("c", 450)):
        made.launch(name, called, 9_000 + called, tid=AUTOGRAD)
    assert paths(made, tmp_path) == {"a": "one", "b": "two", "c": "one"}


# Kernels of graphs.


def captured(node_at: int, call_at: int, tid: int = TID) -> Export:
    """A graph of one node, cloned; captured inside ``ATTN`` (1,000 to 2,000) or not; replayed
    inside a step and a range ``replay`` (5,000 to 6,000) or not."""
    made = Export()
    made.range(module(ATTN), 1_000, 2_000)
    made.range("rope", 1_100, 1_200)
    made.range(VLLM, 5_000, 6_000)
    made.range("replay", 5_100, 5_900)
    made.node(7, node_at, tid=tid)
    made.node(107, 3_000, origin=7, tid=tid)
    made.node(107, 3_000, tid=tid)
    made.launch("k", call_at, 9_000, node=107)
    return made


@pytest.mark.parametrize(
    ("node_at", "call_at", "what"),
    [
        (1_500, 5_500, Given(ATTN, ATTN, VLLM, Via.NODE, Via.THREAD)),
        (1_150, 5_050, Given(f"{ATTN}/rope", ATTN, VLLM, Via.NODE, Via.THREAD)),
        (1_500, 7_000, Given(ATTN, ATTN, None, Via.NODE, Via.NONE)),
        (2_500, 5_500, Given("replay", "", VLLM, Via.THREAD, Via.THREAD)),
        (2_500, 5_050, Given("", "", VLLM, Via.NONE, Via.THREAD)),
        (500, 7_000, Given()),
    ],
)
def test_step_of_the_launch_and_module_of_the_node(
    node_at: int, call_at: int, what: Given, tmp_path: Path
) -> None:
    assert given(captured(node_at, call_at), tmp_path) == {"k": what}


def test_a_step_of_the_capture_is_no_step_of_the_replay(tmp_path: Path) -> None:
    made = captured(1_500, 7_000)
    made.range("execute_context_0(0)_generation_9(9)", 900, 2_100)
    assert given(made, tmp_path)["k"].step is None


def test_a_graph_kernel_without_launch_still_has_its_module(tmp_path: Path) -> None:
    made = captured(1_500, 5_500)
    made.kernel("unlinked", 9_500, 999, node=107)
    made.kernel("foreign", 9_600, 999, node=107, pid=OTHER_PID)
    found = given(made, tmp_path)
    assert found["unlinked"] == Given(ATTN, ATTN, None, Via.NODE, Via.NONE)
    assert found["foreign"] == Given()


@pytest.mark.parametrize(("other_threads", "path"), [(True, ATTN), (False, "replay")])
def test_a_node_made_by_a_thread_without_ranges(
    other_threads: bool, path: str, tmp_path: Path
) -> None:
    found = given(captured(1_500, 5_500, AUTOGRAD), tmp_path, other_threads=other_threads)
    assert found["k"].path == path
    assert found["k"].via == (Via.NODE if other_threads else Via.THREAD)


def test_ranges_of_kernels_are_those_of_their_paths(tmp_path: Path) -> None:
    made = captured(1_150, 5_500)
    made.launch("eager", 5_600, 9_500)
    made.launch("none", 7_600, 9_700)
    with opened(made, tmp_path) as table:
        assert table.rows(
            "SELECT n.name, r.text, r.start, r.tid, r.path_id = k.path_id "
            "FROM kernel k JOIN name n ON n.id = k.name_id LEFT JOIN range r ON r.id = k.range "
            "ORDER BY 1"
        ) == [
            ("eager", "replay", 5_100, TID, True),
            ("k", "rope", 1_100, TID, True),
            ("none", None, None, None, None),
        ]
        assert table.rows("SELECT DISTINCT pid FROM kernel") == [(PID,)]
