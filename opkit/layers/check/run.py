"""Start a check in a process of its own, under the interpreter that has the framework.

A crash of CUDA, a hang or a full disk in there costs a sentence here. The process has a session of
its own; whatever happens, it and all that it started are ended: SIGINT, SIGTERM, SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import IO

from opkit.errors import EXIT_INTERRUPTED, BadInput, OpkitError, RunFailed, ToolMissing, WrongUsage
from opkit.layers.check.asked import CheckPlan
from opkit.layers.check.result import CheckResult, read_check_result
from opkit.layers.interpreter import module_command

SAYS = "opkit check: "  # what the child wants shown begins so
POLITE_S, FIRM_S, REAP_S = 20.0, 5.0, 10.0  # after SIGINT, SIGTERM, SIGKILL
TAIL_LINES = 12
# The configuration that an op is checked with when none is given: opkit/layers/models/NAME.json.
MODELS = {
    "dsa": "deepseek-v32",
    "mla": "deepseek-v3",
    "gqa": "qwen3",
    "moe": "mixtral",
    "gemm": "qwen3",
}
OTHER_MODEL = "qwen3"
# Where no serving flags are given. vLLM: graphs of decode steps, without compiling the model, which
# a mock of one layer has no use for.
SERVE_ARGS = {
    "vllm": (
        "--max-model-len", "8192",
        "--compilation-config", '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}',
    ),
}  # fmt: skip
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Checked:
    """What came of a run.

    Attributes:
        result: what was found, all of it or up to where the process ended.
        failure: why it ended early; None when it did not.
        folder: plan, log and result.
    """

    result: CheckResult
    failure: OpkitError | None
    folder: Path


def prepare(plan: CheckPlan, folder: Path) -> CheckPlan:
    """Make the run's folder; give the plan a model, flags and a place for its result.

    Args:
        plan: its ``model`` may be empty for the bundled configuration of the op.
        folder: of the run, made here.

    Raises:
        BadInput: the folder cannot be made, or the model's has no ``config.json``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(plan.model) if plan.model else _bundled(plan.op, folder / "model")
    except OSError as error:
        raise BadInput(f"{folder}: the output folder cannot be used ({error})") from error
    if not (model / "config.json").is_file():
        raise BadInput(
            f"{model}: no config.json in it", "--model takes the folder of a model's configuration"
        )
    return replace(
        plan,
        model=str(model.absolute()),
        captured=str(Path(plan.captured).absolute()) if plan.captured else "",
        engine_args=plan.engine_args or SERVE_ARGS.get(plan.backend, ()),
        result=str((folder / "result.json").absolute()),
    )


def _bundled(op: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    name = f"{MODELS.get(op, OTHER_MODEL)}.json"
    source = resources.files("opkit.layers").joinpath("models", name)
    (folder / "config.json").write_text(source.read_text("utf-8"))
    return folder


def require_capture(inputs: str, captured: Path | None) -> None:
    """Refuse captured inputs without their folder, and the folder without them.

    Raises:
        WrongUsage: one is there without the other.
    """
    if (inputs == "captured") != (captured is not None):
        raise WrongUsage(
            "--inputs captured and --captured FOLDER go together",
            "`opkit align --inputs captured` makes the folder, from a run of the engine",
        )


def split_args(text: str) -> tuple[str, ...]:
    """The words of ``--serve-args``.

    Raises:
        WrongUsage: a quotation mark is left open.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise WrongUsage(f"--serve-args {text!r}: {error}") from error


def run_check(
    plan: CheckPlan, folder: Path, python: str, limit_s: float, progress: Progress
) -> Checked:
    """Run the child to its end, or end it.

    Args:
        plan: made ready by :func:`prepare`.
        folder: of the run.
        python: the interpreter that has the framework.
        limit_s: seconds that it may take in all.
        progress: is given what the child says.

    Raises:
        OpkitError: nothing could be checked: the child's own sentence and exit code.
        KeyboardInterrupt: after the child has been ended.
    """
    program = shutil.which(python)
    if program is None:
        raise ToolMissing(f"{python}: no such interpreter", "name one with --python")
    plan.write(folder / "plan.json")
    result = Path(plan.result)
    result.unlink(missing_ok=True)
    command = [*module_command(program, "opkit.layers.check"), str(folder / "plan.json")]
    log = folder / "check.log"
    with log.open("w") as file:
        child = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        said: list[str] = []
        listener = threading.Thread(target=_listen, args=(child.stderr, file, said, progress))
        listener.start()
        late = False
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(child)
            listener.join(REAP_S)
    failure = _failure(child.returncode, said, log, limit_s if late else None)
    if failure is None:
        return Checked(read_check_result(result), None, folder)
    if not result.is_file():
        raise failure
    return Checked(read_check_result(result), failure, folder)


def _listen(stream: IO[str], log: IO[str], said: list[str], progress: Progress) -> None:
    """Keep what the child writes; pass on what it says."""
    with stream:
        for line in stream:
            log.write(line)
            log.flush()
            if line.startswith(SAYS):
                said[:] = [line.removeprefix(SAYS).rstrip()]
                progress(said[0])
            elif line.startswith("  ") and said:
                said.append(line.strip())


def _end(child: subprocess.Popen[str]) -> None:
    """End the child, politely first, and then whatever is left of its session's group."""
    for number, seconds in ((signal.SIGINT, POLITE_S), (signal.SIGTERM, FIRM_S)):
        if child.poll() is not None:
            break
        _signal(child, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
    _signal(child, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # hangs in the kernel: nothing helps
        child.wait(REAP_S)


def _signal(child: subprocess.Popen[str], number: signal.Signals) -> None:
    # The group outlives its leader while any member lives, and its number is not given away.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _failure(
    code: int | None, said: list[str], log: Path, limit_s: float | None
) -> OpkitError | None:
    """Why the child ended early; None when it did not."""
    if code == 0:
        return None
    where = f"the log is {log}"
    if limit_s is not None:
        last = f" while it said: {said[0]}" if said else ""
        return RunFailed(f"the check was not finished after {limit_s:g} s{last}", where)
    if code is not None and 1 < code < EXIT_INTERRUPTED and said:
        return OpkitError(said[0], code, "\n".join([*said[1:], where]))
    how = f"ended with code {code}"
    if code is not None and code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    lines = [line for line in re.split(r"[\r\n]+", log.read_text()) if line.strip()]
    return RunFailed(
        f"the process of the check {how}",
        "\n".join([f"last lines of {log}:", *lines[-TAIL_LINES:]]),
    )
