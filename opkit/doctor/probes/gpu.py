"""Findings on the GPUs. Each is judged for one GPU, then told for all of them in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from opkit.doctor.facts.gpu import PROHIBITED, GpuFacts, GpusFacts
from opkit.doctor.finding import Finding, Group, Status, worst
from opkit.sensors.nvml import THROTTLES

GIB = 2**30
HELD = GIB  # memory that an idle GPU may have in use: older drivers count their own 0.6 GiB
BUSY_PERCENT = 10  # of the time, in NVML's last sample
NARROW_C = 10  # a GPU at work is 20 to 40 °C warmer than an idle one
WARM_C = 60  # a fan that stands still above this is broken
BROKEN = frozenset({"HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown"})

Told = tuple[Status, str, str]  # status, what is said, the fix; {gpus} stands for their numbers
Judge = Callable[[GpuFacts], Told]
NO_GPU = "no GPU to ask"


def driver(gpus: GpusFacts) -> Finding:
    """Fail: NVML tells nothing, so there is no GPU that can be used."""
    if not gpus.problem:
        cuda = f", CUDA {gpus.cuda[0]}.{gpus.cuda[1]}" if gpus.cuda else ""
        return Finding("driver", Status.OK, f"{gpus.driver or 'unknown'}{cuda}", "", Group.GPU)
    if gpus.nodes:
        says = f"the driver is there and does not answer ({gpus.problem})"
        fix = "nvidia-smi; after an update of the driver, load it anew (reboot)"
    else:
        says = f"no NVIDIA driver here ({gpus.problem})"
        fix = "run opkit on a GPU host, or start the container with its GPUs (docker: --gpus all)"
    return Finding("driver", Status.FAIL, says, fix, Group.GPU)


def which(gpus: GpusFacts) -> Finding:
    """Fail: no GPU is left by CUDA_VISIBLE_DEVICES or ``--gpus``. Warn: some of its words name
    none, or GPUs differ."""
    name = "GPUs"

    def found(status: Status, says: str, fix: str = "") -> Finding:
        return Finding(name, status, says, fix, Group.GPU)

    if gpus.problem:
        return found(Status.UNKNOWN, NO_GPU)
    wrong = [str(number) for number in gpus.asked if number >= gpus.total]
    there = f"there {'is' if gpus.total == 1 else 'are'} {gpus.total}, counted from 0"
    if wrong:
        return found(Status.FAIL, f"no GPU {', '.join(wrong)}: {there}", "choose with --gpus")
    variable = f"CUDA_VISIBLE_DEVICES={gpus.visible}"
    if not gpus.gpus:
        why = variable if gpus.visible is not None else "NVML"
        return found(Status.FAIL, f"{why} leaves no GPU; {there}", "unset CUDA_VISIBLE_DEVICES")
    names = sorted({gpu.name for gpu in gpus.gpus})
    count = len(gpus.gpus)
    says = f"{count} × {names[0]}" if len(names) == 1 else f"{count}: {', '.join(names)}"
    if gpus.visible is not None:
        says += f" ({variable}; {there})"
    if gpus.unmatched:
        fix = "correct CUDA_VISIBLE_DEVICES: CUDA ignores that word and all after it"
        return found(Status.WARN, f"{says}; no GPU is {gpus.unmatched}", fix)
    if len(names) > 1:
        fix = (
            "one table holds for one kind: choose with --gpus. CUDA counts the fastest first "
            "unless CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
        return found(Status.WARN, says, fix)
    return found(Status.OK, says)


def per_gpu(gpus: GpusFacts) -> list[Finding]:
    """A finding for every judge of :data:`JUDGES`."""
    return [over(name, gpus.gpus, judge) for name, judge in JUDGES.items()]


def over(name: str, gpus: Sequence[GpuFacts], judge: Judge) -> Finding:
    """One finding of what a judge says of each GPU: the gravest status, and whom it concerns."""
    if not gpus:
        return Finding(name, Status.UNKNOWN, NO_GPU, "", Group.GPU)
    told = [(gpu.index, *judge(gpu)) for gpu in gpus]
    status = worst([entry[1] for entry in told])
    concerned = [entry for entry in told if entry[1] is status]
    texts = merged([entry[2] for entry in concerned])
    if len(concerned) < len(gpus):
        numbers = ", ".join(str(entry[0]) for entry in concerned)
        texts = f"GPU {numbers}: {texts}"
    fixes: dict[str, list[str]] = {}
    for index, _, _, fix in concerned:
        fixes.setdefault(fix, []).append(str(index))
    fix = "; ".join(text.replace("{gpus}", ",".join(whom)) for text, whom in fixes.items())
    return Finding(name, status, texts, fix, Group.GPU)


def merged(texts: Sequence[str]) -> str:
    """Texts that differ in numbers only as one (``31 to 35 °C``); others one after another."""
    numbers = [re.findall(r"\d[\d,]*(?:\.\d+)?", text) for text in texts]
    forms = {re.sub(r"\d[\d,]*(?:\.\d+)?", "\0", text) for text in texts}
    if len(forms) > 1:
        return "; ".join(dict.fromkeys(texts))
    spans = []
    for column in zip(*numbers, strict=True):
        values = sorted(column, key=lambda text: float(text.replace(",", "")))
        spans.append(values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}")
    parts = forms.pop().split("\0")
    return "".join(part + span for part, span in zip(parts, [*spans, ""], strict=True))


def free(gpu: GpuFacts) -> Told:
    """Warn: another process computes on it, or memory is in use."""
    used = "" if gpu.memory_used is None else f"{gpu.memory_used / GIB:.1f} GiB in use"
    if gpu.memory_total and used:
        used += f" of {gpu.memory_total / GIB:.0f}"
    if gpu.processes:
        who = ", ".join(
            f"{process.name or 'a process of another container or user'} ({process.pid})"
            for process in gpu.processes
        )
        numbers = ",".join(str(process.pid) for process in gpu.processes)
        fix = f"see `ps -o pid,user,etime,args -p {numbers}`; end it, or choose another GPU"
        return Status.WARN, f"held by {who}; {used or gpu.why('memory_used')}", fix
    if gpu.memory_used is None:
        return Status.UNKNOWN, f"memory in use: {gpu.why('memory_used')}", ""
    if gpu.memory_used > HELD:
        fix = "find who holds it, perhaps outside this container: nvidia-smi -i {gpus}"
        return Status.WARN, f"{used}, by a process that is not to be seen from here", fix
    if gpu.processes is None:
        return Status.UNKNOWN, f"{used}; processes: {gpu.why('processes')}", ""
    return Status.OK, f"no process, {used}", ""


def idle(gpu: GpuFacts) -> Told:
    """Warn: it is at work now."""
    if gpu.utilization is None:
        return Status.UNKNOWN, gpu.why("utilization"), ""
    says = f"at work {gpu.utilization} % of the last sample"
    if gpu.utilization >= BUSY_PERCENT:
        return Status.WARN, says, "wait for its work to end, or choose another GPU"
    return Status.OK, says, ""


def persistence(gpu: GpuFacts) -> Told:
    """Warn: off, so the driver leaves the GPU between processes, and each start waits for it."""
    if gpu.persistence is None:
        return Status.UNKNOWN, gpu.why("persistence"), ""
    if gpu.persistence:
        return Status.OK, "on", ""
    return (
        Status.WARN,
        "off: the driver unloads between processes, clocks and settings are lost with it",
        "sudo nvidia-smi -i {gpus} -pm 1",
    )


def clocks(gpu: GpuFacts) -> Told:
    """Warn: the SM clock is not at its highest, so it is not locked there. Decode steps right
    after a prefill were 10 % slower on an H100 whose clock was free (docs/development.md)."""
    if gpu.sm_max_mhz is None or gpu.sm_mhz is None:
        return Status.UNKNOWN, "the driver does not tell its clocks", ""
    now = f"SM {gpu.sm_mhz:,} MHz now, {gpu.sm_max_mhz:,} MHz at most"
    if gpu.sm_mhz >= gpu.sm_max_mhz:
        return Status.OK, now, ""
    fix = (
        f"sudo nvidia-smi -i {{gpus}} -lgc {gpu.sm_max_mhz},{gpu.sm_max_mhz} "
        "(opkit never runs it; back: sudo nvidia-smi -i {gpus} -rgc)"
    )
    if "ApplicationsClocksSetting" in (gpu.throttle or ()):
        return Status.WARN, f"{now}: held down by a clock that was set", fix
    return Status.WARN, f"{now}: not locked, as far as NVML tells", fix


def power(gpu: GpuFacts) -> Told:
    """Warn: the limit in force is below the card's default."""
    if gpu.power_limit_w is None:
        return Status.UNKNOWN, "the driver does not tell its power limit", ""
    says = f"{gpu.power_limit_w:,.0f} W in force"
    if gpu.power_default_w is not None:
        says += f", {gpu.power_default_w:,.0f} W by default"
    if gpu.power_most_w is not None:
        says += f", {gpu.power_most_w:,.0f} W at most"
    if gpu.power_default_w is not None and gpu.power_limit_w < gpu.power_default_w - 1:
        return Status.WARN, says, f"sudo nvidia-smi -i {{gpus}} -pl {gpu.power_default_w:.0f}"
    return Status.OK, says, ""


def temperature(gpu: GpuFacts) -> Told:
    """Warn: little is left to the slowdown."""
    if gpu.temperature is None:
        return Status.UNKNOWN, "the driver does not tell its temperature", ""
    if gpu.temperature_margin is None:
        return Status.OK, f"{gpu.temperature} °C (distance to slowdown not told)", ""
    says = f"{gpu.temperature} °C, {max(0, gpu.temperature_margin)} °C below slowdown"
    if gpu.temperature_margin < NARROW_C:
        return Status.WARN, says, "let it cool; look at the airflow of the host"
    return Status.OK, says, ""


def throttling(gpu: GpuFacts) -> Told:
    """Fail: the hardware holds clocks down. Warn: the driver does, for power or heat."""
    if gpu.throttle is None:
        return Status.UNKNOWN, gpu.why("throttle"), ""
    reasons = sorted(THROTTLES & set(gpu.throttle))
    if not reasons:
        return Status.OK, "clocks are not held down", ""
    says = f"clocks are held down: {', '.join(reasons)}"
    if BROKEN & set(reasons):
        return (
            Status.FAIL, says,
            "look at power supply and cooling: nvidia-smi -i {gpus} -q -d PERFORMANCE,POWER",
        )  # fmt: skip
    return (
        Status.WARN,
        says,
        "let it cool or end what draws power; nvidia-smi -i {gpus} -q -d POWER",
    )


def cooling(gpu: GpuFacts) -> Told:
    """Warn: its fans stand still while it is warm."""
    if gpu.fans is None:
        if gpu.lacks("fans"):
            return Status.OK, "passive: the host's fans cool it", ""
        return Status.UNKNOWN, gpu.why("fans"), ""
    if not gpu.fans:
        return Status.OK, "passive: the host's fans cool it", ""
    says = f"fans at {max(gpu.fans)} %"
    if max(gpu.fans) == 0 and (gpu.temperature or 0) > WARM_C:
        return Status.WARN, f"{says} at {gpu.temperature} °C", "look at the card's fans"
    return Status.OK, says, ""


def ecc(gpu: GpuFacts) -> Told:
    """Fail: rows could not be remapped. Warn: errors, a pending remap or a pending change."""
    if gpu.ecc is None:
        if gpu.lacks("ecc"):
            return Status.OK, "this GPU has none", ""
        return Status.UNKNOWN, gpu.why("ecc"), ""
    on, later = gpu.ecc
    says = "on" if on else "off"
    reset = "drain the GPU and reset it: sudo nvidia-smi -i {gpus} -r"
    if gpu.remapping is not None and gpu.remapping[2]:
        return (
            Status.FAIL,
            f"{says}; a row could not be remapped",
            "replace the GPU (nvidia-smi -q)",
        )
    if gpu.remapping is not None and gpu.remapping[1]:
        return Status.WARN, f"{says}; rows are to be remapped at the next reset", reset
    if gpu.ecc_errors:
        return Status.WARN, f"{says}; {gpu.ecc_errors} uncorrected errors since the reset", reset
    if on != later:
        to = "on" if later else "off"
        return Status.WARN, f"{says}; {to} after the next reset", reset
    return Status.OK, f"{says}, no uncorrected errors" if on else says, ""


def mig(gpu: GpuFacts) -> Told:
    """Warn: a slice is not the GPU whose name a table bears."""
    if gpu.mig is None:
        if gpu.lacks("mig"):
            return Status.OK, "this GPU has none", ""
        return Status.UNKNOWN, gpu.why("mig"), ""
    on, later = gpu.mig
    if on:
        return (
            Status.WARN, "on: a slice has other clocks, caches and bandwidth than the GPU",
            "sudo nvidia-smi -i {gpus} -mig 0",
        )  # fmt: skip
    if later:
        return Status.WARN, "off, on after the next reset", "sudo nvidia-smi -i {gpus} -mig 0"
    return Status.OK, "off", ""


def compute_mode(gpu: GpuFacts) -> Told:
    """Fail: no process may compute. Warn: only one at a time may."""
    fix = "sudo nvidia-smi -i {gpus} -c DEFAULT"
    if gpu.compute_mode is None:
        return Status.UNKNOWN, gpu.why("compute_mode"), ""
    if gpu.compute_mode == PROHIBITED:
        return Status.FAIL, "no process may compute on it", fix
    if gpu.compute_mode.startswith("exclusive"):
        return Status.WARN, f"{gpu.compute_mode}: an engine of several processes fails", fix
    return Status.OK, gpu.compute_mode, ""


JUDGES: dict[str, Judge] = {
    "free": free,
    "idle": idle,
    "persistence": persistence,
    "clocks": clocks,
    "power limit": power,
    "temperature": temperature,
    "throttling": throttling,
    "cooling": cooling,
    "ECC": ecc,
    "MIG": mig,
    "compute mode": compute_mode,
}
