"""The circumstances of a run: versions, GPUs, topology, and the variables that change a library."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import opkit
from opkit.collect.comm.plan import CUSTOM_BACKENDS, CommOptions
from opkit.collect.comm.probe import MARK
from opkit.errors import RunFailed, ToolMissing
from opkit.layers.interpreter import module_command
from opkit.layers.manifest import Manifest

PROBE_LIMIT_S = 600.0  # an engine that is imported for the first time compiles and reads a lot
TOPOLOGY_LIMIT_S = 60.0
# Variables of these beginnings change what the libraries do, so they belong to a row's
# circumstances; those of the second kind only what they say.
PREFIXES = (
    "NCCL_",
    "TORCH_NCCL_",
    "TORCH_SYMM_MEM_",
    "NVSHMEM_",
    "VLLM_ALLREDUCE_",
    "TLLM_",
    "UCX_",
)
TALK = ("NCCL_DEBUG", "TORCH_NCCL_TRACE", "TORCH_NCCL_DUMP", "NVSHMEM_DEBUG", "TLLM_LOG")


@dataclass(frozen=True)
class Host:
    """See the module's docstring.

    Attributes:
        versions: of torch, cuda, nccl and the engine, where there are such.
        gpus: index, uuid and name of each, by rank; none on a CPU.
        variables: of the environment, see :data:`PREFIXES`.
        topology: what ``nvidia-smi topo -m`` says; empty without it.
    """

    versions: dict[str, str]
    gpus: tuple[dict[str, Any], ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    topology: str = ""

    def device(self) -> str:
        """The name for the tables: the GPU's, of all kinds that are here, or the CPU's."""
        names = sorted({str(gpu["name"]) for gpu in self.gpus})
        return " + ".join(names) or platform.processor() or platform.machine()

    def version(self, implementation: str) -> str:
        """The version that a table of an implementation is filed under."""
        return self.versions[{"nccl": "nccl", "gloo": "torch"}.get(implementation, "engine")]

    def versions_of(self, implementation: str) -> dict[str, str]:
        """The versions that matter to an implementation; an engine's under its own name."""
        made = {name: value for name, value in self.versions.items() if name != "engine"}
        if implementation in CUSTOM_BACKENDS:
            made[implementation] = self.versions["engine"]
        return made

    def subject(self, implementation: str) -> dict[str, Any]:
        """What decides a row's value beside its case, for its key."""
        return {
            "versions": self.versions_of(implementation),
            "device": self.device(),
            "variables": self.variables,
        }


def inspect_host(options: CommOptions) -> Host:
    """Ask the ranks' interpreter what it has.

    Raises:
        ToolMissing: the interpreter, torch, a GPU or the engine is not there.
        RunFailed: the interpreter dies of the question.
    """
    asked = (options.device, options.all_reduce_backend)
    argv = [*module_command(options.python, "opkit.collect.comm.probe"), *asked]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=PROBE_LIMIT_S,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        raise ToolMissing(
            f"{options.python} cannot be started ({error.strerror or error})",
            "--python names the interpreter that has torch",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RunFailed(
            f"{options.python} did not say within {PROBE_LIMIT_S:g} s what it has"
        ) from error
    told = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not told:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise RunFailed(
            f"{options.python} ended with code {done.returncode} when asked what it has",
            "\n".join(lines[-5:]) or None,
        )
    answer = json.loads(told[-1].removeprefix(MARK))
    if "missing" in answer:
        raise ToolMissing(answer["missing"], answer["hint"])
    on_gpu = options.device == "cuda"
    return Host(
        versions={name: value for name, value in answer.items() if isinstance(value, str)},
        gpus=tuple(answer.get("gpus", ())),
        variables=variables(),
        topology=_topology() if on_gpu else "",
    )


def variables() -> dict[str, str]:
    """The variables that the ranks inherit and that change what the libraries do."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES) and not name.startswith(TALK)
    }


def _topology() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "topo", "-m"], capture_output=True, text=True, errors="replace",
            timeout=TOPOLOGY_LIMIT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi topo -m failed ({error})"
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


def manifest_of(host: Host, implementation: str) -> Manifest:
    """What the rows of an implementation share, for the provenance."""
    return Manifest(
        side="mock",
        op="comm",
        backend=implementation,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"opkit": opkit.__version__, **host.versions_of(implementation)},
        recipe={
            "result": "checked exactly, every element of every launch of one batch, at every size",
            "data": "random, another on each rank: normal, int8 over its whole range",
            "sample": "one aligned batch of launches, slowest rank, over the launches",
            "place": "all_reduce of torch.distributed in place, everything else out of place",
            **{f"env {name}": value for name, value in host.variables.items()},
        },
        notes=(f"nvidia-smi topo -m:\n{host.topology}",) if host.topology else (),
    )
