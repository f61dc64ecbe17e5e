"""What nsys tells: which it is, what it may record here, who else uses it, and a self-test."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from opkit.doctor.machine import Machine
from opkit.doctor.selftest import SelfTest
from opkit.errors import ToolMissing

SYS_ADMIN, PERFMON = 21, 38  # linux/capability.h


@dataclass(frozen=True)
class NsysFacts:
    """What is known of nsys and of what it may do here.

    Attributes:
        path, version: of the nsys found; empty when there is none.
        problem, hint: why there is none, and what to do.
        sampling: ``process-tree`` and ``system-wide`` → OK, Fail, … as ``nsys status -e`` says;
            empty when it did not answer.
        paranoid: ``kernel.perf_event_paranoid``; None when unknown.
        admin: whether this process may do what it likes: CAP_SYS_ADMIN or CAP_PERFMON.
        sessions: names of the nsys sessions of this machine; None when nsys did not answer.
        counters_restricted: whether GPU counters are for administrators only; None when there is
            no driver to tell.
        profilers: other profilers that run: process id and name.
        test: what the self-test saw; None when it was not run.
    """

    path: str = ""
    version: str = ""
    problem: str = ""
    hint: str = ""
    sampling: dict[str, str] | None = None
    paranoid: int | None = None
    admin: bool | None = None
    sessions: tuple[str, ...] | None = None
    counters_restricted: bool | None = None
    profilers: tuple[str, ...] = ()
    test: SelfTest | None = None


# Programs that use CUPTI or put themselves between a program and its GPU.
PROFILERS = ("nsys", "ncu", "nv-nsight-cu-cli", "nsys-launcher", "nvidia-cuda-mps")


def gather_nsys(machine: Machine) -> NsysFacts:
    """Ask nsys and the kernel; the self-test is run by :mod:`opkit.doctor.selftest`."""
    paranoid = machine.read("/proc/sys/kernel/perf_event_paranoid")
    known = NsysFacts(
        paranoid=int(paranoid) if paranoid and re.fullmatch(r"-?\d+\s*", paranoid) else None,
        admin=_admin(machine),
        counters_restricted=_restricted(machine.read("/proc/driver/nvidia/params")),
        profilers=_profilers(machine),
    )
    try:
        nsys = machine.find_nsys()
    except ToolMissing as error:
        return replace(known, problem=str(error), hint=error.hint or "")
    return replace(
        known,
        path=str(nsys.path),
        version=nsys.version,
        sampling=_sampling(machine.ask(str(nsys.path), "status", "-e").out),
        sessions=sessions(machine, str(nsys.path)),
    )


def sessions(machine: Machine, nsys: str) -> tuple[str, ...] | None:
    """Names of nsys's sessions; None when it does not tell."""
    ran = machine.ask(nsys, "sessions", "list")
    if not ran.ok():
        return None
    # A heading, then a line a session: id, times, state, whether launched, name.
    rows = [line.split() for line in ran.out.splitlines()[1:]]
    return tuple(row[-1] for row in rows if row and row[0].isdigit())


def _sampling(said: str) -> dict[str, str] | None:
    found = re.findall(r"CPU Profiling Environment \((process-tree|system-wide)\):\s*(\S.*)", said)
    return {name: verdict.strip() for name, verdict in found} or None


def _admin(machine: Machine) -> bool | None:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", machine.read("/proc/self/status") or "", re.M)
    if found is None:
        return None
    bits = int(found[1], 16)
    return bool(bits >> SYS_ADMIN & 1 or bits >> PERFMON & 1)


def _restricted(params: str | None) -> bool | None:
    """The driver's ``NVreg_RestrictProfilingToAdminUsers``, as ``/proc`` names it."""
    found = re.search(r"^RmProfilingAdminOnly:\s*(\d)", params or "", re.MULTILINE)
    return found[1] == "1" if found else None


def _profilers(machine: Machine) -> tuple[str, ...]:
    found = []
    for folder in (machine.root / "proc").glob("[0-9]*"):
        status = machine.read(f"/proc/{folder.name}/status") or ""
        named = re.match(r"Name:\s*(\S+)\n(?:.*\n)*?State:\s*(\S)", status)
        if named is None or named[2] == "Z":  # ended: agents of nsys stay so in a container
            continue
        if any(named[1] == known or named[1].startswith(f"{known}-") for known in PROFILERS):
            found.append(f"{named[1]} ({folder.name})")
    return tuple(sorted(found))
