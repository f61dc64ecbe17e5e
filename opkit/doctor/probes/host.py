"""Findings on the host: folders, memory, limits, MPI, variables."""

from __future__ import annotations

import re

from opkit.doctor.facts.host import Folder, HostFacts
from opkit.doctor.finding import Finding, Group, Status, worst

GIB, MIB = 2**30, 2**20
FULL = 256 * MIB  # less than one small recording
LITTLE = 10 * GIB  # recordings from process start and their exports came to 2 GiB each
SMALL_SHM = GIB  # docker gives 64 MiB; NCCL and engines' queues take tens of MiB a rank
FEW_FILES = 4096  # an engine with its workers, sockets and weight shards
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "virtiofs", "lustre", "gpfs", "beegfs",
     "ceph", "glusterfs", "panfs", "wekafs", "pvfs2", "orangefs"}
)  # fmt: skip
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def _found(name: str, status: Status, says: str, fix: str = "") -> Finding:
    return Finding(name, status, says, fix, Group.HOST)


def is_network(kind: str) -> bool:
    """Whether a file system of that kind lies on another machine, or behind a program (FUSE)."""
    return kind in NETWORK or kind.startswith("fuse.")


def output_folder(host: HostFacts) -> Finding:
    """Fail: it cannot be written. Warn: it lies on a network, in memory or in a container."""
    out = host.out
    kind = out.mount.kind if out.mount else ""
    says = f"{out.path} ({kind or 'file system unknown'})"
    elsewhere = "give --out a folder on a local disk"
    if not out.writable:
        return _found("output folder", Status.FAIL, f"{out.looked_at} cannot be written", elsewhere)
    if is_network(kind):
        source = out.mount.source if out.mount else ""
        return _found(
            "output folder", Status.WARN,
            f"{says}, from {source}: slow for traces, and the ledger needs locks", elsewhere,
        )  # fmt: skip
    if kind in IN_MEMORY:
        return _found(
            "output folder", Status.WARN, f"{says}: in memory, gone at a reboot", elsewhere
        )
    if kind == "overlay":
        return _found(
            "output folder", Status.WARN, f"{says}: inside the container, gone with it",
            "give --out a folder that is mounted from the host",
        )  # fmt: skip
    return _found("output folder", Status.OK, says)


def disk_space(host: HostFacts) -> Finding:
    """Fail: full. Warn: a long recording may not fit."""
    folders = {"output": host.out, "temporary": host.temp}
    if host.out.mount is not None and host.out.mount == host.temp.mount:
        folders = {"output and temporary": host.out}
    told: list[tuple[Status, str]] = [_space(name, folder) for name, folder in folders.items()]
    status = worst([entry[0] for entry in told])
    fix = "free some, or choose other folders: --out, TMPDIR (nsys records there)"
    says = "; ".join(text for _, text in told)
    return _found("disk space", status, says, "" if status is Status.OK else fix)


def _space(name: str, folder: Folder) -> tuple[Status, str]:
    if folder.free is None:
        return Status.UNKNOWN, f"{name}: {folder.looked_at} does not tell"
    says = f"{_size(folder.free)} free for {name} files ({folder.looked_at})"
    if folder.free < FULL:
        return Status.FAIL, says
    return (Status.WARN if folder.free < LITTLE else Status.OK), says


def temp_folder(host: HostFacts) -> Finding:
    """Fail: TMPDIR is not there or closed. Warn: nsys's folder in it is closed to this user."""
    fix = "export TMPDIR=DIR, a folder of yours on a local disk"
    temp = host.temp
    if temp.looked_at != temp.path:
        return _found("temporary folder", Status.FAIL, f"{temp.path} is not there", fix)
    if not temp.writable:
        return _found("temporary folder", Status.FAIL, f"{temp.path} cannot be written", fix)
    if host.nsys_temp is not None and not host.nsys_temp.writable:
        return _found(
            "temporary folder", Status.WARN,
            f"{host.nsys_temp.path} is another user's: nsys keeps its sessions there", fix,
        )  # fmt: skip
    kind = temp.mount.kind if temp.mount else ""
    if is_network(kind):
        return _found(
            "temporary folder", Status.WARN, f"{temp.path} ({kind}): nsys records there", fix
        )
    return _found("temporary folder", Status.OK, f"{temp.path} ({kind or 'unknown'})")


def shared_memory(host: HostFacts) -> Finding:
    """Warn: /dev/shm is missing or small: engines of several ranks talk through it."""
    fix = "start the container with --ipc=host or --shm-size=16g"
    if host.shm_total is None or host.shm_free is None:
        return _found("/dev/shm", Status.WARN, "not there: several ranks need it", fix)
    says = f"{_size(host.shm_total)}, {_size(host.shm_free)} free"
    if host.shm_total < SMALL_SHM:
        return _found("/dev/shm", Status.WARN, f"{says}: too little for several ranks", fix)
    if host.shm_free < SMALL_SHM:
        return _found("/dev/shm", Status.WARN, says, "remove what earlier runs left there")
    return _found("/dev/shm", Status.OK, says)


def mpi(host: HostFacts) -> Finding:
    """Warn: OPAL_PREFIX leads nowhere, or this shell is itself a rank. Only ``--mode per-rank`` and
    TensorRT-LLM start MPI."""
    prefix = host.environ.get("OPAL_PREFIX", "")
    if host.opal_prefix_there is False:
        return _found(
            "MPI", Status.WARN, f"OPAL_PREFIX={prefix} is no folder: Open MPI will not start",
            "unset OPAL_PREFIX, or set it to where Open MPI is",
        )  # fmt: skip
    if host.rank_of:
        return _found(
            "MPI", Status.WARN,
            f"this shell belongs to another job ({host.rank_of} is set): engines may take "
            "themselves for one of its ranks",
            "for name in $(env | grep -oE '^(SLURM|PMIX?|OMPI)_[^=]*'); do unset $name; done",
        )  # fmt: skip
    if not host.mpirun:
        return _found("MPI", Status.OK, "no mpirun; only --mode per-rank needs one")
    beside = f", OPAL_PREFIX={prefix}" if prefix else ""
    return _found("MPI", Status.OK, f"{host.mpirun}{beside}")


def limits(host: HostFacts) -> Finding:
    """Warn: few open files, or little locked memory beside a card for RDMA."""
    files, locked = host.limits.get("nofile"), host.limits.get("memlock")
    if files is None or locked is None:
        return _found("limits", Status.UNKNOWN, "the system does not tell them")
    says = (
        f"{'unlimited' if files < 0 else f'{files:,}'} open files, "
        f"{'unlimited' if locked < 0 else _size(locked)} of locked memory"
    )
    if 0 <= files < FEW_FILES:
        return _found("limits", Status.WARN, says, "ulimit -n 65536")
    if host.infiniband and 0 <= locked < GIB:
        return _found(
            "limits", Status.WARN, f"{says}: too little for the RDMA card",
            "ulimit -l unlimited (docker: --ulimit memlock=-1)",
        )  # fmt: skip
    return _found("limits", Status.OK, says)


def compiler(host: HostFacts) -> Finding:
    """Fail: ``CC`` names no program, so that Triton cannot build what starts its kernels, and an
    engine ends while it loads. Warn: ``CXX`` does, or there is no compiler at all."""
    name = "compiler"
    for variable, path, status, effect in (
        ("CC", host.c_compiler, Status.FAIL, "Triton builds with it, so engines fail as they load"),
        ("CXX", host.cxx_compiler, Status.WARN, "torch and FlashInfer build with it"),
    ):
        said = host.environ.get(variable)
        if said is not None and not path:
            return _found(
                name, status, f"{variable}={said[:_SHOWN]} names no program: {effect}",
                f"unset {variable}, or set it to one compiler's path, without options",
            )  # fmt: skip
    if not host.c_compiler:
        return _found(
            name, Status.WARN,
            "no C compiler (gcc, clang): Triton needs one, unless all that it builds is cached",
            "apt-get install gcc (or your system's way), or set CC to one compiler's path",
        )  # fmt: skip
    return _found(name, Status.OK, host.c_compiler)


_SHOWN = 80  # characters of a variable's value
ON = ("1", "true", "yes", "on")
# variable → (values that matter, or any; how grave; what it does)
HARMFUL: dict[str, tuple[tuple[str, ...] | None, Status, str]] = {
    "CUDA_LAUNCH_BLOCKING": (ON, Status.FAIL, "every launch waits for its kernel"),
    "TRITON_INTERPRET": (ON, Status.FAIL, "Triton kernels run in Python"),
    "TEARDOWN_CUPTI": (ON, Status.FAIL, "the next graph replay ends in a launch failure"),
    "CUDA_INJECTION64_PATH": (None, Status.WARN, "another profiler is loaded into CUDA"),
    "NVTX_INJECTION64_PATH": (None, Status.WARN, "ranges go to another tool"),
    "CUDA_MPS_PIPE_DIRECTORY": (None, Status.WARN, "kernels may go through an MPS server"),
    "NVIDIA_TF32_OVERRIDE": (None, Status.WARN, "float32 products take other kernels"),
    "CUDA_DEVICE_MAX_CONNECTIONS": (None, Status.WARN, "streams share hardware queues"),
    "CUDA_FORCE_PTX_JIT": (ON, Status.WARN, "kernels are compiled anew, not those shipped"),
    "CUDA_DISABLE_PTX_JIT": (ON, Status.WARN, "kernels that come as PTX fail"),
    "CUBLAS_WORKSPACE_CONFIG": (None, Status.WARN, "cuBLAS picks other kernels"),
    "CUBLASLT_WORKSPACE_SIZE": (None, Status.WARN, "cuBLASLt picks other kernels"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (ON, Status.WARN, "every tensor is a cudaMalloc"),
    "TORCH_COMPILE_DISABLE": (ON, Status.WARN, "models are not compiled"),
    "TORCHDYNAMO_DISABLE": (ON, Status.WARN, "models are not compiled"),
    "LD_PRELOAD": (None, Status.WARN, "libraries are put in front of every program"),
}
ALLOCATORS = ("libjemalloc", "libtcmalloc", "libmimalloc")
# Told by other findings, or of no consequence for what is launched.
ELSEWHERE = ("OPAL_PREFIX", "CUDA_DEVICE_ORDER", "NCCL_DEBUG", "CC", "CXX")


def environment(host: HostFacts) -> Finding:
    """Variables that change what is launched or how it is timed; engine and mock inherit both."""
    wrong = [
        (name, value, *HARMFUL[name][1:])
        for name, value in host.environ.items()
        if name in HARMFUL and _matters(HARMFUL[name][0], value) and not _allocators(name, value)
    ]
    if wrong:
        says = "; ".join(f"{name}={value}: {effect}" for name, value, _, effect in wrong)
        status = worst([entry[2] for entry in wrong])
        names = " ".join(name for name, *_ in wrong)
        return _found("environment", status, says, f"unset {names}, unless it is meant")
    rest = [
        f"{name}={value}"
        for name, value in host.environ.items()
        if (name not in HARMFUL or _allocators(name, value)) and name not in ELSEWHERE
    ]
    if rest:
        return _found("environment", Status.OK, f"engine and mock both get {', '.join(rest)}")
    return _found("environment", Status.OK, "no variable that changes what is launched")


def _allocators(name: str, value: str) -> bool:
    """Whether only memory allocators are preloaded, as many images have it."""
    libraries = [path.rpartition("/")[2] for path in re.split(r"[ :]+", value) if path]
    return name == "LD_PRELOAD" and all(library.startswith(ALLOCATORS) for library in libraries)


def _matters(values: tuple[str, ...] | None, value: str) -> bool:
    return bool(value) and (values is None or value.lower() in values)


def container(host: HostFacts) -> Finding:
    """Never grave: what a container forbids is told where it is missed."""
    if not host.container:
        return _found("container", Status.OK, "none")
    filtered = {
        True: ", system calls filtered (seccomp)",
        False: ", system calls not filtered",
        None: "",
    }
    return _found("container", Status.OK, host.container + filtered[host.seccomp])


PROBES = (
    output_folder,
    disk_space,
    temp_folder,
    shared_memory,
    mpi,
    limits,
    compiler,
    environment,
    container,
)


def _size(number: int) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / MIB:,.0f} MiB"
