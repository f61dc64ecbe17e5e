"""The self-test of nsys: against a pretended one, and for real where there is one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest
from made_machine import made_machine
from profile_bench import REAL_NSYS, needs_nsys

from opkit.doctor import selftest, selftest_child
from opkit.doctor.machine import MARK, Machine, Ran, end_marked, run_program
from opkit.doctor.selftest import KERNEL, RANGE, read_export, run_selftest

TABLES = {
    "StringIds": "id INTEGER, value TEXT",
    "NVTX_EVENTS": "text TEXT, textId INTEGER",
    "CUPTI_ACTIVITY_KIND_KERNEL": "shortName INTEGER",
    "DIAGNOSTIC_EVENT": "text TEXT",
}


def export(path: Path, **rows: Sequence[tuple[object, ...]]) -> Path:
    """An export with these rows; a table without any is missing, as nsys leaves it out."""
    with closing(sqlite3.connect(path)) as db, db:
        for table, given in rows.items():
            db.execute(f"CREATE TABLE {table} ({TABLES[table]})")
            marks = ",".join("?" * len(given[0]))
            db.executemany(f"INSERT INTO {table} VALUES ({marks})", given)
    return path


def test_ranges_are_found_inline_and_by_number(tmp_path: Path) -> None:
    strings = [(1, RANGE), (2, KERNEL)]
    by_number = export(
        tmp_path / "a",
        StringIds=strings,
        NVTX_EVENTS=[(None, 1)],
        CUPTI_ACTIVITY_KIND_KERNEL=[(2,)],
        DIAGNOSTIC_EVENT=[("driver is not supported",)],
    )
    assert read_export(by_number) == ({RANGE}, {KERNEL}, ("driver is not supported",))
    inline = export(tmp_path / "b", NVTX_EVENTS=[(RANGE, None)])
    assert read_export(inline) == ({RANGE}, set(), ())
    assert read_export(export(tmp_path / "c", StringIds=strings)) == (set(), set(), ())


def pretended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    told: Mapping[str, object] | None,
    report: bool = True,
    rows: Mapping[str, Sequence[tuple[object, ...]]] | None = None,
) -> Machine:
    """A machine whose nsys writes these files."""

    def run(argv: Sequence[str], _limit_s: float, env: Mapping[str, str]) -> Ran:
        assert argv[1] == "profile"
        assert env["CUDA_VISIBLE_DEVICES"] == "GPU-0"
        assert env[MARK]
        path = Path(argv[argv.index("-o") + 1]).with_suffix(".nsys-rep")
        if told is not None:
            Path(argv[-3]).write_text(json.dumps(told))
        if report:
            path.write_text("a recording")
        return Ran(0 if report else 1, err="died", seconds=1.5)

    def exported(path: Path) -> Path:
        return export(path.with_suffix(".sqlite"), **(rows or {}))

    monkeypatch.setattr(selftest, "export_sqlite", exported)
    return made_machine(tmp_path, run=run)


DONE = {"nvtx": "0.2.11", "launched": True, "no_kernel": ""}
SEEN = {
    "StringIds": [(1, KERNEL)],
    "NVTX_EVENTS": [(RANGE, None)],
    "CUPTI_ACTIVITY_KIND_KERNEL": [(1,)],
}


def test_what_was_done_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = pretended(tmp_path, monkeypatch, told=DONE, rows=SEEN)
    found = run_selftest(machine, "nsys", "python3", "GPU-0")
    assert (found.ran, found.nvtx, found.seconds) == (True, "0.2.11", 1.5)
    assert (found.range_recorded, found.launched, found.kernel_recorded) == (True, True, True)


def test_what_was_done_and_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = pretended(tmp_path, monkeypatch, told=DONE)
    found = run_selftest(machine, "nsys", "python3", "GPU-0")
    assert (found.ran, found.range_recorded, found.kernel_recorded) == (True, False, False)


@pytest.mark.parametrize(
    ("told", "report", "says"),
    [
        (None, True, "the test program did not run under nsys"),
        (DONE, False, "nsys left no report (exit code 1: died)"),
    ],
)
def test_a_test_that_did_not_come_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Mapping[str, object] | None,
    report: bool,
    says: str,
) -> None:
    machine = pretended(tmp_path, monkeypatch, told=told, report=report)
    found = run_selftest(machine, "nsys", "python3", "GPU-0")
    assert (found.ran, says in found.problem) == (False, True), found.problem


@pytest.mark.parametrize(
    ("package", "version"),
    [("def push_range(text): pass\ndef pop_range(): pass", "9.8.7"), ("raise ImportError", "")],
    ids=["with nvtx", "without"],
)
def test_the_program_says_what_it_did(tmp_path: Path, package: str, version: str) -> None:
    # A package of our own, whether one is installed here or not.
    site, told = tmp_path / "site", tmp_path / "told.json"
    (site / "nvtx-9.8.7.dist-info").mkdir(parents=True)
    (site / "nvtx-9.8.7.dist-info" / "METADATA").write_text("Name: nvtx\nVersion: 9.8.7\n")
    (site / "nvtx.py").write_text(package)
    argv = [sys.executable, "-P", str(selftest.CHILD), str(told), RANGE, KERNEL]
    ran = run_program(argv, 60, {"PYTHONPATH": str(site)})
    assert ran.ok(), ran.why()
    said = json.loads(told.read_text())
    assert said["nvtx"] == version
    assert said["launched"] is not bool(said["no_kernel"])


class Cuda:
    """CUDA's driver as ``ctypes`` sees it; ``codes`` are what a function ends with, in turn."""

    def __init__(self, **codes: list[int]) -> None:
        self.codes = codes
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: object) -> int:
            self.calls.append((name, len(arguments)))
            codes = self.codes.get(name, [])
            return codes.pop(0) if codes else 0

        return function


def test_a_kernel_is_launched_by_the_drivers_api(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(cuModuleLoadData=[222])  # CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the next is tried
    monkeypatch.setattr(selftest_child.ctypes, "CDLL", lambda _: cuda)
    selftest_child.launch(KERNEL)
    assert [call for call in cuda.calls if call[0] != "cuGetErrorName"] == [
        ("cuInit", 1),
        ("cuDeviceGet", 2),
        ("cuDevicePrimaryCtxRetain", 2),
        ("cuCtxSetCurrent", 1),
        ("cuModuleLoadData", 2),
        ("cuModuleLoadData", 2),
        ("cuModuleGetFunction", 3),
        ("cuLaunchKernel", 11),
        ("cuCtxSynchronize", 0),
    ]


@pytest.mark.parametrize("function", ["cuInit", "cuModuleLoadData", "cuLaunchKernel"])
def test_a_driver_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setattr(selftest_child.ctypes, "CDLL", lambda _: Cuda(**{function: [802, 802]}))
    with pytest.raises(selftest_child.NoLaunchError, match=rf"{function}: error \(802\)"):
        selftest_child.launch(KERNEL)


@needs_nsys
def test_for_real_a_range_is_recorded(tmp_path: Path) -> None:
    assert REAL_NSYS is not None
    found = run_selftest(made_machine(tmp_path, run=run_program), REAL_NSYS, sys.executable)
    assert (found.ran, found.problem) == (True, "")
    assert found.nvtx == importlib.metadata.version("nvtx")
    assert found.range_recorded


def test_what_a_test_left_is_ended_and_nothing_else() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours = subprocess.Popen(sleep, env={**os.environ, MARK: "0123abcd"})
    other = subprocess.Popen(sleep, env={**os.environ, MARK: "other"})
    try:
        wait_for_environment(ours.pid, b"0123abcd")
        end_marked("0123abcd")
        assert ours.wait(timeout=20) == -9
        assert other.poll() is None
    finally:
        ours.kill()
        other.kill()
        ours.wait()
        other.wait()


def wait_for_environment(pid: int, text: bytes) -> None:
    """Until the child has become its program."""
    until = time.monotonic() + 20
    while text not in Path(f"/proc/{pid}/environ").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_program_that_hangs_is_killed_with_what_it_started() -> None:
    word = uuid4().hex
    inner = f"import time; time.sleep(30)  # {word}"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}]); "
    ran = run_program([sys.executable, "-c", code + "time.sleep(30)"], 1.5, {})
    assert (ran.code, ran.problem) == (None, "took over 1.5 s")
    until = time.monotonic() + 20  # killed is not yet gone
    while alive(word) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive(word) == []


def alive(word: str) -> list[Path]:
    """Processes with that word in their command line."""
    found = Path("/proc").glob("[0-9]*")
    return [folder for folder in found if word.encode() in _bytes(folder / "cmdline")]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""


def test_a_program_that_is_not_there() -> None:
    ran = run_program(["/nowhere/nsys"], 5, {})
    assert ran.code is None
    assert ran.why() == "/nowhere/nsys cannot be started (No such file or directory)"
