"""Power drawn while a case runs over and over, by the GPU's energy counter or by sampling.

NVML's numbers lag: the counter moves every 20 to 100 ms, and power read off ``PowerUsage`` is the
mean of the last second. So the case first runs until the numbers are its own, and the counter is
read from one of its steps to another.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from opkit.collect.measurement import Power
from opkit.collect.timing.device import Device, Forward, Run
from opkit.collect.timing.nvml import Gpu
from opkit.collect.timing.stats import deviation

INTERVAL = 0.010  # seconds between readings: several to a step of the counter, 1 % of a core
CHUNK = 0.020  # seconds of work queued at a time
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


def measure_power(
    forward: Forward,
    device: Device,
    seconds: float,
    iteration: float,
    meter: Meter | None = None,
) -> tuple[Power | None, str]:
    """Run ``forward`` back to back and measure the power that it draws.

    Args:
        forward: one iteration.
        device: where.
        seconds: how long to measure, at least.
        iteration: seconds that one iteration takes, roughly.
        meter: stands in for the GPU's own.

    Returns:
        The power, or None and why there is none. ``overhead`` compares with as long a run without
        readings, directly before.
    """
    meter = meter or choose_meter(device.sensors)
    if meter is None:
        return None, "no power: the GPU gives neither energy nor power"
    chunk = max(1, min(1000, math.ceil(CHUNK / iteration))) if iteration > 0 else 1000
    device.run(forward, meter.lead, chunk)
    without = device.run(forward, seconds, chunk)
    with Sampler(meter.read) as sampler:
        measured = device.run(forward, seconds, chunk)
    watts = (mean_rate if meter.counts else mean_level)(sampler.readings)
    if watts is None:
        return None, (
            f"no power: {len(sampler.readings)} readings by {meter.method} in "
            f"{measured.seconds:.2f} s are too few, or the counter did not move"
        )
    each = measured.seconds / measured.iterations
    return Power(
        watts=watts,
        limit_watts=device.sensors.power_limit_watts(),
        joules_per_iteration=watts * each,
        method=meter.method,
        seconds=measured.seconds,
        samples=0 if meter.counts else len(sampler.readings),
        overhead=_overhead(without, measured),
    ), ""


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


def _overhead(without: Run, measured: Run) -> float:
    """By which share iterations took longer while power was read."""
    return deviation(measured.seconds / measured.iterations, without.seconds / without.iterations)
