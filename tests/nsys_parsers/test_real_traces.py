"""Whole real exports: sums as sqlite3 gives them, and a sample of kernels looked up by hand."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import random
import re
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from read_tables import NO_CACHE, Given, Rows, every
from slow_oracle import Slow

from opkit.errors import ToolMissing
from opkit.nsys_parsers.reading import Options, Reading, Via
from opkit.nsys_parsers.table import KernelTable, open_table
from opkit.nsys_parsers.tool import find_nsys

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "traces"
OURS = sorted(
    path.name.removesuffix(".sqlite.gz")
    for folder in ("tests/traces", "opkit/recorded")
    for path in (REPOSITORY / folder).glob("*.sqlite.gz")
)
# kernels, copies and fills, of these without a launch; ranks; kernels by how their path was found
OTHERS: dict[str, tuple[int, int, int, int, dict[Via, int]]] = {
    "nsysai_h100_2gpu_1s": (3442, 926, 2276, 2, {Via.NONE: 1810, Via.THREAD: 1632}),
    "nsysai_mock": (2, 1, 0, 1, {Via.NONE: 2}),
    "cs336_27b_nvtx": (7328, 294, 0, 1, {Via.THREAD: 7328}),
    "cs336_27b_graphmode": (30, 0, 0, 1, {Via.NONE: 30}),
    "cs336_win_2026_2": (4485, 243, 0, 1, {Via.NONE: 3945, Via.THREAD: 540}),
    "nsightful_power_iter": (3689, 89, 0, 1, {Via.NONE: 7, Via.THREAD: 3682}),
    "pipit_saxpy_mpi": (5, 15, 0, 1, {Via.THREAD: 5}),
    "mpi_2procs_1gpu": (885, 1510, 0, 2, {Via.NONE: 885}),
    "cudf_2020": (268, 158, 0, 1, {Via.THREAD: 268}),
    "cudf_2020_via_2022_4": (268, 158, 0, 1, {Via.THREAD: 268}),
    "rtx5070_2025_5": (2102, 8, 0, 1, {Via.NONE: 2102}),
    "llama3_4060ti": (1536, 512, 0, 1, {Via.THREAD: 1536}),
    "cublas_v100_without": (402, 9, 0, 1, {Via.NONE: 402}),
    "cublas_v100_with": (209, 7, 0, 1, {Via.NONE: 209}),
}
NEEDS_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason="no real exports (../shared/traces)")
EVERY = [*OURS, *(pytest.param(name, marks=NEEDS_SHARED) for name in OTHERS)]
Open = Callable[[str], tuple[Path, KernelTable]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """A real export by name, unpacked and open; each is parsed once."""
    folder = tmp_path_factory.mktemp("real")
    known: dict[str, tuple[Path, KernelTable]] = {}
    with contextlib.ExitStack() as close:

        def opened(name: str) -> tuple[Path, KernelTable]:
            if name not in known:
                path = unpacked(name, folder)
                known[name] = path, close.enter_context(open_table([path], NO_CACHE))
            return known[name]

        yield opened


def unpacked(name: str, folder: Path) -> Path:
    places = (SHARED, REPOSITORY / "tests/traces", REPOSITORY / "opkit/recorded")
    (packed,) = (p for p in (place / f"{name}.sqlite.gz" for place in places) if p.is_file())
    path = folder / f"{name}.sqlite"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def plain(path: Path, sql: str) -> Rows:
    """Rows of a query to sqlite3 alone."""
    with closing(sqlite3.connect(path)) as db:
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")
        return db.execute(sql).fetchall()


@pytest.mark.parametrize("name", EVERY)
def test_names_calls_and_totals_are_those_of_sqlite3(name: str, real: Open) -> None:
    path, table = real(name)
    calls = table.rows(
        'SELECT n.name, count(*), sum(k."end" - k.start), min(k."end" - k.start), min(k.start) '
        "FROM kernel k JOIN name n ON n.id = k.name_id WHERE k.kind = 'kernel' GROUP BY 1"
    )
    assert sorted(calls) == sorted(
        plain(
            path,
            "SELECT s.value, count(*), sum(k.end - k.start), min(k.end - k.start), min(k.start) "
            "FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName "
            "GROUP BY 1",
        )
    )
    for kind in ("memcpy", "memset"):
        copies = table.rows(
            'SELECT coalesce(sum("end" - start), 0), count(*) FROM kernel WHERE kind = ?', [kind]
        )
        made = f"CUPTI_ACTIVITY_KIND_{kind.upper()}"
        there = plain(path, f"SELECT 1 FROM sqlite_master WHERE name = '{made}'")
        sums = f"SELECT coalesce(sum(end - start), 0), count(*) FROM {made}"
        assert copies == (plain(path, sums) if there else [(0, 0)])


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_of_kernels_is_given_what_a_scan_finds(name: str, real: Open) -> None:
    path, table = real(name)
    got = every(table, "k.pid, k.correlation, k.graph_node, k.launch_start, k.node_start, k.start")
    sample = random.Random(name).sample(got, min(300, len(got)))
    slow = Slow(path)
    for (pid, correlation, node, launched, created, _), what in sample:
        wanted = slow.wanted(pid, correlation, node)
        assert launched in wanted.launches
        assert created in wanted.nodes
        assert what in wanted.given


@NEEDS_SHARED
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_linked_and_how(name: str, real: Open) -> None:
    kernels, copies, unlinked, ranks, ways = OTHERS[name]
    _, table = real(name)
    assert table.rows(
        "SELECT count(*) FILTER (kind = 'kernel'), count(*) FILTER (kind <> 'kernel'), "
        "count(*) FILTER (launch_start IS NULL) FROM kernel"
    ) == [(kernels, copies, unlinked)]
    assert len(table.ranks) == ranks
    assert sum(rank.kernels for rank in table.ranks) == kernels
    found = table.rows("SELECT via, count(*) FROM kernel WHERE kind = 'kernel' GROUP BY 1")
    assert dict(found) == ways
    assert table.rows("SELECT count(*) FROM kernel WHERE launch_start > start") == [(0,)]
    foreign = "launch_tid - (launch_tid & 16777215) <> pid"
    assert table.rows(f"SELECT count(*) FROM kernel WHERE {foreign}") == [(0,)]


@NEEDS_SHARED
def test_two_processes_of_one_gpu_pair_are_two_ranks(real: Open) -> None:
    _, table = real("nsysai_h100_2gpu_1s")
    assert [(r.rank, r.process, r.devices, r.kernels) for r in table.ranks] == [
        (0, 111, (0,), 1721), (1, 112, (1,), 1721),
    ]  # fmt: skip
    assert table.rows("SELECT rank, count(*) FROM kernel GROUP BY 1 ORDER BY 1") == [
        (0, 2184), (1, 2184),
    ]  # fmt: skip
    counters = "SELECT count(*) FROM path WHERE path LIKE '%op_id%' OR path LIKE '%seq =%'"
    assert table.rows(counters) == [(0,)]
    assert table.rows("SELECT count(DISTINCT path) > 500 FROM path") == [(True,)]


@NEEDS_SHARED
def test_joined_without_the_process_these_kernels_would_be_too_many(real: Open) -> None:
    """The trap is in the file: correlation ids occur in both processes."""
    path, table = real("mpi_2procs_1gpu")
    both = plain(path, "SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL k "
                       "JOIN CUPTI_ACTIVITY_KIND_RUNTIME r USING (correlationId)")  # fmt: skip
    assert both[0][0] > 885
    assert table.rows("SELECT count(launch_start) FROM kernel WHERE kind = 'kernel'") == [(885,)]
    path, table = real("pipit_saxpy_mpi")
    nested = plain(path, "SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL k "
                         "JOIN CUPTI_ACTIVITY_KIND_RUNTIME r USING (correlationId)")  # fmt: skip
    assert nested == [(10,)]
    assert table.rows("SELECT count(launch_start) FROM kernel WHERE kind = 'kernel'") == [(5,)]


@NEEDS_SHARED
def test_one_report_in_three_schemas_gives_equal_tables(real: Open, tmp_path: Path) -> None:
    """2020.3, 2022.4, and the report itself when there is an nsys to export it."""
    columns = """n.name, k.kind, k.start, k."end", k.device, k.stream, k.correlation, k.rank,
        k.grid_x, k.grid_y, k.grid_z, k.block_x, k.launch_start, k.launch_tid, k.range IS NULL"""
    tables = [real(name)[1] for name in ("cudf_2020", "cudf_2020_via_2022_4")]
    with contextlib.ExitStack() as close:
        with contextlib.suppress(ToolMissing):
            find_nsys()
            report = shutil.copy(SHARED / "cudf_2020.qdrep", tmp_path)
            tables.append(close.enter_context(open_table([Path(report)], NO_CACHE)))
        read = [every(table, columns) for table in tables]
        spans = 'SELECT text, start, "end", tid, rank FROM range ORDER BY ALL'
        ranges = [table.rows(spans) for table in tables]
    assert len(read[0]) == 426
    assert all(each == read[0] for each in read[1:])
    assert all(each == ranges[0] for each in ranges[1:])
    assert len(ranges[0]) == 892


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_files_of_one_real_run_are_on_one_clock(order: tuple[int, ...], tmp_path: Path) -> None:
    """An all-reduce ends on both ranks at once; the sessions began 2.15 ms apart."""
    paths = [unpacked(f"h200-rank{i}", tmp_path) for i in order]
    with open_table(paths, NO_CACHE) as table:
        assert [(r.rank, r.file, r.devices) for r in table.ranks] == [
            (i, order.index(i), (i,)) for i in range(2)
        ]
        assert table.one_clock
        epochs = [table.facts[order.index(i)].epoch_ns for i in range(2)]
        assert [epoch and epoch - 1795281645051147489 for epoch in epochs] == [0, 2_150_844]
        ends = table.rows("""SELECT list(k."end" ORDER BY k.start) FROM kernel k
            JOIN name n ON n.id = k.name_id WHERE n.family = 'nccl' GROUP BY k.rank
            ORDER BY k.rank""")
        first, second = (each for (each,) in ends)
        assert len(first) == len(second) > 20
        apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
        assert max(apart) < 50_000
        sql = "SELECT rank, count(*), min(number), max(number) FROM step GROUP BY 1 ORDER BY 1"
        assert table.rows(sql) == [(0, 10, 0, 9), (1, 10, 0, 9)]


# Threads. No real export at hand launches from two: the two below are made of a real one.


@pytest.fixture
def two_threads(tmp_path: Path) -> Path:
    """``cs336_27b_nvtx`` with every second launch moved to a thread without ranges, as autograd
    does it."""
    if not SHARED.is_dir():
        pytest.skip("no real exports (../shared/traces)")
    path = unpacked("cs336_27b_nvtx", tmp_path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET globalTid = globalTid + 1 "
                   "WHERE correlationId % 2 = 1")  # fmt: skip
    return path


def by_start(table: KernelTable) -> dict[int, Given]:
    return {start: what for (start,), what in every(table, "k.start")}


def coverage(table: KernelTable) -> dict[Via, float]:
    """Share of kernel time by how its path was found."""
    rows = table.rows(
        "SELECT via, sum(\"end\" - start) FROM kernel WHERE kind = 'kernel' GROUP BY 1"
    )
    total = sum(ns for _, ns in rows)
    return {Via(via): round(ns / total, 3) for via, ns in rows}


def test_a_thread_without_ranges_is_covered_by_time(two_threads: Path, real: Open) -> None:
    whole = by_start(real("cs336_27b_nvtx")[1])
    assert coverage(real("cs336_27b_nvtx")[1]) == {Via.THREAD: 1.0}
    with open_table([two_threads], NO_CACHE) as table:
        shares, found = coverage(table), by_start(table)
    assert set(shares) == {Via.THREAD, Via.TIME}
    assert {start: what[:3] for start, what in found.items()} == {
        start: what[:3] for start, what in whole.items()
    }
    reading = Reading(Options(other_threads=False), use_cache=False)
    with open_table([two_threads], reading) as table:
        alone = coverage(table)
        own = {start: what for start, what in by_start(table).items() if what.via is not Via.NONE}
    assert alone == {Via.THREAD: shares[Via.THREAD], Via.NONE: shares[Via.TIME]}
    assert 0.3 < alone[Via.THREAD] < 0.7
    assert own == {start: whole[start] for start in own}


# Against nsys itself.


def nvtx_kern_sum(path: Path) -> Counter[tuple[str, int, str]]:
    """Kernels by range, thread and name; nothing when this nsys cannot read the file.

    Its times are not used: of nested API calls, and of ranges of one name in each other, it adds a
    kernel's time once for each.
    """
    try:
        nsys = str(find_nsys().path)
    except ToolMissing as error:
        pytest.skip(str(error))
    command = [nsys, "stats", "--report", "nvtx_kern_sum", "--format", "csv", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    _, first, table = answer.stdout.partition("NVTX Range,")
    domains = plain(path, "SELECT DISTINCT text FROM NVTX_EVENTS WHERE eventType = 75")
    prefix = re.compile("|".join(["", *(re.escape(f"{text}:") for (text,) in domains)][::-1]))
    found: Counter[tuple[str, int, str]] = Counter()
    for row in csv.DictReader(io.StringIO(first + table)):
        if row["NVTX Range"] and row["Kern Inst"]:
            text = prefix.sub("", row["NVTX Range"], count=1)
            found[text, int(row["TID"]), row["Kernel Name"]] += int(row["Kern Inst"])
    return found


@NEEDS_SHARED
@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("cs336_27b_nvtx", 68),
        ("llama3_4060ti", 1170),
        ("nsightful_power_iter", 1105),
        ("cudf_2020_via_2022_4", 78),
        ("pipit_saxpy_mpi", 1),
        ("cs336_win_2026_2", 9),
    ],
)
def test_kernels_in_each_range_are_those_of_nvtx_kern_sum(
    name: str, pairs: int, real: Open
) -> None:
    """nsys counts a kernel in all ranges around its call; a path names the same ones."""
    path, table = real(name)
    wanted = nvtx_kern_sum(path)
    if not wanted:
        pytest.skip("this nsys cannot read an export of that version")
    found: Counter[tuple[str, int, str]] = Counter()
    sql = """SELECT p.path, k.launch_tid & 16777215, n.name, count(*)
        FROM kernel k JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id
        WHERE k.kind = 'kernel' AND p.path <> '' GROUP BY ALL"""
    for ranges, tid, kernel, count in table.rows(sql):
        for text in set(ranges.split("/")):
            found[text, tid, kernel] += count
    assert found == wanted
    assert len(found) == pairs


def test_the_samples_hold_every_way(real: Open) -> None:
    """Else the comparisons above would prove little: eager launches, replays, lost launches."""
    ways: dict[str, Any] = {}
    for name in OURS:
        _, table = real(name)
        ways |= dict(table.rows("SELECT via::VARCHAR, count(*) FROM kernel GROUP BY 1"))
        ways |= dict(table.rows("SELECT 'step ' || step_via, count(*) FROM kernel GROUP BY 1"))
        ways |= dict(table.rows("SELECT 'lost', count(*) FROM kernel WHERE launch_start IS NULL "
                                "HAVING count(*) > 0"))  # fmt: skip
    assert set(ways) == {"0", "1", "2", "step 0", "step 1", "lost"}
