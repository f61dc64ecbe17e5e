"""Which step and which module each kernel is given, trap by trap."""

from __future__ import annotations

import glob
import itertools
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gpu_export import Export, module
from made_export import TID
from read_tables import Given, every, given, launched, lines_run, opened, paths, rows

from opkit.errors import BadInput
from opkit.nsys_parsers import attribution, stacks
from opkit.nsys_parsers.ranges import parse_step
from opkit.nsys_parsers.reading import Options, Reading, Via
from opkit.nsys_parsers.table import open_table

AUTOGRAD = TID + 1  # another thread of the same process
VLLM = "execute_context_1(4096)_generation_4(4)"
OLD_TRTLLM = "[Executor] _forward_step 12: 1 ctx reqs, 4 gen reqs"
NEW_TRTLLM = "[Executor] _forward_step 12: 1 ctx reqs, 1024 ctx tokens, 4 gen reqs"
ATTN = "model.layers.5.self_attn"


# A range of the launching thread decides, by the moment of the launch.


def test_nested_ranges_are_a_path(tmp_path: Path) -> None:
    made = Export()
    made.range("outer", 100, 500)
    made.range("inner", 200, 300)
    for name, called in (("a", 99), ("b", 100), ("c", 200), ("d", 300), ("e", 301), ("f", 501)):
        made.launch(name, called, 9_000 + called)
    assert paths(made, tmp_path) == {
        "a": "", "b": "outer", "c": "outer/inner", "d": "outer/inner", "e": "outer", "f": "",
    }  # fmt: skip


def test_gpu_time_does_not_count(tmp_path: Path) -> None:
    made = Export()
    made.range("first", 100, 200)
    made.range("second", 300, 400)
    made.launch("late", 150, 350)
    made.launch("later", 350, 9_000)
    assert paths(made, tmp_path) == {"late": "first", "later": "second"}


def test_started_ranges_may_cross_others(tmp_path: Path) -> None:
    """Of two that cross, the one begun last is innermost; neither is inside the other."""
    made = Export()
    made.range("request 1", 100, 300, kind=60)
    made.range("request 2", 200, 400, kind=60)
    for name, called in (("a", 150), ("b", 250), ("c", 350)):
        made.launch(name, called, 9_000 + called)
    assert paths(made, tmp_path) == {"a": "request 1", "b": "request 2", "c": "request 2"}


def test_a_range_that_ends_on_another_thread_counts_where_it_began(tmp_path: Path) -> None:
    made = Export()
    made.add(
        "NVTX_EVENTS", start=100, end=200, eventType=60, text="r", globalTid=TID,
        endGlobalTid=AUTOGRAD,
    )  # fmt: skip
    made.launch("k", 150, 9_000)
    assert given(made, tmp_path) == {"k": Given("r", via=Via.THREAD)}


@pytest.mark.parametrize(
    ("text", "what"),
    [("m", Given("m", via=Via.THREAD)), (VLLM, Given(step=VLLM, step_via=Via.THREAD))],
)
def test_a_range_still_open_at_the_end(text: str, what: Given, tmp_path: Path) -> None:
    assert given(launched((text, 100, None)), tmp_path) == {"k": what}


def test_an_empty_range_covers_nothing(tmp_path: Path) -> None:
    ranges = (("outer", 100, 200), ("empty", 150, 150), ("before", 140, 149))
    assert paths(launched(*ranges), tmp_path) == {"k": "outer"}


def test_only_ranges_are_ranges(tmp_path: Path) -> None:
    made = launched(("range", 100, 200))
    made.range("mark", 120, None, kind=34)
    made.range("domain", 0, None, kind=75)
    made.range("thread name", 110, None, kind=39)
    assert paths(made, tmp_path) == {"k": "range"}


def one_after_another(*ranges: dict[str, Any]) -> Export:
    """Ranges beside each other; kernel ``k0`` is launched in the first, ``k1`` in the next."""
    made = Export()
    for i, cells in enumerate(ranges):
        made.range(start=1_000 * i, end=1_000 * i + 100, **cells)
        made.launch(f"k{i}", 1_000 * i + 50, 9_000_000 + i)
    return made


def test_every_kind_of_range(tmp_path: Path) -> None:
    each = itertools.product((59, 60, 70, 71), (False, True))
    cells = [
        {"text": f"{kind} {registered}", "kind": kind, "registered": registered}
        for kind, registered in each
    ]
    found = paths(one_after_another(*cells), tmp_path)
    assert found == {f"k{i}": cell["text"] for i, cell in enumerate(cells)}


def test_inline_and_registered_texts_in_one_file(tmp_path: Path) -> None:
    made = Export()
    made.range("both", 100, 200)
    made.range("both", 300, 400, registered=True)
    made.range("inline", 320, 380)
    made.range("registered", 110, 190, registered=True)
    made.launch("a", 150, 9_000)
    made.launch("b", 350, 9_100)
    assert paths(made, tmp_path) == {"a": "both/registered", "b": "both/inline"}


def test_ranges_of_equal_times_are_read_alike_each_time(tmp_path: Path) -> None:
    """Clocks of 100 ns make such; which is the outer one is not told, but it stays so."""
    made = Export()
    for i in range(200):
        for text in "abc":
            made.range(f"{text}{i}", 100 * i, 100 * i + 99)
        made.launch(f"k{i}", 100 * i + 50, 900_000 + i)
    found = []
    for _ in range(2):
        with opened(made, tmp_path) as table:
            found.append(every(table, "n.name"))
        (tmp_path / "made.sqlite").unlink()
    assert all(again == found[0] for again in found)


def test_ranges_beyond_the_deepest_share_its_path(tmp_path: Path) -> None:
    deepest = attribution.MAX_DEPTH
    made = Export()
    for i in range(deepest + 10):
        made.range(f"r{i}", 100 + i, 10_000 - i)
        made.launch(f"k{i}", 100 + i, 20_000 + i)
    found = paths(made, tmp_path)
    for i in range(deepest + 10):
        assert found[f"k{i}"] == "/".join(f"r{j}" for j in range(min(i + 1, deepest)))


def test_ranges_that_never_end_cost_no_walk_along_them(tmp_path: Path) -> None:
    """A leak of started ranges makes a stack as deep as there are ranges."""

    def lines(many: int) -> int:
        made = Export()
        for i in range(many):
            made.range("leak", i, None, kind=60)
        made.launch("k", 200_000, 300_000)
        folder = tmp_path / str(many)
        folder.mkdir()
        count, found = lines_run(lambda: paths(made, folder), attribution, stacks)
        assert found == {"k": "/".join(["leak"] * min(many, attribution.MAX_DEPTH))}
        return count

    assert lines(3_000) < lines(100) + 500


# Modules, texts and twins.


def test_a_module_marker_gives_the_whole_path(tmp_path: Path) -> None:
    made = Export()
    made.range(module("model.layers.5"), 100, 500)
    made.range(module(ATTN), 200, 400)
    made.range("rope", 250, 300)
    made.range("inside", 260, 290)
    for name, called in (("layer", 150), ("attn", 210), ("rope", 255), ("inside", 270)):
        made.launch(name, called, 9_000 + called)
    found = given(made, tmp_path)
    assert {name: (what.path, what.module) for name, what in found.items()} == {
        "layer": ("model.layers.5", "model.layers.5"),
        "attn": (ATTN, ATTN),
        "rope": (f"{ATTN}/rope", ATTN),
        "inside": (f"{ATTN}/rope/inside", ATTN),
    }


def test_a_module_below_plain_text_stands_alone(tmp_path: Path) -> None:
    ranges = (("execute_model", 100, 500), ("forward", 110, 490), (module(ATTN), 120, 480))
    assert given(launched(*ranges), tmp_path)["k"][:2] == (ATTN, ATTN)


def test_a_shared_module_is_of_the_layer_that_calls_it(tmp_path: Path) -> None:
    """One object, marked with the name of one of the layers that own it."""
    shared, deeper = module("model.layers.0.self_attn.rotary"), module("model.layers.0.mlp.up.9")
    made = Export()
    for layer in (0, 7):
        at = 1_000 * layer
        made.range(module(f"model.layers.{layer}.self_attn"), at, at + 500)
        made.range("rope", at + 10, at + 400)
        made.range(shared, at + 20, at + 300)
        made.launch(f"rope {layer}", at + 30, 90_000 + at)
        made.range(module("draft.layers.3"), at + 310, at + 330)
        made.launch(f"draft {layer}", at + 320, 91_000 + at)
        made.range(deeper, at + 410, at + 430)
        made.launch(f"up {layer}", at + 420, 92_000 + at)
    made.range(shared, 50_000, 50_100)
    made.launch("alone", 50_050, 99_000)
    assert paths(made, tmp_path) == {
        "rope 0": "model.layers.0.self_attn.rotary",
        "rope 7": "model.layers.7.self_attn.rotary",
        "draft 0": "draft.layers.3",
        "draft 7": "draft.layers.3",
        "up 0": "model.layers.0.mlp.up.9",
        "up 7": "model.layers.7.mlp.up.9",
        "alone": "model.layers.0.self_attn.rotary",
    }


def test_plain_text_has_no_module(tmp_path: Path) -> None:
    assert given(launched(("a", 100, 200), ("b", 110, 190)), tmp_path)["k"][:2] == ("a/b", "")


def test_a_twin_with_outputs_covers_nothing(tmp_path: Path) -> None:
    made = launched((module(ATTN), 100, 200), (module(ATTN, outputs=True), 140, 200))
    made.launch("out", 250, 9_500)
    made.range(module("model.layers.5.mlp", outputs=True), 240, 260)
    found = given(made, tmp_path)
    assert found["k"] == Given(ATTN, ATTN, via=Via.THREAD)
    assert found["out"] == Given()


def test_plain_text_that_says_outputs_is_no_twin(tmp_path: Path) -> None:
    assert paths(launched(("gather 'Outputs': all", 100, 200)), tmp_path) == {
        "k": "gather 'Outputs': all"
    }


APPENDED = {
    "aten::mm, op_id = 5": "aten::mm",
    "aten::mm, seq = 7": "aten::mm",
    "aten::mm, seq = 7, op_id = 5": "aten::mm",
    "FSDP::post_forward (encoder.block.10.layer.0), op_id = 320431":
        "FSDP::post_forward (encoder.block.10.layer.0)",
    "aten::mm, op_id = 5, sizes = [[4, 8], [8, 2]]": "aten::mm",
    "load, seq = x": "load, seq = x",
    "batch, seq 7": "batch, seq 7",
}  # fmt: skip


def test_numbers_that_torch_appends_are_left_out(tmp_path: Path) -> None:
    made = one_after_another(*({"text": text} for text in APPENDED))
    assert list(paths(made, tmp_path).values()) == list(APPENDED.values())


def test_calls_of_one_operator_share_a_path(tmp_path: Path) -> None:
    made = Export()
    for i in range(3):
        made.range(f"aten::mm, op_id = {i}", 100 * i, 100 * i + 90)
        made.launch(f"k{i}", 100 * i + 10, 9_000 + i)
    with opened(made, tmp_path) as table:
        assert table.rows("SELECT count(*), count(DISTINCT path_id) FROM kernel") == [(3, 1)]
        assert table.rows("SELECT count(*), count(DISTINCT text) FROM range") == [(3, 3)]


TEXTS = ("größe ✓ 🙂", "a\tb\nc", 'it\'s "quoted" \\ back', "%s {0} $1", "a/b", "x" * 9_000)


def test_any_text_comes_through(tmp_path: Path) -> None:
    cells = [{"text": t, "registered": r} for t in TEXTS for r in (False, True)]
    found = paths(one_after_another(*cells), tmp_path)
    assert found == {f"k{i}": cell["text"] for i, cell in enumerate(cells)}


BYTES = {
    b"caf\xe9": "caf�",
    b"\xff\xfe": "��",
    b"a\x00b": "a\x00b",
    b"cut \xf0\x9f\x99": "cut �",
    b"\xed\xa0\x80": "���",
}


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    made = one_after_another(
        *({"text": f"?{raw!r} {r}", "registered": r} for raw in BYTES for r in (False, True))
    )
    path = made.write(tmp_path / "made.sqlite")
    with closing(sqlite3.connect(path)) as db, db:
        for column in ("StringIds SET value", "NVTX_EVENTS SET text"):
            for raw in BYTES:
                change = f"UPDATE {column} = CAST(? AS TEXT) WHERE {column.split()[-1]} GLOB ?"
                db.execute(change, (raw, "[?]" + glob.escape(repr(raw)) + "*"))
    found = rows(path, "SELECT p.path FROM kernel JOIN path p ON p.id = path_id ORDER BY start")
    assert [text for (text,) in found] == [text for text in BYTES.values() for _ in range(2)]


# Steps.


@pytest.mark.parametrize("label", [VLLM, OLD_TRTLLM, NEW_TRTLLM])
def test_steps_of_known_engines(label: str, tmp_path: Path) -> None:
    made = launched((label, 100, 500), ("gap", 600, 700), (module(ATTN), 120, 300))
    made.launch("between", 650, 9_900)
    with opened(made, tmp_path) as table:
        said = table.rows(
            "SELECT label, context_requests, context_tokens, generation_requests, "
            'generation_tokens, tid, start, "end", number FROM step'
        )
        found = every(table, "n.name")
    known = parse_step(label)
    assert known is not None
    numbers = (
        known.context_requests, known.context_tokens, known.generation_requests,
        known.generation_tokens,
    )  # fmt: skip
    assert said == [(label, *numbers, TID, 100, 500, 0)]
    assert found == [
        (("between",), Given("gap", via=Via.THREAD)),
        (("k",), Given(ATTN, ATTN, label, Via.THREAD, Via.THREAD)),
    ]


def test_a_step_is_no_part_of_a_path(tmp_path: Path) -> None:
    ranges = (("loop", 100, 500), (VLLM, 110, 490), ("forward", 120, 480))
    assert given(launched(*ranges), tmp_path)["k"][:3] == ("loop/forward", "", VLLM)


def test_a_users_pattern_replaces_known_labels(tmp_path: Path) -> None:
    ranges = (("train iter 3", 100, 500), (VLLM, 110, 490))
    assert given(launched(*ranges), tmp_path, step_pattern=r"iter \d+$") == {
        "k": Given(VLLM, "", "train iter 3", Via.THREAD, Via.THREAD)
    }


@pytest.mark.parametrize("ranges", [(), (("r", 100, 200),)])
def test_a_bad_pattern_is_one_sentence(
    ranges: tuple[tuple[str, int, int], ...], tmp_path: Path
) -> None:
    path = launched(*ranges).write(tmp_path / "made.sqlite")
    for pattern in ("(", "[a", "a{2,1}", r"(?<=x)y", "*"):
        with pytest.raises(BadInput, match="regular expression") as caught:
            open_table([path], Reading(Options(pattern), use_cache=False))
        assert pattern in str(caught.value)
        assert "\n" not in str(caught.value)


def test_steps_are_numbered_in_time_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    made = Export()
    for start in (500, 100, 900, 300):
        made.range(f"execute_context_{start}(1)_generation_0(0)", start, start + 90)
        made.launch(f"k{start}", start + 10, 9_000 + start)
    with opened(made, tmp_path) as table:
        steps = table.rows("SELECT id, context_requests FROM step ORDER BY id")
        at = table.rows("SELECT step, launch_start - 10 FROM kernel ORDER BY step")
    assert steps == at == [(0, 100), (1, 300), (2, 500), (3, 900)]
