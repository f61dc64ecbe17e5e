"""What the doctor says of nsys: found, fits the driver, records ranges, may sample, is alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_machine import made_machine

from opkit.doctor.facts.frameworks import FrameworkFacts
from opkit.doctor.facts.gpu import GpuFacts, GpusFacts
from opkit.doctor.facts.nsys import NsysFacts, gather_nsys
from opkit.doctor.finding import Status
from opkit.doctor.machine import Ran
from opkit.doctor.probes import nsys as probe
from opkit.doctor.selftest import SelfTest

OK, UNKNOWN, WARN, FAIL = Status.OK, Status.UNKNOWN, Status.WARN, Status.FAIL
OLD, NEW = "2024.2.3.38-242334140272v0", "2025.3.2.1-1"
HERE = NsysFacts(path="/opt/nsys", version=OLD, sessions=(), admin=False, paranoid=2)
NO_GPU = GpusFacts(problem="NVML says: no")
H100 = GpusFacts(driver="580", cuda=(13, 0), gpus=(GpuFacts(0),), total=1)
ROOT = "CapEff:\t000001ffffffffff\n"


def test_no_nsys_fails_with_how_to_get_it(tmp_path: Path) -> None:
    facts = gather_nsys(made_machine(tmp_path, nsys=""))
    found = probe.nsys_there(facts)
    assert (found.status, found.fix) == (FAIL, "install it")
    assert "not found on PATH" in found.says
    others = [probe.nsys_and_driver(facts, H100), probe.nvtx(facts, None), probe.others(facts)]
    assert {one.status for one in others} == {UNKNOWN}


@pytest.mark.parametrize(
    ("version", "cuda", "status"),
    [
        (OLD, (12, 5), OK),
        (OLD, (13, 0), WARN),
        ("2025.2.9-0", (13, 1), WARN),
        (NEW, (13, 0), OK),
        (NEW, (13, 2), OK),
        (NEW, (11, 8), OK),
        ("2022.3.1-0", (12, 0), WARN),
        ("2030.1.1-0", (14, 0), UNKNOWN),
        (NEW, None, UNKNOWN),
    ],
)
def test_nsys_against_the_driver(
    version: str, cuda: tuple[int, int] | None, status: Status
) -> None:
    found = probe.nsys_and_driver(replace(HERE, version=version), replace(H100, cuda=cuda))
    assert found.status is status
    assert bool(found.fix) is (status is WARN)


def interpreter(nvtx: str = "", torch: str | None = None, **others: str) -> FrameworkFacts:
    versions = {**({"nvtx": nvtx} if nvtx else {}), **others}
    versions |= {} if torch is None else {"torch": "2.11.0"}
    return FrameworkFacts("python3", "3.12.3", versions=versions, torch_cuda=torch)


def tried(recorded: bool, nvtx: str) -> NsysFacts:
    test = SelfTest(True, nvtx=nvtx, range_recorded=recorded, no_kernel="no CUDA driver")
    return replace(HERE, test=test)


# nsys and its self-test, interpreter → how grave, words
NVTX = [
    (HERE, interpreter("0.2.11", ""), OK, "by its version recorded (not tried)"),
    (HERE, interpreter("0.2.12", ""), FAIL, "does not record the ranges of nvtx 0.2.12"),
    (HERE, interpreter("0.2.12"), FAIL, "does not record"),
    (HERE, interpreter("0.2.12", "13.0"), WARN, "torch.cuda.nvtx, which vLLM"),
    (HERE, interpreter("0.2.12", "13.0", tensorrt_llm="1.2"), FAIL, "does not record"),
    (replace(HERE, version=NEW), interpreter("0.2.17", ""), OK, "by its version"),
    (tried(True, "0.2.11"), interpreter("0.2.11", ""), OK, "are recorded (tried)"),
    (tried(False, "0.2.17"), interpreter("0.2.17", ""), FAIL, "was lost (tried"),
    (tried(False, "0.2.17"), interpreter("0.2.17", "13.0"), WARN, "was lost (tried"),
    # What was seen counts, not what a version promises.
    (tried(True, "0.2.17"), interpreter("0.2.17", ""), OK, "are recorded (tried)"),
    (tried(False, "0.2.11"), interpreter("0.2.11", ""), FAIL, "was lost"),
    (HERE, interpreter("", "13.0"), OK, "torch.cuda.nvtx writes the ranges"),
    (HERE, interpreter("", ""), UNKNOWN, "this torch has no CUDA"),
    (HERE, interpreter(), UNKNOWN, "no torch"),
    (HERE, FrameworkFacts("python3", problem="does not run"), UNKNOWN, "no interpreter"),
    (HERE, None, UNKNOWN, "no interpreter"),
]


@pytest.mark.parametrize(("nsys", "python", "status", "says"), NVTX)
def test_nvtx(nsys: NsysFacts, python: FrameworkFacts | None, status: Status, says: str) -> None:
    found = probe.nvtx(nsys, python)
    assert (found.status, says in found.says) == (status, True), found.says
    if status in (WARN, FAIL):
        assert found.fix == "pip install 'nvtx<=0.2.11', or install a newer nsys"


LOST = SelfTest(True, launched=True, kernel_recorded=False, said=("CUPTI not supported",))
TESTS = [
    (SelfTest(False, "nsys left no report (exit code 1: x)"), H100, FAIL, "left no report"),
    (SelfTest(True, launched=True, kernel_recorded=True), H100, OK, "recorded and exported"),
    (LOST, H100, FAIL, "was not recorded; nsys remarks: CUPTI not supported"),
    (SelfTest(True, no_kernel="cuInit: X (802)"), H100, FAIL, "launched: cuInit: X (802)"),
    (SelfTest(True, no_kernel="no CUDA driver"), NO_GPU, UNKNOWN, "kernels were not tried"),
]


@pytest.mark.parametrize(("test", "gpus", "status", "says"), TESTS)
def test_self_test(test: SelfTest, gpus: GpusFacts, status: Status, says: str) -> None:
    found = probe.self_test(replace(HERE, test=test), gpus)
    assert found is not None
    assert (found.status, says in found.says) == (status, True), found.says
    assert bool(found.fix) is (status is FAIL)


def test_a_self_test_that_was_not_asked_for_is_not_told() -> None:
    assert probe.self_test(HERE, H100) is None


# What nsys says, the kernel's level, root → how grave
SAMPLING = [
    ("Fail", "2", "", WARN),
    ("OK", "2", ROOT, OK),
    ("", "2", "", WARN),
    ("", "0", "", OK),
    ("", "-1", "", OK),
    ("", "4", ROOT, OK),
    ("", None, ROOT, UNKNOWN),
]


@pytest.mark.parametrize(("said", "level", "status", "expected"), SAMPLING)
def test_system_wide_sampling(
    tmp_path: Path, said: str, level: str | None, status: str, expected: Status
) -> None:
    line = f"CPU Profiling Environment (system-wide): {said}\n" if said else "What?\n"
    files: dict[str, str | None] = {"proc/sys/kernel/perf_event_paranoid": level}
    if status:
        files["proc/self/status"] = status
    found = probe.sampling(
        gather_nsys(made_machine(tmp_path, files=files, said={"status": Ran(0, line)}))
    )
    assert found.status is expected
    assert ("sysctl kernel.perf_event_paranoid=0" in found.fix) is (expected is WARN)


def test_a_level_of_one_capability(tmp_path: Path) -> None:
    perfmon = f"CapEff:\t{1 << 38:016x}\n"
    facts = gather_nsys(made_machine(tmp_path, files={"proc/self/status": perfmon}))
    assert facts.admin is True
    assert gather_nsys(made_machine(tmp_path)).admin is False
    assert gather_nsys(made_machine(tmp_path, files={"proc/self/status": None})).admin is None


def test_counters_are_told_and_never_grave(tmp_path: Path) -> None:
    def say(files: dict[str, str | None]) -> tuple[Status, str]:
        found = probe.counters(gather_nsys(made_machine(tmp_path, files=files)))
        return found.status, found.says

    assert say({})[1].startswith("for administrators only (NVreg_RestrictProfilingToAdminUsers=1)")
    assert say({"proc/self/status": ROOT}) == (OK, "open to this process")
    params = "proc/driver/nvidia/params"
    assert say({params: "RmProfilingAdminOnly: 0\n"}) == (OK, "open to all users")
    assert say({params: None})[0] is UNKNOWN


LISTED = """              ID         TIME                       STATE LAUNCH NAME
             123        01:02                  Collection      1 align-session
             124        01:02                  Collection      1 opkit-doctor-12ab
"""


def test_another_session_or_profiler(tmp_path: Path) -> None:
    files: dict[str, str | None] = {
        "proc/50/status": "Name:\tncu\nUmask:\t0022\nState:\tS (sleeping)\n",
        "proc/51/status": "Name:\tnsys\nUmask:\t0022\nState:\tZ (zombie)\n",
        "proc/52/status": "Name:\tnvidia-cuda-mps\nState:\tS (sleeping)\n",
        "proc/53/status": "Name:\tncurses\nState:\tS (sleeping)\n",
    }
    said = {"sessions": Ran(0, LISTED)}
    found = probe.others(gather_nsys(made_machine(tmp_path, files=files, said=said)))
    assert found.status is WARN
    assert found.says == "at work: nsys session align-session, ncu (50), nvidia-cuda-mps (52)"
    assert found.fix == "nsys shutdown --session=align-session"


def test_no_other_profiler(tmp_path: Path) -> None:
    assert probe.others(gather_nsys(made_machine(tmp_path))).status is OK
    silent = {"sessions": Ran(1, err="unknown verb")}
    facts = gather_nsys(made_machine(tmp_path, said=silent))
    assert facts.sessions is None
    assert probe.others(facts).status is UNKNOWN
