"""One launch under nsys: its processes, its log, and its end.

nsys gives the profiled program a session and a process group of its own, and keeps an agent outside
both (measured with nsys 2024.2.3), so a process group is not enough to end all that was started.
Each launch carries a random cookie in its environment, which children inherit; every process that
carries it, descends from one that does, or lives in a session of one, is this launch's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self
from uuid import uuid4

from opkit.align.profile.plan import Command
from opkit.errors import RunFailed, ToolMissing
from opkit.post_mortem import points_elsewhere, root_cause

COOKIE = "OPKIT_LAUNCH"
LOG_TAIL_LINES = 20
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_POLL_S = 0.1
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Grace:
    """Seconds allowed at each stage of ending a launch."""

    interrupt_s: float = 30.0  # after SIGINT: an engine frees its GPU and its workers
    terminate_s: float = 10.0  # after SIGTERM
    shutdown_s: float = 10.0  # nsys shutdown
    kill_s: float = 5.0  # after SIGKILL


@dataclass(frozen=True)
class Process:
    """One process of ``/proc``. ``started`` (clock ticks since boot) tells apart uses of a pid."""

    pid: int
    parent: int
    session: int
    started: int
    name: str

    @property
    def profiler(self) -> bool:
        """Whether it belongs to nsys or to MPI's launcher rather than to the program."""
        return self.name.startswith(("nsys", "mpirun", "mpiexec", "prterun", "prted", "orted"))


def _processes() -> list[Process]:
    """All living processes; zombies (state Z) have ended already."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text(errors="replace")
        except OSError:  # ended between listing and reading
            continue
        name = text[text.index("(") + 1 : text.rindex(")")]
        rest = text[text.rindex(")") + 2 :].split()  # fields 3 on of proc(5)
        if rest[0] not in "ZX":
            found.append(Process(int(folder.name), int(rest[1]), int(rest[3]), int(rest[19]), name))
    return found


def _carries(pid: int, cookie: bytes) -> bool:
    try:
        return cookie in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended, or another user's: then not ours
        return False


class Launch:
    """A command in its own process group, with all that it started. Made by :func:`launched`."""

    def __init__(
        self, command: Command, log: Path, nsys: Path | None, sessions: Sequence[str]
    ) -> None:
        self.command = command
        self.log = log
        self.forced: list[str] = []  # what had to be killed, for the manifest's notes
        self._nsys = nsys
        self._sessions = tuple(sessions)
        self._cookie = uuid4().hex
        self._known: dict[int, Process] = {}
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it.

        Raises:
            ToolMissing: the program is not there.
            RunFailed: the log cannot be written or the program cannot be started.
        """
        try:
            with self.log.open("wb") as log:
                self._popen = subprocess.Popen(
                    self.command.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(self.command),
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise ToolMissing(f"{self.command.argv[0]} is not there ({error})") from error
        except OSError as error:
            raise RunFailed(f"{self.command.argv[0]} could not be started ({error})") from error
        return self

    def _environment(self, command: Command) -> dict[str, str]:
        # setproctitle (vLLM uses it) would overwrite the cookie with the title unless told not to.
        return {"SPT_NOENV": "1", **os.environ, **command.env, COOKIE: self._cookie}

    def run(self, command: Command, limit_s: float) -> None:
        """Run a short command of the same session to its end.

        Raises:
            RunFailed: it failed or took longer than ``limit_s`` seconds.
        """
        try:
            done = subprocess.run(
                command.argv,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                check=False,
                env=self._environment(command),  # `nsys start` leaves an agent behind: it is ours
                start_new_session=True,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self.failure(f"{command.purpose}: {error}") from error
        if done.returncode != 0:
            said = re.split(r"[\r\n]+", (done.stdout + done.stderr).strip())[-1]
            raise self.failure(
                f"{command.purpose}: {' '.join(command.argv[:2])} ended with code "
                f"{done.returncode}: {said or 'no message'}"
            )

    def members(self) -> list[Process]:
        """The launch's living processes."""
        cookie = f"{COOKIE}={self._cookie}".encode()
        living = {process.pid: process for process in _processes()}
        known = {
            pid: old
            for pid, old in self._known.items()
            if pid in living and living[pid].started == old.started
        }
        mine = {
            pid
            for pid, process in living.items()
            if pid in known or self._leads(process.session, living) or _carries(pid, cookie)
        }
        while more := {p.pid for p in living.values() if p.parent in mine} - mine:
            mine |= more
        found = [living[pid] for pid in sorted(mine)]
        # Ended leaders stay known: their sessions may outlive them.
        self._known.update({process.pid: process for process in found})
        return found

    def _leads(self, session: int, living: dict[int, Process]) -> bool:
        """Whether a process of this launch opened the session (its pid may be reused by now)."""
        leader = self._known.get(session)
        now = living.get(session)
        return leader is not None and (now is None or now.started == leader.started)

    def program(self) -> list[Process]:
        """The living processes that are not the profiler's own."""
        # With a session the launched command is nsys or what starts it, else the program itself.
        root = self._popen.pid if self._popen is not None and self._sessions else -1
        return [p for p in self.members() if not p.profiler and p.pid != root]

    def ended(self) -> int | None:
        """The launched command's exit code, None while it runs, 128 + n when signal n ended it."""
        assert self._popen is not None, "start() comes first"
        code = self._popen.poll()
        return code if code is None or code >= 0 else 128 - code

    def tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of its log."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 64 * 1024))
            text = _COLOUR.sub("", file.read().decode(errors="replace"))
        kept = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        return "\n".join(kept[-lines:])

    def failure(self, message: str, advice: str = "") -> RunFailed:
        """A :class:`RunFailed` that names the cause and shows the end of the log, after ``advice``.

        The cause is the log's, where the command has ended or ``message`` says that it is there.
        """
        tail = self.tail()
        if self.ended() is not None or points_elsewhere(message):
            cause = root_cause(self.log)
            message += f": {cause}" if cause and cause not in message else ""
        log = f"last lines of {self.log}:\n{tail}" if tail else f"{self.log} is empty"
        return RunFailed(message, f"{advice}\n{log}" if advice else log)

    def wait(self, limit_s: float) -> int:
        """Wait for the launched command's own end and return its exit code.

        Raises:
            RunFailed: it still runs after ``limit_s``.
        """
        until = time.monotonic() + limit_s
        while (code := self.ended()) is None:
            if time.monotonic() > until:
                raise self.failure(f"{self.command.purpose}: not finished after {limit_s:.0f} s")
            time.sleep(_POLL_S)
        return code

    def end(self, graceful: bool, grace: Grace, progress: Progress) -> None:
        """End all that was started: SIGINT, SIGTERM, ``nsys shutdown``, SIGKILL as the last resort.

        Args:
            graceful: False after a failure or Ctrl-C: nsys is told first, so that it drops a
                collection instead of converting it.
        """
        if not graceful:
            self._shutdown_sessions(grace)
        for sent, seconds in (
            (signal.SIGINT, grace.interrupt_s),
            (signal.SIGTERM, grace.terminate_s),
        ):
            self._send(sent, self.program())
            if self._gone(self.program, seconds):
                break
        # The program has ended; nsys ends by itself once it has written what it holds.
        if not self._gone(self.members, grace.terminate_s):
            self._shutdown_sessions(grace)
        if not self._gone(self.members, 1.0):
            left = self.members()
            names = ", ".join(f"{p.name} ({p.pid})" for p in left)
            self.forced.append(f"ended with SIGKILL, as they ignored SIGINT and SIGTERM: {names}")
            progress(self.forced[-1])
            self._send(signal.SIGKILL, left)
            self._gone(self.members, grace.kill_s)
        if self._popen is not None and self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait(grace.kill_s)

    def _send(self, number: signal.Signals, to: Sequence[Process]) -> None:
        for process in to:
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:  # ended in between: as wanted
                continue

    def _gone(self, which: Callable[[], list[Process]], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while which():
            if time.monotonic() > until:
                return False
            if self._popen is not None:
                self._popen.poll()  # reaps it
            time.sleep(_POLL_S)
        return True

    def _shutdown_sessions(self, grace: Grace) -> None:
        """``nsys shutdown`` for the sessions that still have an nsys process."""
        if self._nsys is None or not any(p.name.startswith("nsys") for p in self.members()):
            return
        for session in self._sessions:
            try:
                subprocess.run(
                    [self._nsys, "shutdown", f"--session={session}"], capture_output=True,
                    timeout=grace.shutdown_s, check=False, start_new_session=True,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                self.forced.append(f"nsys shutdown --session={session} failed ({error})")


@contextmanager
def launched(
    command: Command,
    log: Path,
    nsys: Path | None,
    sessions: Sequence[str],
    progress: Progress,
    grace: Grace | None = None,
) -> Iterator[Launch]:
    """Start ``command``; when the block is left, however it is left, nothing it started still runs.

    Args:
        log: file for its standard output and error.
        nsys: the nsys program and ``sessions`` its sessions to shut down.

    Raises:
        KeyboardInterrupt: Ctrl-C, also while the launch is being ended, and SIGTERM and SIGHUP,
            which would otherwise end opkit at once and leave the server running.
        ToolMissing, RunFailed: see :meth:`Launch.start`.
    """
    launch = Launch(command, log, nsys, sessions)
    seconds = grace if grace is not None else Grace()
    # SIGINT too: a shell's background job ignores it, and so would all that is started here.
    with _signals(_interrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        graceful = False
        impatient: list[str] = []
        try:
            yield launch.start()
            graceful = True
        finally:

            def patience(number: int, _frame: FrameType | None) -> None:
                impatient.append(signal.Signals(number).name)
                progress(f"{impatient[-1]}: ending what was started, please wait")

            with _signals(patience, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                launch.end(graceful, seconds, progress)
        if impatient:
            raise KeyboardInterrupt(impatient[0])


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def _signals(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    """Handle the signals with ``handler`` inside the block (Python: in the main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Whoever ignores SIGHUP means it (nohup).
    mine = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in mine}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
