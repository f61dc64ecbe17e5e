"""Reading power and energy in time: which meter a GPU has, a thread that samples it, mean watts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from opkit.sensors.nvml import Gpu

INTERVAL = 0.010  # seconds between readings: several to a step of the counter, 1 % of a core
LEAD = 0.3  # seconds run before, for clock and board power to settle
LEAD_AVERAGED = 1.0  # the same where NVML gives the mean of the last second

Reading = tuple[float, float]  # seconds, and joules or watts


@dataclass(frozen=True)
class Meter:
    """How one GPU's power is read.

    Attributes:
        method: as in :class:`opkit.collect.measurement.Power`.
        read: joules since some moment, or watts; None when NVML gives nothing.
        counts: whether ``read`` gives joules.
        lead: seconds to run before.
    """

    method: str
    read: Callable[[], float | None]
    counts: bool
    lead: float


def choose_meter(sensors: Gpu) -> Meter | None:
    """The best meter that the GPU has; None when it has none."""
    if sensors.energy_joules() is not None:
        return Meter("energy counter", sensors.energy_joules, True, LEAD)
    if sensors.power_watts() is None:
        return None
    if sensors.instant:
        return Meter("sampling of instantaneous power", sensors.power_watts, False, LEAD)
    return Meter("sampling of the 1 s average", sensors.power_watts, False, LEAD_AVERAGED)


def mean_rate(readings: Sequence[Reading]) -> float | None:
    """Watts from readings of an energy counter that moves in steps.

    From the first to the last reading that shows a step: the time within which a step happened is
    then known to the interval of the readings, at both ends alike.

    Returns:
        None with fewer than two steps.
    """
    pairs = pairwise(readings)
    steps = [later for earlier, later in pairs if later[1] > earlier[1]]
    if len(steps) < 2:
        return None
    (began, least), (ended, most) = steps[0], steps[-1]
    return (most - least) / (ended - began)


def mean_level(readings: Sequence[Reading]) -> float | None:
    """The mean of readings of power, each weighted with the time until the next (trapezoids).

    Returns:
        None with fewer than two readings.
    """
    if len(readings) < 2 or readings[-1][0] <= readings[0][0]:
        return None
    area = sum(
        (later[0] - earlier[0]) * (earlier[1] + later[1]) / 2
        for earlier, later in pairwise(readings)
    )
    return area / (readings[-1][0] - readings[0][0])


@dataclass
class Sampler:
    """Reads a meter in a thread, from ``with`` to its end; ``readings`` holds what it gave."""

    read: Callable[[], float | None]
    interval: float = INTERVAL
    clock: Callable[[], float] = time.perf_counter
    readings: list[Reading] = field(default_factory=list)

    def __enter__(self) -> Sampler:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="opkit power", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.take()  # the state at the end, whenever the last turn was

    def take(self) -> None:
        """One reading, dated between asking and being answered."""
        asked = self.clock()
        value = self.read()
        if value is not None:
            self.readings.append(((asked + self.clock()) / 2, value))

    def _loop(self) -> None:
        while not self._stop.is_set():
            self.take()
            self._stop.wait(self.interval)
