"""The mock process under nsys: a stand-in for ``python -m opkit.layers.drive``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from profile_bench import PATIENT, Bench, needs_nsys

from opkit.align.profile.mock import MockRequest, plan_mock, run_mock
from opkit.errors import BadInput, RunFailed
from opkit.layers.manifest import Manifest, sidecar_of
from opkit.layers.nvtx import NSYS_VERSION
from opkit.nsys_parsers.tool import find_nsys

# Called as `python -m opkit.layers.drive PLAN`: PLAN here is code to run.
DRIVE = f"""#!{sys.executable}
import sys
from pathlib import Path
assert sys.argv[1:3] == ["-m", "opkit.layers.drive"]
exec(Path(sys.argv[3]).read_text())
"""


def request_for(bench: Bench, code: str, limit_s: float = 20.0) -> MockRequest:
    python = bench.root / "bin" / "python"
    python.write_text(DRIVE)
    python.chmod(0o755)
    plan = bench.root / "plan.json"
    plan.write_text(code)
    return MockRequest(plan, bench.out / "mock.nsys-rep", str(python), limit_s=limit_s)


def writes_sidecar(bench: Bench) -> str:
    Manifest(side="mock").write(bench.root / "manifest.json")
    target = sidecar_of(bench.out / "mock.nsys-rep")
    return f"Path({str(target)!r}).write_text(Path('{bench.root}/manifest.json').read_text())"


def silent(_: str) -> None:
    """No progress wanted."""


@pytest.mark.usefixtures("no_nsys")
def test_command_is_the_recipe() -> None:
    request = MockRequest(Path("/p/plan.json"), Path("/o/mock.nsys-rep"), "python3", {"A": "1"})
    plan = plan_mock(request, dry_run=True)
    (session,) = plan.sessions
    (command,) = plan.commands
    assert command.env == {"A": "1"}
    assert shlex.join(command.argv) == (
        f"nsys profile --session-new={session} -t cuda,nvtx --cuda-graph-trace=node --sample=none "
        "--cpuctxsw=none --capture-range=cudaProfilerApi --capture-range-end=stop -o /o/mock "
        "--force-overwrite=true python3 -m opkit.layers.drive /p/plan.json"
    )


@pytest.mark.usefixtures("fake_nsys")
def test_the_mock_is_told_which_nsys_watches(bench: Bench) -> None:
    (command,) = plan_mock(request_for(bench, "")).commands
    assert command.env == {NSYS_VERSION: find_nsys().version}


@pytest.mark.usefixtures("fake_nsys")
def test_report_of_a_mock(bench: Bench) -> None:
    plan = plan_mock(request_for(bench, writes_sidecar(bench)))
    report = run_mock(plan, silent, PATIENT)
    assert report == bench.out / "mock.nsys-rep"
    assert report.stat().st_size > 0


@pytest.mark.usefixtures("fake_nsys")
def test_mock_without_manifest(bench: Bench) -> None:
    bench.out.mkdir()
    sidecar_of(bench.out / "mock.nsys-rep").write_text("of another day")
    with pytest.raises(RunFailed, match="left no manifest"):
        run_mock(plan_mock(request_for(bench, "")), silent, PATIENT)


@pytest.mark.usefixtures("either_nsys")
def test_failing_drive_passes_its_code_and_its_last_words(bench: Bench) -> None:
    plan = plan_mock(request_for(bench, "sys.exit('CUDA out of memory')"))
    with pytest.raises(RunFailed, match="run the mock under nsys: ended with code 1") as caught:
        run_mock(plan, silent, PATIENT)
    assert "CUDA out of memory" in (caught.value.hint or "")


@pytest.mark.usefixtures("either_nsys")
def test_hanging_mock_meets_its_limit(bench: Bench) -> None:
    plan = plan_mock(request_for(bench, "import time; time.sleep(100)", limit_s=1.0))
    with pytest.raises(RunFailed, match="not finished after 1 s"):
        run_mock(plan, silent, PATIENT)


@needs_nsys
def test_range_that_never_opened(bench: Bench) -> None:
    plan = plan_mock(request_for(bench, writes_sidecar(bench)))
    with pytest.raises(RunFailed, match=r"mock\.nsys-rep is missing") as caught:
        run_mock(plan, silent, PATIENT)
    assert "cudaProfilerStart" in (caught.value.hint or "")


@pytest.mark.usefixtures("fake_nsys")
def test_missing_mock_plan(bench: Bench) -> None:
    with pytest.raises(BadInput, match="no such mock plan"):
        plan_mock(MockRequest(bench.root / "none.json", bench.out / "mock.nsys-rep"))
