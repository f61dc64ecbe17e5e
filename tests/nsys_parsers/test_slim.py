"""``slim`` keeps what alignment reads, and nothing that tells of a machine or a person."""

from __future__ import annotations

import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from made_export import (
    EAGER_STEP,
    GEMM,
    GRAPH_STEP,
    HOST,
    PID,
    TOPK,
    USER,
    make_export,
    module_range,
)

from opkit.errors import BadInput
from opkit.nsys_parsers.keep import Keep
from opkit.nsys_parsers.scrub import Scrubber, private_parts
from opkit.nsys_parsers.slim import find_private, slim
from opkit.nsys_parsers.trace import open_trace

REAL = sorted((Path(__file__).parents[3] / "shared" / "traces").glob("*.sqlite.gz"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path / "full.sqlite")


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(path)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def all_text(path: Path) -> str:
    db = sqlite3.connect(path)
    try:
        return "\n".join(db.iterdump())
    finally:
        db.close()


def what_is_read(path: Path) -> object:
    """Everything that alignment reads of an export, or why it refuses to."""
    columns = 'name, start, "end", pid, launch_start, launch_tid, node_start, node_tid'
    try:
        with open_trace(path) as trace:
            kernels = trace.rows(f"SELECT {columns} FROM kernel ORDER BY ALL")
            return kernels, trace.counts, trace.facts.schema, trace.facts.graph_mode
    except BadInput as refused:
        return str(refused).removeprefix(str(path))


def test_without_limits_every_kernel_keeps_its_launch_node_and_name(
    export: Path, tmp_path: Path
) -> None:
    slim(export, tmp_path / "small.sqlite")
    asked = (
        'SELECT name, start, "end", pid, launch_start, launch_tid, node_start FROM kernel '
        "WHERE name NOT LIKE '%/build/%' AND name NOT LIKE '%Copy.cu%' ORDER BY ALL"
    )
    with open_trace(export) as full, open_trace(tmp_path / "small.sqlite") as small:
        assert full.rows(asked) == small.rows(asked)
        assert full.counts == small.counts
        assert small.counts.kernels == 27
        assert full.facts.schema == small.facts.schema == "3.11.1"
        assert small.facts.graph_mode == "node"
        assert small.facts.warnings == ("Not all CUDA events might have been collected.",)


def test_nothing_private_is_left(export: Path, tmp_path: Path) -> None:
    before = find_private(export)
    target = tmp_path / "small.sqlite.gz"
    report = slim(export, target)

    assert any("TARGET_INFO_SYSTEM_ENV" in line for line in before)
    assert any(USER in line for line in before)
    assert find_private(target) == []
    (tmp_path / "small.sqlite").write_bytes(gzip.decompress(target.read_bytes()))
    text = all_text(tmp_path / "small.sqlite")
    for word in (HOST, USER, "hf_abc", "s3cret", "10.3.90.33", "/data", "1b:00", "sshd", "/home"):
        assert word not in text, word
    assert report.scrubbed == {
        "IP address": 1,
        "absolute path": 4,
        "environment variable": 1,
        "host or user name": 1,
    }
    assert report.dropped == ("OSRT_API", "TARGET_INFO_SYSTEM_ENV", "ThreadNames")


def test_what_is_scrubbed_stays_readable(export: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.sqlite"
    slim(export, target)
    assert rows(target, "SELECT text FROM DIAGNOSTIC_EVENT WHERE severity = 1") == [
        ("Process was launched by the profiler, see pid_1_stdout.log on <host>",)
    ]
    assert rows(target, "SELECT name, uuid, busLocation FROM TARGET_INFO_GPU") == [
        ("NVIDIA H100 80GB HBM3", None, None)
    ]
    assert rows(target, "SELECT globalPid, name FROM PROCESSES") == [(PID, "process")]
    assert json.loads(rows(target, "SELECT value FROM OPKIT_MANIFEST")[0][0]) == {
        "side": "e2e",
        "command": [
            "vllm", "serve", "dsv32", "--api-key", "<secret>", "--host", "<address>",
            "HF_HOME=<value>",
        ],
        "versions": {"cublas": "12.4.5.8"},
    }  # fmt: skip
    strings = [value for (value,) in rows(target, "SELECT value FROM StringIds ORDER BY id")]
    assert strings == [
        GEMM,
        TOPK,
        "void at::native::copy_kernel at Copy.cu:33",
        "cudaLaunchKernel_v7000",
        "cudaGraphLaunch_v10000",
        "registered range in run 4",
    ]


def test_graph_nodes_stay_only_where_a_kept_kernel_came_from(export: Path, tmp_path: Path) -> None:
    slim(export, tmp_path / "small.sqlite")
    nodes = rows(
        tmp_path / "small.sqlite",
        "SELECT graphNodeId, originalGraphNodeId FROM CUDA_GRAPH_NODE_EVENTS ORDER BY graphNodeId",
    )
    assert nodes == [(1, None), (2, None), (101, 1), (102, 2)]


def test_first_step_of_each_label_stays_with_all_it_launched(export: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.sqlite"
    report = slim(export, target, keep=Keep(steps=1))
    # The GPU runs behind: a kernel belongs to the step that launched it, not to the one it ran in.
    assert rows(target, "SELECT globalPid, correlationId FROM CUPTI_ACTIVITY_KIND_KERNEL") == [
        *[(PID, correlation) for correlation in (1, 2, 3, 11, 12, 13)],
        (PID, 900),
        (PID, 900),
    ]
    launches = "SELECT globalTid & ~0xFFFFFF, correlationId FROM CUPTI_ACTIVITY_KIND_RUNTIME"
    launches = launches.replace("0xFFFFFF", "16777215")
    assert rows(target, launches) == [
        *[(PID, correlation) for correlation in (1, 2, 3, 11, 12, 13)],
        (PID, 900),
    ]
    assert report.rows["CUPTI_ACTIVITY_KIND_KERNEL"] == (27, 8)
    texts = [text for (text,) in rows(target, "SELECT text FROM NVTX_EVENTS ORDER BY start")]
    # The graph's nodes were made before the step: the module range there must stay.
    assert texts[0] == module_range(0, "self_attn")
    assert texts.count(EAGER_STEP) == 1
    assert texts.count(GRAPH_STEP) == 1
    assert texts[-1] == "TensorRT-LLM"


def test_only_modules_that_matter(export: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.sqlite"
    slim(export, target, keep=Keep(modules=r"layers\.1\.self_attn$", texts=("^registered",)))
    texts = rows(
        target,
        "SELECT DISTINCT coalesce(n.text, s.value) FROM NVTX_EVENTS n "
        "LEFT JOIN StringIds s ON s.id = n.textId ORDER BY 1",
    )
    assert [text for (text,) in texts] == [
        "TensorRT-LLM",
        GRAPH_STEP,
        EAGER_STEP,
        "registered range in run 4",
        module_range(1, "self_attn"),
    ]


def test_first_iterations_of_a_mock(export: Path, tmp_path: Path) -> None:
    db = sqlite3.connect(export)
    db.execute("DELETE FROM NVTX_EVENTS")
    for step in range(3):
        text = f"opkit dsa context b=1 t=4096 past=0 mode=eager variant=mock iter={step}"
        start = 1_000_000 * (step + 1)
        db.execute(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid) VALUES (?,?,59,?,?)",
            (start, start + 400_000, text, PID + 77),
        )
    db.commit()
    db.close()
    slim(export, tmp_path / "small.sqlite", keep=Keep(iterations=2))
    kept = rows(tmp_path / "small.sqlite", "SELECT text FROM NVTX_EVENTS")
    assert [text[-6:] for (text,) in kept] == ["iter=0", "iter=1"]
    correlations = rows(
        tmp_path / "small.sqlite", "SELECT correlationId FROM CUPTI_ACTIVITY_KIND_KERNEL"
    )
    assert [c for (c,) in correlations] == [1, 2, 3, 11, 12, 13, 101, 102, 103, 111, 112, 113]


def test_same_input_gives_the_same_bytes(export: Path, tmp_path: Path) -> None:
    slim(export, tmp_path / "a.sqlite.gz")
    slim(export, tmp_path / "b.sqlite.gz")
    assert (tmp_path / "a.sqlite.gz").read_bytes() == (tmp_path / "b.sqlite.gz").read_bytes()
    # And slim of a slim changes nothing that is said.
    again = slim(tmp_path / "a.sqlite.gz", tmp_path / "c.sqlite.gz")
    assert again.scrubbed == {}
    assert all(before == after for before, after in again.rows.values())


def test_text_that_is_no_utf8_is_kept_readable(export: Path, tmp_path: Path) -> None:
    db = sqlite3.connect(export)
    db.execute("UPDATE NVTX_EVENTS SET text = CAST(x'61ff62' AS TEXT) WHERE eventType = 75")
    db.commit()
    db.close()
    slim(export, tmp_path / "small.sqlite")
    kept = rows(tmp_path / "small.sqlite", "SELECT text FROM NVTX_EVENTS WHERE eventType = 75")
    assert kept == [("a\ufffdb",)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an SQLite file"),
        (b"id,name\n1,a\n" * 9, "not an SQLite file"),
        (gzip.compress(b"text" * 99), "not an SQLite file"),
        (gzip.compress(b"SQLite format 3\0" * 99)[:-9], "gzip file is damaged"),
        (b"SQLite format 3\0" * 99, "cannot be read"),
    ],
)
def test_a_bad_file_is_one_sentence(content: bytes, said: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.sqlite"
    bad.write_bytes(content)
    for use in (lambda: slim(bad, tmp_path / "out.sqlite"), lambda: find_private(bad)):
        with pytest.raises(BadInput, match=said) as caught:
            use()
        assert "bad.sqlite" in str(caught.value)
    assert not (tmp_path / "out.sqlite").exists()


def test_a_limit_without_labels_is_refused(export: Path, tmp_path: Path) -> None:
    db = sqlite3.connect(export)
    db.execute("DELETE FROM NVTX_EVENTS")
    db.commit()
    db.close()
    with pytest.raises(BadInput, match="no step label"):
        slim(export, tmp_path / "out.sqlite", keep=Keep(steps=1))


def test_source_is_never_overwritten(export: Path) -> None:
    before = export.read_bytes()
    with pytest.raises(BadInput, match="same file"):
        slim(export, export)
    assert export.read_bytes() == before


@pytest.mark.parametrize("wrong", [{"modules": "("}, {"steps": 0}, {"texts": ("[",)}])
def test_a_wrong_choice_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Keep(**wrong)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("see /tmp/nvidia/x/pid_1.log for output", "see pid_1.log for output"),
        (r"Loaded C:\Program Files\NVIDIA\cupti64_132.dll", "Loaded cupti64_132.dll"),
        ("in /home/alice", "in ~"),
        ("PATH=/usr/bin:/bin x", "PATH=<value> x"),
        ("HF_TOKEN=12345", "HF_TOKEN=<value>"),
        ("from http://10.0.0.7:8000/v1/models", "from <url>"),
        ("peer 10.3.90.33 up", "peer <address> up"),
        ("by jane.doe@example.org", "by <email>"),
        ("on dgx-04 and DGX-04.", "on <host> and <host>."),
        ("A=1\0HOME=/root\0PS1=(venv) \0", "<environment>"),
    ],
)
def test_private_parts_are_replaced(text: str, clean: str) -> None:
    scrubber = Scrubber(frozenset({"dgx-04", "root"}))
    assert scrubber.text(text) == clean
    assert sum(scrubber.counts.values()) >= 1
    assert private_parts(clean) == []


@pytest.mark.parametrize(
    "text",
    [
        "void at::native::vectorized_elementwise_kernel<(int)4, at::CUDAFunctor_add<float>>",
        "void k<lambda(int)#1, (T1)2/(T2)3>(T3 *, const int, std::array<char *, (unsigned long)3>)",
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT",
        "void f<&operator==, (MAX >= 3)>()",
        "{'Module': 'model.layers.0.self_attn', 'TrainableParams': {}, 'Inputs': [[4096, 7168]]}",
        "opkit dsa context b=4 t=1024 past=0 mode=eager variant=mock iter=3",
        "[Executor] _forward_step 12: 1 ctx reqs, 1024 ctx tokens, 4 gen reqs",
        "tokens/s/gpu at nsys 2024.2.3.38, BLOCK_M=128, see ./runs/a/b",
        "memcpy@@GLIBC_2.14 on 127.0.0.1",
    ],
)
def test_code_and_labels_come_through(text: str) -> None:
    scrubber = Scrubber(frozenset({"model", "vm"}))
    assert scrubber.text(text) == text
    assert private_parts(text) == []


@pytest.mark.skipif(not REAL, reason="no real exports (../shared/traces)")
@pytest.mark.parametrize("real", REAL, ids=lambda path: path.name.split(".")[0])
def test_real_exports_come_out_clean_and_equal(real: Path, tmp_path: Path) -> None:
    target = tmp_path / real.name
    report = slim(real, target)
    assert find_private(target) == []
    assert report.target_bytes < report.source_bytes
    assert what_is_read(target) == what_is_read(real)
