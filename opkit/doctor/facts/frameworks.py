"""What an interpreter has: versions, whether opkit's mocks import there, kernel caches."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from opkit.doctor.facts.host import Folder, look_at
from opkit.doctor.machine import MARK, Machine, end_marked
from opkit.layers.interpreter import module_command
from opkit.layers.registry import OPS, mock_backends

ASK_LIMIT_S = 60.0
# Of one backend; vLLM's first import on a cold disk takes over a minute, and others run beside it.
IMPORT_LIMIT_S = 180.0
_END_S = 0.1  # between looks for imports that are to end
_TOGETHER = " at the same time"
WALK_LIMIT_S = 0.3  # to add up one cache
# package → backend; the others are told because a backend's kernels come from them
ENGINES = {"vllm": "vllm", "sglang": "sglang", "tensorrt_llm": "trtllm", "torch": "torch"}
BESIDE = ("nvtx", "flashinfer-python", "triton", "sgl-kernel", "deep_gemm", "transformers")
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, os, pathlib, re, sys, sysconfig
found = {"python": sys.version.split()[0], "versions": {}, "torch_cuda": None}
elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
header = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
found["headers"] = header.is_file() or (None if elsewhere else False)
for name in sys.argv[1:]:
    try:
        found["versions"][name] = m.version(name)
    except m.PackageNotFoundError:
        if name.isidentifier() and u.find_spec(name) is not None:
            found["versions"][name] = ""
spec = u.find_spec("torch")
if spec is not None and spec.origin:
    file = pathlib.Path(spec.origin).with_name("version.py")
    text = file.read_text() if file.is_file() else ""
    cuda = re.search(r"^cuda[^=]*=\\s*['\\"]([\\d.]+)", text, re.M)
    found["torch_cuda"] = cuda[1] if cuda else ""
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Imported:
    """Whether the mocks of a backend import.

    Attributes:
        backend: as opkit calls it.
        ops: those whose mock was imported.
        failures: op → the error, in a line.
        problem: why the attempt itself ended (a crash, the time limit).
        seconds: how long it took.
    """

    backend: str
    ops: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Cache:
    """A folder in which an engine keeps compiled or tuned kernels.

    Attributes:
        name: whose.
        folder: where, and on what file system.
        there: whether it exists.
        size: bytes; a lower bound if ``cut``.
        cut: adding up was stopped: there is too much.
        versions: names of subfolders that are versions, where the cache is laid out so.
        version: of the package that uses it, here; empty when unknown.
    """

    name: str
    folder: Folder
    there: bool
    size: int = 0
    cut: bool = False
    versions: tuple[str, ...] = ()
    version: str = ""


@dataclass(frozen=True)
class FrameworkFacts:
    """An interpreter and what it has.

    Attributes:
        python: the interpreter, as named.
        python_version: empty when it does not run; then ``problem`` says why.
        versions: package → version of what is installed ("" when it does not tell).
        torch_cuda: the CUDA that torch was built for; empty for a CPU build, None without torch.
        headers: whether the interpreter's ``Python.h`` is there; None when it may be elsewhere.
        imports: one a backend that is installed; None when they were not tried.
        caches: of the packages that are installed.
    """

    python: str
    python_version: str = ""
    problem: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: str | None = None
    headers: bool | None = None
    imports: tuple[Imported, ...] | None = None
    caches: tuple[Cache, ...] = ()

    def backends(self) -> dict[str, str]:
        """The backends whose framework is installed, with its version."""
        return {
            backend: self.versions[package]
            for package, backend in ENGINES.items()
            if package in self.versions
        }


def gather_frameworks(machine: Machine, python: str, *, caches: bool = True) -> FrameworkFacts:
    """Ask an interpreter what it has, without importing any of it; ``caches``: look at those too,
    which takes up to :data:`WALK_LIMIT_S` for each."""
    ran = machine.ask(python, "-P", "-c", _PROBE, *ENGINES, *BESIDE, limit_s=ASK_LIMIT_S)
    if not ran.ok():
        return FrameworkFacts(python, problem=ran.why())
    try:
        said = json.loads(ran.out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return FrameworkFacts(python, problem=f"it said: {ran.out.strip()[:200] or 'nothing'}")
    versions = said["versions"]
    return FrameworkFacts(
        python=python,
        python_version=said["python"],
        versions=versions,
        torch_cuda=said["torch_cuda"],
        headers=said.get("headers"),
        caches=tuple(_caches(machine, versions)) if caches else (),
    )


def try_imports(
    machine: Machine, python: str, backends: Sequence[str], say: Callable[[str], None]
) -> tuple[Imported, ...]:
    """Import opkit's mocks for each backend, each in a process of its own, all at the same time.

    Args:
        say: told what is still being imported, as it may take long.

    Returns:
        One a backend, in their order.
    """
    if not backends:
        return ()
    mark = uuid4().hex

    def one(backend: str) -> Imported:
        ops = [op.name for op in OPS.values() if backend in mock_backends(op)]
        command = [*module_command(python, "opkit.doctor.imports"), backend, *ops]
        ran = machine.run(command, IMPORT_LIMIT_S, {MARK: mark})
        return _imported(backend, ops, ran.out, "" if ran.ok() else ran.why(), ran.seconds)

    with ThreadPoolExecutor(len(backends), thread_name_prefix="opkit import") as pool:
        tries = {pool.submit(one, backend): backend for backend in backends}
        try:
            say(f"importing opkit's mocks for {', '.join(backends)}{_TOGETHER * (len(tries) > 1)}")
            for _ in as_completed(tries):
                left = [backend for tried, backend in tries.items() if not tried.done()]
                done = [backend for backend in backends if backend not in left]
                if left:
                    say(f"importing opkit's mocks for {', '.join(left)}; done: {', '.join(done)}")
        except BaseException:  # Ctrl-C: nothing of the terminal's reaches these processes
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(tried.done() for tried in tries):
                end_marked(mark)
                wait(tries, _END_S)
            raise
        return tuple(tried.result() for tried in tries)


def _imported(backend: str, ops: list[str], out: str, problem: str, seconds: float) -> Imported:
    """What the process said, a line of JSON an op; other lines are the framework's own talk."""
    good, failures = [], {}
    for line in out.splitlines():
        if not line.startswith('{"opkit_import"'):
            continue
        said = json.loads(line)
        if said["error"]:
            failures[said["opkit_import"]] = said["error"]
        else:
            good.append(said["opkit_import"])
    if not problem and len(good) + len(failures) < len(ops):
        problem = "it ended before all were imported"
    return Imported(backend, tuple(good), failures, problem, seconds)


def _caches(machine: Machine, versions: Mapping[str, str]) -> Iterator[Cache]:
    for name, package, path in _places(machine):
        if package and package not in versions:
            continue
        yield _cache(machine, name, path, versions.get(package, ""))


def _places(machine: Machine) -> Iterator[tuple[str, str, Path]]:
    """Name, package that uses it, and folder of each cache, as the packages choose it (vLLM 0.24
    ``envs.py``, FlashInfer ``jit/env.py``, SGLang 0.5 ``environ.py``, Triton and torch 2.11)."""
    env, home = machine.environ, machine.home
    general = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    user = env.get("USER") or env.get("LOGNAME") or ("root" if machine.uid == 0 else "")
    temp = Path(env.get("TMPDIR") or "/tmp")
    flashinfer = Path(env.get("FLASHINFER_WORKSPACE_BASE") or home) / ".cache" / "flashinfer"
    triton = Path(env.get("TRITON_HOME") or home) / ".triton" / "cache"
    vllm = Path(env.get("VLLM_CACHE_ROOT") or general / "vllm")
    sglang = Path(env.get("SGLANG_CACHE_DIR") or home / ".cache" / "sglang")
    gemm = Path(env.get("SGLANG_DG_CACHE_DIR") or home / ".cache" / "deep_gemm")
    inductor = Path(env.get("TORCHINDUCTOR_CACHE_DIR") or temp / f"torchinductor_{user}")
    yield "FlashInfer", "flashinfer-python", flashinfer
    yield "Triton", "triton", Path(env.get("TRITON_CACHE_DIR") or triton)
    yield "torch.compile", "torch", inductor
    yield "vLLM", "vllm", vllm
    yield "SGLang", "sglang", sglang
    yield "SGLang's DeepGEMM", "sglang", gemm
    yield "CUDA's compiler", "torch", Path(env.get("CUDA_CACHE_PATH") or home / ".nv/ComputeCache")
    if env.get("TLLM_AUTOTUNER_CACHE_PATH"):
        yield "TensorRT-LLM's tuner", "tensorrt_llm", Path(env["TLLM_AUTOTUNER_CACHE_PATH"]).parent


def _cache(machine: Machine, name: str, path: Path, version: str) -> Cache:
    there = path.is_dir()
    size, cut = _added_up(path) if there else (0, False)
    versions: tuple[str, ...] = ()
    if there and name == "FlashInfer":  # the others key by content
        found = [folder.name for folder in path.iterdir() if re.match(r"\d+\.\d", folder.name)]
        versions = tuple(sorted(found))
    return Cache(name, look_at(machine, path), there, size, cut, versions, version)


def _added_up(path: Path) -> tuple[int, bool]:
    """Bytes of all files below, and whether that was cut short."""
    until = time.monotonic() + WALK_LIMIT_S
    size = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # gone meanwhile
                continue
        if time.monotonic() > until:
            return size, True
    return size, False
