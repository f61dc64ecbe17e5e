"""``opkit align --e2e-trace`` alone: the engine's side as recorded, only the mock is run.

The processes are real; nsys, server and framework are fakes, and the traces are made.
"""

from __future__ import annotations

import json
import shlex
import sqlite3
from pathlib import Path
from typing import Any

import made_pair
import pytest
from cli_runs import Ran, run_main, run_program
from profile_bench import Bench, script

from opkit.errors import EXIT_BAD_INPUT, EXIT_RUN_FAILED, EXIT_TOOL_MISSING, EXIT_USAGE
from opkit.layers.captured import CaptureInfo

FRAMEWORK = """
import json, os, sys
plan = json.load(open(sys.argv[-1]))
assert sys.argv[1:3] == ["-m", "opkit.layers.drive"], sys.argv
with open(os.environ["FAKE_REQUESTS"] + ".plans", "a") as plans:
    plans.write(json.dumps(plan) + "\\n")
open(plan["manifest"], "w").write(os.environ["FAKE_MANIFEST"])
"""
WAVES = [dict(zip(("requests", "prompt", "output"), w, strict=True)) for w in made_pair.WAVES]
FLAGS = "--max-model-len 8192 --compilation-config '{\"mode\": 0}'"


def recording(path: Path, command: str, **changes: Any) -> Path:
    """An engine's export whose manifest tells its command; empty: none."""
    said = {"waves": WAVES, "command": shlex.split(command), **changes}
    made = made_pair.engine().write(path)
    db = sqlite3.connect(made)
    with db:
        text = made_pair.manifest("e2e", **said)
        db.execute("UPDATE OPKIT_MANIFEST SET value = ? WHERE key = 'manifest'", (text,))
    db.close()
    return made


@pytest.fixture
def python(bench: Bench, fake_nsys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that "runs" the mock under the fake nsys."""
    assert fake_nsys.is_file()
    exports = bench.root / "exports"
    exports.mkdir()
    for name in ("mock", "strict"):
        variants = ("mock",) if name == "mock" else ("strict",)
        db = sqlite3.connect(made_pair.mock(variants=variants).write(exports / f"{name}.sqlite"))
        with db:  # nsys exports none: it comes from the sidecar
            db.execute("DROP TABLE OPKIT_MANIFEST")
        db.close()
    said = made_pair.manifest("mock", op="dsa", operands=[made_pair.OPERAND])
    monkeypatch.setenv("FAKE_EXPORTS", str(exports))
    monkeypatch.setenv("FAKE_MANIFEST", said)
    source = bench.root / "framework.py"
    source.write_text(FRAMEWORK)
    script(source, bench.root / "bin" / "python-with-vllm")
    return bench.root / "bin" / "python-with-vllm"


@pytest.fixture
def trace(bench: Bench) -> Path:
    """The recording of the bench's own server."""
    return recording(bench.root / "e2e.sqlite", bench.command(FLAGS))


def align(bench: Bench, *words: object) -> Ran:
    return run_program("align", "dsa", "--out", bench.out, *words, cwd=bench.root)


def plans(bench: Bench) -> list[dict[str, Any]]:
    """The mocks' plans, in the order they were run."""
    log = bench.root / "requests.plans"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def folder_of(bench: Bench) -> Path:
    (found,) = bench.out.glob("align-dsa-*")
    return found


def test_only_the_mock_is_run_at_the_recorded_shapes(
    bench: Bench, python: Path, trace: Path
) -> None:
    ran = align(bench, "--e2e-trace", trace, "--python", python)
    assert ran.code == 0, ran.err
    assert " PASS " in ran.out
    assert bench.sent() == []  # no server was asked for anything
    (plan,) = plans(bench)
    shapes = [(c["phase"], c["batch"], c["tokens"], c["past"], c["mode"]) for c in plan["cases"]]
    assert shapes == [
        ("context", 1, 1024, 0, "eager"),
        ("context", 4, 512, 0, "eager"),
        ("generation", 1, 1, 1026, "graph"),
        ("generation", 4, 1, 514, "graph"),
    ]
    assert (plan["backend"], plan["model"]) == ("vllm", str(bench.model))
    assert plan["engine_args"] == shlex.split(FLAGS)  # the recorded server's, without its port
    assert (plan["inputs"], plan["captured"], plan["layer"]) == ("tokens", "", 0)
    made = {path.name for path in folder_of(bench).iterdir()}
    assert made >= {"mock.plan.json", "mock.nsys-rep", "mock.sqlite", "result.json"}
    assert not any(name.startswith("e2e") for name in made)
    status = run_program("status", "--out", bench.out, cwd=bench.root)
    assert status.out.count("✓ pass") == 2


def test_the_result_is_kept_beside_the_mock(bench: Bench, python: Path, trace: Path) -> None:
    ran = align(bench, "--e2e-trace", trace, "--python", python, "--json")
    assert json.loads(ran.out) == json.loads((folder_of(bench) / "result.json").read_text())
    assert json.loads(ran.out)["verdict"] == "pass"


def test_strict_and_phase_are_heard(bench: Bench, python: Path, trace: Path) -> None:
    words = ("--strict", "--phase", "generation", "--layer", 2, "--seed", 5)
    ran = align(bench, "--e2e-trace", trace, "--python", python, *words)
    assert ran.code == 0, ran.err
    mock, strict = plans(bench)
    assert (mock["strict"], strict["strict"]) == (False, True)
    for plan in (mock, strict):
        assert {case["phase"] for case in plan["cases"]} == {"generation"}
        assert (plan["layer"], plan["seed"]) == (2, 5)


def test_captured_inputs_are_given_to_the_mock(bench: Bench, python: Path, trace: Path) -> None:
    folder = bench.root / "stored"
    folder.mkdir()
    CaptureInfo("dsa", "vllm", 0, 0, lengths={"512-0": 512}).write(folder)
    words = ("--inputs", "captured", "--captured", folder.name)
    ran = align(bench, "--e2e-trace", trace, "--python", python, *words)
    assert ran.code == 0, ran.err
    assert bench.sent() == []  # they are there already
    (plan,) = plans(bench)
    assert (plan["inputs"], plan["captured"]) == ("captured", str(folder))


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (None, "no readable capture"),
        (CaptureInfo("mla", "vllm", 0, 0, lengths={"512-0": 512}), "captured for mla on vllm"),
        (CaptureInfo("dsa", "vllm", 0, 0), "holds no inputs"),
    ],
)
def test_a_wrong_capture_is_refused_before_anything_runs(
    bench: Bench, python: Path, trace: Path, info: CaptureInfo | None, said: str
) -> None:
    folder = bench.root / "stored"
    folder.mkdir()
    if info is not None:
        info.write(folder)
    words = ("--inputs", "captured", "--captured", folder.name)
    ran = align(bench, "--e2e-trace", trace, "--python", python, *words)
    assert ran.code == EXIT_BAD_INPUT
    assert said in ran.err
    assert "run the mock" not in ran.err


def test_variables_before_the_command_are_the_mocks_too(bench: Bench) -> None:
    ran = align(bench, "--e2e-cmd", f"CHOSEN=backend {bench.command()}", "--dry-run")
    assert ran.code == 0, ran.err
    mock = next(line for line in ran.out.splitlines() if "opkit.layers.drive" in line)
    assert "CHOSEN=backend" in mock


def test_inputs_are_captured_from_the_recorded_requests(
    bench: Bench, python: Path, trace: Path
) -> None:
    words = ("--inputs", "captured", "--layer", 3)
    ran = align(bench, "--e2e-trace", trace, "--python", python, *words)
    assert ran.code == 0, ran.err
    start, *waves, _ = bench.sent()
    assert json.loads(*start["args"])["layer"] == 3
    assert [(len(w["prompt"]), len(w["prompt"][0]), w["max_tokens"]) for w in waves] == list(
        made_pair.WAVES
    )
    (plan,) = plans(bench)
    folder = folder_of(bench) / "captured"
    assert (plan["inputs"], plan["captured"], plan["layer"]) == ("captured", str(folder), 3)
    assert (folder / "capture.json").is_file()


def test_requests_that_were_given_go_before_the_recorded(
    bench: Bench, python: Path, trace: Path
) -> None:
    words = ("--inputs", "captured", "--requests", "2x16+3")
    ran = align(bench, "--e2e-trace", trace, "--python", python, *words)
    assert ran.code == 0, ran.err
    (wave,) = bench.sent()[1:-1]
    assert (len(wave["prompt"]), wave["max_tokens"]) == (2, 3)


def test_a_capture_that_fails_is_told(
    bench: Bench, python: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "norpc")
    ran = align(bench, "--e2e-trace", trace, "--python", python, "--inputs", "captured")
    assert ran.complaint().startswith("store the op's inputs from here on: POST http://127.0.0.1:")
    assert ran.code == EXIT_RUN_FAILED
    assert plans(bench) == []


def test_a_mock_that_fails_is_told(
    bench: Bench, python: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAKE_MANIFEST")
    ran = align(bench, "--e2e-trace", trace, "--python", python)
    assert ran.complaint().startswith("run the mock under nsys: ended with code 1")
    assert ran.code == EXIT_RUN_FAILED


# What cannot be done is one sentence, before anything is run.


@pytest.mark.parametrize(
    ("changes", "command", "says"),
    [
        ({}, "", "does not say which command it was recorded from, so no mock can be built"),
        ({"waves": []}, "vllm serve {model}", "the engine's step labels do not add up"),
    ],
)
def test_a_recording_that_tells_too_little_is_refused(
    bench: Bench, python: Path, changes: dict[str, Any], command: str, says: str
) -> None:
    given = recording(bench.root / "e.sqlite", command.format(model=bench.model), **changes)
    ran = align(bench, "--e2e-trace", given, "--python", python)
    assert says in ran.complaint()
    assert ran.code == EXIT_BAD_INPUT
    assert plans(bench) == []


def test_a_model_that_is_not_here_is_asked_for(bench: Bench, python: Path) -> None:
    given = recording(bench.root / "e.sqlite", "vllm serve /not/here")
    ran = align(bench, "--e2e-trace", given, "--python", python)
    assert ran.complaint() == "the model's folder is not known"
    assert ran.said()[-1] == "  give it with --model"
    assert ran.code == EXIT_BAD_INPUT
    there = align(bench, "--e2e-trace", given, "--python", python, "--model", bench.model)
    assert there.code == 0, there.err
    assert plans(bench)[0]["model"] == str(bench.model)


def test_a_recording_that_is_not_there(bench: Bench, python: Path) -> None:
    ran = align(bench, "--e2e-trace", "none.sqlite", "--python", python)
    assert "none.sqlite" in ran.complaint()
    assert ran.code == EXIT_BAD_INPUT


def test_an_engine_without_a_mock_is_refused(bench: Bench, python: Path) -> None:
    command = f"python run.py {bench.model}"
    given = recording(bench.root / "e.sqlite", command)
    words = ("--e2e-trace", given, "--python", python, "--backend", "mlx")
    ran = align(bench, *words)
    assert "mlx" in ran.complaint()
    assert ran.code == EXIT_BAD_INPUT


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--e2e-cmd", "vllm serve m"), "exclude each other"),
        (("--recorded",), "exclude each other"),
        (("--strict-trace", "s.sqlite"), "--mock-trace is compared with an --e2e-trace"),
        (("--regions", "sequence"), "--regions is for trace files"),
        (("--captured", "stored"), "--captured is for --inputs captured"),
        (("--inputs", "tokens", "--captured", "stored"), "--captured is for --inputs captured"),
    ],
)
def test_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trace: Path,
    words: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(trace.parent)
    ran = run_main(capsys, monkeypatch, "align", "dsa", "--e2e-trace", trace, *words)
    assert says in ran.complaint()
    assert ran.code == EXIT_USAGE


@pytest.mark.parametrize("words", [("--inputs", "ones"), ("--layer", "-1"), ("--layer", "x")])
def test_options_of_no_such_value(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trace: Path,
    words: tuple[str, ...],
) -> None:
    ran = run_main(capsys, monkeypatch, "align", "dsa", "--e2e-trace", trace, *words)
    assert words[1] in ran.err
    assert ran.code == EXIT_USAGE


@pytest.mark.usefixtures("no_nsys")
def test_a_dry_run_reads_the_recording_and_prints_the_mock(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trace: Path,
    bench: Bench,
) -> None:
    words = ("--dry-run", "--out", bench.out, "--e2e-trace", trace)
    ran = run_main(capsys, monkeypatch, "align", "dsa", *words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[:2] == ["# 1. the serving engine", f"# read {trace}"]
    (mock,) = (line for line in ran.out.splitlines() if line and not line.startswith("#"))
    assert mock.startswith("nsys profile ")
    assert not bench.out.exists()


@pytest.mark.usefixtures("no_nsys")
def test_a_dry_run_shows_the_run_that_captures(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trace: Path,
    bench: Bench,
) -> None:
    words = ("--dry-run", "--out", bench.out, "--e2e-trace", trace, "--inputs", "captured")
    ran = run_main(capsys, monkeypatch, "align", "dsa", *words)
    assert (ran.code, ran.err) == (0, "")
    assert "# then the engine again, to store the op's inputs" in ran.out.splitlines()
    assert "--worker-extension-cls" in ran.out
    assert "1x1024+6, 4x512+6" in ran.out


@pytest.mark.usefixtures("no_nsys")
def test_without_nsys_no_mock_is_run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trace: Path,
    bench: Bench,
) -> None:
    words = ("--out", bench.out, "--e2e-trace", trace)
    ran = run_main(capsys, monkeypatch, "align", "dsa", *words)
    assert "nsys was not found" in ran.complaint()
    assert ran.code == EXIT_TOOL_MISSING
