"""The process of a check with real mocks of torch, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checked_mock import SIZES, TinyMock
from cli_runs import environment

from opkit.errors import (
    EXIT_BAD_INPUT,
    EXIT_RUN_FAILED,
    EXIT_TOOL_MISSING,
    EXIT_USAGE,
    BadInput,
    OpkitError,
)
from opkit.layers import progress
from opkit.layers.check import child
from opkit.layers.check.asked import CheckPlan
from opkit.layers.check.result import CheckResult, Outcome, read_check_result
from opkit.layers.check.run import prepare, run_check
from opkit.layers.graphs import CaptureFailed
from opkit.layers.op import GemmCase, LaunchMode

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed: make test-torch")
SMALL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 512, "vocab_size": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def run(tmp_path: Path, model: Path, op: str, **given: Any) -> CheckResult:
    plan = prepare(CheckPlan(op, "torch", str(model), "", **given), tmp_path / "out")
    done = run_check(plan, tmp_path / "out", sys.executable, 200, lambda _: None)
    assert done.failure is None
    return done.result


@needs_torch
def test_a_sound_mock_passes_in_a_process_of_its_own(tmp_path: Path, model: Path) -> None:
    result = run(tmp_path, model, "gqa")
    assert result.passed, [line for line in result.lines if line.outcome is Outcome.FAIL]
    assert result.mock["model"]["architecture"] == "Qwen3ForCausalLM"
    assert result.mock["operands"]
    outcomes = {line.check: line.outcome for line in result.lines}
    assert outcomes["KV cache read"] is Outcome.PASS
    assert outcomes["CUDA graph"] is (
        Outcome.NOT_APPLICABLE if result.device == "cpu" else Outcome.PASS
    )


@needs_torch
def test_degenerate_inputs_fail_and_say_so(tmp_path: Path, model: Path) -> None:
    result = run(tmp_path, model, "gqa", inputs="zeros")
    wrong = {line.check: line for line in result.lines if line.outcome is Outcome.FAIL}
    assert {"input format", "operands", "finite output"} <= set(wrong)
    assert "100% zeros" in wrong["operands"].detail
    assert "--inputs tokens" in wrong["operands"].fix


@needs_torch
def test_a_model_without_the_op_is_one_sentence(tmp_path: Path, model: Path) -> None:
    with pytest.raises(OpkitError) as caught:
        run(tmp_path, model, "moe")
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "Traceback" not in str(caught.value)
    assert "Traceback" in (tmp_path / "out" / "check.log").read_text()


@pytest.mark.skipif(HAS_TORCH, reason="torch is installed")
def test_without_torch_the_child_says_what_to_install(tmp_path: Path, model: Path) -> None:
    with pytest.raises(OpkitError, match="runs on torch, which cannot be imported") as caught:
        run(tmp_path, model, "gqa")
    assert caught.value.exit_code == EXIT_TOOL_MISSING
    assert "--python" in (caught.value.hint or "")


Build = Callable[..., Any]


def in_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build) -> CheckPlan:
    """A plan whose mock ``build`` makes, in this process, as if a GPU were here."""
    pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    monkeypatch.setattr(child, "build_mock", build)
    monkeypatch.setattr(child, "gpu_here", lambda: True)
    monkeypatch.setattr(child, "sizes_for", lambda *_: SIZES)
    return CheckPlan("gqa", "torch", "", str(tmp_path / "result.json"))


def test_a_mock_that_cannot_be_built_with_graphs_is_built_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []

    def build(_: object, __: str, plan: Any) -> TinyMock:
        modes = {item.mode for item in plan.cases}
        builds.append(modes)
        if LaunchMode.GRAPH in modes:
            raise CaptureFailed("the forward cannot be captured: not permitted")
        return TinyMock()

    result = child.check(in_here(tmp_path, monkeypatch, build))
    assert builds == [{LaunchMode.EAGER, LaunchMode.GRAPH}, {LaunchMode.EAGER}]
    lines = {line.check: line for line in result.lines}
    assert lines["CUDA graph"].outcome is Outcome.FAIL
    assert "not permitted" in lines["CUDA graph"].detail
    assert lines["context = generation"].outcome is Outcome.PASS


def test_cases_of_its_own_that_prevent_a_build_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_: object, __: str, plan: Any) -> TinyMock:
        if any(isinstance(item.case, GemmCase) for item in plan.cases):
            raise BadInput("this GPU multiplies no float8")
        return TinyMock()

    plan = replace(in_here(tmp_path, monkeypatch, build), op="gemm")
    lines = {line.check: line for line in child.check(plan).lines}
    assert lines["collected cases"].outcome is Outcome.NOT_APPLICABLE
    assert lines["collected cases"].detail == "this GPU multiplies no float8"
    assert lines["output shape"].outcome is Outcome.PASS

    def never(*_: object) -> TinyMock:
        raise BadInput("no such model")

    with pytest.raises(BadInput, match="no such model"):
        child.check(in_here(tmp_path, monkeypatch, never))


def test_the_result_grows_with_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = in_here(tmp_path, monkeypatch, lambda *_: Dies())

    class Dies(TinyMock):
        def prepare(self, planned: Any) -> Any:
            if planned.mode is LaunchMode.GRAPH:
                raise SystemExit(3)
            return super().prepare(planned)

    with pytest.raises(SystemExit):
        child.check(plan)
    partial = read_check_result(Path(plan.result))
    assert partial.running == "generation 1 × 1 @ 47 (graph)"
    outcomes = {line.check: line.outcome for line in partial.lines}
    assert outcomes["KV cache written"] is Outcome.PASS
    assert outcomes["CUDA graph"] is Outcome.NOT_RUN
    assert not partial.passed


def test_a_build_that_raises_is_one_sentence_and_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object) -> TinyMock:
        progress.say("compiling kernels")
        raise AttributeError("no such class\nlong story")

    monkeypatch.setattr(progress, "_told", [])
    plan = in_here(tmp_path, monkeypatch, build)
    plan.write(tmp_path / "plan.json")
    assert child.main([str(tmp_path / "plan.json")]) == EXIT_RUN_FAILED
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(child.SAYS)]
    assert said[-2] == "opkit check: compiling kernels"  # who watches sees what is waited for
    assert said[-1] == "opkit check: the mock failed: AttributeError: no such class"


# Starts a process that ties itself to this one, says its id, and waits for it.
PARENT = """
import subprocess, sys
tied = "import sys, time; from opkit.layers.check.child import die_with; "
tied += "die_with(int(sys.argv[1])); print('tied', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", tied, str(__import__("os").getpid())],
                         stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def lives(process: Path) -> bool:
    """Whether a process of ``/proc`` is there and no zombie."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_it_does_not_outlive_the_one_that_started_it() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert parent.stdout is not None
    tied = Path("/proc", parent.stdout.readline().strip())
    assert tied.is_dir()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while lives(tied):
        assert time.monotonic() < until, "the process lives on"
        time.sleep(0.02)


def test_one_whose_parent_has_gone_does_not_begin() -> None:
    code = "from opkit.layers.check.child import die_with; die_with(1 << 22)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment()
    )
    assert "whoever started this check has gone" in done.stderr


def test_a_wrong_command_line_is_told(tmp_path: Path) -> None:
    assert child.main([]) == EXIT_USAGE
    assert child.main([str(tmp_path / "none.json")]) == EXIT_BAD_INPUT


def test_a_configuration_that_cannot_be_read_is_left_to_the_mock(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"index_topk": 64}))
    assert child.config_of(str(tmp_path)) == {"index_topk": 64}
    assert child.config_of(str(tmp_path / "none")) == {}
    (tmp_path / "config.json").write_text("[]")
    assert child.config_of(str(tmp_path)) == {}
