"""Findings on nsys: which, whether it fits the driver and the ranges, what it may do."""

from __future__ import annotations

import re

from opkit.doctor.facts.frameworks import FrameworkFacts
from opkit.doctor.facts.gpu import GpusFacts
from opkit.doctor.facts.nsys import NsysFacts
from opkit.doctor.finding import Finding, Group, Status
from opkit.layers.nvtx import INSTALL, recorded_problem

# The first nsys of each CUDA, by the component tables in the release notes of the CUDA toolkit:
# 12.0 came with 2022.4.2, 13.0 with 2025.3.2.
FIRST_OF_CUDA = {12: (2022, 4), 13: (2025, 3)}
OWN_SESSION = "opkit-doctor-"


def _found(name: str, status: Status, says: str, fix: str = "") -> Finding:
    return Finding(name, status, says, fix, Group.NSYS)


def nsys_there(nsys: NsysFacts) -> Finding:
    """Fail: no nsys, so nothing can be recorded."""
    if not nsys.path:
        return _found("nsys", Status.FAIL, nsys.problem, nsys.hint)
    return _found("nsys", Status.OK, f"{nsys.version} ({nsys.path})")


def nsys_and_driver(nsys: NsysFacts, gpus: GpusFacts) -> Finding:
    """Warn: nsys is older than the CUDA of the driver, and traces with a CUPTI that does not know
    it. Measured: nsys 2024.2.3 under a CUDA 13.0 driver records, but reports single nodes of CUDA
    graphs as copies (docs/development.md)."""
    name = "nsys and driver"
    if not nsys.version:
        return _found(name, Status.UNKNOWN, "no nsys to hold against the driver")
    if gpus.cuda is None:
        return _found(name, Status.UNKNOWN, "no driver to hold nsys against")
    cuda = f"CUDA {gpus.cuda[0]}.{gpus.cuda[1]}"
    version = tuple(int(number) for number in re.findall(r"\d+", nsys.version)[:2])
    first = FIRST_OF_CUDA.get(gpus.cuda[0])
    if first is None and gpus.cuda[0] > max(FIRST_OF_CUDA):
        return _found(name, Status.UNKNOWN, f"opkit does not know which nsys came with {cuda}")
    if first is not None and version < first:
        since = f"{first[0]}.{first[1]}"
        return _found(
            name, Status.WARN,
            f"nsys {nsys.version.split('-')[0]} is older than the driver's {cuda}, known since "
            f"{since}: nodes of CUDA graphs may be misreported as copies",
            f"install nsys {since} or newer",
        )  # fmt: skip
    return _found(name, Status.OK, f"nsys knows the driver's {cuda}")


def nvtx(nsys: NsysFacts, frameworks: FrameworkFacts | None) -> Finding:
    """Whether the ranges of the package ``nvtx`` reach a recording, by self-test, else by version.

    Fail where the package writes the ranges (a torch without CUDA, TensorRT-LLM), else warn:
    ``torch.cuda.nvtx`` writes them, which every nsys records.
    """
    name = "nvtx"
    if not nsys.version:
        return _found(name, Status.UNKNOWN, "no nsys to record ranges")
    test = nsys.test
    if frameworks is None or frameworks.problem:
        return _found(name, Status.UNKNOWN, "no interpreter was asked which nvtx it has")
    package = frameworks.versions.get("nvtx", "")
    needed = not frameworks.torch_cuda or "trtllm" in frameworks.backends()
    if not package:
        if frameworks.torch_cuda:
            return _found(name, Status.OK, "not installed; torch.cuda.nvtx writes the ranges")
        why = "and this torch has no CUDA" if frameworks.torch_cuda == "" else "and no torch"
        return _found(
            name, Status.UNKNOWN, f"{frameworks.python} has no nvtx {why}: no range to try", INSTALL
        )
    if test is not None and test.ran and test.nvtx:
        if test.range_recorded:
            return _found(name, Status.OK, f"ranges of nvtx {test.nvtx} are recorded (tried)")
        problem: str | None = f"a range of nvtx {test.nvtx} was lost (tried under this nsys)"
    else:
        problem = recorded_problem(nsys.version, package)
        if problem is None:
            return _found(name, Status.OK, f"nvtx {package}: by its version recorded (not tried)")
    who = "" if needed else "; torch.cuda.nvtx, which vLLM and opkit's mocks use, is recorded"
    status = Status.FAIL if needed else Status.WARN
    return _found(name, status, f"{problem}{who}", f"{INSTALL}, or install a newer nsys")


def self_test(nsys: NsysFacts, gpus: GpusFacts) -> Finding | None:
    """Whether a kernel that ran under nsys is in its recording. Fail: it is not, or CUDA does not
    start on a host that has a GPU."""
    name = "self-test"
    test = nsys.test
    if test is None:
        return None
    if not test.ran:
        return _found(
            name, Status.FAIL, test.problem,
            "run it by hand: nsys profile -t cuda,nvtx python3 -c pass",
        )  # fmt: skip
    remarks = "".join(f"; nsys remarks: {text}" for text in test.said if _remarkable(text))
    took = f" ({test.seconds:.1f} s)"
    if not test.launched:
        if gpus.gpus:
            return _found(
                name, Status.FAIL, f"no kernel can be launched: {test.no_kernel}{took}",
                "CUDA does not start here: look at nvidia-smi, CUDA_VISIBLE_DEVICES and, on NVLink "
                "hosts, that nvidia-fabricmanager runs",
            )  # fmt: skip
        return _found(
            name, Status.UNKNOWN,
            f"nsys records and exports, kernels were not tried: {test.no_kernel}{took}",
        )  # fmt: skip
    if not test.kernel_recorded:
        return _found(
            name, Status.FAIL, f"a kernel ran under nsys and was not recorded{remarks}{took}",
            "end other profilers (CUPTI serves one at a time); use an nsys that knows this driver",
        )  # fmt: skip
    return _found(name, Status.OK, f"a kernel was launched, recorded and exported{remarks}{took}")


def _remarkable(text: str) -> bool:
    return any(word in text.lower() for word in ("not supported", "lost", "dropped", "fail"))


def sampling(nsys: NsysFacts) -> Finding:
    """Warn: no system-wide sampling, which ``--mode system-wide`` asks for (other modes do not)."""
    name = "CPU sampling"
    level = "" if nsys.paranoid is None else f"perf_event_paranoid {nsys.paranoid}"
    verdict = (nsys.sampling or {}).get("system-wide", "")
    if not verdict:
        if nsys.paranoid is None or nsys.admin is None:
            return _found(name, Status.UNKNOWN, "neither nsys nor the kernel tells")
        # perf_event_open(2): CPU-wide events need level 0 or less, or CAP_PERFMON.
        verdict = "OK" if nsys.admin or nsys.paranoid <= 0 else "Fail"
    right = "with" if nsys.admin else "without"
    facts = ", ".join(part for part in (level, f"{right} CAP_SYS_ADMIN or CAP_PERFMON") if part)
    if verdict.upper().startswith("OK"):
        return _found(name, Status.OK, f"system-wide is allowed ({facts})")
    return _found(
        name, Status.WARN, f"system-wide is not allowed ({facts}): --mode system-wide would fail",
        "sudo sysctl kernel.perf_event_paranoid=0; in a container --cap-add=SYS_ADMIN as well. "
        "The other modes need neither",
    )  # fmt: skip


def counters(nsys: NsysFacts) -> Finding:
    """Never grave: tracing needs no counters. Told because ncu and GPU metrics do."""
    name = "GPU counters"
    if nsys.counters_restricted is None:
        return _found(name, Status.UNKNOWN, "no driver to tell who may read them")
    if nsys.counters_restricted and not nsys.admin:
        return _found(
            name, Status.OK,
            "for administrators only (NVreg_RestrictProfilingToAdminUsers=1): tracing, all that "
            "opkit does, needs none; ncu and --gpu-metrics would",
        )  # fmt: skip
    who = "open to this process" if nsys.counters_restricted else "open to all users"
    return _found(name, Status.OK, who)


def others(nsys: NsysFacts) -> Finding:
    """Warn: another profiler is at work. CUPTI serves one at a time in a process, and a profiled
    neighbour's work is in nobody's plan."""
    sessions = [name for name in nsys.sessions or () if not name.startswith(OWN_SESSION)]
    busy = [*(f"nsys session {name}" for name in sessions), *nsys.profilers]
    if busy:
        return _found(
            "other profilers", Status.WARN, f"at work: {', '.join(busy)}",
            f"nsys shutdown --session={sessions[0]}" if sessions else "end them, if they are yours",
        )  # fmt: skip
    if nsys.sessions is None:
        said = "no nsys to ask for sessions" if not nsys.path else "nsys does not list its sessions"
        return _found("other profilers", Status.UNKNOWN, f"no such process; {said}")
    return _found("other profilers", Status.OK, "none")
