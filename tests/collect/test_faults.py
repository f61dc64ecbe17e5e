"""What dies, hangs or fills up costs the case in hand: nothing lost, doubled or left running."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from collecting import HERE, Field, living, until
from fake_mocks import LATE_TOOLS, OutOfMemoryError, group_of

from opkit.collect.work import Fault, Row
from opkit.collect.workers.faults import describe, disk_full, fault_of
from opkit.collect.workers.pool import RunOptions, run_groups
from opkit.collect.workers.tally import Outcome
from opkit.errors import BadInput, RunFailed


@pytest.fixture
def field(tmp_path: Path) -> Field:
    return Field(tmp_path)


def only_failure(outcome: Outcome) -> Row:
    (row,) = outcome.failed
    assert outcome.complete
    return row


# A case that goes wrong, and the rest that must not.


@pytest.mark.parametrize(
    ("behaviour", "fault", "attempts", "error"),
    [
        ("segfault", Fault.CRASH, 2, "Fatal Python error: Segmentation fault"),
        ("killed", Fault.CRASH, 2, "the worker was ended by SIGKILL"),
        ("exit", Fault.CRASH, 2, "the worker ended with code 3"),
        ("cuda", Fault.CUDA, 2, "CUDA error: an illegal memory access was encountered"),
        ("oom", Fault.MEMORY, 2, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("oom-broken", Fault.MEMORY, 2, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("refused", Fault.REFUSED, 1, "needs 9 blocks, there are 3"),
        ("error", Fault.ERROR, 1, "ValueError: no such thing"),
    ],
)
def test_a_poison_case_is_quarantined_and_the_rest_is_measured(
    field: Field, behaviour: str, fault: Fault, attempts: int, error: str
) -> None:
    outcome = field.run([group_of("ok", behaviour, "ok")])
    row = only_failure(outcome)
    assert (outcome.done, row.fault, row.attempts) == (2, fault, attempts)
    assert error in row.error
    # Also a failed row has its place in the tables, and is on the disk.
    assert (row.table, row.columns) == ("fake", {"m": 2, "how": f"{behaviour} on torch"})
    assert field.parts().failed()[row.key].attempts == attempts
    assert row.created
    assert row.host
    assert len(field.lines()) == 3


@pytest.mark.parametrize(
    "behaviour", ["segfault", "killed", "exit", "cuda", "oom", "oom-broken", "hang"]
)
def test_what_goes_wrong_once_is_cured_by_a_fresh_process(field: Field, behaviour: str) -> None:
    outcome = field.run([group_of("ok", f"{behaviour}-once", "ok")], case_s=0.7)
    assert (outcome.done, outcome.failed, outcome.complete) == (3, (), True)
    assert field.parts().rows[f"2-{behaviour}-once"].attempts == 2
    # One that is broken without being dead is left before the retries' own process comes.
    assert len(set(field.noted("pids"))) == (3 if behaviour == "oom-broken" else 2)
    assert len(field.lines()) == 3


def test_after_a_death_the_same_case_comes_first_in_the_fresh_process(field: Field) -> None:
    field.run([group_of("ok", "killed-once", "ok")])
    workers = list(dict.fromkeys(field.noted("pids")))
    begun = [line.split()[:2] for line in field.noted("begun")]
    assert begun == [[workers[0], "1"], [workers[0], "2"], [workers[1], "2"], [workers[1], "3"]]


def test_after_out_of_memory_the_process_goes_on_and_retries_come_last(field: Field) -> None:
    field.run([group_of("oom-once", "ok", "oom-once", "ok")])
    workers = list(dict.fromkeys(field.noted("pids")))
    begun = [line.split()[:2] for line in field.noted("begun")]
    first = [[workers[0], number] for number in "1234"]
    assert begun == [*first, [workers[1], "1"], [workers[1], "3"]]


@pytest.mark.parametrize("behaviour", ["hang", "spin"])
def test_a_hang_ends_with_its_time_limit(field: Field, behaviour: str) -> None:
    row = only_failure(field.run([group_of("ok", behaviour, "ok")], case_s=0.7, grace_s=0.3))
    assert (row.fault, row.attempts) == (Fault.TIMEOUT, 2)
    assert row.error.startswith("the case took more than 0.7 s")
    assert row.seconds >= 0.7
    if behaviour == "spin":  # where it was, though no Python handler could run
        assert "in spin" in row.error


def test_killing_a_worker_from_outside_costs_nothing(field: Field) -> None:
    killed: list[int] = []

    def on_event(status: object) -> None:
        del status
        if not killed and len(field.noted("begun")) >= 3:
            killed.append(int(field.noted("pids")[0]))
            os.kill(killed[0], signal.SIGKILL)

    outcome = field.run([group_of(*["nap"] * 8)], on_event=on_event)
    assert killed
    assert (outcome.done, outcome.failed, outcome.complete) == (8, (), True)
    assert len(field.lines()) == 8


def test_a_row_that_was_written_before_its_worker_died_counts_once(field: Field) -> None:
    outcome = field.run([group_of("ok", "late", "ok")], tools=LATE_TOOLS)
    assert (outcome.done, outcome.failed, outcome.complete) == (3, (), True)
    assert field.begun(2) == 1
    assert len(field.lines()) == 3


def test_a_worker_that_dies_between_cases_is_not_the_next_ones_fault(field: Field) -> None:
    (lane,) = field.lanes()
    group = group_of("ok")
    lane.build(group, lambda: False)
    os.kill(int(field.noted("pids")[0]), signal.SIGKILL)
    tried = lane.measure(group.tasks[0], 1, True, lambda: False)
    assert (tried.died, tried.began, tried.row.fault) == (True, False, Fault.CRASH)
    assert not lane.serves(group)
    field.ended()


def test_what_a_case_leaves_running_ends_with_its_worker(field: Field) -> None:
    row = only_failure(field.run([group_of("child")], case_s=0.7))
    assert row.fault is Fault.TIMEOUT
    children = {int(line) for line in field.noted("children")}
    assert len(children) == 2
    until(lambda: not children & {pid for pid, _, _ in living()})


# The collector itself is killed.


def driver(field: Field, lanes: int, *behaviours: str) -> subprocess.Popen[bytes]:
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    root = field.out.parent
    return subprocess.Popen(
        [sys.executable, str(HERE / "collect_driver.py"), str(root), str(lanes), *behaviours],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("behaviour", ["hang-once", "child-once"])
def test_no_worker_outlives_a_killed_collector_and_resume_completes(
    field: Field, sent: signal.Signals, behaviour: str
) -> None:
    behaviours = ("ok", "ok", behaviour, "ok", behaviour, "ok")
    started = driver(field, 2, *behaviours)
    until(lambda: len([n for n in (3, 5) if field.begun(n)]) == 2)
    if behaviour == "child-once":
        until(lambda: len(field.noted("children")) == 2)
    workers = {int(pid) for pid in field.noted("pids")}
    children = {int(pid) for pid in field.noted("children")}
    assert workers <= {pid for pid, _, _ in living()}
    started.send_signal(sent)
    if sent is signal.SIGINT:  # the user is impatient, and still leaves nothing behind
        time.sleep(0.2)
        started.send_signal(sent)
    # The second SIGINT may come when Python itself is on its way out.
    ends = {signal.SIGKILL: {-9}, signal.SIGTERM: {130}, signal.SIGINT: {130, -2}}
    assert started.wait(20) in ends[sent]
    until(lambda: field.survivors() == [])
    assert not (workers | children) & {pid for pid, _, _ in living()}
    done = set(field.parts().rows)

    again = field.run([group_of(*behaviours)])
    assert again.planned == 6 - len(done)
    assert (again.done, again.failed, again.complete) == (again.planned, (), True)
    keys = [json.loads(line)["key"] for line in field.lines()]
    assert sorted(keys) == sorted(set(keys)), "nothing is measured twice"
    assert len(keys) == 6, "nothing is lost"


def test_no_worker_outlives_a_collector_killed_while_it_builds(field: Field) -> None:
    started = driver(field, 1, "ok")
    until(lambda: list(field.logs.glob("*.log")))
    started.kill()
    started.wait(20)
    # The worker may not even have come to tell its number: look for its command line.
    until(lambda: not [pid for pid, _, parent in living() if parent == started.pid])
    until(lambda: field.survivors() == [])
    assert field.run([group_of("ok")]).complete


def test_a_run_that_ended_with_a_torn_line_is_resumed(field: Field) -> None:
    field.run([group_of("ok", "ok")])
    (part,) = (field.out / "parts").iterdir()
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])  # as after a power cut
    assert field.parts().torn == 1
    again = field.run([group_of("ok", "ok")])
    assert (again.planned, again.done) == (1, 1)
    assert set(field.parts().rows) == {"1-ok", "2-ok"}
    assert field.begun(1) == 1


def test_two_collectors_on_one_folder_complete_it_together(field: Field) -> None:
    behaviours = ["meet", *["nap"] * 11]
    pair = [driver(field, 1, *behaviours) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    for done, skipped in said:
        assert 0 < int(done) <= 12
        assert int(done) + int(skipped) <= 12
    rows = field.parts().rows
    assert len(rows) == 12
    assert all(row.ok for row in rows.values())
    assert len(field.lines()) < 24, "they did not both do everything"
    field.ended()
    assert field.run([group_of(*behaviours)]).planned == 0


# A full disk.


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """A tmpfs of that size at ``place``."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def check_full_disk(field: Field, outcome: Outcome, planned: int, said: str) -> None:
    """What must hold after a disk has filled up in a run."""
    assert said in outcome.stopped
    assert 0 < outcome.done < planned
    assert (outcome.failed, outcome.complete) == ((), False)
    assert len(field.parts().rows) == outcome.done, "what counts is on the disk, and nothing else"
    left = [task.key for item in outcome.not_run for task in item.tasks]
    assert not set(left) & set(field.parts().rows)
    assert len(left) + outcome.done == planned


def test_a_full_disk_stops_the_run_and_what_is_written_stays(field: Field) -> None:
    groups = [group_of(*["ok"] * 200)]
    with small_disk(field.out, 64):
        outcome = field.run(groups)
        check_full_disk(field, outcome, 200, "No space left on device")
        subprocess.run(["mount", "-o", "remount,size=4096k", str(field.out)], check=True)
        again = field.run(groups)
        assert (again.planned, again.complete) == (200 - outcome.done, True)
        assert len(field.parts().rows) == len(field.lines()) == 200


def test_a_disk_filled_by_logs_too_stops_the_run(field: Field) -> None:
    with small_disk(field.out, 64):
        field.logs = field.out / "logs"
        outcome = field.run([group_of(*["error", "ok"] * 100)])
        assert "No space left on device" in outcome.stopped
        rows = field.parts().rows
        assert sum(row.ok for row in rows.values()) == outcome.done
        assert len(rows) == outcome.done + len(outcome.failed)


def test_a_limit_on_a_files_size_stops_the_run_too(field: Field) -> None:
    """Stands in for a full disk where none can be mounted: the last row fits in part."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    groups = [group_of(*["ok"] * 40)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        outcome = field.run(groups)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    check_full_disk(field, outcome, 40, "a row could not be written")
    assert field.parts().torn == 0
    again = field.run(groups)
    assert (again.planned, again.complete) == (40 - outcome.done, True)


@pytest.mark.parametrize("behaviour", ["ok", "error"])
def test_a_row_of_either_kind_that_cannot_be_kept_stops_the_run(
    field: Field, behaviour: str
) -> None:
    field.out.mkdir()
    (field.out / "parts").write_text("a file where the folder should be")
    outcome = field.run([group_of(behaviour, "ok")])
    assert "a row could not be written" in outcome.stopped
    assert (outcome.done, outcome.failed) == (0, ())
    assert len(outcome.not_run[0].tasks) == 2


def test_a_full_disk_of_the_engines_cache_fails_no_case(field: Field) -> None:
    outcome = field.run([group_of("ok", "full", "ok")])
    assert outcome.stopped == "OSError: [Errno 28] No space left on device: '/some/cache'"
    assert (outcome.done, outcome.failed) == (1, ())
    assert [task.key for task in outcome.not_run[0].tasks] == ["2-full", "3-ok"]
    building = field.run([group_of("ok", first=9, model="full")])
    assert building.stopped == outcome.stopped


# Exceptions, by what they are.


class AcceleratorError(RuntimeError):
    """Named as torch's."""


class Nested(OutOfMemoryError):
    """A subclass is one too."""


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (BadInput("CUDA error in the text of a refusal"), Fault.REFUSED),
        (Nested("nothing said"), Fault.MEMORY),
        (MemoryError(), Fault.MEMORY),
        (RuntimeError("CUDA error: out of memory"), Fault.MEMORY),
        (AcceleratorError("CUDA error: out of memory"), Fault.MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), Fault.MEMORY),
        (AcceleratorError("device-side assert triggered"), Fault.CUDA),
        (RuntimeError("CUDA error: device-side assert triggered"), Fault.CUDA),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), Fault.CUDA),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), Fault.CUDA),
        (RuntimeError("cudaErrorLaunchFailure"), Fault.CUDA),
        (ValueError("CUDA error is only talked about"), Fault.ERROR),
        (RuntimeError("size mismatch"), Fault.ERROR),
        (RunFailed("a helper failed"), Fault.ERROR),
    ],
)
def test_exceptions_are_told_apart(error: Exception, fault: Fault) -> None:
    assert fault_of(error) is fault


def test_a_full_disk_is_found_behind_other_errors() -> None:
    full = OSError(errno.EDQUOT, "quota")
    shown = RuntimeError("could not compile")
    shown.__cause__ = full
    assert disk_full(shown) is full
    assert disk_full(OSError(errno.EACCES, "no")) is None


def test_an_error_is_described() -> None:
    assert describe(ValueError("no such thing")) == "ValueError: no such thing"
    assert describe(ValueError()) == "ValueError: no message"
    assert describe(BadInput("needs 9 blocks")) == "needs 9 blocks"
    assert len(describe(ValueError("x" * 10_000))) == 300


def test_options_of_a_run_reach_it(field: Field) -> None:
    lanes = field.lanes()
    outcome = run_groups([group_of("killed")], lanes, field.out, RunOptions(deaths=1))
    assert (outcome.failed, field.begun(1)) == ((), 1)
    assert "died 1 times" in outcome.not_run[0].reason
