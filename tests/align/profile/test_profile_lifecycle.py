"""The server under nsys: waited for, asked, recorded and ended, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from profile_bench import PATIENT, VOCAB, Bench, marked, needs_nsys, script

import opkit
from opkit.align.profile.e2e import Collect, E2ERequest, Mode, plan_e2e, run_e2e
from opkit.align.profile.perform import _starting
from opkit.align.profile.plan import Command
from opkit.align.profile.process import Launch
from opkit.errors import BadInput, RunFailed, ToolMissing
from opkit.layers.manifest import Answer, Manifest, Wave, manifest_from_json, sidecar_of
from opkit.layers.prompts import prompt_tokens
from opkit.nsys_parsers.tool import export_sqlite

WAVES = (Wave(1, 8, 2), Wave(3, 5, 2))


def request_for(bench: Bench, **changes: Any) -> E2ERequest:
    return replace(
        E2ERequest(bench.command(), bench.out, op="dsa", waves=WAVES, warmup=1, seed=7), **changes
    )


def run(request: E2ERequest, said: list[str] | None = None) -> list[Path]:
    heard: list[str] = [] if said is None else said
    return run_e2e(plan_e2e(request), heard.append, PATIENT)


def manifest_of(report: Path) -> Manifest:
    path = sidecar_of(report)
    return manifest_from_json(path.read_text(), str(path))


@pytest.mark.usefixtures("either_nsys")
def test_server_is_recorded_and_says_what_it_ran(bench: Bench) -> None:
    said: list[str] = []
    (report,) = run(request_for(bench), said)
    assert report.name == "e2e.nsys-rep"
    assert report.stat().st_size > 0
    manifest = manifest_of(report)
    assert (manifest.side, manifest.op, manifest.backend) == ("e2e", "dsa", "vllm")
    assert manifest.waves == WAVES
    answered = [((0, 1),), ((0, 1), (100, 101), (200, 201))]
    assert manifest.answers == tuple(map(Answer, (8, 5), answered))
    assert manifest.versions["vllm"] == "1.2.3"
    assert manifest.versions["nsys"]
    assert manifest.model["architecture"] == "TinyForCausalLM"
    assert [note for note in manifest.notes if "waves sent" in note] == [
        next(line for line in said if line.startswith("warm-up: 2 waves sent 1 times"))
    ]
    assert [line for line in said if line.startswith("prime")] == ["prime the window: 1x16+2"]
    assert not any("1x16+2" in note or "prime" in note for note in manifest.notes)
    assert any(line.startswith("the server was ready after") for line in said)
    assert not any("SIGKILL" in note for note in manifest.notes)
    assert "engine ended politely" in (bench.out / "e2e.log").read_text()


@needs_nsys
@pytest.mark.parametrize("window", list(Collect))
def test_recording_exports_with_labels_and_manifest(
    bench: Bench, window: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvtx = pytest.importorskip("nvtx", reason="the fake server records ranges with nvtx")
    assert nvtx
    # nsys opens the window in the program a little later: not after the request that primes it.
    monkeypatch.setenv("FAKE_SERVER", "unhurried")
    (report,) = run(request_for(bench, window=window))
    export = export_sqlite(report)
    with closing(sqlite3.connect(export)) as database:
        labels = database.execute(
            "SELECT COALESCE(text, value) FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId "
            "WHERE text LIKE 'execute%' OR value LIKE 'execute%' ORDER BY start"
        ).fetchall()
        (key, value) = database.execute("SELECT key, value FROM OPKIT_MANIFEST").fetchone()
    recorded = [
        ("execute_context_1(8)_generation_0(0)",),
        ("execute_context_3(15)_generation_0(0)",),
    ]
    # The warm-up is not labelled; the request that primes a window is, unless nsys lost it.
    assert labels[-2:] == recorded
    primed = [("execute_context_1(16)_generation_0(0)",)]
    assert labels[:-2] in ([], primed if window is Collect.WAVES else [])
    assert key == "manifest"
    assert manifest_from_json(value, "export") == manifest_of(report)


@pytest.mark.usefixtures("fake_nsys")
def test_requests_are_as_promised(bench: Bench) -> None:
    run(request_for(bench))
    paths = [body["path"] for body in bench.sent()]
    completions = "/v1/completions"
    assert paths == [completions, completions, "/start_profile", *[completions] * 3]
    sent = [body for body in bench.sent() if body["path"] == completions]
    shapes = [(len(body["prompt"]), len(body["prompt"][0]), body["max_tokens"]) for body in sent]
    assert shapes == [(1, 8, 2), (3, 5, 2), (1, 16, 2), (1, 8, 2), (3, 5, 2)]
    recorded = sent[4]
    assert recorded["prompt"] == [prompt_tokens(7, index, 5, VOCAB) for index in range(3)]
    assert recorded["prompt"] != sent[1]["prompt"]  # a prefix cache must not have seen them
    assert recorded["model"] == "tiny"
    assert recorded["ignore_eos"] is True
    assert recorded["min_tokens"] == 2


@pytest.mark.usefixtures("either_nsys")
def test_server_that_dies_shows_its_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "die")
    with pytest.raises(RunFailed, match="ended with code 1") as caught:
        run(request_for(bench))
    assert "CUDA out of memory" in (caught.value.hint or "")


@pytest.mark.usefixtures("fake_nsys")
def test_server_that_dies_names_the_cause_in_one_sentence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "raise")
    cause = r"ended with code 1 \(.*\): ValueError: no valid attention backend for head_size 7"
    with pytest.raises(RunFailed, match=cause) as caught:
        run(request_for(bench))
    assert "\nloading weights\n" in (caught.value.hint or "")  # without the colours


@pytest.mark.usefixtures("fake_nsys")
def test_server_that_is_never_ready_meets_the_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "never,worker")
    said: list[str] = []
    with pytest.raises(
        RunFailed, match=r"not ready after [01] s: GET http://.*/health: 503"
    ) as caught:
        run(request_for(bench, ready_limit_s=0.5), said)
    assert "engine starting" in (caught.value.hint or "")
    waited = [line for line in said if line.startswith("waiting for http")]
    assert 1 <= len(waited) <= 2  # not one line a poll


@pytest.mark.parametrize(
    ("status", "log", "state"),
    [
        (503, "engine starting", " (it answers 503)"),
        (0, "", " (it is silent)"),
        (0, "old\nLoading weights: 20 %\rLoading weights: 40 %", ": Loading weights: 40 %"),
        (0, "\x1b[36mINFO\x1b[0m " + "x" * 200, ": INFO " + "x" * 95 + "…"),
    ],
)
def test_a_server_that_starts_is_heard(tmp_path: Path, status: int, log: str, state: str) -> None:
    launch = Launch(Command(("true",), "serve"), tmp_path / "e2e.log", None, ())
    launch.log.write_text(log)
    assert _starting(launch, status) == state


@pytest.mark.usefixtures("fake_nsys")
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("refuse", "wave 1x8\\+2: POST .* answered 500: .*EngineCore encountered an issue"),
        ("short", "wave 1x8\\+2: 1 output tokens came back instead of 2"),
    ],
)
def test_wave_that_fails_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, sentence: str
) -> None:
    monkeypatch.setenv("FAKE_SERVER", how)
    with pytest.raises(RunFailed, match=sentence):
        run(request_for(bench))


@pytest.mark.usefixtures("fake_nsys")
def test_server_that_labels_no_steps_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "nolabels")
    with pytest.raises(
        RunFailed, match=r"switch step labels on: POST .*/start_profile answered 404"
    ) as caught:
        run(request_for(bench))
    assert "engine starting" in (caught.value.hint or "")


@pytest.mark.usefixtures("either_nsys")
def test_stubborn_server_is_killed_and_that_is_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "stubborn,worker")
    grace = replace(PATIENT, interrupt_s=0.3, terminate_s=0.3)
    (report,) = run_e2e(plan_e2e(request_for(bench)), lambda _: None, grace)
    assert any("SIGKILL" in note and "vllm" in note for note in manifest_of(report).notes)


@pytest.mark.usefixtures("fake_nsys")
@pytest.mark.parametrize(("how", "sentence"), [("noreport", "is missing"), ("empty", "is empty")])
def test_exit_code_0_of_nsys_proves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, sentence: str
) -> None:
    monkeypatch.setenv("FAKE_NSYS", how)
    bench.out.mkdir()
    (bench.out / "e2e.nsys-rep").write_text("of another day")
    with pytest.raises(RunFailed, match=sentence):
        run(request_for(bench))


@pytest.mark.usefixtures("fake_nsys")
def test_port_in_use_is_refused(bench: Bench) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", bench.port))
        other.listen()
        with pytest.raises(RunFailed, match="something listens at"):
            run(request_for(bench))


@pytest.mark.usefixtures("no_nsys")
def test_without_nsys(bench: Bench) -> None:
    with pytest.raises(ToolMissing, match="nsys was not found"):
        plan_e2e(request_for(bench))
    assert "nsys launch" in plan_e2e(request_for(bench), dry_run=True).text()


DRIVER = """
import sys
from pathlib import Path
from typing import Any
from opkit.align.profile.e2e import E2ERequest, plan_e2e, run_e2e
from opkit.layers.manifest import Wave
request = E2ERequest(sys.argv[1], Path(sys.argv[2]), waves=(Wave(1, 8, 2),), warmup=0)
try:
    run_e2e(plan_e2e(request), lambda line: print(line, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.usefixtures("either_nsys")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "slow,worker")
    program = [sys.executable, "-c", DRIVER, bench.command(), str(bench.out)]
    path = {"PYTHONPATH": os.pathsep.join([str(Path(opkit.__file__).parents[1]), *sys.path])}
    driver = subprocess.Popen(
        program, stdout=subprocess.PIPE, text=True, env={**os.environ, **path}
    )
    assert driver.stdout is not None
    try:
        for line in driver.stdout:
            if line.startswith("prime the window"):  # the first request of this run
                break
        until = time.monotonic() + 60
        while len(bench.sent()) < 2:  # after /start_profile: the request has reached the server
            assert time.monotonic() < until
            time.sleep(0.05)
        before = marked(bench.mark)
        assert any("vllm serve" in line for line in before)
        assert any("time.sleep(120)" in line for line in before)
        os.kill(driver.pid, number)
        assert driver.wait(30) == 130
    finally:
        driver.kill()
        driver.wait()
    assert marked(bench.mark) == []


@pytest.mark.usefixtures("fake_nsys")
def test_interrupted_while_the_server_is_ended_goes_no_further(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "stubborn")
    grace = replace(PATIENT, interrupt_s=0.3, terminate_s=0.3)

    def impatient(line: str) -> None:
        if line.startswith("ended with SIGKILL"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        run_e2e(plan_e2e(request_for(bench)), impatient, grace)
    assert marked(bench.mark) == []


@pytest.mark.usefixtures("either_nsys")
def test_program_is_recorded_whole(bench: Bench) -> None:
    program = bench.root / "run model.py"
    program.write_text("print('ran')")
    (report,) = run(request_for(bench, command=f"A=1 {sys.executable} '{program}'"))
    assert report.stat().st_size > 0
    assert manifest_of(report).waves == ()
    assert "ran" in (bench.out / "e2e.log").read_text()


@pytest.mark.usefixtures("either_nsys")
def test_program_that_fails_is_told(bench: Bench) -> None:
    with pytest.raises(RunFailed, match="ended with code 7"):
        run(request_for(bench, command=f"{sys.executable} -c 'import sys; sys.exit(7)'"))


@pytest.mark.usefixtures("fake_nsys")
def test_program_that_hangs_meets_its_limit(bench: Bench) -> None:
    command = f"{sys.executable} -c 'import time; time.sleep(100)'"
    with pytest.raises(RunFailed, match="not finished after 1 s"):
        run(request_for(bench, command=command, program_limit_s=1.0))


MPIRUN = """
import os, subprocess, sys
count = int(sys.argv[sys.argv.index("-n") + 1])
first = next(i for i, word in enumerate(sys.argv) if word.endswith("nsys"))
ranks = []
for rank in range(count):
    command = list(sys.argv[first:])
    if rank:  # only rank 0 serves
        serves = command.index(os.environ["FAKE_VLLM"])
        command[serves:] = [sys.executable, "-c", os.environ["IDLE"]]
    ranks.append(subprocess.Popen(command, env={**os.environ, "OMPI_COMM_WORLD_RANK": str(rank)}))
sys.exit(max(rank.wait() for rank in ranks))
"""
IDLE = "import time\ntry:\n time.sleep(100)\nexcept KeyboardInterrupt: pass"


def per_rank(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> E2ERequest:
    source = tmp_path / "mpirun.py"
    source.write_text(MPIRUN)
    script(source, bench.root / "bin" / "mpirun")
    monkeypatch.setenv("PATH", f"{bench.root / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_VLLM", bench.command().split()[0])
    monkeypatch.setenv("IDLE", IDLE)
    return request_for(bench, mode=Mode.PER_RANK, ranks=2)


@pytest.mark.usefixtures("either_nsys")
def test_every_rank_leaves_its_report(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reports = run(per_rank(bench, monkeypatch, tmp_path))
    assert [report.name for report in reports] == ["rank0.nsys-rep", "rank1.nsys-rep"]
    assert all(report.stat().st_size > 0 for report in reports)
    assert all(sidecar_of(report).is_file() for report in reports)


@pytest.mark.usefixtures("fake_nsys")
def test_missing_rank_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    request = per_rank(bench, monkeypatch, tmp_path)
    plan = plan_e2e(request)
    reports = (*plan.plan.reports, bench.out / "rank2.nsys-rep")
    with pytest.raises(RunFailed, match=r"rank2.nsys-rep is missing") as caught:
        run_e2e(replace(plan, plan=replace(plan.plan, reports=reports)), lambda _: None, PATIENT)
    assert "rank1" not in str(caught.value)


@needs_nsys
def test_system_wide_window(bench: Bench) -> None:
    request = request_for(bench, mode=Mode.SYSTEM_WIDE, delay_s=1.5, duration_s=1.5, warmup=0)
    if os.geteuid() == 0:
        (report,) = run(request)
        assert report.stat().st_size > 0
    else:  # nsys samples a whole system for root only, and says so
        with pytest.raises(RunFailed) as caught:
            run(request)
        assert "nsys" in str(caught.value)


@pytest.mark.usefixtures("fake_nsys")
def test_server_late_for_the_system_wide_window(bench: Bench) -> None:
    request = request_for(bench, mode=Mode.SYSTEM_WIDE, delay_s=0.0, duration_s=3.0)
    with pytest.raises(RunFailed, match="after nsys's window had opened"):
        run(request)


@pytest.mark.usefixtures("fake_nsys")
def test_output_folder_that_cannot_be_made(bench: Bench) -> None:
    (bench.root / "file").write_text("")
    with pytest.raises(BadInput, match="output folder"):
        run(request_for(bench, out_dir=bench.root / "file" / "out"))


@pytest.mark.usefixtures("fake_nsys")
def test_model_that_cannot_be_found(bench: Bench) -> None:
    command = f"{bench.command().split()[0]} serve nobody/nothing"
    with pytest.raises(BadInput, match=r"config.json of the model \(nobody/nothing\)"):
        plan_e2e(request_for(bench, command=command))
    assert plan_e2e(request_for(bench, command=command, model_dir=bench.model)).model_dir


@pytest.mark.usefixtures("fake_nsys")
def test_program_that_is_not_there_is_told_before_nsys_starts(bench: Bench) -> None:
    command = "no-such-engine --flag"
    with pytest.raises(ToolMissing, match="no-such-engine: no such program"):
        plan_e2e(request_for(bench, command=command))
    assert "no-such-engine" in plan_e2e(request_for(bench, command=command), dry_run=True).text()


@pytest.mark.usefixtures("fake_nsys")
def test_config_without_vocabulary(bench: Bench) -> None:
    (bench.model / "config.json").write_text(json.dumps({"architectures": []}))
    with pytest.raises(BadInput, match="no vocab_size"):
        run(request_for(bench))
