"""What the doctor says of GPUs, from an NVML that answers as told to a finding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import NVMLError, NVMLError_NotSupported, NVMLError_Unknown
from made_machine import GIB, UUIDS, ManyGpus, made_machine

from opkit.doctor.facts.gpu import gather_gpus
from opkit.doctor.finding import Finding, Status
from opkit.doctor.probes.gpu import JUDGES, driver, merged, per_gpu, which

OK, UNKNOWN, WARN, FAIL = Status.OK, Status.UNKNOWN, Status.WARN, Status.FAIL


class NVMLError_NoPermission(NVMLError):  # NVML's name
    pass


def findings(root: Path, nvml: ManyGpus, **machine: Any) -> dict[str, Finding]:
    """Every finding on the GPUs, by name."""
    gpus = gather_gpus(made_machine(root, nvml=nvml, **machine))
    return {found.name: found for found in (driver(gpus), which(gpus), *per_gpu(gpus))}


def test_two_gpus_in_order_are_told_once(tmp_path: Path) -> None:
    found = findings(tmp_path, ManyGpus())
    assert {name: one.status for name, one in found.items()} == dict.fromkeys(found, OK)
    assert {one.fix for one in found.values()} == {""}
    assert {name: one.says for name, one in found.items()} == {
        "driver": "580.159.04, CUDA 13.0",
        "GPUs": "2 × NVIDIA H100 80GB HBM3",
        "free": "no process, 0.0 GiB in use of 80",
        "idle": "at work 0 % of the last sample",
        "persistence": "on",
        "clocks": "SM 1,980 MHz now, 1,980 MHz at most",
        "power limit": "700 W in force, 700 W by default, 700 W at most",
        "temperature": "41 °C, 46 °C below slowdown",
        "throttling": "clocks are not held down",
        "cooling": "passive: the host's fans cool it",
        "ECC": "on, no uncorrected errors",
        "MIG": "off",
        "compute mode": "default",
    }


def used(gib: float) -> SimpleNamespace:
    return SimpleNamespace(used=int(gib * GIB), total=80 * GIB)


PROCESS = SimpleNamespace(pid=77, usedGpuMemory=3 * GIB)
MEMORY = "nvmlDeviceGetMemoryInfo"
PROCESSES = "nvmlDeviceGetComputeRunningProcesses"
USED = "nvmlDeviceGetUtilizationRates"
PERSISTENCE = "nvmlDeviceGetPersistenceMode"
LIMIT = "nvmlDeviceGetEnforcedPowerLimit"
MARGIN = "nvmlDeviceGetMarginTemperature"
HEAT = "nvmlDeviceGetTemperatureV"
REASONS = "nvmlDeviceGetCurrentClocksEventReasons"
FANS, SPEED = "nvmlDeviceGetNumFans", "nvmlDeviceGetFanSpeed_v2"
ECC, REMAP = "nvmlDeviceGetEccMode", "nvmlDeviceGetRemappedRows"
MIG, MODE = "nvmlDeviceGetMigMode", "nvmlDeviceGetComputeMode"

# answers → which finding, how grave, what it says and what its fix holds
LOCK = (
    "sudo nvidia-smi -i 0,1 -lgc 1980,1980 (opkit never runs it; back: sudo nvidia-smi -i 0,1 -rgc)"
)
CASES: list[tuple[dict[str, Any], str, Status, str, str]] = [
    ({MEMORY: used(12)}, "free", WARN, "12.0 GiB in use of 80, by a process", "nvidia-smi"),
    ({PROCESSES: (PROCESS,)}, "free", WARN, "held by vllm (77)", "ps -o pid,user,etime,args -p 77"),
    ({USED: SimpleNamespace(gpu=93)}, "idle", WARN, "93 %", "wait"),
    ({PERSISTENCE: 0}, "persistence", WARN, "off", "sudo nvidia-smi -i 0,1 -pm 1"),
    ({"sm": 345}, "clocks", WARN, "SM 345 MHz now, 1,980 MHz at most: not locked", LOCK),
    ({"sm": 1200, REASONS: 0x2}, "clocks", WARN, "held down by a clock that was set", "-lgc 1980"),
    ({LIMIT: 400_000}, "power limit", WARN, "400 W in force, 700 W by default", "-pl 700"),
    ({MARGIN: 4}, "temperature", WARN, "4 °C below slowdown", "cool"),
    ({REASONS: 0x4}, "throttling", WARN, "held down: SwPowerCap", "nvidia-smi"),
    ({REASONS: 0x48}, "throttling", FAIL, "HwSlowdown, HwThermalSlowdown", "PERFORMANCE,POWER"),
    ({REASONS: 0x1}, "throttling", OK, "not held down", ""),
    ({FANS: 0}, "cooling", OK, "passive", ""),
    ({FANS: 1, SPEED: 35}, "cooling", OK, "fans at 35 %", ""),
    ({FANS: 1, SPEED: 0, HEAT: 70}, "cooling", WARN, "fans at 0 % at 70 °C", "fans"),
    ({"nvmlDeviceGetTotalEccErrors": 3}, "ECC", WARN, "3 uncorrected errors", "-i 0,1 -r"),
    ({ECC: (1, 0)}, "ECC", WARN, "off after the next reset", "-r"),
    ({ECC: NVMLError_NotSupported("no")}, "ECC", OK, "none", ""),
    ({REMAP: (0, 1, 1, 0)}, "ECC", WARN, "to be remapped at the next reset", "-r"),
    ({REMAP: (0, 1, 0, 1)}, "ECC", FAIL, "could not be remapped", "replace"),
    ({MIG: (1, 1)}, "MIG", WARN, "on: a slice", "-mig 0"),
    ({MIG: (0, 1)}, "MIG", WARN, "on after the next reset", "-mig 0"),
    ({MIG: NVMLError_NotSupported("no")}, "MIG", OK, "none", ""),
    ({MODE: 2}, "compute mode", FAIL, "no process", "-c DEFAULT"),
    ({MODE: 3}, "compute mode", WARN, "exclusive process", "-c DEFAULT"),
]


@pytest.mark.parametrize(("answers", "name", "status", "says", "fix"), CASES)
def test_what_is_out_of_order_is_told_with_its_fix(
    tmp_path: Path, answers: dict[str, Any], name: str, status: Status, says: str, fix: str
) -> None:
    found = findings(tmp_path, ManyGpus(**answers), files={"proc/77/comm": "vllm\n"})
    assert (found[name].status, says in found[name].says) == (status, True), found[name].says
    assert (fix in found[name].fix, bool(fix)) == (True, bool(found[name].fix)), found[name].fix
    # Clocks and cooling follow from heat and reasons; no other finding may change with this one.
    related = {name, "clocks", "temperature"}
    assert {n for n, one in found.items() if one.status is not OK} <= related


# What NVML refuses is not known, and never ok.
UNTOLD = {
    MEMORY: "free",
    PROCESSES: "free",
    USED: "idle",
    PERSISTENCE: "persistence",
    "sm": "clocks",
    "highest sm": "clocks",
    LIMIT: "power limit",
    HEAT: "temperature",
    REASONS: "throttling",
    FANS: "cooling",
    ECC: "ECC",
    MIG: "MIG",
    MODE: "compute mode",
}


@pytest.mark.parametrize("function", list(UNTOLD))
def test_what_may_not_be_asked_is_unknown(tmp_path: Path, function: str) -> None:
    found = findings(tmp_path, ManyGpus(**{function: NVMLError_NoPermission("no permission")}))
    assert found[UNTOLD[function]].status is UNKNOWN
    assert found[UNTOLD[function]].says


def test_every_judge_has_such_a_test() -> None:
    assert set(UNTOLD.values()) == set(JUDGES)
    assert {name for _, name, status, *_ in CASES if status in (WARN, FAIL)} == set(JUDGES)


def test_one_gpu_of_two_is_named(tmp_path: Path) -> None:
    busy = ManyGpus(nvmlDeviceGetMemoryInfo=lambda index: used(50 * index))
    found = findings(tmp_path, busy)["free"]
    assert (
        found.says == "GPU 1: 50.0 GiB in use of 80, by a process that is not to be seen from here"
    )
    assert found.fix.endswith("nvidia-smi -i 1")


def test_an_older_driver_is_asked_the_older_way(tmp_path: Path) -> None:
    lost = NVMLError_NotSupported("no")
    nvml = ManyGpus(
        nvmlDeviceGetMarginTemperature=lost,
        nvmlDeviceGetTemperatureThreshold=92,
        nvmlDeviceGetCurrentClocksEventReasons=lost,
        nvmlDeviceGetCurrentClocksThrottleReasons=0,
    )
    found = findings(tmp_path, nvml)
    assert found["temperature"].says == "41 °C, 51 °C below slowdown"
    assert found["throttling"].status is OK


@pytest.mark.parametrize("nodes", [True, False])
def test_without_nvml_nothing_is_ok(tmp_path: Path, nodes: bool) -> None:
    nvml = ManyGpus(nvmlInit=NVMLError_Unknown("Driver/library version mismatch"))
    found = findings(tmp_path, nvml, files={"dev/nvidiactl": "" if nodes else None})
    assert found.pop("driver").status is FAIL
    assert {one.status for one in found.values()} == {UNKNOWN}
    assert {one.says for one in found.values()} == {"no GPU to ask"}


def test_a_driver_that_does_not_answer_is_told_from_none(tmp_path: Path) -> None:
    nvml = ManyGpus(nvmlInit=NVMLError_Unknown("mismatch"))
    there = findings(tmp_path, nvml)["driver"]
    gone = findings(tmp_path, nvml, files={"dev/nvidiactl": None})["driver"]
    assert there.says.startswith("the driver is there and does not answer (NVML says: mismatch)")
    assert gone.says.startswith("no NVIDIA driver here")


# CUDA_VISIBLE_DEVICES → GPUs looked at, how grave
VISIBLE = [
    ("0,1", [0, 1], OK),
    ("1", [1], OK),
    ("1,0", [1, 0], OK),
    (UUIDS[1][:8], [1], OK),
    ("MIG-0", [0, 1], OK),
    ("0,7,1", [0], WARN),  # CUDA ends at the first wrong word
    ("7", [], FAIL),
    ("", [], FAIL),
    ("-1", [], FAIL),
]


@pytest.mark.parametrize(("visible", "numbers", "status"), VISIBLE)
def test_what_cuda_would_see(
    tmp_path: Path, visible: str, numbers: list[int], status: Status
) -> None:
    machine = made_machine(tmp_path, environ={"CUDA_VISIBLE_DEVICES": visible})
    gpus = gather_gpus(machine)
    assert [gpu.index for gpu in gpus.gpus] == numbers
    assert which(gpus).status is status
    assert f"CUDA_VISIBLE_DEVICES={visible}" in which(gpus).says


def test_gpus_that_are_asked_for(tmp_path: Path) -> None:
    machine = made_machine(tmp_path, environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert [gpu.index for gpu in gather_gpus(machine, [1]).gpus] == [1]
    assert [gpu.index for gpu in gather_gpus(machine, uuids=[UUIDS[1]]).gpus] == [1]
    missing = which(gather_gpus(machine, [1, 5]))
    assert (missing.status, missing.says) == (FAIL, "no GPU 5: there are 2, counted from 0")


def test_gpus_of_two_kinds(tmp_path: Path) -> None:
    nvml = ManyGpus(nvmlDeviceGetName=lambda index: ["H100", "L4"][index])
    found = findings(tmp_path, nvml)["GPUs"]
    assert (found.status, found.says) == (WARN, "2: H100, L4")


@pytest.mark.parametrize(
    ("texts", "one"),
    [
        (["31 °C", "35 °C", "33 °C"], "31 to 35 °C"),
        (["1,980 MHz", "345 MHz"], "345 to 1,980 MHz"),
        (["on", "on"], "on"),
        (["on", "off"], "on; off"),
        (["4.0 W of 5", "4.5 W of 5"], "4.0 to 4.5 W of 5"),
    ],
)
def test_texts_that_differ_in_numbers_become_one(texts: list[str], one: str) -> None:
    assert merged(texts) == one
