"""What NVML tells of every GPU, at one moment. What it does not tell is None, with its reason."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opkit.doctor.machine import Machine
from opkit.sensors.nvml import Gpu as Sensors

NOT_SUPPORTED = "not supported"
_NO_SUCH = {"NVMLError_NotSupported", "NVMLError_FunctionNotFound"}


@dataclass(frozen=True)
class Process:
    """A process that holds memory of a GPU: id, name ("" if not to be seen from here), bytes."""

    pid: int
    name: str
    memory: int | None


@dataclass(frozen=True)
class GpuFacts:
    """One GPU at one moment. Units: bytes, MHz, W, °C, %; None: see ``missing``.

    Attributes:
        index: NVML's number, as ``nvidia-smi -i`` takes it.
        temperature_margin: °C to the next slowdown.
        fans: speeds in % of the highest; empty for a passive card.
        ecc, mig: whether on, and whether on after the next reset.
        ecc_errors: uncorrected errors since the last reset.
        remapping: rows remapped for uncorrected errors; whether a reset is due; whether it failed.
        throttle: reasons of a lowered clock, in NVML's words.
        missing: why a field is None, by the field's name.
    """

    index: int
    uuid: str = ""
    name: str = ""
    memory_total: int | None = None
    memory_used: int | None = None
    processes: tuple[Process, ...] | None = None
    utilization: int | None = None
    persistence: bool | None = None
    sm_mhz: int | None = None
    sm_max_mhz: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None
    power_most_w: float | None = None
    temperature: int | None = None
    temperature_margin: int | None = None
    throttle: tuple[str, ...] | None = None
    fans: tuple[int, ...] | None = None
    ecc: tuple[bool, bool] | None = None
    ecc_errors: int | None = None
    remapping: tuple[int, bool, bool] | None = None
    mig: tuple[bool, bool] | None = None
    compute_mode: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def why(self, name: str) -> str:
        """Why a field is None."""
        return self.missing.get(name, "not told")

    def lacks(self, name: str) -> bool:
        """Whether this GPU has no such thing, which is no lack of knowledge."""
        return self.missing.get(name) == NOT_SUPPORTED


@dataclass(frozen=True)
class GpusFacts:
    """All GPUs of the machine.

    Attributes:
        problem: why NVML tells nothing; empty when it does.
        nodes: whether the driver's device files are there, so that a GPU was meant to be.
        driver: version of the driver.
        cuda: the newest CUDA that it speaks, as (13, 0).
        gpus: those looked at: ``asked``, or all that CUDA would see.
        total: how many NVML knows.
        visible: ``CUDA_VISIBLE_DEVICES``; None when it is not set.
        unmatched: its first word that names no GPU.
        asked: ``--gpus``; empty for all.
    """

    problem: str = ""
    nodes: bool = False
    driver: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[GpuFacts, ...] = ()
    total: int = 0
    visible: str | None = None
    unmatched: str = ""
    asked: tuple[int, ...] = ()


def gather_gpus(
    machine: Machine, asked: Sequence[int] = (), uuids: Sequence[str] = ()
) -> GpusFacts:
    """Ask NVML about some GPUs.

    Args:
        asked: by NVML's numbers; or
        uuids: by UUID; neither: those that CUDA would see.
    """
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    nodes = machine.exists("/dev/nvidiactl") or machine.exists("/dev/dxg")
    known = GpusFacts(nodes=nodes, visible=visible, asked=tuple(asked))
    try:
        nvml = machine.nvml if machine.nvml is not None else importlib.import_module("pynvml")
    except ImportError as error:
        return replace(known, problem=f"pynvml is missing ({error})")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return replace(known, problem=f"NVML says: {error}")
    try:
        return _ask_all(machine, nvml, known, uuids)
    except nvml.NVMLError as error:
        return replace(known, problem=f"NVML says: {error}")
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _ask_all(machine: Machine, nvml: Any, known: GpusFacts, uuids: Sequence[str]) -> GpusFacts:
    total = int(nvml.nvmlDeviceGetCount())
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(total)]
    there = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    numbers, unmatched = _seen_by_cuda(known.visible, there)
    if known.asked:
        numbers = [number for number in known.asked if number < total]
    elif uuids:
        numbers = [number for number in range(total) if there[number] in uuids]
    ask = _Asker(nvml, None, {})
    cuda = ask("cuda", "nvmlSystemGetCudaDriverVersion", handle=False)
    return replace(
        known,
        driver=_text(ask("driver", "nvmlSystemGetDriverVersion", handle=False) or ""),
        cuda=(cuda // 1000, cuda % 1000 // 10) if cuda else None,
        gpus=tuple(_gpu(machine, nvml, handles[n], n, there[n]) for n in numbers),
        total=total,
        unmatched=unmatched,
    )


def _seen_by_cuda(visible: str | None, uuids: list[str]) -> tuple[list[int], str]:
    """NVML's numbers of the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, and the word that fits none.

    CUDA ignores that word and all after it (CUDA programming guide, environment variables). A slice
    (``MIG-…``) does not tell whose it is, so all GPUs are looked at.
    """
    everything = list(range(len(uuids)))
    if visible is None:
        return everything, ""
    found: list[int] = []
    for word in (part.strip() for part in visible.split(",") if part.strip()):
        if word.startswith("MIG-"):
            return everything, ""
        if word.isdigit():
            hits = everything[int(word) : int(word) + 1]
        else:
            hits = [number for number, uuid in enumerate(uuids) if uuid.startswith(word)]
        if not hits:
            return found, word
        found += hits[:1]
    return found, ""


@dataclass
class _Asker:
    """Asks NVML, and keeps why it does not answer."""

    nvml: Any
    device: Any
    missing: dict[str, str]

    def __call__(self, name: str, function: str, *arguments: Any, handle: bool = True) -> Any:
        """The answer for the field ``name``; None, with the reason kept, when there is none."""
        try:
            call = getattr(self.nvml, function)
            return call(*((self.device,) if handle else ()), *arguments)
        except AttributeError:  # an older pynvml
            self.missing[name] = f"this pynvml has no {function}"
        except self.nvml.NVMLError as error:
            known = type(error).__name__ in _NO_SUCH
            self.missing[name] = NOT_SUPPORTED if known else str(error)
        return None


def _gpu(machine: Machine, nvml: Any, handle: Any, index: int, uuid: str) -> GpuFacts:
    missing: dict[str, str] = {}
    ask = _Asker(nvml, handle, missing)
    sensors = Sensors(nvml, handle)
    state = sensors.state()
    used, total = _memory(nvml, ask)
    utilization = ask("utilization", "nvmlDeviceGetUtilizationRates")
    ecc = ask("ecc", "nvmlDeviceGetEccMode")
    mig = ask("mig", "nvmlDeviceGetMigMode")
    rows = ask("remapping", "nvmlDeviceGetRemappedRows")
    range_w = ask("power_most_w", "nvmlDeviceGetPowerManagementLimitConstraints")
    default_mw = ask("power_default_w", "nvmlDeviceGetPowerManagementDefaultLimit")
    persistence = ask("persistence", "nvmlDeviceGetPersistenceMode")
    mode = ask("compute_mode", "nvmlDeviceGetComputeMode")
    errors = None
    if ecc and ecc[0]:
        errors = ask(
            "ecc_errors", "nvmlDeviceGetTotalEccErrors",
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC,
        )  # fmt: skip
    return GpuFacts(
        index=index,
        uuid=uuid,
        name=_text(ask("name", "nvmlDeviceGetName") or ""),
        memory_total=total,
        memory_used=used,
        processes=_processes(machine, ask),
        utilization=None if utilization is None else int(utilization.gpu),
        persistence=None if persistence is None else bool(persistence),
        sm_mhz=state.sm_mhz,
        sm_max_mhz=sensors.highest_sm_mhz(),
        power_w=state.power_w,
        power_limit_w=sensors.power_limit_watts(),
        power_default_w=None if default_mw is None else default_mw / 1000,
        power_most_w=None if range_w is None else range_w[1] / 1000,
        temperature=state.temperature_c,
        temperature_margin=_margin(nvml, ask, state.temperature_c),
        throttle=_throttle(ask, state.throttle),
        fans=_fans(ask),
        ecc=None if ecc is None else (bool(ecc[0]), bool(ecc[1])),
        ecc_errors=errors,
        remapping=None if rows is None else (int(rows[1]), bool(rows[2]), bool(rows[3])),
        mig=None if mig is None else (bool(mig[0]), bool(mig[1])),
        compute_mode=None if mode is None else _MODES.get(mode, str(mode)),
        missing=missing,
    )


PROHIBITED = "prohibited"
_MODES = {0: "default", 1: "exclusive thread", 2: PROHIBITED, 3: "exclusive process"}  # nvml.h


def _memory(nvml: Any, ask: _Asker) -> tuple[int | None, int | None]:
    """Bytes used and in all. The second form leaves out what the driver keeps for itself."""
    version = getattr(nvml, "nvmlMemory_v2", None)
    info = ask("memory_used", "nvmlDeviceGetMemoryInfo", version) if version else None
    info = info or ask("memory_used", "nvmlDeviceGetMemoryInfo")
    return (int(info.used), int(info.total)) if info else (None, None)


def _processes(machine: Machine, ask: _Asker) -> tuple[Process, ...] | None:
    """Processes that compute on the GPU; one from another container has no name here."""
    running = ask("processes", "nvmlDeviceGetComputeRunningProcesses")
    if running is None:
        return None
    return tuple(
        Process(
            pid=int(process.pid),
            name=(machine.read(f"/proc/{process.pid}/comm") or "").strip(),
            memory=process.usedGpuMemory,
        )
        for process in running
    )


def _margin(nvml: Any, ask: _Asker, now: int | None) -> int | None:
    """°C to the slowdown: told since Ada, reckoned from the threshold before."""
    margin = ask("temperature_margin", "nvmlDeviceGetMarginTemperature")
    if margin is not None:
        return int(margin)
    limit = ask(
        "temperature_margin", "nvmlDeviceGetTemperatureThreshold",
        nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN,
    )  # fmt: skip
    return None if limit is None or now is None else int(limit) - now


def _throttle(ask: _Asker, told: tuple[str, ...]) -> tuple[str, ...] | None:
    """The sensors' reasons; None where NVML gives none (there, no reason means no answer)."""
    if told:
        return told
    for name in _REASONS:
        if ask("throttle", name) is not None:
            return ()
    return None


# The name since driver 535, and before.
_REASONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


def _fans(ask: _Asker) -> tuple[int, ...] | None:
    """Speeds in %; empty for a card without fans."""
    count = ask("fans", "nvmlDeviceGetNumFans")
    if count is None:
        return None
    speeds = [ask("fans", "nvmlDeviceGetFanSpeed_v2", fan) for fan in range(count)]
    return tuple(int(speed) for speed in speeds if speed is not None)


def _text(value: str | bytes) -> str:
    """Older pynvml answers in bytes."""
    return value.decode() if isinstance(value, bytes) else value
