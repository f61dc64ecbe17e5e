"""NVTX: texts inline or registered, labels of servers, and what was launched in which range."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_export import OTHER_TID, Export
from made_export import PID, TID

from opkit.nsys_parsers.ranges import STEP_SQL, STILL_OPEN, StepLabel, assign, parse_step
from opkit.nsys_parsers.trace import open_trace


def ranges(
    export: Export, path: Path, without: tuple[str, ...] = ()
) -> list[tuple[str, int, int, int]]:
    with open_trace(export.write(path / "made.sqlite", without)) as trace:
        return trace.rows('SELECT text, start, "end", pid FROM nvtx ORDER BY id')


def assigned(
    export: Export, path: Path, where: str = "true", point: str = "launch"
) -> list[tuple[str, str]]:
    """(kernel, range) for every kernel inside one of the chosen ranges."""
    with open_trace(export.write(path / "made.sqlite")) as trace:
        assign(trace.db, "placed", where, point)
        return trace.rows(
            "SELECT k.name, n.text FROM placed p JOIN kernel k ON k.id = p.kernel_id "
            "JOIN nvtx n ON n.id = p.range_id ORDER BY k.launch_start"
        )


def with_kernel() -> Export:
    made = Export()
    made.launch("k", 150, 9_000)
    return made


@pytest.mark.parametrize("registered", [False, True])
def test_text_is_read_inline_or_registered(registered: bool, tmp_path: Path) -> None:
    made = with_kernel()
    made.range("step", 100, 200, registered=registered)
    assert ranges(made, tmp_path) == [("step", 100, 200, PID)]


def test_registered_texts_of_an_export_without_a_text_column(tmp_path: Path) -> None:
    made = with_kernel()
    made.range("step", 100, 200, registered=True)
    assert ranges(made, tmp_path, ("NVTX_EVENTS.text",)) == [("step", 100, 200, PID)]


def test_inline_texts_of_an_export_without_registered_ones(tmp_path: Path) -> None:
    made = with_kernel()
    made.range("step", 100, 200)
    assert ranges(made, tmp_path, ("NVTX_EVENTS.textId",)) == [("step", 100, 200, PID)]


def test_only_ranges_with_a_text_are_ranges(tmp_path: Path) -> None:
    made = with_kernel()
    made.range("pushed", 100, 200)
    made.range("started", 110, 190, kind=60)
    made.range("mark", 120, None, kind=34)
    made.range("domain name", 0, None, kind=75)
    made.add("NVTX_EVENTS", start=130, end=140, eventType=59, globalTid=TID)
    assert [text for text, *_ in ranges(made, tmp_path)] == ["pushed", "started"]


def test_an_outer_range_comes_before_the_inner_of_equal_start(tmp_path: Path) -> None:
    made = with_kernel()
    made.range("inner", 100, 150)
    made.range("outer", 100, 200)
    assert [text for text, *_ in ranges(made, tmp_path)] == ["outer", "inner"]


def test_a_range_that_the_window_cut_off_is_open_to_its_end(tmp_path: Path) -> None:
    made = with_kernel()
    made.range("cut", 100, None)
    assert ranges(made, tmp_path) == [("cut", 100, STILL_OPEN, PID)]
    (tmp_path / "again").mkdir()
    assert assigned(made, tmp_path / "again") == [("k", "cut")]


def test_without_nvtx_there_are_no_ranges(tmp_path: Path) -> None:
    assert ranges(with_kernel(), tmp_path) == []
    (tmp_path / "again").mkdir()
    assert assigned(with_kernel(), tmp_path / "again") == []


def test_a_kernel_belongs_to_the_range_of_its_call_not_of_its_execution(tmp_path: Path) -> None:
    made = Export()
    made.range("first", 100, 200)
    made.range("second", 300, 400)
    made.launch("late", 150, 350)  # runs while the second is open
    made.launch("between", 250, 260)
    made.launch("at the start", 300, 500)
    made.launch("at the end", 400, 600)
    made.launch("before", 99, 150)
    assert assigned(made, tmp_path) == [
        ("late", "first"),
        ("at the start", "second"),
        ("at the end", "second"),
    ]


def test_a_range_holds_only_calls_of_its_own_thread(tmp_path: Path) -> None:
    made = Export()
    made.range("step", 100, 200)
    made.launch("own", 150, 1_000)
    made.launch("another thread", 160, 2_000, tid=TID + 1)
    made.launch("another process", 170, 3_000, tid=OTHER_TID)
    assert assigned(made, tmp_path) == [("own", "step")]


def test_only_chosen_ranges_count(tmp_path: Path) -> None:
    made = Export()
    made.range("step", 100, 200)
    made.range("inner", 140, 160)
    made.launch("k", 150, 1_000)
    made.launch("after inner", 170, 2_000)
    assert assigned(made, tmp_path, "text = 'step'") == [("k", "step"), ("after inner", "step")]


def test_by_node_a_replayed_kernel_belongs_to_the_range_of_its_capture(tmp_path: Path) -> None:
    made = Export()
    made.range("capture", 5, 15)
    made.range("replay", 1_000, 1_100)
    made.node(1, 10)
    made.node(101, 500, origin=1)
    made.launch("replayed", 1_050, 2_000, node=101)
    made.launch("eager", 1_060, 3_000)
    path = tmp_path / "node"
    path.mkdir()
    assert assigned(made, path, point="node") == [("replayed", "capture")]
    assert assigned(made, tmp_path) == [("replayed", "replay"), ("eager", "replay")]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("execute_context_1(4096)_generation_0(0)", StepLabel(1, 4096, 0, 0)),
        ("execute_context_0(0)_generation_16(16)", StepLabel(0, 0, 16, 16)),
        ("execute_context_2(96)_generation_3(3)", StepLabel(2, 96, 3, 3)),
        ("gpu_model_runner: execute_context_1(7)_generation_0(0) ", StepLabel(1, 7, 0, 0)),
        ("[Executor] _forward_step 12: 1 ctx reqs, 4 gen reqs", StepLabel(1, None, 4, 4)),
        ("[Executor] _forward_step 12: 1 ctx reqs, 1024 ctx tokens, 4 gen reqs",
         StepLabel(1, 1024, 4, 4)),
        ("[Executor] _forward_step 7: 0 ctx reqs, 0 ctx tokens, 8 gen reqs", StepLabel(0, 0, 8, 8)),
        ("step[EXTEND bs=4 toks=4096]", StepLabel(4, 4096, 0, 0)),
        ("step[DECODE bs=16]", StepLabel(0, 0, 16, 16)),
        ("scheduler step[DECODE bs=1] ", StepLabel(0, 0, 1, 1)),
        ("step[EXTEND bs=4]", None),
        ("step[DECODE bs=16 toks=16]", None),
        ("step[MIXED bs=4 toks=70]", None),
        ("step[TARGET_VERIFY bs=4]", None),
        ("step[DECODE bs=]", None),
        ("execute_model", None),
        ("execute_context_x(1)_generation_0(0)", None),
        ("{'Module': 'model.layers.0.self_attn'}", None),
        ("opkit dsa context b=1 t=4096 past=0 mode=eager variant=mock iter=0", None),
        ("", None),
    ],
)  # fmt: skip
def test_step_labels(text: str, label: StepLabel | None, tmp_path: Path) -> None:
    assert parse_step(text) == label
    # The expression that selects rows in SQL agrees with the one that reads them.
    made = with_kernel()
    made.range(text, 100, 200)
    with open_trace(made.write(tmp_path / "made.sqlite")) as trace:
        found = trace.rows(f"SELECT count(*) FROM nvtx WHERE regexp_matches(text, '{STEP_SQL}')")
    assert found == [(0 if label is None else 1,)]
