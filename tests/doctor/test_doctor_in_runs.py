"""`align` and `collect` look at the machine first, and only when they run something."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runs import Ran, run_main, run_program
from made_machine import ManyGpus, made_machine
from profile_bench import Bench

from opkit import cli_collect, cli_doctor
from opkit.doctor.examine import BEFORE_A_RUN, Asked, before_run, examine
from opkit.doctor.finding import Status
from opkit.doctor.probes.host import HARMFUL
from opkit.errors import EXIT_BAD_INPUT, EXIT_RUN_FAILED, OpkitError

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text("utf-8")


@pytest.fixture
def nowhere(bench: Bench, fake_nsys: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs ``opkit align dsa WORDS`` where TMPDIR is not there and the server dies at once."""
    assert fake_nsys.is_file()
    monkeypatch.setenv("TMPDIR", str(bench.root / "gone"))
    monkeypatch.setenv("FAKE_SERVER", "die")

    def run(*words: object) -> Ran:
        return run_program("align", "dsa", "--out", bench.out, *words, cwd=bench.root)

    return run


def test_a_run_that_cannot_go_well_is_stopped(nowhere: Callable[..., Ran], bench: Bench) -> None:
    ran = nowhere("--e2e-cmd", bench.command())
    assert ran.complaint() == f"temporary folder: {bench.root}/gone is not there"
    assert ran.said()[-1] == "  or go on regardless: --no-doctor"
    assert ran.code == EXIT_BAD_INPUT
    assert not bench.out.exists()  # nothing was started


def test_no_doctor_goes_on(nowhere: Callable[..., Ran], bench: Bench) -> None:
    ran = nowhere("--e2e-cmd", bench.command(), "--no-doctor")
    assert ran.code == EXIT_RUN_FAILED
    assert "the server ended with code 1" in ran.complaint()


def test_wrong_options_are_told_first(nowhere: Callable[..., Ran], bench: Bench) -> None:
    ran = nowhere("--e2e-cmd", bench.command(), "--requests", "many")
    assert "not a wave of requests" in ran.complaint()


def test_nothing_is_looked_at_when_nothing_is_run(
    nowhere: Callable[..., Ran], bench: Bench
) -> None:
    assert nowhere("--dry-run", "--e2e-cmd", bench.command()).code == 0
    assert nowhere("--recorded").code == 0


def test_a_warning_is_a_line_of_the_log(
    nowhere: Callable[..., Ran], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("OPAL_PREFIX", "/nowhere")
    ran = nowhere("--e2e-cmd", bench.command())
    assert ran.code == EXIT_RUN_FAILED  # it went on, to the server that dies
    (line,) = [line for line in ran.err.splitlines() if "doctor: MPI" in line]
    assert re.fullmatch(
        r" *\d+\.\d s  doctor: MPI: OPAL_PREFIX=/nowhere is no folder: .*\(fix: .*\)", line
    )


def test_collect_looks_before_it_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = SimpleNamespace(
        where=SimpleNamespace(gpus=(SimpleNamespace(uuid="GPU-0"),)), folder=tmp_path / "job"
    )
    seen: list[object] = []

    def look(out: Path, _say: object, **given: object) -> None:
        seen.append((out, given))
        raise OpkitError("the disk is full")

    def prepared(*_: object, **__: object) -> Any:
        return job

    monkeypatch.setattr(cli_collect, "prepare", prepared)
    monkeypatch.setattr(cli_collect, "look_before_run", look)
    monkeypatch.setattr(cli_collect, "run_collect", lambda *_: pytest.fail("it was run"))
    ran = run_main(capsys, monkeypatch, "collect", "dsa", "--out", tmp_path)
    assert ran.complaint() == "the disk is full"
    assert seen == [(tmp_path / "job", {"nsys": False, "gpus": ("GPU-0",)})]

    def run_collect(*_: object) -> None:
        raise OpkitError("it was run")

    monkeypatch.setattr(cli_collect, "run_collect", run_collect)
    ran = run_main(capsys, monkeypatch, "collect", "dsa", "--out", tmp_path, "--no-doctor")
    assert ran.complaint() == "it was run"
    assert len(seen) == 1


@pytest.mark.parametrize(("modes", "status"), [((2, 0), Status.WARN), ((2, 2), Status.FAIL)])
def test_one_gpu_that_may_not_compute_stops_no_run_on_another(
    tmp_path: Path, modes: tuple[int, int], status: Status
) -> None:
    nvml = ManyGpus(nvmlDeviceGetComputeMode=lambda index: modes[index])
    found = before_run(tmp_path, made_machine(tmp_path, nvml=nvml)).findings
    assert [one.status for one in found if one.name == "compute mode"] == [status]


@pytest.mark.parametrize("there", [True, False])
def test_every_finding_is_on_its_page(tmp_path: Path, there: bool) -> None:
    nvml = ManyGpus() if there else ManyGpus(nvmlInit=ManyGpus.NVMLError("no library"))
    machine = made_machine(tmp_path, nvml=nvml)
    asked = Asked(tmp_path, sys.executable, quick=True)
    diagnosis, _ = examine(asked, machine, print)
    names = {found.name for found in diagnosis.findings}
    assert {name for name in names | BEFORE_A_RUN if f"`{name}`" not in PAGE} == set()
    assert set(cli_doctor.STOPPING) <= BEFORE_A_RUN <= names
    assert {name for name in HARMFUL if f"`{name}" not in PAGE} == set()
