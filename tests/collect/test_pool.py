"""Which lane does what, what is tried again, what is given up, and what is told of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fake_mocks
import pytest
from collecting import Field
from fake_mocks import group_of

import opkit
from opkit.collect.measurement import Measurement
from opkit.collect.work import Fault, Group, Row, Task, build_digest
from opkit.collect.workers.lane import BuildFailed, BuildReport, LaneOptions, LocalLane, Tried
from opkit.collect.workers.parts import Part
from opkit.collect.workers.pool import RunOptions, run_groups
from opkit.collect.workers.tally import ACTIVITIES, Status
from opkit.errors import BadInput, OpkitError
from opkit.layers.manifest import Manifest
from opkit.layers.op import LaunchMode


@pytest.fixture
def field(tmp_path: Path) -> Field:
    return Field(tmp_path)


# A run that goes well.


def test_a_row_says_all_that_a_table_needs(field: Field) -> None:
    built: list[tuple[Manifest, Group]] = []
    group = group_of("ok")
    outcome = field.run([group], on_built=lambda *told: built.append(told))
    assert (outcome.planned, outcome.done, outcome.complete) == (1, 1, True)
    row = field.parts().rows["1-ok"]
    assert (row.table, row.columns, row.group) == (
        "fake", {"m": 1, "how": "ok on torch"}, "fakes",
    )  # fmt: skip
    assert row.case == {"m": 1, "n": 1, "k": 1, "dtype": "ok", "mode": "eager"}
    assert row.gpu == {"name": "fake GPU", "uuid": "0", "index": 0}
    assert row.measurement is not None
    assert row.measurement.timing == group.timing
    assert (row.attempts, row.fault, row.error) == (1, None, "")
    assert row.host
    assert row.created
    assert [(told.name, row.build) for _, told in built] == [("fakes", build_digest(built[0][0]))]


def test_a_worker_is_ended_politely(field: Field) -> None:
    field.run([group_of("ok")])
    pid = field.noted("pids")[0]
    assert field.noted("closed") == [f"{pid} mock", f"{pid} device"]


def test_one_build_serves_all_tasks_and_the_next_build_the_same_process(field: Field) -> None:
    field.run([group_of("ok", "ok", name="a"), group_of("ok", name="b", first=3)])
    assert len(set(field.noted("pids"))) == 1
    assert len(field.noted("builds")) == 2
    assert field.noted("closed")[0].endswith("mock"), "the first mock goes before the second comes"
    assert [line.split()[1] for line in field.noted("begun")] == ["1", "2", "3"]


def test_lanes_share_a_group(field: Field) -> None:
    outcome = field.run([group_of(*["nap"] * 20)], 2)
    by_worker = Counter(line.split()[0] for line in field.noted("begun"))
    assert outcome.done == 20
    assert len(by_worker) == 2
    assert sum(by_worker.values()) == 20
    rows = field.parts().rows.values()
    assert {row.gpu["uuid"] for row in rows} == {"0", "1"}
    assert len({row.build for row in rows}) == 1, "equal builds are one, whoever made them"


def test_an_eager_fallback_is_recorded_with_its_reason(field: Field) -> None:
    field.run([group_of("capture", "ok", graph=True)])
    rows = field.parts().rows
    measured = rows["1-capture"].measurement
    assert measured is not None
    assert (measured.launch, measured.graph_error) == (
        LaunchMode.EAGER, "the forward cannot be captured: it syncs",
    )  # fmt: skip
    assert rows["1-capture"].case["mode"] == "graph"
    plain = rows["2-ok"].measurement
    assert plain is not None
    assert (plain.launch, plain.graph_error) == (LaunchMode.GRAPH, "")


# What is already there.


def test_what_a_folder_has_is_not_measured_again(field: Field) -> None:
    field.run([group_of("ok", "ok")])
    again = field.run([group_of("ok", "ok", "ok")])
    assert (again.planned, again.done) == (1, 1)
    assert [field.begun(number) for number in (1, 2, 3)] == [1, 1, 1]
    assert len(field.lines()) == 3


def test_nothing_to_do_starts_nothing(field: Field) -> None:
    field.run([group_of("ok")])
    outcome = field.run([group_of("ok")])
    assert (outcome.planned, outcome.done, outcome.complete) == (0, 0, True)
    assert len(field.noted("pids")) == 1


@pytest.mark.parametrize("retry", [False, True])
def test_quarantine_is_tried_again_when_asked_for(field: Field, retry: bool) -> None:
    assert field.run([group_of("error-once", "ok")]).failed_by_cause == {"error": 1}
    again = field.run([group_of("error-once", "ok")], options=RunOptions(retry_failed=retry))
    assert (again.planned, again.done) == ((1, 1) if retry else (0, 0))
    assert field.parts().done("1-error-once") == retry


def test_what_another_run_does_meanwhile_is_skipped(field: Field) -> None:
    other = Part(field.out)

    def elsewhere(_manifest: Manifest, group: Group) -> None:
        for key in ("2-slow", "3-segfault"):  # this run would hang at the one and die of the other
            other.append(Row(key, group.name, "fake", {}, {}, Measurement((1.0,))))

    outcome = field.run(
        [group_of("ok", "slow", "segfault", "ok")],
        options=RunOptions(reread_s=0.0),
        on_built=elsewhere,
    )
    assert (outcome.done, outcome.skipped, outcome.complete) == (2, 2, True)
    assert field.begun(2) == field.begun(3) == 0


def test_a_broken_part_stops_a_run_before_it_starts(field: Field) -> None:
    (field.out / "parts").mkdir(parents=True)
    (field.out / "parts" / "x.jsonl").write_text("no row\n")
    with pytest.raises(BadInput, match=r"x\.jsonl, line 1"):
        field.run([group_of("ok")])
    assert field.noted("pids") == []


@pytest.mark.parametrize("lanes", [0, 1])
def test_what_cannot_be_run_is_refused(field: Field, lanes: int) -> None:
    groups = [group_of("ok")] * (1 + lanes)
    with pytest.raises(BadInput, match="same name" if lanes else "nothing to run on"):
        field.run(groups, lanes)


# Builds that fail.


def test_a_build_that_the_process_spoils_is_repeated_in_a_fresh_one(field: Field) -> None:
    outcome = field.run([group_of("ok", name="a"), group_of("ok", name="b", first=2,
                                                            model="second fails")])  # fmt: skip
    assert (outcome.done, outcome.complete) == (2, True)
    assert len(field.noted("pids")) == 2
    assert len(field.noted("builds")) == 3


@pytest.mark.parametrize(
    ("model", "tries", "reason"),
    [
        ("fails", 2, "RuntimeError: weights do not fit"),
        ("segfault", 2, "SIGSEGV"),
        ("slow", 2, "took more than 0.5 s"),
        ("refused", 1, "8 heads cannot be shared among 3 ranks"),
    ],
)
def test_a_build_that_fails_ends_its_group_only(
    field: Field, model: str, tries: int, reason: str
) -> None:
    broken = group_of("ok", "ok", name="broken", model=model)
    changes = {"build_s": 0.5} if model == "slow" else {}
    outcome = field.run([broken, group_of("ok", name="sound", first=3)], **changes)
    assert len(field.noted("builds")) == tries + 1
    assert (outcome.done, outcome.failed, outcome.complete) == (1, (), False)
    (left,) = outcome.not_run
    assert left.group.name == "broken"
    assert [task.key for task in left.tasks] == ["1-ok", "2-ok"]
    assert reason in left.reason
    # Not run is not failed: the next run takes it.
    assert field.run([replace(broken, plan=replace(broken.plan, model=""))]).done == 2


def test_a_lane_that_cannot_start_says_why(field: Field) -> None:
    groups = [group_of("ok", name="a"), group_of("ok", name="b", first=2)]
    outcome = field.run(groups, tools=fake_mocks.NO_GPU_TOOLS)
    assert [left.reason for left in outcome.not_run] == ["no GPU here", "no GPU here"]
    assert len(list(field.logs.iterdir())) == 2, "one start and one more for the whole lane"


def test_an_interpreter_that_is_not_there_is_a_sentence(field: Field) -> None:
    outcome = field.run([group_of("ok")], python="/no/python")
    assert "/no/python could not be started" in outcome.not_run[0].reason


def test_a_lane_that_cannot_start_leaves_its_work_to_others(field: Field) -> None:
    lanes = [
        *field.lanes(),
        LocalLane("lame", None, field.options(tools=fake_mocks.NO_GPU_TOOLS), field.logs, None),
    ]
    outcome = run_groups([group_of(*["nap"] * 6), group_of("ok", name="b", first=9)],
                         lanes, field.out)  # fmt: skip
    assert (outcome.done, outcome.complete) == (7, True)
    field.ended()


# Deaths in a row.


def test_the_third_death_in_a_row_ends_the_group(field: Field) -> None:
    outcome = field.run([group_of("killed", "killed", "killed"), group_of("ok", name="b", first=9)])
    assert [field.begun(number) for number in (1, 2, 3)] == [2, 1, 0]
    assert [row.key for row in outcome.failed] == ["1-killed"]
    (left,) = outcome.not_run
    assert [task.key for task in left.tasks] == ["2-killed", "3-killed"]
    assert "died 3 times in a row, the last time: the worker was ended by SIGKILL" in left.reason
    assert outcome.done == 1, "another group is another chance"


def test_cases_are_to_blame_where_a_proven_one_still_succeeds(field: Field) -> None:
    outcome = field.run([group_of("ok", "killed", "exit", "cuda", "ok")])
    assert (outcome.done, outcome.complete) == (2, True)
    assert outcome.failed_by_cause == {"worker died": 2, "CUDA error": 1}
    assert [row.attempts for row in outcome.failed] == [2, 2, 2]
    assert field.begun(1) > 1, "it was the proof"
    keys = [line.split('"key": "')[1].split('"')[0] for line in field.lines()]
    assert sorted(keys) == ["1-ok", "2-killed", "3-exit", "4-cuda", "5-ok"]


def test_a_group_that_one_lane_gives_up_is_left_to_another(tmp_path: Path) -> None:
    sick, sound = Field(tmp_path), group_of(*["nap"] * 5)
    lanes = sick.lanes(2)
    # On the second lane no case ends in time.
    lanes[1] = LocalLane("sick", "1", sick.options(case_s=0.02), sick.logs, sick.out)
    outcome = run_groups([sound], lanes, sick.out, RunOptions(deaths=1))
    assert (outcome.done, outcome.complete, outcome.failed) == (5, True, ())


class ScriptedLane:
    """A lane without a process, whose attempts end as a script says."""

    name = "scripted"
    keeps = False

    def __init__(self, *script: str) -> None:
        self.script = list(script)
        self.attempts: list[tuple[str, int]] = []
        self.built = False

    def serves(self, group: Group) -> bool:
        del group
        return self.built

    def build(self, group: Group, cancelled: object) -> BuildReport:
        del group, cancelled
        self.built = True
        return BuildReport(Manifest("mock"), "digest", 0.0, 0.0)

    def measure(self, task: Task, attempt: int, keep: bool, cancelled: object) -> Tried:
        del keep, cancelled
        self.attempts.append((task.key, attempt))
        end = self.script.pop(0)
        row = Row(task.key, "fakes", "fake", {}, {}, attempts=attempt)
        if end == "ok":
            return Tried(replace(row, measurement=Measurement((1.0,))))
        self.built = False
        return Tried(
            replace(row, fault=Fault.CRASH, error=end),
            died=True, began=end != "idle", gone=end == "gone",
        )  # fmt: skip

    def drop(self) -> None:
        self.built = False


def test_a_death_before_the_case_began_is_no_attempt_at_it(field: Field) -> None:
    lane = ScriptedLane("idle", "died", "ok")
    outcome = run_groups([group_of("ok")], [lane], field.out, RunOptions(deaths=9))
    assert lane.attempts == [("1-ok", 1), ("1-ok", 1), ("1-ok", 2)]
    assert (outcome.done, outcome.failed) == (1, ())


def test_deaths_before_any_case_began_end_the_group_too(field: Field) -> None:
    lane = ScriptedLane("idle", "idle", "idle")
    outcome = run_groups([group_of("ok")], [lane], field.out)
    assert (outcome.done, outcome.failed, lane.script) == (0, (), [])
    assert "died 3 times in a row" in outcome.not_run[0].reason


def test_a_lane_that_lost_its_place_gives_its_task_back_with_its_attempts(field: Field) -> None:
    lane = ScriptedLane("gone", "gone")
    outcome = run_groups([group_of("ok")], [lane], field.out)
    assert lane.attempts == [("1-ok", 1), ("1-ok", 2)]
    assert [row.attempts for row in outcome.failed] == [2]


# What is told.


def test_progress_is_plain_numbers_in_the_callers_thread(field: Field) -> None:
    told: list[Status] = []
    threads = set()

    def on_event(status: Status) -> None:
        told.append(status)
        threads.add(threading.current_thread())

    field.run([group_of("nap", "error", "nap", "nap")], on_event=on_event)
    assert threads == {threading.main_thread()}
    last = told[-1]
    assert (last.planned, last.done, last.failed, last.skipped) == (4, 3, {"error": 1}, 0)
    assert last.rate is not None
    assert last.rate > 0
    assert last.eta_s == 0
    assert 0 < last.busy < 1
    assert last.lanes == {"gpu0": "ended"}
    seen = [status.lanes.get("gpu0") for status in told]
    assert "builds fakes" in seen
    assert "1 × 1 × 1 nap" in seen
    assert [status.note for status in told if status.note] == [
        "gpu0: 2 × 1 × 1 error: error: ValueError: no such thing"
    ]


def test_all_time_is_accounted_for(field: Field) -> None:
    outcome = field.run([group_of("nap", "nap", "killed-once")], 2)
    spent = outcome.activities
    assert tuple(spent) == ACTIVITIES
    assert sum(spent.values()) == pytest.approx(outcome.wall_s * 2)
    assert spent["measure"] >= 0.2
    assert all(spent[name] > 0 for name in ("start", "build", "prepare", "lost"))
    assert outcome.busy_s == pytest.approx(3 * 0.002)
    assert outcome.largest_cost in ("start", "rest", "lost")


class NotAdmitted(OpkitError):
    """What the check of a build raises."""


def test_what_the_check_of_a_build_raises_ends_the_run(field: Field) -> None:
    def check(_manifest: Manifest, _group: Group) -> None:
        assert threading.current_thread() is threading.main_thread()
        raise NotAdmitted("another layer")

    with pytest.raises(NotAdmitted, match="another layer"):
        field.run([group_of("ok"), group_of("ok", name="b", first=2)], 2, on_built=check)
    assert field.noted("begun") == [], "nothing is measured before the check"


def test_what_a_listener_raises_ends_the_run(field: Field) -> None:
    def on_event(status: Status) -> None:
        if status.done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        field.run([group_of("ok", "slow", "slow")], on_event=on_event)
    assert field.parts().done("1-ok")


def test_an_interrupt_ends_the_workers_and_keeps_what_is_done(field: Field) -> None:
    def on_event(status: Status) -> None:
        if status.done == 2 and "slow" in status.lanes.get("gpu0", ""):
            raise KeyboardInterrupt

    groups = [group_of("ok", "ok", "slow-once", "ok")]
    with pytest.raises(KeyboardInterrupt):
        field.run(groups, on_event=on_event)
    assert set(field.parts().rows) == {"1-ok", "2-ok"}
    again = field.run(groups)
    assert (again.planned, again.done, again.complete) == (2, 2, True)
    assert len(field.lines()) == 4


def test_a_build_that_nobody_needs_any_more_holds_nothing_up(field: Field) -> None:
    began = time.monotonic()
    until_joined = threading.Event()

    class Slow(LocalLane):
        def build(self, group, cancelled):  # type: ignore[no-untyped-def]
            until_joined.set()
            return super().build(replace(group, plan=replace(group.plan, model="slow")), cancelled)

    class Waits(LocalLane):
        def build(self, group, cancelled):  # type: ignore[no-untyped-def]
            until_joined.wait(10)
            return super().build(group, cancelled)

    lanes = [
        kind(name, None, field.options(), field.logs, field.out)
        for kind, name in ((Waits, "quick"), (Slow, "slow"))
    ]
    outcome = run_groups([group_of("ok", "ok")], lanes, field.out)
    assert (outcome.done, outcome.complete) == (2, True)
    assert time.monotonic() - began < field.options().build_s
    field.ended()


# Lanes.


def test_a_lane_that_the_driver_cannot_end_is_not_used_again(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lane,) = field.lanes()
    group = group_of("ok")
    lane.build(group, lambda: False)
    monkeypatch.setattr("opkit.collect.workers.lane._REAP_S", 0.0)
    lane.kill()
    with pytest.raises(BuildFailed, match="hangs in the GPU's driver") as caught:
        lane.build(group, lambda: False)
    assert caught.value.final
    field.ended()


def test_a_worker_gets_its_gpu(field: Field) -> None:
    lane = LocalLane("gpu3", "GPU-abc", LaneOptions(env={"A": "1"}), field.logs, None)
    env = lane._environment()
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("GPU-abc", "PCI_BUS_ID")
    assert env["A"] == "1"


def test_another_interpreter_runs_this_opkit_and_its_own_packages(
    field: Field, tmp_path: Path
) -> None:
    """Stands in for an environment with another opkit and a package that lies beside this one."""
    theirs = tmp_path / "theirs"
    (theirs / "opkit").mkdir(parents=True)
    (theirs / "opkit" / "__init__.py").write_text("raise ImportError('the other opkit')")
    (theirs / "tests").mkdir()
    (theirs / "tests" / "__init__.py").write_text("")
    (theirs / "spy_tools.py").write_text(
        "import fake_mocks, opkit, tests\n"
        "def tools():\n"
        "    fake_mocks.note('found', opkit.__file__)\n"
        "    fake_mocks.note('found', tests.__file__)\n"
        "    return fake_mocks.tools()\n"
    )
    path = f"{theirs}:{field.env['PYTHONPATH']}"
    outcome = field.run(
        [group_of("ok")], env={**field.env, "PYTHONPATH": path}, tools="spy_tools:tools"
    )
    assert outcome.done == 1, outcome.not_run
    assert field.noted("found") == [opkit.__file__, str(theirs / "tests" / "__init__.py")]
