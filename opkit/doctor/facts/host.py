"""What the host tells: folders and their file systems, memory, limits, MPI, the environment."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opkit.doctor.machine import Machine

# Variables that change what is launched, how it is timed, or what a profiler sees. The value of
# no other variable is kept: an environment holds secrets.
TELLING = (
    "CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE", "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH",
    "CUDA_MPS_PIPE_DIRECTORY", "CUDA_FORCE_PTX_JIT", "CUDA_DISABLE_PTX_JIT",
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TEARDOWN_CUPTI", "LD_PRELOAD",
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_DEBUG", "TRITON_INTERPRET", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE",
    "VLLM_ATTENTION_BACKEND", "VLLM_USE_DEEP_GEMM", "VLLM_ENFORCE_EAGER", "OPAL_PREFIX",
    "CC", "CXX",
)  # fmt: skip
# Families of variables of which any is worth telling.
FAMILIES = ("NSYS_", "VLLM_USE_", "SGLANG_ENABLE_", "SGLANG_DISABLE_", "TLLM_", "TRTLLM_")
# What a launcher of MPI gives its ranks: a run inside them starts no ranks of its own.
RANK_OF = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Mount:
    """The file system that a folder lies on: where it is mounted, its kind, what is mounted."""

    point: str
    kind: str
    source: str = ""


@dataclass(frozen=True)
class Folder:
    """A folder that a run writes to.

    Attributes:
        path: as asked for, absolute.
        looked_at: the folder itself, or the nearest one above it that is there.
        writable: whether this user may write there.
        free, total: bytes of its file system; None when it does not tell.
        mount: its file system; None when it is not known.
    """

    path: str
    looked_at: str
    writable: bool
    free: int | None
    total: int | None
    mount: Mount | None


@dataclass(frozen=True)
class HostFacts:
    """The host.

    Attributes:
        out, temp: where results go, and where nsys writes while it records (TMPDIR).
        nsys_temp: nsys's own folder below TMPDIR, when it is there.
        shm_total, shm_free: bytes of /dev/shm; None when there is none.
        limits: soft limits by name (``nofile``, and ``memlock`` in bytes), -1 for unlimited.
        infiniband: whether there is a network card for RDMA.
        mpirun: its path; empty when there is none.
        opal_prefix_there: whether OPAL_PREFIX leads to a folder; None when it is not set.
        rank_of: the variable that says that this is a rank of another job; empty when it is none.
        c_compiler, cxx_compiler: their paths; empty when what ``CC`` or ``CXX`` says is no program,
            or there is none.
        environ: the telling variables that are set.
        container: what this container is known by; empty outside.
        seccomp: whether system calls are filtered; None when unknown.
    """

    out: Folder
    temp: Folder
    nsys_temp: Folder | None = None
    shm_total: int | None = None
    shm_free: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    infiniband: bool = False
    mpirun: str = ""
    opal_prefix_there: bool | None = None
    rank_of: str = ""
    c_compiler: str = ""
    cxx_compiler: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    container: str = ""
    seccomp: bool | None = None


def gather_host(machine: Machine, out: Path) -> HostFacts:
    """Look at the host; ``out`` is the folder that results go to."""
    environ = machine.environ
    temp = Path(environ.get("TMPDIR") or tempfile.gettempdir())
    nsys_temp = temp / "nvidia" / "nsight_systems"
    shm = _space(machine, Path("/dev/shm")) if machine.exists("/dev/shm") else None
    prefix = environ.get("OPAL_PREFIX")
    infiniband = machine.root / "sys/class/infiniband"
    return HostFacts(
        out=look_at(machine, out),
        temp=look_at(machine, temp),
        nsys_temp=look_at(machine, nsys_temp) if nsys_temp.is_dir() else None,
        shm_total=shm[1] if shm else None,
        shm_free=shm[0] if shm else None,
        limits=machine.limits(),
        infiniband=infiniband.is_dir() and any(infiniband.iterdir()),
        mpirun=machine.which("mpirun") or "",
        opal_prefix_there=Path(prefix).is_dir() if prefix else None,
        rank_of=next((name for name in RANK_OF if name in environ), ""),
        c_compiler=_compiler(machine, "CC", ("gcc", "clang")),
        cxx_compiler=_compiler(machine, "CXX", ("g++", "clang++")),
        environ={
            name: value
            for name, value in sorted(environ.items())
            if name in TELLING or name.startswith(FAMILIES)
        },
        container=_container(machine),
        seccomp=_seccomp(machine),
    )


def _compiler(machine: Machine, variable: str, usual: tuple[str, ...]) -> str:
    """The compiler that Triton takes (3.6, ``runtime/build.py``, ``_find_compiler``): what the
    variable says, also when that is empty, as one program's name; else the first usual one."""
    said = machine.environ.get(variable)
    names = usual if said is None else (said,)
    return next((path for name in names if (path := machine.which(name))), "")


def look_at(machine: Machine, path: Path) -> Folder:
    """A folder and its file system; one that is not there yet is told by the nearest above it."""
    whole = Path(os.path.abspath(path.expanduser()))
    there = whole
    blocked = False  # by a file where a folder should be
    while not there.is_dir() and there != there.parent:
        blocked = blocked or there.exists()
        there = there.parent
    space = _space(machine, there)
    real = str(there.resolve())
    return Folder(
        path=str(whole),
        looked_at=str(there),
        writable=not blocked and os.access(there, os.W_OK | os.X_OK),
        free=space[0] if space else None,
        total=space[1] if space else None,
        mount=mount_of(real, machine.read("/proc/self/mountinfo") or ""),
    )


def _space(machine: Machine, path: Path) -> tuple[int, int] | None:
    try:
        usage = machine.usage(path)
    except OSError:
        return None
    return int(usage.free), int(usage.total)


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """The mount that a path lies on, from ``/proc/self/mountinfo`` (proc(5)): the deepest, and of
    several at one point the last."""
    best: Mount | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 2:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):
            best = Mount(point, kinds[0], kinds[1])
    return best


def _container(machine: Machine) -> str:
    if machine.exists("/.dockerenv"):
        return "docker"
    if machine.exists("/run/.containerenv"):
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in machine.environ:
        return "kubernetes"
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SLURM_CONTAINER_IMAGE"):
        if name in machine.environ:
            return name.split("_")[0].lower() + " container"
    return ""


def _seccomp(machine: Machine) -> bool | None:
    """Whether system calls are filtered: ``Seccomp`` of ``/proc/self/status`` is 2 (proc(5))."""
    found = re.search(r"^Seccomp:\s*(\d)", machine.read("/proc/self/status") or "", re.MULTILINE)
    return None if found is None else found[1] == "2"
