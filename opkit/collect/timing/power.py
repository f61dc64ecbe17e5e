"""Power drawn while a case runs over and over, by the GPU's energy counter or by sampling.

NVML's numbers lag: the counter moves every 20 to 100 ms, and power read off ``PowerUsage`` is the
mean of the last second. So the case first runs until the numbers are its own, and the counter is
read from one of its steps to another.
"""

from __future__ import annotations

import math

from opkit.collect.measurement import Power
from opkit.collect.timing.device import Device, Forward, Run
from opkit.collect.timing.stats import deviation
from opkit.sensors.meter import Meter, Sampler, choose_meter, mean_level, mean_rate

CHUNK = 0.020  # seconds of work queued at a time


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


def _overhead(without: Run, measured: Run) -> float:
    """By which share iterations took longer while power was read."""
    return deviation(measured.seconds / measured.iterations, without.seconds / without.iterations)
