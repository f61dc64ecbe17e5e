"""``aiconfigurator cli estimate``, run in the user's own environment, and what it prints.

It is never imported: it may live in another environment, with another Python.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit.errors import BadInput, RunFailed, ToolMissing

VARIABLE = "OPKIT_AICONFIGURATOR"
PROGRAM = "aiconfigurator"
LIMIT_S = 600.0  # an estimate takes 3 to 8 s
HALF_UNIT_MS = 0.0005  # milliseconds are printed with three decimals
_ANSWER = "opkit-answer "
_LOCATE = f"""
import importlib.metadata, importlib.util, json, pathlib
found = {{}}
for name in ("aiconfigurator", "aisimulate"):
    try:
        found.setdefault("version", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
for name in ("aiconfigurator_core", "aiconfigurator"):
    spec = importlib.util.find_spec(name)
    systems = pathlib.Path(spec.origin).parent / "systems" if spec and spec.origin else None
    if systems is not None and systems.is_dir():
        found.setdefault("systems", str(systems))
print({_ANSWER!r} + json.dumps(found))
"""
_PHASE = re.compile(r"(Context|Generation|Encoder) phase \(")
_ENTRY = re.compile(r"  (\S.*?) +(\d+\.\d+) ms\b")
_BACKEND = re.compile(r"^  Backend: +(\S+) \(([^)]*)\)", re.MULTILINE)


@dataclass(frozen=True)
class Aiconfigurator:
    """An installed aiconfigurator.

    Attributes:
        python: the interpreter that has it.
        version: its version.
        systems: its ``systems`` folder.
    """

    python: str
    version: str
    systems: Path


@dataclass(frozen=True)
class Estimate:
    """What one estimate says.

    Attributes:
        version: of the backend's tables that it used.
        entries: milliseconds of each operation, by name, as ``context_attention``.
    """

    version: str
    entries: dict[str, float]


def find_aiconfigurator(given: str = "") -> Aiconfigurator:
    """Find it: ``given``, else the environment's ``OPKIT_AICONFIGURATOR``, else on PATH.

    Args:
        given: an interpreter that has it, or its own program.

    Raises:
        ToolMissing: it is not there, or cannot be run.
    """
    named = given or os.environ.get(VARIABLE, "") or PROGRAM
    path = shutil.which(named)
    if path is None:
        raise ToolMissing(
            f"{named} was not found",
            f"pip install aiconfigurator==0.12.0, or name an interpreter that has it: "
            f"--aiconfigurator, or {VARIABLE}",
        )
    python = path if Path(path).name.startswith("python") else _interpreter(Path(path))
    done = _run([python, "-c", _LOCATE], path)
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    found = json.loads(answers[-1].removeprefix(_ANSWER)) if answers else {}
    if "version" not in found or "systems" not in found:
        raise ToolMissing(f"{python}: has no aiconfigurator", "pip install aiconfigurator==0.12.0")
    return Aiconfigurator(python, found["version"], Path(found["systems"]))


def _interpreter(program: Path) -> str:
    """The interpreter that a Python program names in its first line, or that lies beside it."""
    try:
        first = program.open("rb").readline().decode("utf-8", "replace")
    except OSError as error:
        raise ToolMissing(f"{program}: cannot be read ({error.strerror})") from error
    words = shlex.split(first.removeprefix("#!")) if first.startswith("#!") else []
    if words and Path(words[0]).name == "env":
        words = words[1:]
    named = shutil.which(words[0]) if words and "python" in Path(words[0]).name else None
    beside = shutil.which("python", path=str(program.resolve().parent))
    if not (named or beside):
        raise ToolMissing(f"{program}: names no Python interpreter", "name the interpreter instead")
    return str(named or beside)


def command_of(arguments: Sequence[str]) -> list[str]:
    """The command as a user would type it."""
    return [PROGRAM, "cli", "estimate", *arguments]


def estimate(found: Aiconfigurator, arguments: Sequence[str]) -> Estimate:
    """Run one estimate.

    Args:
        found: the aiconfigurator.
        arguments: of ``aiconfigurator cli estimate``, with ``--detail all``.

    Raises:
        RunFailed: it failed, or prints no operations.
    """
    code = "import sys; from aiconfigurator.main import main; main(sys.argv[1:])"
    done = _run([found.python, "-c", code, "cli", "estimate", *arguments], PROGRAM)
    try:
        return read_estimate(done.stdout)
    except BadInput as error:
        told = (done.stdout + "\n" + done.stderr).splitlines()
        wrong = [line for line in told if re.search(r"\b[Ee]rror\b", line)]
        last = next((line.strip() for line in [*reversed(wrong), *reversed(told)] if line), "")
        raise RunFailed(
            f"`{shlex.join(command_of(arguments))}` gives no estimate (exit code "
            f"{done.returncode}): {last}"
        ) from error


def read_estimate(text: str) -> Estimate:
    """Read what ``--detail all`` prints.

    Raises:
        BadInput: it holds no operation, or does not say which version it used.
    """
    backend = _BACKEND.search(text)
    entries: dict[str, float] = {}
    within = False
    for line in text.splitlines():
        if _PHASE.match(line):
            within = True
        elif not line.strip():
            within = False
        elif within and (entry := _ENTRY.match(line)):
            entries[entry[1]] = float(entry[2])
    if backend is None or not entries:
        raise BadInput("not the output of `aiconfigurator cli estimate --detail all`")
    return Estimate(backend[2], entries)


def _run(command: list[str], shown: str) -> subprocess.CompletedProcess[str]:
    # A folder called aiconfigurator where the user stands must not be imported in its place.
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=env,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"{shown} did not end within {LIMIT_S:.0f} s") from error
    except OSError as error:
        raise ToolMissing(f"{shown}: cannot be run ({error.strerror or error})") from error
