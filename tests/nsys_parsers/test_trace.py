"""Opening an export: what is refused and how, and that nothing of a real one is lost."""

from __future__ import annotations

import csv
import gzip
import io
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from gpu_export import Export
from made_export import make_export

from opkit.errors import BadInput, OpkitError, ToolMissing
from opkit.nsys_parsers.export import manifest_dict
from opkit.nsys_parsers.tool import find_nsys
from opkit.nsys_parsers.trace import KernelCounts, Trace, open_trace

TRACES = Path(__file__).parents[3] / "shared" / "traces"

try:
    NSYS = str(find_nsys().path)
except ToolMissing:
    NSYS = ""

# kernels, copies and fills, unlinked, from graphs, unresolved: as MANIFEST.md and sqlite3 say
REAL = {
    "nsysai_h100_2gpu_1s": KernelCounts(3442, 926, 2276, 0, 0),
    "nsysai_mock": KernelCounts(2, 1, 0, 0, 0),
    "cs336_27b_nvtx": KernelCounts(7328, 294, 0, 0, 0),
    "cs336_27b_graphmode": KernelCounts(30, 0, 0, 0, 0),
    "cs336_win_2026_2": KernelCounts(4485, 243, 0, 0, 0),
    "nsightful_power_iter": KernelCounts(3689, 89, 0, 0, 0),
    "pipit_saxpy_mpi": KernelCounts(5, 15, 0, 0, 0),
    "mpi_2procs_1gpu": KernelCounts(885, 1510, 0, 0, 0),
    "cudf_2020": KernelCounts(268, 158, 0, 0, 0),
    "cudf_2020_via_2022_4": KernelCounts(268, 158, 0, 0, 0),
    "rtx5070_2025_5": KernelCounts(2102, 8, 0, 0, 0),
    "llama3_4060ti": KernelCounts(1536, 512, 0, 0, 0),
    "cublas_v100_without": KernelCounts(402, 9, 0, 0, 0),
    "cublas_v100_with": KernelCounts(209, 7, 0, 0, 0),
}
REFUSED = {
    "neg_nvtx_only": "the kernel table is empty",
    "neg_t4_nokernels": "the kernel table is empty",
    "vulkan_2026_1_nokernels": "no GPU kernels in this export",
}
NEEDS_TRACES = pytest.mark.skipif(not TRACES.is_dir(), reason="no real exports (../shared/traces)")


@pytest.fixture
def unpacked(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The real export that the test is parametrised with, as plain SQLite."""
    path = tmp_path / f"{request.param}.sqlite"
    path.write_bytes(gzip.decompress((TRACES / f"{request.param}.sqlite.gz").read_bytes()))
    return path


def sums(trace: Trace) -> dict[str, tuple[int, int]]:
    """Executions and summed time of each kernel name, as opkit reads them."""
    sql = "SELECT name, count(*), sum(\"end\" - start) FROM kernel WHERE kind = 'kernel' GROUP BY 1"
    return {name: (count, int(total)) for name, count, total in trace.rows(sql)}


def plain_sums(path: Path) -> dict[str, tuple[int, int]]:
    """The same by sqlite3 alone."""
    sql = """SELECT s.value, count(*), sum(k.end - k.start) FROM CUPTI_ACTIVITY_KIND_KERNEL k
             JOIN StringIds s ON s.id = k.demangledName GROUP BY 1"""
    with closing(sqlite3.connect(path)) as db:
        return {name: (count, total) for name, count, total in db.execute(sql)}


def nsys_sums(path: Path) -> dict[str, tuple[int, int]]:
    """The same by ``nsys stats``; nothing when this nsys cannot read the file."""
    command = [NSYS, "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    _, found, table = answer.stdout.partition("Time (%),")
    rows = csv.DictReader(io.StringIO(found + table))
    return {
        row["Name"]: (int(row["Instances"]), int(row["Total Time (ns)"]))
        for row in rows
        if row.get("Instances")
    }


@NEEDS_TRACES
@pytest.mark.parametrize("unpacked", REAL, indirect=True)
def test_every_kernel_of_a_real_export_is_there(unpacked: Path) -> None:
    with open_trace(unpacked) as trace:
        assert trace.counts == REAL[unpacked.stem]
        assert sums(trace) == plain_sums(unpacked)


@NEEDS_TRACES
@pytest.mark.skipif(not NSYS, reason="no nsys here: set OPKIT_NSYS or PATH")
@pytest.mark.parametrize("unpacked", REAL, indirect=True)
def test_sums_of_real_exports_are_those_of_nsys_stats(unpacked: Path) -> None:
    wanted = nsys_sums(unpacked)
    if not wanted:
        pytest.skip("this nsys cannot read an export of that version")
    with open_trace(unpacked) as trace:
        assert sums(trace) == wanted


@pytest.mark.skipif(not NSYS, reason="no nsys here: set OPKIT_NSYS or PATH")
def test_sums_of_a_made_export_are_those_of_nsys_stats(tmp_path: Path) -> None:
    path = make_export(tmp_path / "made.sqlite")
    with open_trace(path) as trace:
        assert sums(trace) == nsys_sums(path)
        assert sum(count for count, _ in sums(trace).values()) == 27


@NEEDS_TRACES
@pytest.mark.parametrize("name", REFUSED)
def test_real_exports_without_kernels_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match=REFUSED[name]) as caught:
        open_trace(TRACES / f"{name}.sqlite.gz")
    assert name in str(caught.value)


@NEEDS_TRACES
def test_one_report_in_two_schemas_reads_the_same() -> None:
    columns = 'name, start, "end", launch_start, grid_x, block_x'
    read = []
    for name in ("cudf_2020", "cudf_2020_via_2022_4"):
        with open_trace(TRACES / f"{name}.sqlite.gz") as trace:
            read.append(trace.rows(f"SELECT {columns} FROM kernel ORDER BY ALL"))
    assert read[0] == read[1]
    assert len(read[0]) == 426


@NEEDS_TRACES
def test_clashing_correlation_ids_of_real_processes_never_cross() -> None:
    with open_trace(TRACES / "mpi_2procs_1gpu.sqlite.gz") as trace:
        foreign = trace.rows(
            "SELECT count(*) FROM kernel WHERE launch_tid - (launch_tid & 16777215) <> pid"
        )
        late = trace.rows("SELECT count(*) FROM kernel WHERE launch_start > start")
        clashes = trace.rows(
            "SELECT count(*) FROM (SELECT correlation FROM kernel GROUP BY 1 "
            "HAVING count(DISTINCT pid) > 1)"
        )
    assert (foreign, late) == ([(0,)], [(0,)])
    assert clashes[0][0] > 100


@NEEDS_TRACES
def test_a_report_that_cannot_be_exported_is_one_sentence() -> None:
    with pytest.raises(OpkitError, match=r"neg_interrupted_2025|nsys"):
        open_trace(TRACES / "neg_interrupted_2025.nsys-rep")


def test_facts_of_a_made_export(tmp_path: Path) -> None:
    with open_trace(make_export(tmp_path / "made.sqlite")) as trace:
        facts = trace.facts
    assert facts.gpus == ("NVIDIA H100 80GB HBM3",)
    assert (facts.nsys, facts.schema, facts.graph_mode) == ("2024.2.3.38", "3.11.1", "node")
    assert facts.warnings == ("Not all CUDA events might have been collected.",)
    assert facts.losses == ()
    assert manifest_dict(facts)["side"] == "e2e"


def test_reported_losses_are_told_from_remarks(tmp_path: Path) -> None:
    made = Export()
    made.launch("k", 100, 1_000)
    for text in (
        "Not all NVTX events might have been collected.",
        "CUPTI buffer full: 12 records dropped",
        "Process was launched by the profiler",
    ):
        made.add("DIAGNOSTIC_EVENT", text=text)
    with open_trace(made.write(tmp_path / "made.sqlite")) as trace:
        assert trace.facts.losses == ("CUPTI buffer full: 12 records dropped",)
        assert len(trace.facts.warnings) == 2


def test_a_gzipped_export_reads_like_the_plain_one(tmp_path: Path) -> None:
    plain = make_export(tmp_path / "made.sqlite")
    packed = tmp_path / "made.sqlite.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with open_trace(plain) as one, open_trace(packed) as other:
        assert one.counts == other.counts
        assert one.counts == KernelCounts(27, 0, 1, 2, 0)
        assert sums(one) == sums(other)
        assert other.facts.path == packed


def test_an_export_is_only_read_and_scratch_is_removed(tmp_path: Path) -> None:
    path = make_export(tmp_path / "it's made.sqlite")  # a quote in the path is no SQL
    before = path.read_bytes()
    with open_trace(path) as trace:
        scratch = Path(trace._export.scratch)
        assert scratch.is_dir()
    assert not scratch.exists()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def sqlite_file(path: Path, script: str) -> Path:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"id,name\n1,a\n" * 9, "not an SQLite file"),
        (gzip.compress(b"text" * 99), "not an SQLite file"),
        (gzip.compress(b"SQLite format 3\0" * 99)[:-9], "gzip file is damaged"),
        (b"SQLite format 3\0" * 99, "truncated"),
    ],
    ids=["empty", "text", "gzipped text", "cut gzip", "header only"],
)
def test_a_file_of_another_kind_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.sqlite"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=said):
        open_trace(path)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("", "the file is empty"),
        ("CREATE TABLE notes (text TEXT)", "not an nsys export"),
        ("CREATE TABLE t (a); DROP TABLE t", "without any table"),
        ("CREATE TABLE StringIds (id, value)", r"no GPU kernels .*no GPU activity"),
        ("CREATE TABLE StringIds (id, value); CREATE TABLE NVTX_EVENTS (start)",
         r"no GPU kernels .*no GPU activity"),
        ("CREATE TABLE StringIds (id, value); CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start)",
         "recorded with --cuda-graph-trace=graph"),
    ],
)  # fmt: skip
def test_a_database_of_another_kind_is_refused(script: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        open_trace(sqlite_file(tmp_path / "bad.sqlite", script))


def test_an_empty_kernel_table_is_refused(tmp_path: Path) -> None:
    made = make_export(tmp_path / "made.sqlite")
    sqlite_file(made, "DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL")
    with pytest.raises(BadInput, match="NVTX events, but no GPU activity"):
        open_trace(made)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_export_is_refused(kept: float, tmp_path: Path) -> None:
    made = Export()
    for number in range(4_000):
        made.launch(f"k{number}", 100 * number, 100 * number + 1_000)
    path = made.write(tmp_path / "made.sqlite")
    whole = path.read_bytes()
    path.write_bytes(whole[: round(len(whole) * kept)])
    with pytest.raises(BadInput, match=r"truncated|cannot be read to its end"):
        open_trace(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.sqlite", "no such file"), (tmp_path, "a folder, not")):
        with pytest.raises(BadInput, match=said):
            open_trace(path)
