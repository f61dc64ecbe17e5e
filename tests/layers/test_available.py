"""Which mocks can run here, and why not the others: asked of no framework."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from opkit.errors import ToolMissing
from opkit.layers import available
from opkit.layers.available import State, availabilities, default_backend, frameworks
from opkit.layers.registry import BACKENDS, INSTALL, OPS, find_op, mock_backends

ALL = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.2.0", "torch": "2.11.0"}


def found(
    installed: dict[str, str], gpu: str = "H100"
) -> dict[tuple[str, str], available.Availability]:
    return {(item.op, item.backend): item for item in availabilities(installed, gpu)}


def test_every_op_on_every_backend_is_told() -> None:
    pairs = found(ALL)
    assert set(pairs) == {(op, backend) for op in OPS for backend in BACKENDS}
    for item in pairs.values():
        assert (item.state is State.READY) is not bool(item.reason)
        assert bool(item.phases) is (item.state is not State.NONE)


@pytest.mark.parametrize(
    ("backend", "installed", "gpu", "state", "reason"),
    [
        ("vllm", ALL, "H100", State.READY, ""),
        ("torch", ALL, "", State.READY, ""),
        ("vllm", ALL, "", State.NOT_HERE, "there is no GPU"),
        ("vllm", {}, "H100", State.NOT_HERE, "vllm is not installed"),
        ("torch", {}, "H100", State.NOT_HERE, "torch is not installed"),
        ("vllm", ALL | {"vllm": "0.25.1"}, "H100", State.DOUBTFUL,
         "0.25.1 is here, written against 0.24.0"),
        ("sglang", ALL | {"sglang": ""}, "H100", State.DOUBTFUL,
         "an unknown version is here, written against 0.5.14"),
        ("trtllm", ALL, "H100", State.DOUBTFUL, available.NEVER_RUN["trtllm"]),
    ],
)  # fmt: skip
def test_why_a_mock_cannot_run(
    backend: str, installed: dict[str, str], gpu: str, state: State, reason: str
) -> None:
    item = found(installed, gpu)["dsa", backend]
    assert (item.state, item.reason) == (state, reason)
    assert (item.version, item.phases) == (installed.get(backend, ""), ("context", "generation"))
    assert bool(item.fix) is (state is not State.READY)
    if "not installed" in reason:
        assert item.fix == INSTALL[backend]


def test_a_backend_without_the_op_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "mock_backends", lambda _: ["torch"])
    item = found(ALL)["dsa", "vllm"]
    assert item.state is State.NONE
    assert item.reason


@pytest.mark.parametrize(
    ("installed", "backend"),
    [
        ({}, "torch"),
        ({"torch": "2"}, "torch"),
        (ALL, "vllm"),
        ({"sglang": "0.5.14", "torch": "2"}, "sglang"),
        ({"trtllm": "1.2"}, "trtllm"),
    ],
)
def test_the_default_backend_is_the_engine_that_is_there(
    installed: dict[str, str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "mock_backends", lambda _: list(BACKENDS))
    assert default_backend(find_op("dsa"), installed) == backend


def test_an_engine_without_the_op_is_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "mock_backends", lambda _: ["sglang", "torch"])
    assert default_backend(find_op("dsa"), ALL) == "sglang"


def test_a_mock_is_known_by_its_file() -> None:
    for op in OPS.values():
        folder = Path(available.__file__).parent / op.name
        assert set(mock_backends(op)) == {
            backend for backend in BACKENDS if (folder / f"{backend}.py").is_file()
        }


def test_this_interpreter_and_another_answer_alike(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    here = frameworks()
    assert set(here) <= set(BACKENDS)
    wrapper = tmp_path / "wrapped"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    assert frameworks(str(wrapper)) == here


@pytest.mark.parametrize("text", ["exit 3", "echo nonsense"])
def test_an_interpreter_that_cannot_be_asked_is_told(tmp_path: Path, text: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    with pytest.raises(ToolMissing, match="cannot be asked"):
        frameworks(str(python))
    with pytest.raises(ToolMissing, match="cannot be asked"):
        frameworks(str(tmp_path / "none"))


def test_a_machine_without_the_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_DEVICES", ("/no/such/device",))
    assert available.gpu_name() == ""


def test_asking_imports_no_framework() -> None:
    code = (
        "import sys; from opkit.layers.available import *;"
        "availabilities(frameworks(), gpu_name());"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "vllm", "sglang", "tensorrt_llm", "numpy"}
