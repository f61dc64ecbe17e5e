"""Which file is which rank, what is missing, and several files on one clock."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_export import OTHER_TID, Export
from made_export import OTHER_PID, PID, TID
from read_tables import NO_CACHE

from opkit.errors import BadInput
from opkit.nsys_parsers import ranks
from opkit.nsys_parsers.reading import Reading
from opkit.nsys_parsers.table import KernelTable, open_table

EPOCH = 1_700_000_000_000_000_000
PARTIAL = Reading(use_cache=False, partial=True)
STEP = "execute_context_0(0)_generation_4(4)"


def files(*names: str) -> list[Path]:
    return [Path(name) for name in names]


# Numbers of files.


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["trace.sqlite"], [0]),
        (["rank7.sqlite"], [0]),
        (["rank0.sqlite", "rank1.sqlite"], [0, 1]),
        (["rank1.sqlite", "rank0.sqlite"], [1, 0]),
        (["r1.nsys-rep", "r2.nsys-rep", "r0.nsys-rep"], [1, 2, 0]),
        (["run4_rank03.sqlite.gz", "run4_rank01.sqlite.gz", "run4_rank00.sqlite.gz",
          "run4_rank02.sqlite.gz"], [3, 1, 0, 2]),
        ([f"tp{i}.sqlite" for i in range(11, -1, -1)], list(range(11, -1, -1))),
        (["rank1_of_2.sqlite", "rank0_of_2.sqlite"], [1, 0]),
        # Numbers that do not say ranks: one in front, process ids, times, versions.
        (["report2.sqlite", "report1.sqlite"], [1, 0]),
        (["node1.sqlite", "node3.sqlite", "node2.sqlite"], [0, 2, 1]),
        (["report.sqlite", "report1.sqlite"], [0, 1]),
        (["p4711.sqlite", "p4712.sqlite"], [0, 1]),
        (["h100.sqlite", "h200.sqlite"], [0, 1]),
        (["b.sqlite", "a.sqlite"], [0, 1]),
        (["worker1.sqlite", "worker2.sqlite"], [0, 1]),
        (["server2.sqlite", "server1.sqlite"], [1, 0]),
    ],
)  # fmt: skip
def test_numbers_of_files(names: list[str], numbers: list[int]) -> None:
    assert ranks.numbers(files(*names)) == numbers


@pytest.mark.parametrize(
    "names",
    [
        # nsys profile -o run_rank%q{RANK}_pid%p
        ["run_rank1_pid77.sqlite", "run_rank0_pid78.sqlite"],
        ["host-b.rank1.sqlite", "host-a.rank0.sqlite"],
        ["out/rank1/trace.sqlite", "out/rank0/trace.sqlite"],
        ["out/rank_1/77.sqlite", "out/rank_0/78.sqlite"],
    ],
)
def test_a_number_called_rank_is_one_whatever_else_differs(names: list[str]) -> None:
    assert ranks.numbers(files(*names)) == [1, 0]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["rank0.sqlite", "rank2.sqlite"], "rank 1 is missing"),
        (["rank3.sqlite", "rank0.sqlite"], "rank 1, 2 is missing"),
        (["rank1.sqlite", "rank2.sqlite"], "rank 0 is missing"),
        (["tp0.sqlite", "tp9.sqlite", "tp1.sqlite"], "rank 2, 3, 4, 5, 6, 7, 8 is missing"),
        (["tp0.sqlite", "tp15.sqlite"], "rank 1, 2, 3, 4, 5, 6, 7, 8 … is missing"),
    ],
)
def test_a_missing_rank_is_named(names: list[str], missing: str) -> None:
    with pytest.raises(BadInput, match=missing) as caught:
        ranks.numbers(files(*names))
    assert "--partial" in (caught.value.hint or "")


def test_some_ranks_of_a_run_keep_their_numbers() -> None:
    assert ranks.numbers(files("rank5.sqlite", "rank2.sqlite"), partial=True) == [5, 2]


def test_no_file_and_a_file_twice(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no trace"):
        ranks.numbers([])
    one = tmp_path / "rank0.sqlite"
    one.touch()
    (tmp_path / "rank1.sqlite").symlink_to(one)
    for other in (one, tmp_path / "." / "rank0.sqlite", tmp_path / "rank1.sqlite"):
        with pytest.raises(BadInput, match="twice"):
            ranks.numbers([one, other])


# Tables of several files.


def rank(number: int, epoch: int | None = EPOCH, kernels: int = 2) -> Export:
    """One process with a step and kernels named after it; its session begins at ``epoch``."""
    made = Export()
    if epoch is not None:
        made.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=epoch)
    pid = PID + (number << 24)
    made.range(STEP, 100, 900, tid=pid + 77)
    made.range(f"r{number}", 110, 800, tid=pid + 77)
    for i in range(kernels):
        made.launch("same", 200 + i, 1_000 + 2_000 * i, tid=pid + 77)
    made.launch(f"of {number}", 300, 9_000, tid=pid + 77)
    return made


def written(folder: Path, *exports: Export, name: str = "rank{}.sqlite") -> list[Path]:
    return [export.write(folder / name.format(i)) for i, export in enumerate(exports)]


def opened(paths: Sequence[Path], reading: Reading = NO_CACHE) -> KernelTable:
    return open_table(paths, reading)


def refused(paths: Sequence[Path], reading: Reading = NO_CACHE) -> BadInput:
    with pytest.raises(BadInput) as caught:
        opened(paths, reading)
    return caught.value


NAMED = """SELECT k.rank, k.file, n.name, p.path, s.label, s.rank, s.number FROM kernel k
    JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id
    LEFT JOIN step s ON s.file = k.file AND s.id = k.step ORDER BY ALL"""


def expected(number: int, file: int) -> list[tuple[Any, ...]]:
    more = (f"r{number}", STEP, number, 0)
    return sorted((number, file, name, *more) for name in ("same", "same", f"of {number}"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_files_in_any_order_are_the_same_ranks(order: tuple[int, ...], tmp_path: Path) -> None:
    paths = written(tmp_path, rank(0), rank(1), rank(2))
    with opened([paths[i] for i in order]) as table:
        assert [r.rank for r in table.ranks] == [0, 1, 2]
        assert [r.file for r in table.ranks] == [order.index(i) for i in range(3)]
        assert [r.process for r in table.ranks] == [(PID >> 24) + i & 0xFFFFFF for i in range(3)]
        assert table.rows(NAMED) == sorted(
            row for i in range(3) for row in expected(i, order.index(i))
        )
        assert table.rows("SELECT count(*) FROM name WHERE name = 'same'") == [(1,)]
        assert table.rows("SELECT path FROM path WHERE id = 0") == [("",)]


def test_some_ranks_only(tmp_path: Path) -> None:
    paths = written(tmp_path, rank(0), rank(1), rank(2), rank(3))
    assert "rank 0, 2 is missing" in str(refused([paths[3], paths[1]]))
    with opened([paths[3], paths[1]], PARTIAL) as table:
        assert [(r.rank, r.file) for r in table.ranks] == [(1, 1), (3, 0)]
        assert table.rows(NAMED) == sorted(expected(1, 1) + expected(3, 0))


def test_one_file_of_two_processes(tmp_path: Path) -> None:
    """Ranks in order of their GPUs; a process that ran no kernel is none."""
    made = Export()
    for tid, device in ((TID, 1), (OTHER_TID, 0)):
        made.range(STEP, 100, 500, tid=tid)
        made.launch("k", 150, 9_000, tid=tid)
        made.rows["CUPTI_ACTIVITY_KIND_KERNEL"][-1]["deviceId"] = device
    made.launch("[memset]", 400, 9_900, tid=TID + (7 << 24))
    made.range("idle", 1, 2, tid=TID + (8 << 24))
    with opened(written(tmp_path, made)) as table:
        assert [(r.rank, r.pid, r.devices, r.kernels) for r in table.ranks] == [
            (0, OTHER_PID, (0,), 1), (1, PID, (1,), 1),
        ]  # fmt: skip
        assert table.rows("SELECT rank, pid, kind FROM kernel ORDER BY ALL") == [
            (0, OTHER_PID, "kernel"), (1, PID, "kernel"), (None, PID + (7 << 24), "memset"),
        ]  # fmt: skip
        assert table.rows("SELECT rank, tid FROM step ORDER BY ALL") == [(0, OTHER_TID), (1, TID)]
        assert table.rows("SELECT rank FROM range") == [(None,)]


def test_two_files_of_two_processes_each(tmp_path: Path) -> None:
    nodes = []
    for node in range(2):
        made = rank(2 * node)
        made.launch("second", 300, 9_500, tid=PID + (2 * node + 1 << 24) + 77)
        nodes.append(made)
    paths = written(tmp_path, *nodes, name="node{}.sqlite")
    with opened([paths[1], paths[0]]) as table:
        assert [(r.rank, r.file, r.pid - PID >> 24) for r in table.ranks] == [
            (0, 1, 0), (1, 1, 1), (2, 0, 2), (3, 0, 3),
        ]  # fmt: skip


def test_equal_process_ids_on_two_hosts_are_two_ranks(tmp_path: Path) -> None:
    """Containers number processes alike."""
    other = rank(0, EPOCH + 10)
    other.launch("more", 400, 9_900)
    with opened(written(tmp_path, rank(0), other)) as table:
        assert [(r.rank, r.file, r.pid, r.kernels) for r in table.ranks] == [
            (0, 0, PID, 3), (1, 1, PID, 4),
        ]  # fmt: skip
        assert table.rows("SELECT rank, count(*) FROM kernel GROUP BY 1 ORDER BY 1") == [
            (0, 3), (1, 4),
        ]  # fmt: skip


# One clock.

TIMES = """SELECT rank, start, "end", launch_start, node_start FROM kernel
    WHERE graph_node IS NOT NULL ORDER BY ALL"""


def replayed(number: int, epoch: int | None) -> Export:
    made = rank(number, epoch)
    made.node(1, 50, tid=PID + (number << 24) + 77)
    made.launch("g", 250, 5_000, tid=PID + (number << 24) + 77, node=1)
    return made


@pytest.mark.parametrize("later", [0, 4_000])
def test_times_are_those_of_the_earliest_session(later: int, tmp_path: Path) -> None:
    paths = written(tmp_path, replayed(0, EPOCH + later), replayed(1, EPOCH))
    with opened(paths) as table:
        assert table.one_clock
        assert table.rows(TIMES) == [
            (0, 5_000 + later, 6_000 + later, 250 + later, 50 + later),
            (1, 5_000, 6_000, 250, 50),
        ]
        for ranges, first in (("step", 100), ("range", 110)):
            spans = table.rows(f'SELECT rank, start FROM "{ranges}" ORDER BY ALL')
            assert spans == [(0, first + later), (1, first)]


@pytest.mark.parametrize("epochs", [(None, None), (EPOCH, None), (None, EPOCH)])
def test_without_epochs_clocks_are_not_comparable(
    epochs: tuple[int | None, ...], tmp_path: Path
) -> None:
    paths = written(tmp_path, replayed(0, epochs[0]), replayed(1, epochs[1]))
    with opened(paths) as table:
        assert not table.one_clock
        assert [row[1:] for row in table.rows(TIMES)] == [(5_000, 6_000, 250, 50)] * 2


@pytest.mark.parametrize("epoch", [None, EPOCH])
def test_one_file_is_one_clock(epoch: int | None, tmp_path: Path) -> None:
    with opened(written(tmp_path, replayed(0, epoch))) as table:
        assert table.one_clock
        assert table.rows(TIMES) == [(0, 5_000, 6_000, 250, 50)]


def test_a_range_still_open_is_so_on_any_clock(tmp_path: Path) -> None:
    made = rank(1, EPOCH + 3 * 10**9)
    made.range("open", 50, None)
    with opened(written(tmp_path, rank(0, EPOCH + 3 * 10**9 - 5_000), made)) as table:
        (span,) = table.rows("SELECT \"end\" - start FROM range WHERE text = 'open'")
        assert span[0] > 2**61


# Not of one run.


@pytest.mark.parametrize("partial", [False, True])
def test_sessions_that_do_not_overlap_are_two_runs(partial: bool, tmp_path: Path) -> None:
    hour = 3_600 * 10**9
    paths = written(tmp_path, rank(0, EPOCH + hour), rank(1, EPOCH))
    said = refused(paths, Reading(use_cache=False, partial=partial))
    assert "not ranks of one run" in str(said)
    assert str(said).index("rank1") < str(said).index("rank0"), "the earlier one ended first"
    assert "opkit trace diff" in (said.hint or "")


def test_an_empty_rank_is_named_with_its_file(tmp_path: Path) -> None:
    empty = Export()
    empty.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=EPOCH)
    empty.launch("[memset]", 100, 1_000)
    paths = written(tmp_path, rank(0), empty, rank(2))
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        said = str(refused([paths[i] for i in order]))
        assert "rank 1" in said
        assert "rank1.sqlite" in said
        assert "no GPU kernels" in said
    assert str(refused([paths[1]])).startswith(str(paths[1])), "alone it is no rank"


@pytest.mark.parametrize("what", ["gone", "cut", "no database"])
def test_a_rank_that_cannot_be_read_is_named(what: str, tmp_path: Path) -> None:
    paths = written(tmp_path, rank(0), rank(1))
    if what == "gone":
        paths[1].unlink()
    else:
        raw = paths[1].read_bytes()
        paths[1].write_bytes(raw[: len(raw) // 2] if what == "cut" else b"?" * 5_000)
    said = str(refused(paths))
    assert said.startswith("rank 1: ")
    assert "rank1.sqlite" in said


@pytest.mark.parametrize("cached", [False, True])
def test_copies_of_one_recording_are_not_two_ranks(cached: bool, tmp_path: Path) -> None:
    """A slip of a script that copies files; the merged table would count everything twice."""
    (one,) = written(tmp_path, rank(0))
    other = Path(shutil.copy(one, tmp_path / "rank1.sqlite"))
    said = refused([one, other], Reading(use_cache=cached))
    assert "rank1.sqlite" in str(said)
