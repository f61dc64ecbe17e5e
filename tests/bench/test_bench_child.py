"""The process around an offline engine: what it is asked, and that nothing of it is left."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engines import write_engines

from opkit.bench.backends import child as child_module
from opkit.bench.backends.child import Child
from opkit.errors import RunFailed, ToolMissing

Start = Callable[..., Child]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Start]:
    """Makes engines whose behaviour ``do`` names; all are closed at the end."""
    env = write_engines(tmp_path / "site")
    made: list[Child] = []

    def start(do: str = "", **more: Any) -> Child:
        options = {"model": "dir", "engine_args": {"load_format": "dummy"}}
        child = Child(
            "vllm", more.pop("python", sys.executable), options, tmp_path / "engine.log",
            env={**env, "FAKE_DO": do}, patience_s=0.5, **more,
        )  # fmt: skip
        made.append(child)
        return child

    yield start
    for child in made:
        child.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_the_engine_tells(engine: Start) -> None:
    served = engine().start()
    assert (served.model, served.version, served.vocab, served.max_length) == (
        "dir", "0.24.0", 1000, 4096,
    )  # fmt: skip
    assert served.facts["load_format"] == "dummy"
    assert served.facts["torch"] == "2.11.0"
    assert (served.facts["compilation_mode"], served.facts["cudagraph_mode"]) == ("NONE", "None")
    assert "engine core" in served.timed_by


def test_a_fact_that_is_no_plain_data_is_told_as_text(engine: Start) -> None:
    assert engine("odd facts").start().facts["quantization"] == "<class 'type'>"


def test_a_safe_path_does_not_hide_the_worker_s_files(
    engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PYTHONSAFEPATH a script's folder is not looked in."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert engine().start().version == "0.24.0"


def test_a_run_with_the_engine_s_times(engine: Start) -> None:
    child = engine()
    child.start()
    turn = child.generate([[1, 2], [3, 4]], 5)
    assert len(turn.replies) == 2
    for reply in turn.replies:
        assert reply.tokens == 5
        assert reply.first_ns is not None
        assert reply.last_ns is not None
        assert turn.began_ns <= reply.first_ns < reply.last_ns <= turn.ended_ns


@pytest.mark.parametrize("do", ["no times", "other clock"])
def test_times_that_do_not_fit_are_no_times(engine: Start, do: str) -> None:
    child = engine(do)
    child.start()
    reply = child.generate([[1]], 2).replies[0]
    assert (reply.first_ns, reply.last_ns) == (None, None)


def test_what_the_engine_prints_goes_to_its_log(engine: Start, tmp_path: Path) -> None:
    engine().start()
    assert "the fake engine prints" in (tmp_path / "engine.log").read_text()


@pytest.mark.parametrize(
    ("do", "sentence", "lives"),
    [
        ("raise", "a run failed: RuntimeError: CUDA out of memory", True),
        ("exit", r"ended with code 3 \(.* \| RuntimeError: EngineCore died\)", False),
        ("die", r"ended by SIGKILL \(.* \| CUDA error: an illegal memory access\)", False),
        ("hang", "a run took longer than 1 s and was ended", False),
        ("core dies", "a run failed: EngineDeadError: EngineCore encountered an issue", False),
        ("short", "4 output tokens came back instead of 5", True),
    ],
)
def test_a_run_that_goes_wrong(engine: Start, do: str, sentence: str, lives: bool) -> None:
    child = engine(do, limit_s=1.0)
    child.start()
    if do != "short":
        child.generate([[1]], 5)
    with pytest.raises(RunFailed, match=sentence):
        child.generate([[1]], 5)
    assert child.alive() is lives


def test_an_engine_that_cannot_load_says_the_first_line(engine: Start) -> None:
    with pytest.raises(RunFailed, match=r"loading the model failed: ValueError: no such model$"):
        engine("no model").start()


def test_a_model_that_is_not_there_is_named(engine: Start) -> None:
    """vLLM checks options with pydantic, whose first line names no cause."""
    with pytest.raises(RunFailed, match=r"ValidationError: 1 validation error.*Invalid repository"):
        engine("invalid").start()


def test_the_log_of_an_engine_before_tells_nothing_of_this_one(
    engine: Start, tmp_path: Path
) -> None:
    """The models of a scenario write to one log."""
    (tmp_path / "engine.log").write_text(
        'Traceback (most recent call last):\n  File "/a.py", line 1, in a\nValueError: of old\n'
    )
    child = engine("die")
    child.start()
    child.generate([[1]], 5)
    with pytest.raises(RunFailed) as caught:
        child.generate([[1]], 5)
    assert "of old" not in str(caught.value)


def test_the_cause_is_found_in_the_engine_s_log(engine: Start) -> None:
    """vLLM's frontend only says that its engine's process failed."""
    sentence = r"loading the model failed: ValueError: Free memory is too small \(in x/core.py:1\)"
    with pytest.raises(RunFailed, match=sentence):
        engine("core fails").start()


def test_an_engine_that_loads_for_ever(engine: Start) -> None:
    child = engine("slow start", start_limit_s=1.0)
    with pytest.raises(RunFailed, match="loading the model took longer than 1 s"):
        child.start()
    assert not child.alive()


def test_an_interpreter_without_the_framework(tmp_path: Path) -> None:
    child = Child("vllm", sys.executable, {"model": "m"}, tmp_path / "log", env={"PYTHONPATH": ""})
    with pytest.raises(ToolMissing, match="cannot import vllm"):
        child.start()
    child.close()


def test_no_such_interpreter(engine: Start) -> None:
    with pytest.raises(ToolMissing, match="/no/python: cannot be started"):
        engine(python="/no/python").start()


def test_what_the_engine_started_is_ended_too(engine: Start, tmp_path: Path) -> None:
    """Also a worker that takes no notice of a polite end."""
    child = engine("worker")
    child.start()
    told = re.search(r"worker (\d+)", (tmp_path / "engine.log").read_text())
    assert told is not None
    worker = int(told[1])
    assert alive(worker)
    child.close()
    assert not alive(worker)
    child.close()  # a second time does nothing


def test_a_second_ctrl_c_leaves_nothing_either(
    engine: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = engine("worker")
    child.start()
    told = re.search(r"worker (\d+)", (tmp_path / "engine.log").read_text())
    assert told is not None
    waited = child_module._wait_group

    def again(*_: Any) -> None:
        monkeypatch.setattr(child_module, "_wait_group", waited)
        raise KeyboardInterrupt

    monkeypatch.setattr(child_module, "_wait_group", again)
    with pytest.raises(KeyboardInterrupt):
        child.close()
    assert not alive(int(told[1]))


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    child = Child("vllm", sys.executable, {"model": "m"}, tmp_path / "none" / "engine.log")
    with pytest.raises(RunFailed, match=r"engine.log: cannot be written"):
        child.start()


def test_a_closed_engine_is_not_asked(engine: Start) -> None:
    child = engine()
    child.start()
    child.close()
    with pytest.raises(RunFailed, match="not running"):
        child.generate([[1]], 1)


def test_the_engine_ends_when_opkit_is_gone(engine: Start) -> None:
    """Nobody told it to: its standard input was closed, as by a process that was killed."""
    child = engine()
    child.start()
    process = child._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0


def test_the_engine_is_out_of_the_reach_of_ctrl_c(engine: Start) -> None:
    child = engine()
    child.start()
    assert child._process is not None
    assert os.getpgid(child._process.pid) != os.getpgid(0)
