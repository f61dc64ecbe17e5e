"""The command line of `opkit bench`, with a stand-in for vLLM and a made server."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import PROGRAM, Ran, environment, run_main
from fake_engines import write_engines
from fake_openai import Behaviour, serving

from opkit.cli_bench import repeated

Bench = Callable[..., Ran]


@pytest.fixture
def bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """``opkit bench WORDS`` without sensors, in an empty folder, where a fake vLLM can be found."""
    monkeypatch.chdir(tmp_path)
    for name, value in write_engines(tmp_path / "site").items():
        monkeypatch.setenv(name, value)

    def run(*words: object) -> Ran:
        return run_main(capsys, monkeypatch, "bench", "--sensors", "none", *words)

    return run


VLLM = ("--backend", "vllm", "--model", "dir/m", "-r", "2")


def test_the_issue_s_own_command(bench: Bench) -> None:
    ran = bench(
        *("--model", "dir/m", "--backend", "vllm", "-p", 512, 1024, "-n", 128, 256),
        *("-pg", "512,128", "-r", 10, "-o", "json"),
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert [row["test"] for row in found["results"]] == [
        "pp512", "pp1024", "tg128", "tg256", "pp512+tg128",
    ]  # fmt: skip
    assert {row["repetitions"] for row in found["results"]} == {10}
    assert json.loads((Path(found["folder"]) / "summary.json").read_text()) == found


@pytest.mark.parametrize(
    ("args", "repeats"),
    [
        ("-p 512 1024 -n 8", "-p 512 -p 1024 -n 8"),
        ("-p 512,1024 2 -o md", "-p 512,1024 -p 2 -o md"),
        ("-pg 512,128 1024,256", "-pg 512,128 -pg 1024,256"),
        ("-p 128-1024*2 7", "-p 128-1024*2 -p 7"),
        ("-r 10 -p 1", "-r 10 -p 1"),
        ("-r 10 20", "-r 10 20"),
        ("--engine-args a=1 b=x,y --model m", "--engine-args a=1 --engine-args b=x,y --model m"),
        ("-p -n 8", "-p -n 8"),
        ("--engine_dir a_b --log_level=x_y", "--engine-dir a_b --log-level=x_y"),
        ("--seed 3 -p 5 --json 6", "--seed 3 -p 5 --json 6"),
    ],
)
def test_several_values_of_an_option(args: str, repeats: str) -> None:
    assert repeated(args.split()) == repeats.split()


def test_the_table_is_the_default(bench: Bench) -> None:
    ran = bench(*VLLM, "-p", 16, "-n", 4)
    assert ran.out.startswith("| model | backend")
    assert re.search(r"\| m +\| vllm 0\.24\.0 +\| pp16 ", ran.out)
    assert re.search(r"pp16: 2 repetitions\n", ran.err)
    assert "sensors: none; no power is measured" in ran.err


def test_csv_and_json_lines(bench: Bench) -> None:
    rows = list(csv.DictReader(io.StringIO(bench(*VLLM, "-p", 16, "-n", 0, "-o", "csv").out)))
    assert [row["test"] for row in rows] == ["pp16"]
    lines = bench(*VLLM, "-p", 16, "-n", 4, "-b", "1,2", "-o", "jsonl").out.splitlines()
    assert [json.loads(line)["n_batch"] for line in lines] == [1, 2, 1, 2]


def test_engine_arguments_and_log(bench: Bench) -> None:
    ran = bench(*VLLM, "-n", 0, "-p", 8, "--engine-args", "load_format=dummy", "x=1", "--json")
    found = json.loads(ran.out)
    assert found["models"][0]["engine"]["load_format"] == "dummy"
    assert found["models"][0]["options"]["engine_args"] == {"load_format": "dummy", "x": 1}
    log = Path(found["folder"]) / "engine.log"
    assert "the fake engine prints" in log.read_text()


def test_a_server_through_its_url(bench: Bench) -> None:
    with serving(Behaviour()) as url:
        ran = bench(
            "--backend", "openai-url", "--url", url, "--vocab-size", 99, "-p", 8, "-n", 4, "--json"
        )
    found = json.loads(ran.out)
    assert [row["test"] for row in found["results"]] == ["pp8", "tg4"]
    assert found["results"][1]["itl_p99_ns"] > 0
    assert found["models"][0]["engine"]["url"] == url


def test_a_failed_test_is_told_once_on_either_stream_and_costs_the_exit_code(bench: Bench) -> None:
    ran = bench(*VLLM, "-p", 16, 5000, "-n", 0)
    assert ran.code == 6
    assert ran.out.count("FAILED pp5000: 5,001 tokens do not fit the engine's longest") == 1
    assert ran.err.count("pp5000: 5,001 tokens do not fit the engine's longest") == 1
    assert ran.err.count("5,001 tokens") == 1
    assert ran.err.endswith("opkit: failed, as told above: pp5000\n")


def test_a_server_whose_vocabulary_nobody_knows(bench: Bench, tmp_path: Path) -> None:
    with serving(Behaviour()) as url:
        ran = bench("--backend", "openai-url", "--url", url)
    assert (ran.code, ran.complaint()) == (2, "m: the size of its vocabulary is not known")
    assert ran.err.count("vocabulary is not known") == 1
    assert "give --vocab-size, or --model DIR with a config.json" in ran.err
    assert not (tmp_path / "opkit-out").exists()


def test_a_server_that_is_not_there_is_told_once(bench: Bench) -> None:
    ran = bench("--backend", "openai-url", "--url", "http://127.0.0.1:9", "-p", 8, "-n", 0)
    assert ran.code == 6
    assert (ran.out.count("no answer"), ran.err.count("no answer")) == (1, 1)


def test_an_engine_that_is_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    ran = bench(*VLLM)
    assert ran.code == 6
    assert "cannot import vllm" in ran.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "which backend? --backend vllm, trtllm or openai-url"),
        (("--backend", "vllm"), "nothing to run"),
        ((*VLLM, "-p", "x"), "--n-prompt x: give numbers"),
        ((*VLLM, "-p", "0", "-n", "0"), "no test is left"),
        ((*VLLM, "-p", "4096", "--max-input-length", "2048"), "over --max-input-length 2,048"),
        ((*VLLM, "-r", "0"), "0 is not in the range"),
    ],
)
def test_wrong_usage_starts_nothing(
    bench: Bench, tmp_path: Path, words: tuple[object, ...], sentence: str
) -> None:
    ran = bench(*words)
    assert (ran.code, sentence in ran.complaint()) == (2, True)
    assert not (tmp_path / "opkit-out").exists()


def test_a_scenario(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'n_prompt = 16\nn_gen = 0\nbackend = "vllm"\n'
        '[[models]]\nmodel = "a"\n[[models]]\nmodel = "b"\nn_prompt = [8]\n'
    )
    found = json.loads(bench("--scenario", "s.toml", "-r", 1, "--json").out)
    assert [(row["model"], row["test"]) for row in found["results"]] == [
        ("a", "pp16"), ("b", "pp8"),
    ]  # fmt: skip


def test_ctrl_c_prints_what_was_measured(tmp_path: Path) -> None:
    """Interrupted in the second of two tests, whose run never ends."""
    env = {**environment(), "FAKE_DO": "hang at tg"}
    site = write_engines(tmp_path / "site")["PYTHONPATH"]
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], site])
    words = ["bench", "--sensors", "none", *map(str, VLLM), "-p", "8", "-n", "4", "--warmup", "0"]
    process: Any = subprocess.Popen(
        [*PROGRAM, *words], cwd=tmp_path, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    said = ""
    while "tg4: 2 repetitions" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "pp8" in out
    assert "Interrupted: this is what was measured until then." in out
    assert "everything that was started has been ended" in err
    assert engines_of(tmp_path) == []


def engines_of(folder: Path) -> list[str]:
    """Worker processes whose environment names ``folder``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if b"worker.py" in command and str(folder).encode() in variables:
            found.append(entry.name)
    return found


def test_help_needs_no_framework_and_no_sensors() -> None:
    code = "import sys; from opkit import cli_bench; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not set(done.stdout.split()) & {"pynvml", "torch", "vllm", "numpy", "yaml", "tokenizers"}
