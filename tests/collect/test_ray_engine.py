"""The same work over Ray: rows come home, and no actor, worker or node that dies loses any."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from collecting import HERE, Field, living, until, variable
from fake_mocks import group_of

from opkit.collect.work import Fault
from opkit.collect.workers import ray_engine
from opkit.collect.workers.pool import RunOptions
from opkit.collect.workers.ray_engine import RayLane, RayOptions, ray_lanes, run_on_ray
from opkit.collect.workers.tally import Outcome, Status
from opkit.errors import BadInput, RunFailed, ToolMissing

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "opkit[ray]"'
)


@pytest.fixture
def field(tmp_path: Path) -> Field:
    return Field(tmp_path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of a CPU each, which the runs of this file find connected and must leave so."""
    ray = ray_engine._import_ray()
    module = importlib.import_module("ray.cluster_utils")
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with ray_engine._own_signals():
        made = module.Cluster(
            initialize_head=True, head_node_args={**node, "include_dashboard": False}
        )
        made.second = made.add_node(**node)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def run(field: Field, *behaviours: str, options: Any = None, **changes: Any) -> Outcome:
    """Run the cases on the cluster that there is."""
    ray = RayOptions(lane=field.options(**changes), actor_s=20.0)
    try:
        return run_on_ray([group_of(*behaviours)], ray, field.out, options)
    finally:
        field.ended()


def actor_of(worker: int) -> int:
    """The actor whose worker this is."""
    (parent,) = [parent for pid, _, parent in living() if pid == worker]
    return parent


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_every_fault_has_the_same_end_as_on_one_host(field: Field) -> None:
    outcome = run(
        field, "ok", "segfault", "oom-once", "refused", "hang-once", "cuda-once", "ok", case_s=1.0
    )
    assert (outcome.done, outcome.lanes, outcome.complete) == (5, 2, True)
    assert outcome.failed_by_cause == {"worker died": 1, "refused": 1}
    assert len(list((field.out / "parts").iterdir())) == 1, "the driver's own"
    keys = [json.loads(line)["key"] for line in field.lines()]
    assert len(set(keys)) == len(keys) == 7
    assert field.parts().rows["3-oom-once"].attempts == 2
    assert importlib.import_module("ray").is_initialized(), "it was not started by the run"


@needs_ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("victim", ["worker", "actor"])
def test_what_is_killed_costs_the_case_in_hand(field: Field, victim: str) -> None:
    killed: list[int] = []

    def on_event(_status: object) -> None:
        if not killed and len(set(field.noted("pids"))) == 2 and len(field.noted("begun")) >= 4:
            worker = int(field.noted("pids")[0])
            killed.append(worker if victim == "worker" else actor_of(worker))
            os.kill(killed[0], signal.SIGKILL)

    ray = RayOptions(lane=field.options(), actor_s=20.0)
    outcome = run_on_ray([group_of("meet", *["nap"] * 29)], ray, field.out, on_event=on_event)
    field.ended()
    assert killed
    assert (outcome.done, outcome.failed, outcome.complete) == (30, (), True)
    keys = [json.loads(line)["key"] for line in field.lines()]
    assert len(set(keys)) == len(keys) == 30


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_an_interrupt_ends_workers_wherever_they_are(field: Field) -> None:
    def on_event(status: Status) -> None:
        if status.done:
            until(lambda: field.begun(2) and field.noted("children"))
            raise KeyboardInterrupt

    ray = RayOptions(lane=field.options(), actor_s=20.0)
    groups = [group_of("ok", "hang", "child")]
    with pytest.raises(KeyboardInterrupt):
        run_on_ray(groups, ray, field.out, on_event=on_event)
    field.ended()
    children = {int(line) for line in field.noted("children")}
    until(lambda: not children & {pid for pid, _, _ in living()})
    assert set(field.parts().rows) == {"1-ok"}
    assert importlib.import_module("ray").is_initialized()


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_what_was_done_on_a_host_is_not_done_again_on_a_cluster(field: Field) -> None:
    field.run([group_of("ok", "ok")])
    outcome = run(field, "ok", "ok", "ok")
    assert (outcome.planned, outcome.done) == (1, 1)


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_node_with_a_full_disk_is_left_and_its_tasks_are_not(field: Field) -> None:
    # Whoever has this case first loses its node; the case is tried again by the other.
    outcome = run(field, *["nap"] * 6, "full-once", *["nap"] * 6)
    assert (outcome.done, outcome.stopped, outcome.complete) == (13, "", True)
    assert len(field.lines()) == 13


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_more_workers_than_room_do_not_hold_the_run_up(field: Field) -> None:
    with ray_lanes(RayOptions(lane=field.options(), actor_s=20.0)) as lanes:
        spare = RayLane(lanes[0]._ray, "spare", {"num_cpus": 64}, 1.0, field.options())
        outcome = ray_engine.run_groups([group_of(*["nap"] * 9)], [*lanes, spare], field.out)
    assert (outcome.done, outcome.complete) == (9, True)
    field.ended()


@needs_ray
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_leaves_nothing_of_its_own_cluster(
    field: Field, sent: signal.Signals
) -> None:
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    started = subprocess.Popen(
        [sys.executable, str(HERE / "collect_driver.py"), str(field.out.parent), "ray",
         "ok", "hang-once", "hang-once"],
        env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": ""},
    )  # fmt: skip
    until(lambda: field.begun(2) and field.begun(3), 60)
    started.send_signal(sent)
    # That it is 130: importing Ray did not take the signals from their handlers.
    assert started.wait(60) == (-9 if sent is signal.SIGKILL else 130)
    until(lambda: field.survivors() == [], 30)
    assert set(field.parts().rows) == {"1-ok"}
    assert field.run([group_of("ok", "hang-once", "hang-once")]).done == 2


@needs_ray
def test_a_node_that_dies_costs_the_case_in_hand(cluster: Any, field: Field) -> None:
    """The last test of the cluster, which has one node less after it."""
    removed: list[Any] = []

    def on_event(_status: object) -> None:
        if not removed and len(set(field.noted("pids"))) == 2 and len(field.noted("begun")) > 4:
            removed.append(cluster.second)
            cluster.remove_node(cluster.second, allow_graceful=False)

    ray = RayOptions(lane=field.options(), actor_s=60.0)
    outcome = run_on_ray([group_of("meet", *["nap"] * 29)], ray, field.out, on_event=on_event)
    field.ended()
    assert removed
    assert (outcome.done, outcome.failed, outcome.complete) == (30, (), True)
    assert len(field.lines()) == 30


# Without a cluster.


def test_a_missing_ray_is_a_sentence(monkeypatch: pytest.MonkeyPatch, field: Field) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ToolMissing) as caught:
        run_on_ray([group_of("ok")], RayOptions(), field.out)
    assert caught.value.hint == 'install it: pip install "opkit[ray]"'


class FakeRay(SimpleNamespace):
    """As much of Ray as connecting takes."""

    def __init__(self, resources: dict[str, float], error: Exception | None = None) -> None:
        super().__init__(asked=[], ended=0)
        self.resources = resources
        self.error = error

    def is_initialized(self) -> bool:
        return False

    def init(self, **given: Any) -> None:
        self.asked.append(given)
        if self.error:
            raise self.error

    def shutdown(self) -> None:
        self.ended += 1

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **needs: Any) -> Any:
        return lambda kind: (kind, needs)


@pytest.mark.parametrize(
    ("resources", "options", "lanes", "needs"),
    [
        ({"GPU": 3.0, "CPU": 9.0}, RayOptions(), 3, {"num_gpus": 1, "num_cpus": 0}),
        ({"GPU": 3.0, "CPU": 9.0}, RayOptions(workers=2), 2, {"num_gpus": 1, "num_cpus": 0}),
        ({"GPU": 3.0, "CPU": 9.0}, RayOptions(cpus=4), 2, {"num_gpus": 0, "num_cpus": 4}),
        ({"CPU": 2.0}, RayOptions(workers=8), 2, {"num_gpus": 0, "num_cpus": 1}),
    ],
)
def test_lanes_are_as_many_as_the_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
    resources: dict[str, float],
    options: RayOptions,
    lanes: int,
    needs: dict[str, float],
) -> None:
    ray = FakeRay(resources)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    with ray_lanes(options) as found:
        assert [lane.name for lane in found] == [f"ray{number}" for number in range(lanes)]
        for lane in found:
            assert lane._class[1] == {"max_restarts": 0, "max_task_retries": 0, **needs}
        assert ray.ended == 0
    assert ray.ended == 1


@pytest.mark.parametrize(
    ("given", "environment", "used"),
    [("", "", "local"), ("", "10.0.0.1:6379", "10.0.0.1:6379"), ("a:1", "b:2", "a:1")],
)
def test_the_cluster_is_the_one_named(
    monkeypatch: pytest.MonkeyPatch, given: str, environment: str, used: str
) -> None:
    ray = FakeRay({"CPU": 1.0})
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    with variable("RAY_ADDRESS", environment), ray_lanes(RayOptions(address=given)):
        assert ray.asked[0]["address"] == used
        assert ("object_store_memory" in ray.asked[0]) == (used == "local")


@pytest.mark.parametrize("address", ["", "nowhere:1"])
def test_a_cluster_that_is_not_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    error = ConnectionError("Could not find any running Ray instance")
    monkeypatch.setitem(sys.modules, "ray", FakeRay({}, error))  # type: ignore[arg-type]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    named = f"no Ray cluster at {address}" if address else "a local Ray does not start"
    with pytest.raises(RunFailed, match=named), ray_lanes(RayOptions(address=address)):
        pass


def test_a_cluster_without_room_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay({"CPU": 2.0})
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no room"), ray_lanes(RayOptions(cpus=4)):
        pass
    assert ray.ended == 1


def test_what_runs_say_of_ray_is_known() -> None:
    assert Fault.CRASH == "worker died"
    assert RunOptions().deaths == 3
