"""An engine in a process of its own, under its own interpreter: started, asked, timed out, ended.

opkit stays free of frameworks, and a crash or hang of the engine costs a sentence. The process
leads a session, so that Ctrl-C reaches opkit alone and everything that the engine starts can be
ended together.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from opkit.bench.backends.backend import Reply, Served, Turn
from opkit.errors import RunFailed, ToolMissing
from opkit.post_mortem import how_it_ended, last_words, points_elsewhere, root_cause

WORKER = Path(__file__).parents[1] / "inside" / "worker.py"
_POLL_S = 0.2  # between looks at whether the process lives
# What vLLM raises when its engine's process is gone, while this one lives on (0.24.0,
# v1/engine/core_client.py): every further run would fail alike.
_ENGINE_GONE = "EngineDeadError"
_END_S = 20.0  # after being told to end: vLLM's processes take some seconds
_TERMINATED_S = 5.0  # after SIGTERM
_KILLED_S = 1.0  # after SIGKILL: only for the kernel to clear away


class Child:
    """An engine of one backend in a child process.

    Args:
        backend: ``vllm`` or ``trtllm``.
        python: the interpreter that has it.
        options: for the worker: ``model`` or ``engine_dir``, ``engine_args``, limits.
        log: where everything goes that the engine prints.
        env: variables to add.
        start_limit_s, limit_s: seconds for loading, and for one ``generate``.
        patience_s: seconds to end in, after SIGTERM.
        worker: the script, for tests.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        backend: str,
        python: str,
        options: Mapping[str, Any],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        start_limit_s: float = 1800.0,
        limit_s: float = 300.0,
        patience_s: float = _TERMINATED_S,
        worker: Path = WORKER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._python = python
        self._options = dict(options)
        self._log = log
        self._env = dict(env or {})
        self._limits = (start_limit_s, limit_s)
        self._patience_s = patience_s
        self._worker = worker
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: IO[bytes] | None = None
        self._rest = b""
        self._busy = False  # whether a command waits for its answer
        self._gone = False  # whether the engine has died inside a process that lives
        self._log_from = 0  # bytes in the log that are of engines before this one

    def start(self) -> Served:
        """Start the process and load the engine.

        Raises:
            ToolMissing: no such interpreter, or it lacks the framework.
            RunFailed: the engine cannot be loaded, died, or took too long.
        """
        self._spawn()
        command = {"do": "start", "backend": self._backend, "options": self._options}
        told = self._ask(command, self._limits[0], f"{self._backend}: loading the model")
        return Served(**told["served"])

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Turn:
        """One repetition. See :class:`~opkit.bench.backends.backend.Backend`."""
        command = {"do": "generate", "prompts": [list(p) for p in prompts], "output": output}
        told = self._ask(command, self._limits[1], f"{self._backend}: a run")["turn"]
        replies = tuple(_reply(each) for each in told["replies"])
        for reply in replies:
            if reply.tokens != output:
                raise RunFailed(
                    f"{self._backend}: {reply.tokens} output tokens came back instead of {output}"
                )
        return Turn(told["began_ns"], told["ended_ns"], replies)

    def alive(self) -> bool:
        """Whether the process still answers."""
        return not self._gone and self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End the process and all that it started: told, then terminated, then killed.

        In the middle of a command it would not listen, and is terminated at once.
        """
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.poll() is None and not self._busy:
                _tell(process, {"do": "end"})
                _wait(process, _END_S)
        finally:
            # Also when it has ended: its workers may live on in its group.
            try:
                if _signal_group(process.pid, signal.SIGTERM):
                    _wait(process, self._patience_s)
                    _wait_group(process.pid, self._patience_s, self._clock)
            finally:  # also when a second Ctrl-C cuts the waiting short
                if _signal_group(process.pid, signal.SIGKILL):
                    _wait(process, _KILLED_S)
                    _wait_group(process.pid, _KILLED_S, self._clock)
                self._release(process)

    def _release(self, process: subprocess.Popen[bytes]) -> None:
        """Close the pipes of a process that has ended, and let the kernel forget it."""
        if self._answers is not None:
            self._answers.close()
        if process.stdin is not None:
            _quietly(process.stdin.close)
        process.wait()

    def _spawn(self) -> None:
        try:
            log = self._log.open("ab")
        except OSError as error:
            raise RunFailed(f"{self._log}: cannot be written ({error.strerror})") from error
        read, write = os.pipe()
        try:
            with log:
                self._log_from = log.tell()
                self._process = subprocess.Popen(
                    [self._python, str(self._worker), str(write)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write,),
                    start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **self._env},
                )
        except OSError as error:
            os.close(read)
            raise ToolMissing(
                f"{self._python}: cannot be started ({error.strerror})",
                f"--python names the interpreter that has {self._backend}",
            ) from error
        finally:
            os.close(write)
        self._answers = os.fdopen(read, "rb", buffering=0)

    def _ask(self, command: Mapping[str, Any], limit_s: float, what: str) -> dict[str, Any]:
        process = self._process
        if process is None:
            raise RunFailed(f"{what}: the engine is not running")
        if not _tell(process, command):
            raise RunFailed(self._died(what))
        self._busy = True
        told: dict[str, Any] = json.loads(self._line(process, limit_s, what))
        self._busy = False
        if "error" in told:
            missing = told.get("kind") in ("ModuleNotFoundError", "ImportError")
            if missing and command["do"] == "start":
                raise ToolMissing(
                    f"{self._python} cannot import {self._backend} ({told['error']})",
                    f"--python names the interpreter that has it; all of it: {self._log}",
                )
            self._gone = told.get("kind") == _ENGINE_GONE
            error = str(told["error"])
            if points_elsewhere(error):
                error = root_cause(self._log, self._log_from) or error
            raise RunFailed(f"{what} failed: {error}", f"all of it: {self._log}")
        return told

    def _line(self, process: subprocess.Popen[bytes], limit_s: float, what: str) -> bytes:
        """The next answer; waits for it, for the process's death, or for the limit."""
        assert self._answers is not None
        end = self._clock() + limit_s
        while b"\n" not in self._rest:
            # Looked at before reading: what it wrote before it died is still in the pipe.
            dead = process.poll() is not None
            ready, _, _ = select.select([self._answers], [], [], 0 if dead else _POLL_S)
            piece = self._answers.read(1 << 16) if ready else b""
            self._rest += piece or b""
            if dead and not piece:
                raise RunFailed(self._died(what), f"all of it: {self._log}")
            if self._clock() > end:
                self.close()
                raise RunFailed(
                    f"{what} took longer than {limit_s:.0f} s and was ended",
                    f"--start-limit and --limit set these seconds; its log: {self._log}",
                )
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _died(self, what: str) -> str:
        code = self._process.wait() if self._process is not None else None
        # Killed by a signal, what it raised before is not why.
        cause = "" if code and code < 0 else root_cause(self._log, self._log_from)
        said = cause or last_words(self._log, self._log_from)
        return f"{what}: the process {how_it_ended(code)}" + (f" ({said})" if said else "")


def _reply(told: Mapping[str, Any]) -> Reply:
    gaps = tuple((int(ns), int(count)) for ns, count in told.get("gaps", ()))
    return Reply(
        first_ns=told.get("first_ns"),
        last_ns=told.get("last_ns"),
        tokens=int(told["tokens"]),
        first_tokens=int(told.get("first_tokens", 1)),
        gaps=gaps,
        cached=told.get("cached"),
    )


def _tell(process: subprocess.Popen[bytes], command: Mapping[str, Any]) -> bool:
    """Send one command; False when nobody listens any more."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(command, default=str).encode() + b"\n")
        process.stdin.flush()
    except (BrokenPipeError, ValueError):  # ValueError: closed before
        return False
    return True


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _signal_group(group: int, number: int) -> bool:
    """Whether there was anyone in the process group to signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # PermissionError: only zombies, on some kernels
        return False
    return True


def _wait_group(group: int, seconds: float, clock: Callable[[], float]) -> None:
    end = clock() + seconds
    while _signal_group(group, 0) and clock() < end:
        time.sleep(_POLL_S / 4)


def _quietly(close: Callable[[], None]) -> None:
    try:
        close()
    except BrokenPipeError:
        return
