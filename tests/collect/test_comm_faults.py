"""Ranks that die, hang, run out of memory, compute nonsense or never start; none needs torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from comm_bench import alive, fake_launcher, made_host, started, wait_until_dead

from opkit.collect.comm.plan import CommOptions
from opkit.collect.comm.run import CommResult, run_comm
from opkit.collect.work import Fault
from opkit.collect.workers.parts import read_parts
from opkit.errors import ToolMissing

Run = Callable[..., CommResult]
LIMIT = 8.0  # seconds of a case: a healthy fake rank takes a part of one, also on a busy machine


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path, said: list[str]) -> Run:
    """Run three sizes of one collective between two fake ranks that fail as planned."""

    def go(**plan: str | int) -> CommResult:
        limit = float(plan.pop("limit", 20.0))
        options = CommOptions(
            out=tmp_path / "out", ops=("all_reduce",), dtypes=("half",), min_bytes=512,
            max_bytes=2048,
        )  # fmt: skip
        made = fake_launcher(tmp_path, limit, **plan)
        return run_comm(options, said.append, made, made_host())

    return go


def faults(result: CommResult) -> dict[int, Fault | None]:
    return {int(row.case["size"]): row.fault for row in result.rows}


def test_a_sound_world_measures_all(run: Run, tmp_path: Path) -> None:
    result = run()
    assert result.ok
    assert faults(result) == {512: None, 1024: None, 2048: None}
    assert [table.rows for table in result.tables] == [3]
    assert len(started(tmp_path)) == 2
    assert wait_until_dead(started(tmp_path)) == []


@pytest.mark.parametrize("what", ["die", "hang", "memory", "garbage"])
def test_a_rank_that_fails_once_costs_a_second_try(run: Run, what: str, tmp_path: Path) -> None:
    result = run(at_1024=f"{what}-once", limit=LIMIT)
    assert result.ok
    assert {row.case["size"]: row.attempts for row in result.rows} == {512: 1, 1024: 2, 2048: 1}
    assert len(started(tmp_path)) == 4  # two worlds of two
    assert wait_until_dead(started(tmp_path)) == []


@pytest.mark.parametrize(
    ("what", "fault", "says"),
    [
        ("die", Fault.CRASH, "rank 1 was ended by SIGKILL; its last words: a fake rank dies"),
        ("hang", Fault.TIMEOUT, f"not finished after {LIMIT:g} s: rank 1"),
        ("memory", Fault.MEMORY, "rank 1: OutOfMemoryError"),
        ("garbage", Fault.ERROR, "rank 1 said what cannot be read"),
    ],
)
def test_a_case_that_fails_twice_is_quarantined_and_the_rest_is_measured(
    run: Run, what: str, fault: Fault, says: str, said: list[str], tmp_path: Path
) -> None:
    result = run(at_1024=what, limit=LIMIT)
    assert faults(result) == {512: None, 1024: fault, 2048: None}
    (failed,) = result.failed
    assert says in failed.error
    assert failed.attempts == 2
    assert not result.ok
    assert [(table.rows, table.status) for table in result.tables] == [(2, "partial")]
    assert sum(says in line for line in said) == 2
    assert wait_until_dead(started(tmp_path)) == []


def test_the_other_rank_may_fail_too(run: Run) -> None:
    result = run(at_512="die", rank=0)
    assert faults(result)[512] is Fault.CRASH
    assert "rank 0 was ended by SIGKILL" in result.failed[0].error


def test_a_wrong_result_is_no_row_and_ends_no_world(run: Run, tmp_path: Path) -> None:
    result = run(at_1024="wrong")
    assert faults(result) == {512: None, 1024: Fault.WRONG, 2048: None}
    assert "elements are wrong" in result.failed[0].error
    assert len(started(tmp_path)) == 2  # one world: it is not tried again


@pytest.mark.parametrize(("what", "fault"), [("die", Fault.CRASH), ("memory", Fault.MEMORY)])
def test_a_world_that_never_starts_is_given_up_after_two_tries(
    run: Run, what: str, fault: Fault, tmp_path: Path
) -> None:
    result = run(start=what)
    assert set(faults(result).values()) == {fault}
    assert all("2 worlds in a row" in row.error for row in result.rows)
    assert result.tables == ()
    assert len(started(tmp_path)) == 4


def test_worlds_without_any_result_are_given_up(run: Run, tmp_path: Path) -> None:
    result = run(at_512="die", at_1024="die", at_2048="die")
    assert set(faults(result).values()) == {Fault.CRASH}
    assert len(started(tmp_path)) == 6  # three worlds, not two for each case


def test_failed_cases_are_tried_again_by_the_next_run_and_no_other(
    run: Run, tmp_path: Path
) -> None:
    assert not run(at_1024="die").ok
    before = len(started(tmp_path))
    result = run()
    assert result.ok
    assert result.resumed == 2
    assert len(started(tmp_path)) == before + 2
    rows = [row for row in read_parts(tmp_path / "out" / "comm").rows.values() if row.ok]
    assert sorted(row.case["size"] for row in rows) == [512, 1024, 2048]


def test_other_variables_make_other_rows(tmp_path: Path) -> None:
    options = CommOptions(
        out=tmp_path / "out", ops=("all_reduce",), dtypes=("half",), min_bytes=512, max_bytes=512
    )
    made = fake_launcher(tmp_path)
    run_comm(options, print, made, made_host(NCCL_NVLS_ENABLE="0"))
    result = run_comm(options, print, made, made_host(NCCL_NVLS_ENABLE="1"))
    assert result.resumed == 0
    assert any("1 earlier nccl rows of other versions" in note for note in result.notes)


def test_a_missing_interpreter_is_told(tmp_path: Path) -> None:
    options = CommOptions(out=tmp_path / "out", min_bytes=512, max_bytes=512)
    made = replace(fake_launcher(tmp_path), argv=(str(tmp_path / "no-python"),))
    with pytest.raises(ToolMissing, match="no-python is not there"):
        run_comm(options, print, made, made_host())


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from comm_bench import fake_launcher, made_host
from opkit.collect.comm.plan import CommOptions
from opkit.collect.comm.run import run_comm
folder = Path({folder!r})
options = CommOptions(out=folder / "out", ops=("all_reduce",), dtypes=("half",),
                      min_bytes=512, max_bytes=1024)
run_comm(options, print, fake_launcher(folder, 3600.0, at_1024="hang"), made_host())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_parent_however_it_ends(how: signal.Signals, tmp_path: Path) -> None:
    code = PARENT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        hanging = tmp_path / "notes" / "did-1024"
        until = time.monotonic() + 30
        while not hanging.exists() and time.monotonic() < until:
            assert parent.poll() is None
            time.sleep(0.05)
        ranks = started(tmp_path)
        assert len(ranks) == 2
        assert all(alive(pid) for pid in ranks)
        os.kill(parent.pid, how)
        parent.wait(30)
        assert wait_until_dead(ranks) == []
    finally:
        if parent.poll() is None:
            parent.kill()
            parent.wait()
    # What was measured before is on the disk.
    rows = read_parts(tmp_path / "out" / "comm").rows.values()
    assert [row.case["size"] for row in rows if row.ok] == [512]
