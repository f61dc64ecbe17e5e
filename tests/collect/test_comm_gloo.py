"""The whole way with real ranks: torch.distributed with gloo on a CPU. Needs torch."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from comm_bench import environment_of, mine, ranks_of, wait_until_dead

from opkit.collect.comm.plan import TIMING, CommOptions
from opkit.collect.comm.run import run_comm
from opkit.collect.comm.sizes import OPS
from opkit.collect.work import Fault
from opkit.errors import ToolMissing

pytest.importorskip("torch", reason="torch is not installed: make test-torch")

QUICK = replace(TIMING, max_seconds=0.05)
# A case that goes on until it is disturbed: its spread is never small enough.
LONG = replace(TIMING, spread=0.0, max_iterations=1_000_000, max_seconds=3.0)


def asked(tmp_path: Path, **more: object) -> CommOptions:
    options = CommOptions(
        out=tmp_path, device="cpu", gpus=(2,), min_bytes=512, max_bytes=512, timing=QUICK
    )
    return replace(options, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_collectives_are_right_and_timed(ranks: int, tmp_path: Path) -> None:
    # 500 bytes do not divide by three ranks, nor into shares of 16 bytes.
    result = run_comm(asked(tmp_path, gpus=(ranks,), min_bytes=500, max_bytes=500), print)
    assert result.ok, [row.error for row in result.failed]
    measured = {(row.case["op"], row.case["dtype"]) for row in result.rows}
    assert measured == {(op, dtype) for op in OPS for dtype in ("half", "int8")}
    for row in result.rows:
        assert row.measurement is not None
        assert len(row.measurement.elapsed_ms) >= TIMING.min_iterations
        assert min(row.measurement.elapsed_ms) > 0
        assert len(row.case["rank_ms"]) == ranks
    assert wait_until_dead(ranks_of(mine())) == []


def test_the_slowest_rank_counts(tmp_path: Path) -> None:
    (row,) = run_comm(asked(tmp_path, ops=("all_reduce",), dtypes=("half",)), print).rows
    assert row.measurement is not None
    samples = sorted(row.measurement.elapsed_ms)
    # At each batch the sample is the greatest, so its median is at least every rank's own.
    assert samples[len(samples) // 2] >= max(row.case["rank_ms"]) * 0.999999


def test_gloos_rows_never_look_like_nccls(tmp_path: Path) -> None:
    result = run_comm(asked(tmp_path, ops=("all_reduce",), dtypes=("int8",)), print)
    (table,) = result.tables
    assert table.name == "gloo"
    assert "nccl_perf" not in {path.stem for path in tmp_path.rglob("*")}
    assert "NCCL" not in table.csv.read_text()


def test_a_second_run_measures_nothing_again(tmp_path: Path) -> None:
    options = asked(tmp_path, ops=("alltoall",))
    first = run_comm(options, print)
    said: list[str] = []
    second = run_comm(options, said.append)
    assert second.resumed == len(second.rows) == 2
    assert [row.measurement for row in second.rows] == [row.measurement for row in first.rows]
    assert not any("starting" in line for line in said)


def test_ranks_inherit_the_switches_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    seen: list[dict[str, str]] = []

    def look(message: str) -> None:
        if "all_reduce" in message:
            seen.extend(environment_of(pid) for pid in ranks_of(mine()))

    result = run_comm(asked(tmp_path, ops=("all_reduce",), dtypes=("half",)), look)
    assert len(seen) == 2
    assert all(env["NCCL_NVLS_ENABLE"] == "0" for env in seen)
    assert all(env["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1" for env in seen)
    build = (tmp_path / "comm" / "builds" / f"{result.rows[0].build}.json").read_text()
    assert '"env NCCL_NVLS_ENABLE": "0"' in build


@pytest.mark.parametrize(
    ("how", "fault", "says"),
    [
        (signal.SIGKILL, Fault.CRASH, "was ended by SIGKILL"),
        (signal.SIGSTOP, Fault.TIMEOUT, "not finished after 8 s"),
    ],
)
def test_a_rank_that_dies_or_hangs_costs_the_case_and_no_more(
    how: signal.Signals, fault: Fault, says: str, tmp_path: Path
) -> None:
    """Real ranks within a real collective; the case is hit at both of its tries."""
    hit: list[int] = []

    def strike(message: str) -> None:
        if message.startswith("gloo, 2 ranks: all_gather half") and len(hit) < 2:
            hit.append(ranks_of(mine())[-1])
            time.sleep(0.5)  # rank 0 has announced the case; the other may still end the last one
            os.kill(hit[-1], how)

    options = asked(
        tmp_path, ops=("all_reduce", "all_gather"), dtypes=("half",), timing=LONG, case_limit_s=8.0
    )
    result = run_comm(options, strike)
    assert len(hit) == 2
    found = {row.case["op"]: row for row in result.rows}
    assert found["all_reduce"].ok
    assert found["all_gather"].fault is fault
    assert says in found["all_gather"].error
    assert found["all_gather"].attempts == 2
    assert wait_until_dead(hit) == []
    assert ranks_of(mine()) == []
    again = run_comm(options, print)
    assert again.ok
    assert again.resumed == 1


def test_a_missing_engine_and_a_missing_gpu_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="finds no GPU"):
        run_comm(CommOptions(out=tmp_path, all_reduce_backend="vllm"), print)


@pytest.mark.parametrize("engine", ["vllm", "trtllm"])
def test_a_missing_engine_is_a_sentence(engine: str) -> None:
    from opkit.collect.comm.backends import require_engine

    with pytest.raises(ToolMissing, match=f"the all-reduce of {engine} needs"):
        require_engine(engine)
