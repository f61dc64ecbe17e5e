"""Sensors read in the background while a test runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

from opkit.bench.clock import Clock
from opkit.sensors.levels import Levels, Sensors
from opkit.sensors.meter import Meter, Reading, Sampler, mean_level, mean_rate


@dataclass
class Track:
    """What the sensors showed in time.

    Attributes:
        levels: ns of the monotonic clock, and all sensors.
        readings: the power meter's, seconds of the same clock; joules or watts.
    """

    levels: list[tuple[int, Levels]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def within(self, began_ns: int, ended_ns: int) -> list[Levels]:
        """The levels of a stretch of time."""
        return [levels for at, levels in self.levels if began_ns <= at <= ended_ns]


# The meter is read every 10 ms. Without a reading for so long (seconds, and part of the stretch) it
# had stopped to answer, and what it had told is no mean of the stretch.
SILENT_S, SILENT = 0.25, 0.1

Record = Callable[[Sensors, int], AbstractContextManager[Track]]


def recording(clock: Clock) -> Record:
    """What records with this clock: all sensors every so many ms, the meter every 10 ms."""

    @contextmanager
    def record(sensors: Sensors, sample_ms: int) -> Iterator[Track]:
        meter, track = sensors.meter(), Track()
        stop = threading.Event()
        if sensors.kind == "none":
            yield track
            return

        def loop() -> None:
            while not stop.is_set():
                track.levels.append((clock.now_ns(), sensors.levels()))
                stop.wait(sample_ms / 1e3)

        thread = threading.Thread(target=loop, name="opkit sensors", daemon=True)
        thread.start()
        try:
            with _sampling(meter, clock, track):
                yield track
        finally:
            stop.set()
            thread.join()
            track.levels.append((clock.now_ns(), sensors.levels()))

    return record


def mean_watts(
    readings: Sequence[Reading], meter: Meter, began_ns: int, ended_ns: int
) -> float | None:
    """Mean power of a stretch of time; None with too few readings in it, or none for a while.

    An energy counter is read from one of its steps to another (``sensors.meter.mean_rate``),
    levels are averaged with their time (``mean_level``). A counter goes on counting while nobody
    reads it, so only the ends of the stretch must be known; of levels all of it.
    """
    inside = [reading for reading in readings if began_ns <= reading[0] * 1e9 <= ended_ns]
    times = [began_ns / 1e9, *(at for at, _ in inside), ended_ns / 1e9]
    silences = [later - earlier for earlier, later in pairwise(times)]
    if meter.counts:
        silences = [silences[0], silences[-1]]
    if max(silences) > max(SILENT_S, SILENT * (times[-1] - times[0])):
        return None
    return (mean_rate if meter.counts else mean_level)(inside)


def _sampling(meter: Meter | None, clock: Clock, track: Track) -> AbstractContextManager[object]:
    if meter is None:
        return nullcontext()
    return Sampler(meter.read, clock=lambda: clock.now_ns() / 1e9, readings=track.readings)
