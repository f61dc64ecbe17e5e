"""One lane: a GPU, and the worker process that has it. Starts it, talks with it, ends it.

A lane knows nothing of other lanes or of what is tried again (``pool.py`` decides that). It answers
for one thing: whatever the worker does, each call returns, and nothing it started stays behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from opkit.collect.work import Fault, Group, Row, Task, row_from_json
from opkit.collect.workers.worker import STANDARD_TOOLS, Settings, build_command, measure_command
from opkit.errors import RunFailed
from opkit.layers.interpreter import module_command
from opkit.layers.manifest import Manifest, manifest_from_json
from opkit.post_mortem import how_it_ended, last_words

_POLL_S = 0.2  # how often it is seen whether a worker still lives, and whether it still should
_REAP_S = 30.0  # after SIGKILL; only a process that hangs in the kernel takes longer
Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class LaneOptions:
    """How workers are run.

    Attributes:
        python: their interpreter, which must have opkit's dependencies and the framework; empty
            for that of the process that starts them.
        env: variables to set for them.
        tools: see :class:`opkit.collect.workers.worker.Settings`.
        start_s: seconds until a worker must have opened its GPU.
        build_s: seconds that a build may take.
        case_s: seconds that a case may take.
        grace_s: seconds between SIGTERM and SIGKILL.
    """

    python: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    tools: str = STANDARD_TOOLS
    start_s: float = 300.0
    build_s: float = 1800.0
    case_s: float = 120.0
    grace_s: float = 3.0


@dataclass(frozen=True)
class BuildReport:
    """A build that succeeded: what the mock says of itself, and what it took in seconds.

    ``start_s`` is that of a process that had to be started for it, with its imports, else 0.
    """

    manifest: Manifest
    digest: str
    start_s: float
    build_s: float


@dataclass(frozen=True)
class Tried:
    """One attempt at a task.

    Attributes:
        row: with a value, or with its fault.
        died: whether the worker is gone, killed for it or of itself.
        began: whether the worker had begun with the task; if not, its death is not the task's.
        gone: whether the lane's place is gone, too; it may take long to find another.
        seconds: what the attempt took by activity: ``prepare``, ``measure``, or ``lost``.
    """

    row: Row
    died: bool = False
    began: bool = True
    gone: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)


class BuildFailed(Exception):
    """A group's mock is not there.

    Attributes:
        final: whether another try would only fail again.
        start: whether not even the worker started: no group would do better.
    """

    def __init__(self, reason: str, final: bool = False, start: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final
        self.start = start


class Stop(RunFailed):
    """The whole run must stop: a disk is full."""


class Unwanted(Exception):
    """What was asked for is no longer wanted; the worker has been ended."""


class Lane(Protocol):
    """What the pool needs of a lane, be it on this host or anywhere in a cluster.

    Attributes:
        name: for messages, as ``gpu0``.
        keeps: whether rows with a value are on the disk of the output folder already.
    """

    name: str
    keeps: bool

    def serves(self, group: Group) -> bool:
        """Whether its worker lives and has this group's mock."""

    def build(self, group: Group, cancelled: Cancelled) -> BuildReport:
        """Make a worker ready for ``group``: in the process that is there, else in a new one.

        Raises:
            BuildFailed, Unwanted, Stop.
        """

    def measure(self, task: Task, attempt: int, keep: bool, cancelled: Cancelled) -> Tried:
        """Measure a task of the group that was built.

        Raises:
            Unwanted, Stop.
        """

    def drop(self) -> None:
        """End the worker, politely if it listens; nothing of it is left when this returns."""


class _Died(Exception):
    """The worker has died, or did not answer in time and was killed."""

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault = fault
        self.reason = reason


class LocalLane:
    """A lane of this host.

    Args:
        name: for messages and the names of logs.
        visible: value of ``CUDA_VISIBLE_DEVICES``: the GPU's UUID or index; None leaves it as it
            is found (no GPU, or chosen by somebody else, as in a Ray actor).
        options: how workers are run.
        logs: folder for the workers' stdout and stderr.
        folder: output folder, for the workers' parts; None for rows that are only told.
    """

    def __init__(
        self,
        name: str,
        visible: str | None,
        options: LaneOptions,
        logs: Path,
        folder: Path | None,
    ) -> None:
        self.name = name
        self.keeps = folder is not None
        self._visible = visible
        self._options = options
        self._logs = logs
        self._folder = folder
        self._popen: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._received = b""
        self._log = Path()
        self._starts = 0
        self._group = ""
        self._idle = False  # whether the worker waits for a command
        self._stuck = ""

    def serves(self, group: Group) -> bool:
        """See :class:`Lane`."""
        return self._popen is not None and self._group == group.name

    def build(self, group: Group, cancelled: Cancelled) -> BuildReport:
        """See :class:`Lane`."""
        began = time.monotonic()
        started = self._popen is None
        if started:
            self._start(cancelled)
        start_s = time.monotonic() - began if started else 0.0
        self._group = ""
        limit = self._options.build_s
        try:
            self._send(build_command(group), limit)
            answer = self._answer(f"the build of {group.name}", limit, cancelled)
        except _Died as death:
            raise BuildFailed(death.reason) from death
        if answer["event"] == "unbuilt":
            self.drop()
            raise BuildFailed(answer["error"], final=answer["final"])
        self._group = group.name
        manifest = manifest_from_json(answer["manifest"], f"the worker of {self.name}")
        return BuildReport(manifest, answer["digest"], start_s, answer["seconds"])

    def measure(self, task: Task, attempt: int, keep: bool, cancelled: Cancelled) -> Tried:
        """See :class:`Lane`."""
        began = time.monotonic()
        limit = self._options.case_s
        planned = task.planned
        # What a row says when not even the worker could: its group and its case.
        row = Row(
            task.key, self._group, "", {}, {**asdict(planned.case), "mode": planned.mode},
            host=socket.gethostname(), attempts=attempt,
        )  # fmt: skip
        has_begun = False
        try:
            self._send(measure_command(task.key, planned, attempt, keep), limit)
            answer = self._answer("the case", limit, cancelled)
            if answer["event"] == "started":
                has_begun, row = True, row_from_json(answer["row"], self.name)
                answer = self._answer("the case", limit, cancelled)
            row = row_from_json(answer["row"], self.name)
        except _Died as death:
            seconds = time.monotonic() - began
            row = replace(
                row,
                fault=death.fault,
                error=death.reason,
                created=datetime.now(UTC).isoformat(timespec="milliseconds"),
                seconds=seconds,
            )
            return Tried(row, died=True, began=has_begun, seconds={"lost": seconds})
        if answer["ending"]:
            self.drop()
        spent = answer["seconds"] if row.ok else {"lost": row.seconds}
        return Tried(row, died=row.fault is Fault.CUDA, seconds=spent)

    def drop(self) -> None:
        """See :class:`Lane`."""
        self._end(self._options.grace_s)

    def kill(self) -> None:
        """End the worker without ceremony."""
        self._end(0.0)

    def _start(self, cancelled: Cancelled) -> None:
        """Start a worker and wait until it has opened its GPU."""
        if self._stuck:
            raise BuildFailed(self._stuck, final=True, start=True)
        self._starts += 1
        self._logs.mkdir(parents=True, exist_ok=True)
        self._log = self._logs / f"{os.getpid()}-{self.name}-{self._starts}.log"
        mine, theirs = socket.socketpair()
        settings = Settings(
            theirs.fileno(), os.getpid(), str(self._folder or ""), self._options.tools
        )
        python = self._options.python or sys.executable
        command = module_command(python, "opkit.collect.workers.worker")
        with theirs, self._log.open("wb") as log:
            try:
                self._popen = subprocess.Popen(
                    [*command, json.dumps(asdict(settings))],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=self._environment(), pass_fds=[theirs.fileno()], start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                mine.close()
                reason = f"{python} could not be started ({error})"
                raise BuildFailed(reason, final=True, start=True) from error
        self._link, self._received = mine, b""
        try:
            self._answer("its start", self._options.start_s, cancelled)
        except _Died as death:
            raise BuildFailed(death.reason, start=True) from death

    def _environment(self) -> dict[str, str]:
        env = {**os.environ, **self._options.env}
        if self._visible is not None:
            env["CUDA_VISIBLE_DEVICES"] = self._visible
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # an index means what NVML means by it
        return env

    def _send(self, command: dict[str, Any], limit: float) -> None:
        assert self._link is not None, "a worker is started first"
        self._idle = False
        self._link.settimeout(limit)
        try:
            self._link.sendall(json.dumps(command).encode() + b"\n")
        except TimeoutError:
            raise self._gone(Fault.TIMEOUT, f"it did not listen for {limit:g} s") from None
        except OSError:  # it has died: its last words, if any, are still to be read
            return

    def _answer(self, what: str, limit: float, cancelled: Cancelled) -> dict[str, Any]:
        """The worker's next event.

        Raises:
            _Died: it died, or did not answer for ``limit`` seconds; nothing of it is left.
            Unwanted: ``cancelled`` says so; nothing of it is left.
            Stop: it told that the run must stop.
        """
        until = time.monotonic() + limit
        try:
            while (line := self._line()) is None:
                if cancelled():
                    self.drop()
                    raise Unwanted
                if time.monotonic() > until:
                    raise self._gone(Fault.TIMEOUT, f"{what} took more than {limit:g} s")
        except EOFError:
            raise self._gone(Fault.CRASH, "") from None
        except BaseException:
            self.drop()  # also when this is interrupted
            raise
        event: dict[str, Any] = json.loads(line)
        self._idle = event["event"] != "started"
        if event["event"] == "fatal":
            self.drop()
            if event["stop"]:
                raise Stop(event["error"])
            raise _Died(Fault.CRASH, event["error"])
        return event

    def _line(self) -> bytes | None:
        """The next line from the worker, None when there is none within ``_POLL_S``.

        Raises:
            EOFError: there will be no more.
        """
        assert self._link is not None
        ended = self._has_ended()  # before reading: what it wrote last is then there
        self._link.settimeout(_POLL_S)
        while b"\n" not in self._received:
            try:
                more = self._link.recv(1 << 16)
            except TimeoutError:
                if ended:
                    raise EOFError from None
                return None
            except OSError:
                raise EOFError from None
            if not more:
                raise EOFError
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _has_ended(self) -> bool:
        """Whether the worker is a zombie; it stays one, so that its number stays its own."""
        assert self._popen is not None
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._popen.pid, options) is not None

    def _gone(self, fault: Fault, reason: str) -> _Died:
        """End what is left of the worker, and say what it died of."""
        assert self._popen is not None
        popen = self._popen
        self.drop()
        said = reason or f"the worker {how_it_ended(popen.returncode)}"
        words = last_words(self._log)
        return _Died(fault, f"{said}; log {self._log.name}: {words}" if words else said)

    def _end(self, grace: float) -> None:
        """``end`` for a worker that waits, SIGTERM for one that works, SIGKILL for all the rest.

        Args:
            grace: seconds to end by itself; 0 for SIGKILL at once.
        """
        if self._popen is None:
            return
        popen, link = self._popen, self._link
        try:
            if grace > 0 and not self._has_ended():
                with contextlib.suppress(OSError):  # it has died by now
                    if self._idle and link is not None:
                        link.sendall(b'{"do": "end"}\n')
                    else:
                        os.killpg(popen.pid, signal.SIGTERM)
                until = time.monotonic() + grace
                while not self._has_ended() and time.monotonic() < until:
                    time.sleep(0.01)
        finally:
            # Its whole session, while the dead leader's number cannot be anybody else's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
            try:
                popen.wait(_REAP_S)
            except subprocess.TimeoutExpired:
                self._stuck = f"process {popen.pid} outlives SIGKILL: it hangs in the GPU's driver"
            self._popen, self._link, self._group = None, None, ""
            if link is not None:
                link.close()
