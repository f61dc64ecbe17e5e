"""The benchmarks measure what they say: copies keep their joins, failures and differences show."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import big_export  # noqa: E402
import parse  # noqa: E402
import parse_tools  # noqa: E402

from opkit.nsys_parsers.tool import Nsys  # noqa: E402

RECORDING = ROOT / "tests/traces/h100-process-e2e.sqlite.gz"
COPIES = 3
EVENTS = (
    "CUPTI_ACTIVITY_KIND_KERNEL",
    "CUPTI_ACTIVITY_KIND_MEMCPY",
    "CUPTI_ACTIVITY_KIND_MEMSET",
    "CUPTI_ACTIVITY_KIND_RUNTIME",
    "CUDA_GRAPH_NODE_EVENTS",
)
KERNEL = EVENTS[0]
# The nsys for `nsys stats`: only where one is named, as on the machines that measure.
NSYS = os.environ.get("OPKIT_NSYS") or shutil.which("nsys")
needs_nsys = pytest.mark.skipif(not NSYS, reason="no nsys here: set OPKIT_NSYS or PATH")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one.sqlite`` as recorded, ``big`` thrice that, ``eager`` twice that without graphs."""
    path = tmp_path_factory.mktemp("big")
    with gzip.open(RECORDING) as packed, (path / "one.sqlite").open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    kernels = count(path / "one.sqlite", KERNEL)
    made = big_export.replicate(RECORDING, path / "big.sqlite", 2 * kernels + 1)
    assert made == COPIES * kernels
    launched = count(path / "one.sqlite", f"{KERNEL} WHERE graphNodeId IS NULL")
    made = big_export.replicate(
        path / "one.sqlite", path / "eager.sqlite", 2 * launched, eager=True
    )
    assert made == 2 * launched
    return path


def ask(path: Path, query: str) -> list[tuple[int | str | None, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def count(path: Path, what: str) -> int:
    return int(str(ask(path, f"SELECT count(*) FROM {what}")[0][0]))


# --- the generator ------------------------------------------------------------------------------


def test_the_recording_is_replicated_in_its_own_schema(folder: Path) -> None:
    schema = "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name"
    one, big = folder / "one.sqlite", folder / "big.sqlite"
    assert ask(big, schema) == ask(one, schema)
    for (table,) in ask(one, "SELECT name FROM sqlite_master WHERE type = 'table'"):
        if table == "NVTX_EVENTS":
            ranges = "NVTX_EVENTS WHERE eventType = 59"
            assert count(big, ranges) == COPIES * count(one, ranges)
            assert count(big, "NVTX_EVENTS WHERE eventType = 75") == 1, "a domain is made once"
        else:
            times = COPIES if table in EVENTS else 1
            assert count(big, str(table)) == times * count(one, str(table)), table


def test_the_first_copy_is_the_recording(folder: Path) -> None:
    recorded = ask(folder / "one.sqlite", f"SELECT * FROM {KERNEL} ORDER BY rowid")
    first = f"SELECT * FROM {KERNEL} ORDER BY rowid LIMIT {len(recorded)}"
    assert ask(folder / "big.sqlite", first) == recorded


def test_copies_follow_each_other_and_share_no_id(folder: Path) -> None:
    one, big = folder / "one.sqlite", folder / "big.sqlite"
    spans: list[tuple[int, int]] = []
    for copy in range(COPIES):
        parts = []
        for table in (*EVENTS, "NVTX_EVENTS"):
            # The last row of NVTX_EVENTS, a domain, is in the first copy only.
            rows = count(one, table) - (table == "NVTX_EVENTS")
            domain = int(table == "NVTX_EVENTS" and copy > 0)
            begin = copy * rows + domain
            among = f"FROM {table} WHERE rowid > {begin} AND rowid <= {begin + rows}"
            parts.append(ask(big, f'SELECT min(start), max("end") {among}')[0])
        spans.append((min(int(str(a)) for a, _ in parts), max(int(str(b)) for _, b in parts)))
    for (_, end), (start, _) in pairwise(spans):
        assert end < start
    for table, column in (
        (KERNEL, "correlationId"), ("CUPTI_ACTIVITY_KIND_MEMCPY", "correlationId"),
        ("CUPTI_ACTIVITY_KIND_RUNTIME", "correlationId"), (KERNEL, "gridId"),
        (KERNEL, "graphNodeId"), ("CUDA_GRAPH_NODE_EVENTS", "graphNodeId"),
        ("CUDA_GRAPH_NODE_EVENTS", "originalGraphNodeId"),
    ):  # fmt: skip
        distinct = f"SELECT count(DISTINCT {column}) FROM {table}"
        (of_one,), (of_big,) = ask(one, distinct)[0], ask(big, distinct)[0]
        assert of_big == COPIES * int(str(of_one)) > 0, (table, column)


def joined(path: Path) -> dict[str, int]:
    """Rows of the joins that attribution rests on."""
    call = (
        f"{KERNEL} k JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON r.correlationId = k.correlationId"
        " AND r.globalTid & ~0xFFFFFF = k.globalPid"
    )
    node = f"{KERNEL} k JOIN CUDA_GRAPH_NODE_EVENTS n ON n.graphNodeId = k.graphNodeId"
    first = (
        "CUDA_GRAPH_NODE_EVENTS c JOIN CUDA_GRAPH_NODE_EVENTS o"
        " ON o.graphNodeId = c.originalGraphNodeId AND o.originalGraphNodeId IS NULL"
    )
    return {
        "call": count(path, call),
        "call before": count(path, f"{call} WHERE r.start <= k.start"),
        "node": count(path, node),
        "node before": count(path, f"{node} WHERE n.start <= k.start"),
        "clone": count(path, first),
    }


def test_every_kernel_keeps_its_own_launch_and_node(folder: Path) -> None:
    one, big = joined(folder / "one.sqlite"), joined(folder / "big.sqlite")
    assert big == {name: COPIES * rows for name, rows in one.items()}
    assert one["call"] == count(folder / "one.sqlite", KERNEL)
    assert min(one.values()) > 500


def ranges_of(path: Path, kernels: int) -> list[tuple[int, tuple[str, ...]]]:
    """(number within its copy, texts of the ranges open at its launch) of every 401st kernel."""
    rows = ask(
        path,
        f"""WITH launch AS MATERIALIZED (
                SELECT k.rowid AS number, r.* FROM {KERNEL} k
                JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON r.correlationId = k.correlationId
                WHERE (k.rowid - 1) % {kernels} % 401 = 0)
            SELECT number, v.text FROM launch CROSS JOIN NVTX_EVENTS v
            WHERE v.eventType = 59 AND v.globalTid = launch.globalTid
                AND v.start <= launch.start AND v."end" >= launch."end"
            ORDER BY number, v.start""",
    )
    texts: dict[int, list[str]] = {}
    for row, text in rows:
        texts.setdefault(int(str(row)), []).append(str(text))
    return [((row - 1) % kernels, tuple(found)) for row, found in texts.items()]


def test_every_kernel_keeps_its_own_ranges(folder: Path) -> None:
    kernels = count(folder / "one.sqlite", KERNEL)
    one = ranges_of(folder / "one.sqlite", kernels)
    assert len(one) > 30
    assert Counter(ranges_of(folder / "big.sqlite", kernels)) == Counter(one * COPIES)


def test_without_graphs_nearly_every_kernel_has_a_call_of_its_own(folder: Path) -> None:
    eager = folder / "eager.sqlite"
    assert count(eager, "CUDA_GRAPH_NODE_EVENTS") == 0
    for table in EVENTS[:3]:
        assert count(eager, f"{table} WHERE graphNodeId IS NOT NULL") == 0
    ((launches,),) = ask(eager, f"SELECT count(DISTINCT correlationId) FROM {KERNEL}")
    assert int(str(launches)) > 0.95 * count(eager, KERNEL)


def test_an_export_without_kernels_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small.sqlite"
    with closing(sqlite3.connect(small)) as db:
        db.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
    with pytest.raises(ValueError, match="no kernel to replicate"):
        big_export.replicate(small, tmp_path / "big.sqlite", 10)
    assert list(tmp_path.iterdir()) == [small]


@needs_nsys
def test_nsys_stats_reads_it_and_counts_every_copy(folder: Path, tmp_path: Path) -> None:
    nsys = Nsys(Path(str(NSYS)), "")
    sums = []
    for name in ("one", "big"):
        tools = parse_tools.nsys_tools(folder / f"{name}.sqlite", nsys)
        runs = [(tool, parse_tools.measure(tool.command, tmp_path, 120)) for tool in tools[:1]]
        assert [run.failure for _, run in runs] == [""]
        sums.append(parse_tools.csv_sums(runs[0][1].printed))
    one, big = sums
    assert big == {
        name: (COPIES * calls, COPIES * total, least, most)
        for name, (calls, total, least, most) in one.items()
    }
    plain = parse_tools.plain_tool(folder / "big.sqlite")
    done = parse_tools.measure(plain.command, tmp_path, 120)
    assert parse_tools.json_sums(done.printed) == big


# --- the harness --------------------------------------------------------------------------------

GOOD = '{"schema": "opkit.trace.kernels/1", "kernels": [{"name": "k", "calls": %d, "total_ns": 30, \
"median_ns": 10.0, "min_ns": 5, "max_ns": 15, "stddev_ns": 5.0}], "unattributed": {}}'


def prints(text: str, name: str = "opkit kernel summary, cold", code: int = 0) -> parse_tools.Tool:
    script = f"import sys; print({text!r}); print('a word', file=sys.stderr); sys.exit({code})"
    return parse_tools.Tool(
        name, [sys.executable, "-c", script], parse_tools.opkit_documents, parse_tools.json_sums
    )


def rounds(tools: list[parse_tools.Tool], folder: Path, repeat: int = 2) -> list[parse.Row]:
    plan = parse.Plan(repeat, 1, 60, folder, keep=False, scratch=folder)
    export = parse.Export(folder / "x.sqlite", 3, "")
    return parse.run_rounds(tools, export, "case", plan)


def test_equal_sums_are_said_and_others_are_a_difference(tmp_path: Path) -> None:
    tools = [prints(GOOD % 3), prints(GOOD % 3, parse_tools.PLAIN), prints(GOOD % 2, "opkit again")]
    section = parse.Section("t", rows=rounds(tools, tmp_path))
    assert [len(row.seconds) for row in section.rows] == [2, 2, 2]
    parse.compare(section)
    assert section.equal == ["opkit kernel summary, cold (case) = sqlite3 GROUP BY: 1 names"]
    assert section.differences == [
        "opkit again (case) has (2, 30, 5, 15), sqlite3 GROUP BY (3, 30, 5, 15): k"
    ]


def test_what_failed_is_shown_and_not_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = [
        prints(GOOD % 3, code=5),
        prints("Processing …", "opkit empty"),
        prints('{"schema": "opkit.trace.kernels/1", "kernels": [{"name": "k"}]}', "opkit keys"),
        prints('{"schema": "opkit.trace.kernels/1", "kernels": []}', "opkit none"),
    ]
    section = parse.Section("t", rows=rounds(tools, tmp_path))
    assert [row.failure for row in section.rows] == [
        "exit 5: a word",
        "ended with 0, but printed no rows",
        "printed something unexpected (KeyError: 'calls')",
        "printed no kernels",
    ]
    assert not any(row.seconds for row in section.rows)
    parse.compare(section)
    capsys.readouterr()
    parse.show(section, markdown=True)
    shown = capsys.readouterr().out
    assert shown.count(" failed ") == 4
    assert "exit 5: a word" in shown


def test_a_heading_alone_is_no_row_of_nsys(tmp_path: Path) -> None:
    for text, rows in (
        ("", 0),
        ("a,b\n", 0),
        ("SKIPPED: no kernels\n", 0),
        ("a,b\n1,2\n\n3,4\n", 2),
    ):
        (tmp_path / "csv").write_text(text)
        assert parse_tools.csv_rows(tmp_path / "csv") == rows


def test_a_command_over_its_time_is_ended_with_all_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300']);"
        "print(p.pid, flush=True); time.sleep(300)"
    )
    run = parse_tools.measure([sys.executable, "-c", script], tmp_path, 2)
    assert run.failure == "over 2 s"
    assert is_gone(int(run.printed.read_text()))


def is_gone(pid: int) -> bool:
    """Within 10 s: ended, or waiting for whoever inherited it."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_memory_is_that_of_the_largest_process_of_the_tree(tmp_path: Path) -> None:
    grandchild = "x = b'1' * (120 << 20)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    # From a small process, as the benchmark is: Linux counts what it was before it became another.
    code = (
        "import sys; from pathlib import Path; import parse_tools\n"
        f"command, folder = [sys.executable, '-c', {script!r}], Path({str(tmp_path)!r})\n"
        "run = parse_tools.measure(command, folder, 60)\n"
        "print(run.failure, run.peak_mib)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=90,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
    )  # fmt: skip
    assert 120 < float(done.stdout) < 240


def test_only_the_cache_beside_the_export_is_removed(tmp_path: Path) -> None:
    export = tmp_path / "x.sqlite"
    for name in ("x.sqlite.opkit", "y.sqlite.opkit", "x.opkit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"1" * parse_tools.MIB)
    assert parse_tools.cache_mib(export) == 1
    parse_tools.drop_cache(export)
    parse_tools.drop_cache(export)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.opkit", "y.sqlite.opkit"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(BENCHMARKS / "parse.py"), "--kernels", "200000", "--no-nsys"]
    child = subprocess.Popen(
        [*command, "--repeat", "200"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert child.stderr is not None
    assert "made in" in child.stderr.readline()
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert err.endswith("interrupted; all that was started and made is gone\n")
    assert list(tmp_path.iterdir()) == []


def test_a_table_with_ratios_and_json_come_from_the_same_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = parse_tools.SUMMARY
    rows = [
        parse.Row("s", summary, "nsys", 1_000_000, seconds=[8.0, 9.0, 10.0], peak_mib=1000),
        parse.Row("s", "opkit", "opkit", 1_000_000, summary, [1.0, 0.9, 2.0], 300, cache_mib=0),
        parse.Row("s", "slow", "nsys", 1_000_000, failure="over 600 s", peak_mib=5000),
        parse.Row("s", "fast", "opkit", 1_000_000, "slow", [3.0], 400),
    ]
    section = parse.Section("t", rows=rows)
    parse.show(section, markdown=True)
    shown = [[c.strip() for c in x.split("|")] for x in capsys.readouterr().out.splitlines()]
    assert ["", "opkit", "1.00", "0.90–2.00 (3)", "300", "1.000", "9.0×", "0", ""] in shown
    assert ["", "slow", "over 600 s", "", "5,000", "", "", "", ""] in shown
    assert ["", "fast", "3.00", "3.00–3.00 (1)", "400", "3.000", ">200.0×", "", ""] in shown
    document = json.loads(json.dumps(parse.as_json(section)))
    assert [row["median_s"] for row in document["rows"]] == [9.0, 1.0, None, 3.0]
    assert [row["nsys_stats_takes"] for row in document["rows"]] == ["", "9.0×", "", ">200.0×"]
