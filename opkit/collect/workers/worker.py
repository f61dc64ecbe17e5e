"""The process that owns one GPU: builds a mock, measures its cases, appends what it measured.

    python -m opkit.collect.workers.worker SETTINGS

A lane (``lane.py``) starts it and talks with it over one inherited socket, in lines of JSON; stdout
and stderr are the engines' and go to a log. What it is told, and what it answers:

    build    group, plan, timing          built    manifest, digest, seconds
                                          unbuilt  error, final
    measure  key, case, attempt, keep     started  row (without a value)
                                          row      row, seconds, ending
    end                                   (the process ends)
    (at any time)                         ready    pid, gpu, host
                                          fatal    error, stop (the whole run)

A row with a value is on the disk before it is told. One without is told only: whether it is tried
again is for the lane's side to decide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

from opkit.collect.measurement import Measurement, Timing
from opkit.collect.work import Fault, Group, Row, build_digest
from opkit.collect.workers.faults import describe, disk_full, fault_of, recover
from opkit.collect.workers.parts import Part, PartFailed
from opkit.collect.workers.tether import tether
from opkit.errors import EXIT_RUN_FAILED, OpkitError
from opkit.layers.graphs import CaptureFailed
from opkit.layers.manifest import Manifest
from opkit.layers.mock import Forward, Mock
from opkit.layers.op import LaunchMode, Op, case_from_json
from opkit.layers.plan import Plan, PlannedCase, plan_from_json

STANDARD_TOOLS = "opkit.collect.workers.worker:standard_tools"
EXIT_ENDED = 128 + signal.SIGTERM  # as shells count it


class DeviceLike(Protocol):
    """What a row says of the GPU, or of the CPU in its place."""

    name: str
    uuid: str
    index: int

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True)
class Tools:
    """All that a worker uses of the rest of opkit; tests put others in their place.

    Attributes:
        find_op: the op of a name.
        build_mock: see :func:`opkit.layers.registry.build_mock`.
        open_device: the GPU that is visible, or the CPU.
        measure: see :func:`opkit.collect.timing.measure.measure`.
        recover: see :func:`opkit.collect.workers.faults.recover`.
    """

    find_op: Callable[[str], Op]
    build_mock: Callable[[Op, str, Plan], Mock]
    open_device: Callable[[], Any]
    measure: Callable[[Forward, Timing, Any, LaunchMode, str], Measurement]
    recover: Callable[[], None] = recover


def standard_tools() -> Tools:
    """What collection runs with."""
    device = importlib.import_module("opkit.collect.timing.device")
    registry = importlib.import_module("opkit.layers.registry")
    timing = importlib.import_module("opkit.collect.timing.measure")
    return Tools(registry.find_op, registry.build_mock, device.open_device, timing.measure)


@dataclass(frozen=True)
class Settings:
    """What the process is started with, as JSON on its command line.

    Attributes:
        socket: number of the inherited socket.
        parent: process that it must not outlive.
        folder: the run's output folder; empty when rows are only to be told.
        tools: ``module:function`` that gives its :class:`Tools`.
    """

    socket: int
    parent: int
    folder: str
    tools: str = STANDARD_TOOLS


@dataclass(frozen=True)
class Built:
    """A group's mock and what it says of itself."""

    group: str
    op: Op
    mock: Mock
    timing: Timing
    manifest: Manifest
    digest: str


class Worker:
    """See the module's docstring.

    Args:
        tools: what to measure with.
        folder: where to append rows with a value; None for nowhere.
        tell: sends an answer.
    """

    def __init__(
        self, tools: Tools, folder: Path | None, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._tools = tools
        self._part = Part(folder) if folder is not None else None
        self._tell = tell
        self._built: Built | None = None
        self._builds = 0
        self._host = socket.gethostname()
        self._device: DeviceLike = tools.open_device()
        device = self._device
        self._gpu = {"name": device.name, "uuid": device.uuid, "index": device.index}
        tell({"event": "ready", "pid": os.getpid(), "gpu": self._gpu, "host": self._host})

    def obey(self, command: dict[str, Any]) -> bool:
        """Do what one command says; return whether the process is fit for another."""
        return self._build(command) if command["do"] == "build" else self._measure(command)

    def close(self) -> None:
        """Close the mock and the device."""
        self._close_mock()
        self._device.close()
        if self._part is not None:
            self._part.close()

    def _close_mock(self) -> None:
        if self._built is not None:
            built, self._built = self._built, None
            built.mock.close()
            del built
            gc.collect()

    def _build(self, command: dict[str, Any]) -> bool:
        began = time.monotonic()
        first, self._builds = self._builds == 0, self._builds + 1
        try:
            self._close_mock()
            plan = plan_from_json(command["plan"], "the group's plan")
            op = self._tools.find_op(plan.op)
            mock = self._tools.build_mock(op, plan.backend, plan)
            manifest = mock.describe()
        except Exception as error:
            if disk_full(error):
                raise
            _log_traceback()
            # In a process of its own, what opkit refuses in a sentence it will refuse again.
            final = first and isinstance(error, OpkitError)
            self._tell({"event": "unbuilt", "error": describe(error), "final": final})
            return False
        digest = build_digest(manifest)
        timing = Timing(**command["timing"])
        self._built = Built(command["group"], op, mock, timing, manifest, digest)
        self._tell(
            {
                "event": "built",
                "manifest": json.dumps(asdict(manifest)),
                "digest": digest,
                "seconds": time.monotonic() - began,
            }
        )
        return True

    def _measure(self, command: dict[str, Any]) -> bool:
        built = self._built
        assert built is not None, "build comes first"
        began = time.monotonic()
        case = command["case"]
        row = Row(
            key=command["key"], group=built.group, table="", columns={}, case=case, gpu=self._gpu,
            host=self._host, attempts=command["attempt"], build=built.digest,
        )  # fmt: skip
        spent: dict[str, float] = {}
        sound = True
        try:
            planned = PlannedCase(case_from_json(case), LaunchMode(case["mode"]))
            row = _with_columns(row, built, planned)
            self._tell({"event": "started", "row": row.to_json()})
            row = replace(row, measurement=self._value(built, planned, spent))
        except Exception as error:
            if disk_full(error):
                raise
            _log_traceback()
            row = replace(row, fault=fault_of(error), error=describe(error))
        if row.fault is Fault.MEMORY:  # the exception is gone here, and its frames with it
            sound = self._recovers()
        row = replace(
            row,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=time.monotonic() - began,
        )
        if row.ok and self._part is not None and command["keep"]:
            self._part.append(row)
        ending = not sound or row.fault is Fault.CUDA
        self._tell({"event": "row", "row": row.to_json(), "seconds": spent, "ending": ending})
        return not ending

    def _value(
        self, built: Built, planned: PlannedCase[Any], spent: dict[str, float]
    ) -> Measurement:
        """The case's measurement; eager, with the reason, where no graph can be captured."""
        began = time.monotonic()
        graph_error = ""
        try:
            forward = built.mock.prepare(planned)
        except CaptureFailed as error:
            graph_error = str(error)
            planned = replace(planned, mode=LaunchMode.EAGER)
            forward = built.mock.prepare(planned)
        spent["prepare"] = time.monotonic() - began
        began = time.monotonic()
        measured = self._tools.measure(
            forward, built.timing, self._device, planned.mode, graph_error
        )
        spent["measure"] = time.monotonic() - began
        return measured

    def _recovers(self) -> bool:
        """Whether the process can go on after memory ran out."""
        try:
            self._tools.recover()
        except Exception:
            _log_traceback()
            return False
        return True


def build_command(group: Group) -> dict[str, Any]:
    """What a worker is told to build ``group``'s mock."""
    return {
        "do": "build",
        "group": group.name,
        "plan": group.plan.to_json(),
        "timing": asdict(group.timing),
    }


def measure_command(
    key: str, planned: PlannedCase[Any], attempt: int, keep: bool
) -> dict[str, Any]:
    """What a worker is told to measure a case; with ``keep`` False the row is not appended."""
    case = {**asdict(planned.case), "mode": planned.mode}
    return {"do": "measure", "key": key, "case": case, "attempt": attempt, "keep": keep}


def _with_columns(row: Row, built: Built, planned: PlannedCase[Any]) -> Row:
    """The row with its place in the tables, which it has also when it fails."""
    columns = built.op.columns(planned.case, built.manifest) if built.op.columns else {}
    return dataclasses.replace(
        row, table=built.op.table(planned.case).name, columns=cast(dict[str, Any], dict(columns))
    )


def load_tools(path: str) -> Tools:
    """The tools that ``module:function`` gives."""
    module, _, name = path.partition(":")
    return cast(Tools, getattr(importlib.import_module(module), name)())


def serve(settings: Settings, link: socket.socket) -> int:
    """Obey commands until told to end, or until there is nobody left to tell; return an exit code.

    Whatever cannot be told as a row is told as ``fatal``: the device that does not open, the disk
    that is full, a bug.
    """

    def tell(event: dict[str, Any]) -> None:
        link.sendall(json.dumps(event).encode() + b"\n")

    worker = None
    try:
        folder = Path(settings.folder) if settings.folder else None
        worker = Worker(load_tools(settings.tools), folder, tell)
        with link.makefile("r", encoding="utf-8") as commands:
            for line in commands:
                command = json.loads(line)
                if command["do"] == "end":
                    worker.close()
                    return 0
                if not worker.obey(command):
                    return EXIT_RUN_FAILED
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return EXIT_RUN_FAILED  # whoever started this process has gone
    except Exception as error:
        _log_traceback()
        told = str(error) if isinstance(error, OpkitError) else describe(disk_full(error) or error)
        stop = isinstance(error, PartFailed) or disk_full(error) is not None
        with contextlib.suppress(OSError):  # nobody is left to hear it
            tell({"event": "fatal", "error": told, "stop": stop})
        return EXIT_RUN_FAILED


def main(arguments: list[str]) -> int:
    """``python -m opkit.collect.workers.worker SETTINGS``."""
    settings = Settings(**json.loads(arguments[0]))
    os.set_inheritable(settings.socket, False)
    guard = tether(settings.parent, settings.socket)
    # SIGTERM shows in the log where the process stood, even if that is deep in a kernel's launch.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)
    code = serve(settings, socket.socket(fileno=settings.socket))
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    with contextlib.suppress(OSError):  # the log's disk may be the full one
        sys.stdout.flush()
        sys.stderr.flush()
    # Engines leave threads and exit hooks that may hang; all that counts is on the disk.
    os._exit(code)


def _log_traceback() -> None:
    """The current exception's traceback, into the log."""
    with contextlib.suppress(OSError):  # the log's disk may be full; the error itself is told
        traceback.print_exc()


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_ENDED)


if __name__ == "__main__":
    main(sys.argv[1:])
