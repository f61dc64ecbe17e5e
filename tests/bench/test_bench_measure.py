"""One test: warm-up, repetitions, and the runs that only make power known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bench_world import MS, SECOND, UNIX, FakeBackend, FakeSensors, Time, recording_at

from opkit.bench.measure import Effort, Measured, measure
from opkit.bench.plan import BenchTest, Kind
from opkit.bench.prompts import synthetic
from opkit.errors import RunFailed
from opkit.sensors.levels import NoSensors, Sensors

PROMPT = BenchTest(Kind.PROMPT, 1000, 0)  # 10 ms with the fake engine


def run(
    test: BenchTest,
    backend: FakeBackend,
    sensors: Sensors,
    effort: Effort,
    say: Callable[[str], Any] = lambda _: None,
) -> Measured:
    time = backend.time
    return measure(
        test, effort, backend, synthetic(0, 1000), sensors, time.clock(), recording_at(time), say
    )


def effort(**given: Any) -> Effort:
    return Effort(**{"repetitions": 3, "warmup": 1, "power_s": 0.0, "sample_ms": 100, **given})


def test_without_sensors_nothing_runs_that_was_not_asked_for() -> None:
    backend = FakeBackend(Time())
    done = run(PROMPT, backend, NoSensors(), effort(power_s=10.0))
    assert len(backend.calls) == 4
    assert (done.warmups, len(done.turns), done.more) == (1, 3, [])


def test_every_run_has_prompts_of_its_own() -> None:
    backend = FakeBackend(Time())
    run(BenchTest(Kind.BOTH, 32, 4, 2), backend, NoSensors(), effort())
    prompts = [tuple(prompt) for sent, _ in backend.calls for prompt in sent]
    assert len(prompts) == len(set(prompts)) == 8
    assert {len(prompt) for prompt in prompts} == {32}
    assert {output for _, output in backend.calls} == {4}


def test_a_generation_test_sends_one_token() -> None:
    backend = FakeBackend(Time())
    run(BenchTest(Kind.GENERATION, 0, 8), backend, NoSensors(), effort())
    assert {(len(sent[0]), output) for sent, output in backend.calls} == {(1, 8)}


def test_warm_up_lasts_until_the_meter_shows_the_test() -> None:
    """The fake meter wants 0.3 s, counted from the end of the warm-up that was asked for."""
    backend = FakeBackend(Time())
    done = run(PROMPT, backend, FakeSensors(), effort(warmup=2))
    assert done.warmups == 2 + 30


def test_no_warm_up_is_none() -> None:
    assert run(PROMPT, FakeBackend(Time()), FakeSensors(), effort(warmup=0)).warmups == 0


def test_a_short_test_goes_on_for_its_power() -> None:
    backend = FakeBackend(Time())
    done = run(PROMPT, backend, FakeSensors(), effort(power_s=0.5))
    assert (len(done.turns), len(done.more)) == (3, 47)
    began, ended = done.stretch
    assert ended - began == 500 * MS
    assert began == done.turns[0].began_ns


def test_a_long_test_does_not() -> None:
    assert run(PROMPT, FakeBackend(Time()), FakeSensors(), effort(power_s=0.03)).more == []


def test_the_time_of_day() -> None:
    done = run(PROMPT, FakeBackend(Time()), NoSensors(), effort())
    assert done.shift_ns == UNIX


def test_an_interrupted_test_keeps_what_it_has() -> None:
    backend = FakeBackend(Time(), fails={3: KeyboardInterrupt()})
    done = run(PROMPT, backend, NoSensors(), effort())
    assert done.interrupted
    assert len(done.turns) == 2
    assert len(done.track.levels) == 1  # what had been recorded when it ended


def test_an_interruption_before_the_first_number_is_one() -> None:
    backend = FakeBackend(Time(), fails={1: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(PROMPT, backend, NoSensors(), effort())


def test_an_interruption_while_power_is_measured_keeps_all_repetitions() -> None:
    backend = FakeBackend(Time(), fails={40: KeyboardInterrupt()})
    done = run(PROMPT, backend, FakeSensors(), effort(power_s=1.0))
    assert (len(done.turns), done.interrupted) == (3, True)


def test_a_failure_is_the_test_s() -> None:
    backend = FakeBackend(Time(), fails={2: RunFailed("no memory")})
    with pytest.raises(RunFailed, match="no memory"):
        run(PROMPT, backend, NoSensors(), effort())


def test_what_is_said() -> None:
    said: list[str] = []
    run(PROMPT, FakeBackend(Time()), NoSensors(), effort(), said.append)
    assert said == ["pp1000: warming up", "pp1000: 3 repetitions"]
    assert SECOND == 1000 * MS
