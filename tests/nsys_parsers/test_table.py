"""The views of an open table: their columns, ids that lead somewhere, and what is given back."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
from gpu_export import OTHER_TID, Export, module
from made_export import EAGER_STEP, GEMM, GRAPH_STEP, OTHER_PID, PID, TID, make_export
from read_tables import NO_CACHE, opened

from opkit.errors import BadInput
from opkit.nsys_parsers.reading import Options, Reading
from opkit.nsys_parsers.table import KernelTable, iterate, open_table

VIEWS = {
    "kernel": "file, rank, kind, name_id, start, end, pid, device, stream, correlation, grid_x, "
    "grid_y, grid_z, block_x, block_y, block_z, graph_node, launch_start, launch_tid, node_start, "
    "node_tid, step, step_via, range, path_id, via",
    "name": "id, name, short, family, glue",
    "path": "id, path, module",
    "step": "file, rank, id, tid, start, end, label, context_requests, context_tokens, "
    "generation_requests, generation_tokens, number",
    "range": "file, rank, id, tid, start, end, text, path_id",
}


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two ranks: their names, ranges and steps are partly the same."""
    paths = []
    for number in range(2):
        made = Export()
        tid = PID + (number << 24) + 5
        for step in range(3 + number):
            made.range(f"execute_context_0(0)_generation_{step}({step})", 1_000 * step,
                       1_000 * step + 900, tid=tid)  # fmt: skip
            made.range(module(f"m.{number}"), 1_000 * step + 10, 1_000 * step + 400, tid=tid)
            made.range("rest", 1_000 * step + 500, 1_000 * step + 800, tid=tid)
            for name, at in (("shared", 50), (f"own {number}", 60), ("shared", 600)):
                made.launch(name, 1_000 * step + at, 1_000_000 + 1_000 * step + at, tid=tid)
        paths.append(made.write(tmp_path / f"rank{number}.sqlite"))
    return paths


@pytest.mark.parametrize("many", [1, 2])
def test_columns_are_those_of_the_contract(many: int, pair: list[Path]) -> None:
    with open_table(pair[:many], NO_CACHE) as table:
        for view, columns in VIEWS.items():
            got = table.db.execute(f'SELECT * FROM "{view}" LIMIT 0').description
            assert got is not None
            assert {column[0] for column in got} == set(columns.split(", ")), view


@pytest.mark.parametrize("many", [1, 2])
def test_every_id_leads_to_one_row(many: int, pair: list[Path]) -> None:
    with open_table(pair[:many], NO_CACHE) as table:
        rows = table.rows("SELECT count(*) FROM kernel")
        assert rows == [(9 if many == 1 else 21,)]
        joined = """SELECT count(*) FROM kernel k JOIN name n ON n.id = k.name_id
            JOIN path p ON p.id = k.path_id JOIN step s ON s.file = k.file AND s.id = k.step
            JOIN range r ON r.file = k.file AND r.id = k.range AND r.path_id = k.path_id
            WHERE k.launch_start BETWEEN r.start AND r."end"
              AND k.launch_start BETWEEN s.start AND s."end"
              AND r.rank = k.rank AND s.rank = k.rank AND r.tid = k.launch_tid"""
        assert table.rows(joined) == rows
        for view in ("name", "path"):
            assert table.rows(f"SELECT count(*) - count(DISTINCT id) FROM {view}") == [(0,)]
        for view in ("step", "range"):
            sql = f'SELECT count(*) - count(DISTINCT (file, id)) FROM "{view}"'
            assert table.rows(sql) == [(0,)]


def test_two_files_hold_what_each_holds_alone(pair: list[Path]) -> None:
    sql = """SELECT n.name, n.short, n.family, n.glue, p.path, p.module, s.label, s.number,
        k.start, k.pid, k.correlation, k.launch_start, k.launch_tid, k.grid_x, k.via, k.step_via
        FROM kernel k JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id
        JOIN step s ON s.file = k.file AND s.id = k.step WHERE k.file = ? ORDER BY ALL"""
    with open_table(pair, NO_CACHE) as both:
        for file, path in enumerate(pair):
            with open_table([path], NO_CACHE) as one:
                assert both.rows(sql, [file]) == one.rows(sql, [0])
                assert one.rows("SELECT DISTINCT rank FROM kernel") == [(0,)]


def test_steps_are_numbered_in_each_rank(pair: list[Path]) -> None:
    with open_table(pair, NO_CACHE) as table:
        found = table.rows("SELECT rank, number, generation_tokens FROM step ORDER BY ALL")
    assert found == [(rank, n, n) for rank in range(2) for n in range(3 + rank)]


def test_steps_of_two_processes_in_one_file_are_numbered_apart(tmp_path: Path) -> None:
    made = Export()
    for i in range(4):
        tid = (TID, OTHER_TID)[i % 2]
        made.range(f"execute_context_0(0)_generation_{i}({i})", 100 * i, 100 * i + 99, tid=tid)
        made.launch("k", 100 * i + 50, 9_000 + i, tid=tid)
    with opened(made, tmp_path) as table:
        sql = "SELECT rank, number, generation_requests FROM step ORDER BY ALL"
        assert table.rows(sql) == [(0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 3)]


def test_the_made_export(tmp_path: Path) -> None:
    """Two processes, three eager steps and one replay: all that test_slim makes."""
    with open_table([make_export(tmp_path / "made.sqlite")], NO_CACHE) as table:
        assert [(r.pid, r.kernels) for r in table.ranks] == [(PID, 21), (OTHER_PID, 6)]
        assert table.rows(
            "SELECT s.label, p.path, n.name = ?, k.via, count(*) FROM kernel k "
            "JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id "
            "JOIN step s ON s.id = k.step WHERE n.name = ? OR k.graph_node IS NOT NULL "
            "GROUP BY ALL ORDER BY ALL",
            [GEMM, GEMM],
        ) == [
            (GRAPH_STEP, "model.layers.0.self_attn", False, 2, 1),
            (GRAPH_STEP, "model.layers.0.self_attn", True, 2, 1),
            (EAGER_STEP, "model.layers.0.self_attn", True, 1, 3),
            (EAGER_STEP, "model.layers.1.self_attn", True, 1, 3),
        ]
        lost = "SELECT count(*), count(step), sum(via) FROM kernel WHERE launch_start IS NULL"
        assert table.rows(lost) == [(1, 0, 0)]


# Labels of any kind: whatever a range says, it is a step with or without numbers, or none.

HUGE = 2**63
LABELS = [
    f"execute_context_{HUGE}({HUGE})_generation_{10**30}(0)",
    "execute_context_٣(1)_generation_0(0)",  # a digit, but not to RE2
    "execute_context_()_generation_0(0)",
    "execute_context_-1(1)_generation_0(0)",
    "execute_context_007(1)_generation_0(0) and more, op_id = 7",
    f"[Executor] _forward_step {HUGE}: {HUGE} ctx reqs, 0 gen reqs",
    f"[Executor] _forward_step 1: 1 ctx reqs, {HUGE} ctx tokens, {HUGE} gen reqs",
    "[Executor] _forward_step 1: 1 ctx reqs",
    "_forward_step 1: 1 ctx reqs, 1 gen reqs",
    "_forward_step 1: ctx reqs",
    "",
    "\n",
]


@pytest.mark.parametrize("pattern", ["", "step|execute"])
def test_any_label_can_be_a_step(pattern: str, tmp_path: Path) -> None:
    made = Export()
    for i, text in enumerate(LABELS):
        made.range(text, 100 * i, 100 * i + 90)
        made.launch("k", 100 * i + 50, 9_000 + i)
    with opened(made, tmp_path, step_pattern=pattern) as table:
        steps = table.rows("SELECT label FROM step")
        ranges = table.rows("SELECT text FROM range")
    said = [(text,) for text in LABELS if text]
    assert sorted(each for each in steps + ranges if each[0]) == sorted(said)
    assert len(steps) == (10 if pattern else 6)


# What is given back, and what is refused.


def test_an_open_table_ends_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    path = make_export(tmp_path / "made.sqlite")

    def fail(table: KernelTable) -> None:
        table.rows("SELECT * FROM nothing")

    with pytest.raises(duckdb.CatalogException), open_table([path], NO_CACHE) as table:
        fail(table)
    with pytest.raises(duckdb.ConnectionException):
        table.rows("SELECT 1")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("reading", [Reading(), NO_CACHE])
def test_files_that_are_none(reading: Reading, tmp_path: Path) -> None:
    for path, said in ((tmp_path / "gone.sqlite", "no such file"), (tmp_path, "a folder, not")):
        with pytest.raises(BadInput, match=said) as caught:
            open_table([path], reading)
        assert str(path) in str(caught.value)
    with pytest.raises(BadInput, match="no trace"):
        open_table([], reading)


def test_all_rows_come_in_pieces(tmp_path: Path) -> None:
    with open_table([make_export(tmp_path / "made.sqlite")], NO_CACHE) as table:
        for many in (1, 10, 27, 100):
            cursor = table.db.execute("SELECT start FROM kernel ORDER BY start")
            found = [start for (start,) in iterate(cursor, many)]
            assert len(found) == 27
            assert found == sorted(found)


def test_progress_is_told_forward(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    path = make_export(tmp_path / "made.sqlite")
    reading = Reading().told(lambda what, done: told.append((what, done)))
    open_table([path], reading).close()
    done = [share for _, share in told]
    assert done == sorted(done)
    assert 0 <= done[0] < done[-1] <= 1
    assert all("made.sqlite" in what for what, _ in told)
    told.clear()
    open_table([path], reading).close()
    assert not told, "a cached table needs no progress"


def test_readings_of_equal_options_are_equal() -> None:
    assert Options() == Options("", True)
    assert Reading().told(print).options == Reading().options
