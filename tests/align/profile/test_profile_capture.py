"""The capturing run: what the server is asked, in which order, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from profile_bench import PATIENT, VOCAB, Bench, marked

import opkit
from opkit.align.profile.capture import plan_capture, run_capture
from opkit.align.profile.e2e import E2EPlan, E2ERequest, client_of, plan_e2e
from opkit.align.profile.perform import perform
from opkit.align.profile.plan import End, Post, Purpose, Ready, Send, Start
from opkit.errors import EXIT_BAD_INPUT, EXIT_RUN_FAILED, BadInput, OpkitError, RunFailed
from opkit.layers.captured import read_info
from opkit.layers.manifest import Wave
from opkit.layers.prompts import prompt_tokens
from opkit.layers.provenance import file_digest
from opkit.layers.registry import find_op

WAVES = (Wave(1, 8, 2), Wave(3, 5, 2))
DSA = find_op("dsa")


def planned(bench: Bench, flags: str = "", **changes: Any) -> E2EPlan:
    request = E2ERequest(bench.command(flags), bench.out, op="dsa", waves=WAVES, seed=7)
    return plan_e2e(replace(request, **changes))


def capture(bench: Bench, said: list[str] | None = None, **changes: Any) -> Path:
    """Perform a capturing run; its folder."""
    heard: list[str] = [] if said is None else said
    folder = bench.out / "captured"
    run_capture(planned(bench, **changes), DSA, 3, folder, heard.append, PATIENT)
    return folder


def refusal(error: OpkitError, code: int) -> str:
    assert error.exit_code == code
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.usefixtures("fake_nsys")
def test_the_server_is_asked_to_store_exactly_the_waves(bench: Bench) -> None:
    folder = capture(bench)
    start, *waves, stop = bench.sent()
    assert (start["path"], start["method"]) == ("/collective_rpc", "opkit_capture_start")
    assert (stop["path"], stop["method"]) == ("/collective_rpc", "opkit_capture_stop")
    assert [wave["path"] for wave in waves] == ["/v1/completions"] * 2
    assert [wave["prompt"] for wave in waves] == [
        [prompt_tokens(7, number, wave.prompt, VOCAB) for number in range(wave.requests)]
        for wave in WAVES
    ]
    assert [wave["max_tokens"] for wave in waves] == [2, 2]
    assert read_info(folder).lengths == {"8-0": 9}


@pytest.mark.usefixtures("fake_nsys")
def test_the_worker_is_told_what_it_stores(bench: Bench) -> None:
    capture(bench)
    (spec,) = bench.sent()[0]["args"]
    told = json.loads(spec)
    assert told.pop("created").startswith("20")
    assert told == {
        "op": "dsa",
        "backend": "vllm",
        "layer": 3,
        "seed": 7,
        "model_sha256": file_digest(bench.model / "config.json"),
        "command": bench.command().strip(),
        "region": DSA.region["vllm"].module,
        "folder": str(bench.out / "captured"),
    }


@pytest.mark.usefixtures("fake_nsys")
def test_an_api_key_is_not_written_down(bench: Bench) -> None:
    plan = plan_capture(planned(bench, "--api-key sesame"), DSA, 0, bench.out)
    posts = [step.body for step in plan.steps if isinstance(step, Post)]
    assert "--api-key ***" in posts[0]
    assert not any("sesame" in body for body in posts)


@pytest.mark.usefixtures("fake_nsys")
def test_the_server_runs_eagerly_finds_opkit_and_may_be_called(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = bench.root / "environment.json"
    monkeypatch.setenv("FAKE_ENVIRONMENT", str(there))
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    capture(bench, env={"OWN": "1"})
    argv, env = json.loads(there.read_text())
    given = shlex.split(bench.command())[1:]
    assert argv[: len(given)] == given
    assert argv[len(given) :] == [
        "--worker-extension-cls",
        "opkit_in_server.CaptureExtension",
        "--enforce-eager",
        "--no-enable-prefix-caching",
    ]
    assert (env["VLLM_SERVER_DEV_MODE"], env["VLLM_USE_V2_MODEL_RUNNER"]) == ("1", "0")
    assert env["OWN"] == "1"
    own = str(Path(opkit.__file__).parent / "inside")
    assert env["PYTHONPATH"].split(os.pathsep) == [own, "/somewhere/else"]


@pytest.mark.usefixtures("fake_nsys")
def test_whatever_the_user_caches_whole_prompts_are_stored(bench: Bench) -> None:
    plan = plan_capture(planned(bench, "--enable-prefix-caching"), DSA, 0, bench.out)
    argv = plan.commands[0].argv
    assert argv.index("--enable-prefix-caching") < argv.index("--no-enable-prefix-caching")


@pytest.mark.usefixtures("fake_nsys")
def test_the_server_ends_politely(bench: Bench) -> None:
    said: list[str] = []
    capture(bench, said)
    assert [line for line in said if not line.startswith(("waiting", "the server was"))] == [
        "start the server to capture the op's inputs",
        "store the op's inputs from here on",
        "wave 1x8+2",
        "wave 3x5+2",
        "write them",
        "ending the server",
    ]
    assert "engine ended politely" in (bench.out / "capture.log").read_text()
    assert marked(bench.mark) == []


@pytest.mark.usefixtures("no_nsys")
def test_the_plan_is_a_script_with_every_step(bench: Bench) -> None:
    request = E2ERequest(bench.command(), bench.out, waves=WAVES)
    plan = plan_capture(plan_e2e(request, dry_run=True), DSA, 0, bench.out / "captured")
    kinds = [type(step) for step in plan.steps]
    assert kinds == [Start, Ready, Post, Send, Post, End]
    (send,) = (step for step in plan.steps if isinstance(step, Send))
    assert (send.purpose, send.waves, send.rounds) == (Purpose.RECORD, WAVES, 1)
    lines = plan.text().splitlines()
    (command,) = (line for line in lines if not line.startswith("#"))
    assert command == f"{plan.commands[0].line()} &"
    url = f"http://127.0.0.1:{bench.port}/collective_rpc"
    first, last = (line for line in lines if f"POST {url} " in line)
    assert '"method": "opkit_capture_start"' in first
    assert last == f'# write them: POST {url} {{"method": "opkit_capture_stop"}}'
    assert plan.reports == ()


@pytest.mark.usefixtures("no_nsys")
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("python -m sglang.launch_server --model-path m", "a worker extension of vLLM, and sglang"),
        ("trtllm-serve m", "a worker extension of vLLM, and trtllm"),
        ("python run.py", "a worker extension of vLLM, and this command"),
    ],
)
def test_other_engines_store_nothing(bench: Bench, command: str, says: str) -> None:
    e2e = plan_e2e(E2ERequest(command, bench.out), dry_run=True)
    with pytest.raises(BadInput, match=says) as caught:
        plan_capture(e2e, DSA, 0, bench.out)
    assert refusal(caught.value, EXIT_BAD_INPUT).endswith("has none")
    assert caught.value.hint


@pytest.mark.usefixtures("no_nsys")
def test_a_command_that_hides_vllm_takes_no_flags(bench: Bench) -> None:
    e2e = plan_e2e(E2ERequest("bash serve.sh", bench.out, engine="vllm"), dry_run=True)
    with pytest.raises(BadInput, match="hides vLLM's flags") as caught:
        plan_capture(e2e, DSA, 0, bench.out)
    assert refusal(caught.value, EXIT_BAD_INPUT)


@pytest.mark.usefixtures("fake_nsys")
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("die", r"the server ended with code 1 \(before it was ready\)"),
        ("norpc", r"store the op's inputs from here on: POST .*/collective_rpc answered 404"),
        ("nomodule", r"store the op's inputs from here on: POST .* answered 500"),
        ("refuse", r"wave 1x8\+2: POST .* answered 500"),
        ("short", r"wave 1x8\+2: 1 output tokens came back instead of 2"),
    ],
)
def test_a_step_that_fails_ends_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    monkeypatch.setenv("FAKE_SERVER", f"{how},worker")
    with pytest.raises(RunFailed, match=says) as caught:
        capture(bench)
    refusal(caught.value, EXIT_RUN_FAILED)
    assert "engine starting" in (caught.value.hint or "")
    assert marked(bench.mark) == []
    assert not (bench.out / "captured").exists()


@pytest.mark.usefixtures("fake_nsys")
def test_a_call_that_is_not_answered_meets_its_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "slowrpc")
    e2e = planned(bench)
    plan = plan_capture(e2e, DSA, 0, bench.out / "captured")
    steps = tuple(replace(s, limit_s=0.2) if isinstance(s, Post) else s for s in plan.steps)
    with pytest.raises(RunFailed, match=r"store the op's inputs from here on: POST .*timed out"):
        perform(replace(plan, steps=steps), lambda _: None, client_of(e2e), 0, PATIENT)
    assert marked(bench.mark) == []


@pytest.mark.usefixtures("fake_nsys")
def test_a_run_that_stored_nothing_has_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "nothing")
    with pytest.raises(RunFailed, match="no inputs of dsa were stored") as caught:
        capture(bench)
    assert "capture.log" in (caught.value.hint or "")
    refusal(caught.value, EXIT_RUN_FAILED)


@pytest.mark.usefixtures("fake_nsys")
def test_an_old_capture_is_not_taken_for_the_new_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = capture(bench)
    monkeypatch.setenv("FAKE_SERVER", "forgets")
    with pytest.raises(RunFailed, match="no inputs of dsa were stored"):
        capture(bench)
    assert not (folder / "capture.json").exists()


@pytest.mark.usefixtures("fake_nsys")
def test_an_interrupt_ends_the_server(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "worker")

    def impatient(line: str) -> None:
        if line == "write them":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_capture(planned(bench), DSA, 0, bench.out / "captured", impatient, PATIENT)
    assert marked(bench.mark) == []
    assert [body["path"] for body in bench.sent()][-1] == "/v1/completions"
