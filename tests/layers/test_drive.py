"""The mock process: what it runs, what it writes, and how it fails, without torch or a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from opkit.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_TOOL_MISSING,
    EXIT_USAGE,
)
from opkit.layers import drive, nvtx, progress
from opkit.layers.manifest import Manifest, Operand, manifest_from_json
from opkit.layers.op import AnyCase, GemmCase, LaunchMode, MoeCase, Phase, parse_mock_range
from opkit.layers.plan import Plan, PlannedCase


class Recorder:
    """Stands in for torch and for the mock; remembers what happened, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        note = self.events.append
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            synchronize=lambda: note("wait"),
            profiler=SimpleNamespace(start=lambda: note("start"), stop=lambda: note("stop")),
            nvtx=SimpleNamespace(range_push=note, range_pop=lambda: note("pop")),
            current_device=lambda: 0,
            get_device_properties=lambda _: SimpleNamespace(L2_cache_size=50),
        )
        self.float32 = "float32"

    def zeros(self, elements: int, **_: str) -> SimpleNamespace:
        return SimpleNamespace(sum=lambda: self.events.append(f"sweep {4 * elements} bytes"))

    def prepare(self, planned: PlannedCase) -> Callable[[], None]:
        self.events.append(f"prepare {planned.case.label()}")
        return lambda: self.events.append("forward")

    def operands(self, planned: PlannedCase) -> tuple[Operand, ...]:
        weight = Operand("o_proj.weight", (8, 8), "bfloat16", 0.5, 0.0, 0.0)
        kind = getattr(planned.case, "phase", planned.case.label())
        return (weight, replace(weight, name=f"{kind} o_proj.input"))

    def describe(self) -> Manifest:
        return Manifest(side="mock", op="dsa", backend="vllm", recipe={"weights": "dummy"})

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def plan(dsa_plan: Plan, tmp_path: Path) -> Plan:
    manifest = str(tmp_path / "mock.opkit.json")
    return replace(dsa_plan, manifest=manifest, warmup=1, iterations=2, context_pause_ms=0)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(drive, "build_mock", lambda *_: recorder)
    monkeypatch.setattr(drive, "_torch", lambda: recorder)
    return recorder


def test_every_iteration_is_one_forward_in_one_range(plan: Plan, recorder: Recorder) -> None:
    drive.drive(plan)
    window = recorder.events[recorder.events.index("start") + 1 : recorder.events.index("stop")]
    found = [(i, parse_mock_range(text)) for i, text in enumerate(window)]
    ranges = [(i, marked) for i, marked in found if marked is not None]
    assert [(r.case, r.mode, r.iteration, r.variant) for _, r in ranges] == [
        (planned.case, planned.mode, iteration, "strict")
        for planned in plan.cases
        for iteration in range(2)
    ]
    assert all(window[i + 1 : i + 4] == ["forward", "pop", "wait"] for i, _ in ranges)
    assert window.count("forward") == len(plan.cases) * 3  # one to warm up, two measured


def test_l2_is_swept_before_each_iteration_and_outside_its_range(
    plan: Plan, recorder: Recorder
) -> None:
    drive.drive(plan)
    pushes = [i for i, text in enumerate(recorder.events) if parse_mock_range(text)]
    assert {recorder.events[i - 1] for i in pushes} == {"sweep 100 bytes"}  # twice the cache


def test_l2_is_left_alone_when_asked(plan: Plan, recorder: Recorder) -> None:
    drive.drive(replace(plan, l2="left"))
    assert not [text for text in recorder.events if text.startswith("sweep")]


def test_every_case_runs_once_before_the_window(plan: Plan, recorder: Recorder) -> None:
    drive.drive(plan)
    before = recorder.events[: recorder.events.index("start")]
    assert before.count("forward") == len(plan.cases)


def test_the_manifest_says_operands_and_pacing(plan: Plan, recorder: Recorder) -> None:
    drive.drive(plan)
    assert recorder.events[-2:] == ["stop", "close"]
    manifest = manifest_from_json(Path(plan.manifest).read_text(), "manifest")
    names = [operand.name for operand in manifest.operands]
    assert names == [
        "o_proj.weight",
        f"{Phase.CONTEXT} o_proj.input",
        f"{Phase.GENERATION} o_proj.input",
    ]
    assert manifest.recipe["weights"] == "dummy"
    assert "2 measured iterations" in manifest.recipe["pacing"]


@pytest.mark.parametrize(
    ("cases", "kinds"),
    [
        ((MoeCase(64), MoeCase(32), MoeCase(64, "power_law_1.2")),
         ["64 balanced", "64 power_law_1.2"]),
        ((GemmCase(8, 16, 32), GemmCase(4, 16, 32, "float8_e4m3fn")),
         ["8 × 16 × 32 bfloat16", "4 × 16 × 32 float8_e4m3fn"]),
    ],
)  # fmt: skip
def test_cases_without_a_phase_run_like_others(
    plan: Plan, recorder: Recorder, cases: tuple[AnyCase, ...], kinds: list[str]
) -> None:
    planned = tuple(PlannedCase(case, LaunchMode.EAGER) for case in cases)
    drive.drive(replace(plan, cases=planned))
    ranges = [found for text in recorder.events if (found := parse_mock_range(text))]
    assert [found.case for found in ranges] == [case for case in cases for _ in range(2)]
    operands = manifest_from_json(Path(plan.manifest).read_text(), "manifest").operands
    assert [operand.name for operand in operands[1:]] == [f"{kind} o_proj.input" for kind in kinds]


def test_on_a_cpu_nothing_is_asked_of_cuda(
    plan: Plan, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.cuda = SimpleNamespace(is_available=lambda: False)  # all else would be missing
    ranges = SimpleNamespace(
        push_range=recorder.events.append, pop_range=lambda: recorder.events.append("pop")
    )
    monkeypatch.setitem(sys.modules, "nvtx", ranges)
    monkeypatch.setattr(nvtx, "nvtx_version", lambda: "0.2.11")
    drive.drive(plan)
    found = [text for text in recorder.events if parse_mock_range(text)]
    assert len(found) == len(plan.cases) * plan.iterations
    assert not {"wait", "start", "stop"} & set(recorder.events)
    first = recorder.events.index(found[0])
    assert recorder.events[first : first + 3] == [found[0], "forward", "pop"]
    assert recorder.events[:first].count("forward") == len(plan.cases) + plan.warmup


def test_ranges_that_nsys_would_lose_end_the_process(
    plan: Plan, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recorder.cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(nvtx, "nvtx_version", lambda: "0.2.17")
    monkeypatch.setenv(nvtx.NSYS_VERSION, "2024.2.3.38-242334140272v0")
    code = drive.run(lambda: drive.drive(plan), tmp_path / "trace.txt")
    assert code == EXIT_TOOL_MISSING
    assert "forward" not in recorder.events
    assert "pip install 'nvtx<=0.2.11'" in capsys.readouterr().err


def test_what_a_mock_says_while_it_is_built_is_shown(
    plan: Plan,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(*_: object) -> Recorder:
        progress.say("compiling kernels")
        return recorder

    monkeypatch.setattr(progress, "_told", [])
    monkeypatch.setattr(drive, "build_mock", build)
    drive.drive(plan)
    assert "opkit drive: compiling kernels\n" in capsys.readouterr().err


def test_a_missing_folder_is_found_before_the_mock_is_built(
    plan: Plan, recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = replace(plan, manifest=str(tmp_path / "none" / "m.json"))
    code = drive.run(lambda: drive.drive(lost), tmp_path / "trace.txt")
    assert code == EXIT_BAD_INPUT
    assert "no such folder" in capsys.readouterr().err
    assert recorder.events == []


def test_a_crash_is_one_sentence_and_keeps_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> None:
        raise ValueError("bad kernel\nwith a long story")

    trace = tmp_path / "trace.txt"
    assert drive.run(crash, trace) == EXIT_RUN_FAILED
    told = capsys.readouterr().err
    assert "the mock failed: ValueError: bad kernel\n" in told
    assert "Traceback" not in told
    assert str(trace) in told
    assert "with a long story" in trace.read_text()


def test_an_interrupt_has_its_own_code(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert drive.run(interrupt, tmp_path / "trace.txt") == EXIT_INTERRUPTED


def test_a_wrong_command_line_is_told() -> None:
    assert drive.main([]) == EXIT_USAGE
    assert drive.main(["/no/such/plan.json"]) == EXIT_BAD_INPUT


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_the_framework_the_process_says_so(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.write(path)
    command = [sys.executable, "-m", "opkit.layers.drive", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_TOOL_MISSING
    assert done.stdout == ""
    assert "needs vllm, which cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in drive.traceback_file(plan).read_text()


def test_importing_layers_needs_no_framework() -> None:
    code = "import opkit.layers.drive, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
