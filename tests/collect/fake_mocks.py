"""A mock whose cases misbehave as they are named, and what workers are run with in its place.

The behaviour of a case is its ``dtype``; one that ends in ``-once`` is only bad the first time.
Processes and tasks begun are written into ``$OPKIT_FAKES``, so that tests see what really ran.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opkit.collect.measurement import Measurement, Timing
from opkit.collect.work import Group, Row, Task
from opkit.collect.workers.parts import Part
from opkit.collect.workers.worker import Tools
from opkit.errors import BadInput, ToolMissing
from opkit.layers.graphs import CaptureFailed
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.op import GemmCase, LaunchMode, Op, Table
from opkit.layers.plan import Plan, PlannedCase

TOOLS = "fake_mocks:tools"
LATE_TOOLS = "fake_mocks:tools_of_the_late"
NO_GPU_TOOLS = "fake_mocks:tools_without_gpu"
FOLDER = "OPKIT_FAKES"

FAKE = Op(
    name="fake",
    title="misbehaves",
    phases=(),
    region={},
    tables={"": Table("fake", "fakes", ("m", "how"), {})},
    columns=lambda case, manifest: {"m": case.m, "how": f"{case.dtype} on {manifest.backend}"},
)


def note(kind: str, text: str) -> None:
    """Remember something where the test finds it, also after a crash."""
    with (Path(os.environ[FOLDER]) / kind).open("a") as file:
        file.write(f"{text}\n")


@dataclass
class Device:
    name: str = "fake GPU"
    uuid: str = "GPU-0"
    index: int = 0

    def close(self) -> None:
        note("closed", f"{os.getpid()} device")


def open_device() -> Device:
    note("pids", str(os.getpid()))
    return Device(uuid=os.environ.get("CUDA_VISIBLE_DEVICES", "none"))


def open_no_device() -> Device:
    raise ToolMissing("no GPU here", hint="get one")


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def first_time(what: str) -> bool:
    """Whether ``what`` happens for the first time, in any process."""
    try:
        (Path(os.environ[FOLDER]) / f"once-{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def hang() -> None:
    """As in a driver call: no Python, no signal handler, for long."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(600)


def spin() -> None:
    """As in a driver call: signals arrive, their Python handlers never run."""
    sum(range(10**12))


class Tensor:
    """What takes the memory."""


tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()


def out_of_memory() -> None:
    held = Tensor()
    tensors.add(held)
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def cuda_error() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def refuse() -> None:
    raise BadInput("needs 9 blocks, there are 3")


def fail() -> None:
    raise ValueError("no such thing")


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/cache")


def meet() -> None:
    """Wait until there are two workers."""
    pids = Path(os.environ[FOLDER]) / "pids"
    while len(pids.read_text().split()) < 2:
        time.sleep(0.02)


def child_and_sleep() -> None:
    child = subprocess.Popen(["sleep", "600"])
    note("children", str(child.pid))
    time.sleep(600)


BEHAVIOURS: dict[str, Callable[[], Any]] = {
    "ok": lambda: None,
    "nap": lambda: time.sleep(0.1),
    "meet": meet,
    "slow": lambda: time.sleep(600),
    "child": child_and_sleep,
    "hang": hang,
    "spin": spin,
    "segfault": lambda: ctypes.string_at(0),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "oom": out_of_memory,
    "oom-broken": out_of_memory,
    "cuda": cuda_error,
    "refused": refuse,
    "error": fail,
    "full": disk_full,
    "capture": lambda: None,
    "late": lambda: None,
}


class FakeMock:
    """See :class:`opkit.layers.mock.Mock`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.behaviour = ""

    def prepare(self, planned: PlannedCase[Any]) -> Callable[[], None]:
        case = planned.case
        note("begun", f"{os.getpid()} {case.m} {planned.mode}")
        name = case.dtype
        if name.endswith("-once"):
            name = name.removesuffix("-once") if first_time(f"case-{case.m}") else "ok"
        if name == "capture" and planned.mode is LaunchMode.GRAPH:
            raise CaptureFailed("the forward cannot be captured: it syncs")
        self.behaviour = name
        return BEHAVIOURS[name]

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        del planned
        return ()

    def describe(self) -> Manifest:
        return Manifest(
            side="mock",
            op="fake",
            backend=self.plan.backend,
            command=tuple(sys.argv),
            created=str(time.time()),
        )

    def close(self) -> None:
        note("closed", f"{os.getpid()} mock")


latest: FakeMock | None = None
builds = 0


def build_mock(op: Op, backend: str, plan: Plan) -> FakeMock:
    """Build as ``plan.model`` says."""
    global latest, builds
    assert op is FAKE
    note("builds", f"{os.getpid()} {backend}")
    how = plan.model
    if how == "second fails" and builds:
        raise RuntimeError("something is left of the build before")
    builds += 1
    if how == "fails":
        raise RuntimeError("weights do not fit")
    if how == "refused":
        raise BadInput("8 heads cannot be shared among 3 ranks")
    if how == "segfault":
        BEHAVIOURS["segfault"]()
    if how == "full":
        disk_full()
    if how == "slow":
        time.sleep(600)
    latest = FakeMock(plan)
    return latest


def measure(
    forward: Callable[[], None],
    timing: Timing,
    device: Device,
    launch: LaunchMode = LaunchMode.EAGER,
    graph_error: str = "",
) -> Measurement:
    """One iteration of one millisecond."""
    assert device.name == "fake GPU"
    forward()
    return Measurement(
        launch=launch,
        graph_error=graph_error,
        elapsed_ms=(1.0, 1.0),
        timing=timing,
        stopped="iterations",
    )


def recover() -> None:
    assert not tensors, "the failed case's tensors are still held, by frames of its exception"
    if latest is not None and latest.behaviour == "oom-broken":
        raise RuntimeError("CUDA error: still out of memory")


def find_op(name: str) -> Op:
    assert name == "fake"
    return FAKE


def tools() -> Tools:
    return Tools(find_op, build_mock, open_device, measure, recover)


def tools_of_the_late() -> Tools:
    """A worker that dies of a case named ``late`` when its row is on the disk but not yet told."""
    append = Part.append

    def append_and_die(part: Part, row: Row) -> None:
        append(part, row)
        if row.case["dtype"] == "late":
            os.kill(os.getpid(), signal.SIGKILL)

    Part.append = append_and_die  # type: ignore[method-assign]
    return tools()


def tools_without_gpu() -> Tools:
    return Tools(find_op, build_mock, open_no_device, measure, recover)


def group_of(
    *behaviours: str, name: str = "fakes", first: int = 1, model: str = "", graph: bool = False
) -> Group:
    """A group with a case a behaviour; case ``i`` has m = ``first`` + i and key ``m-behaviour``."""
    mode = LaunchMode.GRAPH if graph else LaunchMode.EAGER
    planned = tuple(
        PlannedCase(GemmCase(first + number, 1, 1, behaviour), mode)
        for number, behaviour in enumerate(behaviours)
    )
    tasks = tuple(Task(f"{item.case.m}-{item.case.dtype}", item) for item in planned)
    plan = Plan(op="fake", backend="torch", model=model, cases=planned, manifest="")
    return Group(name, plan, tasks, Timing())
