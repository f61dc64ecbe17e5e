"""``opkit comm`` as users run it: real processes; gloo on a CPU where torch is here."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cli_runs import PROGRAM, Ran, command, environment, run_program
from comm_bench import alive, ranks_of, wait_until_dead

from opkit.collect.comm import measure as measuring
from opkit.collect.comm.collectives import WrongResult
from opkit.collect.comm.measure import Party
from opkit.collect.comm.plan import TIMING, CommCase
from opkit.layers.op import LaunchMode
from opkit.sensors.nvml import Gpu

DOCUMENT = (Path(__file__).parents[1] / "docs" / "comm.md").read_text("utf-8")
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed: make test-torch"
)


def comm(tmp_path: Path, *words: object) -> Ran:
    """``opkit comm WORDS`` as a program, in a folder of its own."""
    return run_program("comm", *words, cwd=tmp_path)


def interpreter(tmp_path: Path, script: str) -> Path:
    """A program that stands in for Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_every_option_is_documented() -> None:
    options = [option for param in command("comm").params for option in param.opts]
    missing = [o for o in options if o.startswith("--") and not re.search(rf"`{o}\b", DOCUMENT)]
    assert missing == []


def test_every_option_of_the_document_exists() -> None:
    table = DOCUMENT.split("| option | meaning |")[1].split("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = {option for cell in first for option in re.findall(r"`(--[a-z-]+)", cell)}
    known = {option for param in command("comm").params for option in param.opts}
    assert told
    assert told - known == set()


def test_a_plan_for_another_host_needs_neither_gpu_nor_torch(tmp_path: Path) -> None:
    ran = comm(tmp_path, "--plan", "--gpus", "8,2,4", "--python", tmp_path / "none")
    assert (ran.code, ran.err) == (0, "")
    # 504 rows in h100_sxm/comm/nccl/2.29.2.
    assert "504 cases in 3 sets of ranks" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_as_json_holds_what_was_asked_for(tmp_path: Path) -> None:
    words = ("--gpus", "4", "--ops", "alltoall, all_reduce", "--dtype", "int8", "--min-bytes", 1024,
             "--max-bytes", 65536, "--factor", 8, "--all-reduce-backend", "vllm")  # fmt: skip
    ran = comm(tmp_path, "--plan", "--json", *words)
    told = json.loads(ran.out)
    assert (told["schema"], told["cases"]) == ("opkit.comm-plan/1", 12)
    nccl, vllm = told["worlds"]
    assert [(c["op"], c["dtype"], c["ranks"], c["size"]) for c in nccl["cases"]] == [
        (op, "int8", 4, size) for op in ("all_reduce", "alltoall") for size in (1024, 8192, 65536)
    ]
    assert [(c["launch"], c["size"]) for c in vllm["cases"]] == [
        (mode, size) for mode in ("graph", "eager") for size in (1024, 8192, 65536)
    ]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 5, "no GPU is here"),
        (["--gpus", "two"], 2, "--gpus takes numbers and commas, as 2,4, not 'two'"),
        (["--gpus", "2,"], 2, "--gpus takes numbers and commas"),
        (["--gpus", "0"], 2, "--gpus must be at least 1, not 0"),
        (["--ops", "broadcast"], 2, "--ops knows no 'broadcast', only all_reduce"),
        (["--ops", "all_reduce,,alltoall"], 2, "--ops takes words and commas"),
        (["--dtype", "float"], 2, "--dtype knows no 'float', only half, int8"),
        (["--dtype", ""], 2, "--dtype takes words and commas, not ''"),
        (["--min-bytes", "64", "--max-bytes", "32"], 2, "no message size lies between 64 and 32"),
        (["--min-bytes", "8"], 2, "less than one share of 16 bytes"),
        (["--factor", "1"], 2, "--factor must be at least 2"),
        (["--all-reduce-backend", "sglang"], 2, "'sglang' is not one of 'vllm', 'trtllm'"),
        (["--all-reduce-backend", "vllm", "--device", "cpu"], 2, "--device cpu cannot go with it"),
        (["--all-reduce-backend", "vllm", "--gpus", "1"], 4, "needs at least two GPUs"),
        (["--case-timeout", "0"], 2, "0.0 is not in the range x>0"),
        (["--start-timeout", "-1"], 2, "-1.0 is not in the range x>0"),
        (["--device", "tpu"], 2, "'tpu' is not one of 'cuda', 'cpu'"),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, words: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus = [] if not words or "--gpus" in words else ["--gpus", "2"]
    ran = comm(tmp_path, "--plan", *words, *gpus)
    assert (ran.code, message in ran.complaint()) == (code, True), ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_interpreter_is_one_sentence(tmp_path: Path) -> None:
    ran = comm(tmp_path, "--device", "cpu", "--python", tmp_path / "no-python")
    assert ran.code == 5
    assert "no-python cannot be started" in ran.complaint()


def test_the_ranks_interpreter_needs_nothing_of_opkits(tmp_path: Path) -> None:
    """Without its packages it has no click, no rich and no torch; only torch is missed."""
    bare = interpreter(tmp_path, f'unset PYTHONPATH; exec "{sys.executable}" -S "$@"')
    ran = comm(tmp_path, "--device", "cpu", "--python", bare)
    assert ran.code == 5
    assert ran.complaint().startswith("collectives need torch, which cannot be imported here")
    assert "--python" in ran.err


def test_the_ranks_run_this_opkit_and_their_own_torch(tmp_path: Path) -> None:
    """Stands in for an environment that has another opkit and a torch of its own."""
    theirs = tmp_path / "theirs"
    (theirs / "opkit").mkdir(parents=True)
    (theirs / "opkit" / "__init__.py").write_text("raise ImportError('the other opkit')")
    (theirs / "torch.py").write_text("raise ImportError('their own torch')")
    python = interpreter(tmp_path, f'PYTHONPATH="{theirs}" exec "{sys.executable}" "$@"')
    ran = comm(tmp_path, "--device", "cpu", "--python", python)
    assert ran.code == 5
    assert "their own torch" in ran.complaint()


@needs_torch
def test_two_ranks_on_a_cpu_write_gloos_table_and_a_second_run_measures_nothing(
    tmp_path: Path,
) -> None:
    words = ("--device", "cpu", "--gpus", "2", "--ops", "all_reduce,all_to_all", "--dtype", "int8",
             "--min-bytes", "512", "--max-bytes", "2048", "--factor", 4, "--out", "o")  # fmt: skip
    first = comm(tmp_path, *words)
    assert first.code == 0, first.err
    assert "gloo, 2 ranks: starting, 4 cases" in first.err
    lines = [line.split() for line in first.out.splitlines() if " int8 " in line]
    assert [(op, dtype, ranks, size, unit) for op, dtype, ranks, size, unit, *_ in lines] == [
        (op, "int8", "2", size, unit)
        for op in ("all_reduce", "alltoall")
        for size, unit in (("512", "B"), ("2", "KiB"))
    ]
    assert "4 cases, 0 of them measured before" in first.out
    assert "next: the same on GPUs" in first.out

    second = comm(tmp_path, *words, "--json")
    told = json.loads(second.out)
    assert (second.code, told["schema"], told["ok"], told["resumed"]) == (
        0,
        "opkit.comm/1",
        True,
        4,
    )
    (table,) = told["tables"]
    with (tmp_path / table["csv"]).open() as file:
        written = {
            (r["op_name"], r["message_size"]): float(r["latency"]) for r in csv.DictReader(file)
        }
    # int8: an element is a byte.
    reported = {(r["op"], str(r["size"])): r["latency_ms"] for r in told["rows"]}
    assert written == pytest.approx(reported, rel=1e-4)
    assert "starting" not in second.err


@needs_torch
def test_what_fails_costs_exit_code_1_and_is_told(tmp_path: Path) -> None:
    """No case can be done in this time, so each world ends; opkit gives up after three."""
    words = ("--device", "cpu", "--ops", "all_reduce", "--max-bytes", "512",
             "--case-timeout", "0.001")  # fmt: skip
    ran = comm(tmp_path, *words)
    assert ran.code == 1
    assert re.search(r"^quarantined: gloo all_reduce .*: timed out: ", ran.out, re.MULTILINE)
    assert "next: run the same command again" in ran.out
    assert list(tmp_path.rglob("gloo_perf*")) == []


@needs_torch
def test_a_run_that_is_ended_leaves_no_rank(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "comm", "--device", "cpu", "--max-bytes", "1048576"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if " done" in line:
            break
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    assert all(map(alive, ranks))
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted; everything that was started has been ended" in err
    assert wait_until_dead(ranks) == []


@dataclass
class Copies:
    """An all_gather of one rank, out of place: what is sent is received."""

    source: Any
    result: Any
    served: list[str] = field(default_factory=list)

    def refill(self) -> None:
        pass

    def launch(self) -> None:
        self.result.copy_(self.source)

    def received(self) -> list[Any]:
        return [self.result]


@needs_torch
@pytest.mark.parametrize("dtype", ["half", "int8"])
def test_a_graph_that_launches_nothing_is_a_wrong_result(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffers hold the right data already, from the launch before the capture."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    case = CommCase("nccl", "all_gather", dtype, 1, 512, LaunchMode.GRAPH)
    of_dtype = {"half": torch.float16, "int8": torch.int8}[dtype]
    count = case.message().total
    copies = Copies(torch.zeros(count, dtype=of_dtype), torch.zeros(count, dtype=of_dtype))

    class Backend:
        def collective(self, _case: CommCase) -> Any:
            return copies

    def empty_graph(*_: Any) -> Any:
        copies.launch()
        return (lambda: None), ""

    monkeypatch.setattr(measuring, "_launcher", empty_graph)
    held: dict[str, str] = {}

    class Store:
        set, get = held.__setitem__, held.__getitem__

    party = Party(torch, Store(), torch.device("cpu"), Gpu(), 0, 1)
    with pytest.raises(WrongResult, match=f"{count} of {count} elements are wrong"):
        measuring.measure(party, Backend(), case, TIMING, 0)  # type: ignore[arg-type]
