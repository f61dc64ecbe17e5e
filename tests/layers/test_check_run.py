"""The parent of a check: what its child did becomes a result or one sentence; nothing stays."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from opkit.errors import (
    EXIT_BAD_INPUT,
    EXIT_RUN_FAILED,
    BadInput,
    OpkitError,
    ToolMissing,
    WrongUsage,
)
from opkit.layers.check import run
from opkit.layers.check.asked import CheckPlan
from opkit.layers.check.result import Outcome
from opkit.layers.registry import OPS

MARK = "OPKIT_CHECK_TEST"


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{(Path(__file__).parent / 'fake_check.py').read_text()}")
    path.chmod(0o755)
    monkeypatch.setenv(MARK, str(tmp_path))
    for name in ("POLITE_S", "FIRM_S"):
        monkeypatch.setattr(run, name, 0.5)
    return str(path)


def left(mark: str) -> list[str]:
    """Processes of the test that still live."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != str(os.getpid()):
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    found.append(folder.name)
            except OSError:
                continue
    return found


def checked(python: str, tmp_path: Path, limit_s: float = 60.0, **given: Any) -> run.Checked:
    said: list[str] = given.pop("said", [])
    folder = tmp_path / "out"
    plan = run.prepare(CheckPlan("gqa", "torch", "", "", **given), folder)
    try:
        return run.run_check(plan, folder, python, limit_s, said.append)
    finally:
        assert left(str(tmp_path)) == []


def test_what_the_child_found_comes_back(python: str, tmp_path: Path) -> None:
    said: list[str] = []
    done = checked(python, tmp_path, said=said)
    assert done.failure is None
    assert done.result.passed
    assert [line.outcome for line in done.result.lines] == [
        Outcome.PASS, Outcome.PASS, Outcome.NOT_APPLICABLE,
    ]  # fmt: skip
    assert said == ["building"]
    log = (tmp_path / "out" / "check.log").read_text()
    assert "a warning of some library" in log


def test_a_failed_rule_is_no_failure_of_the_run(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "fail")
    done = checked(python, tmp_path)
    assert done.failure is None
    assert not done.result.passed


def test_the_childs_own_sentence_is_passed_on(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "refuse")
    with pytest.raises(OpkitError, match=r"^the model has no experts$") as caught:
        checked(python, tmp_path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert (caught.value.hint or "").startswith("give one that has\nthe log is ")


def test_a_crash_costs_the_case_in_hand(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "crash")
    done = checked(python, tmp_path)
    assert str(done.failure) == "the process of the check was ended by SIGSEGV"
    assert done.failure is not None
    assert done.failure.exit_code == EXIT_RUN_FAILED
    assert done.result.running == "context 1 × 64"
    assert done.result.lines[0].outcome is Outcome.PASS
    assert not done.result.passed


def test_a_death_before_any_result_shows_the_last_words(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "die")
    with pytest.raises(OpkitError, match="ended with code 1") as caught:
        checked(python, tmp_path)
    assert "Fatal Python error: out of luck" in (caught.value.hint or "")


@pytest.mark.parametrize("deed", ["hang", "deaf"])
def test_a_hang_meets_its_limit_and_leaves_nothing(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str
) -> None:
    monkeypatch.setenv("FAKE_CHECK", deed)
    with pytest.raises(OpkitError, match="not finished after 2 s"):
        checked(python, tmp_path, limit_s=2)


def test_an_interrupt_ends_the_child(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "hang")
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        checked(python, tmp_path)


def test_a_missing_interpreter_is_told(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="no such interpreter"):
        checked("/no/such/python", tmp_path)


@pytest.mark.parametrize("op", list(OPS))
def test_every_op_has_a_bundled_model(op: str, tmp_path: Path) -> None:
    plan = run.prepare(CheckPlan(op, "torch", "", ""), tmp_path / "out")
    config = json.loads((Path(plan.model) / "config.json").read_text())
    assert config["architectures"]
    assert Path(plan.result).parent.is_dir()


def test_a_folder_without_a_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json in it"):
        run.prepare(CheckPlan("gqa", "torch", str(tmp_path), ""), tmp_path / "out")


def test_an_output_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="the output folder cannot be used"):
        run.prepare(CheckPlan("gqa", "torch", "", ""), tmp_path / "file" / "out")


def test_flags_are_given_where_the_user_gave_none(tmp_path: Path) -> None:
    made = run.prepare(CheckPlan("gqa", "vllm", "", ""), tmp_path / "a")
    assert "--compilation-config" in made.engine_args
    given = run.prepare(CheckPlan("gqa", "vllm", "", "", ("--x",)), tmp_path / "b")
    assert given.engine_args == ("--x",)
    assert run.prepare(CheckPlan("gqa", "torch", "", ""), tmp_path / "c").engine_args == ()


def test_serving_flags_are_split_as_a_shell_does() -> None:
    assert run.split_args("--a 'b c' -d") == ("--a", "b c", "-d")
    with pytest.raises(WrongUsage, match="No closing quotation"):
        run.split_args("--a 'b")
