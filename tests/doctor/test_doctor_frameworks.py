"""What the doctor says of an interpreter: it runs, versions, the mocks' imports, kernel caches."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_machine import GIB, made_machine

from opkit.doctor.facts.frameworks import (
    Cache,
    FrameworkFacts,
    Imported,
    gather_frameworks,
    try_imports,
)
from opkit.doctor.facts.gpu import GpuFacts, GpusFacts
from opkit.doctor.facts.host import Folder, Mount
from opkit.doctor.finding import Status
from opkit.doctor.machine import Ran, run_program
from opkit.doctor.probes import frameworks as probe
from opkit.layers.registry import OPS, mock_backends

OK, UNKNOWN, WARN, FAIL = Status.OK, Status.UNKNOWN, Status.WARN, Status.FAIL
H100 = GpusFacts(driver="580", cuda=(13, 0), gpus=(GpuFacts(0),), total=1)


def said(**fields: Any) -> dict[str, Ran]:
    """An interpreter that says this of itself."""
    whole = {"python": "3.12.3", "versions": {}, "torch_cuda": None, **fields}
    return {"python3": Ran(0, "a warning of the site\n" + json.dumps(whole) + "\n")}


def test_an_interpreter_is_asked_and_nothing_is_imported(tmp_path: Path) -> None:
    found = gather_frameworks(made_machine(tmp_path, run=run_program), sys.executable)
    assert found.problem == ""
    assert found.python_version == sys.version.split()[0]
    assert "vllm" not in found.versions
    assert probe.python(found).status is OK


def test_torchs_cuda_is_read_from_its_file(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "version.py").write_text("cuda: Optional[str] = '12.8'\nhip = None\n")
    start = tmp_path / "start"
    start.write_text(
        f"#!{sys.executable}\nimport os, sys\nos.environ['PYTHONPATH'] = {str(tmp_path)!r}\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    start.chmod(0o755)
    found = gather_frameworks(made_machine(tmp_path, run=run_program), str(start))
    assert (found.problem, found.torch_cuda) == ("", "12.8")
    assert "torch" in found.versions


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Ran(None, problem="python3 cannot be started"), "cannot be started"),
        (Ran(1, err="SyntaxError: old\n"), "exit code 1: SyntaxError: old"),
        (Ran(0, "hello\n"), "it said: hello"),
        (Ran(0, ""), "it said: nothing"),
    ],
)
def test_an_interpreter_that_does_not_answer(tmp_path: Path, answer: Ran, says: str) -> None:
    facts = gather_frameworks(made_machine(tmp_path, said={"python3": answer}), "python3")
    found = probe.python(facts)
    assert (found.status, says in found.says) == (FAIL, True), found.says
    assert list(probe.engines(facts)) == list(probe.layers(facts, H100)) == []


def test_an_old_interpreter(tmp_path: Path) -> None:
    facts = gather_frameworks(made_machine(tmp_path, said=said(python="3.10.12")), "python3")
    assert probe.python(facts).status is FAIL
    assert "3.11 or newer" in probe.python(facts).fix


ENGINES = [
    ({"vllm": "0.24.0"}, "vllm", OK, "0.24.0, the one"),
    ({"vllm": "0.24.0+cu129"}, "vllm", OK, "0.24.0+cu129, the one"),
    ({"vllm": "0.25.1"}, "vllm", WARN, "0.25.1; opkit's mocks were written against 0.24.0"),
    ({"vllm": ""}, "vllm", WARN, "unknown version"),
    ({"sglang": "0.5.14"}, "sglang", OK, "0.5.14"),
    ({"tensorrt_llm": "1.2.0"}, "trtllm", WARN, "never run"),
    ({"torch": "2.11.0"}, "engine", WARN, "no serving engine is installed here; torch 2.11.0 is"),
    ({}, "engine", WARN, "no serving engine"),
]


@pytest.mark.parametrize(("versions", "name", "status", "says"), ENGINES)
def test_engines(versions: dict[str, str], name: str, status: Status, says: str) -> None:
    (found,) = probe.engines(FrameworkFacts("python3", "3.12.3", versions=versions))
    assert (found.name, found.status, says in found.says) == (name, status, True), found.says
    assert bool(found.fix) is (status is WARN)


@pytest.mark.parametrize(
    ("versions", "there", "status"),
    [
        ({"triton": "3.6.0"}, True, OK),
        ({"triton": "3.6.0"}, False, WARN),
        ({"triton": "3.6.0"}, None, None),
        ({}, False, None),
    ],
)
def test_the_header_that_triton_builds_with(
    versions: dict[str, str], there: bool | None, status: Status | None
) -> None:
    facts = FrameworkFacts("python3", "3.12.3", versions=versions, headers=there)
    found = probe.headers(facts)
    assert (found and found.status) == status
    if found is not None and status is WARN:
        assert "python3.12-dev" in found.fix


def test_the_header_is_looked_for_in_the_interpreter(tmp_path: Path) -> None:
    found = gather_frameworks(made_machine(tmp_path, run=run_program), sys.executable)
    assert found.headers is (Path(sysconfig.get_path("include")) / "Python.h").is_file()


@pytest.mark.parametrize(
    ("cuda", "gpus", "status"),
    [
        ("13.0", H100, OK),
        ("12.8", H100, OK),
        ("14.1", H100, FAIL),
        ("13.0", GpusFacts(problem="no"), OK),
        ("", H100, WARN),
        ("", GpusFacts(problem="no"), OK),
        ("13.0", None, OK),
    ],
)
def test_torch_against_the_driver(cuda: str, gpus: GpusFacts | None, status: Status) -> None:
    facts = FrameworkFacts("python3", "3.12.3", versions={"torch": "2.11.0"}, torch_cuda=cuda)
    found = probe.torch(facts, gpus)
    assert found is not None
    assert found.status is status
    assert bool(found.fix) is (status is not OK)


def test_no_torch_is_not_told() -> None:
    assert probe.torch(FrameworkFacts("python3", "3.12.3"), H100) is None


def imported(*tried: Imported) -> FrameworkFacts:
    return FrameworkFacts("python3", "3.12.3", versions={"vllm": "0.24.0"}, imports=tried)


IMPORTS = [
    (Imported("vllm", ("dsa", "gqa"), seconds=8.04), H100, OK, "dsa, gqa import (8.0 s)"),
    (Imported("vllm", ("dsa",), {"gqa": "ImportError: x"}), H100, WARN, "gqa: ImportError: x"),
    (Imported("vllm", (), {"a": "E: x", "b": "E: x"}), H100, FAIL, "a, b: E: x"),
    (Imported("vllm", (), problem="took over 120 s"), H100, FAIL, "took over 120 s"),
    (Imported("vllm", (), {"a": "E: x"}), GpusFacts(problem="no"), WARN, "there is no GPU"),
]


@pytest.mark.parametrize(("tried", "gpus", "status", "says"), IMPORTS)
def test_imports(tried: Imported, gpus: GpusFacts, status: Status, says: str) -> None:
    (found,) = probe.layers(imported(tried), gpus)
    assert (found.name, found.status) == ("vllm mocks", status)
    assert says in found.says
    assert ("opkit check" in found.fix) is (status is not OK)


def test_imports_that_were_not_tried_are_unknown() -> None:
    facts = FrameworkFacts("python3", "3.12.3", versions={"vllm": "0.24.0"})
    (found,) = probe.layers(facts, H100)
    assert found.status is UNKNOWN


def test_mocks_are_imported_in_a_process_of_their_own(tmp_path: Path) -> None:
    """Really: here no engine is installed, so each import fails with its reason."""
    say: list[str] = []
    machine = made_machine(tmp_path, run=run_program)
    (tried,) = try_imports(machine, sys.executable, ("trtllm",), say.append)
    ops = [op.name for op in OPS.values() if "trtllm" in mock_backends(op)]
    assert say == ["importing opkit's mocks for trtllm"]
    assert set(tried.failures) | set(tried.ops) == set(ops)
    assert all("No module named" in why for why in tried.failures.values())
    assert tried.problem == ""


def test_an_import_that_crashes_tells_how_far_it_came(tmp_path: Path) -> None:
    line = json.dumps({"opkit_import": "dsa", "error": ""})
    crash = {"vllm": Ran(-11, f"talk\n{line}\n", "", 3.0)}
    (tried,) = try_imports(made_machine(tmp_path, said=crash), "python3", ("vllm",), print)
    assert tried.ops == ("dsa",)
    assert tried.problem.startswith("exit code -11")
    silent = {"vllm": Ran(0, f"{line}\n")}
    (tried,) = try_imports(made_machine(tmp_path, said=silent), "python3", ("vllm",), print)
    assert tried.problem == "it ended before all were imported"


def answers(argv: Sequence[str]) -> Ran:
    """What a process of imports says when all goes well."""
    at = next(n for n, word in enumerate(argv) if word in ("vllm", "torch"))
    said = [json.dumps({"opkit_import": op, "error": ""}) for op in argv[at + 1 :]]
    return Ran(0, "\n".join(said) + "\n", seconds={"vllm": 22.0, "torch": 8.2}[argv[at]])


def test_backends_are_imported_at_the_same_time(tmp_path: Path) -> None:
    """Neither ends before the other has begun; what is found stands in the order asked."""
    both, say = threading.Barrier(2, timeout=30), list[str]()
    torch_done = threading.Event()

    def run(argv: Sequence[str], _limit_s: float, _env: Mapping[str, str]) -> Ran:
        both.wait()
        if "vllm" in argv:
            assert torch_done.wait(30)
        return answers(argv)

    def told(message: str) -> None:
        say.append(message)
        if len(say) == 2:
            torch_done.set()

    machine = made_machine(tmp_path, run=run)
    found = try_imports(machine, "python3", ("vllm", "torch"), told)
    assert [(each.backend, each.seconds) for each in found] == [("vllm", 22.0), ("torch", 8.2)]
    assert all(each.ops and not each.problem for each in found)
    assert say == [
        "importing opkit's mocks for vllm, torch at the same time",
        "importing opkit's mocks for vllm; done: torch",
    ]


def test_ctrl_c_ends_every_import(tmp_path: Path) -> None:
    """Each is a session of its own, which no signal of the terminal reaches."""
    (tmp_path / "opkit" / "doctor").mkdir(parents=True)
    begun = [tmp_path / f"begun-{name}" for name in ("vllm", "torch")]
    sleeper = tmp_path / "python"
    sleeper.write_text(
        f'#!/bin/sh\ncase "$*" in *vllm*) echo $$ >{begun[0]};; *) echo $$ >{begun[1]};; esac\n'
        "exec sleep 600\n"
    )
    sleeper.chmod(0o755)

    def hit(_message: str) -> None:
        until = time.monotonic() + 30
        while not all(path.is_file() and path.read_text() for path in begun):
            assert time.monotonic() < until
            time.sleep(0.01)
        raise KeyboardInterrupt

    machine = made_machine(tmp_path, run=run_program)
    with pytest.raises(KeyboardInterrupt):
        try_imports(machine, str(sleeper), ("vllm", "torch"), hit)
    for path in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_nothing_to_import(tmp_path: Path) -> None:
    assert try_imports(made_machine(tmp_path), "python3", (), pytest.fail) == ()


def cache(**changes: Any) -> Cache:
    disk: dict[str, Any] = {
        "path": "/home/me/.cache/x", "looked_at": "/home/me/.cache/x", "writable": True,
        "free": 100 * GIB, "total": 200 * GIB, "mount": Mount("/", "ext4"),
    }  # fmt: skip
    folder = Folder(**{**disk, **{k: v for k, v in changes.items() if k in disk}})
    rest = {k: v for k, v in changes.items() if k not in disk}
    return Cache(**{"name": "FlashInfer", "folder": folder, "there": True, **rest})


CACHES = [
    (cache(size=3 * 2**20), OK, "3.0 MiB (ext4)"),
    (cache(size=0), OK, "/home/me/.cache/x, empty (ext4)"),
    (cache(size=3000), OK, "2.9 KiB (ext4)"),
    (cache(size=3 * GIB, cut=True), OK, "over 3.0 GiB"),
    (cache(there=False), OK, "not there yet: the first start compiles"),
    (cache(writable=False), WARN, "compiled at every start"),
    (cache(mount=Mount("/", "nfs4")), WARN, "nfs4"),
    (cache(free=10 * 2**20), WARN, "10 MiB free"),
    (cache(versions=("0.6.1",), version="0.6.2"), WARN, "holds 0.6.1, and 0.6.2 is here"),
    (cache(versions=("0.6.1", "0.6.2"), version="0.6.2+cu130"), OK, "/home/me"),
    (cache(versions=("0.6.1",), version=""), OK, "/home/me"),
]


@pytest.mark.parametrize(("kept", "status", "says"), CACHES)
def test_caches(kept: Cache, status: Status, says: str) -> None:
    (found,) = probe.caches(FrameworkFacts("python3", caches=(kept,)))
    assert (found.status, says in found.says) == (status, True), found.says
    assert bool(found.fix) is (status is WARN)


def test_caches_are_where_the_packages_put_them(tmp_path: Path) -> None:
    versions = dict.fromkeys(("flashinfer-python", "triton", "torch", "vllm", "sglang"), "1")
    moved = {
        "TRITON_CACHE_DIR": "/t", "VLLM_CACHE_ROOT": "/v", "TORCHINDUCTOR_CACHE_DIR": "/i",
        "FLASHINFER_WORKSPACE_BASE": "/f", "SGLANG_CACHE_DIR": "/s", "CUDA_CACHE_PATH": "/c",
        "SGLANG_DG_CACHE_DIR": "/g",
    }  # fmt: skip

    def places(environ: dict[str, str]) -> dict[str, str]:
        machine = made_machine(tmp_path, environ=environ, said=said(versions=versions))
        found = gather_frameworks(machine, "python3").caches
        return {one.name: one.folder.path for one in found}

    home = tmp_path / "home"
    assert places({"USER": "me", "TMPDIR": "/tmp"}) == {
        "FlashInfer": f"{home}/.cache/flashinfer",
        "Triton": f"{home}/.triton/cache",
        "torch.compile": "/tmp/torchinductor_me",
        "vLLM": f"{home}/.cache/vllm",
        "SGLang": f"{home}/.cache/sglang",
        "SGLang's DeepGEMM": f"{home}/.cache/deep_gemm",
        "CUDA's compiler": f"{home}/.nv/ComputeCache",
    }
    assert list(places(moved).values()) == ["/f/.cache/flashinfer", "/t", "/i", "/v", "/s", "/g",
                                            "/c"]  # fmt: skip


def test_only_caches_of_what_is_installed(tmp_path: Path) -> None:
    machine = made_machine(tmp_path, said=said(versions={"triton": "3.5"}))
    assert [one.name for one in gather_frameworks(machine, "python3").caches] == ["Triton"]


def test_a_cache_is_added_up_and_its_versions_seen(tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".cache" / "flashinfer"
    for name in ("0.6.1", "cubins"):
        (folder / name).mkdir(parents=True)
        (folder / name / "kernel.so").write_bytes(bytes(1000))
    machine = made_machine(tmp_path, said=said(versions={"flashinfer-python": "0.6.2"}))
    (found,) = gather_frameworks(machine, "python3").caches
    assert (found.there, found.size, found.cut) == (True, 2000, False)
    assert (found.versions, found.version) == (("0.6.1",), "0.6.2")
