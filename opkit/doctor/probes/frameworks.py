"""Findings on the frameworks of an interpreter, and on the kernel caches they use."""

from __future__ import annotations

from collections.abc import Iterator

from opkit.doctor.facts.frameworks import Cache, FrameworkFacts, Imported
from opkit.doctor.facts.gpu import GpusFacts
from opkit.doctor.finding import Finding, Group, Status
from opkit.doctor.probes.host import is_network
from opkit.layers.available import NEVER_RUN, WRITTEN_AGAINST
from opkit.layers.registry import INSTALL

GIB, MIB = 2**30, 2**20
OLDEST_PYTHON = (3, 11)
TIGHT = GIB  # free space below which compiled kernels may not fit


def _found(name: str, status: Status, says: str, fix: str = "") -> Finding:
    return Finding(name, status, says, fix, Group.FRAMEWORKS)


def python(found: FrameworkFacts) -> Finding:
    """Fail: the interpreter does not run, or is too old for opkit's mocks."""
    fix = "name the engine's interpreter: --python (3.11 or newer)"
    if found.problem:
        return _found("python", Status.FAIL, f"{found.python}: {found.problem}", fix)
    version = tuple(int(part) for part in found.python_version.split(".")[:2] if part.isdigit())
    says = f"{found.python_version} ({found.python})"
    return _found(
        "python", *((Status.FAIL, says, fix) if version < OLDEST_PYTHON else (Status.OK, says))
    )


def headers(found: FrameworkFacts) -> Finding | None:
    """Warn: Triton is here, and the interpreter's ``Python.h``, which all that it builds includes
    (3.6, ``runtime/build.py``), is not. None where nobody needs it or it is not known."""
    if found.headers is None or "triton" not in found.versions:
        return None
    if found.headers:
        return _found("Python.h", Status.OK, "there, for what Triton builds")
    version = ".".join(found.python_version.split(".")[:2])
    return _found(
        "Python.h", Status.WARN,
        "not there: Triton cannot build, unless all that it needs is cached",
        f"apt-get install python{version}-dev (or your system's way)",
    )  # fmt: skip


def engines(found: FrameworkFacts) -> Iterator[Finding]:
    """A finding for every backend that is installed. Warn: another version than the one written
    against, never run, or no serving engine at all."""
    if found.problem:
        return
    here = found.backends()
    serving = [name for name in here if name != "torch"]
    if not serving:
        beside = f"; torch {here['torch']} is" if "torch" in here else ""
        yield _found(
            "engine", Status.WARN, f"no serving engine is installed here{beside}",
            f"name the interpreter that has it: --python; or {INSTALL['vllm']}",
        )  # fmt: skip
    for backend in serving:
        version, against = here[backend], WRITTEN_AGAINST.get(backend, "")
        try_it = f"opkit check OP --backend {backend}"
        if backend in NEVER_RUN:
            yield _found(backend, Status.WARN, f"{version}; mocks: {NEVER_RUN[backend]}", try_it)
        elif against and version.split("+")[0] != against:  # +cu129: a build, not a version
            says = f"{version or 'unknown version'}; opkit's mocks were written against {against}"
            yield _found(backend, Status.WARN, says, f"{try_it}, or {INSTALL[backend]}")
        else:
            yield _found(backend, Status.OK, f"{version}, the one that opkit's mocks are for")


def torch(found: FrameworkFacts, gpus: GpusFacts | None) -> Finding | None:
    """Fail: built for a newer CUDA than the driver speaks. Warn: no CUDA, beside a GPU."""
    if found.torch_cuda is None:
        return None
    version = found.versions.get("torch", "")
    if not found.torch_cuda:
        if gpus is not None and gpus.gpus:
            return _found(
                "torch", Status.WARN, f"{version} without CUDA, on a host with a GPU",
                "install the CUDA build: https://pytorch.org/get-started/locally/",
            )  # fmt: skip
        return _found("torch", Status.OK, f"{version}, without CUDA")
    says = f"{version} for CUDA {found.torch_cuda}"
    if gpus is None or gpus.cuda is None:
        return _found("torch", Status.OK, f"{says} (no driver to hold it against)")
    # Within a major version every driver runs every toolkit (CUDA's minor version compatibility).
    if int(found.torch_cuda.split(".")[0]) > gpus.cuda[0]:
        spoken = f"{gpus.cuda[0]}.{gpus.cuda[1]}"
        return _found(
            "torch", Status.FAIL, f"{says}, and the driver speaks CUDA {spoken} only",
            f"update the driver, or install a torch for CUDA {gpus.cuda[0]}",
        )  # fmt: skip
    return _found("torch", Status.OK, says)


def layers(found: FrameworkFacts, gpus: GpusFacts | None) -> Iterator[Finding]:
    """Whether opkit's mocks import. Fail: none of a backend does. Warn: some do not, or there is no
    GPU, without which engines need not import."""
    if found.problem or not found.backends():
        return
    if found.imports is None:
        yield _found("mocks", Status.UNKNOWN, "their import was not tried")
        return
    for tried in found.imports:
        yield _layers(tried, gpus is not None and bool(gpus.gpus))


def _layers(tried: Imported, gpu: bool) -> Finding:
    name = f"{tried.backend} mocks"
    took = f"({tried.seconds:.1f} s)"
    if not tried.failures and not tried.problem:
        return _found(name, Status.OK, f"{', '.join(tried.ops)} import {took}")
    why = [f"{op}: {error}" for op, error in tried.failures.items()]
    # One cause for all is said once.
    causes = set(tried.failures.values())
    if len(causes) == 1 and len(tried.failures) > 1:
        why = [f"{', '.join(tried.failures)}: {causes.pop()}"]
    if tried.problem:
        why.append(tried.problem)
    status = Status.WARN if tried.ops or not gpu else Status.FAIL
    whose = "" if gpu else "; there is no GPU, which engines may want already to be imported"
    fix = "" if gpu else " on a GPU host"
    return _found(
        name, status, f"{'; '.join(why)} {took}{whose}",
        f"see it whole{fix}: opkit check OP --backend {tried.backend}",
    )  # fmt: skip


def caches(found: FrameworkFacts) -> Iterator[Finding]:
    """One finding a cache. Warn: it cannot be kept, or is slow, or holds only other versions."""
    for cache in found.caches:
        yield _cache(cache)


def _cache(cache: Cache) -> Finding:
    name = f"cache of {cache.name}"
    folder = cache.folder
    kind = folder.mount.kind if folder.mount else ""
    where = folder.path
    local = "put it on a local disk that this user may write (docs/doctor.md names the variables)"
    if not folder.writable:
        says = f"{where} cannot be written: kernels are compiled at every start"
        return _found(name, Status.WARN, says, local)
    if is_network(kind):
        return _found(name, Status.WARN, f"{where} ({kind}): slow, and locks may fail", local)
    if folder.free is not None and folder.free < TIGHT:
        says = f"{where}: {folder.free / MIB:,.0f} MiB free on its disk"
        return _found(name, Status.WARN, says, local)
    if not cache.there:
        says = f"{where} is not there yet: the first start compiles"
        return _found(name, Status.OK, says)
    size = f"{'over ' if cache.cut else ''}{_size(cache.size)}"
    if cache.versions and cache.version and cache.version.split("+")[0] not in cache.versions:
        return _found(
            name, Status.WARN,
            f"{where} holds {', '.join(cache.versions)}, and {cache.version} is here: its first "
            "start compiles anew",
            "warm it before a recording: start the engine once",
        )  # fmt: skip
    return _found(name, Status.OK, f"{where}, {size}{f' ({kind})' if kind else ''}")


def _size(number: int) -> str:
    if not number:
        return "empty"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number / 1024:,.1f} KiB"
