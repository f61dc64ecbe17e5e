"""The whole examination, and the short one before a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opkit.doctor.facts.frameworks import FrameworkFacts, gather_frameworks, try_imports
from opkit.doctor.facts.gpu import PROHIBITED, GpusFacts, gather_gpus
from opkit.doctor.facts.host import HostFacts, gather_host
from opkit.doctor.facts.nsys import NsysFacts, gather_nsys
from opkit.doctor.finding import Diagnosis, Finding, Group, Status
from opkit.doctor.machine import Machine
from opkit.doctor.probes import frameworks as on_frameworks
from opkit.doctor.probes import gpu as on_gpu
from opkit.doctor.probes import host as on_host
from opkit.doctor.probes import nsys as on_nsys
from opkit.doctor.selftest import run_selftest

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is to be looked at.

    Attributes:
        out: the folder that results would go to.
        python: the interpreter that has the frameworks.
        gpus: NVML's numbers; empty: those that CUDA would see.
        groups: which findings are wanted.
        quick: without the self-test and the imports.
    """

    out: Path
    python: str
    gpus: tuple[int, ...] = ()
    groups: tuple[Group, ...] = tuple(Group)
    quick: bool = False


@dataclass(frozen=True)
class Facts:
    """All that was gathered; None where it was not asked for."""

    nsys: NsysFacts | None = None
    gpus: GpusFacts | None = None
    host: HostFacts | None = None
    frameworks: FrameworkFacts | None = None

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def examine(asked: Asked, machine: Machine, say: Say) -> tuple[Diagnosis, Facts]:
    """Gather what the wanted groups need, and judge it.

    Args:
        say: told what is being done, where it takes time.
    """
    facts = gather(asked, machine, say)
    findings = judge(facts)
    wanted = tuple(finding for finding in findings if finding.group in asked.groups)
    return Diagnosis(wanted), facts


def gather(asked: Asked, machine: Machine, say: Say) -> Facts:
    """The facts that the wanted groups need."""
    groups = set(asked.groups)
    gpus = nsys = host = frameworks = None
    if groups & {Group.GPU, Group.NSYS, Group.FRAMEWORKS}:
        gpus = gather_gpus(machine, asked.gpus)
    if Group.HOST in groups:
        host = gather_host(machine, asked.out)
    if groups & {Group.NSYS, Group.FRAMEWORKS}:
        caches = Group.FRAMEWORKS in groups
        frameworks = gather_frameworks(machine, asked.python, caches=caches)
    if Group.NSYS in groups:
        nsys = gather_nsys(machine)
        if nsys.path and not asked.quick:
            say("recording a small program under nsys")
            runs = frameworks is not None and not frameworks.problem
            # A GPU in slices is not to be had whole: CUDA is left to choose one.
            whole = [gpu.uuid for gpu in gpus.gpus if not (gpu.mig and gpu.mig[0])] if gpus else []
            gpu = whole[0] if whole else ""
            test = run_selftest(machine, nsys.path, asked.python if runs else machine.python, gpu)
            nsys = replace(nsys, test=test)
    if Group.FRAMEWORKS in groups and frameworks is not None and not asked.quick:
        tried = try_imports(machine, asked.python, tuple(frameworks.backends()), say)
        frameworks = replace(frameworks, imports=tried)
    return Facts(nsys, gpus, host, frameworks)


def judge(facts: Facts) -> tuple[Finding, ...]:
    """Every finding that the facts allow, in the order of the report."""
    found: list[Finding | None] = []
    gpus = facts.gpus
    if facts.nsys is not None and gpus is not None:
        nsys = facts.nsys
        found += [
            on_nsys.nsys_there(nsys),
            on_nsys.nsys_and_driver(nsys, gpus),
            on_nsys.nvtx(nsys, facts.frameworks),
            on_nsys.self_test(nsys, gpus),
            on_nsys.sampling(nsys),
            on_nsys.counters(nsys),
            on_nsys.others(nsys),
        ]
    if gpus is not None:
        found += [on_gpu.driver(gpus), on_gpu.which(gpus), *on_gpu.per_gpu(gpus)]
    if facts.host is not None:
        found += [probe(facts.host) for probe in on_host.PROBES]
    if facts.frameworks is not None:
        some = facts.frameworks
        found += [
            on_frameworks.python(some),
            on_frameworks.headers(some),
            *on_frameworks.engines(some),
            on_frameworks.torch(some, gpus),
            *on_frameworks.layers(some, gpus),
            *on_frameworks.caches(some),
        ]
    return tuple(finding for finding in found if finding is not None)


# What a run is told before it starts.
BEFORE_A_RUN = frozenset(
    {"nsys and driver", "other profilers", "GPUs", "free", "idle", "throttling", "ECC", "MIG",
     "compute mode", "output folder", "disk space", "temporary folder", "MPI", "compiler",
     "environment"}
)  # fmt: skip


def before_run(
    out: Path, machine: Machine, *, nsys: bool = True, gpus: Sequence[str] | None = None
) -> Diagnosis:
    """The cheap and grave part, for ``align`` and ``collect``: no program of the user's is run.

    Args:
        out: the folder of results.
        nsys: whether the run records.
        gpus: UUIDs of the GPUs that are used; None: those that CUDA would see; empty: none is.
    """
    facts = Facts(
        nsys=gather_nsys(machine) if nsys else None,
        gpus=None if gpus is not None and not gpus else gather_gpus(machine, uuids=gpus or ()),
        host=gather_host(machine, out),
    )
    found = [finding for finding in judge(facts) if finding.name in BEFORE_A_RUN]
    modes = {gpu.compute_mode for gpu in facts.gpus.gpus} if facts.gpus is not None else set()
    if modes != {PROHIBITED}:  # CUDA takes another GPU
        found = [
            replace(one, status=Status.WARN)
            if one.name == "compute mode" and one.status is Status.FAIL else one
            for one in found
        ]  # fmt: skip
    return Diagnosis(tuple(found))
