"""What the tests of ``opkit comm`` share: a made host, fake ranks, and who is still alive."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import opkit
from opkit.collect.comm.host import Host
from opkit.collect.comm.processes import Launcher

FAKE_RANK = Path(__file__).with_name("fake_comm_rank.py")
H100 = "NVIDIA H100 80GB HBM3"


def made_host(gpus: int = 2, **variables: str) -> Host:
    """A host that never was."""
    return Host(
        versions={"torch": "2.11.0", "cuda": "13.0", "nccl": "2.29.2", "engine": "0.24.0"},
        gpus=tuple({"index": i, "uuid": f"GPU-{i}", "name": H100} for i in range(gpus)),
        variables=dict(variables),
        topology="GPU0 GPU1\nX NV18",
    )


def fake_launcher(tmp_path: Path, case_limit_s: float = 20.0, **plan: str | int) -> Launcher:
    """Ranks that fail as planned, see ``fake_comm_rank``; keys such as ``at_512`` name sizes."""
    notes = tmp_path / "notes"
    notes.mkdir(exist_ok=True)
    told = {name.removeprefix("at_"): what for name, what in plan.items()}
    package = str(Path(opkit.__file__).parent.parent)
    return Launcher(
        argv=(sys.executable, str(FAKE_RANK)),
        logs=tmp_path / "logs",
        env={"FAKE_COMM": json.dumps(told), "FAKE_COMM_NOTES": str(notes), "PYTHONPATH": package},
        case_limit_s=case_limit_s,
        start_limit_s=20.0,
    )


def started(tmp_path: Path) -> list[int]:
    """Process ids of all fake ranks that were started."""
    path = tmp_path / "notes" / "pids"
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def ranks_of(parent: int) -> list[int]:
    """Process ids of the real ranks that ``parent`` has."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if above == parent and any(b"opkit.collect.comm.rank" in word for word in command):
            found.append(int(folder.name))
    return sorted(found)


def wait_until_dead(pids: list[int], seconds: float = 15.0) -> list[int]:
    """The processes that still live after that time."""
    until = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def environment_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def mine() -> int:
    """This process."""
    return os.getpid()
