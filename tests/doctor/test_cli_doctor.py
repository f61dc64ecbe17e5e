"""`opkit doctor`, and the look that `align` and `collect` take first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runs import Ran, run_main
from made_machine import GIB, ManyGpus, made_machine

from opkit import cli_doctor
from opkit.doctor.finding import Group
from opkit.doctor.machine import Machine
from opkit.errors import EXIT_BAD_INPUT, EXIT_TOOL_MISSING, OpkitError

Doctor = Callable[..., Ran]


@pytest.fixture
def doctor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Doctor:
    """Runs ``opkit doctor WORDS`` on a made machine."""

    def run(*words: object, **machine: Any) -> Ran:
        made = made_machine(tmp_path, **machine)
        monkeypatch.setattr(cli_doctor, "Machine", lambda: made)
        return run_main(capsys, monkeypatch, "doctor", "--out", tmp_path / "out", *words)

    return run


def test_nothing_grave_ends_with_0(doctor: Doctor) -> None:
    ran = doctor("--quick", "--only", "gpu,host")
    assert (ran.code, ran.err) == (0, "")
    assert "✓  free" in ran.out
    assert "✗" not in ran.out
    assert ran.out.splitlines()[-1].startswith("next: opkit align OP")


def test_something_that_spoils_ends_with_1_and_its_fix(doctor: Doctor) -> None:
    ran = doctor("--quick", "--only", "gpu", nvml=ManyGpus(nvmlDeviceGetComputeMode=2))
    assert ran.code == 1
    assert "✗  compute mode" in ran.out
    assert "sudo nvidia-smi -i 0,1 -c DEFAULT" in ran.out
    assert "✗ 1 would spoil a run" in ran.out


def test_warnings_end_with_1_only_when_strict(doctor: Doctor) -> None:
    free = ManyGpus(sm=345)
    assert doctor("--quick", "--only", "gpu", nvml=free).code == 0
    assert doctor("--quick", "--only", "gpu", "--strict", nvml=free).code == 1
    assert doctor("--quick", "--only", "gpu", "--strict").code == 0


def test_json_holds_findings_and_facts(doctor: Doctor) -> None:
    ran = doctor("--json", "--quick", nsys="")
    found = json.loads(ran.out)
    assert (found["schema"], found["ok"], ran.code) == ("opkit.doctor/1", False, 1)
    by_name = {one["name"]: one for one in found["findings"]}
    assert by_name["nsys"]["status"] == "fail"
    assert by_name["nsys"]["fix"] == "install it"
    assert set(by_name["ECC"]) == {"name", "status", "says", "fix", "group"}
    assert found["counts"] == {
        status: sum(one["status"] == status for one in found["findings"])
        for status in ("fail", "warn", "unknown", "ok")
    }
    assert found["facts"]["gpus"]["gpus"][1]["temperature"] == 41
    assert len(by_name) == len(found["findings"])  # a name says which


@pytest.mark.parametrize("group", list(Group))
def test_only_a_group(doctor: Doctor, group: Group) -> None:
    found = json.loads(doctor("--json", "--quick", "--only", group).out)
    assert {one["group"] for one in found["findings"]} == {group}


def test_gpus_are_chosen(doctor: Doctor) -> None:
    busy = ManyGpus(nvmlDeviceGetUtilizationRates=lambda index: SimpleNamespace(gpu=90 * index))
    words = ("--json", "--quick", "--only", "gpu", "--gpus")
    assert "90 %" not in doctor(*words, "0", nvml=busy).out
    assert "90 %" in doctor(*words, "1", nvml=busy).out
    assert doctor(*words, "9", nvml=busy).code == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--only", "gpu,cpu"), "--only cpu: there are nsys, gpu, host, frameworks"),
        (("--gpus", "first"), "--gpus first: numbers and commas, or all"),
    ],
)
def test_wrong_options(doctor: Doctor, words: tuple[str, ...], says: str) -> None:
    ran = doctor(*words)
    assert (ran.code, ran.complaint()) == (2, says)


def test_what_is_unknown_for_one_reason_is_one_line(doctor: Doctor) -> None:
    lost = ManyGpus(nvmlInit=ManyGpus.NVMLError("no library"))
    ran = doctor("--quick", "--only", "gpu", nvml=lost)
    lines = ran.out.splitlines()
    assert [line[:7] for line in lines if line.startswith("?")] == ["?  GPUs"]
    assert "neither for free, idle" in ran.out
    assert "`opkit align dsa --recorded`" in " ".join(ran.out.split())


# The look before a run.


def look(
    monkeypatch: pytest.MonkeyPatch, root: Path, *, gpus: tuple[str, ...] | None = None, **made: Any
) -> list[str]:
    """The lines that a run on a made machine says first."""

    def machine(environ: dict[str, str]) -> Machine:
        made_environ = {"TMPDIR": str(root), **{k: environ[k] for k in environ if k in ENV}}
        return made_machine(root, environ=made_environ, **made)

    monkeypatch.setattr(cli_doctor, "Machine", machine)
    lines: list[str] = []
    cli_doctor.look_before_run(root / "out", lines.append, env=made.pop("env", {}), gpus=gpus)
    return lines


ENV = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING")


def test_a_run_on_a_machine_in_order_says_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert look(monkeypatch, tmp_path) == []


def test_a_run_warns_in_a_line_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    busy = ManyGpus(nvmlDeviceGetMemoryInfo=SimpleNamespace(used=60 * GIB, total=80 * GIB))
    (line,) = look(monkeypatch, tmp_path, nvml=busy)
    assert line.startswith("doctor: free: 60.0 GiB in use of 80")
    assert "(fix: " in line
    assert "\n" not in line


def test_what_is_grave_but_does_not_stop_a_run_warns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (line,) = look(monkeypatch, tmp_path, env={"CUDA_LAUNCH_BLOCKING": "1"})
    assert line.startswith("doctor: environment: CUDA_LAUNCH_BLOCKING=1")


def test_no_gpu_no_nsys_and_idle_clocks_are_no_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run says itself what it misses, better than a look before it could."""
    lost = ManyGpus(nvmlInit=ManyGpus.NVMLError("no library"))
    assert look(monkeypatch, tmp_path, nvml=lost, nsys="") == []
    assert look(monkeypatch, tmp_path, nvml=ManyGpus(sm=345)) == []


FULL = {"usage": lambda _path: SimpleNamespace(free=2**20, total=GIB)}


def test_a_full_disk_stops_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OpkitError, match="disk space: 1 MiB free for output") as stopped:
        look(monkeypatch, tmp_path, **FULL)
    assert stopped.value.exit_code == EXIT_BAD_INPUT
    assert stopped.value.hint is not None
    assert stopped.value.hint.endswith("or go on regardless: --no-doctor")


def test_gpus_that_are_hidden_stop_a_run_that_needs_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "7"}
    with pytest.raises(OpkitError, match="CUDA_VISIBLE_DEVICES=7 leaves no GPU") as stopped:
        look(monkeypatch, tmp_path, env=hidden)
    assert stopped.value.exit_code == EXIT_TOOL_MISSING
    assert look(monkeypatch, tmp_path, env=hidden, gpus=()) == []  # a CPU, or a cluster's head


def test_only_the_gpus_of_the_run_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def used(index: int) -> SimpleNamespace:
        return SimpleNamespace(used=60 * GIB * index, total=80 * GIB)

    busy = ManyGpus(nvmlDeviceGetMemoryInfo=used)
    assert look(monkeypatch, tmp_path, nvml=busy, gpus=("GPU-00000000-aaaa",)) == []
    assert len(look(monkeypatch, tmp_path, nvml=busy, gpus=("GPU-11111111-bbbb",))) == 1
