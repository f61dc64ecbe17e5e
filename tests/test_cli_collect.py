"""`opkit collect`, `verify` and `install` as users run them: real processes, gemm on a CPU."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from cli_runs import Ran, run_program

SWEEP = "[gemm]\nm = [1, 16, 64]\nn = [128, 256]\nk = [256]\n"


def run_opkit(*words: object) -> Ran:
    """``opkit WORDS`` as a program."""
    return run_program(*words, cwd=Path.cwd())


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return path


def test_without_a_verdict_it_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    ran = run_opkit("collect", "gemm", "--out", tmp_path)
    assert ran.code == 7
    assert "gemm on torch is not admitted: no verdict on gemm for torch" in ran.err
    assert "--waive" in ran.err
    assert not (tmp_path / "collect").exists()


def test_a_missing_framework_is_one_sentence(tmp_path: Path) -> None:
    ran = run_opkit("collect", "gemm", "--python", tmp_path / "no-python", "--out", tmp_path)
    assert ran.code == 5
    assert "no-python: cannot be run" in ran.err


def test_a_plan_needs_neither_gpu_nor_framework_nor_verdict(tmp_path: Path) -> None:
    ran = run_opkit("collect", "dsa", "--plan", "--tp", "8", "--out", tmp_path)
    assert ran.code == 0
    assert "244 context, 184 generation a tp size; 428 rows in all, 0 of them there" in ran.out
    assert "would be refused: no verdict on dsa context for vllm" in ran.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["dsa", "--model", "x"], 5, "no GPU is visible"),
        (["gemm", "--phase", "context"], 2, "gemm has no phase context"),
        (["gemm", "--gpus", "9"], 2, "there is no GPU 9"),
        (["gemm", "--gpus", "a"], 2, "numbers and commas"),
        (["nope"], 4, "unknown op"),
        (["dsa", "--backend", "nope"], 4, "no mock of dsa for 'nope'"),
        (["dsa", "--plan", "--case-filter", "m=1"], 2, "a case has no m"),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, words: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ran = run_opkit("collect", *words, "--out", tmp_path)
    assert (ran.code, message in ran.err) == (code, True), ran.err
    assert "Traceback" not in ran.err


def test_verify_and_install_want_a_collection(tmp_path: Path) -> None:
    for words in (("verify", "dsa"), ("install", "dsa", "--systems", tmp_path / "s",
                                      "--system", "h100_sxm")):  # fmt: skip
        ran = run_opkit(*words, "--out", tmp_path)
        assert ran.code == 4
        assert "no dsa has been collected" in ran.err


def test_collect_resume_verify_and_status(tmp_path: Path, sweep: Path) -> None:
    """GIVEN no verdict WHEN gemm is collected with a waiver THEN there are tables, a second run
    measures nothing, a wider one only what is new, and the waiver stands everywhere."""
    pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    words = ("collect", "gemm", "--waive", "no GPU here", "--out", tmp_path, "--sweep", sweep)
    first = run_opkit(*words, "--limit", "4", "--json")
    assert first.code == 0, first.err
    told = json.loads(first.out)
    assert (told["planned"], told["done"], told["already"]) == (4, 4, 0)

    second = json.loads(run_opkit(*words, "--json").out)
    assert (second["planned"], second["done"], second["already"]) == (2, 2, 4)

    tables = tmp_path / "collect" / "gemm-torch" / "tables"
    with (tables / "gemm_perf.txt").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["m"], row["n"]) for row in rows].count(("16", "128")) == 1
    assert len(rows) == 6
    assert all("waived" in row["flags"] and float(row["latency"]) > 0 for row in rows)
    assert duckdb.sql(f"SELECT count(*) FROM '{tables}/gemm_perf.parquet'").fetchone() == (6,)
    proof = json.loads((tables / "gemm_perf.provenance.json").read_text())
    assert proof["waiver"] == "no GPU here"

    status = run_opkit("status", "--out", tmp_path)
    assert "collected gemm on torch" in status.out
    assert "waived: no GPU here" in status.out
    # Microseconds on loaded cores repeat within no share: what is tested is that it is judged.
    for tolerance, passed, code in ((1e9, True, 0), (1e-12, False, 1)):
        ran = run_opkit("verify", "gemm", "--out", tmp_path, "--json", "--sample", "3",
                        "--tolerance", tolerance)  # fmt: skip
        again = json.loads(ran.out)
        assert len(again["rows"]) == 3
        assert (again["failed"], again["passed"], ran.code) == ([], passed, code)


def test_a_collection_that_is_killed_goes_on(tmp_path: Path, sweep: Path) -> None:
    """Kill -9 the command in the middle; what is done stays, the next run completes it."""
    pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    words = [
        sys.executable, "-m", "opkit", "collect", "gemm", "--waive", "x", "--out", str(tmp_path),
        "--sweep", str(sweep),
    ]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    parts = tmp_path / "collect" / "gemm-torch" / "parts"
    while not any(path.stat().st_size for path in parts.glob("*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    told = json.loads(run_opkit(*words[3:], "--json").out)
    assert told["done"] + told["already"] == 6
    assert told["already"] >= 1
    assert [table["rows"] for table in told["tables"]] == [6]


def test_another_way_of_measuring_is_another_collection(tmp_path: Path, sweep: Path) -> None:
    """Rows of two timings never stand in one table; what is left out is counted."""
    pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    words = ("collect", "gemm", "--waive", "x", "--out", tmp_path, "--sweep", sweep, "--json")
    assert json.loads(run_opkit(*words).out)["done"] == 6
    told = json.loads(run_opkit(*words, "--pacing", "sustained", "--limit", "2").out)
    assert (told["planned"], told["already"]) == (2, 0)
    assert [table["rows"] for table in told["tables"]] == [2]
    assert told["elsewhere"] == 6
