"""What the doctor says of the host: folders, space, shared memory, MPI, limits, variables."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_machine import GIB, made_machine

from opkit.doctor.facts.host import Folder, HostFacts, Mount, gather_host, look_at, mount_of
from opkit.doctor.finding import Finding, Status
from opkit.doctor.probes import host as probe

OK, UNKNOWN, WARN, FAIL = Status.OK, Status.UNKNOWN, Status.WARN, Status.FAIL
MIB = 2**20


def folder(kind: str = "ext4", free: int | None = 100 * GIB, **changes: Any) -> Folder:
    fields: dict[str, Any] = {
        "path": "/data/out", "looked_at": "/data/out", "writable": True, "free": free,
        "total": 200 * GIB, "mount": Mount("/", kind, "server:/x") if kind else None,
    }  # fmt: skip
    return Folder(**{**fields, **changes})


def host(**changes: Any) -> HostFacts:
    return HostFacts(**{"out": folder(), "temp": folder(), **changes})


def findings(root: Path, **machine: Any) -> dict[str, Finding]:
    facts = gather_host(made_machine(root, **machine), root / "out")
    return {found.name: found for found in (one(facts) for one in probe.PROBES)}


def test_a_host_in_order(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert {one.status for one in found.values()} == {OK}
    assert {one.fix for one in found.values()} == {""}
    assert found["output folder"].says == f"{tmp_path}/out (ext4)"
    assert found["disk space"].says == (
        f"100.0 GiB free for output and temporary files ({tmp_path})"
    )
    assert found["limits"].says == "65,536 open files, unlimited of locked memory"


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("ext4", OK, "/data/out (ext4)"),
        ("xfs", OK, "xfs"),
        ("", OK, "file system unknown"),
        ("nfs4", WARN, "from server:/x: slow for traces, and the ledger needs locks"),
        ("fuse.sshfs", WARN, "slow"),
        ("lustre", WARN, "slow"),
        ("tmpfs", WARN, "in memory"),
        ("overlay", WARN, "inside the container"),
    ],
)
def test_the_output_folders_file_system(kind: str, status: Status, says: str) -> None:
    found = probe.output_folder(host(out=folder(kind)))
    assert (found.status, says in found.says) == (status, True), found.says
    assert ("--out" in found.fix) is (status is WARN)


def test_an_output_folder_that_is_closed() -> None:
    found = probe.output_folder(host(out=folder(writable=False)))
    assert (found.status, found.says) == (FAIL, "/data/out cannot be written")


@pytest.mark.parametrize(
    ("free", "status"),
    [(100 * GIB, OK), (9 * GIB, WARN), (300 * MIB, WARN), (200 * MIB, FAIL), (None, UNKNOWN)],
)
def test_disk_space(free: int | None, status: Status) -> None:
    assert probe.disk_space(host(out=folder(free=free), temp=folder(free=free))).status is status
    # On another disk each is told, and the worse one counts.
    far = folder(free=free, mount=Mount("/tmp", "ext4"), looked_at="/tmp")
    found = probe.disk_space(host(temp=far))
    assert found.status is status
    assert "output files (/data/out); " in found.says
    assert ("TMPDIR" in found.fix) is (status is not OK)


def test_the_temporary_folder(tmp_path: Path) -> None:
    gone = findings(tmp_path, environ={"TMPDIR": str(tmp_path / "gone")})["temporary folder"]
    assert (gone.status, gone.says) == (FAIL, f"{tmp_path}/gone is not there")
    closed = probe.temp_folder(host(temp=folder(writable=False)))
    assert closed.status is FAIL
    assert probe.temp_folder(host(temp=folder("nfs"))).status is WARN
    theirs = probe.temp_folder(host(nsys_temp=folder(path="/tmp/nvidia", writable=False)))
    assert (theirs.status, "/tmp/nvidia is another user's" in theirs.says) == (WARN, True)


@pytest.mark.parametrize(
    ("total", "free", "status", "says"),
    [
        (24 * GIB, 23 * GIB, OK, "24.0 GiB, 23.0 GiB free"),
        (64 * MIB, 64 * MIB, WARN, "64 MiB, 64 MiB free: too little"),
        (24 * GIB, 10 * MIB, WARN, "10 MiB free"),
        (None, None, WARN, "not there"),
    ],
)
def test_shared_memory(total: int | None, free: int | None, status: Status, says: str) -> None:
    found = probe.shared_memory(host(shm_total=total, shm_free=free))
    assert (found.status, says in found.says) == (status, True), found.says


def test_mpi(tmp_path: Path) -> None:
    def mpi(environ: dict[str, str], there: str | None = None) -> Finding:
        environ = {"TMPDIR": str(tmp_path), **environ}
        return findings(tmp_path, environ=environ, which=lambda _: there)["MPI"]

    assert (mpi({}).status, mpi({}, "/usr/bin/mpirun").says) == (OK, "/usr/bin/mpirun")
    nowhere = mpi({"OPAL_PREFIX": "/nowhere"}, "/usr/bin/mpirun")
    assert (nowhere.status, "OPAL_PREFIX=/nowhere is no folder" in nowhere.says) == (WARN, True)
    assert mpi({"OPAL_PREFIX": str(tmp_path)}, "/usr/bin/mpirun").status is OK
    inside = mpi({"PMIX_RANK": "0"})
    assert (inside.status, "PMIX_RANK" in inside.says) == (WARN, True)


@pytest.mark.parametrize(
    ("limits", "rdma", "status"),
    [
        ({"nofile": 65536, "memlock": -1}, True, OK),
        ({"nofile": -1, "memlock": 8 * MIB}, False, OK),
        ({"nofile": 1024, "memlock": -1}, False, WARN),
        ({"nofile": 65536, "memlock": 8 * MIB}, True, WARN),
        ({}, False, UNKNOWN),
    ],
)
def test_limits(limits: dict[str, int], rdma: bool, status: Status) -> None:
    found = probe.limits(host(limits=limits, infiniband=rdma))
    assert (found.status, "ulimit" in found.fix) == (status, status is WARN)


VARIABLES = [
    ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, OK, "LD_PRELOAD=/usr/lib/libjemalloc.so.2"),
    ({"LD_PRELOAD": "libtcmalloc.so /x/libspy.so"}, WARN, "libraries are put in front"),
    ({}, OK, "no variable"),
    ({"CUDA_LAUNCH_BLOCKING": "1"}, FAIL, "CUDA_LAUNCH_BLOCKING=1: every launch waits"),
    ({"CUDA_LAUNCH_BLOCKING": "0"}, OK, "no variable"),
    ({"TEARDOWN_CUPTI": "1", "NVIDIA_TF32_OVERRIDE": "0"}, FAIL, "TEARDOWN_CUPTI=1"),
    ({"NVIDIA_TF32_OVERRIDE": "0"}, WARN, "float32 products take other kernels"),
    ({"CUDA_INJECTION64_PATH": "/x.so"}, WARN, "another profiler"),
    ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, WARN, "streams"),
    ({"VLLM_ATTENTION_BACKEND": "FLASHINFER"}, OK, "VLLM_ATTENTION_BACKEND=FLASHINFER"),
    ({"NSYS_FOO": "1"}, OK, "engine and mock both get NSYS_FOO=1"),
    ({"NCCL_DEBUG": "INFO", "OPAL_PREFIX": "/x"}, OK, "no variable"),
]


@pytest.mark.parametrize(
    ("environ", "there", "status", "says"),
    [
        ({}, ("gcc", "g++"), OK, "/usr/bin/gcc"),
        ({}, ("clang",), OK, "/usr/bin/clang"),
        ({}, (), WARN, "no C compiler"),
        ({"CC": "cc-13"}, ("cc-13", "g++"), OK, "/usr/bin/cc-13"),
        # A shell that had exported something else of that name cost a run on an H100.
        ({"CC": '{"mode":0}'}, ("gcc", "g++"), FAIL, 'CC={"mode":0} names no program'),
        ({"CC": ""}, ("gcc", "g++"), FAIL, "CC= names no program"),
        # Triton takes it as one program's name.
        ({"CC": "ccache gcc"}, ("gcc", "ccache", "g++"), FAIL, "CC=ccache gcc names no program"),
        ({"CXX": "/no/g++"}, ("gcc", "g++"), WARN, "CXX=/no/g++ names no program"),
    ],
)
def test_the_compiler_that_triton_builds_with(
    tmp_path: Path, environ: dict[str, str], there: tuple[str, ...], status: Status, says: str
) -> None:
    programs = {name: f"/usr/bin/{name}" for name in there}
    environ = {"TMPDIR": str(tmp_path), **environ}
    found = findings(tmp_path, environ=environ, which=programs.get)
    assert found["compiler"].status is status
    assert says in found["compiler"].says
    assert bool(found["compiler"].fix) is (status is not OK)
    assert found["environment"].status is OK  # told once


@pytest.mark.parametrize(("environ", "status", "says"), VARIABLES)
def test_variables(tmp_path: Path, environ: dict[str, str], status: Status, says: str) -> None:
    environ = {"TMPDIR": str(tmp_path), "AWS_SECRET_ACCESS_KEY": "hush", **environ}
    facts = gather_host(made_machine(tmp_path, environ=environ), tmp_path)
    found = probe.environment(facts)
    assert (found.status, says in found.says) == (status, True), found.says
    assert found.fix.startswith("unset ") is (status is not OK)
    assert "hush" not in repr(facts)  # only what tells something is kept


def test_a_container_is_told(tmp_path: Path) -> None:
    inside: dict[str, str | None] = {".dockerenv": "", "proc/self/status": "Seccomp:\t2\n"}
    found = findings(tmp_path, files=inside)["container"]
    assert (found.status, found.says) == (OK, "docker, system calls filtered (seccomp)")
    outside = findings(tmp_path, files={".dockerenv": None})["container"]
    assert outside.says == "none"


MOUNTINFO = r"""21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:30 / /data rw,relatime shared:1 - nfs4 filer:/data rw
23 22 8:2 / /data/local\040disk rw - xfs /dev/sdb1 rw
24 21 0:31 / /data2 rw - tmpfs tmpfs rw
25 21 0:40 / /data2 rw - overlay overlay rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me", "ext4"),
        ("/", "ext4"),
        ("/data", "nfs4"),
        ("/data/x/y", "nfs4"),
        ("/data/local disk/x", "xfs"),
        ("/database", "ext4"),
        ("/data2/x", "overlay"),  # the later mount lies on top
    ],
)
def test_the_mount_of_a_path(path: str, kind: str) -> None:
    mount = mount_of(path, MOUNTINFO)
    assert mount is not None
    assert mount.kind == kind


def test_no_mounts_are_no_error() -> None:
    assert mount_of("/x", "") is None


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    def usage(path: Path) -> SimpleNamespace:
        assert path == tmp_path
        return SimpleNamespace(free=5, total=9)

    found = look_at(made_machine(tmp_path, usage=usage), tmp_path / "a" / "b")
    assert (found.path, found.looked_at) == (f"{tmp_path}/a/b", str(tmp_path))
    assert (found.writable, found.free, found.total) == (True, 5, 9)


def test_a_file_in_the_way_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not look_at(made_machine(tmp_path), tmp_path / "file" / "out").writable


def test_a_network_folder_is_found_by_its_mount(tmp_path: Path) -> None:
    (tmp_path / "nfs").mkdir()
    facts = gather_host(made_machine(tmp_path), tmp_path / "nfs" / "out")
    assert probe.output_folder(facts).status is WARN
    assert facts.out.mount == Mount(f"{tmp_path}/nfs", "nfs4", "server:/export")
