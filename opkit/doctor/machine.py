"""The machine as the doctor sees it. Everything asked of it goes through here, so tests make one.

Nothing here raises for what is not there: a missing file is None, a failed program an answer that
says so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opkit.nsys_parsers.tool import Nsys, find_nsys

ASK_LIMIT_S = 10.0  # for programs that answer at once
REAP_S = 5.0  # for a killed program to be gone
MARK = "OPKIT_DOCTOR_MARK"  # a variable that programs carry, so that all of them can be ended


@dataclass(frozen=True)
class Ran:
    """What came of a program.

    Attributes:
        code: exit code; None when it was not started, or ended for taking too long.
        out, err: what it said.
        seconds: how long it took.
        problem: why there is no exit code, in words.
    """

    code: int | None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    problem: str = ""

    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.code == 0

    def why(self) -> str:
        """In a line, why it did not end with 0: its last words."""
        if self.problem:
            return self.problem
        said = [line.strip() for line in (self.out + "\n" + self.err).splitlines() if line.strip()]
        return f"exit code {self.code}: {said[-1][:200] if said else 'no message'}"


Runner = Callable[[Sequence[str], float, Mapping[str, str]], Ran]


def run_program(argv: Sequence[str], limit_s: float, env: Mapping[str, str]) -> Ran:
    """Run a program in a session of its own; after ``limit_s`` seconds all of it is killed.

    Args:
        argv: the program and its words.
        limit_s: seconds that it may take.
        env: variables beside those of this process.
    """
    began = time.monotonic()
    try:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", env={**os.environ, **env}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Ran(None, problem=f"{argv[0]} cannot be started ({error.strerror or error})")
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        out, err = _end(child)
        return Ran(None, out, err, time.monotonic() - began, f"took over {limit_s:g} s")
    except BaseException:
        _end(child)
        raise
    return Ran(child.returncode, out, err, time.monotonic() - began)


def _end(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill a program and its process group; what it had said."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        return child.communicate(timeout=REAP_S)
    except subprocess.TimeoutExpired:  # something that it started holds its pipes
        return "", ""


def end_marked(mark: str) -> None:
    """Kill every process that carries ``mark`` in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or not ours
            if mark.encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def soft_limits() -> dict[str, int]:
    """The soft limits of this process: open files, and locked memory in bytes; -1: unlimited."""
    names = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK}
    found = {name: resource.getrlimit(number)[0] for name, number in names.items()}
    return {name: -1 if value == resource.RLIM_INFINITY else value for name, value in found.items()}


@dataclass(frozen=True)
class Machine:
    """The machine, or what a test puts in its place.

    Attributes:
        root: where ``/proc``, ``/sys`` and ``/dev`` are looked for.
        environ: environment variables.
        run: runs a program.
        nvml: the module ``pynvml``; None: imported when it is asked.
        which: where a program is; None when it is not on PATH.
        find_nsys: as :func:`opkit.nsys_parsers.tool.find_nsys`.
        usage: ``shutil.disk_usage``: total, used and free bytes of the file system of a folder.
        limits: soft limits by name (``nofile``, ``memlock``), -1 for unlimited.
        uid: effective user id.
        home: the user's home folder.
        python: the interpreter that runs opkit.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    run: Runner = run_program
    nvml: Any = None
    which: Callable[[str], str | None] = shutil.which
    find_nsys: Callable[[], Nsys] = find_nsys
    usage: Callable[[Path], Any] = shutil.disk_usage
    limits: Callable[[], Mapping[str, int]] = soft_limits
    uid: int = field(default_factory=os.geteuid)
    home: Path = field(default_factory=Path.home)
    python: str = sys.executable

    def read(self, path: str) -> str | None:
        """The text of a file of the kernel, as ``/proc/self/status``; None when it is not there
        or not to be read."""
        try:
            return (self.root / path.lstrip("/")).read_text("utf-8", "replace")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether a file of the kernel is there."""
        return (self.root / path.lstrip("/")).exists()

    def ask(self, *argv: str, limit_s: float = ASK_LIMIT_S) -> Ran:
        """Run a program that only answers."""
        return self.run(argv, limit_s, {})
