"""Whole runs with a made engine: order, rest, failures, Ctrl-C, and what is left on disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_world import MS, FakeBackend, FakeSensors, Time, options, recording_at

from opkit.bench import files
from opkit.bench.backends.backend import Served
from opkit.bench.plan import BenchOptions
from opkit.bench.result import Bench
from opkit.bench.run import run_bench
from opkit.bench.sensing import Sensing, is_here
from opkit.errors import RunFailed, WrongUsage
from opkit.sensors.levels import NoSensors, Sensors


class World:
    """A run in ``folder``; ``said`` is what was told on the way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.time = Time()
        self.sensors: Sensors = NoSensors()
        self.said: list[str] = []
        self.made: list[FakeBackend] = []
        self.like: Callable[[], FakeBackend] = lambda: FakeBackend(self.time)

    def run(self, *models: BenchOptions) -> Bench:
        def make(_options: BenchOptions, _folder: Path) -> FakeBackend:
            self.made.append(self.like())
            return self.made[-1]

        return run_bench(
            models, make, lambda _: self.sensors, recording_at(self.time), self.folder,
            self.time.clock(), self.said.append,
        )  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "out")


def small(**given: Any) -> BenchOptions:
    return options(**{"n_prompt": (100,), "n_gen": (8,), "repetitions": 2, **given})


def summary(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(bench.folder) / "summary.json").read_text())
    return found


def test_a_run_from_beginning_to_end(world: World) -> None:
    bench = world.run(small(name="mine"))
    assert [row.test for row in bench.rows] == ["pp100", "tg8"]
    assert bench.rows[0].samples_ns == (MS, MS)
    assert bench.rows[1].samples_ns == (7_010_000, 7_010_000)
    assert (bench.failures, bench.interrupted) == ([], False)
    assert world.made[0].closed == 1
    assert summary(bench) == json.loads(json.dumps(bench.as_json()))
    assert summary(bench)["schema"] == "opkit.bench/1"


def test_what_all_tests_of_a_model_share(world: World) -> None:
    context = world.run(small(name="mine", engine_args={"load_format": "dummy"})).models[0]
    assert (context.model, context.engine_version, context.timed_by) == ("mine", "9.9", "a fake")
    assert context.engine == {"max_length": 4096, "vocab": 1000}
    assert context.options["engine_args"] == {"load_format": "dummy"}
    assert context.sensors == {"kind": "none", "scope": ""}


def test_each_test_has_its_file(world: World) -> None:
    bench = world.run(small(n_prompt=(10, 20), n_gen=(), n_batch=(1, 2), name="a/b c"))
    names = [Path(row.data_file).name for row in bench.rows]
    assert names == ["b-c_pp10.json", "b-c_pp10-b2.json", "b-c_pp20.json", "b-c_pp20-b2.json"]
    detail = json.loads(Path(bench.rows[0].data_file).read_text())
    assert set(detail) >= {"power", "temp", "freq", "time"}
    assert len(detail["time"]) == 2


def test_two_models_of_one_name_keep_their_files(world: World) -> None:
    bench = world.run(small(n_gen=()), small(n_gen=()))
    assert len({row.data_file for row in bench.rows}) == 2
    assert all(Path(row.data_file).is_file() for row in bench.rows)


def test_a_run_never_writes_over_another(world: World) -> None:
    first = world.run(small(n_gen=()))
    world.time.ns = 5 * 10**9  # the same second again
    second = world.run(small(n_gen=()))
    assert first.folder != second.folder


def test_a_failed_test_costs_that_test(world: World) -> None:
    world.like = lambda: FakeBackend(world.time, fails={1: RunFailed("no memory", "less of it")})
    bench = world.run(small())
    assert [row.test for row in bench.rows] == ["tg8"]
    failure = bench.failures[0]
    assert (failure.test, failure.why) == ("pp100", "no memory (less of it)")
    assert summary(bench)["failures"][0]["test"] == "pp100"


def test_a_dead_engine_costs_its_model(world: World) -> None:
    world.like = lambda: FakeBackend(world.time, fails={1: RunFailed("gone")}, dies=True)
    bench = world.run(small(), small())
    assert bench.rows == []
    assert [(failure.test, failure.why) for failure in bench.failures] == [
        ("pp100", "gone"), ("tg8", "not run, since the engine is gone"),
    ] * 2  # fmt: skip
    assert [backend.closed for backend in world.made] == [1, 1]


def test_an_engine_that_does_not_start(world: World) -> None:
    world.like = lambda: FakeBackend(world.time, refuses=RunFailed("no such model"))
    bench = world.run(small())
    assert [(f.test, f.why) for f in bench.failures] == [("", "no such model")]
    assert world.made[0].closed == 1


def test_a_test_beyond_the_longest_context_is_not_run(world: World) -> None:
    bench = world.run(small(n_prompt=(4096, 4095)))
    assert [row.test for row in bench.rows] == ["pp4095", "tg8"]
    assert bench.failures[0].why == "4,097 tokens do not fit the engine's longest context of 4,096"


def test_an_unknown_vocabulary(world: World) -> None:
    world.like = lambda: FakeBackend(world.time, Served("m"))
    assert "--vocab-size" in world.run(small()).failures[0].why
    assert [row.test for row in world.run(small(vocab_size=9)).rows] == ["pp100", "tg8"]


def test_ctrl_c_keeps_what_was_measured(world: World) -> None:
    """In the second repetition of the second test: two models were planned, one began."""
    world.like = lambda: FakeBackend(world.time, fails={5: KeyboardInterrupt()})
    bench = world.run(small(), small())
    assert bench.interrupted
    assert [(row.test, row.repetitions, row.interrupted) for row in bench.rows] == [
        ("pp100", 2, False), ("tg8", 1, True),
    ]  # fmt: skip
    assert [backend.closed for backend in world.made] == [1]
    assert summary(bench)["interrupted"] is True


def test_ctrl_c_before_a_number(world: World) -> None:
    world.like = lambda: FakeBackend(world.time, fails={0: KeyboardInterrupt()})
    bench = world.run(small())
    assert (bench.interrupted, bench.rows, world.made[0].closed) == (True, [], 1)


def test_ctrl_c_while_a_file_is_written_keeps_the_row(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hit(path: Path, _target: Path) -> None:
        if "_tg8" in path.name:
            raise KeyboardInterrupt
        os.rename(path, _target)

    monkeypatch.setattr(files.os, "replace", hit)
    bench = world.run(small(n_gen=(8, 16)))
    assert [(row.test, row.repetitions, row.interrupted) for row in bench.rows] == [
        ("pp100", 2, False), ("tg8", 2, False),
    ]  # fmt: skip
    assert bench.interrupted
    assert bench.rows[1].data_file == ""
    assert bench.rows[1].notes == ("its detail file was not written: Ctrl-C came before",)
    assert summary(bench) == json.loads(json.dumps(bench.as_json()))
    assert not list(Path(bench.folder).glob("*.part"))


def test_a_failure_while_power_is_measured_keeps_the_repetitions(world: World) -> None:
    """One warm-up, 30 more until the meter has settled, 2 repetitions, 14 runs for power."""
    world.sensors = FakeSensors()
    lost = RunFailed("no memory", "less of it")
    world.like = lambda: FakeBackend(world.time, fails={0: lost, 48: lost})
    bench = world.run(small(n_prompt=(999, 1000), n_gen=()))
    assert [(row.test, row.repetitions, row.interrupted) for row in bench.rows] == [
        ("pp1000", 2, False)
    ]
    row = bench.rows[0]
    assert row.power_repetitions == 16
    assert row.notes[0] == "power is of a shorter stretch, since a run after the repetitions failed"
    assert [(each.test, each.why) for each in bench.failures][1:] == [
        ("pp1000", "after its repetitions, while power was measured: no memory (less of it)")
    ]


def test_an_engine_that_dies_while_power_is_measured(world: World) -> None:
    world.sensors = FakeSensors()
    world.like = lambda: FakeBackend(world.time, fails={40: RunFailed("gone")}, dies=True)
    bench = world.run(small(n_prompt=(1000,)))
    assert [row.test for row in bench.rows] == ["pp1000"]
    assert [each.test for each in bench.failures] == ["pp1000", "tg8"]
    assert bench.failures[1].why == "not run, since the engine is gone"


def test_a_full_disk_costs_no_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    bench = world.run(small(n_gen=()))
    assert bench.rows[0].avg_ns == MS
    assert bench.rows[0].data_file == ""
    assert bench.rows[0].notes == (
        "its detail file could not be written (No space left on device)",
    )
    assert world.said[-1].endswith("summary.json could not be written (No space left on device)")


def test_rest_is_between_tests_and_models_only(world: World) -> None:
    world.run(small(delay_s=3.0), small(delay_s=4.0))
    assert world.time.slept == [3.0, 4.0, 4.0]


def test_waiting_until_it_is_cool(world: World) -> None:
    world.sensors = FakeSensors(heats=[60.0, 60.0, 60.0, 55.0, 44.0, 44.0])
    world.run(small(cool_to_c=45.0, warmup=0, power_s=0.0, n_gen=(8,)))
    # Three readings belong to the first test: at its begin, its end, and the watts of its meter.
    assert world.time.slept == [1.0]
    assert "waiting to cool: 55 °C, to 45 °C" in world.said


def test_waiting_has_an_end(world: World) -> None:
    world.sensors = FakeSensors(heats=[60.0])
    world.run(small(cool_to_c=45.0, cool_limit_s=2.5, warmup=0, power_s=0.0))
    assert world.time.slept == [1.0, 1.0, 1.0]
    assert "still 60 °C after 2.5 s (asked for 45 °C): going on" in world.said


def test_waiting_without_a_thermometer(world: World) -> None:
    world.run(small(cool_to_c=45.0))
    assert world.time.slept == []
    assert "no temperature is known here: not waiting for the GPU to cool" in world.said


def test_tests_that_make_no_sense_start_nothing(world: World) -> None:
    with pytest.raises(WrongUsage):
        world.run(small(), small(n_prompt=(0,), n_gen=(0,)))
    assert (world.made, world.folder.exists()) == ([], False)


def test_a_server_s_prompts_differ_from_run_to_run(world: World) -> None:
    """Its prefix cache would answer those of the run before; an engine of one's own has none."""
    served = {"backend": "openai-url", "model": "", "url": "http://127.0.0.1:8000", "n_gen": ()}
    drawn = {}
    for name, given in {"served": served, "seeded": {**served, "seed": 7}, "own": {}}.items():
        benches = [world.run(small(**given)) for _ in range(2)]
        # A server of unknown vocabulary is asked before the run, by a client of its own.
        prompts = [made.calls[0][0] for made in [made for made in world.made if made.calls][-2:]]
        seeds = [bench.models[0].options["seed"] for bench in benches]
        assert len({str(each) for each in prompts}) == len(set(seeds))
        drawn[name] = seeds
    assert drawn["seeded"] == [7, 7]
    assert drawn["own"] == [0, 0]
    assert len({*drawn["served"], 0}) == 3


def test_a_server_is_neither_started_nor_ended(world: World) -> None:
    world.run(
        small(backend="openai-url", model="", url="http://h:1", n_gen=(), name="mine", power_s=0.0)
    )
    assert world.said[0] == "mine: asking http://h:1"
    assert not any("ending" in line for line in world.said)


def test_what_is_told_on_the_way(world: World) -> None:
    world.sensors = FakeSensors()
    world.run(small(n_gen=(), name="mine"))
    assert world.said == [
        "mine: starting vllm", "pp100: warming up", "pp100: 2 repetitions",
        "pp100: 100,000.0 tokens/s, 400 W", "mine: ending vllm",
    ]  # fmt: skip


URL = "http://{}:8000"


@pytest.mark.parametrize(
    ("given", "kind", "count"),
    [
        ({"model": "m", "backend": "vllm", "engine_args": {"tensor_parallel_size": 2}}, "auto", 2),
        (
            {
                "backend": "vllm",
                "engine_args": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            },
            "auto",
            4,
        ),
        ({"model": "", "backend": "openai-url", "url": URL.format("127.0.0.1")}, "auto", 1),
        ({"model": "", "backend": "openai-url", "url": URL.format("far.example")}, "nvml", 1),
    ],
)
def test_sensors_of_this_machine_are_asked_for(
    given: dict[str, Any], kind: str, count: int
) -> None:
    asked: list[Any] = []

    def find(*arguments: Any) -> Sensors:
        asked.append(arguments)
        return FakeSensors()

    said: list[str] = []
    Sensing(kind, "0", ("A",)).open(options(**given), said.append, find)
    assert asked == [(kind, "0", count, ("A",))]
    assert said == ["sensors: nvml, whole board of GPU 0"]


def test_a_server_on_a_host_of_several_gpus_may_use_any_of_them() -> None:
    class Several(FakeSensors):
        def facts(self) -> dict[str, Any]:
            return {"gpus": [{"index": 0, "name": "NVIDIA H100"}], "listed": 8}

    asked = options(model="", backend="openai-url", url=URL.format("localhost"))
    told = {}
    for gpus in ("", "3"):
        said: list[str] = []
        Sensing(gpus=gpus).open(asked, said.append, lambda *_: Several())
        told[gpus] = said[1:]
    assert told == {
        "": ["which GPUs the server uses is not known here: name them with --gpus"], "3": []
    }  # fmt: skip


def test_another_machine_s_server_has_no_sensors_here() -> None:
    def find(*_: Any) -> Sensors:
        raise AssertionError("not to be asked")

    said: list[str] = []
    asked = options(model="", backend="openai-url", url=URL.format("far.example"))
    assert Sensing().open(asked, said.append, find).kind == "none"
    assert "far.example is another machine" in said[0]


@pytest.mark.parametrize(
    ("host", "here"), [("localhost", True), ("127.0.1.1", True), ("::1", True), ("10.0.0.9", False)]
)
def test_where_a_host_is(host: str, here: bool) -> None:
    assert is_here(host) is here
