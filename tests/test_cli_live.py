"""The command line on a live run: dry runs, failures that leave nothing behind, the whole path.

The engine and its nsys are fakes, and the traces are made; the processes are real.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import made_pair
import pytest
from cli_runs import PROGRAM, Ran, environment, run_main, run_program
from profile_bench import Bench, marked, script

from opkit.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED, EXIT_TOOL_MISSING

Opkit = Callable[..., Ran]

SERVERS = {
    "vllm": "vllm serve /m",
    "trtllm": "trtllm-serve /m --tp_size 2",
    "sglang": "python -m sglang.launch_server --model-path /m --tp 2",
}
HEALTH = {
    "vllm": "GET http://127.0.0.1:8000/health answers 200",
    "trtllm": "GET http://127.0.0.1:8000/health answers 200",
    "sglang": "GET http://127.0.0.1:30000/health answers 200",
}


@pytest.fixture
def dry(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    no_nsys: None,  # noqa: ARG001
) -> Callable[..., list[str]]:
    """Runs ``opkit align dsa --dry-run WORDS``; its lines, with the session's name as S."""
    monkeypatch.chdir(tmp_path)

    def lines(*words: object) -> list[str]:
        ran = run_main(capsys, monkeypatch, "align", "dsa", "--dry-run", "--out", "/out", *words)
        assert (ran.code, ran.err) == (0, "")
        text = re.sub(r"/out/align-dsa-\d{8}-\d{6}", "/out/run", ran.out)
        assert list(tmp_path.iterdir()) == []
        return re.sub(r"opkit-[0-9a-f]{8}", "S", text).splitlines()

    return lines


def commands(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("engine", list(SERVERS))
def test_dry_run_of_a_server(dry: Callable[..., list[str]], engine: str) -> None:
    lines = dry("--e2e-cmd", SERVERS[engine])
    launch, start, stop, mock = commands(lines)
    assert (
        " nsys launch --session-new=S -t cuda,nvtx --cuda-graph-trace=node "
        f"--trace-fork-before-exec=true --wait=primary {SERVERS[engine]}"
    ) in f" {launch}"
    assert start == (
        "nsys start --session=S -o /out/run/e2e --force-overwrite=true "
        "--sample=none --cpuctxsw=none"
    )
    assert stop == "nsys stop --session=S"
    assert mock.startswith(
        "nsys profile --session-new=S -t cuda,nvtx --cuda-graph-trace=node --sample=none "
        "--cpuctxsw=none --capture-range=cudaProfilerApi --capture-range-end=stop "
        "-o /out/run/mock --force-overwrite=true "
    )
    assert any(HEALTH[engine] in line for line in lines)
    assert any(line.startswith("# prime the window: POST http://127.0.0.1:") for line in lines)
    assert not any("opkit has no mock" in line for line in lines)


def test_dry_run_of_an_engine_without_a_mock_says_so(dry: Callable[..., list[str]]) -> None:
    lines = dry("--e2e-cmd", "python run.py", "--backend", "none")
    assert lines[0].startswith("# note: opkit has no mock of dsa for none yet (")


@pytest.mark.parametrize("engine", list(SERVERS))
def test_dry_run_system_wide(dry: Callable[..., list[str]], engine: str) -> None:
    words = ("--mode", "system-wide", "--delay", 90, "--duration", 30)
    lines = dry("--e2e-cmd", SERVERS[engine], *words)
    profile = commands(lines)[0]
    assert (
        "nsys profile --session-new=S -t cuda,nvtx,osrt --sample=system-wide "
        "--cpuctxsw=system-wide --cuda-graph-trace=node --trace-fork-before-exec=true "
        "--wait=primary --delay=90 --duration=30 -o /out/run/e2e --force-overwrite=true "
        f"{SERVERS[engine]}"
    ) in profile
    assert "# wait until 90 s after the start; 30 s are recorded" in lines


@pytest.mark.parametrize("engine", list(SERVERS))
def test_dry_run_per_rank(dry: Callable[..., list[str]], engine: str) -> None:
    lines = dry("--e2e-cmd", SERVERS[engine], "--mode", "per-rank", "--ranks", 2)
    mpirun, *windows = commands(lines)[:-1]
    assert re.search(r"mpirun -n 2 (-x \w+ )*nsys profile ", mpirun)
    assert "'--session-new=S-%q{OMPI_COMM_WORLD_RANK}' --start-later=true" in mpirun
    assert "-o '/out/run/rank%q{OMPI_COMM_WORLD_RANK}'" in mpirun
    assert SERVERS[engine] in mpirun
    assert windows == [
        "nsys start --session=S-0",
        "nsys start --session=S-1",
        "nsys stop --session=S-0",
        "nsys stop --session=S-1",
    ]
    results = [line for line in lines if line.startswith("# result: /out/run/rank")]
    assert results == [f"# result: /out/run/rank{rank}.nsys-rep" for rank in range(2)]


def test_dry_run_of_a_program(dry: Callable[..., list[str]]) -> None:
    profile, _ = commands(dry("--e2e-cmd", "python run_model.py"))
    assert profile == (
        "nsys profile --session-new=S -t cuda,nvtx --cuda-graph-trace=node "
        "--trace-fork-before-exec=true --sample=none --cpuctxsw=none "
        "-o /out/run/e2e --force-overwrite=true python run_model.py &"
    )


def test_dry_run_from_process_start(dry: Callable[..., list[str]]) -> None:
    profile, stop, _ = commands(dry("--e2e-cmd", SERVERS["vllm"], "--window", "process"))
    assert " nsys profile --sample=none --cpuctxsw=none -o /out/run/e2e " in profile
    assert stop == "nsys stop --session=S"


def test_dry_run_names_the_strict_mock(dry: Callable[..., list[str]]) -> None:
    lines = dry("--e2e-cmd", SERVERS["vllm"], "--strict")
    assert commands(lines)[-1].endswith("/out/run/strict.plan.json &")


def test_dry_run_on_files_runs_nothing(dry: Callable[..., list[str]]) -> None:
    lines = dry("--mock-trace", "m.sqlite", "--e2e-trace", "e.sqlite")
    assert lines == ["# read m.sqlite", "# read e.sqlite", "# nothing is run"]


# Failures of a live run. The fixture ``bench`` checks that no process is left.


@pytest.fixture
def live(bench: Bench, fake_nsys: Path) -> Callable[..., Ran]:
    """Runs ``opkit align dsa --e2e-cmd COMMAND WORDS`` as a program, with a fake nsys."""
    assert fake_nsys.is_file()

    def run(command: str, *words: object) -> Ran:
        given = ("--out", bench.out, "--requests", "1x8+2", *words)
        return run_program("align", "dsa", "--e2e-cmd", command, *given, cwd=bench.root)

    return run


def test_server_command_that_does_not_exist(live: Callable[..., Ran], bench: Bench) -> None:
    ran = live(f"/nowhere/vllm serve {bench.model}")
    assert ran.complaint() == "/nowhere/vllm: no such program"
    assert ran.code == EXIT_TOOL_MISSING


def test_server_that_dies_at_once(
    live: Callable[..., Ran], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "die")
    ran = live(bench.command())
    assert ran.complaint() == "the server ended with code 1 (before it was ready)"
    assert ran.said()[-1] == "  RuntimeError: CUDA out of memory"
    assert ran.code == EXIT_RUN_FAILED


def test_server_that_never_becomes_healthy(
    live: Callable[..., Ran], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "never,worker")
    ran = live(bench.command(), "--ready-limit", 2)
    complaint = ran.complaint()
    assert complaint.startswith("the server was not ready after 2 s: GET http://127.0.0.1:")
    assert complaint.endswith("/health: 503")
    assert ran.said()[-1] == "  engine starting"
    assert ran.code == EXIT_RUN_FAILED


def test_no_nsys(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bench: Bench,
    no_nsys: None,  # noqa: ARG001
) -> None:
    words = ("align", "dsa", "--out", bench.out, "--e2e-cmd", bench.command())
    ran = run_main(capsys, monkeypatch, *words)
    assert "nsys was not found on PATH" in ran.complaint()
    assert any("install NVIDIA Nsight Systems" in line for line in ran.said())
    assert ran.code == EXIT_TOOL_MISSING


def test_recording_that_cannot_be_read(
    live: Callable[..., Ran], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NSYS", "noreport")
    ran = live(bench.command())
    assert "nsys left no usable report" in ran.complaint()
    assert ran.code == EXIT_RUN_FAILED


@contextmanager
def at_work(bench: Bench, background: bool = False) -> Iterator[subprocess.Popen[str]]:
    """opkit in the middle of a run, its server busy with a request that takes a minute."""

    def deaf() -> None:  # as a shell starts a background job, and nohup what it runs
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def listening() -> None:  # whatever the tests themselves were started as
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    words = ["--e2e-cmd", bench.command(), "--out", str(bench.out), "--requests", "1x8+2"]
    child = subprocess.Popen(
        [*PROGRAM, "align", "dsa", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=bench.root,
        env=environment(), start_new_session=True, preexec_fn=deaf if background else listening,
    )  # fmt: skip
    try:
        until = time.monotonic() + 20
        while not bench.sent():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert any("time.sleep(120)" in line for line in marked(bench.mark))
        yield child
    finally:
        child.kill()
        child.wait()


def assert_interrupted(child: subprocess.Popen[str], bench: Bench) -> None:
    out, err = child.communicate(timeout=20)  # polite ways take 30 s where they are not heard
    ran = Ran(child.returncode, out, err)
    assert ran.complaint() == "interrupted; everything that was started has been ended"
    assert ran.code == EXIT_INTERRUPTED
    assert marked(bench.mark) == []


@pytest.mark.usefixtures("fake_nsys")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_the_middle_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "slow,worker")
    with at_work(bench) as child:
        os.kill(child.pid, number)
        assert_interrupted(child, bench)


@pytest.mark.usefixtures("fake_nsys")
def test_in_the_background_a_hangup_is_ignored_and_an_interrupt_heard(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "slow,worker")
    with at_work(bench, background=True) as child:
        os.kill(child.pid, signal.SIGHUP)
        time.sleep(0.5)
        assert child.poll() is None
        os.kill(child.pid, signal.SIGINT)
        assert_interrupted(child, bench)


FRAMEWORK = """
import json, os, sys
plan = json.load(open(sys.argv[-1]))
assert sys.argv[1:3] == ["-m", "opkit.layers.drive"], sys.argv
open(os.environ["FAKE_REQUESTS"] + ".plan", "w").write(json.dumps(plan))
open(plan["manifest"], "w").write(os.environ["FAKE_MANIFEST"])
"""


@pytest.fixture
def framework(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that "runs" the mock, and the exports of both sides."""
    exports = bench.root / "exports"
    exports.mkdir()
    for name, made in (("mock", made_pair.mock()), ("e2e", made_pair.engine())):
        db = sqlite3.connect(made.write(exports / f"{name}.sqlite"))
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


WAVES = [word for wave in made_pair.WAVES for word in ("--requests", "{}x{}+{}".format(*wave))]


@pytest.mark.usefixtures("fake_nsys")
def test_from_a_command_to_a_verdict(bench: Bench, framework: Path) -> None:
    words = ("--out", bench.out, *WAVES, "--python", framework)
    ran = run_program("align", "dsa", "--e2e-cmd", bench.command(), *words, cwd=bench.root)

    assert ran.code == 0, ran.err
    assert " PASS " in ran.out
    (folder,) = bench.out.glob("align-dsa-*")
    made = {path.name for path in folder.iterdir()}
    assert {"e2e.nsys-rep", "e2e.sqlite", "e2e.opkit.json", "e2e.log", "mock.plan.json",
            "mock.nsys-rep", "mock.sqlite", "mock.opkit.json", "result.json"} <= made  # fmt: skip
    assert json.loads((folder / "result.json").read_text())["verdict"] == "pass"
    plan = json.loads(Path(f"{bench.root / 'requests'}.plan").read_text())
    shapes = [(c["phase"], c["batch"], c["tokens"], c["mode"]) for c in plan["cases"]]
    assert shapes == [
        ("context", 1, 1024, "eager"),
        ("context", 4, 512, "eager"),
        ("generation", 1, 1, "graph"),
        ("generation", 4, 1, "graph"),
    ]
    # Decode steps of the mock run the tokens that the server answered.
    assert [(a["prompt"], a["tokens"]) for a in plan["answers"]] == [
        (1024, ["0 1 2 3 4 5"]),
        (512, [" ".join(str(100 * n + i) for i in range(6)) for n in range(4)]),
    ]
    steps = [re.sub(r"^ *\d+\.\d s  ", "", line) for line in ran.err.splitlines()]
    wanted = ["start the server under nsys", "switch step labels on", "open the window",
              "prime the window: 1x16+2", "wave 1x1024+6", "wave 4x512+6", "ending the server",
              "exporting e2e.nsys-rep", "run the mock under nsys", "judging"]  # fmt: skip
    assert [step for step in steps if step in wanted] == wanted
    status = run_program("status", "--out", bench.out, cwd=bench.root)
    assert status.out.count("✓ pass") == 2


@pytest.mark.usefixtures("fake_nsys")
def test_mock_that_fails_is_told(
    bench: Bench, framework: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAKE_MANIFEST")
    words = ("--out", bench.out, *WAVES, "--python", framework)
    ran = run_program("align", "dsa", "--e2e-cmd", bench.command(), *words, cwd=bench.root)
    assert ran.complaint().startswith("run the mock under nsys: ended with code 1")
    assert "KeyError: 'FAKE_MANIFEST'" in ran.said()[-1]
    assert ran.code == EXIT_RUN_FAILED
