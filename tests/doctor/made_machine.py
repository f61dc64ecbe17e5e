"""A machine made for the doctor: files of the kernel in a folder, an NVML that answers as told,
programs that say what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
from fake_nvml import FakeNvml, NVMLError_NotSupported

from opkit.doctor.machine import Machine, Ran
from opkit.errors import ToolMissing
from opkit.nsys_parsers.tool import Nsys

GIB = 2**30
VERSION = "2025.3.2.1-1"
UUIDS = ("GPU-00000000-aaaa", "GPU-11111111-bbbb")
NSYS_SAID = """Timestamp counter supported: Yes

CPU Profiling Environment Check
Linux Kernel Paranoid Level = 2
CPU Profiling Environment (process-tree): OK
CPU Profiling Environment (system-wide): Fail
"""
MOUNTS = """27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
28 27 0:40 / {root}/nfs rw - nfs4 server:/export rw
"""
FILES = {
    "proc/self/mountinfo": MOUNTS,
    "proc/self/status": "Name:\tpython\nSeccomp:\t0\nCapEff:\t0000000000000000\n",
    "proc/sys/kernel/perf_event_paranoid": "2\n",
    "proc/driver/nvidia/params": "RmProfilingAdminOnly: 1\n",
    "dev/nvidiactl": "",
    "dev/shm/.keep": "",
}


class ManyGpus(FakeNvml):
    """Two H100, idle and in order. An answer may be a function of the GPU's number."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    NVML_VOLATILE_ECC = pynvml.NVML_VOLATILE_ECC
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    nvmlMemory_v2 = pynvml.nvmlMemory_v2  # NVML's name

    def __init__(self, count: int = 2, **answers: Any) -> None:
        super().__init__(
            **{
                "nvmlShutdown": None,
                "nvmlDeviceGetCount": count,
                "nvmlDeviceGetHandleByIndex": lambda index: index,
                "nvmlDeviceGetUUID": lambda index: UUIDS[index],
                "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
                "nvmlSystemGetDriverVersion": "580.159.04",
                "nvmlSystemGetCudaDriverVersion": 13000,
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=4 * 2**20, total=80 * GIB),
                "nvmlDeviceGetComputeRunningProcesses": (),
                "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
                "nvmlDeviceGetPersistenceMode": 1,
                "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
                "nvmlDeviceGetPowerManagementLimitConstraints": (200_000, 700_000),
                "nvmlDeviceGetMarginTemperature": 46,
                "nvmlDeviceGetNumFans": NVMLError_NotSupported("Not Supported"),
                "nvmlDeviceGetEccMode": (1, 1),
                "nvmlDeviceGetTotalEccErrors": 0,
                "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
                "nvmlDeviceGetMigMode": (0, 0),
                "nvmlDeviceGetComputeMode": 0,
                **answers,
            }
        )

    def __getattr__(self, name: str) -> Any:
        asked = super().__getattr__(name)
        answer = self.__dict__["answers"].get(name)
        if not callable(answer):
            return asked

        def function(*arguments: Any) -> Any:
            found = answer(arguments[0])
            if isinstance(found, Exception):
                raise found
            return found

        return function


def made_machine(
    root: Path,
    *,
    files: Mapping[str, str | None] | None = None,
    nvml: Any = None,
    nsys: str = VERSION,
    said: Mapping[str, Ran] | None = None,
    **changes: Any,
) -> Machine:
    """A machine whose kernel's files lie below ``root``.

    Args:
        files: beside or instead of :data:`FILES`; None removes one.
        nvml: the NVML; by default two H100.
        nsys: its version; empty: there is none.
        said: a word of a command → what it answers.
        changes: fields of :class:`Machine`.
    """
    for name, text in {**FILES, **(files or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(text.replace("{root}", str(root)))
    fields: dict[str, Any] = {
        "root": root,
        "environ": {"TMPDIR": str(root)},
        "run": programs(said or {}),
        "nvml": nvml if nvml is not None else ManyGpus(),
        "which": {"gcc": "/usr/bin/gcc", "g++": "/usr/bin/g++"}.get,
        "find_nsys": finder(nsys),
        "usage": lambda _path: SimpleNamespace(free=100 * GIB, total=200 * GIB),
        "limits": lambda: {"nofile": 65536, "memlock": -1},
        "uid": 1000,
        "home": root / "home",
        "python": "python3",
    }
    return Machine(**{**fields, **changes})


def finder(version: str) -> Callable[[], Nsys]:
    """A ``find_nsys``."""

    def find() -> Nsys:
        if not version:
            raise ToolMissing("nsys was not found on PATH or in its usual places", "install it")
        return Nsys(Path("/opt/nsys/nsys"), version)

    return find


def programs(said: Mapping[str, Ran]) -> Callable[[Sequence[str], float, Mapping[str, str]], Ran]:
    """A runner: the first word of a command that is known answers; nsys is in order."""
    known = {
        "status": Ran(0, NSYS_SAID),
        "sessions": Ran(0, "  ID  TIME  STATE LAUNCH NAME\n"),
        **said,
    }

    def run(argv: Sequence[str], _limit_s: float, _env: Mapping[str, str]) -> Ran:
        return next((known[word] for word in argv if word in known), Ran(None, problem="no such"))

    return run
