"""Sensors read in the background, and the mean power of a stretch of time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from bench_world import SECOND, FakeSensors, Time

from opkit.bench.clock import Clock
from opkit.bench.recorder import mean_watts, recording
from opkit.sensors.levels import Levels, NoSensors
from opkit.sensors.meter import Meter


def meter(counts: bool) -> Meter:
    return Meter("a meter", lambda: 0.0, counts, 0.3)


def test_a_counter_is_read_from_step_to_step_within_the_stretch() -> None:
    """Steps of 40 J each 0.1 s; what lies outside, at another power, does not count."""
    readings = [(0.0, 0.0), (0.5, 1000.0)]
    readings += [(1.0 + 0.05 * n, 1000.0 + 40.0 * (n // 2)) for n in range(21)]
    readings += [(2.5, 9000.0)]
    assert mean_watts(readings, meter(True), SECOND, 2 * SECOND) == pytest.approx(400.0)


def test_levels_are_averaged_with_their_time() -> None:
    readings = [(0.0, 9999.0), *((1 + n / 10, 100.0) for n in range(10)), (2.0, 300.0)]
    readings += [(3.0, 9999.0)]
    watts = mean_watts(readings, meter(False), SECOND, 2 * SECOND)
    assert watts == pytest.approx(0.9 * 100 + 0.1 * 200)


@pytest.mark.parametrize("counts", [True, False])
def test_too_few_readings(counts: bool) -> None:
    assert mean_watts([(1.5, 5.0)], meter(counts), SECOND, 2 * SECOND) is None


@pytest.mark.parametrize(
    ("counts", "times", "known"),
    [
        (False, [n / 100 for n in range(1001)], True),
        (False, [n / 100 for n in range(1001) if not 300 < n < 600], False),
        (False, [n / 100 for n in range(300)], False),
        (True, [n / 100 for n in range(1001) if not 300 < n < 600], True),
        (True, [n / 100 for n in range(300)], False),
        (True, [n / 100 for n in range(700, 1001)], False),
    ],
)
def test_a_meter_that_stopped_to_answer(counts: bool, times: list[float], known: bool) -> None:
    """A counter goes on while nobody reads it; of a level nothing is known meanwhile."""
    readings = [(at, 500.0 * at if counts else 500.0) for at in times]
    watts = mean_watts(readings, meter(counts), 0, 10 * SECOND)
    assert watts == (pytest.approx(500.0) if known else None)


class Counted(FakeSensors):
    """Tells when the third reading has begun, so that a test need not wait for a time."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.thrice = 0, threading.Event()

    def levels(self) -> Levels:
        self.read += 1
        if self.read == 3:
            self.thrice.set()
        return Levels({"GPU 0": float(self.read)})

    def meter(self) -> Meter | None:
        return Meter("sampling", lambda: 7.0, False, 0.3)


def test_all_sensors_are_read_until_the_end() -> None:
    sensors = Counted()
    with recording(Clock())(sensors, 1) as track:
        assert sensors.thrice.wait(30)
    numbers = [levels.power["GPU 0"] for _, levels in track.levels]
    assert numbers == [float(n + 1) for n in range(len(numbers))]
    assert len(numbers) >= 3
    stamps = [at for at, _ in track.levels]
    assert stamps == sorted(stamps)
    assert {watts for _, watts in track.readings} == {7.0}
    assert [thread.name for thread in threading.enumerate() if "opkit" in thread.name] == []


def test_the_threads_end_with_an_error_too() -> None:
    def fail() -> Any:
        with recording(Clock())(Counted(), 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [thread.name for thread in threading.enumerate() if "opkit" in thread.name] == []


def test_without_sensors_nothing_is_read() -> None:
    with recording(Time().clock())(NoSensors(), 1) as track:
        pass
    assert (track.levels, track.readings) == ([], [])
