"""Which mocks can run on this machine, and why the others cannot. Imports no framework."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from opkit.errors import ToolMissing
from opkit.layers.op import Op
from opkit.layers.registry import BACKENDS, INSTALL, OPS, missing_mock, mock_backends

# NVIDIA's driver on Linux, and on Windows' Linux: without them NVML need not be asked.
_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
PROBE_LIMIT_S = 60.0  # to ask another interpreter
# backend → its package, imported and installed under the same name
PACKAGES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt_llm", "torch": "torch"}
# The version that a backend was written against and run with; the torch backend asks for none.
WRITTEN_AGAINST = {"vllm": "0.24.0", "sglang": "0.5.14"}
NEVER_RUN = {"trtllm": "written against the sources of TensorRT-LLM 1.2 and later, never run"}
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
found = {}
for name in sys.argv[1:]:
    if u.find_spec(name) is not None:
        try:
            found[name] = m.version(name)
        except m.PackageNotFoundError:
            found[name] = ""
print(json.dumps(found))
"""


class State(StrEnum):
    """Whether a mock can be built here."""

    READY = "ready"
    DOUBTFUL = "doubtful"  # it can be tried: another version, or never run anywhere
    NOT_HERE = "not here"
    NONE = "none"  # opkit has no such mock


@dataclass(frozen=True)
class Availability:
    """One op on one backend.

    Attributes:
        op, backend: which.
        phases: those that its mock runs.
        state: whether it can be built here.
        version: of the framework here; empty when unknown or not there.
        written_against: the version that the mock was written against, when there is one.
        reason: why it is not ready; empty when it is.
        fix: what would make it so.
    """

    op: str
    backend: str
    phases: tuple[str, ...]
    state: State
    version: str = ""
    written_against: str = ""
    reason: str = ""
    fix: str = ""


def frameworks(python: str = sys.executable) -> dict[str, str]:
    """The backends whose framework an interpreter can import, with its version ("" if unknown).

    Raises:
        ToolMissing: the interpreter cannot be run.
    """
    if python == sys.executable:
        found = {
            name: _version(name) for name in PACKAGES.values() if importlib.util.find_spec(name)
        }
    else:
        found = _ask(python)
    return {backend: found[name] for backend, name in PACKAGES.items() if name in found}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _ask(python: str) -> dict[str, str]:
    command = [python, "-P", "-c", _PROBE, *PACKAGES.values()]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=True
        )
        return dict(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ToolMissing(
            f"{python}: cannot be asked for its packages ({error})",
            "--python takes an interpreter of Python 3.11 or newer",
        ) from error


def gpu_name() -> str:
    """The first GPU's name, by NVML; empty when there is none."""
    if not any(Path(device).exists() for device in _DEVICES):
        return ""
    pynvml = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
        if not pynvml.nvmlDeviceGetCount():
            return ""
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return ""
    return name.decode() if isinstance(name, bytes) else str(name)


def default_backend(op: Op, installed: Mapping[str, str]) -> str:
    """The first serving engine that is installed and has a mock of the op, else torch."""
    known = mock_backends(op)
    engines = [name for name in ("vllm", "sglang", "trtllm") if name in installed]
    return next((name for name in engines if name in known), "torch")


def availabilities(installed: Mapping[str, str], gpu: str) -> list[Availability]:
    """Every op on every backend.

    Args:
        installed: see :func:`frameworks`.
        gpu: see :func:`gpu_name`.
    """
    return [
        _availability(op, backend, installed, gpu) for op in OPS.values() for backend in BACKENDS
    ]


def _availability(op: Op, backend: str, installed: Mapping[str, str], gpu: str) -> Availability:
    phases = tuple(str(phase) for phase in op.phases)
    against = WRITTEN_AGAINST.get(backend, "")
    if backend not in mock_backends(op):
        return Availability(op.name, backend, (), State.NONE, reason=missing_mock(op, backend))
    version = installed.get(backend, "")
    try_it = f"opkit check {op.name} --backend {backend}"

    def made(state: State, reason: str = "", fix: str = "") -> Availability:
        return Availability(op.name, backend, phases, state, version, against, reason, fix)

    if backend not in installed:
        return made(State.NOT_HERE, f"{PACKAGES[backend]} is not installed", INSTALL[backend])
    if not gpu and backend != "torch":
        return made(State.NOT_HERE, "there is no GPU", "run it on a host with an NVIDIA GPU")
    if backend in NEVER_RUN:
        return made(State.DOUBTFUL, NEVER_RUN[backend], try_it)
    if against and version != against:
        return made(
            State.DOUBTFUL,
            f"{version or 'an unknown version'} is here, written against {against}",
            f"{try_it}, or {INSTALL[backend]}",
        )
    return made(State.READY)
