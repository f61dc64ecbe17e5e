"""A tiny serving engine, an nsys that only pretends, and the real one when it is there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from opkit.align.profile.process import Grace
from opkit.errors import ToolMissing
from opkit.nsys_parsers.tool import find_nsys

HERE = Path(__file__).parent
VOCAB = 1000
# Limits, not waits: nsys and a polite server take long to end on loaded cores.
PATIENT = Grace(interrupt_s=20.0, terminate_s=5.0, shutdown_s=10.0, kill_s=5.0)
MARK = "OPKIT_TEST_MARK"


def _real_nsys() -> str | None:
    try:
        return str(find_nsys().path)
    except ToolMissing:
        return None


REAL_NSYS = _real_nsys()
needs_nsys = pytest.mark.skipif(REAL_NSYS is None, reason="no nsys here: set OPKIT_NSYS or PATH")


def marked(mark: str) -> list[str]:
    """The living processes whose environment carries the mark: pid and command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or folder.name == str(os.getpid()):
            continue
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(f"{folder.name} {command}")
        except OSError:  # ended meanwhile, or not ours to read
            continue
    return found


@dataclass
class Bench:
    """One test's folders and how its server is started."""

    root: Path
    model: Path
    port: int
    mark: str

    @property
    def out(self) -> Path:
        return self.root / "out"

    def command(self, flags: str = "") -> str:
        """``vllm serve``, as the fake engine answers to it."""
        return f"{self.root / 'bin' / 'vllm'} serve {self.model} --port {self.port} {flags}"

    def sent(self) -> list[dict[str, Any]]:
        """The request bodies that the server got, in order."""
        log = self.root / "requests"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def script(source: Path, target: Path) -> None:
    """Install a Python file as a program of this interpreter."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"#!{sys.executable}\n{source.read_text()}")
    target.chmod(0o755)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench; afterwards nothing that was started on it may be left."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"vocab_size": VOCAB, "architectures": ["TinyForCausalLM"], "num_hidden_layers": 4}
    (model / "config.json").write_text(json.dumps(config))
    script(HERE / "fake_server.py", tmp_path / "bin" / "vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mark = uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("FAKE_REQUESTS", str(tmp_path / "requests"))
    monkeypatch.delenv("FAKE_SERVER", raising=False)
    yield Bench(tmp_path, model, port, mark)
    assert marked(mark) == []


@pytest.fixture
def fake_nsys(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``nsys`` that starts what it is given, as the real one does, and records nothing."""
    path = bench.root / "bin" / "nsys"
    script(HERE / "fake_nsys.py", path)
    monkeypatch.setenv("OPKIT_NSYS", str(path))
    monkeypatch.setenv("FAKE_NSYS_STATE", str(bench.root))
    monkeypatch.delenv("FAKE_NSYS", raising=False)
    return path


@pytest.fixture(params=["fake", pytest.param("real", marks=needs_nsys)])
def either_nsys(request: pytest.FixtureRequest) -> str:
    """The test runs with the pretended nsys and, where there is one, with the real one."""
    if request.param == "fake":
        request.getfixturevalue("fake_nsys")
    return str(request.param)


@pytest.fixture
def no_nsys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without nsys."""
    monkeypatch.delenv("OPKIT_NSYS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("opkit.nsys_parsers.tool._USUAL_PLACES", ())
    assert shutil.which("nsys") is None
